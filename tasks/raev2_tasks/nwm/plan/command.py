"""`raev2 nwm plan`: plan to goals of recorded trajectories, and measure how far the plans are from what was driven.

A goal is a frame some seconds ahead. The planner sees the frames up to now and the goal, never a pose; its path is
then compared with the recorded one. Two baselines need no model: straight ahead at the mean speed of the data, and one
random draw of the prior that the search starts from.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raev2.batch import MetricResult
from raev2.command.actions import source_of
from raev2.command.cli import source_options
from raev2.errors import SpecError
from raev2.files.artefact import write_json
from raev2.spec_io import override_spec
from raev2_tasks.nwm.data.own_start import add_own_options, own_file
from raev2_tasks.nwm.plan.path_metrics import path_errors, summarise
from raev2_tasks.nwm.plan.planning import (
    PRESETS,
    Array,
    Goal,
    GoalSource,
    Motion,
    OwnGoal,
    Plan,
    PlanSpec,
    accumulate_batch,
    cost_between,
    plan,
    random_commands,
    straight_ahead,
)
from raev2_tasks.nwm.plan.plot import PlanPicture, save_plans
from raev2_tasks.nwm.pose import accumulate, compose, relative
from raev2_tasks.nwm.worlds.worlds import ToyWorld

logger = logging.getLogger(__name__)
RESULT_FORMAT_VERSION = 2
METHODS = ("plan", "straight", "random")
MAX_PICTURES = 4
TOY_SPACING_M = 0.2  # a quarter of a second at the mean speed


@dataclass(frozen=True)
class Outcome:
    """What came of a goal: poses (S, 3) and errors by method."""

    goal: Goal
    plan: Plan
    paths: dict[str, Array]
    errors: dict[str, dict[str, float]]


def plan_goals(source: GoalSource, spec: PlanSpec, num: int, seconds: float) -> list[Outcome]:
    """Plan to every goal, and try the baselines on it."""
    steps, outcomes = spec.num_steps(seconds), []
    for number, goal in enumerate(source.goals(num, seconds, spec)):
        begin = time.monotonic()
        found = plan(goal.score, spec.replace(seed=spec.seed + number), source.motion, steps, spec.step_s)
        paths = {
            "plan": found.path,
            "straight": accumulate(straight_ahead(source.motion, steps, spec.step_s)),
            "random": accumulate(random_commands(spec, source.motion, steps, spec.step_s, [spec.seed, number])),
        }
        errors = {
            name: {metric: float(value) for metric, value in path_errors(path, goal.true_path, goal.spacing_m).items()}
            for name, path in paths.items()
        }
        outcomes.append(Outcome(goal, found, paths, errors))
        off = {name: values["final_position_m"] for name, values in errors.items()}
        logger.info(
            "goal %d of %d, %s: cost %.3f, ends %.2f m off (straight %.2f), %.1f s", number + 1, num, goal.name,
            found.cost, off["plan"], off["straight"], time.monotonic() - begin,
        )  # fmt: skip
    return outcomes


def summaries(outcomes: Sequence[Outcome], success: float) -> dict[str, list[MetricResult]]:
    """Means over the goals, by method."""
    return {name: summarise([outcome.errors[name] for outcome in outcomes], success) for name in METHODS}


def write_outcomes(
    out: Path, outcomes: Sequence[Outcome], source: GoalSource, spec: PlanSpec, seconds: float, success: float
) -> None:
    """Write `<out>.json`, with everything the numbers depend on, and `<out>.png`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        out.with_name(out.name + ".json"),
        {
            "format_version": RESULT_FORMAT_VERSION,
            "source": source.name,
            "seconds": seconds,
            "success": success,
            "motion": asdict(source.motion),
            "spec": spec.model_dump(mode="json"),
            "results": {
                name: [vars(result) for result in results] for name, results in summaries(outcomes, success).items()
            },
            "goals": [_goal_values(outcome) for outcome in outcomes],
        },
    )
    pictures = [
        PlanPicture(
            f"{outcome.goal.name}: {seconds:g} s ahead, off by {outcome.errors['plan']['final_position_m']:.2f} m",
            outcome.goal.start, outcome.goal.goal, outcome.plan, {"true": outcome.goal.true_path, **outcome.paths},
        )
        for outcome in outcomes[:MAX_PICTURES]
    ]  # fmt: skip
    save_plans(pictures, out.with_name(out.name + ".png"))


