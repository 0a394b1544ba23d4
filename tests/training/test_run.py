from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from raev2.batch import Batch
from raev2.errors import CheckpointError, FileError
from raev2.spec import AdamWSpec, MuonSpec
from raev2.spec_io import apply_overrides, fingerprint, load_spec
from raev2.training.ema import EMA
from raev2.training.optim import build_optimizer
from raev2.training.run import (
    MAX_NON_FINITE_STEPS,
    NonFiniteGuard,
    Progress,
    Run,
    Stopped,
    StopSignal,
    TrainingState,
    add_provenance,
    crossed,
    micro_batches,
    newest_run,
    open_run,
    step_generator,
    update,
)

CPU = torch.device("cpu")


# The folder.


def test_a_new_run_folder_says_what_it_is(tiny_spec, tmp_path):
    run = open_run(tmp_path / "task" / "name", tiny_spec)
    assert sorted(file.name for file in run.dir.iterdir()) == ["provenance.json", "spec.yaml"]
    assert load_spec(run.dir / "spec.yaml") == tiny_spec
    provenance = json.loads((run.dir / "provenance.json").read_text())
    assert provenance["spec_fingerprint"] == fingerprint(tiny_spec)
    assert torch.__version__.startswith(provenance["versions"]["torch"]) and provenance["processes"] == 1
    assert run.device.type in ("cpu", "cuda")


def test_the_same_spec_continues_a_run(tiny_spec, tmp_path):
    open_run(tmp_path, tiny_spec).log(stage="generator", kind="train", images=8, loss=1.0)
    add_provenance(open_run(tmp_path, tiny_spec), "data", {"name": "x"})
    started = json.loads((tmp_path / "provenance.json").read_text())
    run = open_run(tmp_path, tiny_spec)
    assert [line["loss"] for line in run.history(stage="generator")] == [1.0]
    assert json.loads((tmp_path / "provenance.json").read_text()) == started, "of the first start"
    assert started["data"] == {"name": "x"}


def test_fields_without_effect_on_numbers_may_change(tiny_spec, tmp_path):
    open_run(tmp_path, tiny_spec)
    changed = apply_overrides(tiny_spec, ["data.num_workers=3", "sampling.steps=7"])
    open_run(tmp_path, changed)
    assert load_spec(tmp_path / "spec.yaml") == changed


def test_another_spec_is_refused_and_the_field_named(tiny_spec, tmp_path):
    open_run(tmp_path / "a", tiny_spec)
    other = apply_overrides(tiny_spec, ["generator.depth=3"])
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path / "a", other)
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: written for spec fingerprint {fingerprint(tiny_spec)}; "
        f"got {fingerprint(other)} (generator.depth 2 -> 3); expected the same spec to continue. "
        "Choose another --run, or --overwrite to delete this one."
    )
    with pytest.raises(CheckpointError, match=r"\(generator.depth 2 -> 3 and 1 more\)"):
        open_run(tmp_path / "a", apply_overrides(other, ["seed=1"]))
    assert load_spec(tmp_path / "a" / "spec.yaml") == tiny_spec


def test_overwrite_starts_from_nothing(tiny_spec, tmp_path):
    open_run(tmp_path / "a", tiny_spec).log(stage="generator", kind="train", images=8)
    run = open_run(tmp_path / "a", apply_overrides(tiny_spec, ["seed=1"]), overwrite=True)
    assert run.history() == [] and load_spec(run.dir / "spec.yaml").seed == 1


