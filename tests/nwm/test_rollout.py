from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from raev2.batch import ModelOutput
from raev2.data import derived_seed
from raev2.errors import SpecError
from raev2.model.condition import NoCondition
from raev2.model.frames import FramesCondition
from raev2.model.generator import Generator
from raev2.sampler import noise_for, sample_latents
from raev2.spec import DDTSpec, DiTSpec, FlowSpec, SamplingSpec
from raev2_tasks.nwm.cond import model_cond
from raev2_tasks.nwm.pose import accumulate, compose, relative, steps, wrap
from raev2_tasks.nwm.rollout import History, RolloutSession

SHAPE = (4, 2, 2)
FIELDS = {"context_latents", "action", "rel_time"}
OPTIONAL = {"context_age", "context_valid", "context_id", "has_action"}


class Counter:
    """A generator whose clean prediction is the newest frame plus the command, and some of the noise."""

    flow, time_shift, latent_shape, has_base_head = FlowSpec(), 1.0, SHAPE, False
    device = torch.device("cpu")

    def __init__(self, form="block_causal") -> None:
        self.condition_spec = FramesCondition(num_frames=3, max_time=2.0, form=form)
        self.conditioner = NoCondition().build(DiTSpec(width=8, depth=1, num_heads=2), SHAPE)
        self.conditioner.optional_fields = {"has_action": None} if form == "block_causal" else {}
        self.seen = []

    def prepare_cond(self, cond):
        return cond

    def check_cond(self, cond):
        pass

    def __call__(self, z_t, t, cond):
        self.seen.append(cond)
        moved = cond["context_latents"][:, -1] + cond["action"].sum(1).view(-1, 1, 1, 1)
        return ModelOutput(moved + 0.1 * z_t)


def history(batch: int = 1) -> History:
    latents = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(batch, 3, *SHAPE)
    age = torch.tensor([[0.5, 0.25, 0.0]]).expand(batch, 3)
    return History(latents, age, torch.ones(batch, 3, dtype=torch.bool), torch.arange(3).expand(batch, 3))


def session(batch: int = 1, generator=None, **options) -> RolloutSession:
    return RolloutSession(generator or Counter(), SamplingSpec(steps=2), history(batch), **options)


def path(length: int) -> np.ndarray:
    """A winding path whose heading passes +-pi."""
    generator = np.random.default_rng(0)
    motions = np.stack([generator.uniform(0, 0.5, length), generator.normal(0, 0.1, length), np.full(length, 0.4)], 1)
    return accumulate(motions, np.array([1.0, -2.0, 2.5]))


def test_poses_add_up_in_the_plane():
    poses = path(12)
    rollout = session()
    for _ in rollout.stream(steps(poses), 0.25):
        pass
    expected = relative(poses[0], poses[1:])
    error = rollout.state.poses[1:, 0] - expected
    assert np.abs(error[:, :2]).max() < 1e-9 and np.abs(wrap(error[:, 2])).max() < 1e-9
    assert rollout.time_s == 0.25 * 11 and rollout.num_steps == 11


def test_one_long_command_leads_where_four_short_ones_do():
    short, long = steps(path(9)), steps(path(9)[::4])
    several, single = session(), session()
    several.run(short, 0.25)
    single.run(long, 1.0)
    assert np.abs(several.pose - single.pose).max() < 1e-9 and several.time_s == single.time_s
    assert np.abs(compose(long[0], long[1]) - single.pose[0]).max() < 1e-9


def test_predicted_frames_become_context_with_their_true_ages():
    rollout = session()
    first = rollout.step((0.5, 0, 0.1), 0.25)
    second = rollout.step((0.5, 0, 0.1), 1.0)
    past = rollout.state.history
    assert past.age_s.tolist() == [[1.25, 1.0, 0.0]]
    assert torch.equal(past.latents[:, 1], first) and torch.equal(past.latents[:, 2], second)
    assert torch.equal(past.latents[:, 0], history().latents[:, 2]), "the oldest frames left"


def test_the_model_gets_the_command_in_its_units():
    generator = Counter()
    rollout = session(generator=generator)
    rollout.step((0.5, -0.25, 3 * np.pi), 0.75)
    cond = generator.seen[0]
    assert cond.keys() == FIELDS | OPTIONAL
    assert torch.allclose(cond["action"], torch.tensor([[0.5, -0.25, -np.pi]]).float()), "turns are wrapped"
    assert cond["rel_time"].tolist() == [[0.75]] and cond["has_action"].tolist() == [True]


