"""The planner in an exact world: it arrives, keeps to its limits, and fits what it has drawn."""

from __future__ import annotations

import json
import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from raev2.errors import CheckpointError, SpecError
from raev2.spec_io import override_spec
from raev2_tasks.nwm.plan import planning
from raev2_tasks.nwm.plan.command import plan_command
from raev2_tasks.nwm.plan.path_metrics import ate, final_position_error
from raev2_tasks.nwm.plan.planning import (
    CEM,
    MPPI,
    PRESETS,
    Limits,
    LinePath,
    Motion,
    PlanSpec,
    RandomShooting,
    SplinePath,
    UnicyclePath,
    accumulate_batch,
    latent_cost,
    lpips_cost,
    pixel_cost,
    plan,
    random_commands,
    rank,
    straight_ahead,
    to_jump,
)
from raev2_tasks.nwm.pose import accumulate, compose, exp, log, relative, velocities
from raev2_tasks.nwm.worlds.worlds import MotionRange, ToyWorld

MOTION = Motion(speed_m_s=0.8, speed_std=0.4, turn_std=0.6)
STEPS, SECONDS = 4, 0.5
PATHS = [UnicyclePath(), LinePath(), SplinePath()]
SAMPLERS = [CEM(), MPPI(), RandomShooting(population=64)]


