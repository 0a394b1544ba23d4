"""Picture grids as PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raev2.shapes import ImagesU8

GAP = 2


def save_grid(images: ImagesU8, path: Path, columns: int | None = None, captions: Sequence[str] | None = None) -> None:
    """Write 8-bit images as one PNG, row by row, with a caption under each where given."""
    num, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    font = ImageFont.load_default(max(8, width // 7)) if captions else None
    line = int(font.size * 1.5) if captions and isinstance(font, ImageFont.FreeTypeFont) else 0
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + line + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * (height + line + GAP)
        canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (left, top))
        if captions and font is not None:
            draw.text((left, top + height), _fit(captions[i], width, draw, font), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    canvas.save(partial, format="PNG")
    os.replace(partial, path)


def save_pairs(images: ImagesU8, other: ImagesU8, path: Path, columns: int = 8) -> None:
    """Grid of pairs: rows of `images`, each row above the row of its `other` images."""
    rows: list[Tensor] = []
    for start in range(0, len(images), columns):
        for part in (images[start : start + columns].cpu(), other[start : start + columns].cpu()):
            blank = torch.full((columns - len(part), *part.shape[1:]), 255, dtype=torch.uint8)
            rows += [part, blank]
    save_grid(torch.cat(rows), path, columns=columns)


def _fit(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut with an ellipsis where it is wider than the picture."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