def plan_own(out: Path, own: OwnGoal, motion: Motion, spec: PlanSpec, seconds: float) -> Plan:
    """Plan from your own picture to your own goal; writes `<out>.json` and `<out>.png`."""
    found = plan(own.score, spec, motion, spec.num_steps(seconds), spec.step_s)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        out.with_name(out.name + ".json"),
        {
            "format_version": RESULT_FORMAT_VERSION, "seconds": seconds, "motion": asdict(motion),
            "spec": spec.model_dump(mode="json"), "cost": found.cost, "commands": found.commands.tolist(),
            "path": found.path.tolist(),
        },
    )  # fmt: skip
    caption = f"{seconds:g} s, cost {found.cost:.3f}"
    save_plans(
        [PlanPicture(caption, own.start, own.goal, found, {"plan": found.path})], out.with_name(out.name + ".png")
    )
    return found


def _goal_values(outcome: Outcome) -> dict[str, Any]:
    errors = {
        name: {metric: value if np.isfinite(value) else None for metric, value in values.items()}
        for name, values in outcome.errors.items()
    }
    return {
        "name": outcome.goal.name,
        "spacing_m": outcome.goal.spacing_m,
        "cost": outcome.plan.cost,
        "commands": outcome.plan.commands.tolist(),
        "true_path": outcome.goal.true_path.tolist(),
        "errors": errors,
    }


class ToyGoals:
    """Problems in the toy world, whose model is exact: what the planner loses here it loses to itself."""

    name = ToyWorld.name
    motion = Motion(speed_m_s=0.8, speed_std=0.4, turn_std=0.6)

    def goals(self, num: int, seconds: float, spec: PlanSpec) -> Iterable[Goal]:
        """Planning problems, one after the other."""
        import torch

        def images(world: ToyWorld, poses: Array) -> torch.Tensor:
            return torch.from_numpy(world.render(poses)).permute(0, 3, 1, 2) / 255

        for seed in range(num):
            world = ToyWorld()
            start = world.reset(seed)
            driven = self._drive(world, seed, seconds, spec)
            poses = compose(world.pose, driven)
            goal = images(world, poses[-1:])[0]

            def score(commands: Array, seconds: float, world: ToyWorld = world, goal: torch.Tensor = goal) -> Array:
                seen = images(world, world.imagine(commands)[:, -1])
                return cost_between(spec.cost, seen, goal)

            yield Goal(f"seed {seed}", driven, TOY_SPACING_M, start, world.render(poses[-1:])[0], score)

    def _drive(self, world: ToyWorld, seed: int, seconds: float, spec: PlanSpec) -> Array:
        """Poses (S, 3) of a random drive that touches no wall, seen from the start."""
        steps = spec.num_steps(seconds)
        draws = [random_commands(PlanSpec(), self.motion, steps, spec.step_s, [seed, draw]) for draw in range(200)]
        wanted = accumulate_batch(np.stack(draws))
        came = relative(world.pose, world.imagine(np.stack(draws)))
        free = np.abs(came - wanted)[..., :2].max((1, 2)) < 1e-9
        if not free.any():
            raise SpecError("--seconds", f"no drive from seed {seed} of the toy world is so long", got=f"{seconds:g}")
        return wanted[free.argmax()]


# The command


