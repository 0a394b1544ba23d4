"""All commands but `train`, which is in cli.py: options in, text out."""

from __future__ import annotations

import json
import os
import platform
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from pydantic import ValidationError

from raev2.errors import DataError, RaeError, SpecError, did_you_mean
from raev2.files.assets import INCEPTION_WEIGHTS, LPIPS_WEIGHTS
from raev2.files.damage import damaged
from raev2.files.manifest import read_manifest, verify_dataset
from raev2.files.replace import ARTEFACT, EXPORT, RECONSTRUCTIONS, SAMPLES, Kind, check_replaceable
from raev2.spec import Guidance, RunSpec, SamplingSpec
from raev2.spec_io import apply_overrides, fingerprint, load_spec, spec_to_dict
from raev2.task import (
    Task,
    get_data_recipe,
    get_recipe,
    get_task,
    installed_data_recipes,
    installed_tasks,
    usable_tasks,
)
from raev2.tokenizer.encoder_table import ENCODERS, encoder_asset

OK, FAILED = 0, 1


def sample(options: Namespace) -> int:
    """`raev2 sample`."""
    from raev2 import pipeline

    _check_positive("--n", options.n)
    _check_positive("--steps", options.steps)
    _check_positive("--seed", options.seed, least=0)
    run_dir = pipeline.find_run(options.run, options.task)
    out = Path(options.out or run_dir / "samples" / f"seed-{options.seed}")
    _refuse_existing(options, out, SAMPLES)
    sampling = _sampling(load_spec(run_dir / "spec.yaml").sampling, options)
    given = {name: value for name in ("n", *options.conditions) if (value := getattr(options, name)) is not None}
    pipeline.sample_run(run_dir, given, sampling, options.seed, out=out)
    print(f"guidance: {_plan(sampling)}\n{out / 'grid.png'}")
    return 0


def reconstruct(options: Namespace) -> int:
    """`raev2 reconstruct`."""
    from raev2 import pipeline

    out = Path(options.out)
    _refuse_existing(options, out, RECONSTRUCTIONS)
    rows = pipeline.reconstruct_files(options.run, [Path(path) for path in options.images], out)
    shown = [(Path(row.file).name, f"{row.psnr:.2f}", f"{row.ssim:.4f}", f"{row.distance:.4f}") for row in rows]
    mean = ("mean", *(f"{sum(float(row[i]) for row in shown) / len(shown):.4f}" for i in (1, 2, 3)))
    _print_table(("file", "PSNR dB", "SSIM", rows[0].distance_name), [*shown, mean])
    print(f"\n{out / 'grid.png'}")
    return 0


def evaluate(options: Namespace) -> int:
    """`raev2 eval`."""
    from raev2 import pipeline

    run_dir = pipeline.find_run(options.run, options.task)
    for protocol, results in pipeline.evaluate_run(run_dir, options.protocol or ()).items():
        _print_metrics(protocol, map(vars, results))
    print(f"\n{run_dir / 'eval'}")
    return 0


def report(options: Namespace) -> int:
    """`raev2 report`."""
    from raev2 import pipeline
    from raev2.report.page import write_report

    run_dir = pipeline.find_run(options.run, options.task)
    with damaged(run_dir):
        print(write_report(run_dir))
    return 0


def show(options: Namespace) -> int:
    """`raev2 show`."""
    task, spec = _find_recipe(options.recipe, options.task)
    spec = apply_overrides(spec, options.overrides)
    print(yaml.safe_dump(spec_to_dict(spec), sort_keys=False, allow_unicode=True))
    _print_sizes(task, spec)
    return OK


def recipes(options: Namespace) -> int:
    """`raev2 recipes`."""
    found = [get_task(options.task)] if options.task else usable_tasks()
    rows = [(task.name, name, recipe().summary) for task in found for name, recipe in task.recipes().items()]
    _print_table(("task", "recipe", "what it is"), rows)
    return OK


def tasks(options: Namespace) -> int:
    """`raev2 tasks`."""
    rows = []
    for name, point in sorted(installed_tasks().items()):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            task = get_task(name)
            rows.append((name, origin, ", ".join(task.recipes()), task.summary))
        except RaeError as error:
            rows.append((name, origin, "", str(error)))
    _print_table(("task", "from", "recipes", "what it is"), rows)
    return OK


