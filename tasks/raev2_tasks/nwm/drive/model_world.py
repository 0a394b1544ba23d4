"""A trained run as something to drive (`ModelWorld`) and to plan with (`ModelGoals`).

Both start at places of the validation split: frames that have a full context before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raev2.data import to_float
from raev2.errors import CheckpointError, SpecError
from raev2.task import EvalContext
from raev2.training.run import Run
from raev2_tasks.nwm.data.dataset import TrajectoryDataset
from raev2_tasks.nwm.data.own_start import OwnFile, OwnStart, own_goal
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.plan.command import Goal, OwnGoal
from raev2_tasks.nwm.plan.planning import Motion, PlanSpec, cost_between
from raev2_tasks.nwm.pose import relative
from raev2_tasks.nwm.rollout import RolloutSession, State
from raev2_tasks.nwm.twist import velocities
from raev2_tasks.nwm.worlds.engine import MazeWorld, require_vizdoom
from raev2_tasks.nwm.worlds.worlds import Frame, MotionRange, Poses, World

Array = NDArray[np.float64]
NUM_STARTS = 256  # places that a ride may start from
DURATIONS = (2, 1, 4, 8)  # frames a step of a ride may last, as far as the model was trained on them


@dataclass(frozen=True)
class TrainedModel:
    """A trained generator with its data."""

    run: Run
    context: EvalContext

    @classmethod
    def open(cls, run: str | None) -> TrainedModel:
        """The run in a folder, or the newest of this task."""
        from raev2.pipeline import find_run, open_trained

        run_dir = find_run(run, "nwm")
        trained = open_trained(run_dir)
        if trained.generator is None:
            raise CheckpointError(
                str(run_dir), "has no trained generator yet", hint="Run `raev2 train --task nwm` with this --run."
            )
        spec, task = trained.run.spec, trained.task
        context = EvalContext(
            spec, trained.rae, lambda split: task.dataset(spec, split), trained.run.device,
            run_dir / "eval" / "reference", generator=trained.generator.eval(),
        )  # fmt: skip
        return cls(trained.run, context)

    def step(self, session: RolloutSession, command: Array, seconds: float) -> Tensor:
        """`session.step` in the precision of the run."""
        with self.run.autocast():
            return session.step(command, seconds)

    def dataset(self, split: str) -> TrajectoryDataset:
        """A split of its data."""
        return cast(TrajectoryDataset, self.context.dataset(split))

    def places(self, num: int, seconds: float) -> tuple[Places, Predictor]:
        """`num` places of the validation split with `seconds` of recorded future, and what predicts from them."""
        places = Places(self.dataset("val"), num, seconds)
        return places, Predictor(self.context, places)

    def own_start(self, own: OwnFile) -> tuple[Places, Predictor]:
        """Your own picture or clip, and what predicts from it."""
        start = OwnStart(self.dataset("val"), own)
        return start, Predictor(self.context, start)

    @cached_property
    def velocities(self) -> Array:
        """Velocities (N, 3) of the training split from frame to frame, m/s and rad/s."""
        trajectories = self.dataset("train").trajectories
        return np.concatenate([velocities(trajectory.t, trajectory.poses) for trajectory in trajectories])


# ---------------------------------------------------------------------------------------------------------------------
# Driving


class ModelWorld:
    """Shows what the model predicts; the first frame is a real one."""

    def __init__(self, model: TrainedModel, places: Places, predictor: Predictor, motion: MotionRange) -> None:
        self.model, self.places, self.predictor = model, places, predictor
        self.name, self.motion = str(model.run.dir), motion
        spec = model.context.spec
        longest_s = spec.task.max_offset_s + 1e-6
        durations = [frames * places.period_s for frames in DURATIONS]
        self.durations_s = tuple(seconds for seconds in durations if seconds <= longest_s) or (longest_s,)
        self.sampler_steps: int | None = spec.sampling.steps
        self._states: list[State] = []
        self.reset(0)

    @property
    def pose(self) -> Poses:
        """Seen from the start of the ride."""
        return self.session.pose[0]

    def reset(self, seed: int) -> Frame:
        """Start at place `seed`, with noise of that seed."""
        place = seed % len(self.places)
        self.session: RolloutSession = self.predictor.session([place])
        self.session.seed = seed
        self._states = []
        return _frame(self.places.images([place], 0.0))

    def step(self, command: Poses, seconds: float) -> Frame:
        """See `World.step`."""
        self.session.sampling = self.session.sampling.replace(steps=self.sampler_steps)
        before = self.session.state
        latents = self.model.step(self.session, command, seconds)
        self._states.append(before)
        return _frame(self.predictor.decode(latents))

    def undo(self) -> None:
        """See `World.undo`."""
        if self._states:
            self.session.state = self._states.pop()


class SimulatorWorld:
    """The simulator that recorded the data, at the place where a `ModelWorld` of the same seed starts."""

    name = "simulator"
    motion = None
    sampler_steps: int | None = None

    def __init__(self, places: Places, num_cells: int) -> None:
        self.places, self.num_cells = places, num_cells
        self.durations_s = (places.period_s,)
        self._maze: MazeWorld | None = None
        self._seed = -1  # of the maze
        self.reset(0)

    @property
    def pose(self) -> Poses:
        """Seen from the start of the ride."""
        return relative(self._start, self._world.pose)

    def reset(self, seed: int) -> Frame:
        """Stand at place `seed`."""
        dataset = self.places.dataset
        number, frame = self.places.moments[seed % len(self.places)]
        trajectory = dataset.trajectories[number]
        maze_seed = int(trajectory.recording.removeprefix("maze-"))
        if self._maze is None or maze_seed != self._seed:
            if self._maze is not None:
                self._maze.close()
            self._maze = MazeWorld(maze_seed, size=dataset.image_size, fit=dataset.fit, num_cells=self.num_cells)
            self._seed = maze_seed
        self._start = trajectory.poses[frame]
        return self._maze.place(self._start)

    def step(self, command: Poses, seconds: float) -> Frame:
        """See `World.step`."""
        return self._world.step(command, seconds)

    def undo(self) -> None:
        """See `World.undo`."""
        self._world.undo()

    @property
    def _world(self) -> MazeWorld:
        assert self._maze is not None
        return self._maze


def model_worlds(
    run: str | None, *, engine: bool, own: OwnFile | None = None
) -> Callable[[], tuple[World, World | None]]:
    """Worlds of one trained run, which is opened once; with `engine` the simulator of its data beside each.

    own   start from this picture or clip and not from places of the validation split
    """
    if engine and own:
        raise SpecError("--engine", "cannot stand where your own picture was taken")
    model = TrainedModel.open(run)
    places, predictor = model.places(NUM_STARTS, 0.0) if own is None else model.own_start(own)
    motion = MotionRange.of(model.velocities)
    manifest = places.dataset.manifest
    if engine:
        require_vizdoom()
        if manifest["recipe"] != "vizdoom":
            raise SpecError(
                "--engine", "the data of this run was not recorded in the simulator",
                got=f"data recipe {manifest['recipe']}", expected="vizdoom",
            )  # fmt: skip

    def make() -> tuple[World, World | None]:
        world = ModelWorld(model, places, predictor, motion)
        return world, SimulatorWorld(places, int(manifest["options"]["cells"])) if engine else None

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Planning


class ModelGoals:
    """Planning problems of a trained run: frames of the validation split some seconds ahead."""

    def __init__(self, run: str | None) -> None:
        self.model = TrainedModel.open(run)
        self.run_dir, self.name = self.model.run.dir, str(self.model.run.dir)
        self.motion = Motion.of(self.model.velocities)
        self.spacing_m = float(self.model.context.dataset("train").manifest["spacing_m"])

    def goals(self, num: int, seconds: float, spec: PlanSpec) -> Iterable[Goal]:
        """See `GoalSource.goals`."""
        places, predictor = self.model.places(num, seconds)
        times = [(step + 1) * spec.step_s for step in range(spec.num_steps(seconds))]
        for place in range(len(places)):
            start, goal = places.images([place], 0.0), places.images([place], seconds)
            true_path = np.stack([np.asarray(places.motions([place], 0.0, time))[0] for time in times])
            target = (predictor.encode(goal) if spec.cost == "latent" else to_float(goal))[0]
            score = model_score(self.model, predictor, predictor.session([place]), target, spec, place)
            yield Goal(f"place {place}", true_path, _frame(start), _frame(goal), score)

    def own_goal(self, own: OwnFile, goal: Path, spec: PlanSpec) -> OwnGoal:
        """From your own picture or clip to your own picture; nothing is known of the true path."""
        start, predictor = self.model.own_start(own)
        wanted = own_goal(goal, start.dataset)
        target = (predictor.encode(wanted) if spec.cost == "latent" else to_float(wanted))[0]
        score = model_score(self.model, predictor, predictor.session([0]), target, spec, 0)
        return OwnGoal(_frame(start.images([0], 0.0)), _frame(wanted), score)


def model_score(
    model: TrainedModel, predictor: Predictor, start: RolloutSession, goal: Tensor, spec: PlanSpec, number: int
) -> Callable[[Array, float], Array]:
    """Score of commands by rollouts from `start`; all candidates see the same noise.

    goal     latents (C, H, W), or image (3, Hpx, Wpx) in [0, 1] for the pixel cost
    number   of the goal; selects the noise
    """

    def score(commands: Array, seconds: float) -> Array:
        costs = np.zeros(len(commands))
        for repeat in range(spec.repeats):
            session = start.branch([0] * len(commands), ids=[number * spec.repeats + repeat] * len(commands))
            session.sampling = session.sampling.replace(steps=spec.sampler_steps or session.sampling.steps)
            for step in range(commands.shape[1]):
                latents = model.step(session, commands[:, step], seconds)
            seen = latents if spec.cost == "latent" else to_float(predictor.decode(latents))
            costs += cost_between(spec.cost, seen, goal.to(seen.device)) / spec.repeats
        return costs

    return score


def _frame(images: Tensor) -> Frame:
    """One image (1, 3, Hpx, Wpx) uint8 as (Hpx, Wpx, 3)."""
    return images[0].permute(1, 2, 0).cpu().numpy()
