"""Benchmarks that other programs score: GenEval, DPG-Bench, VQAScore.

`raev2 t2i export-eval` writes the folders that these programs read, from their own prompt files; they run in their own
environments; `raev2 t2i import-eval` reads what they write and puts the numbers into `RUN/eval`. Nothing is scored
here, so a number carries a benchmark's name only when that benchmark's program computed it.

OUT/export.json     run, seed, sampling settings, hash of the prompts, how many pictures
OUT/images/         geneval   00000/metadata.jsonl, 00000/samples/0000.png ...
                    dpg       ID.png, four pictures as 2 x 2 tiles
                    vqascore  00000.png ..., and dataset.json: [{"images": [FILE], "texts": [PROMPT]}, ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raev2.errors import DataError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from raev2.batch import MetricResult

EXPORT = "export.json"
CHUNK = 64  # pictures in one call of the generator; noise goes by number, so it does not change them


@dataclass(frozen=True)
class Prompt:
    """A prompt with the name of its picture or folder, and its line in the benchmark's own file."""

    name: str
    text: str
    line: str = ""


# Prompts as the benchmarks distribute them


def read_geneval(source: Path) -> list[Prompt]:
    """GenEval's `evaluation_metadata.jsonl`."""
    lines = [line for line in _text(source).splitlines() if line.strip()]
    try:
        rows = [json.loads(line) for line in lines]
        return [Prompt(f"{i:05d}", row["prompt"], line) for i, (row, line) in enumerate(zip(rows, lines, strict=True))]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"prompts {source}", "not GenEval's metadata", got=repr(error),
            expected="one JSON object with 'prompt' a line",
        ) from error  # fmt: skip


def read_dpg(source: Path) -> list[Prompt]:
    """The folder `prompts` of DPG-Bench: one text file a prompt, named by its id."""
    files = sorted(source.glob("*.txt")) if source.is_dir() else []
    if not files:
        raise DataError(f"prompts {source}", "no prompts", expected="the folder of DPG-Bench with ID.txt files")
    return [Prompt(file.stem, " ".join(_text(file).split())) for file in files]


def read_lines(source: Path) -> list[Prompt]:
    """A text file with one prompt a line."""
    from raev2_tasks.t2i.text.prompts import read_prompts

    return [Prompt(f"{i:05d}", text) for i, text in enumerate(read_prompts(source))]


# Pictures as the benchmarks read them


def write_geneval(out: Path, prompt: Prompt, images_u8: Tensor) -> None:
    """A folder with the prompt's metadata and its pictures."""
    (out / prompt.name / "samples").mkdir(parents=True)
    (out / prompt.name / "metadata.jsonl").write_text(prompt.line + "\n", encoding="utf-8")
    for number, image in enumerate(images_u8):
        _save(image, out / prompt.name / "samples" / f"{number:04d}.png")


def write_dpg(out: Path, prompt: Prompt, images_u8: Tensor) -> None:
    """One picture of 2 x 2 tiles."""
    import torch

    top, bottom = (torch.cat(list(images_u8[row : row + 2]), dim=2) for row in (0, 2))
    _save(torch.cat([top, bottom], dim=1), out / f"{prompt.name}.png")


def write_single(out: Path, prompt: Prompt, images_u8: Tensor) -> None:
    """One picture."""
    _save(images_u8[0], out / f"{prompt.name}.png")


# Results as the benchmarks write them


def geneval_results(file: Path, about: Mapping[str, Any]) -> list[MetricResult]:
    """Numbers of GenEval's `results.jsonl`: the mean over its six tags (the published score) and its parts.

    The name is `geneval` for all 553 prompts of the benchmark, and `geneval_subset` for others.
    """
    from raev2.batch import MetricResult
    from raev2_tasks.t2i.benchmark.g60 import geneval_rows
    from raev2_tasks.t2i.benchmark.rows import PromptRow
    from raev2_tasks.t2i.benchmark.rules import ImageScore
    from raev2_tasks.t2i.benchmark.scoring import summarise

    try:
        found = [json.loads(line) for line in _text(file).splitlines() if line.strip()]
        rows = [PromptRow(row["prompt"], row["tag"], ()) for row in found]
        correct = [bool(row["correct"]) for row in found]
    except (ValueError, KeyError, TypeError) as error:
        raise _not_results(file, "GenEval's results.jsonl", error) from error
    _check_count(file, len(found), about["num_images"])
    scores = [ImageScore(right, right, row.tag, {"values": {}}) for right, row in zip(correct, rows, strict=True)]
    summary = summarise(scores, rows, "geneval")  # the judgement is GenEval's own
    low, high = summary.interval
    whole = {(row.tag, row.prompt) for row in rows} == {(row.tag, row.prompt) for row in geneval_rows()}
    name = "geneval" if whole else "geneval_subset"
    note = f"95 % interval {low:.3f} to {high:.3f}, prompts drawn again"
    meaning = "Share of pictures that show what their prompt asks for by GenEval's own scorer, mean over its six tags."
    details = [
        *((tag, share, summary.images_per_tag[tag], "Share of correct pictures for prompts of this tag.")
          for tag, share in summary.per_tag.items()),
        ("micro", summary.micro, summary.num_images, "Share of correct pictures, whatever the tag."),
        ("any", summary.any, summary.num_prompts, "Share of prompts with at least one correct picture."),
    ]  # fmt: skip
    return [
        MetricResult(
            name, summary.macro, summary.num_images, (high - low) / (2 * 1.96), note,
            better="higher", role="headline", about=meaning,
        ),
        *(MetricResult(f"{name}_{part}", value, num, better="higher", role="detail", about=text)
          for part, value, num, text in details),
    ]  # fmt: skip


