"""Path errors against numbers by hand and against `evo`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raev2.errors import DataError
from raev2_tasks.nwm.plan.path_metrics import (
    ate,
    final_position_error,
    final_yaw_error,
    path_errors,
    path_length,
    rpe,
    rpe_world,
    summarise,
)

STRAIGHT = np.array([[1.0, 0, 0], [2, 0, 0], [3, 0, 0]])
RIGHT_ANGLE = np.array([[1.0, 0, math.pi / 2], [1, 1, math.pi / 2], [1, 2, math.pi / 2]])


def random_paths(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 3)) * [2, 2, 3]


def test_errors_by_hand():
    shifted = STRAIGHT + [0, 0.3, 0]
    assert ate(shifted, STRAIGHT) == pytest.approx(0.3)
    assert rpe(shifted, STRAIGHT) == pytest.approx(0)
    one_off = STRAIGHT + [[0, 0, 0], [0, 0, 0], [3, 4, 0]]
    assert ate(one_off, STRAIGHT) == pytest.approx(math.sqrt(25 / 3))
    assert rpe(one_off, STRAIGHT) == pytest.approx(math.sqrt(25 / 2))
    assert final_position_error(one_off, STRAIGHT) == pytest.approx(5)


def test_relative_error_looks_from_the_robot():
    """Both robots drive one metre straight ahead a step, so only the absolute error sees the turn at the start."""
    assert rpe(RIGHT_ANGLE, STRAIGHT) == pytest.approx(0)
    assert ate(RIGHT_ANGLE, STRAIGHT) == pytest.approx(math.sqrt((0 + 2 + 8) / 3))


def test_the_published_relative_error_sees_a_wrong_heading_in_every_step():
    """A metre to the left against one ahead a step: sqrt(2) apart in the frame of the start, 0 in that of the robot."""
    assert rpe_world(RIGHT_ANGLE, STRAIGHT) == pytest.approx(math.sqrt(2))
    turned = 2 * math.pi * np.arange(1, 9) / 8
    circle = np.stack([np.sin(turned), 1 - np.cos(turned), turned], 1)  # chords of 2 sin(pi / 8), all directions
    ahead = np.stack([2 * math.sin(math.pi / 8) * np.arange(1, 9), 0 * turned, 0 * turned], 1)
    assert rpe_world(circle, ahead) == pytest.approx(2 * math.sin(math.pi / 8) * math.sqrt(2 - 2 * _mean_cosine()))
    assert rpe_world(circle + [3, -4, 1], circle) == pytest.approx(0)


def _mean_cosine() -> float:
    """Of the directions of the seven steps between eight points of a circle: 22.5 + 45 k degrees, k = 1 to 7."""
    return math.fsum(math.cos(math.radians(22.5 + 45 * k)) for k in range(1, 8)) / 7


def test_yaw_error_takes_the_shorter_way():
    end, other = np.array([[0, 0, math.radians(175)]]), np.array([[0, 0, math.radians(-175)]])
    assert final_yaw_error(end, other) == pytest.approx(math.radians(10))


def test_a_path_of_one_pose_has_no_relative_error():
    assert np.isnan(rpe(STRAIGHT[:1], STRAIGHT[:1]))
    names = {result.name for result in summarise([path_errors(STRAIGHT[:1], STRAIGHT[:1], 0.25)], 1)}
    assert not {"rpe_m", "rpe_world_m"} & names and "ate_m" in names


def test_a_batch_equals_its_rows():
    paths, true = random_paths(0, 5, 8), random_paths(1, 5, 8)
    for metric in (ate, rpe, rpe_world, final_position_error, final_yaw_error):
        assert metric(paths, true) == pytest.approx([float(metric(*pair)) for pair in zip(paths, true, strict=True)])


def test_waypoint_units_are_metres_over_the_spacing():
    errors = path_errors(STRAIGHT + [0, 0.5, 0], STRAIGHT, spacing_m=0.25)
    assert errors["ate_m"] == pytest.approx(0.5)
    assert errors["ate_wp"] == pytest.approx(2)
    assert errors["final_yaw_deg"] == 0


def test_the_threshold_of_success_grows_with_the_path():
    """0.6 m off is a success after 3 m and none after 1 m; a robot that hardly moved counts as one waypoint unit."""
    assert path_length(RIGHT_ANGLE) == pytest.approx(3)
    for true, share in ((STRAIGHT, 0.2), (STRAIGHT / 3, 0.6), (STRAIGHT / 1000, 0.6 / 0.25)):
        error = path_errors(true + [0, 0.6, 0], true, 0.25)
        assert error["final_position_rel"] == pytest.approx(share)
        assert summarise([error], success=0.25)[-1].value == (share < 0.25)


def test_summary_counts_goals_within_the_threshold():
    errors = [path_errors(STRAIGHT + [0, offset, 0], STRAIGHT, 0.25) for offset in (0.0, 0.4, 1.1, 2.5)]
    results = {result.name: result for result in summarise(errors, success=0.25)}
    success = results["success_rel"]
    assert success.value == 0.5 and success.better == "higher"
    assert "within 0.25 x the length of the driven path" in success.about
    assert "in lengths of the driven path" in results["final_position_rel"].about
    assert "in metres" in results["ate_m"].about and "in waypoint units" in results["ate_wp"].about
    assert results["ate_m"].value == pytest.approx(1.0)
    assert results["ate_m"].stderr == pytest.approx(np.std([0.0, 0.4, 1.1, 2.5], ddof=1) / 2)
    assert results["ate_m"].num_samples == 4


def test_paths_that_do_not_match_are_an_error():
    with pytest.raises(DataError, match=r"path: does not match the true path; got \(3, 3\) and \(2, 3\)"):
        ate(STRAIGHT, STRAIGHT[:2])
    with pytest.raises(DataError, match="planning: no goals"):
        summarise([], 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")  # of the package that is compared with
def test_ate_and_rpe_equal_those_of_evo(seed):
    pytest.importorskip("evo", reason="evo is not installed")
    from evo.core.metrics import APE, RPE, PoseRelation, StatisticsType, Unit
    from evo.core.trajectory import PosePath3D

    path, true = random_paths(seed, 8), random_paths(seed + 10, 8)

    def as_evo(poses, turned=True):
        zero = np.zeros(len(poses))
        half = poses[:, 2] / 2 * turned
        return PosePath3D(
            positions_xyz=np.column_stack([poses[:, :2], zero]),
            orientations_quat_wxyz=np.column_stack([np.cos(half), zero, zero, np.sin(half)]),
        )

    absolute = APE(PoseRelation.translation_part)
    relative = RPE(PoseRelation.translation_part, delta=1, delta_unit=Unit.frames)
    for metric in (absolute, relative):
        metric.process_data((as_evo(true), as_evo(path)))
    assert ate(path, true) == pytest.approx(absolute.get_statistic(StatisticsType.rmse), rel=1e-9)
    assert rpe(path, true) == pytest.approx(relative.get_statistic(StatisticsType.rmse), rel=1e-9)
    relative.process_data((as_evo(true, turned=False), as_evo(path, turned=False)))
    assert rpe_world(path, true) == pytest.approx(relative.get_statistic(StatisticsType.rmse), rel=1e-9)
