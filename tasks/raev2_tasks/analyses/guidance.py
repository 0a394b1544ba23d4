"""Insight 3: guidance by the generator's own shallow head, beside what needs a second forward, at equal cost.

Each kind of guidance gets the scale and the interval that serve it best, for each run by itself: chosen with a seed of
samples that is not evaluated. Then the run is sampled with several numbers of steps. Each measured point is a result
file of its own, named by all that it depends on, so a stopped analysis goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raev2.errors import CheckpointError
from raev2.files.artefact import load_strict
from raev2.model.opened import GENERATOR, TrainedRun, load_generator, open_trained
from raev2.spec import CFG, AutoGuidance, Guidance, InternalCFG, InternalGuidance, NoGuidance
from raev2.spec_io import fingerprint
from raev2.training.checkpoint import list_checkpoints, load_checkpoint
from raev2_tasks.analyses.grid import EVALUATIONS, headline, measure
from raev2_tasks.analyses.seeds import Claim, Estimate, whiskers
from raev2_tasks.analyses.table import Table

Interval = tuple[float, float]
Choice = tuple[float, Interval, list[dict[str, Any]]]  # scale, interval, all that was tried
SCALES = (1.1, 1.25, 1.5, 2.0)
INTERVALS: tuple[Interval, ...] = ((0.0, 0.7), (0.3, 1.0))  # besides the whole of [0, 1]
SEED, SEED_OF_CHOICE = 0, 1  # of samples

KINDS: dict[str, Callable[[float, Interval, str], Guidance]] = {
    "internal": lambda scale, interval, _: InternalGuidance(scale=scale, interval=interval),
    "cfg": lambda scale, interval, _: CFG(scale=scale, interval=interval),
    "auto": lambda scale, interval, weak: AutoGuidance(scale=scale, interval=interval, weak=weak),
    "internal+cfg": lambda scale, interval, _: InternalCFG(
        internal_scale=scale, internal_interval=interval, scale=scale, interval=interval
    ),
}


@dataclass(frozen=True)
class Budget:
    """Of the analysis: steps of the evaluated samples, steps and pictures of the choice, scales that are tried."""

    steps: Sequence[int]
    choice_steps: int
    choice_pictures: int
    scales: Sequence[float] = SCALES


def guidance_table(runs: Sequence[Path], budget: Budget, out: Path, n: int | None = None) -> Table:
    """Quality of every kind of guidance against the number of network evaluations, over runs of several seeds.

    n   pictures of each evaluation; None: those of the run's own
    """
    chosen: dict[str, list[Choice]] = {kind: [] for kind in KINDS}
    points: dict[tuple[str, int], dict[int, Mapping[str, Any]]] = {}
    for seed, run in enumerate(runs):
        trained = with_pictures(open_trained(run), n)
        weak = str(earlier(trained, out))
        for kind in ("none", *KINDS):
            guidance: Guidance = NoGuidance()
            if kind != "none":
                chosen[kind].append(choose(with_pictures(trained, budget.choice_pictures), kind, budget, out))
                guidance = KINDS[kind](*chosen[kind][-1][:2], weak)
            for steps in budget.steps:
                sampling = trained.run.spec.sampling.replace(guidance=guidance, steps=steps)
                points.setdefault((kind, steps), {})[seed] = measure(trained, sampling, SEED, out)
    return _table(points, chosen, budget, runs)


def choose(trained: TrainedRun, kind: str, budget: Budget, out: Path) -> Choice:
    """The scale that is best on the whole interval, the interval that is best with it, and all that was tried."""
    weak = str(earlier(trained, out))
    tried = list[dict[str, Any]]()

    def score(scale: float, interval: Interval) -> float:
        guidance = KINDS[kind](scale, interval, weak)
        sampling = trained.run.spec.sampling.replace(guidance=guidance, steps=budget.choice_steps)
        result = measure(trained, sampling, SEED_OF_CHOICE, out)
        row = headline(result)[0]
        tried.append({"scale": scale, "interval": list(interval), row["name"]: row["value"]})
        return row["value"] if row["better"] == "lower" else -row["value"]

    whole: Interval = (0.0, 1.0)
    scores = {(scale, whole): score(scale, whole) for scale in budget.scales}
    scale, _ = min(scores, key=scores.__getitem__)
    scores |= {(scale, interval): score(scale, interval) for interval in INTERVALS}
    return *min(scores, key=scores.__getitem__), tried


def earlier(trained: TrainedRun, out: Path) -> Path:
    """The generator of the run's oldest checkpoint as an artefact: the weak one of auto guidance."""
    run, folder = trained.run, trained.run.dir / "checkpoints" / GENERATOR
    checkpoints = list_checkpoints(folder)
    if len(checkpoints) < 2:
        raise CheckpointError(
            str(folder), "no earlier checkpoint for auto guidance", got=len(checkpoints), expected="2 checkpoints",
            hint="Set generator_training.save_every_images to half of the training.",
        )  # fmt: skip
    artefact = out / "weak" / f"{fingerprint(run.spec)}-{checkpoints[0].name}"
    if (artefact / "config.json").is_file():
        return artefact
    weak = load_generator(run.dir / GENERATOR)
    checkpoint = load_checkpoint(checkpoints[0])
    average = checkpoint.tensors[f"ema-{run.spec.generator_training.ema_decays[0]}"]
    load_strict(weak, {**checkpoint.tensors["model"], **average}, str(checkpoint.path))
    weak.extra = {**weak.extra, "images_seen": checkpoint.state["images"]}
    return weak.save_pretrained(artefact)


