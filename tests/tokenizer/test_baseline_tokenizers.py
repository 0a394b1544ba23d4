"""VAE and pixel tokenizers, with small random VAEs of every layout in use."""

import diffusers
import pytest
import torch

from raev2.errors import CheckpointError, SpecError
from raev2.spec import PixelSpec, VAESpec
from raev2.tokenizer.baselines import build_tokenizer, load_tokenizer
from raev2.tokenizer.rae import RAE

BLOCKS = {
    "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def save_vae(folder, kind):
    torch.manual_seed(0)
    if kind == "scale":
        model = diffusers.AutoencoderKL(latent_channels=4, scaling_factor=0.25, shift_factor=0.5, **BLOCKS)
    elif kind == "channel statistics":
        statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
        model = diffusers.AutoencoderKL(latent_channels=4, **statistics, **BLOCKS)
    elif kind == "batch norm":
        model = diffusers.AutoencoderKLFlux2(latent_channels=4, **BLOCKS)
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
    else:
        model = diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0, 0.1, 0.2, 0.3], latents_std=[1.0, 2.0, 1.0, 2.0],
        )  # fmt: skip
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("scale", (4, 16, 24)),
        ("channel statistics", (4, 16, 24)),
        ("batch norm", (16, 8, 12)),
        ("video", (4, 16, 24)),
    ],
)
def test_a_vae_encodes_and_decodes_as_its_own_model(tmp_path, kind, shape):
    model = save_vae(tmp_path / "vae", kind)
    tokenizer = build_tokenizer(VAESpec(name=str(tmp_path / "vae"), image_size=(32, 48)))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    latents = tokenizer.encode(images)
    assert tokenizer.latent_shape == shape
    assert latents.shape == (2, *shape)

    with torch.no_grad():  # what the model itself reconstructs, without our normalisation
        pixels = images[:, :, None] * 2 - 1 if kind == "video" else images * 2 - 1
        expected = model.decode(model.encode(pixels).latent_dist.mode()).sample
    expected = (expected[:, :, 0] if kind == "video" else expected) / 2 + 0.5
    torch.testing.assert_close(tokenizer.decode(latents, clamp=False), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokenizer.reconstruct(images), expected.clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_scale_and_shift_are_those_of_the_configuration(tmp_path):
    model = save_vae(tmp_path / "vae", "scale")
    tokenizer = build_tokenizer(VAESpec(name=str(tmp_path / "vae"), image_size=(32, 32)))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        mode = model.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(tokenizer.encode(images), (mode - 0.5) * 0.25)


def test_patches_of_a_batch_norm_vae_are_channel_then_row_then_column(tmp_path):
    model = save_vae(tmp_path / "vae", "batch norm")
    tokenizer = build_tokenizer(VAESpec(name=str(tmp_path / "vae"), image_size=(32, 32)))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        z = model.encode(images * 2 - 1).latent_dist.mode()
    channel = 2 * 4 + 1 * 2 + 0  # channel 2, second row, first column of a patch
    std = (model.bn.running_var[channel] + model.bn.eps).sqrt()
    expected = (z[0, 2, 1::2, 0::2] - model.bn.running_mean[channel]) / std
    torch.testing.assert_close(tokenizer.encode(images)[0, channel], expected)


def test_artefact_round_trip(tmp_path):
    save_vae(tmp_path / "vae", "scale")
    spec = VAESpec(name=str(tmp_path / "vae"), image_size=(32, 32))
    build_tokenizer(spec).save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").spec == spec
    with pytest.raises(CheckpointError, match="not an RAE.*load_tokenizer"):
        RAE.from_pretrained(tmp_path / "tokenizer")


def test_pixels_are_their_own_latents():
    tokenizer = build_tokenizer(PixelSpec(image_size=(8, 12)))
    images = torch.rand(2, 3, 8, 12)
    assert tokenizer.latent_shape == (3, 8, 12)
    assert tokenizer.encode(images).min() < 0
    torch.testing.assert_close(tokenizer.reconstruct(images), images)
    with pytest.raises(SpecError, match="floats in"):
        tokenizer.encode((images * 255).to(torch.uint8))


def test_errors_say_what_would_be_right(tmp_path):
    with pytest.raises(SpecError, match=r"unknown VAE.*'sdvae-em'.*sdvae-ema"):
        build_tokenizer(VAESpec(name="sdvae-em"))
    save_vae(tmp_path / "vae", "scale")
    with pytest.raises(SpecError, match=r"multiples of 2 pixels.*\[33, 32\].*\[32, 32\]"):
        build_tokenizer(VAESpec(name=str(tmp_path / "vae"), image_size=(33, 32)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="VAE .*empty: the weights are missing; got OSError"):
        build_tokenizer(VAESpec(name=str(tmp_path / "empty")))
