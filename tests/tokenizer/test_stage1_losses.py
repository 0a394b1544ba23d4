import json

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raev2.errors import CheckpointError, SpecError
from raev2.spec import AdversarialSpec, EncoderSpec, FeatureLoss, LPIPSLoss
from raev2.tokenizer import losses
from raev2.tokenizer.discriminator import Discriminator, LocalNorm, Residual, _head, build_discriminator
from raev2.tokenizer.encoders import build_encoder
from raev2.tokenizer.losses import (
    EncoderFeatureLoss,
    adaptive_weight,
    augmentation,
    diffaug,
    hinge_loss,
    quantise_8bit,
    shared_layers,
)

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    save_file(VisionTransformer(**KWARGS).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit", "kwargs": KWARGS, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return build_encoder(EncoderSpec(name=str(tmp_path)), (4, 4))


def images(num=4, size=32, seed=0):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Reconstruction.


def test_feature_loss_is_the_mean_cosine_distance_and_zero_for_equal_images(encoder):
    loss = EncoderFeatureLoss(encoder, (0, 2))
    assert loss(images(), images()).item() == 0
    pairs = zip(encoder.layers_tokens(images(), (0, 2)), encoder.layers_tokens(images(seed=1), (0, 2)), strict=True)
    expected = sum((2 - 2 * torch.cosine_similarity(a, b, dim=-1)).mean() for a, b in pairs) / 2
    torch.testing.assert_close(loss(images(), images(seed=1)), expected)


def test_feature_loss_gradient_reaches_only_the_prediction(encoder):
    pred, target = images().requires_grad_(), images(seed=1).requires_grad_()
    EncoderFeatureLoss(encoder, (1,))(pred, target).backward()
    assert pred.grad.abs().sum() > 0 and target.grad is None
    assert list(EncoderFeatureLoss(encoder, (1,)).parameters()) == []


def test_one_pass_over_the_images_serves_tokenizer_and_perceptual_loss_of_the_same_encoder(encoder, monkeypatch):
    folder, passes = encoder.info.model_id, []
    tokenizer = build_encoder(EncoderSpec(name=folder, layers=(0, 1, 2), aggregate="mean"), (4, 4))
    loss = EncoderFeatureLoss(encoder, (0, 2))
    block_outputs = tokenizer.trunk.block_outputs
    monkeypatch.setattr(tokenizer.trunk, "block_outputs", lambda *args: passes.append(1) or block_outputs(*args))
    tokens, features = tokenizer.with_layers(images(seed=1), shared_layers(loss, tokenizer))
    assert passes == [1]
    assert torch.equal(tokens, tokenizer(images(seed=1)))
    assert torch.equal(loss(images(), images(seed=1), features), loss(images(), images(seed=1)))
    assert loss(images(), images(seed=1), features[::-1]) != loss(images(), images(seed=1)), "they are used"


def test_another_encoder_norm_grid_or_loss_shares_no_pass(encoder):
    folder, loss = encoder.info.model_id, EncoderFeatureLoss(encoder, (0, 2))
    assert shared_layers(loss, build_encoder(EncoderSpec(name=folder), (4, 4))) == (0, 2)
    assert shared_layers(loss, build_encoder(EncoderSpec(name=folder, norm="affine"), (4, 4))) == ()
    assert shared_layers(loss, build_encoder(EncoderSpec(name=folder, antialias=False), (4, 4))) == ()
    assert shared_layers(loss, build_encoder(EncoderSpec(name=folder), (8, 8))) == ()
    assert shared_layers(loss, build_encoder(EncoderSpec(name="micro"), (4, 4))) == ()
    assert shared_layers(nn.Identity(), encoder) == ()


def test_lpips_without_weights_says_what_to_do(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", refuse)
    with pytest.raises(
        CheckpointError, match=r"LPIPS \(VGG\).*no network.*vgg16-397923af.pth.*perceptual.kind=encoder"
    ):
        losses.build_perceptual_loss(LPIPSLoss(), (32, 32))


def test_lpips_accepts_values_outside_the_unit_range(monkeypatch):
    from torchmetrics.functional.image import lpips

    network = lpips._LPIPS(net="vgg", pretrained=False, pnet_rand=True)
    metric = type("Metric", (), {"net": network})
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", lambda **kwargs: metric)
    loss = losses.build_perceptual_loss(LPIPSLoss(), (32, 32))
    x = (images(1) * 3 - 1).requires_grad_()
    value = loss(x, images(1))
    value.backward()
    assert value.isfinite() and x.grad.abs().sum() > 0
    assert loss(images(1), images(1)).item() == 0


def test_losses_are_built_for_the_size_of_their_images(encoder):
    folder = encoder.info.model_id
    loss = losses.build_perceptual_loss(FeatureLoss(encoder=folder, layers=(0, 1)), (64, 130))
    assert loss.encoder.grid == (8, 16) and loss.layers == (0, 1)
    disc = build_discriminator(AdversarialSpec(encoder=folder, layers=(1,), kernel_size=3, input_size=40))
    assert disc(images()).shape == (4, 25)
    with pytest.raises(
        SpecError, match="not a multiple of the patch size of .*; got 61; expected a multiple of 8. Try 64"
    ):
        build_discriminator(AdversarialSpec(encoder=folder, layers=(1,), input_size=61))


# Adversary.


def test_hinge_and_generator_loss_by_hand():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))
    assert losses.generator_loss(fake).item() == 1.0


