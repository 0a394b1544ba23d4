"""Motions and the constant velocities that make them: the exponential map of the plane. NumPy, float64.

A velocity (forward, sideways, turn) that is held for one unit of time gives a motion (dx, dy, dyaw): an arc.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raev2_tasks.nwm.pose import relative

Array = NDArray[np.float64]


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
