"""Picture grids as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raev2.files.replace import new_file
from raev2.shapes import ImagesU8

GAP = 2
CAPTION_LINES = 4
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_grid(images: ImagesU8, path: Path, columns: int | None = None, captions: Sequence[str] | None = None) -> None:
    """Write 8-bit images as one PNG, row by row; captions stand below, in at most `CAPTION_LINES` lines."""
    num, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    font = ImageFont.load_default(max(8, width // 7)) if captions else None
    line = int(font.size * 1.25) if captions and isinstance(font, ImageFont.FreeTypeFont) else 0
    texts = [_wrap(caption, width, font) for caption in captions] if captions and font is not None else [[]] * num
    below = line * max(len(lines) for lines in texts) + (line > 0) * 2
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + below + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        left, top = GAP + i % columns * (width + GAP), GAP + i // columns * (height + below + GAP)
        canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (left, top))
        for number, text in enumerate(texts[i]):
            draw.text((left, top + height + number * line), text, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        canvas.save(partial, format="PNG")


def save_pairs(images: ImagesU8, other: ImagesU8, path: Path, columns: int = 8) -> None:
    """Grid of pairs: rows of `images`, each row above the row of its `other` images."""
    rows: list[Tensor] = []
    for start in range(0, len(images), columns):
        for part in (images[start : start + columns].cpu(), other[start : start + columns].cpu()):
            blank = torch.full((columns - len(part), *part.shape[1:]), 255, dtype=torch.uint8)
            rows += [part, blank]
    save_grid(torch.cat(rows), path, columns=columns)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """The text in lines as wide as the picture; words that do not fit are cut, and so is what is left at the end."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < CAPTION_LINES:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        lines.append(line)
    if words:
        lines[-1] = f"{lines[-1]} {words[0]}…"
    return [_fit(line, width, font) for line in lines]


def _fit(text: str, width: int, font: Font) -> str:
    """The text, cut with an ellipsis where it is wider than the picture."""
    if font.getlength(text) <= width:
        return text
    text = text.removesuffix("…")
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
