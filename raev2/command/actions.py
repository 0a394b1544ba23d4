"""Commands of the core but `train`, which is in cli.py: options in, text out. Listings come from a package."""

from __future__ import annotations

import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raev2.errors import FileError, SpecError, did_you_mean
from raev2.files.replace import SAMPLES, Kind, check_replaceable
from raev2.spec import ExpectedSpec, Guidance, RunSpec, SamplingSpec
from raev2.spec_io import fingerprint
from raev2.task import Task, get_recipe, get_task, usable_tasks

if TYPE_CHECKING:
    from raev2.batch import MetricResult
    from raev2.model.opened import Source

OK, FAILED = 0, 1


def sample(options: Namespace) -> int:
    """`raev2 sample`."""
    from raev2 import pipeline

    _check_positive("--n", options.n)
    _check_positive("--steps", options.steps)
    _check_positive("--seed", options.seed, least=0)
    source = source_of(options)
    sampling = _sampling(source.spec.sampling, options)
    given = {name: value for name in ("n", *options.conditions) if (value := getattr(options, name)) is not None}
    if options.npz:
        _refuse_existing_array(options)
        written = pipeline.sample_array(source, given, sampling, options.seed, file=Path(options.npz))
    else:
        out = Path(options.out or source.dir / "samples" / f"seed-{options.seed}")
        refuse_existing(options, out, SAMPLES)
        written = pipeline.sample_run(source, given, sampling, options.seed, out=out) / "grid.png"
    print(f"guidance: {_plan(sampling)}\n{written}")
    return OK


def evaluate(options: Namespace) -> int:
    """`raev2 eval`: a run, or pictures of any origin."""
    if options.action == "reference":
        return _build_reference(options)
    if options.images:
        return _evaluate_pictures(options)
    from raev2 import pipeline

    for name in ("reference", "out"):
        if getattr(options, name):
            raise SpecError(f"--{name}", "has no effect without --images")
    source = source_of(options)
    expected = _expected(options, source.spec)
    protocols = options.protocol or [*source.spec.evaluation.protocols, *(row.protocol for row in expected)]
    results = pipeline.evaluate_run(source, list(dict.fromkeys(protocols)))
    for protocol, found in results.items():
        _print_metrics(protocol, map(vars, found))
    print(f"\n{source.dir / 'eval'}")
    return _compare_expected(expected, results)


def _evaluate_pictures(options: Namespace) -> int:
    """`raev2 eval --images`."""
    from raev2.eval.pictures import find_evaluator, score_pictures
    from raev2.eval.protocols import write_numbers
    from raev2.training.run import make_accelerator

    for option, given in {"--reference": options.reference, "--protocol": options.protocol}.items():
        if not given:
            raise SpecError(option, "needed with --images")
    if len(options.protocol) > 1:
        raise SpecError("--protocol", "one at a time with --images", got=" ".join(options.protocol))
    (protocol,), expected = options.protocol, _expected(options, None)
    images, device = Path(options.images), make_accelerator("fp32").device
    out = Path(options.out or images.with_name(f"{images.name}.{protocol}.json"))
    evaluator = find_evaluator([get_task(options.task)] if options.task else usable_tasks(), protocol)
    results, about = score_pictures(evaluator, images, Path(options.reference), device, _workers(options))
    write_numbers(out, protocol, results, about, device)
    _print_metrics(protocol, map(vars, results))
    print(f"\n{out}")
    return _compare_expected(expected, {protocol: results})


def _build_reference(options: Namespace) -> int:
    """`raev2 eval reference build`."""
    from raev2.eval.pictures import build_reference, find_evaluator
    from raev2.training.run import make_accelerator

    tasks, device = [get_task(options.task)] if options.task else usable_tasks(), make_accelerator("fp32").device
    for evaluator in [find_evaluator(tasks, protocol) for protocol in options.protocol]:
        files = build_reference(evaluator, Path(options.data), options.split, device, _workers(options))
        print("\n".join(map(str, files)))
    return OK


