"""What is wrong, or odd, with trajectories: errors that leave one out, and warnings with counts.

`check_trajectory` is run on every trajectory of a data recipe. `warnings` looks at a whole dataset; the command is
`raev2 nwm validate DIR`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from raev2.errors import DataError
from raev2_tasks.nwm.pose import Array, wrap

TELEPORT = 5.0  # times the median displacement of a frame
STATIONARY = 0.05  # times the spacing
HEADING_MIN = 0.5  # times the spacing: frames that move less say nothing about the heading
JITTER = 0.2  # relative deviation of a frame period
BLACK = 8.0  # mean 8-bit level below which a frame is called black
FROZEN, BLACK_SHARE = 0.01, 0.001  # shares of the frames that are worth a line


class Motion(Protocol):
    """The part of a stored trajectory that the checks read."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def recording(self) -> str:
        """What it was cut from."""

    @property
    def t(self) -> Array:
        """(T,) seconds."""

    @property
    def poses(self) -> Array:
        """(T, 3)."""


def check_trajectory(where: str, t: Array, position: Array, yaw: Array, min_frames: int) -> None:
    """Raise DataError for poses that cannot be used: shapes, counts, non-finite values, time that does not increase."""
    if position.ndim != 2 or position.shape[1] != 2:
        raise DataError(where, "wrong shape of position", got=position.shape, expected="(T, 2)")
    if yaw.ndim != 1 or t.ndim != 1:
        raise DataError(where, "wrong shape of yaw or t", got=f"{yaw.shape} and {t.shape}", expected="(T,)")
    counts = {"t": len(t), "position": len(position), "yaw": len(yaw)}
    if len(set(counts.values())) > 1:
        raise DataError(where, "different numbers of poses", got=_pairs(counts), expected="equal counts")
    for name, values in (("t", t), ("position", position), ("yaw", yaw)):
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(bad):
            raise DataError(where, f"{name} is not finite in {len(bad)} of {len(t)} frames", got=f"frame {bad[0]}")
    bad = np.flatnonzero(np.diff(t) <= 0)
    if len(bad):
        raise DataError(
            where, "time does not increase", got=f"{t[bad[0]]:g} s, then {t[bad[0] + 1]:g} s at frame {bad[0] + 1}",
            expected="increasing seconds",
        )  # fmt: skip
    if len(t) < min_frames:
        raise DataError(where, "too short", got=f"{len(t)} frames", expected=f"at least {min_frames}")


def check_frames(where: str, num_frames: int, num_poses: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise DataError when frames and poses differ in number or frames differ in size (width, height)."""
    if num_frames != num_poses:
        raise DataError(
            where, "different numbers of frames and poses", got=f"{num_frames} and {num_poses}",
            expected="one pose a frame",
        )  # fmt: skip
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise DataError(
                where, f"frame {index} has another size", got="x".join(map(str, size)),
                expected="x".join(map(str, sizes[0])),
            )  # fmt: skip


def heading_error(trajectories: Iterable[Motion], spacing_m: float) -> tuple[float, int]:
    """Circular median of wrap(direction of motion - yaw) over frames that move, radians, and how many these are.

    Near 0 is right for a camera that looks where it drives; near +-pi/2 the yaw lacks an offset, near pi the camera
    looks backwards. NaN when nothing moves.
    """
    found = []
    for one in trajectories:
        shift = np.diff(one.poses[:, :2], axis=0)
        moving = np.hypot(*shift.T) > HEADING_MIN * spacing_m
        found.append(wrap(np.arctan2(shift[:, 1], shift[:, 0]) - one.poses[:-1, 2])[moving])
    errors = np.concatenate(found) if found else np.zeros(0)
    if not len(errors):
        return float("nan"), 0
    return _circular_median(errors), len(errors)


def warnings(trajectories: Sequence[Motion], splits: Sequence[str], spacing_m: float, rate_hz: float) -> list[str]:
    """One line each for what is unusual in the poses of a dataset, with counts; `splits` as long as `trajectories`."""
    lines = []
    lengths = np.array([len(one.t) for one in trajectories])
    shifts = [np.hypot(*np.diff(one.poses[:, :2], axis=0).T) for one in trajectories]
    every = np.concatenate(shifts) if shifts else np.zeros(0)
    if not len(every):
        return ["no motion at all: no trajectory has two frames"]

    median = float(np.median(every[every > STATIONARY * spacing_m])) if spacing_m > 0 and every.any() else 0.0
    jumps = int((every > TELEPORT * median).sum()) if median else 0
    if jumps:
        lines.append(f"{jumps} of {len(every)} steps are longer than {TELEPORT:g} times the median (teleport?)")
    still = float((every <= STATIONARY * spacing_m).mean()) if spacing_m > 0 else 1.0
    if still > 0.5:
        lines.append(f"{still:.0%} of the steps do not move")
    turns = sum(int((np.abs(np.diff(one.poses[:, 2])) > np.pi).sum()) for one in trajectories)
    if turns:
        lines.append(f"{turns} steps turn by more than half a circle (wrap left in yaw, or a rate too low)")

    periods = np.concatenate([np.diff(one.t) for one in trajectories])
    jitter = float((np.abs(periods * rate_hz - 1) > JITTER).mean())
    if jitter > 0:
        lines.append(f"{jitter:.1%} of the frame periods differ from 1/{rate_hz:g} s by more than {JITTER:.0%}")
    shortest = int(lengths.min())
    if shortest < 20:
        short = int((lengths < 20).sum())
        lines.append(f"{short} of {len(lengths)} trajectories have fewer than 20 frames (shortest {shortest})")

    parents: dict[str, set[str]] = {}
    for one, split in zip(trajectories, splits, strict=True):
        parents.setdefault(one.recording, set()).add(split)
    shared = sum(len(found) > 1 for found in parents.values())
    if shared:
        lines.append(f"{shared} of {len(parents)} recordings have trajectories in both splits (leakage)")

    error, count = heading_error(trajectories, spacing_m)
    if count and abs(error) > np.deg2rad(30):
        hint = "camera looks backwards" if abs(error) > np.deg2rad(150) else "yaw lacks an offset, or runs clockwise"
        lines.append(
            f"motion points {np.rad2deg(error):+.0f} degrees away from the yaw (median of {count} steps): {hint}"
        )
    return lines


def frame_warnings(num_frozen: int, num_black: int, num_frames: int) -> list[str]:
    """Lines about identical consecutive frames of a moving camera, and near-black frames."""
    lines = []
    if num_frozen > FROZEN * num_frames:
        lines.append(f"{num_frozen} of {num_frames} frames equal the one before although the pose changed (frozen)")
    if num_black > BLACK_SHARE * num_frames:
        lines.append(f"{num_black} of {num_frames} frames are nearly black")
    return lines


def _circular_median(angles: Array) -> float:
    """Median about the circular mean, so that values near +-pi do not cancel."""
    centre = float(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()))
    return float(wrap(centre + np.median(wrap(angles - centre))))


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