def with_pictures(trained: TrainedRun, n: int | None) -> TrainedRun:
    """The run with another number of evaluated pictures."""
    spec = trained.run.spec
    evaluation = spec.evaluation.replace(num_samples=n or spec.evaluation.num_samples)
    return replace(trained, run=replace(trained.run, spec=spec.replace(evaluation=evaluation)))


def _table(
    points: Mapping[tuple[str, int], Mapping[int, Mapping[str, Any]]],
    chosen: Mapping[str, Sequence[Choice]],
    budget: Budget,
    runs: Sequence[Path],
) -> Table:
    rows, lines = list[dict[str, Any]](), dict[str, list[tuple[float, Estimate]]]()
    for (kind, steps), results in points.items():
        choices = [f"{scale:g} on [{low:g}, {high:g}]" for scale, (low, high), _ in chosen.get(kind, ())]
        scores = {row["name"]: row["better"] for row in headline(results[0])}
        estimates = {
            name: Estimate({seed: row["value"] for seed, result in results.items()
                            for row in headline(result) if row["name"] == name})
            for name in scores
        }  # fmt: skip
        n = results[0]["results"][0]["num_samples"]
        cost = sum(result[EVALUATIONS] for result in results.values()) / len(results) / n
        metric = next(iter(scores))
        rows.append(
            {"guidance": kind, "scale, by run": "; ".join(choices) or None, "steps": steps,
             "evaluations a picture": cost, "n": n, "runs": len(results), **estimates}
        )  # fmt: skip
        lines.setdefault(kind, []).append((cost, estimates[metric]))
    return Table(
        "insight-3",
        "Guidance against the number of network evaluations",
        rows,
        f"{len(runs)} training runs, the same noise and conditions for every kind. Scale and interval are the best of "
        f"{len(budget.scales)} scales on [0, 1] and then of {len(INTERVALS) + 1} intervals, by {metric}, for "
        f"each run by itself with {budget.choice_pictures} pictures, {budget.choice_steps} steps and another seed of "
        "samples. "
        "internal+cfg: one scale for both. auto: the weak generator is the run's oldest checkpoint. In brackets: 95 % "
        "intervals over the runs.",
        whiskers(lines),
        x_label=f"network evaluations a picture (upwards: {metric})",
        settings={
            "runs": list(map(str, runs)),
            "chosen": {kind: [choice[2] for choice in choices] for kind, choices in chosen.items()},
        },
        claims=_claims(rows, metric, scores[metric]),
    )


def _claims(rows: Sequence[Mapping[str, Any]], metric: str, better: Any) -> list[Claim]:
    """Internal guidance against the others, and each of them against none, where each has the most steps."""
    last = {row["guidance"]: row for row in rows}
    names = {kind: f"{kind} ({row['evaluations a picture']:.3g} evaluations)" for kind, row in last.items()}
    pairs = [("internal", "none"), *(("internal", kind) for kind in KINDS if kind != "internal")]
    pairs += [(kind, "none") for kind in KINDS if kind != "internal"]
    return [
        Claim(names[one], names[other], metric, better, last[one][metric].values, last[other][metric].values)
        for one, other in pairs
    ]