def _workers(options: Namespace) -> int:
    return min(8, os.cpu_count() or 1) if options.workers is None else options.workers


COMMANDS = {"sample": sample, "eval": evaluate}


def source_of(options: Namespace, task: str | None = None) -> Source:
    """The model that the options of `cli.source_options` name; `task` where the command belongs to one."""
    from raev2.model.opened import find_source

    names = ("run", "task", "generator", "tokenizer", "recipe", "settings", "data", "ema")
    source = find_source(**{"task": task, **{name: vars(options)[name] for name in names if name in options}})
    if (wanted := vars(options).get("compile")) is None:
        return source
    return replace(source, spec=source.spec.replace(sampling=source.spec.sampling.replace(compile=wanted)))


def _expected(options: Namespace, spec: RunSpec | None) -> Sequence[ExpectedSpec]:
    """What `--expect` compares with: the numbers that the recipe it names states, or those in the spec of the run."""
    if options.expect is None:
        return ()
    if options.expect:
        spec = find_recipe(options.expect, options.task, "--expect")[1]
    if spec is None:
        raise SpecError("--expect", "which recipe states the numbers?", expected="--expect RECIPE")
    expected = [row for row in spec.evaluation.expected if row.protocol in (options.protocol or [row.protocol])]
    if not expected:
        raise SpecError(
            "--expect", f"the recipe {spec.recipe} states no number for these protocols",
            expected="entries in evaluation.expected", hint="Name another recipe: --expect RECIPE.",
        )  # fmt: skip
    return expected


def _compare_expected(expected: Sequence[ExpectedSpec], results: Mapping[str, Sequence[MetricResult]]) -> int:
    """Print what was expected beside what was obtained; the exit code."""
    rows, code = [], OK
    for row in expected:
        obtained = {result.name: result.value for result in results[row.protocol]}.get(row.metric)
        good = obtained is not None and abs(obtained - row.value) <= row.tolerance
        code = code if good else FAILED
        shown = "not measured" if obtained is None else f"{obtained:.6g}"
        verdict = "ok" if good else "OUTSIDE"
        rows.append((row.protocol, row.metric, f"{row.value:g}", shown, f"{row.tolerance:g}", verdict, row.source))
    if rows:
        print()
        print_table(("protocol", "metric", "expected", "obtained", "tolerance", "", "source"), rows)
    return code


def _sampling(default: SamplingSpec, options: Namespace) -> SamplingSpec:
    """The run's sampling settings with the options of the command line in their place."""
    guidance: dict[str, Any] = default.guidance.model_dump()
    if options.guidance is not None and options.guidance != guidance["kind"]:
        guidance = {"kind": options.guidance}
    given = {"scale": options.scale, "interval": options.interval, "weak": options.weak}
    guidance |= {name: value for name, value in given.items() if value is not None}
    try:
        spec = Guidance.model_validate(guidance)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])  # for an interval, which end follows
        if first["type"] == "extra_forbidden":
            raise SpecError(f"--{field}", f"has no effect with guidance {guidance['kind']}") from None
        got = None if first["type"] in ("missing", "value_error") else guidance[field]
        what = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"--{field}", f"guidance {guidance['kind']}: {what.lower()}", got=got) from None
    return default.replace(guidance=spec, steps=options.steps or default.steps)


def _check_positive(option: str, value: int | None, least: int = 1) -> None:
    if value is not None and not least <= value < 2**63:
        raise SpecError(option, "not usable", got=value, expected=f"a number >= {least}")


def _plan(sampling: SamplingSpec) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in sampling.guidance.model_dump().items() if name != "kind")
    return f"{sampling.guidance.kind} {settings} | {sampling.solver}, {sampling.steps} steps"


