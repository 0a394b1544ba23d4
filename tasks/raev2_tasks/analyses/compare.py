"""The table of a plan: scores of every variant over seeds, the claims about them, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raev2.eval.protocols import ep_fid
from raev2.model.opened import GENERATOR
from raev2_tasks.analyses.grid import Outcome, outcomes
from raev2_tasks.analyses.plans import Plan
from raev2_tasks.analyses.seeds import Claim, Estimate, whiskers
from raev2_tasks.analyses.table import Table
from raev2_tasks.report.chart import Series, number


def plan_table(name: str, plan: Plan, seeds: int, out: Path, stage: str = GENERATOR) -> Table:
    """Train and measure the variants of a plan up to a stage, and what comes out."""
    return table_of(name, plan, outcomes(plan, seeds, out, stage))


def table_of(name: str, plan: Plan, found: Mapping[str, Outcome]) -> Table:
    """The table of what was measured."""
    metrics = dict.fromkeys(metric for outcome in found.values() for metric in outcome.scores)
    compared = [metric for metric in plan.metrics if metric in metrics]
    rows: list[dict[str, Any]] = [
        {
            "variant": label,
            "seeds": len(outcome.scores[compared[-1]]),
            "n": outcome.pictures[compared[-1]],
            **{metric: outcome.estimate(metric) for metric in metrics if metric in outcome.scores},
        }
        for label, outcome in found.items()
    ]
    base = plan.base
    note = (
        f"Recipe {base.task.name}/{base.recipe}, the same training for every variant: "
        f"{base.tokenizer_training.images:,} images in stage 1, {base.generator_training.images:,} in stage 2. "
        f"{base.sampling.steps} sampler steps. n: pictures of a seed. In brackets: 95 % intervals over the seeds."
    )
    if plan.baseline:
        note += add_images_to_level(plan, found, rows)
    claims = [
        Claim(a, b, metric, found[a].better[metric], found[a].scores[metric], found[b].scores[metric])
        for metric in compared
        for a, b in plan.pairs
    ]
    x_label = f"{plan.x_label} (upwards: {shown(plan, found)})"
    settings = {"recipe": base.recipe, "variants": [*plan.variants], "seeds": rows[0]["seeds"]}
    return Table(name, plan.title, rows, note, series_of(plan, found), x_label, settings, claims)


def add_images_to_level(plan: Plan, found: Mapping[str, Outcome], rows: Sequence[dict[str, Any]]) -> str:
    """EP_fd@k into the rows, k being the last score of the baseline; what it is and who did not reach k."""
    metric, late = plan.metrics[0], list[str]()
    level = found[plan.baseline].estimate(metric).mean
    for row in rows:
        outcome = found[row["variant"]]
        places = {seed: ep_fid(outcome.history(seed), level) for seed in outcome.scores[metric]}
        there = {seed: place for seed, place in places.items() if place is not None}
        row[f"EP@{number(level)}"] = Estimate(there) if there else None
        if len(there) < len(places):
            late.append(f"{row['variant']} in {len(there)} of {len(places)} seeds")
    said = f"Reached not in every seed: {', '.join(late)}." if late else "All reached it."
    return f" EP@k: images until {metric} is k = {number(level)}, where {plan.baseline} ends on average. {said}"


def series_of(plan: Plan, found: Mapping[str, Outcome]) -> list[Series]:
    """Lines of the plot, with intervals: the first metric over training, or scores at the places of the plan."""
    if not plan.lines:
        curves = {
            label: [(images, Estimate(values)) for images, values in outcome.curve.items() if images]
            for label, outcome in found.items()
        }
        return whiskers({label: curve for label, curve in curves.items() if curve})

    def place(label: str) -> float:
        return found[label].estimate(plan.x).mean if isinstance(plan.x, str) else plan.x[label]

    metric = shown(plan, found)
    return whiskers(
        {name: [(place(label), found[label].estimate(metric)) for label in own] for name, own in plan.lines.items()}
    )


def shown(plan: Plan, found: Mapping[str, Outcome]) -> str:
    """The metric on the y axis: the first one that every variant has, or the last where that is on the x axis."""
    metrics = [metric for metric in plan.metrics if all(metric in outcome.scores for outcome in found.values())]
    return metrics[-1] if plan.x == metrics[0] else metrics[0]
