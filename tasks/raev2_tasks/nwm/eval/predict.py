"""The one way protocols predict: rollout sessions from places of a split, with the sampling settings of the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raev2.data import to_float, to_uint8
from raev2.errors import TaskError
from raev2.task import EvalContext
from raev2_tasks.nwm.cond import encode_context
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.rollout import History, RolloutSession


class Predictor:
    """Predictions from places, in float32 or under the autocast of the run."""

    def __init__(self, context: EvalContext, places: Places) -> None:
        if context.generator is None:
            raise TaskError("evaluation", "this protocol needs a generator", hint="Train the generator first.")
        self.context, self.places, self.generator = context, places, context.generator
        self.weak = None
        if hasattr(context.spec.sampling.guidance, "weak"):
            from raev2.pipeline import load_generator

            self.weak = load_generator(context.spec.sampling.guidance.weak).to(context.device)

    def session(self, indices: Sequence[int], use_action: bool = True) -> RolloutSession:
        """A new rollout from each of these places."""
        raw = {name: value.to(self.context.device) for name, value in self.places.context(indices).items()}
        spec, ids = self.context.spec, [self.places.ids[index] for index in indices]
        with self._autocast():
            history = History.of_cond(encode_context(raw, lambda images, keys: self.encode(images)))
            return RolloutSession(
                self.generator, self.context.rae, spec.sampling, history, seed=spec.evaluation.seed, ids=ids,
                weak=self.weak, use_action=use_action,
            )  # fmt: skip

    def jumps(self, indices: Sequence[int], times_s: Sequence[float], use_action: bool = True) -> dict[float, Tensor]:
        """Latents (B, C, H, W) of the frames at each time, each predicted at once from the place."""
        start = self.session(indices, use_action)
        return {time: self.jump(start, self.places.motions(indices, 0.0, time), time) for time in times_s}

    def jump(self, start: RolloutSession, motions: np.ndarray, time_s: float) -> Tensor:
        """Latents (B, C, H, W) of one step, which leaves the session where it is."""
        with self._autocast():
            return start.branch(range(len(start))).step(motions, time_s)

    def rollout(self, indices: Sequence[int], step_s: float, steps: int, use_action: bool = True) -> list[Tensor]:
        """Latents (B, C, H, W) of each frame of rollouts along the true path."""
        session = self.session(indices, use_action)
        with self._autocast():
            motions = [self.places.motions(indices, number * step_s, (number + 1) * step_s) for number in range(steps)]
            return list(session.stream(motions, step_s))

    @torch.no_grad()
    def encode(self, images_u8: Tensor) -> Tensor:
        """8-bit images -> latents (B, C, H, W), in float32."""
        with torch.autocast(self.context.device.type, enabled=False):
            return self.context.rae.encode(to_float(images_u8.to(self.context.device)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> 8-bit images on the CPU, in float32."""
        with torch.autocast(self.context.device.type, enabled=False):
            return to_uint8(self.context.rae.decode(latents.float())).cpu()

    def _autocast(self) -> torch.autocast:
        enabled = self.context.spec.precision == "bf16"
        return torch.autocast(self.context.device.type, torch.bfloat16, enabled=enabled)
