"""A trained run as something to drive.

Rides start at places of the validation split: frames that have a full context before them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raev2.errors import SpecError
from raev2.task import EvalContext
from raev2_tasks.nwm.data.dataset import as_trajectories
from raev2_tasks.nwm.data.own_start import OwnFile, OwnStart
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.pose import relative, velocities
from raev2_tasks.nwm.rollout import RolloutSession, State
from raev2_tasks.nwm.spec import task_spec
from raev2_tasks.nwm.worlds.engine import MazeWorld, require_vizdoom
from raev2_tasks.nwm.worlds.worlds import UNDO_STEPS, Frame, MotionRange, Poses, World

if TYPE_CHECKING:  # the training loops come with it
    from raev2.model.opened import Source, TrainedRun

Array = NDArray[np.float64]
NUM_STARTS = 256  # places that a ride may start from
DURATIONS = (2, 1, 4, 8)  # frames a step of a ride may last, as far as the model was trained on them


def open_run(source: Source | str | None) -> TrainedRun:
    """A model of this task with a trained generator; None: the newest run.

    Raises SpecError for one of another task, CheckpointError where only the tokenizer is trained.
    """
    from raev2.model.opened import Source, find_source, open_trained

    source = source if isinstance(source, Source) else find_source(source, "nwm")
    if source.spec.task.name != "nwm":
        raise SpecError("--run", "not a run of this task", got=source.spec.task.name, expected="nwm")
    trained = open_trained(source)
    trained.need_generator()
    return trained


def places_ahead(context: EvalContext, num: int, seconds: float) -> tuple[Places, Predictor]:
    """`num` places of the validation split with `seconds` of recorded future, and what predicts from them."""
    places = Places(as_trajectories(context.dataset("val")), num, seconds)
    return places, Predictor(context, places)


def own_place(context: EvalContext, own: OwnFile) -> tuple[OwnStart, Predictor]:
    """Your own picture or clip, and what predicts from it."""
    start = OwnStart(as_trajectories(context.dataset("val")), own)
    return start, Predictor(context, start)


def recorded_velocities(context: EvalContext) -> Array:
    """Velocities (N, 3) of the training split from frame to frame, m/s and rad/s."""
    trajectories = as_trajectories(context.dataset("train")).trajectories
    return np.concatenate([velocities(trajectory.t, trajectory.poses) for trajectory in trajectories])


# Driving


class ModelWorld:
    """Shows what the model predicts; the first frame is a real one."""

    def __init__(self, name: str, predictor: Predictor, motion: MotionRange | None) -> None:
        self.name, self.predictor, self.motion = name, predictor, motion
        self.places, spec = predictor.places, predictor.context.spec
        longest_s = task_spec(spec).max_offset_s + 1e-6
        durations = [frames * self.places.period_s for frames in DURATIONS]
        self.durations_s: tuple[float, ...] = tuple(seconds for seconds in durations if seconds <= longest_s) or (
            longest_s,
        )
        self.sampler_steps: int | None = spec.sampling.steps
        self._states: deque[State] = deque(maxlen=UNDO_STEPS)  # they hold the caches of their frames
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
        self._states.clear()
        return as_frame(self.places.images([place], 0.0))

    def step(self, command: Poses, seconds: float) -> Frame:
        """Move, and show what is seen."""
        self.session.sampling = self.session.sampling.replace(steps=self.sampler_steps)
        before = self.session.state
        latents = self.predictor.step(self.session, command, seconds)
        self._states.append(before)
        return as_frame(self.predictor.context.decode(latents))

    def undo(self) -> None:
        """Take the last step back."""
        if self._states:
            self.session.state = self._states.pop()


class SimulatorWorld:
    """The simulator that recorded the data, at the place where a `ModelWorld` of the same seed starts."""

    name = "simulator"
    motion: MotionRange | None = None
    sampler_steps: int | None = None

    def __init__(self, places: Places, num_cells: int) -> None:
        self.places, self.num_cells = places, num_cells
        self.durations_s: tuple[float, ...] = (places.period_s,)
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
        """Move, and show what is seen."""
        return self._world.step(command, seconds)

    def undo(self) -> None:
        """Take the last step back."""
        self._world.undo()

    @property
    def _world(self) -> MazeWorld:
        assert self._maze is not None
        return self._maze


def model_worlds(
    run: Source | str | None, *, engine: bool, own: OwnFile | None = None
) -> Callable[[], tuple[World, World | None]]:
    """Worlds of one trained run, which is opened once; with `engine` the simulator of its data beside each.

    own   start from this picture or clip and not from places of the validation split
    """
    if engine and own:
        raise SpecError("--engine", "cannot stand where your own picture was taken")
    trained = open_run(run)
    context, name = trained.context(), str(trained.run.dir)
    places, predictor = places_ahead(context, NUM_STARTS, 0.0) if own is None else own_place(context, own)
    motion = MotionRange.of(recorded_velocities(context))
    manifest = places.dataset.manifest
    if engine:
        require_vizdoom()
        if manifest["recipe"] != "vizdoom":
            raise SpecError(
                "--engine", "the data of this run was not recorded in the simulator",
                got=f"data recipe {manifest['recipe']}", expected="vizdoom",
            )  # fmt: skip

    def make() -> tuple[World, World | None]:
        world = ModelWorld(name, predictor, motion)
        return world, SimulatorWorld(places, int(manifest["options"]["cells"])) if engine else None

    return make


def as_frame(images: Tensor) -> Frame:
    """One image (1, 3, Hpx, Wpx) uint8 as (Hpx, Wpx, 3)."""
    return images[0].permute(1, 2, 0).cpu().numpy()
