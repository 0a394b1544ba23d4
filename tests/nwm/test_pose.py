"""Planar poses and motions: signs, closed forms, group laws."""

from __future__ import annotations

import numpy as np
import pytest

from raev2_tasks.nwm.pose import (
    IDENTITY,
    accumulate,
    compose,
    interpolate,
    inverse,
    relative,
    rotate,
    steps,
    wrap,
    yaw_of_quaternion,
)

QUARTER = np.pi / 2


@pytest.fixture
def path() -> np.ndarray:
    """40 random poses with large turns."""
    rng = np.random.default_rng(0)
    return np.cumsum(rng.normal(size=(40, 3)) * [1, 1, 1.5], axis=0)


def test_angles_are_wrapped_to_the_half_open_circle():
    assert wrap(np.pi) == -np.pi and wrap(-np.pi) == -np.pi
    np.testing.assert_allclose(wrap([0.0, 3.5, -3.5, 7.0]), [0, 3.5 - 2 * np.pi, 2 * np.pi - 3.5, 7 - 2 * np.pi])


def test_x_is_ahead_y_is_left_and_left_turns_are_positive():
    north = np.array([2.0, 3.0, QUARTER])  # looks along +y of the world
    np.testing.assert_allclose(relative(north, [2, 5, QUARTER]), [2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(relative(north, [1, 3, QUARTER]), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(relative(north, [2, 3, np.pi]), [0, 0, QUARTER], atol=1e-12)
    bend = accumulate([[1, 0, 0.1]] * 5)  # a path that bends left ends on the left
    assert bend[-1][1] > 0 and bend[-1][2] == pytest.approx(0.5)


def test_a_square_walk_returns_home():
    walk = accumulate([[2, 0, QUARTER]] * 4, start=[5, -1, 0.3])
    np.testing.assert_allclose(walk[-1], [5, -1, 0.3], atol=1e-12)
    np.testing.assert_allclose(walk[1][:2], [5, -1] + rotate([2, 2], 0.3), atol=1e-12)


def test_sums_of_steps_are_not_compositions():
    """The mistake of adding up motions that stand in different frames."""
    motions = np.array([[1, 0, QUARTER], [1, 0, 0]])
    assert np.abs(accumulate(motions)[-1][:2] - motions.sum(0)[:2]).max() > 0.9


def test_group_laws(path):
    a, b, c = relative(path[:10], path[10:20]), relative(path[10:20], path[20:30]), relative(path[20:30], path[30:])
    np.testing.assert_allclose(compose(a, b), relative(path[:10], path[20:30]), atol=1e-9)
    np.testing.assert_allclose(compose(compose(a, b), c), compose(a, compose(b, c)), atol=1e-9)
    np.testing.assert_allclose(compose(a, inverse(a)), np.zeros((10, 3)), atol=1e-9)
    np.testing.assert_allclose(compose(inverse(a), a), np.zeros((10, 3)), atol=1e-9)
    np.testing.assert_allclose(compose(IDENTITY, a), a, atol=1e-9)
    np.testing.assert_allclose(inverse(a), relative(path[10:20], path[:10]), atol=1e-9)


def test_motions_do_not_depend_on_the_world_frame(path):
    moved = compose(np.array([3.0, -7.0, 2.0]), path)
    np.testing.assert_allclose(steps(moved), steps(path), atol=1e-9)


def test_steps_of_a_path_lead_along_it(path):
    there = accumulate(steps(path), path[0])
    np.testing.assert_allclose(there[:, :2], path[1:, :2], atol=1e-9)
    np.testing.assert_allclose(wrap(there[:, 2] - path[1:, 2]), 0, atol=1e-9)


def test_one_long_step_is_four_short_ones(path):
    for start in range(0, 36, 4):
        short = accumulate(steps(path[start : start + 5]))[-1]
        np.testing.assert_allclose(short, steps(path[start : start + 5 : 4])[0], atol=1e-9)


def test_yaw_is_interpolated_over_the_shorter_arc():
    poses = np.array([[0, 0, 3.0], [1, 2, -3.0]])
    middle = interpolate([0.5], [0.0, 1.0], poses)[0]
    np.testing.assert_allclose([middle[0], middle[1], abs(wrap(middle[2]))], [0.5, 1.0, np.pi], atol=1e-12)


def test_yaw_of_a_quaternion():
    angle = np.array([0.3, -2.0, 3.0])
    np.testing.assert_allclose(yaw_of_quaternion(0, 0, np.sin(angle / 2), np.cos(angle / 2)), angle)
