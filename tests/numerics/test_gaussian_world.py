"""Solvers and guidance against closed forms: latents ~ N(mean, std^2), where the exact flow is known.

Measured with mean 0.7, std 0.4: slope about 0.98 for Euler and 1.9 for Heun. A flipped sign, a reversed grid, a missing
step or a corrector at the wrong time raise the error more than a hundredfold.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raev2.flow import interpolate
from raev2.sampler import noise_for, sample_latents
from raev2.spec import CFG, AutoGuidance, FlowSpec, InternalCFG, InternalGuidance, NoGuidance, SamplingSpec
from raev2.testing import GaussianWorld

STEPS = [10, 20, 40, 80, 160]
LABEL, NULL = {"label": torch.zeros(4, dtype=torch.int64)}, {"label": torch.ones(4, dtype=torch.int64)}
NOISE = noise_for(0, range(4), (2, 3, 3)).double()


def end_point(world, steps, solver="euler", guidance=None, cond=LABEL, weak=None):
    sampling = SamplingSpec(steps=steps, solver=solver, guidance=guidance or NoGuidance())
    return sample_latents(world, cond, NOISE, sampling, weak=weak)


@pytest.mark.parametrize(("solver", "order", "error_at_80"), [("euler", 1, 5e-2), ("heun", 2, 5e-3)])
@pytest.mark.parametrize("prediction", ["x", "velocity"])
@pytest.mark.parametrize("time_shift", [1.0, 3.0])
def test_solvers_have_their_order(solver, order, error_at_80, prediction, time_shift):
    world = GaussianWorld(flow=FlowSpec(prediction=prediction, time_shift=time_shift))
    exact = world.exact(NOISE, LABEL)
    errors = [(end_point(world, steps, solver) - exact).abs().max().item() for steps in STEPS]
    slope = -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    assert order - 0.25 < slope < order + 0.25, errors
    assert errors[3] < error_at_80


def test_world_is_the_conditional_expectation():
    """E[latents | z_t] and E[velocity | z_t] are the least-squares regressions on z_t."""
    torch.manual_seed(0)
    latents = 0.7 + 0.4 * torch.randn(400_000, 1, 1, 1, dtype=torch.float64)
    t = torch.full((len(latents),), 0.3, dtype=torch.float64)
    point = interpolate(latents, torch.randn_like(latents), t)
    cond = {"label": torch.zeros(len(latents), dtype=torch.int64)}
    for prediction, target in (("x", latents), ("velocity", point.velocity)):
        pred = GaussianWorld(flow=FlowSpec(prediction=prediction))(point.z_t, t, cond).pred
        residual = target - pred
        assert abs(residual.mean()) < 3e-3 and abs((residual * point.z_t).mean()) < 3e-3


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_guidance_extrapolates_the_mean(solver):
    """Predictions are affine in the mean, so guidance is the world with the extrapolated mean."""
    world = GaussianWorld(means=(0.7, -0.2), base_means=(0.5, -0.1))
    weak = GaussianWorld(means=(0.4, 0.0))

    def expected(mean):
        return end_point(GaussianWorld(means=(mean, 0.0)), 20, solver)

    def close(guidance, mean, weak=None):
        torch.testing.assert_close(end_point(world, 20, solver, guidance, weak=weak), expected(mean))

    close(CFG(scale=2.5), -0.2 + 2.5 * (0.7 + 0.2))
    close(InternalGuidance(scale=1.78), 0.5 + 1.78 * 0.2)
    close(AutoGuidance(scale=1.4, weak="-"), 0.4 + 1.4 * 0.3, weak)
    inner, inner_null = 0.5 + 1.5 * 0.2, -0.1 + 1.5 * -0.1
    close(InternalCFG(internal_scale=1.5, scale=2.0), inner_null + 2.0 * (inner - inner_null))


def test_label_selects_the_mean():
    world = GaussianWorld(means=(0.7, -0.2))
    difference = end_point(world, 160, "heun") - end_point(world, 160, "heun", cond=NULL)
    torch.testing.assert_close(difference, torch.full_like(difference, 0.9), rtol=0, atol=1e-3)
