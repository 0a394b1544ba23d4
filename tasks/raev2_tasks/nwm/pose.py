"""Planar poses and motions: x forward, y left, yaw counter-clockwise; metres and radians; NumPy, float64.

A pose (x, y, yaw) stands in a fixed world frame. A motion (dx, dy, dyaw) is the pose of a later (or earlier) frame seen
from the first one, so turning left is dyaw > 0 and a path that bends left has dy > 0. All functions broadcast over
leading axes; the last axis has size 3. Motions form a group: `compose`, `inverse`, and the identity (0, 0, 0).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
IDENTITY = np.zeros(3)


def wrap(angle: ArrayLike) -> Array:
    """The same angle in [-pi, pi), radians: a - 2 pi floor((a + pi) / (2 pi))."""
    angle = np.asarray(angle, dtype=np.float64)
    return angle - 2 * np.pi * np.floor((angle + np.pi) / (2 * np.pi))


def rotate(vector: ArrayLike, angle: ArrayLike) -> Array:
    """R(angle) v, R = [[cos, -sin], [sin, cos]]; vector (..., 2), angle (...) in radians."""
    vector = np.asarray(vector, dtype=np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = vector[..., 0], vector[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def relative(start: ArrayLike, end: ArrayLike) -> Array:
    """Motion that leads from pose `start` to pose `end`: (R(yaw_start)^T (p_end - p_start), wrap(yaw_end - yaw_start)).

    start, end   poses (..., 3); `end` may be earlier in time
    """
    start, end = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
    shift = rotate(end[..., :2] - start[..., :2], -start[..., 2])
    return np.concatenate([shift, wrap(end[..., 2] - start[..., 2])[..., None]], axis=-1)


def compose(first: ArrayLike, second: ArrayLike) -> Array:
    """`second` carried out after `first`: (d1 + R(yaw1) d2, wrap(yaw1 + yaw2)).

    With a pose as `first` the result is the pose that the motion `second` leads to.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    position = first[..., :2] + rotate(second[..., :2], first[..., 2])
    return np.concatenate([position, wrap(first[..., 2] + second[..., 2])[..., None]], axis=-1)


def inverse(motion: ArrayLike) -> Array:
    """The motion back: (-R(yaw)^T d, wrap(-yaw)); compose(a, inverse(a)) is the identity."""
    motion = np.asarray(motion, dtype=np.float64)
    return np.concatenate([-rotate(motion[..., :2], -motion[..., 2]), wrap(-motion[..., 2])[..., None]], axis=-1)


def accumulate(motions: ArrayLike, start: ArrayLike = IDENTITY) -> Array:
    """Poses after each of `motions` (S, 3), each given in the frame where it begins; (S, 3), `start` not included."""
    poses, pose = [], np.asarray(start, dtype=np.float64)
    for motion in np.asarray(motions, dtype=np.float64):
        pose = compose(pose, motion)
        poses.append(pose)
    return np.stack(poses) if poses else np.zeros((0, 3))


def steps(poses: ArrayLike) -> Array:
    """Motions between consecutive poses (S + 1, 3), each in the frame where it begins; (S, 3).

    `accumulate(steps(poses), poses[0])` gives `poses[1:]` back, with yaw in [-pi, pi).
    """
    poses = np.asarray(poses, dtype=np.float64)
    return relative(poses[:-1], poses[1:])


def interpolate(times: ArrayLike, t: ArrayLike, poses: ArrayLike) -> Array:
    """Poses at `times` (S,) seconds between samples (`t` (T,) increasing, `poses` (T, 3)); yaw along the shorter arc.

    Times outside the samples get the nearest one.
    """
    poses = np.asarray(poses, dtype=np.float64)
    columns = (poses[:, 0], poses[:, 1], np.unwrap(poses[:, 2]))
    return np.stack([np.interp(np.asarray(times), np.asarray(t), column) for column in columns], axis=-1)


def yaw_of_quaternion(x: ArrayLike, y: ArrayLike, z: ArrayLike, w: ArrayLike) -> Array:
    """Heading of a unit quaternion about the vertical axis: atan2(2 (w z + x y), 1 - 2 (y^2 + z^2)), radians."""
    x, y, z, w = (np.asarray(value, dtype=np.float64) for value in (x, y, z, w))
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))


# Motions and the constant velocities that make them: the exponential map of the plane. A velocity (forward, sideways,
# turn) that is held for one unit of time gives a motion (dx, dy, dyaw): an arc.


def exp(velocities: Array) -> Array:
    """Motions (..., 3) of velocities (..., 3) held for one unit of time."""
    a, b = _arc(velocities[..., 2])
    x, y = velocities[..., 0], velocities[..., 1]
    return np.stack([a * x - b * y, b * x + a * y, velocities[..., 2]], axis=-1)


def log(motions: Array) -> Array:
    """Velocities (..., 3) that give these motions in one unit of time; inverse of `exp` for |turn| < 2 pi."""
    a, b = _arc(motions[..., 2])
    x, y = motions[..., 0], motions[..., 1]
    square = a**2 + b**2
    return np.stack([(a * x + b * y) / square, (a * y - b * x) / square, motions[..., 2]], axis=-1)


def velocities(t: Array, poses: Array, every: int = 1) -> Array:
    """Constant velocities (T - every, 3) that lead from each pose to the one `every` frames later; m/s and rad/s.

    t       (T,) increasing seconds
    poses   (T, 3) in metres and radians
    """
    return log(relative(poses[:-every], poses[every:])) / (t[every:] - t[:-every])[:, None]


def _arc(turn: Array) -> tuple[Array, Array]:
    """sin(turn) / turn and (1 - cos(turn)) / turn."""
    return np.sinc(turn / np.pi), np.sinc(turn / (2 * np.pi)) * np.sin(turn / 2)
