from __future__ import annotations

import math

import pytest
import torch

from raev2.batch import ModelOutput
from raev2.errors import SpecError
from raev2.flow import (
    flow_error,
    interpolate,
    sample_t,
    shift_time,
    to_latents,
    to_velocity,
    training_loss,
)
from raev2.spec import FlowSpec

VELOCITY, X = FlowSpec(prediction="velocity"), FlowSpec(prediction="x")


def random_point(t, dtype=torch.float64):
    torch.manual_seed(0)
    latents, noise = torch.randn(2, len(t), 2, 3, 3, dtype=dtype)
    return latents, noise, interpolate(latents, noise, torch.tensor(t, dtype=dtype))


def test_path_runs_from_data_to_noise():
    latents, noise, point = random_point([0.0, 1.0, 0.25])
    assert torch.equal(point.z_t[0], latents[0]) and torch.equal(point.z_t[1], noise[1])
    torch.testing.assert_close(point.z_t[2], 0.75 * latents[2] + 0.25 * noise[2])
    step = interpolate(latents, noise, point.t + 1e-3)
    torch.testing.assert_close((step.z_t - point.z_t) / 1e-3, point.velocity)


def test_shift_adds_to_the_logit():
    u = torch.rand(1000, dtype=torch.float64) * 0.98 + 0.01
    t = shift_time(u, 8.0)
    torch.testing.assert_close(t.logit() - u.logit(), torch.full_like(u, math.log(8.0)), rtol=0, atol=1e-6)
    assert shift_time(torch.tensor([0.0, 1.0]), 8.0).tolist() == [0.0, 1.0]
    assert torch.equal(shift_time(u, 1.0), u)
    assert (shift_time(u.sort().values, 8.0).diff() > 0).all()


def test_training_times_are_shifted_logit_normal():
    generator = torch.Generator().manual_seed(0)
    t = sample_t(200_000, FlowSpec(time_mean=0.2, time_std=0.8), 8.0, generator, "cpu").double()
    assert t.logit().mean().item() == pytest.approx(0.2 + math.log(8.0), abs=0.01)
    assert t.logit().std().item() == pytest.approx(0.8, abs=0.01)
    again = sample_t(200_000, FlowSpec(time_mean=0.2, time_std=0.8), 8.0, torch.Generator().manual_seed(0), "cpu")
    assert torch.equal(again.double(), t)


@pytest.mark.parametrize("t", [1e-6, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("as_number", [True, False])
def test_conversions_go_round(t, as_number):
    latents, _, point = random_point([t, t])
    time = t if as_number else point.t
    tolerance = {"rtol": 0, "atol": 1e-15 / t + 1e-12}
    torch.testing.assert_close(to_velocity(latents, point.z_t, time, X), point.velocity, **tolerance)
    torch.testing.assert_close(to_latents(point.velocity, point.z_t, time, VELOCITY), latents)
    assert to_velocity(point.velocity, point.z_t, time, VELOCITY) is point.velocity
    assert to_latents(latents, point.z_t, time, X) is latents


def test_reference_clamp_divides_by_at_least_min_t():
    latents, _, point = random_point([0.01, 0.5])
    clamped = to_velocity(latents, point.z_t, point.t, FlowSpec(reference_clamp=True))
    torch.testing.assert_close(clamped[0], point.velocity[0] * 0.01 / 0.05)
    torch.testing.assert_close(clamped[1], point.velocity[1])


def test_perfect_prediction_has_no_loss():
    latents, _, point = random_point([0.01, 0.5], torch.float32)
    assert not flow_error(latents, point, latents, X).any()
    assert not flow_error(point.velocity, point, latents, VELOCITY).any()


def test_x_error_is_the_velocity_error():
    """Above min_t both predictions are penalised alike; below, the weight stops at 1 / min_t^2."""
    latents, _, point = random_point([0.5, 0.01])
    pred = latents + 0.3
    velocity_pred = to_velocity(pred, point.z_t, point.t, X)
    error = flow_error(pred, point, latents, X)
    torch.testing.assert_close(error[0], flow_error(velocity_pred, point, latents, VELOCITY)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error[1], torch.full_like(error[1], (0.3 / 0.05) ** 2), rtol=1e-5, atol=1e-5)


def test_total_is_the_weighted_sum_of_the_terms():
    latents, _, point = random_point([0.3, 0.6], torch.float32)
    hidden, target = torch.randn(2, 2, 9, 4)
    output = ModelOutput(latents + 1, latents - 2, hidden)
    losses = training_loss(output, point, latents, X, base_weight=0.5, repa_target=target, repa_weight=0.25)
    torch.testing.assert_close(losses.full, 1 / point.t.square())
    torch.testing.assert_close(losses.base, 4 / point.t.square())
    torch.testing.assert_close(losses.repa, (hidden - target).square().mean((1, 2)))
    expected = losses.full.mean() + 0.5 * losses.base.mean() + 0.25 * losses.repa.mean()
    torch.testing.assert_close(losses.total, expected)


def test_repa_by_cosine_is_one_minus_half_the_squared_distance_of_unit_tokens():
    """Closed form: |a - b|^2 = 2 - 2 cos for unit vectors; lengths do not count."""
    latents, _, point = random_point([0.3, 0.6], torch.float32)
    hidden, target = torch.randn(2, 2, 9, 4)
    output = ModelOutput(latents, None, 3 * hidden)
    losses = training_loss(output, point, latents, X, repa_target=target, repa_cosine=True)
    unit, unit_target = (tokens / tokens.norm(dim=-1, keepdim=True) for tokens in (hidden, target))
    distance = (unit - unit_target).square().sum(-1).mean(1)
    torch.testing.assert_close(losses.repa, distance / 2 - 1)
    torch.testing.assert_close(losses.total, losses.full.mean() + 0.5 * (distance / 2 - 1).mean())


def test_terms_that_the_network_lacks_are_absent():
    latents, _, point = random_point([0.3], torch.float32)
    losses = training_loss(ModelOutput(latents), point, latents, X)
    assert losses.base is None and losses.repa is None
    with pytest.raises(SpecError, match="no REPA projector"):
        training_loss(ModelOutput(latents), point, latents, X, repa_target=torch.zeros(1, 9, 4))


def test_loss_is_computed_in_float32():
    latents, _, point = random_point([0.3], torch.float32)
    assert flow_error((latents + 1).bfloat16(), point, latents, X).dtype == torch.float32
