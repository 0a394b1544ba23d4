"""The layers every network here is made of, smallest first: attention, norms, rotary positions, SwiGLU, block; then
what enters a network: patches, positions, time.

Notable choices
- norms compute in float32, whatever the autocast type
- layers that read the same input are one matrix product (`FusedLinear`): q/k/v, the two halves of SwiGLU, modulation
- rotary positions pair channel i with channel i + head_dim / 2 (a half-split is contiguous and therefore faster than
  pairing neighbours); only image tokens are rotated, all further tokens of the sequence have angle 0
- no attention mask unless a condition needs one, so that the fused attention kernels can be used
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from raev2.shapes import Latents, Patches, Times, Tokens, Vectors

Rope = tuple[Float[Tensor, "... P"], Float[Tensor, "... P"]]  # cos and sin, (N, P) or (B, N, P), P = head_dim / 2
Queries = Float[Tensor, "B heads N d"]
Keys = Float[Tensor, "B heads M d"]
KeysValues = tuple[Keys, Keys]  # keys rotated
KeyMask = Bool[Tensor, "B 1 1 _"]  # True: the key is seen
Modulation = Float[Tensor, "B _ D6"]  # per sample (B, 1, 6 D) or per token (B, N, 6 D)
PLAIN_UP_TO = 2**25  # scores, 64 MiB for each block: beyond, a CPU does not have the memory for them either
NUM_FREQUENCIES = 256  # of the time embedding
EVEN_ROWS = 4  # MKL has kernels of its own for one to three, and for those beside fours


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Inside, networks compute in bfloat16 ('bf16') or float32 ('fp32'), whatever the autocast outside."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def attention(q: Queries, k: Keys, v: Keys, mask: KeyMask | None = None) -> Queries:
    """softmax(q k^T / sqrt(d)) v, where `mask` is True: torch's fused kernels.

    On a CPU in bfloat16 they are plain matrix products while their scores fit: forward and backward are 1.3 to 4 times
    as fast at 64 to 1,036 tokens as with the fused kernel, whose backward is slow (docs/performance.md, docs/log.md).
    """
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q[..., 0].numel() * k.shape[-2] <= PLAIN_UP_TO
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


class FusedLinear(nn.Linear):
    """Linear layers with the same input as one matrix; `splits` are their output widths.

    Muon orthogonalises each of them on its own (see optim.py), as if they were separate layers.
    """

    def __init__(self, in_features: int, splits: Sequence[int]) -> None:
        super().__init__(in_features, sum(splits))
        self.splits = tuple(splits)


def with_even_rows(layers: nn.Module, x: Float[Tensor, "B D1"]) -> Float[Tensor, "B D2"]:
    """`layers(x)`, without gradients on a CPU of a multiple of `EVEN_ROWS`: its kernels for others give other bits."""
    missing = -len(x) % EVEN_ROWS
    if torch.is_grad_enabled() or not x.is_cpu or not missing:
        return layers(x)
    return layers(torch.cat([x, x[-1:].expand(missing, -1)]))[:-missing]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; computed and returned in float32."""
    if not x.is_cpu:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    if torch.is_grad_enabled():  # three times as fast as what torch composes there
        return _CPUNorm.apply(x, weight.float(), eps)
    return _cpu_norm(x, weight.float(), eps)[0]


