"""Files of poses: CSV, TUM and KITTI -> times or frame numbers, and planar poses."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError, SpecError
from raev2_tasks.nwm.pose import Array

AXES = {
    sign + name: factor * np.eye(3)[number]
    for number, name in enumerate("xyz")
    for sign, factor in (("", 1.0), ("-", -1.0))
}


@dataclass(frozen=True)
class PoseFile:
    """Poses (T, 3) x, y, yaw with either times (T,) in seconds or frame numbers (T,)."""

    poses: Array
    t: Array | None
    frame: NDArray[np.int64] | None


def read_poses(path: Path, up: str = "z", optical: str = "x") -> PoseFile:
    """Read a file of poses; what it is, is decided by its first line.

    CSV      a header with x, y, yaw (radians) or yaw_deg, and t (seconds) or frame; other columns are ignored. Planar
    TUM      `timestamp tx ty tz qx qy qz qw` a line
    KITTI    twelve numbers a line, the first three rows of a pose matrix; line i belongs to frame i

    up       axis of the world that points up, for TUM and KITTI: x, y, z, -x, -y or -z
    optical  axis of the moving frame that looks ahead: x for robots, z for cameras
    """
    where = f"poses {path}"
    if not path.is_file():
        raise DataError(where, "pose file is missing")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
    if not lines:
        raise DataError(where, "empty")
    if any(letter.isalpha() and letter not in "eE" for letter in lines[0]):
        return _read_csv(where, lines)
    try:
        rows = np.array([[float(value) for value in line.replace(",", " ").split()] for line in lines])
    except ValueError as error:
        raise DataError(where, "cannot be read", got=error, expected="equal numbers of values in every line") from error
    if rows.shape[1] == 8:
        return PoseFile(_plane(rows[:, 1:4], _matrices(where, rows[:, 4:]), up, optical), rows[:, 0], None)
    if rows.shape[1] == 12:
        matrices = rows.reshape(-1, 3, 4)
        poses = _plane(matrices[:, :, 3], matrices[:, :, :3], up, optical)
        return PoseFile(poses, None, np.arange(len(rows)))
    raise DataError(
        where, "unknown form", got=f"{rows.shape[1]} values a line", expected="a CSV header, 8 (TUM) or 12 (KITTI)"
    )


def _read_csv(where: str, lines: list[str]) -> PoseFile:
    names, *rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    yaw_name = "yaw" if "yaw" in names else "yaw_deg"
    time_name = "t" if "t" in names else "frame"
    wanted = ("x", "y", yaw_name, time_name)
    if not set(wanted) <= set(names):
        raise DataError(where, "a column is missing", got=", ".join(names), expected="x, y, yaw or yaw_deg, t or frame")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(
                where, f"pose {number} has another number of values than the header", got=len(row),
                expected=str(len(names)),
            )  # fmt: skip
    try:
        x, y, yaw, time = ([float(row[names.index(name)]) for row in rows] for name in wanted)
    except ValueError as error:
        raise DataError(where, "a value is not a number", got=error) from error
    poses = np.column_stack([x, y, yaw if yaw_name == "yaw" else np.deg2rad(yaw)])
    if time_name == "t":
        return PoseFile(poses, np.array(time), None)
    return PoseFile(poses, None, np.array(time).astype(np.int64))


def _matrices(where: str, quaternions: Array) -> Array:
    """Rotation matrices (T, 3, 3) of quaternions (T, 4) in the order x, y, z, w."""
    length = np.linalg.norm(quaternions, axis=1, keepdims=True)
    if (length < 1e-6).any():
        raise DataError(where, "a quaternion is zero")
    x, y, z, w = (quaternions / length).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _plane(position: Array, rotation: Array, up: str, optical: str) -> Array:
    """Project poses in space to the ground: heading is the projection of the optical axis, seen from above."""
    for name, axis in (("up", up), ("optical", optical)):
        if axis not in AXES:
            raise SpecError(name, "not an axis", got=axis, expected=f"one of {', '.join(AXES)}")
    vertical = AXES[up]
    first = np.eye(3)[(int(np.abs(vertical).argmax()) + 1) % 3]
    second = np.cross(vertical, first)  # right-handed seen from above
    ahead = rotation @ AXES[optical]
    return np.column_stack([position @ first, position @ second, np.arctan2(ahead @ second, ahead @ first)])
