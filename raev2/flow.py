"""Flow matching. Time is defined here: t = 0 is data, t = 1 is noise, without exception.

    z_t = (1 - t) * latents + t * noise        velocity = noise - latents = dz_t/dt

Path, time distribution, conversions between what a network can predict, and the training loss. Solvers are in
sampler.py. Sources: RAE (arXiv 2510.11690), RAEv2 (arXiv 2605.18324); REPA (arXiv 2410.06940) for the alignment term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raev2.batch import ModelOutput, PathPoint
from raev2.errors import SpecError
from raev2.shapes import Latents, Times, Tokens
from raev2.spec import FlowSpec


def interpolate(latents: Latents, noise: Latents, t: Times) -> PathPoint:
    """Point on the straight path between data and noise.

    latents   normalised latents, zero mean and unit variance
    noise     standard normal, same shape
    t         0 = data, 1 = noise
    """
    t_map = _as_map(t)
    return PathPoint((1 - t_map) * latents + t_map * noise, t, noise - latents)


def shift_time(u: Tensor, time_shift: float) -> Tensor:
    """t = s u / (1 + (s - 1) u), that is logit(t) = logit(u) + ln s. Keeps 0 and 1; s > 1 moves towards noise."""
    return time_shift * u / (1 + (time_shift - 1) * u)


def sample_t(
    batch_size: int, flow: FlowSpec, time_shift: float, generator: torch.Generator, device: torch.device | str
) -> Times:
    """Training times: u logit-normal(time_mean, time_std), then shifted. Drawn on the device of `generator`."""
    normal = torch.randn(batch_size, generator=generator, device=generator.device).to(device, non_blocking=True)
    return shift_time(torch.sigmoid(flow.time_mean + flow.time_std * normal), time_shift)


def to_velocity(pred: Latents, z_t: Latents, t: Times | float, flow: FlowSpec) -> Latents:
    """Velocity that a prediction means: (z_t - latents_pred) / t for x-prediction; t must be above 0.

    `flow.reference_clamp` divides by max(t, min_t) instead.
    """
    if flow.prediction == "velocity":
        return pred
    t_map = _as_map(t)
    if flow.reference_clamp:
        t_map = t_map.clamp(min=flow.min_t)
    return (z_t - pred) / t_map


def to_latents(pred: Latents, z_t: Latents, t: Times | float, flow: FlowSpec) -> Latents:
    """Clean latents that a prediction means: z_t - t * velocity_pred for velocity prediction."""
    return pred if flow.prediction == "x" else z_t - _as_map(t) * pred


def to_noise(pred: Latents, z_t: Latents, t: Times | float, flow: FlowSpec) -> Latents:
    """Noise that a prediction means: latents_pred + velocity_pred = z_t + (1 - t) * velocity_pred."""
    return z_t + (1 - _as_map(t)) * to_velocity(pred, z_t, t, flow)


def flow_error(pred: Latents, point: PathPoint, latents: Latents, flow: FlowSpec) -> Latents:
    """Squared error of the velocity, per element, in float32.

    velocity prediction   (pred - velocity)^2
    x-prediction          (pred - latents)^2 / max(t, min_t)^2, the same in terms of clean latents

    `flow.reference_clamp` scales the velocity target by t / max(t, min_t), as the RAEv2 code does.
    """
    t_map = _as_map(point.t)
    if flow.prediction == "x":
        return ((pred.float() - latents) / t_map.clamp(min=flow.min_t)).square()
    target = point.velocity
    if flow.reference_clamp:
        target = target * (t_map / t_map.clamp(min=flow.min_t))
    return (pred.float() - target).square()


def repa_error(hidden: Tokens, target: Tokens) -> Tokens:
    """Squared distance of projected trunk tokens to clean encoder tokens (not normalised), per element, in float32."""
    return (hidden.float() - target).square()


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
) -> Losses:
    """full + base_weight * base + repa_weight * repa, each a mean over samples.

    repa_target   tokens of the target encoder for the clean image, or None when the run has no alignment
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
        repa = repa_error(output.hidden, repa_target).flatten(1).mean(1)
        total = total + repa_weight * repa.mean()
    return Losses(total, full, base, repa)


def _as_map(t: Tensor | float) -> Tensor:
    """Times as (B, 1, 1, 1); a number as a scalar tensor, which takes no part in result types."""
    return t.view(-1, 1, 1, 1) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
