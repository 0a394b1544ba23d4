import json
import pickle

import pytest
import torch

from raev2.errors import CheckpointError
from raev2.tokenizer.latent_stats import (
    LatentStatsAccumulator,
    check_same_encoder,
    denormalise,
    mix_channels,
    normalise,
    whitening,
)

ENCODER = {"encoder": "tiny", "weights": "aa", "layers": [3], "grid": [2, 3]}


def latents(num=50):
    generator = torch.Generator().manual_seed(0)
    return 1000 + 0.1 * torch.randn(num, 4, 2, 3, generator=generator)  # a large mean: naive sums would fail


def accumulate(parts, with_cov=False):
    accumulator = LatentStatsAccumulator(ENCODER, "data", with_cov=with_cov)
    for part in parts:
        accumulator.update(part)
    return accumulator


def test_streamed_statistics_equal_one_pass():
    stats = accumulate(latents().split([1, 7, 30, 12])).result()
    values = latents().double()
    torch.testing.assert_close(stats.mean, values.mean(0).float())
    torch.testing.assert_close(stats.var, values.var(0, correction=0).float())
    assert (stats.num_images, stats.encoder, stats.data) == (50, ENCODER, "data")
    assert stats.mean.dtype == stats.var.dtype == torch.float32


def test_merged_processes_equal_one_pass():
    first, second = accumulate([latents()[:20]]), accumulate([latents()[20:]])
    empty = LatentStatsAccumulator(ENCODER)
    first.merge(pickle.loads(pickle.dumps(second)))  # as it comes from another process
    first.merge(empty)
    one_pass = accumulate([latents()]).result()
    torch.testing.assert_close(first.result().mean, one_pass.mean)
    torch.testing.assert_close(first.result().var, one_pass.var)
    assert first.num_images == 50


def test_another_encoder_is_refused():
    other = {**ENCODER, "weights": "bb"}
    with pytest.raises(CheckpointError, match="computed with another encoder; got weights=bb; expected weights=aa"):
        check_same_encoder(accumulate([latents()]).result().encoder, other)
    with pytest.raises(CheckpointError, match="another encoder"):
        accumulate([latents()]).merge(LatentStatsAccumulator(other))


def test_the_name_of_the_encoder_and_a_json_round_trip_do_not_matter():
    stats = accumulate([latents()]).result()
    check_same_encoder(stats.encoder, {**json.loads(json.dumps(ENCODER)), "encoder": "/another/folder"})


def test_normalise_and_denormalise():
    stats = accumulate([latents()]).result()
    normalised = normalise(latents(), stats.mean, stats.var)
    torch.testing.assert_close(normalised.mean(0), torch.zeros(4, 2, 3), atol=2e-3, rtol=0)
    torch.testing.assert_close(denormalise(normalised, stats.mean, stats.var), latents())
    known = normalise(torch.full((1, 1, 1, 1), 5.0), torch.ones(1, 1, 1), torch.full((1, 1, 1), 4 - 1e-5))
    assert known.item() == pytest.approx(2)


def test_no_images_is_an_error():
    with pytest.raises(CheckpointError, match="no images were added"):
        LatentStatsAccumulator(ENCODER).result()


# Whitening.


def correlated(num=400):
    """Channels that are mixed, with a mean of their own at each position."""
    generator = torch.Generator().manual_seed(1)
    sources = torch.randn(num, 4, 2, 3, generator=generator) * torch.tensor([3.0, 1.0, 0.3, 0.1])[:, None, None]
    mixing = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    return mix_channels(sources, mixing) + 10 * torch.randn(4, 2, 3, generator=generator)


def covariance(latents):
    """By torch.cov at each position, then averaged: another way than the product's."""
    return torch.stack([torch.cov(at.T.double(), correction=0) for at in latents.flatten(2).unbind(2)]).mean(0)


def test_covariance_streamed_and_merged_equals_that_of_torch():
    expected = covariance(correlated()).float()
    streamed = accumulate(correlated().split([1, 99, 300]), with_cov=True)
    torch.testing.assert_close(streamed.result().cov, expected)
    first, second = (accumulate([part], with_cov=True) for part in correlated().split([250, 150]))
    first.merge(pickle.loads(pickle.dumps(second)))
    first.merge(LatentStatsAccumulator(ENCODER, with_cov=True))
    torch.testing.assert_close(first.result().cov, expected)
    assert accumulate([correlated()]).result().cov is None


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_direction_of_variance_v_gets_v_to_the_power_of_what_is_left(share):
    stats = accumulate([correlated()], with_cov=True).result()
    whitener, colourer = (matrix.float() for matrix in whitening(stats.cov, share))
    whitened = mix_channels(correlated() - stats.mean, whitener)
    expected = torch.linalg.eigvalsh(covariance(correlated())) ** (1 - share)
    found = covariance(whitened)
    torch.testing.assert_close(torch.linalg.eigvalsh(found), expected / expected.mean(), rtol=1e-3, atol=1e-4)
    assert found.diag().mean().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(mix_channels(whitened, colourer) + stats.mean, correlated(), rtol=1e-4, atol=1e-4)


def test_a_channel_that_never_varies_is_not_blown_up():
    latents = torch.cat([correlated(), torch.ones(400, 1, 2, 3)], 1)
    stats = accumulate([latents], with_cov=True).result()
    whitener, colourer = (matrix.float() for matrix in whitening(stats.cov, 1.0))
    assert whitener.abs().max() < 1e3
    whitened = mix_channels(latents - stats.mean, whitener)
    torch.testing.assert_close(mix_channels(whitened, colourer) + stats.mean, latents, rtol=1e-4, atol=1e-4)


def test_channels_are_mixed_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mix_channels(correlated(), torch.eye(4))
    assert torch.equal(mixed, correlated())
