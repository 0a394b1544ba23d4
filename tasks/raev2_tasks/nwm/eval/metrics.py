"""Numbers of this task from per-sample values. Pure functions; read `mean` first.

Every number carries a 95 % interval from a bootstrap over samples with a fixed seed, so it is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from raev2.errors import DataError
from raev2.eval.distances import ERROR_NOTE, FrechetTo, Moments, paired_frechet

BOOTSTRAP_DRAWS = 1000
Numbers = tuple[str, float, int, float | None, str]  # what a `MetricResult` begins with; what it means is added


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """Low and high end of the 95 % interval, and the standard error, of a statistic of samples.

    values      (S, ...), one row a sample
    statistic   (draws, S, ...) -> (draws,)
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (BOOTSTRAP_DRAWS, len(values)), generator=generator)
    drawn = statistic(values.double()[rows])
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high, float(drawn.std())


def bootstrapped(name: str, values: Tensor, statistic: Callable[[Tensor], Tensor]) -> Numbers:
    """A statistic of samples with its interval in the note; `statistic` as in `bootstrap`."""
    if not torch.isfinite(values).all():
        raise DataError(name, "not finite", hint="The images or the network are broken.")
    low, high, stderr = bootstrap(values, statistic)
    value = float(statistic(values.double()[None])[0])
    return name, value, len(values), stderr, f"95 % interval {low:.4g} to {high:.4g}"


def mean(name: str, values: Tensor) -> Numbers:
    """Mean over samples (S,)."""
    return bootstrapped(name, values, lambda drawn: drawn.mean(1))


def correlation(name: str, first: Tensor, second: Tensor) -> Numbers:
    """Pearson correlation of two numbers a sample (S,); 0 where one of them does not vary."""
    return bootstrapped(name, torch.stack([first, second], 1), _correlation)


def frechet(name: str, features: Tensor, reference: Tensor) -> Numbers:
    """Fréchet distance of two sets of feature vectors (S, D) and (R, D); paired by row where S equals R."""
    if len(features) == len(reference):
        value, stderr = paired_frechet(features, reference)
    else:
        to = FrechetTo(Moments.of(reference), reference)
        value, stderr = to(Moments.of(features)), to.stderr(features)
    return name, value, len(features), stderr, f"compare at equal n only; {ERROR_NOTE}"


def latent_distance(latents: Tensor, reference: Tensor) -> Tensor:
    """Mean over positions of 1 - cos between normalised latents (S, C, H, W); 0 = equal, about 1 = unrelated."""
    return (1 - cosine_similarity(latents.float(), reference.float(), dim=1)).mean((1, 2))


def clip_features(features: Tensor) -> Tensor:
    """One vector for each clip from the features of its frames: (S, T, D) -> (S, 4 D).

    Mean and standard deviation over time of the features and of their first differences. The last two see flicker and
    frozen pictures, which no distance of single frames does.
    """
    steps = features.diff(dim=1)
    if steps.shape[1] < 2:
        raise DataError("clips", "too short for a video distance", got=features.shape[1], expected="at least 3 frames")
    parts = [features.mean(1), features.std(1), steps.mean(1), steps.std(1)]
    return torch.cat(parts, dim=1)


def _correlation(pairs: Tensor) -> Tensor:
    """(draws, S, 2) -> (draws,)"""
    centred = pairs - pairs.mean(1, keepdim=True)
    covariance = centred.prod(2).mean(1)
    spread = centred.square().mean(1).prod(1).sqrt()
    return torch.where(spread > 0, covariance / spread.clamp_min(1e-300), torch.zeros_like(spread))
