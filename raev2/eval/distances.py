"""Distances between two sets of images, from their features. Pure functions; read `FrechetTo` first.

All sums are float64. No matrix square root is taken anywhere, so no SciPy version and no BLAS build can change a
number, and a covariance of deficient rank (fewer images than features) is an ordinary input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

GROUPS = 10  # of the jackknife


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

    def stderr(self, features: Float[Tensor, "S D"]) -> float | None:
        """Standard error from drawing these images: jackknife that leaves out one of ten groups at a time.

        It says nothing about the spread over training seeds. None with fewer than four images a group.
        """
        return _jackknife([self(rest) for rest in _leave_out(features)[1]]) if len(features) >= 4 * GROUPS else None


def moments_distance(moments: Moments | Gaussian, reference: Moments | Gaussian) -> float:
    """Fréchet distance of two sets of features, from their moments."""
    return FrechetTo(reference)(moments)


def paired_frechet(features: Float[Tensor, "S D"], reference: Float[Tensor, "S D"]) -> tuple[float, float | None]:
    """Fréchet distance of paired sets and its jackknife error: both lose the same group."""
    (own, own_rests), (their, their_rests) = _leave_out(features), _leave_out(reference)
    distance = FrechetTo(their, reference)(own)
    if len(features) < 4 * GROUPS:
        return distance, None
    kept = [reference[torch.arange(len(reference)) % GROUPS != group] for group in range(GROUPS)]
    rests = zip(own_rests, their_rests, kept, strict=True)
    return distance, _jackknife([FrechetTo(other, rows)(rest) for rest, other, rows in rests])


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


def squared_mmd(features: Float[Tensor, "S D"], reference: Float[Tensor, "R D"]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3; may be slightly negative."""
    x, y = features.double(), reference.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_others(own: Tensor) -> Tensor:
        return (own.sum() - own.trace()) / (len(own) * (len(own) - 1))

    return float(mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y)) - 2 * kernel(x, y).mean())


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


def _leave_out(features: Tensor) -> tuple[Moments, list[Moments]]:
    """Moments of all, and of all but each group in turn."""
    parts = [Moments.of(features[group::GROUPS]) for group in range(GROUPS)]
    total = reduce(Moments.merge, parts)
    return total, [total.merge(part, sign=-1) for part in parts]


def _jackknife(values: Sequence[float]) -> float:
    spread = torch.tensor(values, dtype=torch.float64).var(correction=0)
    return float(((len(values) - 1) * spread).sqrt())


def _neighbour_radii(points: Tensor, k: int, chunk_size: int) -> Tensor:
    radii = []
    for start in range(0, len(points), chunk_size):
        distances = torch.cdist(points[start : start + chunk_size], points)
        distances.diagonal(start).fill_(torch.inf)  # a point is not its own neighbour
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _inside(queries: Tensor, centres: Tensor, radii: Tensor, chunk_size: int) -> Tensor:
    return torch.cat([(torch.cdist(chunk, centres) <= radii).any(1) for chunk in queries.split(chunk_size)]).float()