def find_recipe(name: str, task_name: str | None, where: str) -> tuple[Task, RunSpec]:
    """The recipe of this name and its task; SpecError at `where` for none, or for several without a task."""
    candidates = [get_task(task_name)] if task_name else usable_tasks()
    having = [task for task in candidates if name in task.recipes()]
    if not having:
        known = [recipe for task in candidates for recipe in task.recipes()]
        raise SpecError(where, "unknown recipe", got=repr(name), hint=did_you_mean(name, known))
    if len(having) > 1:
        raise SpecError(
            where, f"several tasks have a recipe {name!r}", expected=f"--task {'|'.join(t.name for t in having)}"
        )
    return having[0], get_recipe(having[0], name)


def dry_run(task: Task, spec: RunSpec, run_dir: Path, stage: str) -> int:
    """`raev2 train --dry-run`: sizes and findings; raises the first error after them."""
    from raev2.training.preflight import Plan, preflight, run_sizes

    print_sizes(task, spec, run_sizes(task, spec))
    print(f"arithmetic, activations, memory of 1 to 64 GPUs: raev2 show {spec.recipe} --task {task.name}")
    findings = list(preflight(Plan(task, spec, run_dir, stage)))
    print()
    print_table(("needed", "state", "detail"), [(f.what, f.state, f.detail) for f in findings])
    print(f"\nrun folder {run_dir}: {'exists' if run_dir.exists() else 'will be created'}\nnothing was started")
    for error in filter(None, (finding.error for finding in findings)):
        raise error
    return OK


def print_sizes(task: Task, spec: RunSpec, sizes: Iterable[tuple[str, str]]) -> None:
    """What a run will need."""
    print(f"{task.name} / {spec.recipe}   fingerprint {fingerprint(spec)}")
    print_table(("size", "value"), sizes)


def _print_results(run_dir: Path) -> None:
    for file in sorted((run_dir / "eval").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        _print_metrics(result["protocol"], result["results"])
    print(f"\n{run_dir / 'report.html'}")


def _print_metrics(protocol: str, results: Iterable[Mapping[str, Any]]) -> None:
    from raev2.eval.protocols import direction, glossary

    results = list(results)
    print(f"\n{protocol}")
    rows = [
        (
            r["name"], f"{r['value']:.6g}", "" if r["stderr"] is None else f"{r['stderr']:.2g}", r["num_samples"],
            direction(r), r.get("warning") or r["note"],
        ) for r in results
    ]  # fmt: skip
    print_table(("metric", "value", "stderr", "n", "better", "note"), rows)
    for names, text in glossary(results):
        print(f"  {names}: {text}")


def print_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, wrapped to the terminal; one line a row where there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for name in header:
        table.add_column(Text(str(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    text = io.StringIO()  # rich itself leaves the process, without a word, where nobody takes its output
    Console(file=text, width=None if sys.stdout.isatty() else 10_000, color_system=None).print(table)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def refuse_existing(options: Namespace, out: Path, kind: Kind) -> None:
    """The folder to write must be free, or with --overwrite ours and without what the command reads."""
    given = [value for name, value in vars(options).items() if name != "out"]
    needed = [text for value in given for text in (value if isinstance(value, list) else [value])]
    check_replaceable(out, kind, options.overwrite, needed)


def _refuse_existing_array(options: Namespace) -> None:
    """The same for the file of --npz."""
    from raev2.files.picture_array import PLAN, holds_plan

    file = Path(options.npz)
    if file.suffix != ".npz":
        raise SpecError("--npz", "not usable", got=str(file), expected="a name that ends in .npz")
    if file.exists() and not options.overwrite:
        raise SpecError("--npz", "exists already", got=str(file), hint="Choose another file, or add --overwrite.")
    if file.exists() and not holds_plan(file):
        hint = "Choose another file, or move this one away."
        raise FileError(str(file), "exists and is not replaced", got=f"no {PLAN} of ours in it", hint=hint)
