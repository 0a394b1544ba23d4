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
STOP_M = 0.01  # a step forward of less than this is a stop


@dataclass(frozen=True)
class Piece:
    """A gapless piece of a recording: numbers of the frames taken, their times (T,) s, and poses (T, 3) there."""

    frames: NDArray[np.int64]
    t: Array
    poses: Array


def resample(
    where: str, frame_times: Sequence[float] | Array, pose_times: Sequence[float] | Array, poses: Array, rate_hz: float
) -> list[Piece]:
    """For each time of an exact grid the nearest frame within half a period, with the pose interpolated at its time.

    A piece ends where a grid time has no frame, or where poses lie more than 1.5 periods apart. DataError when frames
    and poses do not overlap in time, or when the times of poses do not increase.
    """
    frame_t, pose_t = np.asarray(frame_times, np.float64), np.asarray(pose_times, np.float64)
    if not len(frame_t) or not len(pose_t):
        raise DataError(where, "no frames or no poses", got=f"{len(frame_t)} frames and {len(pose_t)} poses")
    if (np.diff(pose_t) <= 0).any():
        raise DataError(where, "the times of the poses do not increase")
    period = 1 / rate_hz
    start, end = max(frame_t[0], pose_t[0]), min(frame_t[-1], pose_t[-1])
    if end <= start:
        raise DataError(
            where, "frames and poses do not overlap in time", got=f"frames {frame_t[0]:g} to {frame_t[-1]:g} s, "
            f"poses {pose_t[0]:g} to {pose_t[-1]:g} s", hint="Set time_offset_s where the recipe has it.",
        )  # fmt: skip
    grid = start + period * np.arange(int((end - start) / period + 1e-6) + 1)
    right = (
        np.clip(np.searchsorted(frame_t, grid), 1, len(frame_t) - 1) if len(frame_t) > 1 else np.zeros(len(grid), int)
    )
    left = np.maximum(right - 1, 0)
    nearest = np.where(grid - frame_t[left] <= frame_t[right] - grid, left, right)
    times = frame_t[nearest]
    after = np.clip(np.searchsorted(pose_t, times), 1, max(1, len(pose_t) - 1))
    gap = pose_t[np.minimum(after, len(pose_t) - 1)] - pose_t[after - 1]
    good = (np.abs(times - grid) <= period / 2 + 1e-9) & (times >= pose_t[0]) & (times <= pose_t[-1])
    good &= gap <= max(MAX_GAP * period, 1e-9)
    good[1:] &= ~good[:-1] | (nearest[1:] != nearest[:-1])  # no frame twice
    return [Piece(nearest[part], times[part], interpolate(times[part], pose_t, poses)) for part in _runs(good)]


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


def _runs(good: NDArray[np.bool_]) -> list[slice]:
    """Slices of consecutive True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]])))
    return [slice(int(first), int(last)) for first, last in zip(edges[::2], edges[1::2], strict=True)]
