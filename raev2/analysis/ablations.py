"""One change at a time: train variants of a recipe and put their numbers side by side.

layers          K and how the layers become one map: sum, mean, random projection of the concatenation (stage 1)
time-shift      dimension-dependent time shift against none (stage 2)
decoder-noise   noise on tokens while the decoder trains, on and off (both stages)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raev2.analysis.table import Table
from raev2.errors import SpecError
from raev2.pipeline import train
from raev2.spec import RunSpec, TokenizerSpec
from raev2.spec_io import apply_overrides, load_spec
from raev2.tokenizer.encoder_table import encoder_info


@dataclass(frozen=True)
class Ablation:
    """Variants by name, each a list of overrides of a recipe.

    stage     last stage that the variants differ in
    shared    whether the tokenizer of the first variant serves all
    """

    title: str
    stage: str
    shared: bool
    variants: Mapping[str, Sequence[str]]


def ablation(name: str, spec: RunSpec) -> Ablation:
    """The variants of an ablation for a recipe."""
    if name == "time-shift":
        return Ablation(
            "Time shift on and off", "generator", True,
            {"sqrt(dimension / 4096)": ["flow.time_shift=null"], "none": ["flow.time_shift=1.0"]},
        )  # fmt: skip
    if not isinstance(spec.tokenizer, TokenizerSpec):
        raise SpecError(f"raev2 analyse {name}", "needs a recipe with an RAE tokenizer", got=spec.tokenizer.kind)
    if name == "decoder-noise":
        return Ablation(
            "Noise on tokens while the decoder trains", "generator", False,
            {f"tau {tau:g}": [f"tokenizer.noise_tau={tau}"] for tau in (0.0, 0.8)},
        )  # fmt: skip
    depth = encoder_info(spec.tokenizer.encoder.name).depth
    counts = sorted({1, 2, depth // 2, depth})
    variants = {"K = 1": [f"tokenizer.encoder.layers=[{depth - 1}]"]}
    for count in counts[1:]:
        layers = list(range(depth - count, depth))
        for aggregate in ("sum", "mean", "random_projection"):
            variants[f"K = {count}, {aggregate.replace('_', ' ')}"] = [
                f"tokenizer.encoder.layers={layers}", f"tokenizer.encoder.aggregate={aggregate}",
            ]  # fmt: skip
    return Ablation("Number of layers and how they are joined", "tokenizer", False, variants)


def run_ablation(name: str, spec: RunSpec, out: Path) -> Table:
    """Train every variant into `out/runs/` (what is there already is used) and tabulate its results."""
    plan = ablation(name, spec)
    rows: list[dict[str, Any]] = []
    tokenizer: str | None = None
    for number, (label, overrides) in enumerate(plan.variants.items()):
        variant = apply_overrides(spec, overrides)
        if plan.shared and tokenizer:
            variant = variant.replace(tokenizer_from=tokenizer)
        run_dir = train(variant, out / "runs" / f"{name}-{number}", stage=plan.stage)
        tokenizer = tokenizer or str(run_dir / "tokenizer")
        rows.append({"variant": label, **results_of(run_dir)})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(
        name,
        plan.title,
        columns,
        rows,
        f"Recipe {spec.task.name}/{spec.recipe}, one run and one seed each ({spec.tokenizer_training.images:,} images "
        f"in stage 1, {spec.generator_training.images:,} in stage 2). Small differences are noise.",
        settings={"recipe": spec.recipe, "variants": {label: list(o) for label, o in plan.variants.items()}},
    )


def results_of(run_dir: Path) -> dict[str, float]:
    """Numbers by metric of the protocols that a run's spec names; scales are left out.

    Further results in the folder, of other guidance for example, have other file names and are not read.
    """
    found: dict[str, float] = {}
    for protocol in load_spec(run_dir / "spec.yaml").evaluation.protocols:
        file = run_dir / "eval" / f"{protocol}.json"
        if file.is_file():  # not there: it needs a stage that the ablation does not train
            rows = json.loads(file.read_text())["results"]
            found |= {row["name"]: row["value"] for row in rows if not row["note"].startswith("scale")}
    return found
