"""Driving the model: one predicted frame after the other, each from a command and the frames before it.

    session = RolloutSession(generator, sampling, history, seed=0)
    for latents in session.stream(commands, seconds=0.25):        # frames come as they are ready
        images = context.decode(latents)

Predictions are fed back as latents, never decoded and encoded again, and a generator with cacheable frames computes
each frame once: all steps of the sampler, all later steps and all branches use its keys and values. A command is a
motion in metres and radians seen from the frame that was reached, so poses add up by composition in the plane.
Everything that a session draws is keyed by (seed, id of the rollout, number of the step): the same session gives the
same frames again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raev2.batch import Cond, Denoiser, FrameCache
from raev2.data import derived_seed
from raev2.errors import SpecError
from raev2.model.frames import BlockCausalFrames, FramesCondition
from raev2.model.generator import Generator
from raev2.sampler import map_rows, noise_for, sample_latents
from raev2.spec import SamplingSpec
from raev2_tasks.nwm.cond import model_cond
from raev2_tasks.nwm.pose import compose, wrap

RECORD_FORMAT_VERSION = 1


@dataclass(frozen=True)
class History:
    """The frames that B rollouts start from, the oldest first.

    latents   (B, K, C, H, W) normalised
    age_s     (B, K) seconds before the newest frame, whose age is 0
    valid     (B, K) bool; False where a slot holds no frame
    id        (B, K) int64; equal ids mean the same frame, which is then computed once. Negative: a frame of its own
    spacing   (B, 1) metres between two frames of the robot; None: those that the generator was trained with
    """

    latents: Tensor
    age_s: Tensor
    valid: Tensor
    id: Tensor
    spacing: Tensor | None = None

    @classmethod
    def of_cond(cls, cond: Cond) -> History:
        """From the condition of the samples whose context it is, as `cond_encoder` of the task returns it."""
        latents = cond["context_latents"]
        missing = torch.full(latents.shape[:2], -1, device=latents.device)
        valid = cond.get("context_valid", torch.ones_like(missing, dtype=torch.bool))
        return cls(latents, cond["context_age"].float(), valid, cond.get("context_id", missing), cond.get("spacing_m"))

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, rows: Sequence[int]) -> History:
        """The histories with these numbers; a number may come several times."""
        index = torch.as_tensor(list(rows), device=self.latents.device)
        spacing = None if self.spacing is None else self.spacing[index]
        return History(self.latents[index], self.age_s[index], self.valid[index], self.id[index], spacing)

    def then(self, latents: Tensor, seconds: float, id: Tensor) -> History:
        """With one more frame `seconds` after the newest one; the oldest leaves."""
        newest = torch.zeros(len(self), 1, device=self.age_s.device)
        return History(
            torch.cat([self.latents[:, 1:], latents[:, None]], 1),
            torch.cat([self.age_s[:, 1:] + seconds, newest], 1),
            torch.cat([self.valid[:, 1:], torch.ones_like(self.valid[:, :1])], 1),
            torch.cat([self.id[:, 1:], id[:, None].to(self.id)], 1),
            self.spacing,
        )


@dataclass(frozen=True)
class State:
    """Where a session is: restore it to undo steps or to try another command from the same place.

    history   the frames that the next step sees; with `caches`, their ids are rows of all caches in a row
    caches    keys and values of these frames, where the generator has them; shared with earlier and later states
    poses     (S + 1, B, 3) float64, metres and radians, from the start (0, 0, 0) on
    commands  (S, B, 3) float64; seconds: S durations
    """

    history: History
    caches: tuple[FrameCache, ...]
    poses: np.ndarray
    commands: np.ndarray
    seconds: tuple[float, ...]


class RolloutSession:
    """B rollouts side by side. Read `step`.

    generator   `Generator` with a condition of past frames
    history     the frames that the rollouts start from
    ids         ids of the B rollouts, which select their noise; default 0 to B - 1. Equal ids share their noise, so
                that commands can be compared
    use_action  False: hide the commands from the model, which then predicts from time alone (a baseline)
    """

    def __init__(
        self,
        generator: Generator,
        sampling: SamplingSpec,
        history: History,
        *,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        weak: Denoiser | None = None,
        use_action: bool = True,
    ) -> None:
        self.generator, self.sampling, self.seed, self.weak = generator, sampling, seed, weak
        self.ids = list(range(len(history)) if ids is None else ids)
        if len(self.ids) != len(history):
            raise SpecError("rollout.ids", "one id for each rollout", got=len(self.ids), expected=str(len(history)))
        if not use_action and "has_action" not in generator.conditioner.optional_fields:
            raise SpecError(
                "rollout", "this model cannot do without a command", expected="a condition with has_action",
                hint="Train with task.condition_form=block_causal and task.action_drop_prob above 0.",
            )  # fmt: skip
        self.use_action = use_action
        self.caching = (
            isinstance(generator.conditioner, BlockCausalFrames) and weak is None
        )  # caches are of one network
        nowhere, nothing = np.zeros((1, len(history), 3)), np.zeros((0, len(history), 3))
        history, caches = self._cached(history)
        self.state = State(history, caches, nowhere, nothing, ())

    # State.

    def __len__(self) -> int:
        """Number of rollouts."""
        return len(self.ids)

    @property
    def num_steps(self) -> int:
        """Frames predicted so far."""
        return len(self.state.seconds)

    @property
    def pose(self) -> np.ndarray:
        """Where the rollouts are, (B, 3): x and y in metres, yaw in radians, seen from where they started."""
        return self.state.poses[-1]

    @property
    def time_s(self) -> float:
        """Seconds since the start."""
        return sum(self.state.seconds)

    def branch(self, rows: Sequence[int], ids: Sequence[int] | None = None) -> RolloutSession:
        """A new session that goes on from here with copies of these rollouts; it leaves this one as it is.

        rows   numbers of rollouts, several times where several continuations are wanted
        """
        rows, state = list(rows), self.state
        session = copy(self)
        session.ids = [self.ids[row] for row in rows] if ids is None else list(ids)
        session.state = replace(
            state, history=state.history.rows(rows), poses=state.poses[:, rows], commands=state.commands[:, rows]
        )
        return session

    # Steps.

    def step(self, command: Any, seconds: float) -> Tensor:
        """Predict the frame that a motion leads to; returns its latents (B, C, H, W).

        command   (3,) for all rollouts or (B, 3): forward and left in metres, turn to the left in radians, seen from
                  the frame reached
        seconds   how long the motion takes

        Raises SpecError for a duration that the model was not trained on.
        """
        command = np.broadcast_to(np.asarray(command, dtype=np.float64), (len(self), 3))
        if not np.isfinite(command).all():
            raise SpecError("rollout.command", "not finite", got=command.tolist())
        self._check_seconds(seconds)
        keys = [derived_seed("rollout", id, self.num_steps) for id in self.ids]
        noise = noise_for(self.seed, keys, self.generator.latent_shape)
        latents = self._sample(self._cond(command, seconds), noise.to(self.state.history.latents.device))
        self.state = self._moved(latents, command, float(seconds))
        return latents

    def stream(self, commands: Iterable[Any], seconds: float | Sequence[float]) -> Iterator[Tensor]:
        """`step` for each command; a frame is yielded as soon as it is ready.

        seconds   one duration for all commands, or one for each
        """
        for number, command in enumerate(commands):
            yield self.step(command, seconds if isinstance(seconds, int | float) else seconds[number])

    def run(self, commands: Iterable[Any], seconds: float | Sequence[float]) -> Tensor:
        """All frames of `stream` at once: latents (B, S, C, H, W)."""
        return torch.stack(list(self.stream(commands, seconds)), 1)

    # Records.

    def record(self) -> dict[str, Any]:
        """What was done, in JSON types: enough to do it again from the same history with the same model."""
        return {
            "format_version": RECORD_FORMAT_VERSION,
            "seed": self.seed,
            "ids": self.ids,
            "sampling": self.sampling.model_dump(mode="json"),
            "use_action": self.use_action,
            "axes": "x forward and y left in metres, turn to the left in radians; commands seen from the frame reached",
            "steps": [
                {"seconds": seconds, "commands": command.tolist(), "poses": pose.tolist()}
                for seconds, command, pose in zip(
                    self.state.seconds, self.state.commands, self.state.poses[1:], strict=True
                )
            ],
        }

    def replay(self, record: Mapping[str, Any]) -> Iterator[Tensor]:
        """The frames of a record again; this session must be new and start from the same history."""
        own = {"seed": self.seed, "ids": self.ids, "sampling": self.sampling.model_dump(mode="json")}
        for name, value in own.items():
            if record.get(name) != value:
                raise SpecError(f"record.{name}", "differs from the session", got=record.get(name), expected=str(value))
        if self.num_steps:
            raise SpecError("rollout", "a replay starts from the beginning", got=f"{self.num_steps} steps done")
        for entry in record["steps"]:
            yield self.step(entry["commands"], entry["seconds"])

    # Parts of a step.

    def _check_seconds(self, seconds: float) -> None:
        longest = getattr(self.generator.condition_spec, "max_time", None)
        if seconds <= 0 or (longest is not None and seconds > longest * (1 + 1e-6)):
            raise SpecError(
                "rollout.seconds", "the model was not trained for this duration", got=f"{seconds:g}",
                expected=f"above 0{'' if longest is None else f', at most {longest:g}'}",
                hint="Take several shorter steps.",
            )  # fmt: skip

    def _cond(self, command: np.ndarray, seconds: float) -> dict[str, Tensor]:
        history = self.state.history
        device, num = history.latents.device, len(history)
        command = np.concatenate([command[:, :2], wrap(command[:, 2:])], 1)
        return {
            "context_latents": history.latents,
            "context_age": history.age_s,
            "context_valid": history.valid,
            "context_id": history.id,
            "action": torch.as_tensor(command, dtype=torch.float32, device=device),
            "rel_time": torch.full((num, 1), float(seconds), device=device),
            "has_action": torch.full((num,), self.use_action, device=device),
            **({} if history.spacing is None else {"spacing_m": history.spacing}),
        }

    def _sample(self, cond: dict[str, Tensor], noise: Tensor) -> Tensor:
        frames = FrameCache.cat(self.state.caches) if self.caching else None
        condition = self.generator.condition_spec
        assert isinstance(condition, FramesCondition)

        @torch.no_grad()
        def rows(numbers: list[int]) -> Tensor:
            part = model_cond(condition, {name: value[numbers] for name, value in cond.items()})
            if frames is not None:
                del part["context_latents"]
                part = self.generator.prepare_cond(part, frames)
            return sample_latents(self.generator, part, noise[numbers], self.sampling, weak=self.weak)

        if len(self) == 1:  # nothing to be independent of, and a CPU would fill up a chunk for it
            return rows([0])
        return map_rows(rows, len(self), noise.device, self.sampling.batch_size)

    @torch.no_grad()
    def _cached(self, history: History) -> tuple[History, tuple[FrameCache, ...]]:
        """A history with its distinct frames computed."""
        conditioner = self.generator.conditioner
        if not (self.caching and isinstance(conditioner, BlockCausalFrames)):
            return history, ()
        cond = {"context_latents": history.latents, "context_id": history.id, "context_valid": history.valid}
        latents, rows = conditioner.distinct_frames(cond)
        return replace(history, id=rows), (self.generator.encode_frames(latents),)

    @torch.no_grad()
    def _moved(self, latents: Tensor, command: np.ndarray, seconds: float) -> State:
        """The state after a step to the frames `latents`; caches that no frame needs any more are let go."""
        state, caches, new_id = self.state, self.state.caches, torch.full((len(self),), -1)
        if self.caching:
            new_id = torch.arange(len(self)) + sum(map(len, caches))
            caches = (*caches, self.generator.encode_frames(latents))
        history = state.history.then(latents, seconds, new_id)
        while caches and int(history.id.min()) >= len(caches[0]):
            history = replace(history, id=history.id - len(caches[0]))
            caches = caches[1:]
        return State(
            history,
            caches,
            np.concatenate([state.poses, compose(self.pose, command)[None]]),
            np.concatenate([state.commands, command[None]]),
            (*state.seconds, seconds),
        )
