"""Distances between two sets of images, from their features. Pure functions; read `frechet_distance` first.

All sums are float64. No matrix square root of a non-symmetric matrix is taken anywhere, so no SciPy version and no
BLAS build can change a number, and a covariance of deficient rank (fewer images than features) is an ordinary input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from raev2.errors import DataError
from raev2.training import dist


class Moments:
    """Count, sum and sum of outer products of features: mergeable, so the order and the split do not matter."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: Float[Tensor, "S D"]) -> Moments:
        """Moments of one set of features."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Float[Tensor, "S D"]) -> None:
        """Add features; a non-finite one is an error, it would silently spoil every later number."""
        features = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(features).all():
            raise DataError("features", "not finite", hint="The images or the feature network are broken.")
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: Moments, sign: int = 1) -> Moments:
        """Moments of both sets together; with sign -1, of this set without the other."""
        merged = type(self)(len(self.sum))
        merged.count = self.count + sign * other.count
        merged.sum = self.sum + sign * other.sum
        merged.outer = self.outer + sign * other.outer
        return merged

    def over_processes(self) -> Moments:
        """Moments of what all processes saw, added in rank order."""
        total = type(self)(len(self.sum))
        for part in dist.gather_objects(self.tensors()):
            total = total.merge(self.from_tensors(part))
        return total

    @property
    def mean(self) -> Float[Tensor, " D"]:
        """Mean of the features."""
        return self.sum / max(self.count, 1)

    @property
    def cov(self) -> Float[Tensor, "D D"]:
        """Unbiased covariance (divides by n - 1, as every published FID does)."""
        if self.count < 2:
            raise DataError("moments", "a covariance needs two images", got=self.count, expected="at least 2")
        cov = (self.outer - torch.outer(self.sum, self.mean)) / (self.count - 1)
        return (cov + cov.T) / 2

    def tensors(self) -> dict[str, Tensor]:
        """As tensors, for a safetensors file."""
        return {"count": torch.tensor(self.count), "sum": self.sum, "outer": self.outer}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Inverse of `tensors`."""
        moments = cls(len(tensors["sum"]))
        moments.count, moments.sum, moments.outer = int(tensors["count"]), tensors["sum"], tensors["outer"]
        return moments


def frechet_distance(
    mean1: Float[Tensor, " D"],
    cov1: Float[Tensor, "D D"],
    mean2: Float[Tensor, " D"],
    cov2: Float[Tensor, "D D"],
) -> float:
    """Squared Wasserstein-2 distance of two Gaussians.

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2))

    The last trace is the nuclear norm of cov1^(1/2) cov2^(1/2), a sum of singular values. Always finite and >= 0.

    Source: Heusel et al., 2017, GANs trained by a two time-scale update rule, eq. 6
    """
    mean1, cov1, mean2, cov2 = (value.to("cpu", torch.float64) for value in (mean1, cov1, mean2, cov2))
    cross = torch.linalg.svdvals(_sqrt_psd(cov1) @ _sqrt_psd(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(float(distance), 0.0)


def moments_distance(moments1: Moments, moments2: Moments) -> float:
    """Fréchet distance of two sets of features, from their moments."""
    return frechet_distance(moments1.mean, moments1.cov, moments2.mean, moments2.cov)


def frechet_stderr(
    features: Float[Tensor, "S D"], reference: Moments | Float[Tensor, "S D"], num_groups: int = 10
) -> float | None:
    """Standard error of the Fréchet distance from drawing these images: jackknife that leaves out one group at a time.

    reference   moments of a fixed set, or features paired with `features` (then both lose the same group)

    It says nothing about the spread over training seeds. None with fewer than four images a group.
    """
    if len(features) < 4 * num_groups:
        return None
    total = Moments.of(features)
    total_reference = reference if isinstance(reference, Moments) else Moments.of(reference)
    distances = []
    for group in range(num_groups):
        without = total.merge(Moments.of(features[group::num_groups]), sign=-1)
        other = total_reference
        if not isinstance(reference, Moments):
            other = total_reference.merge(Moments.of(reference[group::num_groups]), sign=-1)
        distances.append(moments_distance(without, other))
    values = torch.tensor(distances, dtype=torch.float64)
    return float(((num_groups - 1) / num_groups * (values - values.mean()).square().sum()).sqrt())


def precision_recall(
    real: Float[Tensor, "R D"], fake: Float[Tensor, "F D"], k: int = 3, chunk_size: int = 1024
) -> tuple[float, float]:
    """Share of fake images inside the manifold of the real ones (precision), and the reverse (recall).

    A manifold is the union of balls around its images, each reaching to the k-th nearest neighbour in its own set.

    Source: Kynkaanniemi et al., 2019, Improved precision and recall metric for assessing generative models
    """
    if min(len(real), len(fake)) <= k:
        raise DataError("precision and recall", "too few images", got=min(len(real), len(fake)), expected=f"> {k}")
    centre = real.mean(0)  # distances do not change, their rounding error shrinks
    real, fake = (real - centre).float(), (fake - centre).float()
    return (
        float(_inside(fake, real, _neighbour_radii(real, k, chunk_size), chunk_size).mean()),
        float(_inside(real, fake, _neighbour_radii(fake, k, chunk_size), chunk_size).mean()),
    )


def _sqrt_psd(cov: Tensor) -> Tensor:
    """Symmetric square root; eigenvalues at the level of rounding are zero (rank deficiency), never negative."""
    values, vectors = torch.linalg.eigh(cov)
    floor = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > floor, 0).sqrt()) @ vectors.T


def _neighbour_radii(points: Tensor, k: int, chunk_size: int) -> Tensor:
    radii = []
    for start in range(0, len(points), chunk_size):
        distances = torch.cdist(points[start : start + chunk_size], points)
        rows = torch.arange(len(distances))
        distances[rows, rows + start] = torch.inf  # a point is not its own neighbour
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _inside(queries: Tensor, centres: Tensor, radii: Tensor, chunk_size: int) -> Tensor:
    return torch.cat([(torch.cdist(chunk, centres) <= radii).any(1) for chunk in queries.split(chunk_size)]).float()
