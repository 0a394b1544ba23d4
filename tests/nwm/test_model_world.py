"""A trained run as a world and as a source of planning problems. It has learnt nothing, which is enough here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raev2.errors import CheckpointError, SpecError
from raev2.pipeline import train
from raev2.spec_io import apply_overrides, save_spec
from raev2.task import get_recipe, get_task
from raev2_data_recipes.drives.vizdoom_maze import RECIPE
from raev2_tasks.nwm.data.dataset import TrajectoryDataset
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.drive.model_world import SimulatorWorld, model_worlds, open_run
from raev2_tasks.nwm.drive.page import Drive, StepRequest, replay
from raev2_tasks.nwm.plan.command import plan_command
from raev2_tasks.nwm.plan.model_goals import ModelGoals
from raev2_tasks.nwm.plan.planning import PlanSpec
from raev2_tasks.nwm.pose import relative

AHEAD, LEFT = StepRequest(speed_m_s=0.8, seconds=0.5), StepRequest(turn_deg_s=30, seconds=0.25)


@pytest.fixture(scope="module")
def run_dir(tiny_nwm_run: Path) -> Path:
    return tiny_nwm_run


@pytest.fixture(scope="module")
def make_worlds(run_dir: Path):
    return model_worlds(str(run_dir), engine=False)


def test_a_ride_starts_with_a_real_frame_and_goes_on_with_predicted_ones(make_worlds, run_dir):
    world, engine = make_worlds()
    assert engine is None and world.name == str(run_dir)
    assert world.durations_s == (0.5, 0.25, 1.0), "as far as the model was trained"
    real = open_run(str(run_dir)).context().dataset("val")
    first = world.reset(3)
    assert any((first == real.image(index).permute(1, 2, 0).numpy()).all() for index in range(len(real)))
    frame = world.step(AHEAD.command, 0.5)
    assert frame.shape == first.shape == (64, 64, 3) and frame.dtype == np.uint8
    assert not (frame == first).all()
    world.step(LEFT.command, 0.25)
    assert world.pose == pytest.approx([0.4, 0, np.radians(7.5)])


def test_undo_and_replay_give_the_same_frames(make_worlds):
    ride = Drive(*make_worlds(), seed=2)
    ride.step(AHEAD)
    ride.step(LEFT)
    second = ride.shown[-1].frame
    ride.undo()
    ride.step(AHEAD)
    ride.undo()
    ride.step(LEFT)
    assert (ride.shown[-1].frame == second).all()
    frames = list(replay(make_worlds()[0], ride.record()))
    assert len(frames) == 3 and (frames[-1] == second).all()


def test_two_rides_do_not_disturb_each_other(make_worlds):
    (one, _), (other, _) = make_worlds(), make_worlds()
    one.reset(1), other.reset(1)
    alone = one.step(AHEAD.command, 0.5)
    other.step(LEFT.command, 0.5)
    one.undo()
    assert (one.step(AHEAD.command, 0.5) == alone).all()


def test_sampler_steps_are_those_of_the_run_until_set(make_worlds):
    ride = Drive(*make_worlds())
    assert ride.state()["sampler_steps"] == 2
    ride.step(AHEAD)
    two = ride.shown[-1].frame
    ride.undo()
    ride.step(AHEAD.replace(sampler_steps=5))
    assert ride.state()["sampler_steps"] == 5 and not (ride.shown[-1].frame == two).all()


def test_the_range_of_the_data_is_known(make_worlds):
    world, _ = make_worlds()
    low, high = world.motion.speed_m_s  # recorded with 0 to 0.8 m a frame, 4 frames a second
    assert -0.5 < low < 0.5 and 2.5 < high < 3.5
    ride = Drive(world)
    ride.step(StepRequest(speed_m_s=9, seconds=0.5))
    assert "speed 9.00 m/s is outside the data" in ride.state()["complaint"]


def test_a_step_that_is_too_long_is_refused_and_changes_nothing(make_worlds):
    ride = Drive(*make_worlds())
    with pytest.raises(SpecError, match="the model was not trained for this duration; got 9"):
        ride.step(AHEAD.replace(seconds=9))
    assert ride.state()["steps"] == 0


def test_goals_are_recorded_frames_with_their_true_paths(run_dir):
    source = ModelGoals(str(run_dir))
    goals = list(source.goals(3, 1.0, PlanSpec()))
    assert len(goals) == 3 and all(goal.true_path.shape == (2, 3) for goal in goals)
    data = source.context.dataset("val")
    steps = [
        relative(trajectory.poses[now], trajectory.poses[[now + 2, now + 4]])
        for trajectory in data.trajectories
        for now in range(len(trajectory) - 4)
    ]
    for goal in goals:
        assert min(np.abs(goal.true_path - step).max() for step in steps) < 1e-9
    assert {goal.spacing_m for goal in goals} == {data.spacing_m}
    assert source.motion.speed_m_s == pytest.approx(data.spacing_m * data.rate_hz, rel=0.05), "they only drive ahead"


def test_costs_depend_on_the_commands_alone(run_dir):
    """Candidates share their noise: equal commands cost the same wherever they stand in a batch."""
    source = ModelGoals(str(run_dir))
    goal = next(iter(source.goals(1, 1.0, PlanSpec(repeats=2))))
    commands = np.random.default_rng(0).normal(size=(3, 2, 3)) * [0.3, 0.05, 0.2]
    costs = goal.score(commands[[0, 1, 2, 0]], 0.5)
    assert costs[0] == costs[3] and len(set(costs[:3])) == 3
    assert goal.score(commands[[2, 0]], 0.5) == pytest.approx(costs[[2, 0]], rel=1e-6)
    assert (goal.score(commands, 0.5) == costs[:3]).all()


def test_a_planner_may_take_fewer_solver_steps_than_the_run(run_dir):
    """Costs follow `sampler_steps`; null means the steps of the run."""
    source = ModelGoals(str(run_dir))
    own = source.context.spec.sampling.steps
    commands = np.array([[[0.2, 0.0, 0.1]]])

    def cost(steps):
        goal = next(iter(source.goals(1, 0.5, PlanSpec(sampler_steps=steps))))
        return goal.score(commands, 0.5).item()

    assert cost(None) == cost(own) != cost(own + 1)


@pytest.mark.parametrize("setting", ["coarse=2", "cost=pixel"])
def test_the_command_plans_with_a_trained_run(run_dir, tmp_path, setting):
    small = ["sampler.population=4", "sampler.elites=2", "sampler.iterations=2", setting]
    options = [word for value in small for word in ("--set", value)]
    plan_command(["--run", str(run_dir), "--goals", "2", "--seconds", "1", "--out", str(tmp_path), *options])
    result = json.loads((tmp_path / "1s.json").read_text())
    assert result["source"] == str(run_dir) and len(result["goals"]) == 2
    assert {name for name in result["results"]} == {"plan", "straight", "random"}
    assert (tmp_path / "1s.png").is_file()


def test_a_run_without_a_generator_is_named(tiny_nwm_spec, run_dir, tmp_path):
    done = apply_overrides(tiny_nwm_spec, [f"tokenizer_from={run_dir / 'tokenizer'}"])
    only = train(done, tmp_path / "only", stage="tokenizer")
    with pytest.raises(CheckpointError, match="has no trained generator yet"):
        open_run(str(only))
    other = get_recipe(get_task("imagenet"), "quickstart").replace(tokenizer_from=str(run_dir / "tokenizer"))
    save_spec(other, tmp_path / "spec.yaml")
    with pytest.raises(SpecError, match="^--run: not a run of this task; got imagenet; expected nwm$"):
        open_run(str(tmp_path))
    with pytest.raises(CheckpointError, match="nothing: neither a run folder nor a pipeline"):
        model_worlds(str(tmp_path / "nothing"), engine=False)


def test_the_simulator_needs_data_that_it_recorded(run_dir):
    pytest.importorskip("vizdoom", reason="vizdoom is not installed")
    with pytest.raises(
        SpecError, match="--engine: the data of this run was not recorded in the simulator; got .*panoramas"
    ):
        model_worlds(str(run_dir), engine=True)


def test_the_simulator_stands_where_the_ride_starts(tmp_path):
    """A small recorded dataset; the simulator shows the frame of the recording again, but for rounding of the pose."""
    pytest.importorskip("vizdoom", reason="vizdoom is not installed")
    options = {"num_train": "1", "num_val": "2", "drives_per_maze": "1", "num_frames": "8", "format": "png"}
    RECIPE.build(tmp_path / "data", options)
    dataset = TrajectoryDataset(tmp_path / "data", "val", (64, 64))
    places = Places(dataset, 4, 0.0)
    simulator = SimulatorWorld(places, num_cells=5)
    mazes = set()
    for seed in range(4):
        frame = simulator.reset(seed)
        true = places.images([seed], 0.0)[0].permute(1, 2, 0).numpy()
        turned = simulator.step(np.array([0, 0, np.pi / 2]), 1.0)
        simulator.undo()
        assert np.abs(frame.astype(float) - true).mean() < 8 < np.abs(turned.astype(float) - true).mean()
        assert simulator.pose == pytest.approx([0, 0, 0], abs=1e-9)
        mazes.add(simulator._seed)
    assert len(mazes) == 2
    frame = simulator.reset(0)
    simulator.step(LEFT.command, 0.25)
    assert simulator.pose == pytest.approx(LEFT.command)
    simulator.undo()
    assert simulator.pose == pytest.approx([0, 0, 0], abs=1e-9)
