"""Fixed positions of a token grid, for decoder and generator."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


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