def _cpu_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = x.float()
    inverse = (torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
    return (x32 * inverse).mul_(weight), inverse


class _CPUNorm(Function):
    """`rms_norm`. With n = x / r, r = sqrt(mean(x^2) + eps), and g = dL/dn: dL/dx = (g - n mean(g n)) / r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, inverse = _cpu_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        n = x.float() * inverse
        along = grad * n
        mean = (along @ weight)[..., None] / x.shape[-1]
        grad_x = (grad * weight).addcmul_(n, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), along.flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    """`rms_norm` with a learned gain; keeps the dtype of its input."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalise over the last axis."""
        return rms_norm(x, self.weight).to(x.dtype)


def swiglu_dim(dim: int, ratio: float) -> int:
    """Hidden units of SwiGLU, int(2/3 * dim * ratio): 384 -> 1024, 1440 -> 3840, 2048 -> 5461 for ratio 4."""
    return int(2 / 3 * dim * ratio)


class SwiGLU(nn.Module):
    """w3(silu(gate) * value) with [gate, value] = w12(x)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden_dim = swiglu_dim(dim, ratio)
        self.w12 = FusedLinear(dim, [hidden_dim, hidden_dim])
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tokens) -> Tokens:
        """Apply to every token."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Rope2D(nn.Module):
    """Tables of the 2-D rotary position embedding of a grid of rows x cols tokens, row by row.

    The first half of the P = head_dim / 2 angles of a token are row * f_k, the second half col * f_k, with
    f_k = 10000^(-2k / P), k = 0 .. P/2 - 1. Positions are integers at every resolution.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, rows: int, cols: int) -> None:
        super().__init__()
        num_angles = head_dim // 2
        frequencies = 10_000.0 ** (-torch.arange(0, num_angles, 2, dtype=torch.float64) / num_angles)
        row_angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
        col_angles = torch.arange(cols, dtype=torch.float64)[:, None] * frequencies
        angles = torch.cat([row_angles.repeat_interleave(cols, dim=0), col_angles.repeat(rows, 1)], dim=1)  # (N, P)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, length: int) -> Rope:
        """Tables for a sequence of `length` tokens that starts with the grid; the other tokens are not rotated."""
        extra = length - self.cos.shape[0]
        return F.pad(self.cos, (0, 0, 0, extra), value=1.0), F.pad(self.sin, (0, 0, 0, extra))


class AgeRope(nn.Module):
    """The third rotary axis: age in frame periods. It turns on top of `Rope2D`, in the slow half of its angles.

    There rows and columns turn by at most 0.01 per token, so that those channels carry next to no position and are
    free for time; two-dimensional networks keep their tables. Frequencies: log-spaced from pi per frame period (the
    shortest period is two frames) down to pi / 128, each used once among the row and once among the column angles.
    """

    frequencies: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        per_axis = head_dim // 4
        num_slow = per_axis // 2
        slow = torch.logspace(0, -1, 2 * num_slow, base=128.0, dtype=torch.float64) * math.pi
        fast = torch.zeros(per_axis - num_slow, dtype=torch.float64)
        frequencies = torch.cat([fast, slow[0::2], fast, slow[1::2]])
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, age: Float[Tensor, "..."]) -> Rope:
        """Tables with the axes of `age` and the angles."""
        angles = age.float()[..., None] * self.frequencies.float()
        return angles.cos(), angles.sin()


def turn(rope: Rope, by: Rope) -> Rope:
    """The tables of one rotation after the other: angles add."""
    return rope[0] * by[0] - rope[1] * by[1], rope[1] * by[0] + rope[0] * by[1]


def rotate(x: Float[Tensor, "B N heads d"], rope: Rope) -> Float[Tensor, "B N heads d"]:
    """Rotate channel pairs (a, b) = (i, i + d/2): (a cos - b sin, b cos + a sin). No gradient to the angles."""
    cos, sin = rope[0].unsqueeze(-2), rope[1].unsqueeze(-2)  # (N, 1, P), or with a batch axis
    return (_Rotation.apply if torch.is_grad_enabled() else _turned)(x.to(cos.dtype), cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result = x * torch.cat([cos, cos], dim=-1)
    (a, b), (turned_a, turned_b) = x.chunk(2, dim=-1), result.chunk(2, dim=-1)
    turned_a.addcmul_(b, sin, value=-1)
    turned_b.addcmul_(a, sin)
    return result


class _Rotation(Function):
    """`rotate`; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions and, optionally, RMSNorm on queries and keys."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = FusedLinear(dim, [dim, dim, dim])
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tokens, rope: Rope, mask: KeyMask | None = None, past: KeysValues | None = None) -> Tokens:
        """Attend to the sequence and, after it, to the `past`."""
        q, k, v = self.project(x, rope)
        if past is not None:
            k, v = torch.cat([k, past[0].to(k.dtype)], dim=2), torch.cat([v, past[1].to(v.dtype)], dim=2)
        return self.attend(q, k, v, mask)

    def project(self, x: Tokens, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, head_dim), queries and keys rotated."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each (B, N, heads, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm.weight), rms_norm(k, self.k_norm.weight)
        q, k = rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tokens:
        """Attention and the output projection."""
        out = attention(q, k, v, mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Pre-norm transformer block.

    Without modulation:  x += attn(norm1(x));  x += mlp(norm2(x)).
    With it (adaLN), the six chunks shift, scale, gate of attention and of the MLP, per sample or per token:
    x += gate_a * attn(modulate(norm1(x), shift_a, scale_a));  the same for the MLP.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, mlp_ratio)

    def forward(
        self,
        x: Tokens,
        rope: Rope,
        mask: KeyMask | None = None,
        modulation: Modulation | None = None,
        past: KeysValues | None = None,
    ) -> Tokens:
        """Apply to a sequence."""
        if modulation is None:
            x = x + self.attn(self.norm1(x), rope, mask, past)
            return x + self.mlp(self.norm2(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, self.attn(modulate(self.norm1(x), shift_a, scale_a), rope, mask))
        return torch.addcmul(x, gate_m, self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """RMSNorm, optional modulation (shift, scale) and the linear map to the pixels of a latent patch."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tokens, modulation: Float[Tensor, "B _ D2"] | None = None) -> Patches:
        """Predicted patches."""
        x = self.norm(x)
        if modulation is not None:
            x = modulate(x, *modulation.chunk(2, dim=-1))
        return self.linear(x)


# What enters: patches, positions, numbers


def patchify(latents: Latents, patch_size: int) -> Patches:
    """Cut into patches, row by row; the values of a patch are ordered (channel, row, column)."""
    return F.pixel_unshuffle(latents, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Patches, patch_size: int, rows: int, cols: int) -> Latents:
    """Put predicted patches back; the values of a patch are ordered (row, column, channel)."""
    x = patches.unflatten(1, (rows, cols)).unflatten(-1, (patch_size, patch_size, -1))  # (B, rows, cols, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def unpatchify_overlapping(patches: Patches, patch_size: int, rows: int, cols: int) -> Latents:
    """Put predicted squares of twice the patch back, half over their neighbours: no seams where these disagree.

    patches   (B, rows * cols, C * (2 patch_size)^2); values are ordered (channel, row, column)

    A pixel is the mean of the squares that cover it, with the weights of bilinear interpolation between patch centres.
    """
    side, cut = 2 * patch_size, patch_size // 2
    ramp = 1 - (torch.arange(side, device=patches.device) + 0.5 - cut - patch_size / 2).abs() / patch_size
    weight = (ramp[:, None] * ramp).flatten()

    def lay(squares: Patches) -> Latents:
        canvas = F.fold(squares.mT, ((rows + 1) * patch_size, (cols + 1) * patch_size), side, stride=patch_size)
        return canvas[:, :, cut : cut + rows * patch_size, cut : cut + cols * patch_size]

    painted = lay((patches.unflatten(2, (-1, side**2)) * weight).flatten(2))
    return painted / lay(weight.expand(1, rows * cols, -1))


class PatchEmbed(nn.Module):
    """Linear map of each patch to a token: a convolution with kernel = stride = patch, computed as one product."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, patches: Patches) -> Tokens:
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


def waves(shortest: float, longest: float, count: int = 8) -> Float[Tensor, " F"]:
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

    def forward(self, t: Times) -> Vectors:
        """Embed; angles are computed in float32."""
        angles = 2 * math.pi * t.float()[:, None] * self.frequencies.float()
        return with_even_rows(self.mlp, torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.frequencies.dtype))

    def init_weights(self) -> None:
        """W ~ N(0, 1), weights ~ N(0, 0.02), biases as PyTorch."""
        nn.init.normal_(self.frequencies)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)


def sincos_2d(width: int, rows: int, cols: int, scale: float = 1.0) -> Float[Tensor, "N D"]:
    """Fixed positions of a grid: the first width/2 values encode the column, the rest the row, each [sin, cos].

    scale   distance of neighbours
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(positions: Tensor) -> Tensor:
        angles = scale * positions.double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row_codes = encode(torch.arange(rows)).repeat_interleave(cols, dim=0)
    col_codes = encode(torch.arange(cols)).repeat(rows, 1)
    return torch.cat([col_codes, row_codes], dim=1).float()
