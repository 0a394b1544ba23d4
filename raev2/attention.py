"""Scaled dot-product attention, for networks of our own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

PLAIN_UP_TO = 512 * 512  # scores of a head: beyond, a CPU does not have the memory for them either


def attention(
    q: Float[Tensor, "B heads N d"],
    k: Float[Tensor, "B heads M d"],
    v: Float[Tensor, "B heads M d"],
    mask: Bool[Tensor, "B 1 1 M"] | None = None,
) -> Float[Tensor, "B heads N d"]:
    """softmax(q k^T / sqrt(d)) v, where `mask` is True: torch's fused kernels.

    On a CPU in bfloat16 short sequences take plain matrix products: forward and backward are 2 to 4 times as fast at 64
    to 264 tokens as with the fused kernel, whose backward is slow, and forward alone is no slower (docs/log.md).
    """
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= PLAIN_UP_TO
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v
