"""Losses of tokenizer training: pixels, perception, adversary, and the weight between them.

    loss = l1_loss + perceptual weight * perceptual + adversarial weight * adaptive_weight * generator_loss

All images are in [0, 1]; reconstructions are not clamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raev2.files.assets import LPIPS_WEIGHTS
from raev2.shapes import Images, Tokens
from raev2.spec import FeatureLoss, LPIPSLoss
from raev2.tokenizer.encoders import FrozenEncoder, build_encoder_for_pixels
from raev2.training import dist

Scalar = Float[Tensor, ""]
Logits = Float[Tensor, "B N"]
NO_DOWNLOAD = "Or choose the loss that needs no download: tokenizer_training.perceptual.kind=encoder"
LPIPS_LOSS = replace(LPIPS_WEIGHTS["vgg"], note=NO_DOWNLOAD)


# Reconstruction


def l1_loss(images_pred: Images, images: Images) -> Scalar:
    """Mean absolute difference of pixels."""
    return F.l1_loss(images_pred, images)


def build_perceptual_loss(spec: LPIPSLoss | FeatureLoss, image_size: tuple[int, int]) -> nn.Module:
    """The module (images_pred, images) -> scalar of a spec; `image_size` is height and width in pixels."""
    if isinstance(spec, LPIPSLoss):
        return LPIPS()
    return EncoderFeatureLoss(build_encoder_for_pixels(spec.encoder, image_size), spec.layers)


class EncoderFeatureLoss(nn.Module):
    """Distance of unit-normalised tokens of a frozen encoder.

    mean over layers, images and tokens of || u(f_pred) - u(f) ||^2 = 2 - 2 cos, with u(f) = f / (||f|| + 1e-10)
    """

    def __init__(self, encoder: FrozenEncoder, layers: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.layers = encoder, tuple(layers)

    def forward(self, images_pred: Images, images: Images, targets: Sequence[Tokens] = ()) -> Scalar:
        """Gradient flows to `images_pred` only; `targets`: the tokens of `images`, where another pass made them."""
        if not targets:
            with torch.no_grad():
                targets = self.encoder.layers_tokens(images, self.layers)
        predictions = self.encoder.layers_tokens(images_pred, self.layers)
        distances = [
            (_unit(prediction) - _unit(target)).square().sum(dim=2).mean()
            for prediction, target in zip(predictions, targets, strict=True)
        ]
        return torch.stack(distances).mean()


def shared_layers(perceptual: nn.Module, encoder: FrozenEncoder) -> tuple[int, ...]:
    """Blocks of this very encoder that the loss compares, so that one pass over the images serves both; or none."""
    if not isinstance(perceptual, EncoderFeatureLoss):
        return ()
    own: dict[str, None] = dict.fromkeys(("layers", "aggregate", "pooled_term"))
    same = {**perceptual.encoder.fingerprint(), **own} == {**encoder.fingerprint(), **own}
    return perceptual.layers if same else ()


class LPIPS(nn.Module):
    """LPIPS with VGG-16, version 0.1, mean over the batch; the network is torchmetrics'."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg")
        except Exception as error:  # download and file errors
            raise LPIPS_LOSS.error(error) from error
        # The network and not the metric: the metric insists on values in [0, 1] and accumulates over batches.
        self.net = metric.net.eval().requires_grad_(False)

    def forward(self, images_pred: Images, images: Images) -> Scalar:
        """Gradient flows to `images_pred`."""
        return self.net(images_pred.float(), images.float(), normalize=True).mean()


def _unit(tokens: Tokens) -> Tokens:
    tokens = tokens.float()
    return tokens / (torch.linalg.vector_norm(tokens, dim=2, keepdim=True) + 1e-10)


# Adversary


def generator_loss(fake_logits: Logits) -> Scalar:
    """-mean D(fake)."""
    return -fake_logits.float().mean()


def hinge_loss(real_logits: Logits, fake_logits: Logits) -> Scalar:
    """Discriminator: (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(rec_grad: Tensor, gan_grad: Tensor, max_weight: float = 1e4) -> Scalar:
    """Weight that makes both losses pull equally hard on the last layer W of the decoder; detached.

    clamp(||d rec_loss / dW|| / (||d gan_loss / dW|| + 1e-6), 0, max_weight)

    rec_grad, gan_grad   gradients of the two losses with respect to W, over the images of this process

    The gradients are those of all processes, so the weight is the same everywhere and for any number of them (in RAEv2
    each process has its own).

    Source: VQGAN, equation 7, on the last layer
    """
    rec_norm, gan_norm = (dist.mean_over_processes(gradient).norm() for gradient in (rec_grad, gan_grad))
    return (rec_norm / (gan_norm + 1e-6)).clamp(0, max_weight)


# Differentiable augmentation


def augmentation(batch_size: int, generator: torch.Generator) -> Float[Tensor, "B 5"]:
    """The draws of `diffaug`, from U[0, 1): two for the translation, three for the colour of each sample."""
    return torch.rand(batch_size, 5, generator=generator, device=generator.device)


def diffaug(images: Images, draws: Float[Tensor, "B 5"]) -> Images:
    """Random translation and colour before the discriminator, per sample, differentiable.

    With signed pixels x = 2 * images - 1 and draws u from U[0, 1) (`augmentation`):

    translation   by integers up to 1/8 of each side; what comes in is 0, which is mid-grey
    brightness    x + u - 1/2
    saturation    mean_c + (x - mean_c) * 2 u            mean_c: over the channels of a pixel
    contrast      mean + (x - mean) * (u + 1/2)          mean: over the image

    Source: Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training, policy 'color,translation'
    """
    height, width = images.shape[2:]
    x = 2 * images.float() - 1
    x = _translate(x, _shifts(height, draws[:, 0]), _shifts(width, draws[:, 1]))
    u = draws[:, 2:].T[:, :, None, None, None].to(x)
    x = x + u[0] - 0.5
    mean_c = x.mean(dim=1, keepdim=True)
    x = mean_c + (x - mean_c) * 2 * u[1]
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (u[2] + 0.5)
    return (x + 1) / 2


def _shifts(size: int, u: Tensor) -> Tensor:
    """Whole pixels from -size / 8 to size / 8, each as likely as the others."""
    limit = round(size / 8)
    return (u * (2 * limit + 1)).long().clamp(max=2 * limit) - limit


def _translate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move every image by its own number of rows and columns; zeros come in."""
    source_row = torch.arange(x.shape[2], device=x.device) + rows.to(x.device)[:, None]  # (B, H)
    source_column = torch.arange(x.shape[3], device=x.device) + columns.to(x.device)[:, None]  # (B, W)
    inside = ((source_row >= 0) & (source_row < x.shape[2]))[:, None, :, None]
    inside = inside & ((source_column >= 0) & (source_column < x.shape[3]))[:, None, None, :]
    row = source_row.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    column = source_column.clamp(0, x.shape[3] - 1)[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1)
    return x.gather(2, row).gather(3, column) * inside


def quantise_8bit(images: Images) -> Images:
    """Clamp to [0, 1] and round to 8 bits, so that fakes are no finer than real images. No gradient."""
    return (images.detach().clamp(0, 1) * 255).round() / 255