def encoders(options: Namespace) -> int:
    """`raev2 encoders [check NAME]`."""
    if options.action == "check":
        if options.name is None:
            raise SpecError("raev2 encoders check", "which encoder?", expected="a name, timm:ID, hf:ID or a folder")
        from raev2.tokenizer.encoders import check_encoder

        checks = check_encoder(options.name)
        _print_table(
            ("check", "result", "detail"), [(name, "ok" if ok else "FAILED", text) for name, ok, text in checks]
        )
        return OK if all(ok for _, ok, _ in checks) else FAILED
    rows = [
        (e.name, e.route, e.model_id, e.width, e.depth, e.patch_size, e.norm, e.licence, "gated" if e.gated else "")
        for e in ENCODERS.values()
    ]
    _print_table(("name", "route", "id", "width", "depth", "patch", "norm", "licence", "access"), rows)
    return OK


def data(options: Namespace) -> int:
    """`raev2 data`."""
    if options.action == "list":
        found = [get_data_recipe(name) for name in sorted(installed_data_recipes())]
        _print_table(
            ("recipe", "size", "licence", "what it is", "options"),
            [(r.name, r.size, r.licence, r.summary, ", ".join(r.options)) for r in found],
        )
        return OK
    if options.recipe is None:
        raise SpecError(
            f"raev2 data {options.action}", "which one?", expected="a recipe, or for verify a dataset folder"
        )
    if options.action == "verify":
        folder = Path(options.recipe)
        name = str(read_manifest(folder).get("recipe"))
        # The recipe that wrote a folder knows its format; a folder written by hand is one of pictures.
        verify = get_data_recipe(name).verify if name in installed_data_recipes() else verify_dataset
        with damaged(f"data {folder / 'manifest.json'}", DataError):
            manifest = verify(folder)
            counts = ", ".join(f"{name} {split['num_samples']:,}" for name, split in manifest["splits"].items())
            print(f"{options.recipe}: intact ({counts}; fingerprint {manifest['fingerprint'][:12]})")
        return OK
    recipe = get_data_recipe(options.recipe)
    pairs = [override.partition("=") for override in options.overrides]
    settings = {name: value for name, _, value in pairs}
    out = Path(options.out or Path("data") / options.recipe)
    print("\n".join(recipe.plan(recipe.resolve(settings))))
    if options.action == "build":
        manifest = recipe.build(out, settings, options.overwrite)
        counts = ", ".join(f"{name} {split['num_samples']:,}" for name, split in manifest["splits"].items())
        classes = f", {len(manifest['classes'])} classes" if manifest["classes"] else ""
        print(f"{out}: {counts}{classes}, {manifest['rejected']} rejected")
        if manifest.get("duplicates"):
            print(f"in val and in train: {manifest['duplicates']:,}")
    return OK


def assets(options: Namespace) -> int:
    """`raev2 assets`."""
    from raev2.training.preflight import Plan, fetch_all, needed_assets, with_tokenizer

    task, spec = _find_recipe(options.recipe, options.task)
    spec = apply_overrides(spec, options.overrides)
    found = needed_assets(Plan(task, with_tokenizer(spec, download=False), Path()))
    _print_table(
        ("weights", "state", "from", "to"), [(a.what, a.fault() or "ok", a.url or "local", a.place) for a in found]
    )
    if options.action == "fetch":
        fetch_all(found)
    return OK


def latents(options: Namespace) -> int:
    """`raev2 latents stats|build`."""
    from raev2 import pipeline

    write = {"stats": pipeline.write_latent_stats, "build": pipeline.write_latents}[options.action]
    print(write(options.run, Path(options.data), options.split, Path(options.out)))
    return OK


def analyse(options: Namespace) -> int:
    """`raev2 analyse`."""
    from raev2.analysis.command import analyse as run

    table = run(options)
    print(f"{table.markdown()}\nwritten to {options.out}/{table.name}.*")
    return OK


def bench(options: Namespace) -> int:
    """`raev2 bench`."""
    from raev2.command.bench import run_benchmarks, table

    print(table(run_benchmarks(options.names, Path(options.json) if options.json else None)))
    return OK


def import_(options: Namespace) -> int:
    """`raev2 import`."""
    from raev2.command.convert_actions import import_weights

    _refuse_existing(options, Path(options.out), ARTEFACT)
    _print_table(("what", "value"), import_weights(options))
    return OK


def export(options: Namespace) -> int:
    """`raev2 export`."""
    from raev2.command.convert_actions import export_weights

    _refuse_existing(options, Path(options.out), EXPORT)
    _print_table(("what", "where"), export_weights(options))
    return OK


