"""ViT pixel decoder: latent tokens -> images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raev2.errors import SpecError
from raev2.nn import attention, sincos_2d, unpatchify, unpatchify_overlapping
from raev2.shapes import Images, Tokens
from raev2.spec import DecoderSpec

NORM_EPS = 1e-12


class ViTDecoder(nn.Module):
    """Tokens (B, N, D) -> images (B, 3, Hpx, Wpx), nominally in [0, 1] and not clamped.

    embed -> class token + sin-cos positions -> pre-norm blocks -> norm -> one linear map to the pixels of each patch,
    with `spec.overlap` to those of a square of twice the patch (`unpatchify_overlapping`)

    Initialisation: torch's default for every linear map, ones and zeros for norms, zeros for the class token.

    Source: RAE, section 3 (the decoder of MAE, without masking)
    """

    pos_embed: Tensor

    def __init__(self, latent_dim: int, spec: DecoderSpec, grid: tuple[int, int]) -> None:
        super().__init__()
        self.spec, self.grid = spec, grid
        self.embed = nn.Linear(latent_dim, spec.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        # A buffer: fixed, and stored because published checkpoints carry their own (the reference code trains it by
        # accident, so it cannot be recomputed).
        class_row = torch.zeros(1, spec.width)
        self.register_buffer("pos_embed", torch.cat([class_row, sincos_2d(spec.width, *grid)])[None])
        self.blocks = nn.ModuleList([DecoderBlock(spec.width, spec.num_heads, spec.mlp_dim) for _ in range(spec.depth)])
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.pred = nn.Linear(spec.width, ((1 + spec.overlap) * spec.patch_size) ** 2 * 3)

    def forward(self, tokens: Tokens) -> Images:
        """Decode. Tokens of another grid of the same aspect ratio are interpolated to this one."""
        x = self.embed(tokens)
        if x.shape[1] != self.grid[0] * self.grid[1]:
            x = self._resample(x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        lay = unpatchify_overlapping if self.spec.overlap else unpatchify
        return lay(self.pred(self.norm(x[:, 1:])), self.spec.patch_size, *self.grid)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last layer, where the adaptive weight compares gradients."""
        return self.pred.weight

    def _resample(self, x: Tensor) -> Tensor:
        scale = math.sqrt(x.shape[1] / (self.grid[0] * self.grid[1]))
        rows, columns = round(self.grid[0] * scale), round(self.grid[1] * scale)
        if rows * columns != x.shape[1]:
            raise SpecError(
                "decoder", "the token count does not fit the grid", got=x.shape[1],
                expected=f"{self.grid[0]} x {self.grid[1]} tokens, or a grid of the same aspect ratio",
            )  # fmt: skip
        x = x.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)  # (B, D, rows, columns)
        x = F.interpolate(x, self.grid, mode="bilinear", align_corners=False)
        return x.flatten(2).transpose(1, 2)  # (B, N, D)


class DecoderBlock(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)), with exact GELU."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)  # query, key, value along the output axis
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tokens) -> Tokens:
        """One block; tokens keep their shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attention(q, k, v)  # (B, heads, N, D / heads)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