def images(world: ToyWorld, poses: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(world.render(poses)).permute(0, 3, 1, 2) / 255


def end_at(point: tuple[float, float]):
    """Score of a robot that sees exactly where it is."""

    def score(commands, seconds):
        return np.hypot(*(accumulate_batch(commands)[:, -1, :2] - point).T)

    return score


# Motions and paths


def test_exp_is_the_limit_of_many_small_steps():
    velocity = np.array([1.2, -0.3, 1.7])
    small = np.tile(velocity / 20_000, (20_000, 1))
    assert accumulate(small)[-1] == pytest.approx(exp(velocity), abs=1e-4)


def test_log_undoes_exp():
    velocities = np.random.default_rng(0).uniform(-3, 3, (200, 3))
    assert log(exp(velocities)) == pytest.approx(velocities)
    assert exp(np.zeros(3)) == pytest.approx(np.zeros(3))


def test_a_quarter_turn_by_hand():
    """A left arc of radius 1: one metre ahead and one to the left, facing left."""
    assert exp(np.array([math.pi / 2, 0, math.pi / 2])) == pytest.approx([1, 1, math.pi / 2])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_the_mean_of_the_prior_is_straight_ahead(path):
    mean, std = path.prior(MOTION, STEPS * SECONDS)
    assert path.commands(mean[None], STEPS, SECONDS)[0] == pytest.approx(straight_ahead(MOTION, STEPS, SECONDS))
    assert mean.shape == std.shape and (std > 0).all()


def test_unicycle_never_moves_sideways_and_holds_its_segments():
    commands = UnicyclePath(segments=2).commands(np.array([[1.0, 0.5, 0.4, -0.8]]), 4, 0.5)
    assert log(commands[0]) / 0.5 == pytest.approx(np.array([[1, 0, 0.4], [1, 0, 0.4], [0.5, 0, -0.8], [0.5, 0, -0.8]]))


def test_line_ends_at_its_point_and_final_turn():
    poses = accumulate(LinePath().commands(np.array([[3.0, 3.0, 0.2]]), 4, 0.5)[0])
    quarter = math.pi / 4
    assert poses[:, :2] == pytest.approx(np.outer([0.25, 0.5, 0.75, 1], [3, 3]))
    assert poses[:, 2] == pytest.approx([quarter, quarter, quarter, quarter + 0.2])


def test_spline_goes_through_its_points_along_its_heading():
    poses = accumulate(SplinePath(points=2).commands(np.array([[1.0, 0.5, 1.0, -0.5]]), 200, 0.01)[0])
    assert poses[99, :2] == pytest.approx([1, 0.5]) and poses[-1, :2] == pytest.approx([2, 0])
    along = np.diff(poses[:, :2], axis=0)
    assert np.arctan2(along[:, 1], along[:, 0]) == pytest.approx((poses[1:, 2] + poses[:-1, 2]) / 2, abs=1e-2)


def test_a_jump_leads_where_the_steps_lead():
    commands = np.random.default_rng(0).normal(size=(5, 4, 3))
    assert to_jump(commands)[:, 0] == pytest.approx(accumulate_batch(commands)[:, -1])
    assert accumulate_batch(commands)[3] == pytest.approx(accumulate(commands[3]))


# Search


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_every_path_and_sampler_finds_a_point(path, sampler):
    spec = PlanSpec(path=path, sampler=sampler)
    found = plan(end_at((1.2, 0.4)), spec, MOTION, STEPS, SECONDS)
    assert found.cost < 0.15
    assert found.cost == pytest.approx(np.hypot(*(found.path[-1, :2] - (1.2, 0.4))))
    assert found.path == pytest.approx(accumulate(found.commands))


@pytest.mark.parametrize("cost", [latent_cost, pixel_cost])
def test_cem_beats_random_and_straight_ahead_on_pictures(cost):
    """Goals are pictures. The planner never sees a pose, only what candidates would see."""
    errors = {"cem": [], "random": [], "straight": []}
    arrived = []
    for seed in range(8):
        world = ToyWorld(size_px=32)
        world.reset(seed)
        start = world.pose
        true = relative(start, world.imagine(random_commands(PlanSpec(), MOTION, STEPS, SECONDS, [100, seed])[None]))[0]
        goal = images(world, compose(start, true[-1:]))[0]

        def score(commands, seconds, world=world, goal=goal):
            return cost(images(world, world.imagine(commands)[:, -1]), goal)

        spec = PlanSpec(seed=seed)
        found = {
            "cem": plan(score, spec, MOTION, STEPS, SECONDS).commands,
            "random": random_commands(spec, MOTION, STEPS, SECONDS, [7, seed]),
            "straight": straight_ahead(MOTION, STEPS, SECONDS),
        }
        for name, commands in found.items():
            errors[name].append(float(ate(relative(start, world.imagine(commands[None]))[0], true)))
        arrived.append(float(final_position_error(relative(start, world.imagine(found["cem"][None]))[0], true)))
    mean = {name: np.mean(values) for name, values in errors.items()}
    assert mean["cem"] < 0.75 * min(mean["random"], mean["straight"]), mean
    assert np.mean(np.array(arrived) < 0.5) >= 0.75


def test_equal_seeds_give_equal_plans_and_other_seeds_others():
    found = [plan(end_at((1, 0.5)), PlanSpec(seed=seed), MOTION, STEPS, SECONDS) for seed in (3, 3, 4)]
    assert (found[0].commands == found[1].commands).all()
    assert not (found[0].commands == found[2].commands).all()


def test_a_plan_is_never_worse_than_the_mean_of_the_prior():
    score = end_at((MOTION.speed_m_s * STEPS * SECONDS, 0.0))
    assert plan(score, PlanSpec(sampler=CEM(population=2, elites=1)), MOTION, STEPS, SECONDS).cost == pytest.approx(0)


def test_refit_uses_the_sampled_variables():
    """The line's commands hold its variables changed (a turn is added to the heading of the line). With the sampled
    variables the search closes in on the turn that the score wants; with read-back ones it would drift away."""
    wanted = 0.9

    def score(commands, seconds):
        poses = accumulate_batch(commands)[:, -1]
        turn = poses[:, 2] - np.arctan2(poses[:, 1], poses[:, 0])
        return np.abs(turn - wanted)

    found = plan(score, PlanSpec(path=LinePath(), sampler=CEM(iterations=8)), MOTION, STEPS, SECONDS)
    assert found.cost < 0.02
    last = accumulate_batch(found.iterations[-1].commands)[:, -1]
    turns = last[:, 2] - np.arctan2(last[:, 1], last[:, 0])
    assert np.mean(turns) == pytest.approx(wanted, abs=0.1)


def test_later_iterations_are_better():
    found = plan(end_at((1.0, 0.6)), PlanSpec(), MOTION, STEPS, SECONDS)
    means = [tried.costs.mean() for tried in found.iterations]
    assert len(means) == 4 and means[-1] < 0.5 * means[0]


def test_mppi_weighs_good_candidates_more_and_forbidden_ones_not_at_all():
    weights = MPPI().weights(np.array([1.0, 2.0, np.inf]))
    assert weights.sum() == pytest.approx(1) and weights[0] > 0.99 and weights[2] == 0
    assert MPPI().weights(np.array([np.inf, np.inf])) == pytest.approx([0.5, 0.5])


def test_coarse_search_jumps_and_then_checks_the_best_step_by_step():
    asked = []

    def score(commands, seconds):
        asked.append((commands.shape, seconds))
        return end_at((1.2, 0.4))(commands, seconds)

    found = plan(score, PlanSpec(coarse=16), MOTION, STEPS, SECONDS)
    assert asked == [((64, 1, 3), 2.0)] * 4 + [((16, STEPS, 3), SECONDS)]
    assert found.cost < 0.15 and found.commands.shape == (STEPS, 3)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
def test_limits_hold_for_every_candidate(path):
    limits = Limits(max_speed_m_s=0.6, max_turn_rad_s=0.5, forward_only=True, turn="left")
    found = plan(end_at((-1.0, -1.0)), PlanSpec(path=path, limits=limits), MOTION, STEPS, SECONDS)
    velocity = np.concatenate([log(tried.commands) for tried in found.iterations]) / SECONDS
    assert np.hypot(velocity[..., 0], velocity[..., 1]).max() <= 0.6 + 1e-9
    assert velocity[..., 0].min() >= -1e-9
    assert velocity[..., 2].min() >= -1e-9 and velocity[..., 2].max() <= 0.5 + 1e-9
    if path.kind == "unicycle":
        assert np.abs(velocity[..., 1]).max() < 1e-9


def test_limits_leave_what_is_inside_alone():
    commands = UnicyclePath().commands(np.array([[0.5, 0.4, 0.3, 0.2, -0.1, 0.3]]), 6, 0.25)
    assert Limits(max_speed_m_s=1, max_turn_rad_s=1, forward_only=True).apply(commands, 0.25) == pytest.approx(commands)


def test_a_penalty_keeps_the_path_out_of_a_place():
    def penalty(paths):
        return np.where((paths[..., 1] > 0.1).any(1), np.inf, 0.0)

    free = plan(end_at((1.2, 0.4)), PlanSpec(), MOTION, STEPS, SECONDS)
    kept = plan(end_at((1.2, 0.4)), PlanSpec(), MOTION, STEPS, SECONDS, penalty)
    assert free.path[:, 1].max() > 0.1 >= kept.path[:, 1].max()
    assert math.isfinite(kept.cost)


@pytest.mark.parametrize("name", PRESETS)
def test_published_settings_take_the_mean_of_the_best_of_120(name):
    spec, asked = PRESETS[name], []

    def score(commands, seconds):
        asked.append(commands.shape)
        return end_at((1.2, 0.4))(commands, seconds)

    steps = spec.num_steps(2.0)
    found = plan(score, spec, MOTION, steps, spec.step_s)
    assert asked == [(120, 8, 3), (1, 8, 3)] and spec.step_s == 0.25
    first, last = found.iterations
    best = np.argsort(first.costs)[: spec.sampler.elites]
    ends = accumulate_batch(first.commands[best])[:, -1, :2]  # of a line and of a spline linear in its variables
    assert found.path[-1, :2] == pytest.approx(ends.mean(0), abs=1e-9)
    assert found.cost == last.costs[0] != first.costs.min()


def test_coarse_and_a_mean_exclude_each_other():
    with pytest.raises(SpecError, match="coarse chooses among candidates, and sampler.result=mean takes none"):
        override_spec(PRESETS["rae-nwm"], ["coarse=4"])


def test_ranking_given_candidates():
    candidates = np.stack([straight_ahead(MOTION, STEPS, SECONDS) * scale for scale in (0.2, 1.0, 2.0)])
    found = rank(end_at((1.6, 0)), candidates, SECONDS)
    assert (found.commands == candidates[1]).all()
    assert found.iterations[0].costs == pytest.approx([1.28, 0, 1.6])


def test_a_score_that_is_not_one_number_a_candidate_is_an_error():
    with pytest.raises(
        SpecError, match=r"plan: the score is not one number a candidate; got \(3,\), 0 NaN; expected \(64,\)"
    ):
        plan(lambda commands, seconds: np.zeros(3), PlanSpec(), MOTION, STEPS, SECONDS)
    with pytest.raises(SpecError, match="64 NaN"):
        plan(lambda commands, seconds: np.full(len(commands), np.nan), PlanSpec(), MOTION, STEPS, SECONDS)


def test_more_elites_than_candidates_are_an_error():
    with pytest.raises(ValidationError, match=r"elites \(9\) cannot exceed population \(8\)"):
        CEM(population=8, elites=9)


def test_latent_cost_is_zero_at_the_goal_and_two_at_its_opposite():
    goal = torch.randn(6, 4, 4)
    costs = latent_cost(torch.stack([goal, -goal, 3 * goal]), goal)
    assert costs == pytest.approx([0, 2, 0], abs=1e-6)
    assert pixel_cost(torch.stack([goal, goal + 0.5]), goal) == pytest.approx([0, 0.25])


def test_lpips_cost_compares_8_bit_pictures_with_the_goal(monkeypatch):
    def distance(images, target):
        assert images.dtype == target.dtype == torch.uint8 and images.shape == target.shape
        return (images.float() - target.float()).abs().mean((1, 2, 3))

    monkeypatch.setattr(planning, "_lpips_alex", lambda device: distance)
    goal = torch.full((3, 8, 8), 0.2)
    assert lpips_cost(torch.stack([goal, goal + 0.4]), goal) == pytest.approx([0, 0.4 * 255])


# The toy world


def test_toy_world_is_a_function_of_seed_and_commands():
    frames = []
    for _ in range(2):
        world = ToyWorld()
        first = world.reset(5)
        frames.append([first, world.step(np.array([0.3, 0, 0.2]), 0.5), world.step(np.array([0.0, 0, -0.4]), 0.5)])
    assert all((a == b).all() for a, b in zip(*frames, strict=True))
    assert frames[0][0].shape == (64, 64, 3) and frames[0][0].dtype == np.uint8
    assert not (frames[0][0] == frames[0][1]).all()
    assert not (ToyWorld().reset(6) == frames[0][0]).all()


def test_toy_world_sees_the_wall_that_it_faces():
    """Facing along +x at the right wall (yellow); turned left, the upper wall (green) comes in from the left."""
    world = ToyWorld()
    frame = world.place(np.array([9.0, 2.0, 0.0]))
    red, green, blue = frame[32, 32].astype(int)
    assert red > green > blue
    columns = world.place(np.array([9.0, 7.0, math.pi / 4]))[32].astype(int)
    assert columns[4, 1] > columns[4, 0] and columns[-5, 0] > columns[-5, 1]


def test_toy_world_stops_at_walls_and_undoes():
    world = ToyWorld()
    start = world.place(np.array([9.0, 2.0, 0.0]))
    world.step(np.array([5.0, 0, 0.3]), 1.0)
    assert world.pose == pytest.approx([9.75, 2, 0.3])
    world.undo()
    world.undo()  # nothing left to undo
    assert world.pose == pytest.approx([9, 2, 0])
    assert (world.render(world.pose[None])[0] == start).all()


def test_imagined_poses_are_those_of_steps():
    world = ToyWorld()
    world.reset(1)
    commands = np.random.default_rng(0).normal(size=(3, 4, 3)) * [0.5, 0.1, 0.4]
    imagined = world.imagine(commands)
    for command in commands[1]:
        world.step(command, 0.5)
    assert imagined[1, -1] == pytest.approx(world.pose)


def test_motion_range_names_what_is_outside():
    motion = MotionRange(speed_m_s=(0, 1.5), turn_rad_s=(-1, 1))
    assert motion.complaint(exp(np.array([0.75, 0, 0.5])), 0.5) == ""
    complaint = motion.complaint(exp(np.array([-0.25, 0, 1.0])), 0.5)
    assert complaint == (
        "speed -0.50 m/s is outside the data (0.00 to 1.50); turn rate 115 °/s is outside the data (-57 to 57)"
    )


# The command


def test_the_command_writes_numbers_and_a_picture(tmp_path, capsys):
    plan_command(["--toy", "--goals", "6", "--seconds", "1", "2", "--success", "0.5", "--out", str(tmp_path)])
    with pytest.raises(
        SpecError, match=r"--out: exists already; got .*2s\.json\. Choose another folder, or add --over"
    ):
        plan_command(["--toy", "--seconds", "3", "2", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "2s.json").read_text())
    assert result["source"] == "toy world" and result["spec"]["sampler"]["kind"] == "cem"
    numbers = {
        method: {entry["name"]: entry["value"] for entry in entries} for method, entries in result["results"].items()
    }
    for metric in ("ate_m", "final_position_m", "final_yaw_deg"):
        assert numbers["plan"][metric] < min(numbers["straight"][metric], numbers["random"][metric])
    goals = result["goals"]
    assert {goal["spacing_m"] for goal in goals} == {0.2}
    assert numbers["plan"]["ate_wp"] == pytest.approx(numbers["plan"]["ate_m"] / 0.2)
    assert numbers["plan"]["ate_m"] == pytest.approx(np.mean([goal["errors"]["plan"]["ate_m"] for goal in goals]))
    paths = [accumulate(np.array(goal["commands"])) for goal in goals]
    again = [float(ate(path, np.array(goal["true_path"]))) for path, goal in zip(paths, goals, strict=True)]
    assert again == pytest.approx([goal["errors"]["plan"]["ate_m"] for goal in goals])
    for name in ("1s.png", "2s.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.width > 700
    shown = capsys.readouterr().out
    assert "6 goals 2 s ahead" in shown and "straight" in shown and "success_rel" in shown


def test_the_command_knows_published_settings_by_name(tmp_path):
    plan_command(["--toy", "--goals", "2", "--preset", "rae-nwm", "--set", "repeats=2", "--out", str(tmp_path)])
    spec = json.loads((tmp_path / "2s.json").read_text())["spec"]
    assert spec == PRESETS["rae-nwm"].replace(repeats=2).model_dump(mode="json")


def test_the_published_cost_needs_the_weights_of_its_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    planning._lpips_alex.cache_clear()
    with pytest.raises(CheckpointError, match=r"LPIPS \(AlexNet\): the weights are missing; expected .*alexnet"):
        plan_command(["--toy", "--goals", "1", "--preset", "nwm", "--out", str(tmp_path)])


def test_the_command_gives_equal_numbers_again(tmp_path):
    for name in ("one", "two"):
        plan_command(["--toy", "--goals", "1", "--seconds", "1", "--out", str(tmp_path / name)])
    assert (tmp_path / "one" / "1s.json").read_bytes() == (tmp_path / "two" / "1s.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--toy", "--set", "sampler.elite=3"], "spec.sampler.elite: unknown field. Did you mean 'elites'?"),
        (["--toy", "--set", "sampler.elites=100"], r"spec.sampler: elites \(100\) cannot exceed population \(64\)"),
        (["--toy", "--seconds", "1.3"], "plan.step_s: does not divide the length of the plan; got 0.5 s for 1.3 s"),
        (["--toy", "--goals", "0"], "--goals: not usable; got 0"),
        (["--toy", "--success", "0"], "--success: not usable; got 0.0; expected a share above 0, such as 0.25"),
        (["--toy", "--run", "runs/x"], "--toy: needs no --run"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SpecError, match=message):
        plan_command(options)


def test_velocities_of_recorded_poses():
    t = np.arange(5) * 0.25
    poses = np.stack([t * 2, 0 * t, 0 * t], axis=1)
    assert velocities(t, poses, every=2) == pytest.approx(np.tile([2, 0, 0], (3, 1)))
    arc = accumulate(np.tile(exp(np.array([0.25, 0, 0.1])), (8, 1)))
    found = velocities(np.arange(8) * 0.25, arc)
    assert found == pytest.approx(np.tile([1, 0, 0.4], (7, 1)))
    assert astuple(Motion.of(found)) == pytest.approx((1, 0, 0))
    assert MotionRange.of(found).turn_rad_s == pytest.approx((0.4, 0.4))