def doctor(options: Namespace) -> int:
    """`raev2 doctor`."""
    import torch

    from raev2.training.run import package_versions

    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, version or "not installed") for name, version in package_versions().items()]
    rows.append(("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()}"))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "none; runs on the CPU"))
    rows.append(("bf16", "fast" if _has_fast_bf16() else "emulated: use --set precision=fp32"))
    for extra, missing in _missing_of_extras().items():
        rows.append(
            (f"extra {extra}", f"missing {', '.join(missing)}: pip install 'raev2[{extra}]'" if missing else "ok")
        )
    assets = [encoder_asset("micro"), *LPIPS_WEIGHTS.values(), INCEPTION_WEIGHTS]
    rows += [(asset.what, "ok" if asset.fault() is None else str(asset.error())) for asset in assets]
    _print_table(("what", "state"), rows)
    return OK


COMMANDS = {
    "sample": sample, "reconstruct": reconstruct, "eval": evaluate, "report": report,
    "show": show, "recipes": recipes, "tasks": tasks, "encoders": encoders, "data": data, "assets": assets,
    "latents": latents,
    "import": import_, "export": export, "analyse": analyse, "bench": bench, "doctor": doctor,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


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


def _find_recipe(name: str, task_name: str | None) -> tuple[Task, RunSpec]:
    candidates = [get_task(task_name)] if task_name else usable_tasks()
    having = [task for task in candidates if name in task.recipes()]
    if not having:
        known = [recipe for task in candidates for recipe in task.recipes()]
        raise SpecError("raev2 show", "unknown recipe", got=repr(name), hint=did_you_mean(name, known))
    if len(having) > 1:
        raise SpecError(
            "raev2 show", f"several tasks have a recipe {name!r}", expected=f"--task {'|'.join(t.name for t in having)}"
        )
    return having[0], get_recipe(having[0], name)


def dry_run(task: Task, spec: RunSpec, run_dir: Path, stage: str) -> int:
    """`raev2 train --dry-run`: sizes and findings; raises the first error after them."""
    from raev2.training.preflight import preflight, raise_first

    _print_sizes(task, spec)
    findings = preflight(task, spec, run_dir, stage)
    print()
    _print_table(("needed", "state", "detail"), [(f.what, f.state, f.detail) for f in findings])
    print(f"\nrun folder {run_dir}: {'exists' if run_dir.exists() else 'will be created'}\nnothing was started")
    raise_first(findings)
    return OK


def _print_sizes(task: Task, spec: RunSpec) -> None:
    from raev2.training.preflight import run_sizes

    print(f"{task.name} / {spec.recipe}   fingerprint {fingerprint(spec)}")
    _print_table(("size", "value"), run_sizes(task, spec))


def _print_results(run_dir: Path) -> None:
    for file in sorted((run_dir / "eval").glob("*.json")):
        result = json.loads(file.read_text())
        _print_metrics(result["protocol"], result["results"])
    print(f"\n{run_dir / 'report.html'}")


def _print_metrics(protocol: str, results: Iterable[Mapping[str, Any]]) -> None:
    from raev2.report.page import direction, glossary

    results = list(results)
    print(f"\n{protocol}")
    rows = [
        (
            r["name"], f"{r['value']:.6g}", "" if r["stderr"] is None else f"{r['stderr']:.2g}", r["num_samples"],
            direction(r), r["note"],
        ) for r in results
    ]  # fmt: skip
    _print_table(("metric", "value", "stderr", "n", "better", "note"), rows)
    for names, text in glossary(results):
        print(f"  {names}: {text}")


def _print_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    table = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _refuse_existing(options: Namespace, out: Path, kind: Kind) -> None:
    """The folder to write must be free, or with --overwrite ours and without what the command reads."""
    given = [value for name, value in vars(options).items() if name != "out"]
    needed = [text for value in given for text in (value if isinstance(value, list) else [value])]
    check_replaceable(out, kind, options.overwrite, needed)


def _missing_of_extras() -> dict[str, list[str]]:
    """Packages that are not installed, by optional part of this package."""
    names = metadata.metadata("raev2").get_all("Provides-Extra") or []
    missing: dict[str, list[str]] = {name: [] for name in names if name != "dev"}
    for requirement in map(Requirement, metadata.requires("raev2") or []):
        for extra, packages in missing.items():
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                try:
                    metadata.version(requirement.name)
                except metadata.PackageNotFoundError:
                    packages.append(requirement.name)
    return missing


def _has_fast_bf16() -> bool:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
