"""Mean and variance of latents per channel and position: exact, mergeable, and tied to their encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.shapes import Latents

EPS = 1e-5  # added to the variance
WHITEN_FLOOR = 1e-4  # of the mean variance: a direction with less is not lifted further


@dataclass(frozen=True)
class LatentStats:
    """Statistics of un-normalised latents, with what they were computed from.

    mean, var    float32; population variance
    cov          covariance of the channels around the mean of their position, averaged over positions; None: not asked
    encoder      fingerprint of the encoder: weights, layers, norm, preprocessing and grid
    data         fingerprint of the dataset
    """

    mean: Float[Tensor, "C H W"]
    var: Float[Tensor, "C H W"]
    num_images: int
    encoder: Mapping[str, Any]
    data: str = ""
    cov: Float[Tensor, "C C"] | None = None


class LatentStatsAccumulator:
    """Streaming statistics in float64 on the CPU, exact up to rounding.

    Batches and processes are merged with Chan's formula: with n = n_a + n_b and delta = mean_b - mean_a,

    mean = mean_a + delta n_b / n        M2 = M2_a + M2_b + delta^2 n_a n_b / n        var = M2 / n

    with_cov   also the covariance of channels
    """

    def __init__(self, encoder: Mapping[str, Any], data: str = "", *, with_cov: bool = False) -> None:
        self.encoder, self.data, self.with_cov = dict(encoder), data, with_cov
        self.num_images = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.m2 = torch.zeros((), dtype=torch.float64)
        self.scatter = torch.zeros((), dtype=torch.float64)

    def update(self, latents: Latents) -> None:
        """Add un-normalised latents."""
        values = latents.detach().double()
        mean = values.mean(dim=0)
        centred = values - mean
        scatter = _scatter(centred).cpu() if self.with_cov else self.scatter
        self._merge(values.shape[0], mean.cpu(), centred.square().sum(dim=0).cpu(), scatter)

    def merge(self, other: LatentStatsAccumulator) -> None:
        """Add what another process has seen. Raises CheckpointError if it used another encoder."""
        check_same_encoder(self.encoder, other.encoder)
        if other.num_images:
            self._merge(other.num_images, other.mean, other.m2, other.scatter)

    def result(self) -> LatentStats:
        """The statistics of everything added so far."""
        if self.num_images == 0:
            raise CheckpointError("latent statistics", "no images were added")
        var = self.m2 / self.num_images
        cov = (self.scatter / self.num_images).float() if self.with_cov else None
        return LatentStats(self.mean.float(), var.float(), self.num_images, self.encoder, self.data, cov)

    def _merge(self, num_images: int, mean: Tensor, m2: Tensor, scatter: Tensor) -> None:
        total = self.num_images + num_images
        delta = mean - self.mean
        weight = self.num_images * num_images / total
        self.m2 = self.m2 + m2 + delta.square() * weight
        if self.with_cov:
            self.scatter = self.scatter + scatter + _scatter(delta.expand_as(mean)[None]) * weight
        self.mean = self.mean + delta * (num_images / total)
        self.num_images = total


def normalise(latents: Latents, mean: Float[Tensor, "C H W"], var: Float[Tensor, "C H W"]) -> Latents:
    """(latents - mean) / sqrt(var + 1e-5), in float32."""
    return (latents.float() - mean) / torch.sqrt(var + EPS)


def denormalise(latents: Latents, mean: Float[Tensor, "C H W"], var: Float[Tensor, "C H W"]) -> Latents:
    """latents * sqrt(var + 1e-5) + mean, in float32."""
    return latents.float() * torch.sqrt(var + EPS) + mean


def whitening(cov: Float[Tensor, "C C"], share: float) -> tuple[Float[Tensor, "C C"], Float[Tensor, "C C"]]:
    """Symmetric matrix for centred tokens, and its inverse, in float64.

    A direction of variance v gets a variance proportional to v ** (1 - share): with 0 all directions are scaled alike,
    with 1 all have the same variance (ZCA). The mean variance of the channels becomes 1.
    """
    variances, directions = torch.linalg.eigh(cov.double())
    variances = variances.clamp(min=WHITEN_FLOOR * variances.mean().item())
    scale = variances ** (-share / 2)
    scale = scale / (variances * scale.square()).mean().sqrt()
    return directions * scale @ directions.T, directions / scale @ directions.T


def mix_channels(latents: Latents, matrix: Float[Tensor, "C C"]) -> Latents:
    """The channels of each position times a matrix, in float32 also under autocast."""
    with torch.autocast(latents.device.type, enabled=False):
        return torch.einsum("bchw,cd->bdhw", latents.float(), matrix)


def _scatter(centred: Latents) -> Float[Tensor, "C C"]:
    """Sum over images of products of channels, averaged over positions."""
    rows = centred.movedim(1, -1).flatten(0, -2)
    return rows.T @ rows / centred[0, 0].numel()


def check_same_encoder(expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Compare encoder fingerprints; the name under 'encoder' is for people and may differ."""
    different = [key for key in expected.keys() | got.keys() if key != "encoder" and expected.get(key) != got.get(key)]
    if different:
        raise CheckpointError(
            "latent statistics", "computed with another encoder",
            got=", ".join(f"{key}={got.get(key)}" for key in sorted(different)),
            expected=", ".join(f"{key}={expected.get(key)}" for key in sorted(different)),
            hint="Compute them again with this encoder, or use the encoder they belong to.",
        )  # fmt: skip