def test_a_model_without_ages_gets_only_what_it_knows():
    generator = Counter("in_context")
    session(generator=generator).step((1, 0, 0), 0.5)
    assert generator.seen[0].keys() == FIELDS


def test_a_rollout_depends_on_neither_its_neighbours_nor_their_number():
    commands = np.random.default_rng(0).normal(size=(3, 6, 3))
    together = session(6).run(commands, 0.25)
    part = session(3, ids=[4, 1, 5]).run(commands[:, [4, 1, 5]], 0.25)
    assert torch.equal(part, together[[4, 1, 5]])
    alone = session(1, ids=[4]).run(commands[:, 4], 0.25)
    assert torch.allclose(alone, together[4:5], atol=1e-6)


def test_noise_depends_on_seed_rollout_and_step():
    still = [(0, 0, 0)] * 2
    frames = session(2).run(still, 0.25)
    assert torch.equal(frames, session(2).run(still, 0.25))
    assert not torch.allclose(frames[0], frames[1])
    assert not torch.allclose(frames, session(2, seed=1).run(still, 0.25))
    assert not torch.allclose(frames[:, 1] - frames[:, 0], frames[:, 0] - history(2).latents[:, -1])
    shared = session(2, ids=[7, 7]).run(still, 0.25)
    assert torch.equal(shared[0], shared[1]), "equal ids make commands comparable"


def test_a_branch_goes_on_alone():
    trunk = session(2)
    trunk.step((1, 0, 0), 0.25)
    branch = trunk.branch([1, 1, 1])
    straight, left, _ = branch.step([(1, 0, 0), (0, 0, 0.5), (1, 0, 0)], 0.25)
    assert trunk.num_steps == 1 and branch.num_steps == 2 and len(branch) == 3
    assert (straight - left).std() < 1e-6 and (straight - left).mean() > 0.4, "same noise, other command"
    assert np.allclose(branch.pose[:, 0], [2, 1, 2]) and np.allclose(branch.pose[1, 2], 0.5)


def test_a_state_can_be_restored():
    rollout = session()
    rollout.step((1, 0, 0), 0.25)
    state = rollout.state
    first = rollout.step((0, 0, 1), 0.25)
    rollout.state = state
    assert rollout.num_steps == 1 and rollout.pose.tolist() == [[1, 0, 0]]
    assert torch.equal(rollout.step((0, 0, 1), 0.25), first)


def test_a_record_gives_the_same_frames_again():
    rollout = session(2, seed=3)
    commands = np.random.default_rng(1).normal(size=(4, 2, 3))
    frames = rollout.run(commands, [0.25, 1.0, 0.25, 0.5])
    record = json.loads(json.dumps(rollout.record()))
    again = session(2, seed=3)
    assert torch.equal(torch.stack(list(again.replay(record)), 1), frames)
    assert np.array_equal(again.state.poses, rollout.state.poses)
    with pytest.raises(SpecError, match=r"record.seed: differs from the session; got 3; expected 0"):
        next(session(2).replay(record))
    with pytest.raises(SpecError, match="starts from the beginning; got 4 steps done"):
        next(again.replay(record))


@pytest.mark.parametrize("seconds", [0.0, -0.25, 2.25])
def test_durations_outside_the_training_are_refused(seconds):
    with pytest.raises(
        SpecError, match=rf"not trained for this duration; got {seconds:g}; expected above 0, at most 2"
    ):
        session().step((0, 0, 0), seconds)


def test_wrong_calls_are_refused():
    with pytest.raises(SpecError, match="one id for each rollout; got 2; expected 1"):
        session(ids=[0, 1])
    with pytest.raises(SpecError, match=r"rollout.command: not finite"):
        session().step((0, float("nan"), 0), 0.25)
    with pytest.raises(SpecError, match="cannot do without a command"):
        session(generator=Counter("in_context"), use_action=False)


def test_a_blind_model_is_not_told_the_command():
    generator = Counter()
    session(generator=generator, use_action=False).step((1, 2, 3), 0.25)
    assert generator.seen[0]["has_action"].tolist() == [False]


# With the real network.


def network(**condition) -> Generator:
    spec = FramesCondition(num_frames=3, spacing=0.5, max_time=2.0, **condition)
    trunk = DDTSpec(width=16, depth=2, num_heads=2, head_width=16, head_depth=1, head_num_heads=2)
    generator = Generator(trunk, spec, FlowSpec(), SHAPE).eval()
    for parameter in generator.parameters():  # output layers start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return generator