def plan_command(argv: Sequence[str]) -> None:
    """Plan to goals of recorded trajectories, and measure how far the plans are from what was driven."""
    parser = argparse.ArgumentParser(
        prog="raev2 nwm plan",
        description="Plan to goal frames of the validation data, and measure the plans against what was driven.",
        epilog="Every other value is a field of `PlanSpec`: --set sampler.iterations=2",
    )
    source_options(parser, own=("--task", "--set"))
    parser.add_argument("--toy", action="store_true", help="plan in the built-in toy world; needs no run")
    add_own_options(parser)
    parser.add_argument("--start", type=float, metavar="S", help="of --video: now, in seconds (default: its end)")
    parser.add_argument("--goal", metavar="FILE", help="with --image or --video: picture of the goal")
    parser.add_argument("--goals", type=int, default=16, metavar="N", help="number of goals (default: 16)")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[2.0], help="how far ahead the goals are (default: 2)"
    )
    parser.add_argument(
        "--success", type=float, default=0.25, metavar="SHARE",
        help="a goal is reached within this share of the length of the driven path (default: 0.25)",
    )  # fmt: skip
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings of a published evaluation")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", metavar="DIR", help="default: RUN/plans")
    parser.add_argument("--overwrite", action="store_true", help="replace plans to goals as far ahead")
    options = parser.parse_args(argv)
    if options.goals < 1:
        raise SpecError("--goals", "not usable", got=options.goals, expected="a number >= 1")
    if not options.success > 0:
        raise SpecError("--success", "not usable", got=options.success, expected="a share above 0, such as 0.25")
    spec = override_spec(PRESETS[options.preset] if options.preset else PlanSpec(), options.overrides)
    for seconds in options.seconds:
        spec.num_steps(seconds)
    own = own_file(options)
    if (own is None) != (options.goal is None):
        raise SpecError("--goal", "goes with --image or --video", got=options.goal, expected="both, or neither")
    if options.toy:
        if options.run or options.generator or own:
            raise SpecError("--toy", "needs no --run, --image or --video")
        source: GoalSource = ToyGoals()
        out = _free(Path(options.out or "plans-toy"), "", options)
    else:
        from raev2_tasks.nwm.plan.model_goals import ModelGoals

        source = ModelGoals(source_of(options, "nwm"))
        out = _free(Path(options.out or source.run_dir / "plans"), "own-" if own else "", options)
        if own is not None:
            problem = source.own_goal(own, Path(options.goal), spec)
            for seconds in options.seconds:
                found = plan_own(out / f"own-{seconds:g}s", problem, source.motion, spec, seconds)
                _print_own(found, spec.step_s)
            print(f"\n{out}")
            return
    for seconds in options.seconds:
        outcomes = plan_goals(source, spec, options.goals, seconds)
        write_outcomes(out / f"{seconds:g}s", outcomes, source, spec, seconds, options.success)
        _print(summaries(outcomes, options.success), seconds, len(outcomes))
    print(f"\n{out}")


def _free(out: Path, kind: str, options: argparse.Namespace) -> Path:
    """The folder of the plans, where none of them is there yet."""
    files = [out / f"{kind}{seconds:g}s.json" for seconds in options.seconds]
    taken = [file for file in files if file.exists()]
    if taken and not options.overwrite:
        raise SpecError("--out", "exists already", got=taken[0], hint="Choose another folder, or add --overwrite.")
    return out


def _print_own(found: Plan, step_s: float) -> None:
    """The commands of a plan, in metres and degrees."""
    print(f"\n{'seconds':>8}{'forward m':>12}{'left m':>12}{'turn deg':>12}")
    for number, (forward, left, turn) in enumerate(found.commands, start=1):
        print(f"{number * step_s:8g}{forward:12.3f}{left:12.3f}{np.rad2deg(turn):12.1f}")
    x, y, yaw = found.path[-1]
    print(
        f"ends {x:.2f} m ahead, {y:.2f} m to the left, turned by {np.rad2deg(yaw):.0f} degrees; cost {found.cost:.3f}"
    )


def _print(results: dict[str, list[MetricResult]], seconds: float, num: int) -> None:
    print(f"\n{num} goals {seconds:g} s ahead\n{'':18}" + "".join(f"{name:>18}" for name in results))
    for row in zip(*results.values(), strict=True):
        cells = (
            f"{result.value:.3f}" + (f" ± {result.stderr:.3f}" if result.stderr is not None else "") for result in row
        )
        print(f"{row[0].name:18}" + "".join(f"{cell:>18}" for cell in cells) + f"  {row[0].better} is better")
    print("± is one standard error over goals")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"plan": plan_command}
