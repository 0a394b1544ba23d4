"""Coloured shapes: tiny, the same bytes every time, no source needed. For tests and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
from PIL import Image

from raev2.errors import SpecError
from raev2_data_recipes.base import Option, Picture, Recipe, Sample, encode_png

CLASSES = ["cross", "disc", "ring", "square"]


def draw(index: int, label: int, size_px: int) -> Image.Image:
    """Picture ``index``: one shape of class ``label`` on a darker plain background, with antialiased edges.

    Position, radius and both colours come from a generator seeded with ``index``.
    """
    rng = np.random.Generator(np.random.PCG64(index))
    radius = rng.uniform(0.18, 0.34)
    centre = rng.uniform(radius, 1 - radius, size=2)
    colour, background = rng.uniform(90, 255, size=3), rng.uniform(0, 90, size=3)
    grid = (np.arange(size_px) + 0.5) / size_px
    dx, dy = np.abs(grid[None, :] - centre[0]), np.abs(grid[:, None] - centre[1])
    # Signed distance to the edge, in picture widths, positive inside.
    if CLASSES[label] == "cross":
        inside = np.maximum(np.minimum(radius - dx, radius / 3 - dy), np.minimum(radius / 3 - dx, radius - dy))
    elif CLASSES[label] == "disc":
        inside = radius - np.hypot(dx, dy)
    elif CLASSES[label] == "ring":
        inside = radius / 4 - np.abs(np.hypot(dx, dy) - 0.75 * radius)
    else:
        inside = 0.85 * radius - np.maximum(dx, dy)
    alpha = np.clip(inside * size_px + 0.5, 0, 1)[..., None]
    return Image.fromarray(np.round(background + alpha * (colour - background)).astype(np.uint8))


class Synthetic(Recipe):
    """Four classes of shapes, in turn, so every class has the same number of pictures (up to one)."""

    name = "synthetic"
    summary = "coloured shapes on plain backgrounds, 4 classes"
    licence = "CC0-1.0"
    attribution = "Made by the raev2 data recipe `synthetic`."
    size = "96 pictures, 64 px, 30 kB"
    options = {
        "num_train": Option("64", "training pictures, at least 1"),
        "num_val": Option("32", "validation pictures, 0 or more"),
        "size": Option("64", "width and height in pixels, at least 8"),
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do."""
        num_train, num_val, size_px = self._numbers(options)
        return [f"Draw {num_train} training and {num_val} validation pictures, {size_px} px, 4 classes of shapes."]

    def classes(self, options: Mapping[str, str]) -> list[str]:
        """The four shapes."""
        return list(CLASSES)

    def samples(self, options: Mapping[str, str]) -> Iterator[Sample]:
        """Training pictures have the indices 0, 1, ...; validation pictures start at 1,000,000."""
        num_train, num_val, size_px = self._numbers(options)
        for split, start, num in (("train", 0, num_train), ("val", 1_000_000, num_val)):
            for index in range(start, start + num):
                label = index % len(CLASSES)
                read = partial(_read, index, label, size_px)
                yield Sample(split, CLASSES[label], f"synthetic {index}", read, label)

    def _numbers(self, options: Mapping[str, str]) -> tuple[int, int, int]:
        resolved = self.resolve(options)
        numbers = []
        for key, least in (("num_train", 1), ("num_val", 0), ("size", 8)):
            text = resolved[key]
            if not text.isdecimal() or int(text) < least:
                raise SpecError(f"data {self.name}: {key}", "not usable", got=text, expected=f"a number >= {least}")
            numbers.append(int(text))
        return numbers[0], numbers[1], numbers[2]


def _read(index: int, label: int, size_px: int) -> Picture:
    return encode_png(draw(index, label, size_px))


RECIPE = Synthetic()