def past(batch: int) -> History:
    """Random frames; all rollouts but the last share theirs."""
    latents, id = torch.randn(1, 3, *SHAPE).expand(batch, 3, *SHAPE).clone(), torch.arange(3).repeat(batch, 1)
    latents[-1], id[-1] = torch.randn(3, *SHAPE), torch.arange(3, 6)
    return replace(history(batch), latents=latents, id=id)


def test_frames_computed_once_give_what_frames_computed_anew_give():
    generator, start = network(), past(3)
    commands = np.random.default_rng(0).normal(size=(5, 3, 3))
    rollout = RolloutSession(generator, SamplingSpec(steps=3), start)
    for number, command in enumerate(commands):
        before = rollout.state.history
        frame = rollout.step(command, 0.25 * (1 + number))
        cond = {
            "context_latents": before.latents, "context_age": before.age_s, "context_valid": before.valid,
            "action": torch.tensor(rollout.state.commands[-1], dtype=torch.float32),
            "rel_time": torch.full((3, 1), 0.25 * (1 + number)),
        }  # fmt: skip
        cond["action"][:, 2] = torch.tensor(wrap(command[:, 2]))
        noise = noise_for(0, [derived_seed("rollout", i, number) for i in range(3)], SHAPE)
        assert torch.allclose(frame, sample_latents(generator, cond, noise, SamplingSpec(steps=3)), atol=1e-5)


def test_every_frame_is_encoded_once_for_all_branches(monkeypatch):
    generator, counts = network(), []
    encode = generator.encode_frames
    monkeypatch.setattr(generator, "encode_frames", lambda latents: counts.append(len(latents)) or encode(latents))
    rollout = RolloutSession(generator, SamplingSpec(steps=2), past(4))
    rollout.run([(0.5, 0, 0)] * 4, 0.25)
    branch = rollout.branch([0] * 5)
    branch.step((0.5, 0, 0), 0.25)
    assert counts == [6, 4, 4, 4, 4, 5], "the frames that three rollouts share came once"
    assert sum(map(len, branch.state.caches)) == 2 * 4 + 5, "frames that left the history are let go"


@pytest.mark.parametrize("form", ["block_causal", "in_context"])
def test_each_robot_of_several_has_its_own_unit_of_length(form):
    """A frame of the slow robot (0.25 m) and one of the fast robot (1 m) are one command to a model of spacing 0.5."""
    generator = network(form=form)
    cond = {
        "action": torch.tensor([[0.25, -0.125, 0.5], [1.0, -0.5, 0.5]]), "rel_time": torch.ones(2, 1),
        "context_latents": torch.zeros(2), "spacing_m": torch.tensor([[0.25], [1.0]]),
    }  # fmt: skip
    assert generator.condition_spec.spacing == 0.5
    slow, fast = model_cond(generator.condition_spec, cond)["action"]
    one = {**{name: value[:1] for name, value in cond.items()}, "action": torch.tensor([[0.5, -0.25, 0.5]])}
    del one["spacing_m"]
    assert slow.tolist() == fast.tolist() == model_cond(generator.condition_spec, one)["action"][0].tolist()
    assert cond["action"][0, 0] == 0.25, "the caller's tensors stay"


def test_a_rollout_knows_the_robot_that_it_starts_from():
    """Spacings travel with the rows of a history, through steps and branches; poses stay in metres."""
    generator = Counter()
    start = replace(history(2), spacing=torch.tensor([[0.5], [2.0]]))
    rollout = RolloutSession(generator, SamplingSpec(steps=2), start)
    rollout.step((1, 0, 0), 0.25)
    assert generator.seen[-1]["action"][:2, 0].tolist() == [2.0, 0.5] and "spacing_m" not in generator.seen[-1]
    assert rollout.pose[:, 0].tolist() == [1.0, 1.0]
    branch = rollout.branch([1, 0, 1])
    branch.step((1, 0, 0), 0.25)
    assert generator.seen[-1]["action"][:3, 0].tolist() == [0.5, 2.0, 0.5]


def test_in_context_models_get_published_units():
    generator = network(form="in_context")
    cond = {
        "action": torch.tensor([[4.0, -2.0, 0.5]]),
        "rel_time": torch.tensor([[1.0]]),
        "context_latents": torch.zeros(1),
    }
    found = model_cond(generator.condition_spec, cond)
    assert found["action"].tolist() == [[1.0, -0.5, 0.5]] and found["rel_time"].tolist() == [[4 / 128]]
    assert cond["action"][0, 0] == 4, "the caller's tensors stay"
    assert RolloutSession(generator, SamplingSpec(steps=2), past(2)).run([(1, 0, 0)], 1.0).shape == (2, 1, *SHAPE)
