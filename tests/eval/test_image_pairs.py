from __future__ import annotations

import math

import pytest
import torch

from raev2.errors import CheckpointError, DataError
from raev2.eval.image_pairs import FeatureDistance, build_pair_distance, psnr, ssim

CPU = torch.device("cpu")


def noise(batch: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_psnr_is_the_closed_form_for_each_image():
    reference = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    images = torch.stack([reference[0] + 10, reference[1] + 51])
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 51)]
    assert psnr(images, reference).tolist() == pytest.approx(expected, abs=1e-4)


def test_identical_images_score_the_maximum():
    images = noise()
    assert psnr(images, images).tolist() == [100.0] * 3
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3)


def test_scores_belong_to_their_pair_and_not_to_the_batch():
    images, reference = noise(), noise(seed=1)
    reference[1] = images[1]
    for score in (psnr, ssim):
        together = score(images, reference)
        alone = torch.cat([score(images[i : i + 1], reference[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone)
        assert together.argmax() == 1


def test_ssim_falls_with_noise_and_is_one_number_for_one_image():
    flat = torch.arange(32, dtype=torch.uint8).mul(8).expand(1, 3, 32, 32).contiguous()
    little, much = flat + noise(1) // 32, (flat // 2 + noise(1) // 2)
    assert ssim(little, flat).shape == (1,)
    assert ssim(flat, flat) > ssim(little, flat) > ssim(much, flat)


def test_feature_distance_is_two_minus_two_cos_and_carries_its_own_name():
    def tokens(images: torch.Tensor) -> list[torch.Tensor]:
        mean = images.mean((2, 3))  # the colour is the feature
        return [torch.stack([mean, mean], 1), 5 * mean[:, None]]

    distance = FeatureDistance("toy", tokens, CPU)
    red, green = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    red[:, 0], green[0, 1], green[1, 0] = 200, 90, 90
    assert distance.name == "feature_distance_toy"
    assert distance(red, green).tolist() == pytest.approx([2.0, 0.0], abs=1e-6)


def test_lpips_without_weights_is_an_error_and_never_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"LPIPS \(VGG\): the weights are missing; expected .*vgg16-397923af.pth"):
        build_pair_distance("lpips_vgg", CPU)
    for name in ("lpips", "lpips_resnet", "dreams"):
        with pytest.raises(DataError, match="unknown perceptual distance"):
            build_pair_distance(name, CPU)