def test_resume_never_refuses_an_existing_run(tiny_spec, tmp_path):
    open_run(tmp_path / "a", tiny_spec, resume=False)
    with pytest.raises(CheckpointError, match="the run folder exists. Choose another --run, or --overwrite to delete"):
        open_run(tmp_path / "a", tiny_spec, resume=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_a_run_is_left_alone(tiny_spec, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match="exists and is not replaced; got thesis.tex in it"):
        open_run(tmp_path, tiny_spec, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_start_that_was_killed_while_writing_the_spec_is_forgotten(tiny_spec, tmp_path):
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "spec.yaml").write_text("recipe: ti")
    assert load_spec(open_run(tmp_path / "run", tiny_spec).dir / "spec.yaml") == tiny_spec
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_newest_run_of_a_task_is_the_one_written_to_last(tiny_spec, tmp_path):
    with pytest.raises(CheckpointError, match="no run of this task yet. Start one with `raev2 train --task toy`."):
        newest_run("toy", tmp_path)
    for name in ("a", "b"):
        open_run(tmp_path / "toy" / name, tiny_spec)
        for file in (tmp_path / "toy" / name).iterdir():
            os.utime(file, (100, 100))
    run = open_run(tmp_path / "toy" / "a", tiny_spec)
    run.log(stage="generator", kind="train", images=1)
    assert newest_run("toy", tmp_path) == run.dir


def test_autocast_follows_the_precision_of_each_run(tiny_spec, tmp_path):
    """Two runs of different precision in one process, as a notebook has them."""
    exact = open_run(tmp_path / "fp32", tiny_spec)
    fast = open_run(tmp_path / "bf16", tiny_spec.replace(precision="bf16"))
    a = torch.ones(2, 2, device=exact.device)
    for run, dtype in ((exact, torch.float32), (fast, torch.bfloat16), (exact, torch.float32)):
        with run.autocast():
            assert (a @ a).dtype == dtype


# The log.


def make_log(run: Run) -> None:
    run.log(stage="tokenizer", kind="train", images=100)
    for images in (0, 8, 16, 24):
        run.log(stage="generator", kind="train", images=images)


@pytest.mark.parametrize(("images", "left"), [(16, [0, 8, 16]), (24, [0, 8, 16, 24]), (3, [0]), (0, [])])
def test_a_resumed_stage_forgets_what_it_will_write_again(tiny_spec, tmp_path, images, left):
    run = open_run(tmp_path, tiny_spec)
    make_log(run)
    run.forget_after("generator", images)
    assert [line["images"] for line in run.history(stage="generator")] == left
    assert [line["images"] for line in run.history(stage="tokenizer")] == [100], "other stages stay"


def test_a_log_line_that_was_cut_short_is_left_out(tiny_spec, tmp_path):
    run = open_run(tmp_path, tiny_spec)
    make_log(run)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "generator", "ima')
    assert len(run.history()) == 5
    run.forget_after("generator", 24)
    run.log(stage="generator", kind="train", images=32)
    assert [json.loads(line)["images"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        100, 0, 8, 16, 24, 32,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("every", "before", "after", "expected"),
    [(10, 0, 9, False), (10, 0, 10, True), (10, 9, 10, True), (10, 10, 19, False), (10, 8, 35, True),
     (None, 0, 10, False)],
)  # fmt: skip
def test_crossed(every, before, after, expected):
    assert crossed(every, before, after) is expected


def test_a_status_line_shows_what_matters(tiny_spec, capsys):
    progress = Progress("generator", tiny_spec.generator_training, 0)
    with progress.waiting():
        pass
    speed = progress.report(32, loss=1.5)
    assert speed.keys() == {"images_per_s", "data_wait"} and 0 <= speed["data_wait"] <= 1
    line = capsys.readouterr().err
    for text in ("generator", "32/64 images", "loss 1.5", "images/s", "wait", "left 0:"):
        assert text in line


# Random numbers.


def test_random_numbers_of_a_step_depend_on_its_parts_alone():
    def draw(*parts: object) -> torch.Tensor:
        return torch.rand(4, generator=step_generator(CPU, *parts))

    assert torch.equal(draw(0, "generator", 64), draw(0, "generator", 64))
    for parts in [(1, "generator", 64), (0, "tokenizer", 64), (0, "generator", 72)]:
        assert not torch.equal(draw(0, "generator", 64), draw(*parts))


# Accumulation.


def batch_of(num: int) -> Batch:
    return Batch(
        torch.arange(num * 3, dtype=torch.uint8).view(num, 3, 1, 1),
        {"label": torch.arange(num), "pair": torch.arange(2 * num).view(num, 2)},
        torch.arange(num) + 100,
    )


@pytest.mark.parametrize(("size", "sizes"), [(None, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5]), (1, [1] * 5)])
def test_micro_batches_are_the_batch_in_parts(size, sizes):
    batch = batch_of(5)
    parts = list(micro_batches(batch, size))
    assert [len(part.key) for part, _, _ in parts] == sizes
    assert torch.equal(torch.cat([part.images for part, _, _ in parts]), batch.images)
    assert torch.equal(torch.cat([part.key for part, _, _ in parts]), batch.key)
    for name, value in batch.cond.items():
        assert torch.equal(torch.cat([part.cond[name] for part, _, _ in parts]), value)
    assert sum(share for _, share, _ in parts) == pytest.approx(1)
    assert [last for _, _, last in parts] == [False] * (len(sizes) - 1) + [True]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(size):
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss(images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1).double() @ weight).sin().mean()

    batch = batch_of(7)
    (expected,) = torch.autograd.grad(loss(batch.images), weight)
    for part, share, _ in micro_batches(batch, size):
        (share * loss(part.images)).backward()
    assert torch.allclose(weight.grad, expected, rtol=1e-12)


# Losses and gradients that are not finite.


def spoilt_training(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"blocks": nn.Linear(4, 4)})["blocks"])
    optimizer = build_optimizer(model, spec, 1e-2)
    ema = EMA(model, (0.5,))
    return model, optimizer, ema


def state_of(model, optimizer, ema) -> list[torch.Tensor]:
    state = [*model.state_dict().values(), *ema.state_dict(0.5).values()]
    own = [sorted(optimizer.state[parameter].items()) for parameter in model.parameters()]
    state += [torch.as_tensor(value) for values in own for _, value in values]
    return [value.clone() for value in state]