def dpg_results(file: Path, about: Mapping[str, Any]) -> list[MetricResult]:
    """Numbers of the results file of DPG-Bench: the mean over prompts times 100, and its categories."""
    from raev2.batch import MetricResult

    rows, categories, num_pictures = {}, {}, about["images_per_prompt"]
    for line in _text(file).splitlines():
        score = re.fullmatch(r"(.+?)((?:, [0-9.]+){2,})", line)
        category = re.fullmatch(r"\t([\w -]+): ([0-9.]+)", line)
        if score:
            *pictures, average = score[2].removeprefix(", ").split(", ")
            rows[Path(score[1]).name], num_pictures = float(average), min(num_pictures, len(pictures))
        elif category and " - " not in category[1]:
            categories[category[1]] = float(category[2])
    if not rows:
        raise _not_results(file, "the results file of DPG-Bench", None)
    _check_count(file, len(rows), about["num_prompts"], "The benchmark passes over pictures that fail; see its log.")
    if num_pictures < about["images_per_prompt"]:
        raise DataError(
            f"results {file}", "too few pictures of a prompt were scored", got=num_pictures,
            expected=str(about["images_per_prompt"]), hint="Run DPG-Bench with --pic-num 4 and --resolution EDGE_PX.",
        )  # fmt: skip
    values = list(rows.values())
    meaning = "100 x share of questions answered right by DPG-Bench's own scorer, each only if those it depends on are."
    part = "Questions of this category by themselves, last tile of each prompt."
    return [
        MetricResult(
            "dpg", 100 * sum(values) / len(values), len(values), _stderr([100 * v for v in values]),
            better="higher", role="headline", about=meaning,
        ),
        *(MetricResult(f"dpg_{name}", value, len(values), better="higher", role="detail", about=part)
          for name, value in categories.items()),
    ]  # fmt: skip


