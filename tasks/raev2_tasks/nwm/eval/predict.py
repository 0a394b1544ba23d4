"""The one way protocols predict: rollout sessions from places of a split, with the sampling settings of the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from raev2.errors import TaskError
from raev2.task import EvalContext
from raev2_tasks.nwm.cond import encode_context
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.rollout import History, RolloutSession


class Predictor:
    """Predictions from places, in the precision and with the sampling settings of the run."""

    def __init__(self, context: EvalContext, places: Places) -> None:
        if context.generator is None:
            raise TaskError("evaluation", "this protocol needs a generator", hint="Train the generator first.")
        self.context, self.places, self.generator = context, places, context.generator

    def session(self, indices: Sequence[int], use_action: bool = True) -> RolloutSession:
        """A new rollout from each of these places."""
        raw = {name: value.to(self.context.device) for name, value in self.places.context(indices).items()}
        spec, ids = self.context.spec, [self.places.ids[index] for index in indices]
        with self.context.autocast():
            history = History.of_cond(encode_context(raw, self.context.encode))
            return RolloutSession(
                self.generator, spec.sampling, history, seed=spec.evaluation.seed, ids=ids, weak=self.context.weak,
                use_action=use_action,
            )  # fmt: skip

    def step(self, session: RolloutSession, command: np.ndarray, seconds: float) -> Tensor:
        """`session.step`: latents (B, C, H, W) of the next frame."""
        with self.context.autocast():
            return session.step(command, seconds)

    def jumps(self, indices: Sequence[int], times_s: Sequence[float], use_action: bool = True) -> dict[float, Tensor]:
        """Latents (B, C, H, W) of the frames at each time, each predicted at once from the place."""
        start = self.session(indices, use_action)
        return {time: self.jump(start, self.places.motions(indices, 0.0, time), time) for time in times_s}

    def jump(self, start: RolloutSession, motions: np.ndarray, time_s: float) -> Tensor:
        """Latents (B, C, H, W) of one step, which leaves the session where it is."""
        return self.step(start.branch(range(len(start))), motions, time_s)

    def rollout(self, indices: Sequence[int], step_s: float, steps: int, use_action: bool = True) -> list[Tensor]:
        """Latents (B, C, H, W) of each frame of rollouts along the true path."""
        session = self.session(indices, use_action)
        motions = [self.places.motions(indices, number * step_s, (number + 1) * step_s) for number in range(steps)]
        with self.context.autocast():
            return list(session.stream(motions, step_s))
