import json
import pickle

import pytest
import torch

from raev2.errors import CheckpointError
from raev2.tokenizer.latent_stats import LatentStatsAccumulator, check_same_encoder, denormalise, normalise

ENCODER = {"encoder": "tiny", "weights": "aa", "layers": [3], "grid": [2, 3]}


def latents(num=50):
    generator = torch.Generator().manual_seed(0)
    return 1000 + 0.1 * torch.randn(num, 4, 2, 3, generator=generator)  # a large mean: naive sums would fail


def accumulate(parts):
    accumulator = LatentStatsAccumulator(ENCODER, "data")
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
