"""A scene: a plain background and painted objects, with captions. The common form of all tracks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raev2.errors import SpecError
from raev2_tasks.t2i.benchmark.palette import BACKGROUNDS
from raev2_tasks.t2i.benchmark.rows import PromptRow

SIZE_PX = 256  # scenes are drawn and scored at this size
BORDER_PX = 8
MIN_APART_PX, MAX_ASIDE = 64, 0.4  # of two objects in a relation: along its axis; across it, as a share of that
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the 256 px picture


class Object(Protocol):
    """Something that can be painted."""

    @property
    def box(self) -> Box:
        """Where it is."""

    def paint(self, canvas: Image.Image) -> None:
        """Draw it on a 256 px RGB picture, antialiased."""

    def to_json(self) -> dict[str, Any]:
        """What it is, for ground truth."""


@dataclass(frozen=True)
class Scene:
    """One picture as a list of objects; ``row`` is the prompt it was made for, captions are (text, kind)."""

    row: PromptRow
    background: str  # name in palette.BACKGROUNDS
    objects: tuple[Any, ...]
    captions: list[tuple[str, str]]

    def render(self, size: int = SIZE_PX) -> Image.Image:
        """The picture: drawn at 256 px, then averaged over areas down to ``size`` px (16 to 256)."""
        if not 16 <= size <= SIZE_PX:
            raise SpecError("benchmark scene", "size cannot be drawn", got=size, expected=f"16 to {SIZE_PX} px")
        canvas = Image.new("RGB", (SIZE_PX, SIZE_PX), BACKGROUNDS[self.background])
        for item in self.objects:
            item.paint(canvas)
        if SIZE_PX % size == 0:
            return canvas.reduce(SIZE_PX // size) if size < SIZE_PX else canvas
        return canvas.resize((size, size), Image.Resampling.BOX)

    def to_json(self) -> dict[str, Any]:
        """Ground truth: background, objects with boxes, and the rules of the prompt."""
        row = self.row.to_json()
        del row["prompt"]
        return {"background": self.background, "objects": [item.to_json() for item in self.objects], **row}


def place(
    rng: np.random.Generator,
    half: NDArray[np.int64],
    gap_px: int,
    discs: bool = False,
    relation: str | None = None,
    tries: int = 512,
) -> NDArray[np.int64] | None:
    """Centres (n, 2) of objects that neither touch each other nor the border; None when no try succeeds.

    half      half width and half height of each object, (n, 2)
    gap_px    free space between two objects: between discs of radius half[:, 0], else between boxes, in x or in y
    relation  of object 1 to object 0: at least MIN_APART_PX along its axis, and at most MAX_ASIDE of that across it
    """
    num = len(half)
    low, high = BORDER_PX + half, SIZE_PX - BORDER_PX - half
    for _ in range(max(1, tries // 64)):
        centres = rng.integers(low, high + 1, size=(64, num, 2))
        fine = np.ones(64, dtype=bool)
        for i in range(num):
            for j in range(i):
                offset = np.abs(centres[:, i] - centres[:, j])
                if discs:
                    fine &= np.hypot(offset[:, 0], offset[:, 1]) >= half[i, 0] + half[j, 0] + gap_px
                else:
                    fine &= (offset >= half[i] + half[j] + gap_px).any(axis=1)
        if relation is not None:
            offset = centres[:, 1] - centres[:, 0]
            axis = 0 if relation in ("left of", "right of") else 1
            along = offset[:, axis] * (-1 if relation in ("left of", "above") else 1)
            fine &= (along >= MIN_APART_PX) & (np.abs(offset[:, 1 - axis]) <= MAX_ASIDE * along)
        if fine.any():
            return centres[fine.argmax()]
    return None
