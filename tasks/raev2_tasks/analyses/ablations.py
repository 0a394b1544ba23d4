"""One change at a time: train variants of a recipe and put their numbers side by side.

layers          K and how the layers become one map: sum, mean, random projection of the concatenation (stage 1)
time-shift      dimension-dependent time shift against none (stage 2)
decoder-noise   strength of the noise on tokens while the decoder trains (stage 1); every decoder then gets the latents
                of one generator, so that only decoders differ
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raev2.errors import SpecError
from raev2.files.damage import read_json
from raev2.pipeline import train
from raev2.spec import RunSpec, TokenizerSpec
from raev2.spec_io import apply_overrides, load_spec
from raev2.tokenizer.encoder_table import encoder_info
from raev2.training.preflight import GENERATOR, TOKENIZER
from raev2.training.run import Run, make_accelerator
from raev2_tasks.analyses.table import Table, lines
from raev2_tasks.report.chart import Series

STRENGTHS = (0.0, 0.4, 0.8, 1.2, 1.6)


@dataclass(frozen=True)
class Ablation:
    """Variants by name, each a list of overrides of a recipe.

    stage     last stage that the variants are trained to
    shared    the part of the first variant that serves all: "tokenizer", "generator" or none
    places    lines of the plot by name, each a mapping from variant to place on the x axis; empty: the plot shows
              each variant over its training
    """

    title: str
    stage: str
    shared: str
    variants: Mapping[str, Sequence[str]]
    places: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def ablation(name: str, spec: RunSpec) -> Ablation:
    """The variants of an ablation for a recipe."""
    if name == "time-shift":
        return Ablation(
            "Time shift on and off", "generator", TOKENIZER,
            {"sqrt(dimension / 4096)": ["flow.time_shift=null"], "none": ["flow.time_shift=1.0"]},
        )  # fmt: skip
    if not isinstance(spec.tokenizer, TokenizerSpec):
        raise SpecError(f"raev2 analyse {name}", "needs a recipe with an RAE tokenizer", got=spec.tokenizer.kind)
    if name == "decoder-noise":
        return Ablation(
            "Noise on tokens while the decoder trains, in their standard deviation", "generator", GENERATOR,
            {f"tau {tau:g}": [f"tokenizer.noise_tau={tau}"] for tau in STRENGTHS},
            {"tau": {f"tau {tau:g}": tau for tau in STRENGTHS}},
        )  # fmt: skip
    depth = encoder_info(spec.tokenizer.encoder.name).depth
    variants = {"K = 1": [f"tokenizer.encoder.layers=[{depth - 1}]"]}
    places = {join: {"K = 1": 1} for join in ("sum", "mean", "random projection")}
    for count in sorted({2, depth // 2, depth} - {1}):
        for join, line in places.items():
            line[f"K = {count}, {join}"] = count
            variants[f"K = {count}, {join}"] = [
                f"tokenizer.encoder.layers={list(range(depth - count, depth))}",
                f"tokenizer.encoder.aggregate={join.replace(' ', '_')}",
            ]
    return Ablation("Number of layers and how they are joined", "tokenizer", "", variants, places)


def run_ablation(name: str, spec: RunSpec, out: Path) -> Table:
    """Train every variant into `out/runs/` (what is there already is used) and tabulate its results."""
    plan = ablation(name, spec)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    first: Path | None = None
    for number, (label, overrides) in enumerate(plan.variants.items()):
        variant = apply_overrides(spec, overrides)
        run_dir = out / "runs" / f"{name}-{number}"
        if first and plan.shared == TOKENIZER:
            variant = variant.replace(tokenizer_from=str(first / TOKENIZER))
        if first and plan.shared == GENERATOR and not (run_dir / GENERATOR).is_dir():
            train(variant, run_dir, stage=TOKENIZER)
            shutil.copytree(first / GENERATOR, run_dir / GENERATOR)
        train(variant, run_dir, stage=plan.stage)
        first = first or run_dir
        rows.append({"variant": label, **results_of(run_dir)})
        runs[label] = Run(run_dir, variant, make_accelerator(variant.precision))
    metric, series = _over_places(plan, rows, first) if plan.places else _over_training(plan, runs)
    trained = f"{spec.tokenizer_training.images:,} images in stage 1"
    if plan.stage == "generator":
        trained += f", {spec.generator_training.images:,} in stage 2"
    return Table(
        name,
        plan.title,
        rows,
        f"Recipe {spec.task.name}/{spec.recipe}, one run and one seed each ({trained}). Small differences are noise. "
        f"Plot: {metric}.",
        series,
        {"layers": "K", "decoder-noise": "tau"}.get(name, "images seen"),
        settings={"recipe": spec.recipe, "variants": {label: list(o) for label, o in plan.variants.items()}},
    )


def _over_places(plan: Ablation, rows: Sequence[Mapping[str, Any]], run_dir: Path | None) -> tuple[str, list[Series]]:
    """The first metric of the last stage of the plan, and its lines over the places."""
    assert run_dir is not None
    metric = next(iter(results_of(run_dir, needs_generator=plan.stage == GENERATOR)))
    values = {row["variant"]: row[metric] for row in rows}
    return metric, [
        Series(name, list(line.values()), [values[label] for label in line], points=True)
        for name, line in plan.places.items()
    ]


def _over_training(plan: Ablation, runs: Mapping[str, Run]) -> tuple[str, list[Series]]:
    """The first metric of what was evaluated most often in stage 2, and its line for every variant."""
    found = [{"variant": label, **e} for label, run in runs.items() for e in run.history(stage=plan.stage, kind="eval")]
    moments = {(entry["protocol"], entry["images"]) for entry in found}
    if not moments:
        return "nothing, no protocol needs a generator", []
    protocol = Counter(name for name, _ in sorted(moments)).most_common(1)[0][0]
    found = [entry | entry["metrics"] for entry in found if entry["protocol"] == protocol]
    metric = next(iter(found[0]["metrics"]))
    series = lines(found, "images", [metric], by="variant")
    return f"{metric} of {protocol}", series


def results_of(run_dir: Path, needs_generator: bool | None = None) -> dict[str, float]:
    """Numbers by metric of the protocols that a run's spec names, or of those of one stage; scales are left out.

    Further results in the folder, of other guidance for example, have other file names and are not read.
    """
    found: dict[str, float] = {}
    for protocol in load_spec(run_dir / "spec.yaml").evaluation.protocols:
        file = run_dir / "eval" / f"{protocol}.json"
        if file.is_file():  # not there: it needs a stage that the ablation does not train
            result = read_json(file)
            if needs_generator in (None, result.get("needs_generator")):
                found |= {row["name"]: row["value"] for row in result["results"] if row.get("role") != "scale"}
    return found
