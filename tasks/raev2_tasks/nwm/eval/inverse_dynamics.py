"""From two frames to the motion between them: the judge of the `action-following` protocol.

A small network is trained on pairs of real frames only. Its input is how well patches of one frame match shifted
patches of the other in a frozen encoder's features, which is what a camera motion changes. Asked about a context frame
and a generated frame, it tells which motion the picture shows, whatever motion was commanded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

MAX_SHIFT = (1, 4)  # rows and columns a patch is searched at, on a grid of 8 x 8; scaled for other grids
BANDS = (2, 4)  # the picture in bands of rows and columns: forward motion is seen as opposite shifts left and right
HIDDEN, STEPS, BATCH, LR, WEIGHT_DECAY = 128, 800, 256, 2e-3, 1e-2


def match_features(first: Tensor, second: Tensor) -> Tensor:
    """How patches of `second` match shifted patches of `first`: two token maps (B, H, W, D) -> (B, F).

    For every shift in a window the mean over each band of the cosine of a patch with the shifted patch; places that
    fall outside the picture count as 0.
    """
    height, width = first.shape[1:3]
    rows, columns = (max(1, round(limit * size / 8)) for limit, size in zip(MAX_SHIFT, (height, width), strict=True))
    first, second = normalize(first.float(), dim=-1), normalize(second.float(), dim=-1)
    padded = pad(second, (0, 0, columns, columns, rows, rows))
    maps = [
        (first * padded[:, y : y + height, x : x + width]).sum(-1)
        for y in range(2 * rows + 1)
        for x in range(2 * columns + 1)
    ]
    return nn.functional.adaptive_avg_pool2d(torch.stack(maps, 1), BANDS).flatten(1)


@dataclass(frozen=True)
class InverseDynamics:
    """A trained judge. `tensors` hold the network and the scale of inputs and motions.

    tokens   8-bit images (B, 3, Hpx, Wpx) -> token maps (B, H, W, D) of the frozen encoder
    """

    tokens: Callable[[Tensor], Tensor]
    tensors: dict[str, Tensor]

    @torch.no_grad()
    def __call__(self, first_u8: Tensor, second_u8: Tensor, rel_time_s: Tensor) -> Tensor:
        """Motion (B, 3) that the pictures show: forward and left in metres, turn to the left in radians.

        rel_time_s   (B,) seconds between the two frames
        """
        inputs = pair_inputs(self.tokens, first_u8, second_u8, rel_time_s)
        return _predict(inputs, self.tensors)


def pair_inputs(tokens: Callable[[Tensor], Tensor], first_u8: Tensor, second_u8: Tensor, rel_time_s: Tensor) -> Tensor:
    """What the network sees of pairs of 8-bit images (B, F)."""
    features = match_features(tokens(first_u8), tokens(second_u8)).cpu()
    return torch.cat([features, rel_time_s.float().cpu()[:, None]], 1)


def fit(inputs: Tensor, motions: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Train the network on real pairs; the result depends on the arguments alone.

    inputs    (S, F) of `pair_inputs`
    motions   (S, 3) metres and radians
    """
    generator = torch.Generator().manual_seed(seed)
    motions = motions.float()
    scale = {
        "input_mean": inputs.mean(0), "input_std": inputs.std(0).clamp_min(1e-6),
        "motion_mean": motions.mean(0), "motion_std": motions.std(0).clamp_min(1e-6),
    }  # fmt: skip
    x = (inputs - scale["input_mean"]) / scale["input_std"]
    y = (motions - scale["motion_mean"]) / scale["motion_std"]
    sizes = (x.shape[1], HIDDEN, HIDDEN, 3)
    weights: dict[str, Tensor] = {}
    for layer, (inside, outside) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        weights[f"weight{layer}"] = torch.randn(outside, inside, generator=generator) / inside**0.5
        weights[f"bias{layer}"] = torch.zeros(outside)
    with torch.enable_grad():
        for value in weights.values():
            value.requires_grad_()
        optimizer = torch.optim.AdamW(weights.values(), lr=LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
            loss = (_network(x[rows], weights) - y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {**scale, **{name: value.detach() for name, value in weights.items()}}


def _predict(inputs: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    x = (inputs - tensors["input_mean"]) / tensors["input_std"]
    return _network(x, tensors) * tensors["motion_std"] + tensors["motion_mean"]


def _network(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    for layer in range(3):
        x = nn.functional.linear(x, weights[f"weight{layer}"], weights[f"bias{layer}"])
        if layer < 2:
            x = nn.functional.gelu(x)
    return x
