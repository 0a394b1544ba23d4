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


@dataclass(frozen=True)
class LatentStats:
    """Statistics of un-normalised latents, with what they were computed from.

    mean, var    float32; population variance
    encoder      fingerprint of the encoder: weights, layers, norm, preprocessing and grid
    data         fingerprint of the dataset
    """

    mean: Float[Tensor, "C H W"]
    var: Float[Tensor, "C H W"]
    num_images: int
    encoder: Mapping[str, Any]
    data: str = ""


class LatentStatsAccumulator:
    """Streaming statistics in float64 on the CPU, exact up to rounding.

    Batches and processes are merged with Chan's formula: with n = n_a + n_b and delta = mean_b - mean_a,

    mean = mean_a + delta n_b / n        M2 = M2_a + M2_b + delta^2 n_a n_b / n        var = M2 / n
    """

    def __init__(self, encoder: Mapping[str, Any], data: str = "") -> None:
        self.encoder, self.data = dict(encoder), data
        self.num_images = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.m2 = torch.zeros((), dtype=torch.float64)

    def update(self, latents: Latents) -> None:
        """Add un-normalised latents."""
        values = latents.detach().double()
        mean = values.mean(dim=0)
        self._merge(values.shape[0], mean.cpu(), (values - mean).square().sum(dim=0).cpu())

    def merge(self, other: LatentStatsAccumulator) -> None:
        """Add what another process has seen. Raises CheckpointError if it used another encoder."""
        check_same_encoder(self.encoder, other.encoder)
        if other.num_images:
            self._merge(other.num_images, other.mean, other.m2)

    def result(self) -> LatentStats:
        """The statistics of everything added so far."""
        if self.num_images == 0:
            raise CheckpointError("latent statistics", "no images were added")
        var = self.m2 / self.num_images
        return LatentStats(self.mean.float(), var.float(), self.num_images, self.encoder, self.data)

    def _merge(self, num_images: int, mean: Tensor, m2: Tensor) -> None:
        total = self.num_images + num_images
        delta = mean - self.mean
        self.m2 = self.m2 + m2 + delta.square() * (self.num_images * num_images / total)
        self.mean = self.mean + delta * (num_images / total)
        self.num_images = total


def normalise(latents: Latents, mean: Float[Tensor, "C H W"], var: Float[Tensor, "C H W"]) -> Latents:
    """(latents - mean) / sqrt(var + 1e-5), in float32."""
    return (latents.float() - mean) / torch.sqrt(var + EPS)


def denormalise(latents: Latents, mean: Float[Tensor, "C H W"], var: Float[Tensor, "C H W"]) -> Latents:
    """latents * sqrt(var + 1e-5) + mean, in float32."""
    return latents.float() * torch.sqrt(var + EPS) + mean


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
