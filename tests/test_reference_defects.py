"""Known defects of the reference implementations: ours are right, and weights from there can be used as they were.

The table "Where defaults differ from the reference" in docs/conventions.md lists all of them. Every test here computes
what the reference does with a few lines of its own.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raev2.data import ImageDataset, to_float, to_uint8
from raev2.eval.image_pairs import FeatureDistance, psnr
from raev2.eval.protocols import ReconstructionEvaluator
from raev2.flow import flow_error, interpolate
from raev2.sampler import euler_step, time_grid
from raev2.spec import EncoderSpec, FlowSpec, MuonSpec, ScheduleSpec
from raev2.task import EvalContext
from raev2.tokenizer.encoder_table import ENCODERS, RGB_MEAN, RGB_STD
from raev2.tokenizer.encoders import aggregate_layers, build_encoder
from raev2.training.optim import build_optimizer, learning_rate, set_learning_rate
from raev2_tasks.convert.encoders import reference_encoder

CPU = torch.device("cpu")


# Pairs: RAEv2 gathers reconstructions in a shuffled order and originals in file order, before PSNR, SSIM and LPIPS.


class Pictures(ImageDataset):
    """Eleven different pictures, an awkward number for batches."""

    manifest, split, image_size = {"name": "pictures", "fingerprint": "f" * 64, "classes": []}, "val", (16, 16)
    preparation = "as they are"
    pictures = torch.randint(0, 256, (11, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> torch.Tensor:
        return self.pictures[index]

    def cond(self, index: int) -> dict:
        return {}


@pytest.mark.parametrize("order", ["as they are", "shuffled"])
def test_reconstructions_are_compared_with_their_own_originals(order):
    originals = Pictures.pictures
    perfect = originals.clone()
    shuffled = perfect[torch.randperm(len(perfect), generator=torch.Generator().manual_seed(42))]
    found = psnr(perfect if order == "as they are" else shuffled, originals)
    assert (found.min() > 60) == (order == "as they are"), "a permutation of one side must show"


def test_the_reconstruction_protocol_pairs_by_index(tiny_spec, tmp_path):
    class Perfect:
        def reconstruct(self, images):
            return images

    class NoFeatures:
        name, dim, preparation, fingerprint = "none", 3, "none", "0" * 64

        def __call__(self, images_u8):
            return images_u8.float().mean(dim=(2, 3))

    def pairs(name, device):
        return FeatureDistance(name, lambda images: [images.flatten(2)], device)

    evaluator = ReconstructionEvaluator(
        "reconstruction", ["none"], build=lambda name, device: NoFeatures(), build_pairs=pairs, perceptual=("pixels",)
    )
    context = EvalContext(tiny_spec, Perfect(), lambda split: Pictures(), CPU, tmp_path, None)
    results = {result.name: result.value for result in evaluator.run(context)}
    assert results["psnr"] > 60 and results["ssim"] > 0.999


# Eight bits: both evaluations truncate, which darkens by half a level on average.


def test_images_are_rounded_to_eight_bits():
    levels = torch.arange(256, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    decoded = to_float(levels) + (torch.rand(100, 256, generator=generator) - 0.5) * (0.98 / 255)
    assert torch.equal(to_uint8(decoded), levels.expand(100, 256))
    truncated = (decoded.clamp(0, 1) * 255).to(torch.uint8)
    assert (truncated.float() - levels).mean() < -0.4


# Frozen encoder: the training loop of RAEv2 puts the encoder into training mode with the rest.


class Jitter(nn.Module):
    """What DINOv3 does in training mode, in spirit: random features."""

    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


def test_a_training_parent_leaves_the_encoder_alone():
    encoder = build_encoder(EncoderSpec(name="micro"), (8, 8))
    blocks = encoder.trunk.model.blocks
    blocks[2] = nn.Sequential(blocks[2], Jitter().eval())
    parent = nn.Module()
    parent.encoder, parent.decoder = encoder, nn.Dropout(0.5)
    images = torch.rand(2, 3, 64, 64)
    before = encoder(images)
    parent.train()
    assert parent.decoder.training and torch.equal(encoder(images), before)
    assert not list(parent.parameters()), "the parent does not train it either"
    blocks.train()  # what a parent would do in the reference
    assert not torch.equal(encoder(images), before)


# Clamp: RAEv2 divides by max(t, 0.05), in the loss and in the sampler.


def reference_sampler(predict, z_t, grid, t_min):
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        z_t = z_t - (t - t_next) * (z_t - predict(z_t, t, {})) / max(t, t_min)
    return z_t


@pytest.mark.parametrize("steps", [50, 154, 400])
def test_no_noise_is_left_at_the_end(steps):
    clean, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    grid = time_grid(steps, time_shift=8.0)

    def predict(z_t, t, cond):
        return clean

    def run(flow):
        z_t = noise
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            z_t = euler_step(predict, z_t, t, t_next, {}, flow)
        return z_t

    assert torch.equal(run(FlowSpec()), clean)
    expected = reference_sampler(predict, noise, grid, 0.05)
    torch.testing.assert_close(run(FlowSpec(reference_clamp=True)), expected, atol=1e-5, rtol=0)
    assert ((expected - clean).abs().max() > 1e-3) == (steps >= 154), "what the reference leaves"


def test_velocity_targets_are_not_scaled_near_the_data():
    latents, noise, t = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0.01, 0.04, 0.5])
    point = interpolate(latents, noise, t)
    flow = FlowSpec(prediction="velocity")
    assert flow_error(noise - latents, point, latents, flow).max() == 0
    theirs = (point.z_t - latents) / t.clamp(min=0.05).view(-1, 1, 1, 1)
    assert flow_error(theirs, point, latents, flow)[:2].max() > 0.1
    assert flow_error(theirs, point, latents, flow.replace(reference_clamp=True)).max() < 1e-9


# Resume: the optimizer of RAEv2 takes its first step after a resume with the learning rate of the start.


def test_the_first_step_after_a_resume_has_the_learning_rate_of_the_schedule():
    schedule = ScheduleSpec(lr=2e-4, final_lr=2e-5, decay="linear", decay_end_images=100)

    def network():
        torch.manual_seed(0)
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8, bias=False)]), "head": nn.Linear(8, 2)})

    def step(model, optimizer, images):
        set_learning_rate(optimizer, learning_rate(schedule, images, 100))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        torch.manual_seed(images)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return [after.detach() - b for after, b in zip(model.parameters(), before, strict=True)]

    model = network()
    optimizer = build_optimizer(model, MuonSpec(), schedule.lr)
    for images in (0, 50):
        step(model, optimizer, images)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    expected = step(model, optimizer, 100)

    resumed = network()
    resumed.load_state_dict(weights)
    fresh = build_optimizer(resumed, MuonSpec(), schedule.lr)
    fresh.load_state_dict(state)
    found = step(resumed, fresh, 100)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {group["lr"] for group in fresh.param_groups} == {2e-5}
    at_start = 0.2 * 2e-4  # what elements change by at the learning rate of the start
    assert found[0].square().mean().sqrt() < at_start / 5


# SigLIP-2: RAEv2 normalises its pixels with ImageNet statistics.


def siglip_folder(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=16, image_size=64
    )
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    return folder


def test_siglip2_sees_the_pixels_it_was_trained_with():
    for name, info in ENCODERS.items():
        if name.startswith("siglip2"):
            assert info.mean == info.std == (0.5, 0.5, 0.5)
    assert reference_encoder("siglip2-vit-so400m").name == "siglip2-so400m"


def test_a_folder_that_states_other_pixels_reproduces_the_reference(tmp_path):
    images = torch.rand(2, 3, 64, 64)
    folders = {"half": ((0.5,) * 3, (0.5,) * 3), "rgb": (RGB_MEAN, RGB_STD)}
    encoders = {
        name: build_encoder(EncoderSpec(name=str(siglip_folder(tmp_path / name, *pixels)), norm="affine"), (4, 4))
        for name, pixels in folders.items()
    }
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in folders["rgb"])
    torch.testing.assert_close(encoders["rgb"].preprocess(images), (images - mean) / std)
    # The same network: only the pixels differ.
    same = ((images - mean) / std) * 0.5 + 0.5
    torch.testing.assert_close(encoders["rgb"](images), encoders["half"](same), atol=1e-4, rtol=1e-4)
    assert encoders["rgb"].fingerprint() != encoders["half"].fingerprint()


# Resizing: neither reference antialiases.


def test_shrinking_without_antialiasing_reproduces_the_reference():
    images = torch.rand(1, 3, 150, 150)
    theirs = F.interpolate(images, (64, 64), mode="bicubic", align_corners=False)
    encoder = build_encoder(EncoderSpec(name="micro", antialias=False), (8, 8))
    torch.testing.assert_close(encoder.preprocess(images) * encoder.std + encoder.mean, theirs)
    ours = build_encoder(EncoderSpec(name="micro"), (8, 8))
    assert (ours.preprocess(images) - encoder.preprocess(images)).abs().max() > 0.1
    assert ours.fingerprint() != encoder.fingerprint(), "statistics of the one are refused with the other"
    same = torch.rand(1, 3, 64, 64)
    assert torch.equal(ours.preprocess(same), encoder.preprocess(same))


# Layers: described as a sum; the released DINOv3 tokenizers take a mean and add the token mean of the last layer.


def test_the_formula_of_the_released_tokenizers():
    layers = [torch.randn(2, 4, 8) for _ in range(3)]
    theirs = (layers[0] + layers[1] + layers[2]) / 3 + layers[2].mean(dim=1, keepdim=True)
    spec = reference_encoder("dinov3mls-vit-l16[layers=11.17.23]")
    torch.testing.assert_close(aggregate_layers(layers, spec.aggregate, spec.pooled_term), theirs)
    assert EncoderSpec(name="micro").aggregate == "sum" and not EncoderSpec(name="micro").pooled_term
