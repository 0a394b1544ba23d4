from __future__ import annotations

import math

import pytest
import torch

from raev2.errors import DataError
from raev2.eval.distances import squared_mmd
from raev2_tasks.nwm.eval import inverse_dynamics
from raev2_tasks.nwm.eval.inverse_dynamics import InverseDynamics, fit, match_features
from raev2_tasks.nwm.eval.metrics import (
    bootstrap,
    clip_features,
    correlation,
    frechet,
    latent_distance,
    mean,
)

# Numbers.


def test_a_mean_has_an_interval_that_is_the_same_every_time():
    values = torch.randn(400)
    name, value, num, error, note = mean("psnr@1s", values)
    low, high, stderr = bootstrap(values, lambda drawn: drawn.mean(1))
    assert value == pytest.approx(float(values.double().mean())) and low < value < high
    assert stderr == error == pytest.approx(float(values.std() / 20), rel=0.1)
    assert (name, num, note) == ("psnr@1s", 400, f"95 % interval {low:.4g} to {high:.4g}")
    assert mean("psnr@1s", values) == (name, value, num, error, note)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="psnr@1s: not finite"):
        mean("psnr@1s", torch.tensor([1.0, math.nan]))


def test_a_correlation_is_pearsons():
    first = torch.randn(300)
    second = 2 * first + torch.randn(300)
    expected = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert correlation("turn_corr", first, second)[1] == pytest.approx(expected, abs=1e-6)
    assert correlation("turn_corr", first, -first)[1] == pytest.approx(-1)
    assert correlation("turn_corr", first, torch.ones(300))[1] == 0, "nothing follows from a constant"


def test_the_distance_of_latents_is_an_angle_at_each_place():
    latents = torch.randn(2, 64, 3, 3)
    assert latent_distance(latents, 5 * latents).abs().max() < 1e-6
    assert torch.allclose(latent_distance(latents, -latents), torch.full((2,), 2.0))
    assert (latent_distance(latents, torch.randn(2, 64, 3, 3)) - 1).abs().max() < 0.2


def test_clips_differ_in_flicker_alone():
    """The same frames in another order: only the last quarter of the vector, the spread of differences, tells."""
    walk = torch.arange(8.0).view(1, 8, 1).expand(5, 8, 2)
    flicker = walk[:, [0, 5, 2, 7, 4, 1, 6, 3]]
    smooth, nervous = clip_features(walk), clip_features(flicker)
    assert smooth.shape == (5, 8) and torch.allclose(smooth[:, :4], nervous[:, :4])
    assert (smooth[:, 6:] == 0).all() and (nervous[:, 6:] > 2).all()
    with pytest.raises(DataError, match="too short for a video distance; got 2; expected at least 3 frames"):
        clip_features(walk[:, :2])


def test_the_kernel_distance_is_unbiased_and_sees_a_shift():
    x, y = torch.randn(2000, 4), torch.randn(2000, 4)
    small = [squared_mmd(x[i : i + 50], y[i : i + 50]) for i in range(0, 2000, 50)]
    assert abs(sum(small) / len(small)) < 0.03, "also with few samples"
    assert squared_mmd(x, y + 0.5) > 0.2


def test_the_frechet_distance_of_the_same_frames_is_zero():
    features = torch.randn(100, 5)
    assert frechet("fd_micro@1s", features, features)[1] == pytest.approx(0, abs=1e-6)
    _, value, _, stderr, _ = frechet("fd_micro@1s", features + 1, features)
    assert value == pytest.approx(5, rel=1e-3) and stderr is not None


# Inverse dynamics.


def views(turns: torch.Tensor, zooms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of token maps (S, 8, 8, 16): a random scene, and the same turned by columns and pushed apart by `zooms`."""
    generator = torch.Generator().manual_seed(0)
    scene = torch.nn.functional.interpolate(
        torch.randn(len(turns), 16, 6, 24, generator=generator), (8, 48), mode="bicubic"
    )
    grid = torch.linspace(-1, 1, 8)

    def view(turn: torch.Tensor, zoom: torch.Tensor) -> torch.Tensor:
        columns = (grid / (1 + zoom[:, None]) * 8 - turn[:, None]) / 24
        rows = grid / (1 + zoom[:, None])
        where = torch.stack(torch.broadcast_tensors(columns[:, None], rows[:, :, None]), -1)
        return torch.nn.functional.grid_sample(scene, where, align_corners=True).permute(0, 2, 3, 1)

    return view(torch.zeros_like(turns), torch.zeros_like(zooms)), view(turns, zooms)


def test_motion_is_read_from_shifted_features(monkeypatch):
    monkeypatch.setattr(inverse_dynamics, "STEPS", 300)
    generator = torch.Generator().manual_seed(1)
    turns, zooms = 4 * torch.rand(2200, generator=generator) - 2, 0.5 * torch.rand(2200, generator=generator)
    first, second = views(turns, zooms)
    maps = {"first": first, "second": second}
    # "Images" are their own numbers, so that the encoder can be a table.
    frames = torch.arange(2200).view(-1, 1, 1, 1)
    features = match_features(first, second)
    assert features.shape == (2200, 3 * 9 * 2 * 4)
    inputs = torch.cat([features, torch.full((2200, 1), 0.5)], 1)
    motions = torch.stack([zooms, torch.zeros_like(zooms), turns], 1)
    tensors = fit(inputs[:2000], motions[:2000])
    assert all(torch.equal(value, tensors[name]) for name, value in fit(inputs[:2000], motions[:2000]).items())

    judge = InverseDynamics(
        lambda images: maps["first" if images.shape[1] == 1 else "second"][images[:, 0].flatten()], tensors
    )
    held_out = frames[2000:]
    shown = judge(held_out, held_out.expand(-1, 2, 1, 1), torch.full((200,), 0.5))
    assert torch.corrcoef(torch.stack([shown[:, 2], turns[2000:]]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([shown[:, 0], zooms[2000:]]))[0, 1] > 0.7
    still = judge(held_out, held_out, torch.full((200,), 0.5))
    assert still[:, 2].abs().mean() < 0.3, "equal frames show no turn"
