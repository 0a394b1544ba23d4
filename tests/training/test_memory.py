"""The default micro batch: what a step is said to hold, against what torch's allocator sees, and what is chosen."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from raev2 import pipeline, train_tokenizer
from raev2.errors import SpecError
from raev2.flow import interpolate, training_loss
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.nn import autocast
from raev2.spec import DDTSpec
from raev2.spec_io import apply_overrides
from raev2.task import get_task
from raev2.tokenizer.discriminator import build_discriminator
from raev2.tokenizer.losses import build_perceptual_loss
from raev2.tokenizer.rae import RAE
from raev2.train_tokenizer import DecoderLosses, decoder_memory
from raev2.training import dist, preflight
from raev2.training.parallel import parallelise
from raev2.training.preflight import CPU, StepMemory, device_memory, fitted, generator_memory
from raev2.training.run import open_run

GIB = 2**30
IMAGENET = get_task("imagenet")
NETWORK = DDTSpec(width=64, depth=2, num_heads=2, head_width=64, head_depth=1, head_num_heads=2, base_head_depth=1)


def allocated(step) -> int:
    """Bytes that the allocator of the CPU gave out for a step, at the most and beyond those of before."""
    step()  # gradients and caches are there afterwards
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(("precision", "recomputed"), [("fp32", False), ("bf16", True)])
def test_a_step_of_the_generator_takes_what_is_counted(tiny_spec, precision, recomputed):
    spec = apply_overrides(
        tiny_spec, [f"precision={precision}", f"parallel.activation_checkpointing={str(recomputed).lower()}"]
    )
    counted = generator_memory(IMAGENET, spec.replace(generator=NETWORK))
    generator = Generator(NETWORK, LabelCondition(num_classes=1000), spec.flow, (192, 8, 8))
    network = parallelise(generator, spec.parallel, generator.blocks())

    def step(num: int) -> None:
        latents, t = torch.randn(num, 192, 8, 8), torch.rand(num)
        point = interpolate(latents, torch.randn_like(latents), t)
        with autocast(precision, CPU):
            output = network(point.z_t, t, {"label": torch.zeros(num, dtype=torch.long)})
        training_loss(output, point, latents, generator.flow).total.backward()

    for num in (16, 64):
        assert counted.needs(num) == pytest.approx(allocated(partial(step, num)), rel=0.1)


@pytest.mark.parametrize("adversary", [True, False])
def test_a_step_of_the_decoder_takes_what_is_counted(tiny_spec, adversary):
    loop = tiny_spec.tokenizer_training
    rae, disc = RAE.from_spec(tiny_spec.tokenizer), build_discriminator(loop.adversarial) if adversary else None
    perceptual = build_perceptual_loss(loop.perceptual, tiny_spec.tokenizer.image_size)
    counted = decoder_memory(rae, [rae.decoder, perceptual, *([disc] if disc else [])], "bf16")
    losses = DecoderLosses(loop, perceptual, rae.decoder.last_layer, partial(autocast, "bf16", CPU), disc)

    def step(num: int) -> None:
        with autocast("bf16", CPU):
            decoded = rae.decoder(torch.randn(num, 64, 192)).float()
        decoded.backward(losses(decoded, torch.rand_like(decoded), torch.rand(num, 5) if adversary else None)[1])

    for num in (16, 64):
        assert counted.needs(num) == pytest.approx(allocated(partial(step, num)), rel=0.1)


def test_a_share_is_halved_until_it_fits():
    step = StepMemory(sample=10, fixed=5)
    assert [step.fit(100, room) for room in (1005.0, 1004.0, 505.0, 504.0, 135.0, 0.0)] == [100, 50, 50, 25, 13, 1]


@pytest.fixture
def choose(tiny_spec, tmp_path, monkeypatch):
    """The micro batch of a run of 8 images a step, of 1 GiB each; weights of 1 GiB are there."""

    opened = open_run(tmp_path / "run", tiny_spec)

    def run(free: float, count=lambda: StepMemory(GIB, 0), **changes):
        weights, loop = torch.empty(2**28, device="meta", requires_grad=True), tiny_spec.tokenizer_training
        there = (int(free * GIB), 80 * GIB)
        monkeypatch.setattr(preflight, "device_memory", lambda _: there)
        return fitted(opened, "tokenizer", loop.replace(**changes), [weights], count).micro_batch_size

    return run


def test_gradients_two_moments_and_a_tenth_of_the_device_are_left_free(choose, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert [choose(free) for free in (19.01, 18.99, 14.99, 12.99, 1)] == [8, 4, 2, 1, 1]
    assert choose(16) == 4
    said = "4 of 8 at once, about 71.0 GiB of 80.0"
    name = "tokenizer_training.micro_batch_size"
    assert caplog.messages[-1] == f"tokenizer: micro batch {said}: chosen; set {name} to change it"
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())[name] == said


def test_what_is_set_is_kept(choose):
    assert choose(1, micro_batch_size=5) == 5


def test_all_processes_take_the_least(choose, monkeypatch):
    monkeypatch.setattr(dist, "gather_objects", lambda own: [own, 2])
    assert choose(80) == 2


def test_a_step_that_cannot_be_counted_is_said_and_runs_whole(choose, caplog):
    def fail() -> StepMemory:
        raise RuntimeError("no values here")

    assert choose(16, fail) is None
    assert caplog.messages[-1] == (
        "tokenizer: 8 images at once, their memory cannot be counted (no values here); "
        "see tokenizer_training.micro_batch_size"
    )


def test_a_cpu_gives_a_process_its_whole_share():
    assert device_memory(CPU) is None


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_the_micro_batch_that_was_chosen_changes_no_number(tiny_spec, trained_run, monkeypatch, tmp_path, stage):
    trained = [f"tokenizer_from={trained_run / 'tokenizer'}"] * (stage == "generator")
    quick = ["evaluation.in_training=[]", "evaluation.protocols=[]", f"{stage}_training.images=8"]
    spec = apply_overrides(tiny_spec, quick + trained)
    monkeypatch.setattr(preflight, "device_memory", lambda _: (0, 80 * GIB))

    def first_step(run: Path) -> list[float]:
        steps = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        step = next(step for step in steps if (step["stage"], step["kind"]) == (stage, "train"))
        return [step["loss"], step["grad_norm"]]

    run = pipeline.train(spec, tmp_path / "run", stage=stage)
    assert first_step(run) == pytest.approx(first_step(trained_run), rel=1e-4)
    said = json.loads((run / "provenance.json").read_text())[f"{stage}_training.micro_batch_size"]
    assert said == "1 of 8 at once, about 80.0 GiB of 80.0"


def test_memory_that_has_no_room_for_one_image_points_to_the_page(tiny_spec, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(preflight, "device_memory", lambda _: (0, 80 * GIB))
    monkeypatch.setattr(train_tokenizer, "l1_loss", full)
    with pytest.raises(SpecError) as error:
        pipeline.train(tiny_spec, tmp_path / "run")
    assert str(error.value) == (
        "spec.tokenizer_training.micro_batch_size: out of memory; got 1; expected room for one image. "
        "See what else takes less memory in docs/how_to/scale.md."
    )
