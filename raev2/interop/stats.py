"""Latent statistics of RAE (stat.pt) and RAEv2 (stats.pt) in and out: a mapping with "mean" and "var"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.interop.convert import describe
from raev2.tokenizer.latent_stats import LatentStats


def import_stats(
    values: Mapping[str, Any], latent_shape: tuple[int, int, int], *, encoder: Mapping[str, Any], data: str = ""
) -> LatentStats:
    """Statistics per channel and position, (C, H, W).

    values    "mean" and "var" of shape (C, H, W), (C, 1, 1) or (C,), also with a leading 1; one value for several is
              spread. A missing mean means 0 and a missing variance 1, as the reference reads it
    encoder   fingerprint of the encoder that they belong to
    data      what they were computed from

    Raises CheckpointError for another shape, and for values that are no mean or variance.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors or set(values) - {"mean", "var"}:
        raise CheckpointError(
            "latent statistics", "not a statistics file", got=describe(tensors)[1] if tensors else sorted(values)[:4],
            expected="'mean' and 'var'",
        )  # fmt: skip
    mean = spread(tensors.get("mean", torch.zeros(())), "mean", latent_shape)
    var = spread(tensors.get("var", torch.ones(())), "var", latent_shape)
    if not mean.isfinite().all() or not var.isfinite().all() or (var < 0).any():
        raise CheckpointError(
            "latent statistics", "not finite, or a negative variance", got=f"smallest variance {var.min().item():g}"
        )
    return LatentStats(mean, var, num_images=0, encoder=encoder, data=data)


def export_stats(stats: LatentStats) -> dict[str, Tensor]:
    """The statistics as the reference stores them."""
    return {"mean": stats.mean.clone(), "var": stats.var.clone()}


def spread(value: Tensor, name: str, latent_shape: tuple[int, int, int]) -> Tensor:
    """One of the statistics as (C, H, W), float32."""
    shape = tuple(value.shape)
    if value.ndim == 4 and shape[0] == 1:
        value = value[0]
    if value.ndim == 1:
        value = value[:, None, None]
    fits = value.ndim in (0, 3) and all(
        have in (1, want) for have, want in zip(value.shape, latent_shape[-value.ndim :], strict=False)
    )
    if not fits:
        raise CheckpointError(
            "latent statistics", f"{name} has the wrong shape", got=shape,
            expected=f"{latent_shape}, or {(latent_shape[0],)}",
            hint="They belong to another encoder or another image size.",
        )  # fmt: skip
    return value.float().expand(latent_shape).clone()
