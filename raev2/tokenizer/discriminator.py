"""Discriminator on frozen features: small heads on patch tokens of several blocks of a vision encoder.

Source: StyleGAN-T's discriminator, in the form RAE uses
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from raev2.errors import SpecError
from raev2.shapes import Images
from raev2.spec import AdversarialSpec
from raev2.tokenizer.encoders import FrozenEncoder, build_encoder_for_pixels

Features = Float[Tensor, "B D N"]


class Discriminator(nn.Module):
    """Images in [0, 1] -> logits (B, heads * N), large for real ones.

    One head per entry of the spec's `layers`. The published discriminators also have a first head that sees the last
    block a second time; to load one, list that block twice: layers=(11, 2, 5, 8, 11).

    Parameters and state are those of the heads; the trunk is frozen and not saved.
    """

    def __init__(self, spec: AdversarialSpec, encoder: FrozenEncoder) -> None:
        super().__init__()
        self.spec, self.encoder = spec, encoder
        self.heads = nn.ModuleList([_head(encoder.width, spec.kernel_size) for _ in spec.layers])

    def forward(self, images: Images) -> Float[Tensor, "B HN"]:
        """Logits of all heads side by side; gradient flows to the images."""
        if tuple(images.shape[2:]) != self.encoder.input_size:
            images = F.interpolate(images, self.encoder.input_size, mode="bilinear", align_corners=False)
        taps = self.encoder.layers_tokens(images, self.spec.layers, norm="none")
        logits = [head(tokens.transpose(1, 2)) for head, tokens in zip(self.heads, taps, strict=True)]
        return torch.cat(logits, dim=2).squeeze(1)


def build_discriminator(spec: AdversarialSpec) -> Discriminator:
    """The discriminator of a spec, with its trunk built for `input_size` pixels."""
    encoder = build_encoder_for_pixels(spec.encoder, (spec.input_size, spec.input_size))
    if encoder.input_size[0] != spec.input_size:
        raise SpecError(
            "adversarial.input_size", f"not a multiple of the patch size of {spec.encoder}", got=spec.input_size,
            expected=f"a multiple of {encoder.patch_size}", hint=f"Try {encoder.input_size[0]}.",
        )  # fmt: skip
    return Discriminator(spec, encoder)


class LocalNorm(nn.Module):
    """Normalise each channel of each sample over its tokens, in float32, then scale and shift.

    This is batch normalisation with a virtual batch of one: no image sees another.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Features) -> Features:
        """Population variance, eps 1e-6."""
        y = x.float()
        var, mean = torch.var_mean(y, dim=2, keepdim=True, correction=0)
        y = (y - mean) * torch.rsqrt(var + 1e-6)
        return (y * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2), which keeps the variance."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Features) -> Features:
        """Same shape in and out."""
        return (self.fn(x) + x) / math.sqrt(2)


def _head(width: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        _block(width, 1), Residual(_block(width, kernel_size)), spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)
    )


def _block(width: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv, eps=1e-12), LocalNorm(width), nn.LeakyReLU(0.2))
