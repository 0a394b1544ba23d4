"""Streams of frames and poses on their own clocks -> pieces on one regular grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError
from raev2_tasks.nwm.pose import Array, interpolate, steps

Cut = Literal["keep", "cut-reverse", "cut-stops"]
CUTS: tuple[Cut, ...] = ("keep", "cut-reverse", "cut-stops")
MAX_GAP = 1.5  # periods
SAME_RATE = 1.2  # frames that come at up to so many times the rate are taken as they are
STOP_M = 0.01  # a step forward of less than this is a stop


@dataclass(frozen=True)
class Piece:
    """A gapless piece of a recording: numbers of the frames taken, their times (T,) s, and poses (T, 3) there."""

    frames: NDArray[np.int64]
    t: Array
    poses: Array


def resample(
    where: str,
    frame_times: Sequence[float] | Array,
    pose_times: Sequence[float] | Array,
    poses: Array,
    rate_hz: float,
    grid_start: float | None = None,
) -> list[Piece]:
    """For each time of an exact grid the nearest frame within half a period, with the pose interpolated at its time.

    Frames that come at about this rate (within a fifth) are all taken as they are, unless `grid_start` is given: the
    first time of the grid, by default that from which on there are both.

    A piece ends where a frame is missing, or where poses lie more than 1.5 periods apart. DataError when frames and
    poses do not overlap in time, when the times of poses do not increase, or when frames come too slowly.
    """
    frame_t, pose_t = np.asarray(frame_times, np.float64), np.asarray(pose_times, np.float64)
    if not len(frame_t) or not len(pose_t):
        raise DataError(where, "no frames or no poses", got=f"{len(frame_t)} frames and {len(pose_t)} poses")
    for times, of in ((pose_t, "poses"), (frame_t, "frames")):
        back = np.flatnonzero(~(np.diff(times) > 0))
        if len(back):
            got = f"{times[back[0] + 1]:.9g} s after {times[back[0]]:.9g} s"
            raise DataError(where, f"the times of the {of} do not increase", got=got)
    period = 1 / rate_hz
    start, end = max(frame_t[0], pose_t[0]), min(frame_t[-1], pose_t[-1])
    if end <= start:
        raise DataError(
            where, "frames and poses do not overlap in time", got=f"frames {frame_t[0]:g} to {frame_t[-1]:g} s, "
            f"poses {pose_t[0]:g} to {pose_t[-1]:g} s", hint="Set time_offset_s where the recipe has it.",
        )  # fmt: skip
    native = float(np.median(np.diff(frame_t)))
    if native > MAX_GAP * period:
        raise DataError(
            where, "frames come too slowly", got=f"{1 / native:.3g} a second", expected=f"rate_hz, {rate_hz:g}",
            hint=f"Set rate_hz={1 / native:.3g}.",
        )  # fmt: skip
    if native >= period / SAME_RATE and grid_start is None:
        chosen = np.arange(len(frame_t))
        follows = np.diff(frame_t, prepend=-np.inf) <= MAX_GAP * period
        good = np.ones(len(frame_t), bool)
    else:
        start = start if grid_start is None else grid_start
        grid = np.asarray(start + period * np.arange(int((end - start) / period + 1e-6) + 1), np.float64)
        chosen = _nearest(frame_t, grid)
        good = np.abs(frame_t[chosen] - grid) <= period / 2 + 1e-9
        good[1:] &= ~good[:-1] | (chosen[1:] != chosen[:-1])  # no frame twice
        follows = np.ones(len(grid), bool)
    times = frame_t[chosen]
    after = np.clip(np.searchsorted(pose_t, times), 1, max(1, len(pose_t) - 1))
    gap = pose_t[np.minimum(after, len(pose_t) - 1)] - pose_t[after - 1]
    good &= (times >= pose_t[0]) & (times <= pose_t[-1]) & (gap <= max(MAX_GAP * period, 1e-9))
    return [Piece(chosen[part], times[part], interpolate(times[part], pose_t, poses)) for part in _runs(good, follows)]


def _nearest(frame_t: Array, grid: Array) -> NDArray[np.int64]:
    """Number of the frame nearest to each time of the grid, the earlier of two equally near ones."""
    right = np.clip(np.searchsorted(frame_t, grid), min(1, len(frame_t) - 1), len(frame_t) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(grid - frame_t[left] <= frame_t[right] - grid, left, right)


def cut(piece: Piece, rule: Cut) -> list[Piece]:
    """Leave out steps that go backwards (`cut-reverse`), and also stops and turns on the spot (`cut-stops`).

    Published training sets made from bags use `cut-stops`, so that their models never see a robot stand or reverse.
    """
    if rule == "keep" or len(piece.t) < 2:
        return [piece]
    forward = steps(piece.poses)[:, 0]
    good = forward > (STOP_M if rule == "cut-stops" else -STOP_M)
    found = []
    for run in _runs(good):
        part = slice(run.start, run.stop + 1)  # steps -> the frames at both of their ends
        found.append(Piece(piece.frames[part], piece.t[part], piece.poses[part]))
    return found


def split_long(piece: Piece, max_frames: int) -> list[Piece]:
    """Pieces of at most `max_frames` frames."""
    parts = [slice(first, first + max_frames) for first in range(0, len(piece.t), max_frames)]
    return [Piece(piece.frames[part], piece.t[part], piece.poses[part]) for part in parts]


def _runs(good: NDArray[np.bool_], follows: NDArray[np.bool_] | None = None) -> list[slice]:
    """Slices of consecutive True; `follows` is False where a place does not go on from the one before."""
    index = np.flatnonzero(good)
    breaks = np.diff(index) > 1
    if follows is not None:
        breaks |= ~follows[index[1:]]
    parts = np.split(index, np.flatnonzero(breaks) + 1)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]