def vqascore_results(file: Path, about: Mapping[str, Any]) -> list[MetricResult]:
    """Mean of a JSON list with one score for each entry of `dataset.json`, in its order."""
    from raev2.batch import MetricResult

    try:
        values = [_number(value) for value in json.loads(_text(file))]
    except (ValueError, TypeError) as error:
        raise _not_results(file, "a JSON list of scores", error) from error
    _check_count(file, len(values), about["num_images"])
    numbers = sum(values) / len(values), len(values), _stderr(values)
    meaning = "Probability that a model says yes when asked whether the picture shows its prompt."
    return [MetricResult("vqascore", *numbers, better="higher", role="headline", about=meaning)]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's files are read and written.

    prompts   what to give as --prompts
    scorer    what scores it by its authors' code; None: there are several, the user must say which
    """

    read: Callable[[Path], list[Prompt]]
    write: Callable[[Path, Prompt, Tensor], None]
    results: Callable[[Path, Mapping[str, Any]], list[MetricResult]]
    images_per_prompt: int
    prompts: str
    scorer: str | None


BENCHMARKS = {
    "geneval": Benchmark(
        read_geneval, write_geneval, geneval_results, 4, "evaluation_metadata.jsonl of GenEval",
        "Mask2Former Swin-S (mmdet), CLIP ViT-L/14",
    ),
    "dpg": Benchmark(read_dpg, write_dpg, dpg_results, 4, "the folder prompts of DPG-Bench", "mPLUG-large VQA"),
    "vqascore": Benchmark(read_lines, write_single, vqascore_results, 1, "a text file, one prompt a line", None),
}  # fmt: skip


# Commands


def export_eval(argv: Sequence[str]) -> None:
    """Generate the pictures of a benchmark and write them in its own layout."""
    from raev2.files.artefact import write_json
    from raev2.model.opened import image_sampler, open_trained

    parser = argparse.ArgumentParser("raev2 t2i export-eval", description=export_eval.__doc__)
    parser.add_argument("--run", required=True, metavar="DIR")
    parser.add_argument("--benchmark", required=True, choices=tuple(BENCHMARKS))
    parser.add_argument("--prompts", required=True, type=Path, help="the benchmark's own prompts")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    benchmark, out = BENCHMARKS[options.benchmark], options.out
    if out.exists():
        raise SpecError("--out", "exists already", got=str(out), hint="Choose another folder.")
    prompts = benchmark.read(options.prompts)
    trained = open_trained(options.run)
    spec = trained.run.spec
    if spec.task.name != "t2i":
        raise SpecError("--run", "not a run of this task", got=spec.task.name, expected="t2i")
    generate = image_sampler(trained, spec.sampling, options.seed)
    num = benchmark.images_per_prompt
    texts = [prompt.text for prompt in prompts for _ in range(num)]
    for first in range(0, len(prompts), CHUNK // num):
        part = prompts[first : first + CHUNK // num]
        numbers = range(first * num, (first + len(part)) * num)
        cond = trained.task.prompt_cond(spec, [texts[i] for i in numbers])  # type: ignore[attr-defined]
        images = generate(cond, numbers).cpu()
        for prompt, group in zip(part, images.split(num), strict=True):
            (out / "images").mkdir(parents=True, exist_ok=True)
            benchmark.write(out / "images", prompt, group)
        print(f"{numbers.stop} of {len(texts)} pictures", flush=True)
    if options.benchmark == "vqascore":
        entries = [{"images": [f"images/{prompt.name}.png"], "texts": [prompt.text]} for prompt in prompts]
        write_json(out / "dataset.json", entries)
    height, width = images.shape[2:]
    joined = "\n".join(prompt.text for prompt in prompts)
    about = {
        "benchmark": options.benchmark, "run": str(options.run), "seed": options.seed,
        "sampling": spec.sampling.model_dump(mode="json"), "image_size_px": [height, width],
        "images_per_prompt": num, "num_prompts": len(prompts), "num_images": len(texts),
        "prompts_sha256": hashlib.sha256(joined.encode()).hexdigest(),
    }  # fmt: skip
    write_json(out / EXPORT, about)
    print(f"{out / 'images'}: {len(texts)} pictures of {len(prompts)} prompts, {width} x {height} px")


def import_eval(argv: Sequence[str]) -> None:
    """Read the results that a benchmark's program wrote for an export, into RUN/eval/BENCHMARK.json."""
    import torch

    from raev2.eval.protocols import check_results, write_result
    from raev2.spec import SamplingSpec
    from raev2.spec_io import load_spec
    from raev2.task import EvalContext

    parser = argparse.ArgumentParser("raev2 t2i import-eval", description=import_eval.__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR")
    parser.add_argument("--export", required=True, type=Path, metavar="DIR", help="folder of export-eval")
    parser.add_argument("--results", required=True, type=Path, metavar="FILE", help="what the benchmark wrote")
    parser.add_argument("--scorer", help="program and weights that scored, where they differ from the benchmark's own")
    options = parser.parse_args(argv)
    try:
        about = json.loads((options.export / EXPORT).read_text(encoding="utf-8"))
        benchmark = BENCHMARKS[about["benchmark"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"export {options.export}", "not a folder of `raev2 t2i export-eval`", got=repr(error)
        ) from error
    scorer = options.scorer or benchmark.scorer
    if scorer is None:
        raise SpecError(
            "--scorer", "which model scored?", expected="a name such as clip-flant5-xxl",
            hint="Scores of different models do not compare.",
        )  # fmt: skip
    results = benchmark.results(options.results, about)
    check_results(f"benchmark {about['benchmark']}", results)
    spec = load_spec(options.run / "spec.yaml")
    spec = spec.replace(sampling=SamplingSpec.model_validate(about["sampling"]))
    context = EvalContext(
        spec=spec, rae=None, dataset=lambda split: None, device=torch.device("cpu"),  # type: ignore[arg-type, return-value]
        cache_dir=options.run / "eval" / "reference", generate=lambda cond, indices: torch.empty(0),
    )  # fmt: skip
    file = options.run / "eval" / f"{about['benchmark']}.json"
    description = f"pictures of {about['num_prompts']} prompts, scored by {scorer}"
    extra = {"description": description, "needs_generator": True, "scorer": scorer, "export": about}
    write_result(file, about["benchmark"], results, context, extra)
    for result in results:
        print(f"{result.name:28} {result.value:.5g}")
    print(file)


COMMANDS = {"export-eval": export_eval, "import-eval": import_eval}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(file), "cannot be read", got=str(error)) from error


def _save(image_u8: Tensor, file: Path) -> None:
    from PIL import Image

    Image.fromarray(image_u8.permute(1, 2, 0).contiguous().numpy()).save(file)


def _number(value: Any) -> float:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"not a number: {value!r}")
    return float(value)


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def _not_results(file: Path, expected: str, error: Exception | None) -> DataError:
    return DataError(f"results {file}", "cannot be read", got=None if error is None else repr(error), expected=expected)


def _check_count(file: Path, got: int, expected: int, hint: str = "") -> None:
    if got != expected:
        raise DataError(
            f"results {file}", "other pictures than the export has", got=f"{got} results", expected=str(expected),
            hint=hint,
        )  # fmt: skip
