from __future__ import annotations

import math

import pytest
import torch

from raev2.errors import DataError
from raev2.eval.distances import (
    FrechetTo,
    Gaussian,
    Moments,
    inception_score,
    kernel_distance,
    moments_distance,
    paired_frechet,
    precision_recall,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form():
    mean1, mean2 = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    std1, std2 = torch.tensor([1.0, 2.0, 0.3]).double(), torch.tensor([2.0, 0.5, 0.3]).double()
    expected = float((mean1 - mean2).square().sum() + (std1 - std2).square().sum())
    found = moments_distance(Gaussian(mean1, std1.square().diag()), Gaussian(mean2, std2.square().diag()))
    assert found == pytest.approx(expected, abs=1e-10)


def test_frechet_distance_of_non_commuting_covariances_is_the_closed_form():
    # 2 x 2: tr sqrt(A B) = sqrt(tr(AB) + 2 sqrt(det(AB)))
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    product = a @ b
    cross = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    zero = torch.zeros(2).double()
    expected = float(a.trace() + b.trace()) - 2 * cross
    assert moments_distance(Gaussian(zero, a), Gaussian(zero, b)) == pytest.approx(expected, abs=1e-10)


def test_frechet_distance_of_rank_deficient_sets_is_finite_and_zero_to_itself():
    few = Moments.of(randn(5, 40))
    assert moments_distance(few, few) == pytest.approx(0, abs=1e-8)
    other = Moments.of(randn(7, 40, seed=1))
    assert math.isfinite(moments_distance(few, other)) and moments_distance(few, other) > 0
    assert moments_distance(few, other) == pytest.approx(moments_distance(other, few), rel=1e-9)


def test_a_shift_of_all_features_adds_its_squared_length():
    features = randn(300, 6)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert moments_distance(Moments.of(features), Moments.of(features + shift)) == pytest.approx(25, abs=1e-5)


def test_moments_are_those_of_the_whole_set_in_any_split():
    features = randn(101, 5) * 3 + 10
    parts = Moments.of(torch.empty(0, 5))
    for chunk in features.split(17):
        parts = parts.merge(Moments.of(chunk))
    merged = Moments.of(features[:40]).merge(Moments.of(features[40:]))
    for moments in (parts, merged, Moments.from_tensors(parts.tensors()), parts.over_processes()):
        assert moments.count == 101
        torch.testing.assert_close(moments.mean, features.double().mean(0))
        torch.testing.assert_close(moments.cov, features.double().T.cov())
    without = merged.merge(Moments.of(features[40:]), sign=-1)
    torch.testing.assert_close(without.cov, features[:40].double().T.cov())


def test_moments_refuse_features_that_are_not_finite_and_a_single_image():
    with pytest.raises(DataError, match="features: not finite"):
        Moments.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(DataError, match="a covariance needs two images; got 1"):
        _ = Moments.of(randn(1, 3)).cov


def test_jackknife_error_matches_the_spread_over_independent_draws():
    reference = Moments.of(randn(4000, 4, seed=99))
    draws = [randn(200, 4, seed=seed) + 0.5 for seed in range(40)]
    spread = torch.tensor([moments_distance(Moments.of(draw), reference) for draw in draws]).std()
    estimates = [FrechetTo(reference).stderr(draw) for draw in draws]
    estimate = torch.tensor([value for value in estimates if value is not None]).mean()
    assert 0.7 < estimate / spread < 1.4
    assert FrechetTo(reference).stderr(draws[0][:20]) is None


def test_precision_and_recall_of_equal_distant_and_collapsed_sets():
    real = randn(200, 3)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    collapsed = real[:1] + 1e-3 * randn(200, 3, seed=1)  # good images without variety
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0 and recall <= 0.02


def test_precision_counts_by_hand_and_does_not_depend_on_the_chunk_size():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii with k=1: 1, 1, 2, 7
    fake = torch.tensor([[0.5], [4.9], [5.2], [-1.5], [18.0]])  # inside: yes, yes, yes (10 - 7), no, no
    precision, _ = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(3 / 5)
    real, fake = randn(90, 4), randn(70, 4, seed=1) * 1.3
    assert precision_recall(real, fake, chunk_size=7) == precision_recall(real, fake)
    with pytest.raises(DataError, match="too few images; got 3; expected > 3"):
        precision_recall(real[:3], fake)


# The fast ways give the numbers of the slow ones.


def by_singular_values(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of two sets without any covariance: the nuclear norm of the product of centred features."""
    (mean_a, a), (mean_b, b) = ((rows.mean(0), (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5) for rows in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def spectrum(num: int, dim: int, seed: int) -> torch.Tensor:
    """Features whose standard deviations span three decades, in no particular axes."""
    rotation = torch.linalg.qr(randn(dim, dim, seed=99).double())[0]
    return randn(num, dim, seed=seed).double() * torch.logspace(0, -3, dim).double() @ rotation


@pytest.mark.parametrize(("num", "num_reference"), [(300, 400), (40, 400), (400, 40), (40, 50), (64, 65)])
def test_the_distance_is_that_of_singular_values_at_every_rank(num, num_reference):
    features, reference = spectrum(num, 64, 0), spectrum(num_reference, 64, 1) + 0.1
    expected = by_singular_values(features, reference)
    own, their = Moments.of(features), Moments.of(reference)
    assert moments_distance(own, their) == pytest.approx(expected, rel=1e-9)
    assert FrechetTo(their, reference)(own) == pytest.approx(expected, rel=1e-9)
    stored = Gaussian(their.mean, their.cov)  # a file that does not say how many images it has
    assert moments_distance(own, stored) == pytest.approx(expected, rel=1e-7)


def test_a_feature_that_is_always_zero_changes_nothing():
    features, reference = spectrum(100, 20, 0), spectrum(90, 20, 1)
    padded = [torch.cat([rows, torch.zeros(len(rows), 1).double()], 1) for rows in (features, reference)]
    expected = moments_distance(Moments.of(features), Moments.of(reference))
    assert moments_distance(*map(Moments.of, padded)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("num", "dim"), [(44, 64), (64, 64), (65, 64), (200, 64), (60, 3)])
def test_the_error_is_the_jackknife_that_leaves_out_each_image_in_turn(num, dim):
    """Against a distance of its own for every image that is left out; alone, and with its partner."""
    features, reference = spectrum(num, dim, 0), spectrum(num, dim, 1) + 0.1
    rest = [torch.arange(num) != image for image in range(num)]
    for found, left_out in (
        (FrechetTo(Moments.of(reference), reference).stderr(features), [reference] * num),
        (FrechetTo(Moments.of(reference)).stderr(features), [reference] * num),
        (paired_frechet(features, reference)[1], [reference[keep] for keep in rest]),
    ):
        values = [by_singular_values(features[keep], other) for keep, other in zip(rest, left_out, strict=True)]
        spread = torch.tensor(values, dtype=torch.float64)
        expected = float(((num - 1) / num * (spread - spread.mean()).square().sum()).sqrt())
        assert found == pytest.approx(expected, rel=1e-6)
    assert paired_frechet(features, reference)[0] == pytest.approx(by_singular_values(features, reference), rel=1e-8)
    assert paired_frechet(features[:39], reference[:39])[1] is None


def test_equal_images_and_constant_features_have_an_error_too():
    features, reference = spectrum(60, 20, 0), spectrum(50, 20, 1)
    padded = [torch.cat([rows, torch.zeros(len(rows), 9).double()], 1) for rows in (features, reference)]
    expected = FrechetTo(Moments.of(reference)).stderr(features)
    assert FrechetTo(Moments.of(padded[1])).stderr(padded[0]) == pytest.approx(expected, rel=1e-6)
    assert FrechetTo(Moments.of(reference)).stderr(features[:1].repeat(50, 1)) == pytest.approx(0, abs=1e-12)
    assert paired_frechet(features, features)[1] == pytest.approx(0, abs=1e-6)


# Inception Score and kernel distance against closed forms; torch-fidelity is the oracle of test_fidelity.py.


def test_the_inception_score_is_the_number_of_classes_that_are_told_apart():
    one_hot = 50 * torch.eye(4).repeat(100, 1)  # sure of its class, all classes equally often
    assert inception_score(one_hot)[0] == pytest.approx(4, rel=0.05)  # 40 images a split, not all of 10 a class
    assert inception_score(one_hot, num_splits=1) == pytest.approx((4, 0))
    assert inception_score(torch.zeros(100, 4)) == pytest.approx((1, 0))
    assert inception_score(randn(200, 6).double(), num_splits=1)[0] == pytest.approx(
        inception_score(randn(200, 6).double() + 3.0, num_splits=1)[0]
    )


def test_the_kernel_distance_of_two_points_is_the_closed_form():
    # All images alike: x . x / D = 4, y . y / D = 1, x . y / D = 2
    features, reference = torch.full((30, 8), 2.0), torch.full((40, 8), 1.0)
    mean, spread = kernel_distance(features, reference, num_subsets=3)
    assert mean == pytest.approx(5**3 + 2**3 - 2 * 3**3) and spread == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_of_one_distribution_is_zero_within_its_error():
    features, reference = randn(3000, 8), randn(3000, 8, seed=1)
    mean, spread = kernel_distance(features, reference, num_subsets=20, subset_size=500)
    assert abs(mean) < spread
    moved, _ = kernel_distance(features + 0.3, reference, num_subsets=20, subset_size=500)
    assert moved > 5 * spread
