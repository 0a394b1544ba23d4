"""Whatever predicts with a run honours its precision and its guidance, the weak generator of auto guidance included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raev2 import pipeline
from raev2.errors import SpecError
from raev2.eval.protocols import run_protocol
from raev2.model.generator import Generator
from raev2.spec import AutoGuidance, SamplingSpec
from raev2.task import get_evaluators
from raev2.tokenizer.rae import RAE
from raev2_tasks.nwm import TASK
from raev2_tasks.nwm.drive.model_world import model_worlds
from raev2_tasks.nwm.plan.model_goals import ModelGoals
from raev2_tasks.nwm.plan.planning import PlanSpec

PROTOCOL = "rollout-4fps-micro"


@pytest.fixture(scope="module")
def weak(tiny_nwm_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another generator: that of the tiny run with noise on its weights."""
    generator, rng = pipeline.load_generator(tiny_nwm_run / "generator"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return str(generator.save_pretrained(tmp_path_factory.mktemp("weak") / "generator"))


@pytest.fixture(scope="module")
def guided_run(tiny_nwm_spec, tiny_nwm_run: Path, weak: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in bfloat16 with auto guidance. Read only, but for `eval`."""
    spec = tiny_nwm_spec.replace(
        tokenizer_from=str(tiny_nwm_run / "tokenizer"), precision="bf16",
        sampling=SamplingSpec(steps=2, guidance=AutoGuidance(weak=weak, scale=2.0)),
        generator_training=tiny_nwm_spec.generator_training.replace(images=16, save_every_images=16),
    )  # fmt: skip
    return pipeline.train(spec, tmp_path_factory.mktemp("runs") / "guided")


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """Whether autocast was on in each call of the networks."""
    seen: dict[str, set[bool]] = {}

    def spy(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def watched(self, *args, **options):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return function(self, *args, **options)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((Generator, "forward"), (Generator, "encode_frames"), (RAE, "encode"), (RAE, "decode")):
        spy(owner, name)
    return seen


def values(results) -> dict[str, float]:
    return {result.name: result.value for result in results}


def rollout(*arguments: object) -> None:
    TASK.commands()["rollout"]([str(argument) for argument in arguments])


def test_training_and_a_later_evaluation_give_equal_numbers(guided_run):
    written = json.loads((guided_run / "eval" / f"{PROTOCOL}.json").read_text())
    assert written["sampling"]["guidance"]["kind"] == "auto" and written["precision"]["generator"] == "bf16"
    in_training = {result["name"]: result["value"] for result in written["results"]}
    assert values(pipeline.evaluate_run(guided_run)[PROTOCOL]) == in_training


def test_rollouts_depend_on_the_weak_generator_and_on_the_precision(guided_run):
    trained = pipeline.open_trained(guided_run)
    context = trained.context()
    (evaluator,) = get_evaluators(TASK, context.spec, [PROTOCOL])
    own = values(run_protocol(evaluator, context))
    no_weak = values(run_protocol(evaluator, trained.context(SamplingSpec(steps=2))))
    fp32 = values(run_protocol(evaluator, replace(context, spec=context.spec.replace(precision="fp32"))))
    name = "latent_distance@1s"
    assert len({own[name], no_weak[name], fp32[name]}) == 3
    assert own[name] == pytest.approx(fp32[name], rel=0.05), "only rounded otherwise"
    assert own[f"{name}_copy"] == fp32[f"{name}_copy"], "the tokenizer is in float32 anyway"


def test_evaluation_ride_plan_and_rollout_compute_in_the_precision_of_the_run(guided_run, precisions, tmp_path):
    def check() -> None:
        assert precisions["forward"] == {True} and precisions["encode"] | precisions["decode"] == {False}
        precisions.clear()

    context = pipeline.open_trained(guided_run).context()
    (evaluator,) = get_evaluators(TASK, context.spec, [PROTOCOL])
    run_protocol(evaluator, context)
    check()
    world, _ = model_worlds(str(guided_run), engine=False)()
    world.step(np.array([0.4, 0, 0]), 0.5)
    check()
    (goal,) = ModelGoals(str(guided_run)).goals(1, 0.5, PlanSpec(cost="pixel"))
    goal.score(np.zeros((2, 1, 3)), 0.5)
    check()
    rollout("--run", guided_run, "--seconds", 0.5, "--out", tmp_path / "rollout")
    check()


def test_frames_are_kept_in_the_precision_of_the_run(guided_run, precisions):
    context = pipeline.open_trained(guided_run).context(SamplingSpec(steps=2))  # kept frames are of one network
    (evaluator,) = get_evaluators(TASK, context.spec, [PROTOCOL])
    run_protocol(evaluator, context)
    assert precisions["encode_frames"] == {True}


def test_a_record_brings_its_own_guidance_and_weak_generator(tiny_nwm_run, weak, tmp_path):
    """The run samples without guidance; a record of a rollout may say otherwise."""
    rollout("--run", tiny_nwm_run, "--seconds", 0.5, "--out", tmp_path / "plain")
    record = json.loads((tmp_path / "plain" / "rollout.json").read_text())
    record["sampling"]["guidance"] = AutoGuidance(weak=weak, scale=2.0).model_dump(mode="json")
    (tmp_path / "record.json").write_text(json.dumps(record))
    rollout("--run", tiny_nwm_run, "--commands", tmp_path / "record.json", "--out", tmp_path / "auto")
    again = json.loads((tmp_path / "auto" / "rollout.json").read_text())
    assert again == record
    assert (tmp_path / "auto" / "rollout.gif").read_bytes() != (tmp_path / "plain" / "rollout.gif").read_bytes()


def test_an_unusable_setting_is_reported_when_the_context_is_made(tiny_nwm_run, weak, tmp_path):
    trained = pipeline.open_trained(tiny_nwm_run)
    generator = pipeline.load_generator(weak)
    other = Generator(generator.network_spec, generator.condition_spec, generator.flow, (3, 8, 8))
    smaller = str(other.save_pretrained(tmp_path / "smaller"))
    with pytest.raises(SpecError, match="the weak generator predicts something else"):
        trained.context(SamplingSpec(guidance=AutoGuidance(weak=smaller)))
