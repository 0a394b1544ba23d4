"""Distances between two sets of images, from their features. Pure functions; read `FrechetTo` first.

All sums are float64. No matrix square root is taken anywhere, so no SciPy version and no BLAS build can change a
number, and a covariance of deficient rank (fewer images than features) is an ordinary input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raev2.errors import DataError
from raev2.training import dist

FEWEST = 40  # images with which there is a standard error
ERROR_NOTE = "± by leaving out one image at a time"  # for results with the error of `FrechetTo.stderr`


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features: mergeable, so the order and the split do not matter."""

    count: int
    sum: Float[Tensor, " D"]
    outer: Float[Tensor, "D D"]

    @classmethod
    def of(cls, features: Float[Tensor, "S D"]) -> Moments:
        """Moments of one set of features; a non-finite one is an error, it would silently spoil every later number."""
        features = features.detach().to("cpu", torch.float64)
        if not torch.isfinite(features).all():
            raise DataError("features", "not finite", hint="The images or the feature network are broken.")
        return cls(len(features), features.sum(0), features.T @ features)

    def merge(self, other: Moments, sign: int = 1) -> Moments:
        """Moments of both sets together; with sign -1, of this set without the other."""
        count, total = self.count + sign * other.count, self.sum + sign * other.sum
        return Moments(count, total, self.outer + sign * other.outer)

    def over_processes(self) -> Moments:
        """Moments of what all processes saw, added in rank order."""
        return reduce(Moments.merge, dist.gather_objects(self))

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
        return {**vars(self), "count": torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Inverse of `tensors`."""
        return cls(int(tensors["count"]), tensors["sum"], tensors["outer"])


@dataclass(frozen=True)
class Gaussian:
    """Mean and unbiased covariance of features, as a stored reference has them; `count` None: not stated."""

    mean: Float[Tensor, " D"]
    cov: Float[Tensor, "D D"]
    count: int | None = None


class FrechetTo:
    """Fréchet distances to one reference, whose covariance is decomposed once.

    |mean - mean_ref|^2 + tr(cov) + tr(cov_ref) - 2 tr((cov cov_ref)^(1/2))

    With cov_ref = F F^T, the last trace is the sum of the square roots of the eigenvalues of F^T cov F, which is
    symmetric. No more of them count than the sets have images, so rounding never stands in for a missing rank.

    rows   features of the reference: all of them, and no more than they are long, are F without a decomposition

    Source: Heusel et al., 2017, GANs trained by a two time-scale update rule, eq. 6
    """

    def __init__(self, reference: Moments | Gaussian, rows: Float[Tensor, "R D"] | None = None) -> None:
        self.mean, cov = reference.mean.double(), reference.cov.double()
        self.trace, self.rank = cov.trace(), _rank(reference, len(cov))
        if rows is not None and len(rows) == reference.count and len(rows) <= len(cov):
            self.factor = (rows.double() - self.mean).T / (len(rows) - 1) ** 0.5
        else:
            self.factor = _factor(cov, self.rank)

    def __call__(self, moments: Moments | Gaussian) -> float:
        """Distance of a set; always finite and >= 0."""
        cov, rank = moments.cov.double(), _rank(moments, self.rank)
        with one_thread():
            values = torch.linalg.eigvalsh(self.factor.T @ cov @ self.factor)
        cross = values[-rank:].clamp(min=0).sqrt().sum()
        offset = (moments.mean.double() - self.mean).square().sum()
        return max(float(offset + cov.trace() + self.trace - 2 * cross), 0.0)

    def stderr(self, features: Float[Tensor, "S D"], partners: Float[Tensor, "S D"] | None = None) -> float | None:
        """Standard error from drawing these images: the jackknife that leaves out one image at a time.

        All S distances come from one decomposition, see `_root_trace_changes`. It says nothing about the spread over
        training seeds. None with fewer than 40 images.

        partners   the reference, where it is drawn with the images in pairs: both images of a pair are left out
        """
        num = len(features)
        if num < FEWEST:
            return None
        mean = features.double().mean(0)
        own, scale = features.double() - mean, num / (num - 1) ** 2
        values, projected = _axes(own @ self.factor)
        offset, squares, partner, power = mean - self.mean - own / (num - 1), own.square().sum(1), None, 0.5
        if partners is not None:
            their = partners.double() - self.mean
            partner, power = their @ (own.T @ projected) / ((num - 1) * values), 1
            offset, squares = offset + their / (num - 1), squares + their.square().sum(1)
        cross = values.sqrt().sum() + _root_trace_changes(values, projected, partner, scale)
        rest = (num - 1) / (num - 2)  # a covariance without image i: rest * (cov - scale own_i own_i^T)
        left_out = offset.square().sum(1) - rest * scale * squares - 2 * rest**power * cross  # and a constant
        return float(((num - 1) * left_out.var(correction=0)).sqrt())


def moments_distance(moments: Moments | Gaussian, reference: Moments | Gaussian) -> float:
    """Fréchet distance of two sets of features, from their moments."""
    return FrechetTo(reference)(moments)


def paired_frechet(features: Float[Tensor, "S D"], reference: Float[Tensor, "S D"]) -> tuple[float, float | None]:
    """Fréchet distance of paired sets and its standard error: both lose the same image."""
    distance = FrechetTo(Moments.of(reference), reference)
    return distance(Moments.of(features)), distance.stderr(features, reference)


def inception_score(logits: Float[Tensor, "S D"], num_splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Inception Score: mean over splits of exp(KL(p(y|x) || p(y))), and its standard deviation over splits.

    logits   without the bias of the last layer, as torch-fidelity defines it; its seed and its order of images

    Source: Salimans et al., 2016, Improved techniques for training GANs
    """
    num_splits = min(num_splits, len(logits))
    order = np.random.RandomState(seed).permutation(len(logits))
    log_probs = logits.double().log_softmax(1)[order]
    bounds = [split * len(logits) // num_splits for split in range(num_splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        log_p = log_probs[start:stop]
        kl = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean()
        scores.append(float(kl.exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    features: Float[Tensor, "S D"],
    reference: Float[Tensor, "R D"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel distance, KID in Inception's features: `squared_mmd` of subsets, mean and standard deviation.

    The subsets and their seed are those of torch-fidelity; sets with fewer images have smaller subsets.

    Source: Binkowski et al., 2018, Demystifying MMD GANs
    """
    size, draw = min(subset_size, len(features), len(reference)), np.random.RandomState(seed).choice
    values = [
        squared_mmd(*(rows[draw(len(rows), size, replace=False)] for rows in (features, reference)))
        for _ in range(num_subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(features: Float[Tensor, "S D"], reference: Float[Tensor, "S D"]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3; may be slightly negative."""
    from torchmetrics.image.kid import poly_mmd  # seconds to import

    return float(poly_mmd(features.double(), reference.double()))


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Eigenvalues in one thread: more gain little, and lose twentyfold when other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factor(cov: Tensor, rank: int) -> Tensor:
    """F with cov = F F^T."""
    if rank == len(cov):
        factor, failed = torch.linalg.cholesky_ex(cov)
        if not failed:
            return factor
    with one_thread():
        values, vectors = torch.linalg.eigh(cov)
    return vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()


def _rank(moments: Moments | Gaussian, most: int) -> int:
    """The most that the covariance of so many images can have, and `most`."""
    return most if moments.count is None else min(most, moments.count - 1)


def _axes(rows: Float[Tensor, "S R"]) -> tuple[Float[Tensor, " E"], Float[Tensor, "S E"]]:
    """Eigenvalues of the covariance of centred rows, all that are not rounding, and the rows in its axes."""
    num = len(rows) - 1
    few = num < rows.shape[1]
    products = rows @ rows.T if few else rows.T @ rows
    with one_thread():
        values, vectors = torch.linalg.eigh(products / num)
    kept = values > 1e-13 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors * (num * values).sqrt() if few else rows @ vectors


def _root_trace_changes(
    values: Float[Tensor, " E"], a: Float[Tensor, "S E"], b: Float[Tensor, "S E"] | None, scale: float
) -> Float[Tensor, " S"]:
    """tr(M_i^(1/2)) - tr(M^(1/2)) for matrices M_i that are M = diag(values) but for one vector or two, for each row i.

    pi tr(M_i^(1/2)) - pi tr(M^(1/2)) = integral over u > 0 of log(det(M_i + u^2) / det(M + u^2))

    where the determinants' ratio is a number (matrix determinant lemma) and the trapezoid rule in log u converges
    exponentially: 65 points have an error of 1e-6 at most.

    a   M_i = M - scale a a^T: F^T cov F where cov loses an image
    b   M_i = (cov - scale x x^T) (cov_ref - scale y y^T) has the eigenvalues that count, a = F^T x and b = F^-1 y
    """
    if not len(values):
        return a.new_zeros(len(a))
    u = values[-1].sqrt() * torch.arange(-32, 33, dtype=torch.float64).div(2).exp()
    inverse = 1 / (values[:, None] + u.square())
    ratio = 1 - scale * a.square() @ inverse
    if b is not None:
        ratio = ratio * (1 - scale * b.square() @ (values[:, None] * inverse)) + (scale * u * ((a * b) @ inverse)) ** 2
    return ratio.clamp(min=1e-300).log() @ u / (2 * math.pi)


def _neighbour_radii(points: Tensor, k: int, chunk_size: int) -> Tensor:
    radii = []
    for start in range(0, len(points), chunk_size):
        distances = torch.cdist(points[start : start + chunk_size], points)
        distances.diagonal(start).fill_(torch.inf)  # a point is not its own neighbour
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _inside(queries: Tensor, centres: Tensor, radii: Tensor, chunk_size: int) -> Tensor:
    return torch.cat([(torch.cdist(chunk, centres) <= radii).any(1) for chunk in queries.split(chunk_size)]).float()
