"""What enters the transformer besides the condition: latent patches, time, fixed positions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NUM_FREQUENCIES = 256


def patchify(latents: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N P"]:
    """Cut into patches, row by row; the values of a patch are ordered (channel, row, column)."""
    if patch_size == 1:
        return latents.flatten(2).transpose(1, 2)
    return F.pixel_unshuffle(latents, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Float[Tensor, "B N P"], patch_size: int, rows: int, cols: int) -> Float[Tensor, "B C H W"]:
    """Put predicted patches back; the values of a patch are ordered (row, column, channel)."""
    x = patches.unflatten(1, (rows, cols)).unflatten(-1, (patch_size, patch_size, -1))  # (B, rows, cols, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Linear map of each patch to a token: a convolution with kernel = stride = patch, computed as one product."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        """Tokens of patches from `patchify`."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def init_weights(self) -> None:
        """Xavier uniform over the flattened kernel, bias 0."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]


class WaveEmbed(nn.Module):
    """Embedding of real numbers x_s: MLP([x_s, sin(w_sf x_s), cos(w_sf x_s)]) with fixed angular frequencies w."""

    frequencies: Tensor

    def __init__(self, frequencies: Float[Tensor, "S F"], width: int, out_dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        num_scalars, num_waves = frequencies.shape
        self.mlp = nn.Sequential(
            nn.Linear(num_scalars * (1 + 2 * num_waves), width), nn.SiLU(), nn.Linear(width, out_dim)
        )

    def forward(self, x: Float[Tensor, "B S"]) -> Float[Tensor, "B O"]:
        """Embed; angles are computed in float32."""
        angles = (x.float()[..., None] * self.frequencies.float()).flatten(1)
        return self.mlp(torch.cat([x.float(), angles.sin(), angles.cos()], dim=1).to(self.frequencies.dtype))


def waves(shortest: float, longest: float, count: int = 8) -> Float[Tensor, "F"]:
    """Angular frequencies of log-spaced periods, in the unit of the number."""
    return 2 * math.pi / torch.logspace(math.log(shortest), math.log(longest), count, base=math.e, dtype=torch.float64)


class FourierEmbed(nn.Module):
    """Embedding of a number in [0, 1]: Linear(SiLU(Linear([sin a, cos a]))) with a = 2 pi t W, W ~ N(0, 1) fixed.

    W is a buffer: it is saved and loaded but not trained.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(NUM_FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Embed; angles are computed in float32."""
        angles = 2 * math.pi * t.float()[:, None] * self.frequencies.float()
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.frequencies.dtype))

    def init_weights(self) -> None:
        """W ~ N(0, 1), weights ~ N(0, 0.02), biases as PyTorch."""
        nn.init.normal_(self.frequencies)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
