"""Trajectories cut in time: at gaps, and into a part for training and a later one for validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from raev2_tasks.nwm.data.trajectories import Frame, Trajectory

MAX_GAP = 2.5  # periods: frames taken on a grid may lie two apart


def cut_gaps(one: Trajectory, rate_hz: float) -> list[Trajectory]:
    """Pieces between gaps of more than 2.5 periods; the trajectory itself where there is none."""
    t = np.asarray(one.t, np.float64)
    if t.ndim != 1 or len(t) < 2:
        return [one]
    cuts = (np.flatnonzero(np.diff(t) > MAX_GAP / rate_hz) + 1).tolist()
    if not cuts:
        return [one]
    edges = list(pairwise([0, *cuts, len(t)]))
    return _parts(one, edges, [f"{one.id}_{number}" for number in range(len(edges))], [one.split] * len(edges))


def pieces_of(one: Trajectory, numbers: Sequence[int]) -> list[Trajectory]:
    """Pieces of consecutive numbers, of a trajectory with poses for all numbers and frames for `numbers` only."""
    runs = np.split(np.array(numbers), np.flatnonzero(np.diff(numbers) > 1) + 1)
    frames = _Frames(one.frames)
    ends = np.cumsum([len(run) for run in runs]).tolist()
    return [
        replace(
            one, id=f"{one.id}_{number}", t=one.t[run], position=one.position[run], yaw=one.yaw[run],
            frames=frames.between(end - len(run), end),
        )
        for number, (run, end) in enumerate(zip(runs, ends, strict=True))
    ]  # fmt: skip


def cut_split(one: Trajectory, val_fraction: float, gap_s: float) -> list[Trajectory]:
    """The beginning for training and the last `val_fraction` of the time for validation, `gap_s` left out between."""
    t = np.asarray(one.t, np.float64)
    if t.ndim != 1 or len(t) < 2:
        return [replace(one, split="train")]
    border = t[-1] - val_fraction * (t[-1] - t[0])
    first_val = int(np.searchsorted(t, border))
    end_train = int(np.searchsorted(t, border - gap_s, side="right"))
    edges = [(0, min(end_train, first_val)), (first_val, len(t))]
    return _parts(one, edges, [f"{one.id}_train", f"{one.id}_val"], ["train", "val"])


def _parts(
    one: Trajectory, edges: Sequence[tuple[int, int]], names: Sequence[str], splits: Sequence[str | None]
) -> list[Trajectory]:
    """Parts from first to before last; their frames come from one pass over those of the trajectory."""
    frames = _Frames(one.frames)
    return [
        replace(
            one, id=name, split=split, t=one.t[first:last], position=one.position[first:last], yaw=one.yaw[first:last],
            command=None if one.command is None else one.command[first:last], frames=frames.between(first, last),
        )
        for (first, last), name, split in zip(edges, names, splits, strict=True)
    ]  # fmt: skip


class _Frames:
    """Frames of one pass, handed out in ascending parts; a part that nobody reads is passed over."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._frames, self._next = iter(frames), 0

    def between(self, first: int, last: int) -> Iterator[Frame]:
        while self._next < last:
            frame = next(self._frames, None)
            if frame is None:
                return
            self._next += 1
            if self._next > first:
                yield frame
