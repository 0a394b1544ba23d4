"""Places: moments of recorded trajectories from which frames are predicted. A fixed list, so that numbers compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raev2.batch import Cond
from raev2.data import random_subset
from raev2.errors import DataError, SpecError
from raev2_tasks.nwm.data.dataset import TrajectoryDataset
from raev2_tasks.nwm.data.index import EvalIndex, read_index
from raev2_tasks.nwm.pose import relative


class Places:
    """Frames of a split with a full context before them and `horizon_s` after them, or `num` of these in random order.

    moments    (number of the trajectory, frame in it) of each place
    ids        select the noise of a prediction from each place
    period_s   seconds between two frames
    coverage   how many of the trajectories have a place
    """

    def __init__(
        self, dataset: TrajectoryDataset, num: int | None = None, horizon_s: float = 0.0, index: str | None = None
    ) -> None:
        """index: name of a frozen list of places (raev2_tasks.nwm.data.index) that is used instead of all of them."""
        self.dataset, self.period_s = dataset, 1 / dataset.rate_hz
        if index is not None:
            self._take(read_index(dataset.dir, index), num, self.frames(horizon_s))
            return
        ahead = self.frames(horizon_s)
        self.moments = [
            (number, frame)
            for number, trajectory in enumerate(dataset.trajectories)
            for frame in range(dataset.num_context - 1, len(trajectory) - ahead)
        ]
        if not self.moments:
            raise DataError(
                f"data {dataset.dir}", f"no trajectory of '{dataset.split}' is long enough",
                expected=f"{dataset.num_context} frames of context and {horizon_s:g} s after them",
                hint="Choose shorter horizons.",
            )  # fmt: skip
        self.moments = [self.moments[number] for number in self._subset(self.moments, num)]
        self.ids = list(range(len(self.moments)))

    def _subset(self, moments: Sequence[tuple[int, int]], num: int | None) -> list[int]:
        indices = [self.dataset.frame_index(*moment) for moment in moments]
        groups = [self.dataset.group(index) for index in indices]
        chosen = list(range(len(indices)))
        if num is not None:
            chosen = random_subset(zip(map(self.dataset.key, indices), groups, strict=True), num)
        asked = {groups[number] for number in chosen}
        self.coverage = {"what": self.dataset.group_kind, "asked": len(asked), "of": len(set(groups))}
        return chosen

    def _take(self, index: EvalIndex, num: int | None, ahead: int) -> None:
        listed = [(self.dataset.trajectory_number(place.trajectory), place.t) for place in index.places]
        chosen = self._subset(listed, num)
        self.moments = [listed[number] for number in chosen]
        self.ids = [index.places[number].noise_seed for number in chosen]
        for number, frame in self.moments:
            trajectory = self.dataset.trajectories[number]
            if not self.dataset.num_context - 1 <= frame < len(trajectory) - ahead:
                raise DataError(
                    f"index {index.name}", f"a place of {trajectory.id} is too near to its ends", got=f"frame {frame}",
                    expected=f"{self.dataset.num_context} frames of context and {ahead} frames after it",
                    hint="Build an index with these offsets, or choose shorter horizons.",
                )  # fmt: skip

    @property
    def identity(self) -> dict[str, Any]:
        """What the list is, for result files."""
        listed = [[self.dataset.trajectories[number].id, frame] for number, frame in self.moments]
        content = json.dumps([self.dataset.fingerprint, self.dataset.split, listed])
        return {
            "data": self.dataset.fingerprint, "split": self.dataset.split, "num": len(self),
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.moments)

    def frames(self, seconds: float) -> int:
        """Seconds in frames. SpecError unless that is a whole number."""
        count = round(seconds / self.period_s)
        if abs(count * self.period_s - seconds) > 1e-3 * self.period_s:
            raise SpecError(
                "seconds", "not a whole number of frames", got=f"{seconds:g}",
                expected=f"a multiple of {self.period_s:g} s",
            )  # fmt: skip
        return count

    def images(self, indices: Sequence[int], seconds: float) -> Tensor:
        """The true frames `seconds` later, 8-bit (B, 3, Hpx, Wpx)."""
        later = self.frames(seconds)
        moments = [self.moments[index] for index in indices]
        return torch.stack([self.dataset.image(self.dataset.frame_index(n, frame + later)) for n, frame in moments])

    def motions(self, indices: Sequence[int], start_s: float, end_s: float) -> np.ndarray:
        """True motions (B, 3) between two times: metres and radians, seen from where the camera is at the first."""
        start, end = self.frames(start_s), self.frames(end_s)
        return np.stack([relative(self._pose(index, start), self._pose(index, end)) for index in indices])

    def context(self, indices: Sequence[int]) -> Cond:
        """Raw conditions without motion and time: the frames before and at the places."""
        return self.dataset.collate_cond([self.dataset.context_at(*self.moments[index]) for index in indices])

    def cond(self, indices: Sequence[int], seconds: float) -> Cond:
        """Raw conditions of the true frames `seconds` later."""
        later = self.frames(seconds)
        samples = [self.dataset.sample_at(*self.moments[index], later) for index in indices]
        return self.dataset.collate_cond([sample["cond"] for sample in samples])

    def spacing_m(self, index: int) -> float:
        """Metres between two frames of the robot that was there."""
        number, _ = self.moments[index]
        return self.dataset.trajectories[number].spacing_m or self.dataset.spacing_m

    def _pose(self, index: int, later: int) -> np.ndarray:
        number, frame = self.moments[index]
        return self.dataset.trajectories[number].poses[frame + later]