def test_adaptive_weight_balances_gradients_and_ignores_the_scale_of_the_adversary():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 1)
    pred = layer(images())
    rec_loss, gan_loss = pred.abs().mean(), pred.square().mean()
    rec, gan = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in (rec_loss, gan_loss))
    weights = [adaptive_weight(rec, scale * gan) for scale in (1.0, 100.0)]
    torch.testing.assert_close(weights[0], 100 * weights[1], rtol=1e-3, atol=0)
    torch.testing.assert_close((weights[0] * gan).norm(), rec.norm(), rtol=1e-4, atol=0)
    assert not weights[0].requires_grad
    assert adaptive_weight(rec, 1e-9 * gan, 10.0).item() == 10


def test_adaptive_weight_uses_the_gradients_of_all_processes(monkeypatch):
    own = torch.arange(1.0, 5)
    others = iter([own, 0.5 * own - own])  # of the other process: the mean is as long, or a quarter of it
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(next(others)))
    assert adaptive_weight(own, own).item() == pytest.approx(4, rel=1e-4)


def test_diffaug_follows_the_generator_and_keeps_the_gradient():
    x = images().requires_grad_()
    first, second, other = (diffaug(x, augmentation(len(x), generator(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == x.shape
    first.sum().backward()
    assert x.grad.abs().sum() > 0


def test_diffaug_moves_pixels_and_fills_with_grey():
    x = images(1, 16) * 2 - 1
    moved = losses._translate(x, torch.tensor([2]), torch.tensor([-1]))
    assert torch.equal(moved[0, :, :14, 1:], x[0, :, 2:, :15])
    assert torch.equal(moved[0, :, 14:], torch.zeros(3, 2, 16)) and torch.equal(moved[0, :, :, 0], torch.zeros(3, 16))
    shifts = losses._shifts(64, torch.linspace(0, 1, 1701))  # 1 itself is not drawn
    counts = torch.bincount(shifts[:-1] + 8)
    assert len(counts) == 17 and counts.min() >= 99 and counts.max() <= 101
    assert shifts[-1] == 8


def test_diffaug_colour_by_hand():
    draws = augmentation(2, generator(5))
    draws[:, :2] = 0.5  # no translation
    u = draws[:, 2:].T[:, :, None, None, None]
    x = 2 * images(2) - 1
    x = x + u[0] - 0.5
    x = x.mean(1, keepdim=True) * (1 - 2 * u[1]) + x * 2 * u[1]
    mean = x.mean((1, 2, 3), keepdim=True)
    expected = (mean * (0.5 - u[2]) + x * (u[2] + 0.5) + 1) / 2
    torch.testing.assert_close(diffaug(images(2), draws), expected)


def test_quantise_gives_8_bit_levels():
    levels = quantise_8bit(torch.tensor([-0.5, 0.0, 0.5, 0.999, 7.0]).expand(1, 3, 1, 5).clone().requires_grad_())
    assert torch.equal((levels * 255)[0, 0, 0], torch.tensor([0.0, 0.0, 128.0, 255.0, 255.0]))
    assert not levels.requires_grad


# Discriminator.


def test_heads_have_the_published_number_of_parameters():
    heads = nn.ModuleList([_head(384, 9) for _ in range(5)])
    assert sum(parameter.numel() for parameter in heads.parameters()) == 7_386_245


def test_discriminator_has_a_head_per_layer_and_keeps_the_trunk_out(encoder):
    model = Discriminator(AdversarialSpec(layers=(2, 0, 2), kernel_size=3), encoder)
    assert model(images()).shape == (4, 3 * 16)
    assert model(images(size=64)).shape == (4, 3 * 16)
    assert {name.split(".")[0] for name in model.state_dict()} == {"heads"}
    assert "heads.1.1.fn.0.parametrizations.weight.original" in model.state_dict()
    model.train()
    assert not encoder.training
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_discriminator_heads_see_raw_block_outputs(encoder):
    model = Discriminator(AdversarialSpec(layers=(1,), kernel_size=3), encoder).eval()
    (tokens,) = encoder.layers_tokens(images(), (1,), norm="none")
    torch.testing.assert_close(model(images()), model.heads[0](tokens.transpose(1, 2))[:, 0])


def test_local_norm_normalises_each_channel_of_each_sample():
    x = 3 + 2 * torch.randn(2, 5, 40, generator=generator())
    y = LocalNorm(5)(x)
    torch.testing.assert_close(y.mean(2), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(2, correction=0), torch.ones(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(LocalNorm(5)(x[:1]), y[:1])


def test_residual_keeps_the_variance():
    x = torch.ones(1, 2, 3)
    torch.testing.assert_close(Residual(nn.Identity())(x), x * 2**0.5)


def test_convolution_is_circular():
    head = _head(4, 3).eval()
    x = torch.randn(1, 4, 10, generator=generator())
    torch.testing.assert_close(head(x).roll(3, 2), head(x.roll(3, 2)))
