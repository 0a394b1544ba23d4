"""Flow matching. Time is defined here: t = 0 is data, t = 1 is noise, without exception.

    z_t = (1 - t) * latents + t * noise        velocity = noise - latents = dz_t/dt

Path, time distribution, conversions between what a network can predict, and the training loss. Solvers are in
sampler.py. Sources: RAE (arXiv 2510.11690), RAEv2 (arXiv 2605.18324); REPA (arXiv 2410.06940) for the alignment term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from raev2.batch import ModelOutput, PathPoint
from raev2.errors import SpecError
from raev2.files.plugins import PREDICTIONS, load_kind
from raev2.shapes import Latents, Times, Tokens
from raev2.spec import FlowSpec

Number = TypeVar("Number", Tensor, float)


def interpolate(latents: Latents, noise: Latents, t: Times) -> PathPoint:
    """Point on the straight path between data and noise.

    latents   normalised latents, zero mean and unit variance
    noise     standard normal, same shape
    t         0 = data, 1 = noise
    """
    t_map = _as_map(t)
    return PathPoint((1 - t_map) * latents + t_map * noise, t, noise - latents)


def shift_time(u: Number, time_shift: float) -> Number:
    """t = s u / (1 + (s - 1) u), that is logit(t) = logit(u) + ln s. Keeps 0 and 1; s > 1 moves towards noise."""
    return time_shift * u / (1 + (time_shift - 1) * u)


def sample_t(
    batch_size: int, flow: FlowSpec, time_shift: float, generator: torch.Generator, device: torch.device | str
) -> Times:
    """Training times: u logit-normal(time_mean, time_std), then shifted. Drawn on the device of `generator`."""
    normal = torch.randn(batch_size, generator=generator, device=generator.device).to(device, non_blocking=True)
    return shift_time(torch.sigmoid(flow.time_mean + flow.time_std * normal), time_shift)


class Prediction(ABC):
    """What a network predicts: a quantity from which, at a point z_t, velocity and clean latents follow.

    A kind is a subclass, installed in the entry-point group `raev2.predictions`. Times come as (B, 1, 1, 1) or as one
    number for all samples, and are above 0. How to write one: docs/how_to/new_prediction.md.
    """

    @abstractmethod
    def target(self, latents: Latents, noise: Latents, t: Tensor) -> Latents:
        """The quantity: what a perfect network predicts."""

    @abstractmethod
    def velocity(self, pred: Latents, z_t: Latents, t: Tensor, flow: FlowSpec) -> Latents:
        """The velocity that a prediction means."""

    def latents(self, pred: Latents, z_t: Latents, t: Tensor, flow: FlowSpec) -> Latents:
        """The clean latents that a prediction means."""
        return z_t - t * self.velocity(pred, z_t, t, flow)

    def error(self, pred: Latents, point: PathPoint, latents: Latents, t: Tensor, flow: FlowSpec) -> Latents:
        """What the loss squares: the error of the velocity.

        `flow.reference_clamp` scales the velocity target by t / max(t, min_t), as the RAEv2 code does.
        """
        target = point.velocity
        if flow.reference_clamp:
            target = target * (t / t.clamp(min=flow.min_t))
        return self.velocity(pred, point.z_t, t, flow) - target


class Velocity(Prediction):
    """The velocity itself."""

    def target(self, latents: Latents, noise: Latents, t: Tensor) -> Latents:
        """noise - latents."""
        return noise - latents

    def velocity(self, pred: Latents, z_t: Latents, t: Tensor, flow: FlowSpec) -> Latents:
        """The prediction as it is."""
        return pred


class CleanLatents(Prediction):
    """x-prediction: the clean latents."""

    def target(self, latents: Latents, noise: Latents, t: Tensor) -> Latents:
        """The latents."""
        return latents

    def velocity(self, pred: Latents, z_t: Latents, t: Tensor, flow: FlowSpec) -> Latents:
        """(z_t - pred) / t; `flow.reference_clamp` divides by max(t, min_t) instead."""
        return (z_t - pred) / (t.clamp(min=flow.min_t) if flow.reference_clamp else t)

    def latents(self, pred: Latents, z_t: Latents, t: Tensor, flow: FlowSpec) -> Latents:
        """The prediction as it is."""
        return pred

    def error(self, pred: Latents, point: PathPoint, latents: Latents, t: Tensor, flow: FlowSpec) -> Latents:
        """(pred - latents) / max(t, min_t): the error of the velocity in terms of clean latents."""
        return (pred - latents) / t.clamp(min=flow.min_t)


@cache
def prediction(name: str) -> Prediction:
    """The kind of prediction of this name (`FlowSpec.prediction`)."""
    return load_kind(PREDICTIONS, name, Prediction)()


def to_velocity(pred: Latents, z_t: Latents, t: Times | float, flow: FlowSpec) -> Latents:
    """Velocity that a prediction means; t must be above 0."""
    return prediction(flow.prediction).velocity(pred, z_t, _as_map(t), flow)


def to_latents(pred: Latents, z_t: Latents, t: Times | float, flow: FlowSpec) -> Latents:
    """Clean latents that a prediction means."""
    return prediction(flow.prediction).latents(pred, z_t, _as_map(t), flow)


def flow_error(pred: Latents, point: PathPoint, latents: Latents, flow: FlowSpec) -> Latents:
    """Squared error of the velocity, per element, in float32; see `Prediction.error`."""
    return prediction(flow.prediction).error(pred.float(), point, latents, _as_map(point.t), flow).square()


@dataclass(frozen=True)
class Losses:
    """Loss terms: per sample and unweighted, and the weighted sum of their means, which is what is minimised."""

    total: Float[Tensor, ""]
    full: Float[Tensor, " B"]
    base: Float[Tensor, " B"] | None = None
    repa: Float[Tensor, " B"] | None = None


def training_loss(
    output: ModelOutput,
    point: PathPoint,
    latents: Latents,
    flow: FlowSpec,
    *,
    base_weight: float = 1.0,
    repa_target: Tokens | None = None,
    repa_weight: float = 0.5,
    repa_cosine: bool = False,
) -> Losses:
    """full + base_weight * base + repa_weight * repa, each a mean over samples.

    repa_target   tokens of the target encoder for the clean image, or None when the run has no alignment
    repa_cosine   minus the mean cosine of a token and its target (arXiv 2410.06940), not their squared distance
    """
    full = flow_error(output.pred, point, latents, flow).flatten(1).mean(1)
    total = full.mean()
    base = repa = None
    if output.base_pred is not None:
        base = flow_error(output.base_pred, point, latents, flow).flatten(1).mean(1)
        total = total + base_weight * base.mean()
    if repa_target is not None:
        if output.hidden is None:
            raise SpecError(
                "generator.repa_depth", "the network has no REPA projector", hint="Set repa_depth and repa_dim."
            )
        hidden = output.hidden.float()
        if repa_cosine:
            repa = -cosine_similarity(hidden, repa_target, dim=-1).mean(1)
        else:  # neither side is normalised
            repa = (hidden - repa_target).square().flatten(1).mean(1)
        total = total + repa_weight * repa.mean()
    return Losses(total, full, base, repa)


def _as_map(t: Tensor | float) -> Tensor:
    """Times as (B, 1, 1, 1); a number as a scalar tensor, which takes no part in result types."""
    return t.view(-1, 1, 1, 1) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
