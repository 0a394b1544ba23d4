"""`raev2 sweep`: one sampling setting varied on a trained run, a protocol for each value, and which was best.

Read `_sweep` first. The table is written after every value, so a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raev2.command.actions import source_of
from raev2.command.cli import source_options
from raev2.errors import SpecError
from raev2.eval.protocols import run_protocol
from raev2.model.opened import TrainedRun, open_trained, use_average
from raev2.spec import Guidance, SamplingSpec
from raev2.spec_io import spec_to_dict, validated
from raev2.task import Command, check_known, get_evaluators
from raev2.tokenizer.encoders import hash_weights
from raev2.training import dist
from raev2_tasks.sweep.table import Sweep

GUIDANCE = ("1", "1.25", "1.5", "2", "2.5", "3", "4")
INTERVAL = ("0,1", "0,0.8", "0,0.6", "0.1,1", "0.2,1", "0.1,0.8")
STEPS = ("5", "10", "20", "50", "100")


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("kind", metavar="|".join(KINDS), help="what is varied")
    source_options(parser)
    parser.add_argument("--protocol", required=True, help="run for every value; see `raev2 tasks`")
    parser.add_argument("--values", nargs="+", metavar="V", help="scales, LOW,HIGH, steps or decays (default: a list)")
    parser.add_argument("--guidance", metavar="KIND", help="guidance and interval: of this kind (default: the run's)")
    parser.add_argument("--metric", help="chooses the best (default: the first headline of the protocol)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--n", type=int, help="samples of each value (default: those of the run's evaluations)")
    parser.add_argument("--out", metavar="DIR", default="sweep", help="default: sweep")
    parser.add_argument("--overwrite", action="store_true", help="begin again instead of going on")


def _sweep(options: Namespace) -> None:
    check_known("raev2 sweep", "nothing that can be varied", options.kind, KINDS)
    trained = _with_n(open_trained(source_of(options)), options.n)
    generator, spec = trained.need_generator(), trained.run.spec
    (evaluator,) = get_evaluators(trained.task, spec, [options.protocol])
    if not evaluator.needs_generator:
        raise SpecError("--protocol", "does not depend on sampling", got=options.protocol)
    settings = {
        "kind": options.kind, "protocol": options.protocol, "seed": options.seed, "run": str(trained.run.dir),
        "sampling": _base(spec.sampling, options).model_dump(mode="json"), "weights": hash_weights(generator),
        "n": spec.evaluation.num_samples, "spec": spec_to_dict(spec),
    }  # fmt: skip
    sweep = Sweep.open(Path(options.out) / f"{options.kind}-{options.protocol}.json", settings, options.overwrite)
    for value in options.values or _default_values(options.kind, trained):
        if value not in sweep.rows:
            changed, sampling = KINDS[options.kind](trained, _base(spec.sampling, options), value)
            sweep.add(value, run_protocol(evaluator, changed.context(sampling, options.seed)), options.metric)
    if dist.is_main():
        print(f"{sweep.text()}\n\n{sweep.best(options.metric)}\n{sweep.file.with_suffix('')}.*")


def _with_n(trained: TrainedRun, n: int | None) -> TrainedRun:
    spec = trained.run.spec
    if n is not None and n < 1:
        raise SpecError("--n", "not usable", got=n, expected="a number >= 1")
    evaluation = spec.evaluation.replace(num_samples=n or spec.evaluation.num_samples)
    return replace(trained, run=replace(trained.run, spec=spec.replace(evaluation=evaluation)))


# What is varied: (run, its settings, value) -> the run and the settings with that value

Vary = Callable[[TrainedRun, SamplingSpec, str], tuple[TrainedRun, SamplingSpec]]


def _guided(trained: TrainedRun, sampling: SamplingSpec, value: str) -> tuple[TrainedRun, SamplingSpec]:
    return trained, _with_guidance(sampling, scale=_numbers(value, 1)[0])


def _interval(trained: TrainedRun, sampling: SamplingSpec, value: str) -> tuple[TrainedRun, SamplingSpec]:
    return trained, _with_guidance(sampling, interval=_numbers(value, 2))


def _steps(trained: TrainedRun, sampling: SamplingSpec, value: str) -> tuple[TrainedRun, SamplingSpec]:
    steps = _numbers(value, 1)[0]
    return trained, validated(SamplingSpec, {**sampling.model_dump(), "steps": steps}, "sampling.")


def _average(trained: TrainedRun, sampling: SamplingSpec, value: str) -> tuple[TrainedRun, SamplingSpec]:
    """With the averages of one decay, kept or mixed."""
    use_average(trained, _numbers(value, 1)[0])
    return trained, sampling


KINDS: dict[str, Vary] = {"guidance": _guided, "ema": _average, "steps": _steps, "interval": _interval}


def _default_values(kind: str, trained: TrainedRun) -> Sequence[str]:
    decays = tuple(map(str, trained.run.spec.generator_training.ema_decays))
    return {"guidance": GUIDANCE, "interval": INTERVAL, "steps": STEPS, "ema": decays}[kind]


def _base(sampling: SamplingSpec, options: Namespace) -> SamplingSpec:
    """The settings of the run, with another kind of guidance where one is asked for."""
    kind = options.guidance or sampling.guidance.kind
    if kind == "none" and options.kind in ("guidance", "interval"):
        raise SpecError("--guidance", "the run samples without guidance", expected="a kind, such as --guidance cfg")
    if kind == sampling.guidance.kind:
        return sampling
    fields = {"kind": kind, **({"scale": 1.5} if kind in ("cfg", "internal+cfg") else {})}
    return sampling.replace(guidance=validated(Guidance, fields, "--guidance "))


def _with_guidance(sampling: SamplingSpec, **changes: Any) -> SamplingSpec:
    return sampling.replace(guidance=validated(Guidance, {**sampling.guidance.model_dump(), **changes}, "guidance."))


def _numbers(value: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, value.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise SpecError("--values", "cannot be read", got=repr(value), expected="LOW,HIGH" if count > 1 else "a number")
    return numbers


SWEEP = Command(
    "try values of guidance, averages, steps or interval on a run, and say which was best", _options, _sweep
)
