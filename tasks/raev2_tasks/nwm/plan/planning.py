"""Find commands that lead to a goal: sample candidates, ask the world model where each leads, keep the best.

Read `plan` first. A planner sees a world model only as a `Score`: commands of B candidates in, one cost each out.
Commands are (B, S, 3): S motions (dx, dy, dyaw) in metres and radians, each in the frame where it begins, each lasting
`seconds`.

A path kind says what is searched for (its variables) and how variables become commands; a sampler says how candidates
are drawn. Limits act on the velocities of a command, so a path that keeps to its heading still does so within limits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from raev2.errors import SpecError
from raev2.spec import Spec
from raev2_tasks.nwm.pose import IDENTITY, accumulate, exp, log, relative

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raev2.eval.image_pairs import PairDistance

Array = NDArray[np.float64]
Cost = Literal["latent", "pixel", "lpips"]
Score = Callable[[Array, float], Array]
"""(commands (B, S, 3), seconds a command) -> costs (B,); lower is better. Equal commands must get equal costs."""


@dataclass(frozen=True)
class Motion:
    """How the robot of the data moves; the prior of every path kind.

    speed_m_s    mean forward speed
    speed_std    its standard deviation, m/s
    turn_std     standard deviation of the turn rate, rad/s; its mean is taken as 0
    """

    speed_m_s: float
    speed_std: float
    turn_std: float

    @classmethod
    def of(cls, velocities: Array) -> Motion:
        """From velocities (N, 3) of the data, see `pose.velocities`."""
        return cls(*map(float, (velocities[:, 0].mean(), velocities[:, 0].std(), velocities[:, 2].std())))


# Kinds of path


class UnicyclePath(Spec):
    """Forward speed and turn rate, constant within a segment: 2 variables a segment. Never moves sideways."""

    kind: Literal["unicycle"] = "unicycle"
    segments: int = Field(3, ge=1, description="parts of equal length, at most one per step")

    def prior(self, motion: Motion, duration_s: float) -> tuple[Array, Array]:
        """Mean and standard deviation of the variables."""
        mean = np.repeat([motion.speed_m_s, 0.0], self.segments)
        return mean, np.repeat([motion.speed_std, motion.turn_std], self.segments)

    def commands(self, variables: Array, steps: int, seconds: float) -> Array:
        """Commands (B, steps, 3) of variables (B, 2 * segments): speeds in m/s, then turn rates in rad/s."""
        segment = np.arange(steps) * self.segments // steps
        speed, turn = np.split(variables, 2, axis=1)
        velocities = np.stack([speed[:, segment], np.zeros((len(variables), steps)), turn[:, segment]], axis=-1)
        return exp(velocities * seconds)


class LinePath(Spec):
    """Equal steps to a point, and a final turn: 3 variables, as in the published evaluation.

    The robot turns into the direction of motion with the first step and to its final heading with the last one.
    """

    kind: Literal["line"] = "line"

    def prior(self, motion: Motion, duration_s: float) -> tuple[Array, Array]:
        """Mean and standard deviation of the variables."""
        ahead, aside = motion.speed_m_s * duration_s, _sideways(motion, duration_s)
        return np.array([ahead, 0, 0]), np.array([motion.speed_std * duration_s, aside, motion.turn_std * duration_s])

    def commands(self, variables: Array, steps: int, seconds: float) -> Array:
        """Commands (B, steps, 3) of variables (B, 3): end point (x, y) in metres, further turn in radians."""
        share = np.arange(1, steps + 1) / steps
        points = variables[:, None, :2] * share[:, None]
        heading = np.repeat(np.arctan2(variables[:, 1], variables[:, 0])[:, None], steps, axis=1)
        heading[:, -1] += variables[:, 2]
        return _steps(np.concatenate([points, heading[..., None]], axis=-1))


class SplinePath(Spec):
    """A smooth curve through control points, heading along it: 2 variables a point."""

    kind: Literal["spline"] = "spline"
    points: int = Field(3, ge=1, description="control points at equal times; the last one is the end")

    def prior(self, motion: Motion, duration_s: float) -> tuple[Array, Array]:
        """Mean and standard deviation of the variables."""
        part_s = duration_s / self.points
        mean, std = (motion.speed_m_s * part_s, 0.0), (motion.speed_std * part_s, _sideways(motion, part_s))
        return np.tile(mean, self.points), np.tile(std, self.points)

    def commands(self, variables: Array, steps: int, seconds: float) -> Array:
        """Commands (B, steps, 3) of variables (B, 2 * points): shifts (x, y) to each control point, in metres."""
        shifts = variables.reshape(len(variables), self.points, 2)
        points = np.concatenate([np.zeros_like(shifts[:, :1]), shifts.cumsum(axis=1)], axis=1)
        tangents = np.gradient(points, axis=1)  # Catmull-Rom: half the way between the neighbours
        place = np.arange(1, steps + 1) / steps * self.points
        part = np.minimum(place.astype(int), self.points - 1)
        u = (place - part)[:, None]
        start, end, out, into = points[:, part], points[:, part + 1], tangents[:, part], tangents[:, part + 1]
        position = (
            (2 * u**3 - 3 * u**2 + 1) * start
            + (u**3 - 2 * u**2 + u) * out
            + (3 * u**2 - 2 * u**3) * end
            + (u**3 - u**2) * into
        )
        slope = 6 * (u**2 - u) * (start - end) + (3 * u**2 - 4 * u + 1) * out + (3 * u**2 - 2 * u) * into
        heading = np.arctan2(slope[..., 1], slope[..., 0])
        return _steps(np.concatenate([position, heading[..., None]], axis=-1))


PathSpec = Annotated[UnicyclePath | LinePath | SplinePath, Field(discriminator="kind")]


# Samplers


class CEM(Spec):
    """Cross-entropy method: draw, refit mean and deviation to the best candidates, draw again.

    result   `best`: the best candidate of all. `mean`: the mean that was fitted last, scored once more, as published
             evaluations take it; it need not be better than any candidate
    """

    kind: Literal["cem"] = "cem"
    population: int = Field(64, ge=2, description="candidates an iteration")
    elites: int = Field(8, ge=1, description="best candidates that the next iteration is fitted to")
    iterations: int = Field(4, ge=1)
    momentum: float = Field(0.1, ge=0, lt=1, description="share of the old mean and deviation that is kept")
    min_std: float = Field(0.05, ge=0, description="lower bound of the deviation, as a share of the first one")
    result: Literal["best", "mean"] = Field("best", description="what is planned: a candidate, or the mean fitted last")

    @model_validator(mode="after")
    def _elites_are_few(self) -> CEM:
        if self.elites > self.population:
            raise ValueError(f"elites ({self.elites}) cannot exceed population ({self.population})")
        return self

    def weights(self, costs: Array) -> Array:
        """Weight of each candidate in the refit, (B,), sum 1."""
        weights = np.zeros(len(costs))
        weights[np.argsort(costs, kind="stable")[: self.elites]] = 1 / self.elites
        return weights


class MPPI(Spec):
    """Model predictive path integral: as CEM, but every candidate counts, with weight exp(-cost / temperature)."""

    kind: Literal["mppi"] = "mppi"
    population: int = Field(64, ge=2, description="candidates an iteration")
    iterations: int = Field(4, ge=1)
    temperature: float = Field(0.1, gt=0, description="in standard deviations of the costs of an iteration")
    momentum: float = Field(0.1, ge=0, lt=1, description="share of the old mean and deviation that is kept")
    min_std: float = Field(0.05, ge=0, description="lower bound of the deviation, as a share of the first one")

    def weights(self, costs: Array) -> Array:
        """Weight of each candidate in the refit, (B,), sum 1."""
        finite = costs[np.isfinite(costs)]
        if not len(finite):  # all are forbidden
            return np.full(len(costs), 1 / len(costs))
        scale = max(float(finite.std()) * self.temperature, 1e-12)
        weights = np.exp(-(costs - finite.min()) / scale)
        return weights / weights.sum()


class RandomShooting(Spec):
    """One large draw, the best candidate wins."""

    kind: Literal["random"] = "random"
    population: int = Field(256, ge=1, description="candidates")


SamplerSpec = Annotated[CEM | MPPI | RandomShooting, Field(discriminator="kind")]


class Limits(Spec):
    """What commands may do. Every candidate is brought inside before it is scored."""

    max_speed_m_s: float | None = Field(None, gt=0)
    max_turn_rad_s: float | None = Field(None, ge=0)
    forward_only: bool = Field(False, description="no backward motion")
    turn: Literal["both", "left", "right"] = Field("both", description="allowed directions of turning")

    def apply(self, commands: Array, seconds: float) -> Array:
        """The nearest commands (B, S, 3) inside, found in velocities (forward, sideways, turn rate)."""
        velocity = log(commands) / seconds
        if self.forward_only:
            velocity[..., 0] = np.maximum(velocity[..., 0], 0)
        if self.max_speed_m_s is not None:
            speed = np.hypot(velocity[..., 0], velocity[..., 1])
            velocity[..., :2] *= np.minimum(1, self.max_speed_m_s / np.maximum(speed, 1e-12))[..., None]
        most = math.inf if self.max_turn_rad_s is None else self.max_turn_rad_s
        low, high = (0 if self.turn == "left" else -most), (0 if self.turn == "right" else most)
        velocity[..., 2] = velocity[..., 2].clip(low, high)
        return exp(velocity * seconds)


class PlanSpec(Spec):
    """How to plan.

    step_s         how long each command of a plan lasts
    sampler_steps  solver steps of a predicted frame; few, for a frame is compared here and not looked at. None: those
                   of the run
    repeats        futures that the cost of a candidate is averaged over; all candidates share their noise
    coarse         candidates are scored by one jump over the whole path, which costs one prediction instead of S; then
                   the best `coarse` of all are scored step by step, and the best of these wins. None: all step by step
    """

    path: PathSpec = UnicyclePath()
    sampler: SamplerSpec = CEM()
    limits: Limits = Limits()
    cost: Cost = Field("latent", description="distance of the last frame to the goal")
    step_s: float = Field(0.5, gt=0, description="duration of a command")
    sampler_steps: int | None = Field(4, ge=1, description="solver steps of a predicted frame; null: as in the run")
    repeats: int = Field(1, ge=1, description="sampled futures per candidate")
    coarse: int | None = Field(None, ge=1, description="candidates scored step by step; null: all of them")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_result(self) -> PlanSpec:
        if self.coarse is not None and isinstance(self.sampler, CEM) and self.sampler.result == "mean":
            raise ValueError(
                "coarse chooses among candidates, and sampler.result=mean takes none; leave one of them out"
            )
        return self

    def num_steps(self, seconds: float) -> int:
        """Commands in a plan of this length; SpecError unless `step_s` divides it."""
        steps = round(seconds / self.step_s)
        if steps < 1 or abs(steps * self.step_s - seconds) > 1e-6:
            raise SpecError(
                "plan.step_s", "does not divide the length of the plan", got=f"{self.step_s:g} s for {seconds:g} s"
            )
        return steps


# The settings of published evaluations, for goals 2 s ahead: 8 commands of 0.25 s, 120 candidates, one iteration. The
# prior is that of the data here; the published ones are constants for four datasets.
# Source: facebookresearch/nwm planning_eval.py; RAE-NWM's variant of it
_PUBLISHED = CEM(population=120, elites=5, iterations=1, momentum=0, result="mean")
PRESETS = {
    "nwm": PlanSpec(path=LinePath(), sampler=_PUBLISHED, cost="lpips", step_s=0.25, sampler_steps=None, repeats=3),
    "rae-nwm": PlanSpec(
        path=SplinePath(points=3), sampler=_PUBLISHED.replace(elites=3), cost="latent", step_s=0.25, sampler_steps=None
    ),
}


# Problems


@dataclass(frozen=True)
class Goal:
    """One planning problem.

    true_path   poses (S, 3) that were driven, at the times of the commands, seen from the start
    spacing_m   mean distance between consecutive frames of the robot; one waypoint unit
    start       frame at the start (Hpx, Wpx, 3); goal: the frame to reach
    score       cost of candidates by the world model
    """

    name: str
    true_path: Array
    spacing_m: float
    start: NDArray[np.uint8]
    goal: NDArray[np.uint8]
    score: Score


@dataclass(frozen=True)
class OwnGoal:
    """A planning problem of your own pictures (Hpx, Wpx, 3): nobody knows the true path."""

    start: NDArray[np.uint8]
    goal: NDArray[np.uint8]
    score: Score


class GoalSource(Protocol):
    """Where planning problems come from: a trained model with its validation data, or the toy world.

    name     for the result file
    motion   how the robot of the data moves
    """

    name: str
    motion: Motion

    def goals(self, num: int, seconds: float, spec: PlanSpec) -> Iterable[Goal]:
        """`num` problems with a goal `seconds` ahead, spread over the validation data."""


# Planning


@dataclass(frozen=True)
class Iteration:
    """Candidates that were scored together: commands (B, S, 3) and costs (B,)."""

    commands: Array
    costs: Array


@dataclass(frozen=True)
class Plan:
    """What a search found.

    commands    the best candidate, or what the sampler makes of them, (S, 3), each lasting `seconds`
    cost        its cost
    iterations  everything that was tried, in order
    """

    commands: Array
    cost: float
    seconds: float
    iterations: tuple[Iteration, ...]

    @property
    def path(self) -> Array:
        """Poses (S, 3) after each command, seen from the start."""
        return accumulate(self.commands)


def plan(
    score: Score,
    spec: PlanSpec,
    motion: Motion,
    steps: int,
    seconds: float,
    penalty: Callable[[Array], Array] | None = None,
) -> Plan:
    """Search for the commands with the lowest cost.

    score    cost of candidates by the world model
    motion   the prior: iteration 1 draws from it
    steps    commands in a plan; each lasts `seconds`
    penalty  (paths (B, S, 3) seen from the start) -> cost to add, (B,); for places to keep away from

    Equal arguments give equal plans. The mean that an iteration draws around is one of its candidates, so a plan is
    never worse than the mean of the prior (with `coarse`: as far as one jump can tell; not with `result=mean`).
    """
    sampler, iterations = spec.sampler, []
    mean, std = spec.path.prior(motion, steps * seconds)
    first_std = std

    def total(commands: Array, jump: bool) -> Array:
        asked = (to_jump(commands), steps * seconds) if jump else (commands, seconds)
        costs = np.asarray(score(*asked), dtype=np.float64)
        if costs.shape != (len(commands),) or np.isnan(costs).any():
            raise SpecError(
                "plan", "the score is not one number a candidate", got=f"{costs.shape}, {np.isnan(costs).sum()} NaN",
                expected=f"({len(commands)},) without NaN",
            )  # fmt: skip
        return costs if penalty is None else costs + penalty(accumulate_batch(commands))

    for number in range(1 if isinstance(sampler, RandomShooting) else sampler.iterations):
        rng = np.random.default_rng([spec.seed, number])
        variables = mean + std * rng.standard_normal((sampler.population, len(mean)))
        variables[0] = mean
        commands = spec.limits.apply(spec.path.commands(variables, steps, seconds), seconds)
        iterations.append(Iteration(commands, total(commands, jump=spec.coarse is not None)))
        if not isinstance(sampler, RandomShooting):
            # The refit sees the sampled variables, not what limits or the path kind made of them.
            weights = sampler.weights(iterations[-1].costs)
            centre = weights @ variables
            spread = np.sqrt(weights @ (variables - centre) ** 2)
            mean = sampler.momentum * mean + (1 - sampler.momentum) * centre
            std = sampler.momentum * std + (1 - sampler.momentum) * spread
            std = np.maximum(std, sampler.min_std * first_std)

    if isinstance(sampler, CEM) and sampler.result == "mean":
        commands = spec.limits.apply(spec.path.commands(mean[None], steps, seconds), seconds)
        iterations.append(Iteration(commands, total(commands, jump=False)))
        return _best(iterations[-1:], seconds, tuple(iterations))
    if spec.coarse is not None:
        best = best_first(np.concatenate([tried.costs for tried in iterations]))[: spec.coarse]
        commands = np.concatenate([tried.commands for tried in iterations])[best]
        iterations.append(Iteration(commands, total(commands, jump=False)))
        return _best(iterations[-1:], seconds, tuple(iterations))
    return _best(iterations, seconds, tuple(iterations))


def rank(score: Score, candidates: Array, seconds: float) -> Plan:
    """The best of given commands (B, S, 3), such as proposals of a policy; all costs are in `iterations[0]`."""
    tried = Iteration(candidates, np.asarray(score(candidates, seconds), dtype=np.float64))
    return _best([tried], seconds, (tried,))


def best_first(costs: Array) -> NDArray[np.int64]:
    """Indices of candidates from the lowest cost to the highest."""
    return np.argsort(costs, kind="stable")


def straight_ahead(motion: Motion, steps: int, seconds: float) -> Array:
    """Commands (S, 3) of a robot that keeps driving straight at the mean speed; a baseline."""
    return np.tile([motion.speed_m_s * seconds, 0, 0], (steps, 1))


def random_commands(spec: PlanSpec, motion: Motion, steps: int, seconds: float, seed: Sequence[int]) -> Array:
    """Commands (S, 3) of one candidate of the prior, without search; a baseline."""
    mean, std = spec.path.prior(motion, steps * seconds)
    variables = mean + std * np.random.default_rng(seed).standard_normal((1, len(mean)))
    return spec.limits.apply(spec.path.commands(variables, steps, seconds), seconds)[0]


# Costs


def latent_cost(predicted: Tensor, goal: Tensor) -> Array:
    """Mean over tokens of 1 - cosine: latents (B, C, H, W) against those of the goal (C, H, W); (B,)."""
    from torch.nn.functional import cosine_similarity

    return (1 - cosine_similarity(predicted.double(), goal.double()[None], dim=1)).mean((1, 2)).cpu().numpy()


def pixel_cost(predicted: Tensor, goal: Tensor) -> Array:
    """Mean squared difference of images (B, 3, Hpx, Wpx) in [0, 1] to the goal (3, Hpx, Wpx); (B,)."""
    return ((predicted.double() - goal.double()[None]) ** 2).mean((1, 2, 3)).cpu().numpy()


def lpips_cost(predicted: Tensor, goal: Tensor) -> Array:
    """LPIPS (AlexNet) of images (B, 3, Hpx, Wpx) to the goal (3, Hpx, Wpx); (B,). DataError without its weights."""
    import torch

    images, target = ((255 * values).round().to(torch.uint8) for values in (predicted, goal))
    return _lpips_alex(predicted.device)(images, target.expand_as(images)).double().cpu().numpy()


@functools.cache
def _lpips_alex(device: torch.device) -> PairDistance:
    from raev2.eval.image_pairs import build_pair_distance

    return build_pair_distance("lpips_alex", device)


def cost_between(cost: Cost, predicted: Tensor, goal: Tensor) -> Array:
    """A cost by name."""
    return {"latent": latent_cost, "pixel": pixel_cost, "lpips": lpips_cost}[cost](predicted, goal)


# Paths of candidates


def accumulate_batch(commands: Array) -> Array:
    """Poses (B, S, 3) after each of the commands (B, S, 3), seen from the start."""
    return accumulate(commands.swapaxes(0, 1)).swapaxes(0, 1)


def to_jump(commands: Array) -> Array:
    """One motion (B, 1, 3) that leads where the commands (B, S, 3) lead."""
    return accumulate_batch(commands)[:, -1:]


def _steps(path: Array) -> Array:
    """Commands (B, S, 3) between the poses (B, S, 3) of a path that starts at the identity."""
    start = np.broadcast_to(IDENTITY, (len(path), 1, 3))
    poses = np.concatenate([start, path], axis=1)
    return relative(poses[:, :-1], poses[:, 1:])


def _sideways(motion: Motion, duration_s: float) -> float:
    """How far the turns of the prior lead to the side within a duration, one standard deviation in metres."""
    reach = (abs(motion.speed_m_s) + motion.speed_std) * duration_s
    return reach * math.sin(min(motion.turn_std * duration_s / 2, math.pi / 2))


def _best(among: Sequence[Iteration], seconds: float, tried: tuple[Iteration, ...]) -> Plan:
    costs = np.concatenate([iteration.costs for iteration in among])
    winner = int(best_first(costs)[0])
    commands = np.concatenate([iteration.commands for iteration in among])[winner]
    return Plan(commands, float(costs[winner]), seconds, tried)
