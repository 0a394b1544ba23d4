"""How far a planned path is from the true one. Read `path_errors` first.

Paths are poses (T, 3) or (B, T, 3) in one frame: x and y in metres, yaw in radians. The shared start pose is left out.
Nothing is aligned and no scale is fitted. ATE and RPE agree with the package `evo` (pose relations
translation_part, RPE over one frame). Published code gives `evo` one constant orientation for all poses, so published
RPE are `rpe_world`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raev2.batch import MetricResult
from raev2.errors import DataError
from raev2_tasks.nwm.pose import relative, wrap

Array = NDArray[np.float64]
ABOUT = {
    "ate": "Absolute trajectory error, the root mean square distance of planned and driven positions",
    "rpe": "Relative pose error, the root mean square difference of planned and driven steps, each seen from its start",
    "rpe_world": "Relative pose error as published code has it: steps compared in the frame of the start of the path",
    "final_position": "Distance of the last planned and the last driven position",
    "final_yaw": "Angle between the last planned and the last driven heading",
}
UNITS = {"m": "metres", "wp": "waypoint units", "deg": "degrees", "rel": "lengths of the driven path"}


def ate(path: ArrayLike, true: ArrayLike) -> Array:
    """Absolute trajectory error: root mean square over the T poses of the distance in position, metres, shape (...)."""
    path, true = _pair(path, true)
    squares = ((path[..., :2] - true[..., :2]) ** 2).sum(-1)
    return np.sqrt(squares.mean(-1))


def rpe(path: ArrayLike, true: ArrayLike) -> Array:
    """Relative pose error: root mean square over the T - 1 steps of the difference in translation, metres, shape (...).

    The translation of a step is seen from the pose where it begins. NaN for a path of one pose.
    """
    path, true = _pair(path, true)
    if path.shape[-2] < 2:
        return np.full(path.shape[:-2], np.nan)
    of_path, of_true = (relative(poses[..., :-1, :], poses[..., 1:, :]) for poses in (path, true))
    return np.sqrt(((of_path[..., :2] - of_true[..., :2]) ** 2).sum(-1).mean(-1))


def rpe_world(path: ArrayLike, true: ArrayLike) -> Array:
    """`rpe` with the steps of both paths in one frame, so that a wrong heading counts in every step, metres, (...)."""
    path, true = _pair(path, true)
    if path.shape[-2] < 2:
        return np.full(path.shape[:-2], np.nan)
    return np.sqrt((np.diff(path[..., :2] - true[..., :2], axis=-2) ** 2).sum(-1).mean(-1))


def path_length(true: ArrayLike) -> Array:
    """Length of a path from its start, the origin, metres, shape (...)."""
    points = np.asarray(true, dtype=np.float64)[..., :2]
    steps = np.diff(np.concatenate([np.zeros_like(points[..., :1, :]), points], axis=-2), axis=-2)
    return np.hypot(steps[..., 0], steps[..., 1]).sum(-1)


def final_position_error(path: ArrayLike, true: ArrayLike) -> Array:
    """Distance between the last positions, metres, shape (...)."""
    path, true = _pair(path, true)
    return np.hypot(*np.moveaxis(path[..., -1, :2] - true[..., -1, :2], -1, 0))


def final_yaw_error(path: ArrayLike, true: ArrayLike) -> Array:
    """Angle between the last headings in [0, pi], radians, shape (...)."""
    path, true = _pair(path, true)
    return np.abs(wrap(path[..., -1, 2] - true[..., -1, 2]))


def path_errors(path: ArrayLike, true: ArrayLike, spacing_m: float) -> dict[str, Array]:
    """All errors of paths by name. The suffix is the unit: `_m` metres, `_deg` degrees, `_wp` waypoint units.

    `_rel` is a share of the length of the driven path, or of one waypoint unit where the robot hardly moved.

    spacing_m   mean distance between consecutive frames of the data; one waypoint unit. Published ATE and RPE are in
                waypoint units
    """
    metres = {
        "ate": ate(path, true), "rpe": rpe(path, true), "rpe_world": rpe_world(path, true),
        "final_position": final_position_error(path, true),
    }  # fmt: skip
    return {
        **{f"{name}_m": value for name, value in metres.items()},
        **{f"{name}_wp": value / spacing_m for name, value in metres.items()},
        "final_position_rel": metres["final_position"] / np.maximum(path_length(true), spacing_m),
        "final_yaw_deg": np.degrees(final_yaw_error(path, true)),
    }


def summarise(errors: Sequence[Mapping[str, float]], success: float) -> list[MetricResult]:
    """Means with standard errors over goals, each goal the numbers of `path_errors`; and the share that arrived.

    success   a goal counts as reached when the final position error is at most this share of the driven path
    """
    if not errors:
        raise DataError("planning", "no goals to average over")
    results = []
    for name in errors[0]:
        values = np.array([error[name] for error in errors])
        values = values[np.isfinite(values)]
        if len(values):
            quantity, unit = name.rsplit("_", 1)
            about = f"{ABOUT[quantity]}, in {UNITS[unit]}; mean over goals."
            results.append(MetricResult(name, *_mean(values), better="lower", role="detail", about=about))
    reached = np.array([error["final_position_rel"] <= success for error in errors], dtype=np.float64)
    about = f"Share of goals that the plan ends within {success:g} x the length of the driven path of."
    return [*results, MetricResult("success_rel", *_mean(reached), better="higher", role="headline", about=about)]


def _mean(values: Array) -> tuple[float, int, float | None]:
    stderr = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), len(values), stderr


def _pair(path: ArrayLike, true: ArrayLike) -> tuple[Array, Array]:
    path, true = np.asarray(path, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if path.shape[-2:] != true.shape[-2:] or path.ndim < 2 or path.shape[-1] != 3 or not path.shape[-2]:
        raise DataError("path", "does not match the true path", got=f"{path.shape} and {true.shape}", expected="(T, 3)")
    return path, true
