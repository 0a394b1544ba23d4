"""A grid of runs: variants of a recipe, each trained and measured with several seeds.

Every run and every measurement lies in a folder that is named by all that it depends on. So an analysis that was
stopped goes on, one that is asked again reads what is there, and analyses share the runs that they have in common.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from raev2.batch import Better
from raev2.eval.protocols import run_protocol
from raev2.files.damage import read_json
from raev2.files.hashes import json_sha256
from raev2.model.opened import GENERATOR, TOKENIZER, Source, TrainedRun, open_trained
from raev2.pipeline import train, weights_of
from raev2.spec import RunSpec, SamplingSpec, TokenizerSpec
from raev2.spec_io import fingerprint, load_spec
from raev2.task import get_evaluators, get_task
from raev2.training.run import Run, make_accelerator
from raev2_tasks.analyses.plans import Plan
from raev2_tasks.analyses.seeds import Estimate

logger = logging.getLogger(__name__)
EVALUATIONS = "network_evaluations"  # field of a measurement: rows that went through a network
REPORT = "report.json"  # the last file that a training writes


@dataclass
class Outcome:
    """What was measured of a variant: scores by metric and seed, and the first score of samples by images seen."""

    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    curve: dict[int, dict[int, float]] = field(default_factory=dict)
    better: dict[str, Better] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)

    def add_run(self, seed: int, run_dir: Path, stage: str) -> None:
        """Take in the scores of one stage of a run, and of its evaluations in training."""
        spec = load_spec(run_dir / "spec.yaml")
        for protocol in spec.evaluation.protocols:
            file = run_dir / "eval" / f"{protocol}.json"
            if file.is_file() and (result := read_json(file))["needs_generator"] == (stage == GENERATOR):
                self.add(seed, result)
        for line in Run(run_dir, spec, make_accelerator(spec.precision)).history(stage=GENERATOR, kind="eval"):
            self.curve.setdefault(line["images"], {})[seed] = next(iter(line["metrics"].values()))

    def add(self, seed: int, result: Mapping[str, Any]) -> None:
        """Take in the headline of a result file."""
        for row in headline(result):
            self.scores.setdefault(row["name"], {})[seed] = row["value"]
            self.better[row["name"]], self.pictures[row["name"]] = row["better"], result["results"][0]["num_samples"]

    def history(self, seed: int) -> list[tuple[int, float]]:
        """The curve of a seed."""
        return [(images, values[seed]) for images, values in self.curve.items() if seed in values]

    def estimate(self, metric: str) -> Estimate:
        """A score over seeds."""
        return Estimate(self.scores[metric])


def outcomes(plan: Plan, seeds: int, out: Path, stage: str = GENERATOR) -> dict[str, Outcome]:
    """Train and measure the variants of a plan with seeds 0 to seeds - 1, up to a stage."""
    found = {label: Outcome() for label in plan.variants}
    for seed in range(seeds):
        first: Path | None = None
        for label, variant in plan.variants.items():
            spec, outcome = variant.replace(seed=seed), found[label]
            if isinstance(spec.tokenizer, TokenizerSpec):
                loop = spec.tokenizer_training
                run_dir = finished_run(plan.base.replace(tokenizer=spec.tokenizer, tokenizer_training=loop, seed=seed),
                                       out, TOKENIZER)  # fmt: skip
                outcome.add_run(seed, run_dir, TOKENIZER)
                spec = spec.replace(tokenizer_from=str(run_dir / TOKENIZER))
            if stage == TOKENIZER:
                continue
            if first is not None and plan.one_generator:
                source = Source.of(first)
                source = replace(source, parts={**source.parts, TOKENIZER: str(spec.tokenizer_from)})
                outcome.add(seed, measure(open_trained(source), spec.sampling, spec.evaluation.seed, out))
            else:
                first = finished_run(spec, out, GENERATOR)
                outcome.add_run(seed, first, GENERATOR)
    return found


def finished_run(spec: RunSpec, out: Path, stage: str = GENERATOR) -> Path:
    """The run folder of a spec, trained up to a stage unless it is there."""
    protocols = get_evaluators(get_task(spec.task.name), spec, spec.evaluation.protocols)
    own = tuple(e.protocol for e in protocols if e.needs_generator or spec.tokenizer_from is None)
    spec = spec.replace(evaluation=spec.evaluation.replace(protocols=own, compare_guidance=()))
    run_dir = out / "runs" / fingerprint(spec)
    if not (run_dir / REPORT).is_file():
        logger.info("%s of seed %d in %s", stage, spec.seed, run_dir)
        train(spec, run_dir, stage=stage)
    return run_dir


def measure(trained: TrainedRun, sampling: SamplingSpec, seed: int, out: Path) -> dict[str, Any]:
    """The result file of the first protocol of samples, with this seed of samples; measured unless it is there."""
    spec = trained.run.spec
    protocols = get_evaluators(trained.task, spec, spec.evaluation.protocols)
    evaluator = next(evaluator for evaluator in protocols if evaluator.needs_generator)
    context = trained.context(sampling, seed)
    about = {"weights": weights_of(context), "run": str(trained.run.dir), EVALUATIONS: 0}
    name = json_sha256([sampling.model_dump(mode="json"), seed, spec.evaluation.num_samples, about["weights"]])[:12]
    file = out / "points" / name / f"{evaluator.protocol}.json"
    if not file.is_file():
        with counted(about, trained.need_generator(), context.weak):
            run_protocol(evaluator, context, file.parent, about)
    return read_json(file)


@contextmanager
def counted(about: dict[str, Any], *networks: nn.Module | None) -> Iterator[None]:
    """Counts the rows that go through the networks into `about`."""

    def count(_network: nn.Module, inputs: tuple[Any, ...]) -> None:
        about[EVALUATIONS] += len(inputs[0])

    handles = [network.register_forward_pre_hook(count) for network in networks if network is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def headline(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result file that are scores."""
    return [row for row in result["results"] if row["role"] == "headline"]