def guard_of(run: Run, model, optimizer, ema) -> NonFiniteGuard:
    return NonFiniteGuard(run, TrainingState(run.dir, "generator", {"model": model}, ema, {"optimizer": optimizer}))


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("spec", [AdamWSpec(weight_decay=0.1), MuonSpec(weight_decay=0.1)], ids=["adamw", "muon"])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("what", ["loss nan", "loss inf", "one gradient inf", "one gradient nan"])
def test_a_value_that_is_not_finite_changes_nothing(tiny_spec, tmp_path, spec, clip, what):
    model, optimizer, ema = spoilt_training(spec)
    guard = guard_of(open_run(tmp_path, tiny_spec), model, optimizer, ema)
    parameters = list(model.parameters())

    def step(number: int, spoil: bool) -> bool:
        loss = model(torch.ones(2, 3) * (number + 1)).square().mean()
        loss.backward()
        value = loss.detach()
        if spoil and what.startswith("loss"):
            value = torch.tensor(float(what.split()[1]))
        elif spoil:
            parameters[2].grad[0, 0] = float(what.split()[2])
        taken = guard.check(update(optimizer, parameters, value, clip), 8 * number, number, torch.arange(2))
        if taken:
            ema.update(model, number)
        assert all(parameter.grad is None for parameter in parameters)
        return taken

    assert step(0, spoil=False)
    before = state_of(model, optimizer, ema)
    assert not step(1, spoil=True)
    assert same(state_of(model, optimizer, ema), before)
    assert step(2, spoil=False)
    assert not same(state_of(model, optimizer, ema), before)
    events = guard.run.history(kind="event")
    assert [(line["event"], line["step"], line["images"], line["keys"]) for line in events] == [
        ("non_finite", 1, 8, [0, 1])
    ]


def fail(guard: NonFiniteGuard, num_steps: int) -> None:
    for step in range(num_steps):
        assert not guard.check(math.nan, step, step, torch.arange(3)) and not guard.steady


def test_a_run_of_values_that_are_not_finite_stops_when_there_is_nothing_to_go_back_to(tiny_spec, tmp_path):
    guard = guard_of(open_run(tmp_path, tiny_spec), *spoilt_training(AdamWSpec()))
    fail(guard, MAX_NON_FINITE_STEPS - 1)
    assert guard.check(1.0, 0, 0, torch.arange(3)) and guard.steady, "a good step starts the count again"
    fail(guard, MAX_NON_FINITE_STEPS - 1)
    with pytest.raises(CheckpointError, match=f"{MAX_NON_FINITE_STEPS} steps in a row without a finite loss, stopped"):
        guard.check(math.inf, 99, 99, torch.arange(3))
    assert len(guard.run.history(event="non_finite")) == 2 * MAX_NON_FINITE_STEPS - 1


def test_after_many_skipped_steps_training_goes_back_to_the_last_good_checkpoint_once(tiny_spec, tmp_path, caplog):
    model, optimizer, ema = training = spoilt_training(AdamWSpec())
    guard = guard_of(open_run(tmp_path, tiny_spec), *training)

    def step(number: int) -> None:
        model(torch.ones(2, 3) * (number + 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, number)

    step(0)
    assert guard.state.save(8, 2)
    good = state_of(*training)
    step(1)
    assert not same(state_of(*training), good)
    fail(guard, MAX_NON_FINITE_STEPS)
    assert same(state_of(*training), good), "weights, averages and optimizer"
    step_number = MAX_NON_FINITE_STEPS - 1
    assert caplog.messages[-1] == (
        f"generator step {step_number}: {MAX_NON_FINITE_STEPS} steps in a row without a finite loss, "
        "back to the weights of 8 images"
    )
    (event,) = guard.run.history(event="went_back")
    assert (event["to_images"], event["images"], event["step"]) == (8, step_number, step_number)
    fail(guard, MAX_NON_FINITE_STEPS - 1)
    with pytest.raises(
        CheckpointError, match="stopped at step 99. The last checkpoint is intact. Try a lower learning"
    ):
        guard.check(math.nan, 99, 99, torch.arange(3))
    assert [path.name for path in guard.state.folder.iterdir()] == ["000000008"]


def test_the_norm_of_the_gradients_is_the_one_before_clipping():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert update(optimizer, [weight], torch.tensor(1.0), clip=1.0) == pytest.approx(5)
    assert torch.allclose(weight, torch.tensor([-0.6, -0.8]), atol=1e-6)


# Signals.


STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_asks_to_stop(number):
    handlers = [signal.getsignal(one) for one in STOPS]
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
    assert [signal.getsignal(one) for one in STOPS] == handlers


@pytest.mark.parametrize("number", STOPS)
def test_outside_of_the_loops_a_signal_stops_at_once(number):
    with pytest.raises(Stopped, match=f"stopped by {number.name}"), StopSignal(at_once=True):
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop, "inside of a loop it asks"
        os.kill(os.getpid(), number)


def test_a_run_under_nohup_outlives_its_terminal():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_second_ctrl_c_stops_at_once():
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)
