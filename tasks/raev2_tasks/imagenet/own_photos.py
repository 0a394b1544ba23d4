"""`raev2 imagenet own-photos`: how long to train on a dataset, as the command that does it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence

from raev2.command.actions import print_table
from raev2.files.manifest import read_manifest
from raev2.spec import LoopSpec, RunSpec
from raev2.task import check_known
from raev2_tasks.imagenet.recipes import OWN_PHOTOS, RECIPES

# Times that each picture is seen, at least and at most in pictures: few pictures are learnt by heart before they are
# drawn well, and of many an epoch is long. On a CPU the least is what the quickstart needs. Choices, not measured.
LENGTHS = {
    "cpu": {"tokenizer": (8, 8_000, 38_400), "generator": (20, 17_600, 102_400)},
    "gpu": {"tokenizer": (100, 256_000, 8_192_000), "generator": (400, 512_000, 32_768_000)},
}
SIZES = ("cpu", *(f"{memory}gb" for memory in OWN_PHOTOS))


def own_photos(argv: Sequence[str]) -> None:
    """The recipe own-photos-SIZE with lengths for your number of pictures: prints the command that trains it."""
    parser = argparse.ArgumentParser("raev2 imagenet own-photos", description=own_photos.__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="dataset folder with your pictures")
    parser.add_argument("--size", default="cpu", metavar="|".join(SIZES), help="of the machine (default: cpu)")
    parser.add_argument("--run", metavar="DIR", help="run folder (default: that of the recipe)")
    options = parser.parse_args(argv)
    check_known("--size", "no recipe for it", options.size, dict.fromkeys(SIZES))
    manifest, spec = read_manifest(options.data), RECIPES[f"own-photos-{options.size}"]()
    num = int(manifest["splits"]["train"]["num_samples"])
    lengths = {stage: length(options.size, stage, num) for stage in ("tokenizer", "generator")}
    rows = [(stage, f"{images:,}", f"{images / num:.0f} times each picture") for stage, images in lengths.items()]
    print_table(("stage", "images", f"of {num:,} pictures"), rows)
    words = ["raev2", "train", "--task", "imagenet", "--recipe", spec.recipe, "--data", options.data]
    words += ["--run", options.run] if options.run else []
    settings = [setting for stage, images in lengths.items() for setting in scaled(spec, stage, images)]
    settings += [] if manifest["classes"] else ["task.unconditional=true"]
    print(f"\n{shlex.join([*words, *(word for setting in settings for word in ('--set', setting))])}")


def length(size: str, stage: str, num_pictures: int) -> int:
    """Training images for so many pictures."""
    times, least, most = LENGTHS["cpu" if size == "cpu" else "gpu"][stage]
    return min(max(times * num_pictures, least), most)


def scaled(spec: RunSpec, stage: str, images: int) -> Iterator[str]:
    """Settings that make a training of another length: the schedule and all that is done now and then go along."""
    loop: LoopSpec = getattr(spec, f"{stage}_training")
    names = ("images", "sample_every_images", "save_every_images", "eval_every_images")
    values = {name: getattr(loop, name, None) for name in names}
    values |= {f"schedule.{name}": getattr(loop.schedule, name) for name in ("warmup_images", "decay_start_images")}
    for name, value in values.items():
        if value and images != loop.images:
            batches = max(1, round(value * images / loop.images / loop.batch_size))
            yield f"{stage}_training.{name}={batches * loop.batch_size}"
