"""What `raev2 encoders check` looks at."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from raev2.spec import EncoderSpec
from raev2.tokenizer.encoders import build_encoder

Row = tuple[str, bool, str]


def check_encoder(name: str, grid: tuple[int, int] = (16, 16)) -> list[Row]:
    """What `raev2 encoders check` prints: (check, ok, detail) per property an encoder must have."""
    encoder, other = (build_encoder(EncoderSpec(name=name), (grid[0], cols)) for cols in (grid[1], 2 * grid[1]))
    (height, width), num_tokens = encoder.input_size, grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator), (height, width), mode="bilinear")
    tokens, other_shape = encoder(images), tuple(other(images).shape)
    same = torch.equal(tokens, encoder(images))
    lowest, highest = (encoder.preprocess(torch.full_like(images, n)).aminmax()[n].item() for n in (0, 1))
    trunk, info = encoder.trunk, encoder.info
    num_prefix, dropped = trunk.num_prefix_tokens, info.num_prefix_tokens
    eps = f", eps {encoder._norm_eps:g}" if encoder.norm != "none" else ""
    encoder.train()
    moved = any(module.training for module in trunk.modules())
    trainable = sum(parameter.requires_grad for parameter in trunk.parameters())
    mean, std = tokens.mean().item(), tokens.std().item()
    finite = bool(torch.isfinite(tokens).all()) and std > 0
    pixels = f"[0, 1] becomes [{lowest:.2f}, {highest:.2f}] with mean {info.mean}, std {info.std}"
    other_size = f"{other.input_size[0]} x {other.input_size[1]} px"
    return [
        ("input", lowest <= 0 < highest, pixels),
        ("grid", tokens.shape == (2, num_tokens, encoder.width), f"{height} x {width} px: {tuple(tokens.shape)}"),
        ("second grid", other_shape == (2, 2 * num_tokens, encoder.width), f"{other_size}: {other_shape}"),
        ("prefix tokens", num_prefix == dropped, f"{dropped} dropped; the network has {num_prefix}"),
        ("layers and norm", True, f"block {encoder.layers} of {encoder.depth}, norm {encoder.norm}{eps}"),
        ("deterministic", same, "same images, same tokens"),
        ("frozen", not moved and trainable == 0, f"train() changes nothing; {trainable} trainable parameters"),
        ("features", finite, f"mean {mean:.4f}, std {std:.4f}"),
    ]
