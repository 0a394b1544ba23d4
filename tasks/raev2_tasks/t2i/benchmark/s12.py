"""Track S12: twelve plain shapes in ten colours. Needs no pictures from elsewhere.

Which compositions are held out is arithmetic on the indices of shapes and colours (``held_*``). Held-out colours never
occur in training pictures, not even where the caption does not name a colour.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from raev2.errors import SpecError, did_you_mean
from raev2_tasks.t2i.benchmark import rows, rules
from raev2_tasks.t2i.benchmark.captions import captions
from raev2_tasks.t2i.benchmark.compositions import Compositions
from raev2_tasks.t2i.benchmark.foreground import Component, components
from raev2_tasks.t2i.benchmark.palette import BACKGROUNDS, COLORS, flat, name_color
from raev2_tasks.t2i.benchmark.rows import RELATIONS, PromptRow
from raev2_tasks.t2i.benchmark.rules import Detection
from raev2_tasks.t2i.benchmark.scene import MAX_ASIDE, MIN_APART_PX, Box, Scene, place

SHAPES = (
    "circle", "square", "triangle", "diamond", "pentagon", "star",
    "heart", "cross", "ring", "crescent", "arrow", "semicircle",
)  # fmt: skip
IMAGES_PER_PROMPT = 8
# Smallest and largest radius by number of shapes. Large, so that a shape covers several tokens of an 8 x 8 grid.
RADII_PX = {1: (40, 80), 2: (36, 58)}
RADII_OF_MANY_PX = (28, 42)
GAP_PX = 8
MAX_ROTATION = 10  # degrees
SUPERSAMPLING = 4
NUM_BINDINGS = 30  # prompts in each tier of color_attr

MASK_PX, MASK_AREA = 40, 0.30  # side of a normalised mask, and how much of it is filled
MIN_IOU, MIN_MARGIN = 0.65, 0.02
judge = rules.judge


@dataclass(frozen=True)
class Shape:
    """A shape of radius ``radius`` around ``centre``, in pixels, turned by ``rotation`` degrees."""

    name: str
    color: str
    centre: tuple[int, int]
    radius: int
    rotation: float

    @property
    def box(self) -> Box:
        """The square around the disc in which the shape lies."""
        (x, y), r = self.centre, self.radius
        return (x - r, y - r, x + r, y + r)

    def paint(self, canvas: Image.Image) -> None:
        """Draw it antialiased."""
        mask = draw_mask(self.name, self.radius, self.rotation)
        corner = (self.centre[0] - mask.width // 2, self.centre[1] - mask.height // 2)
        canvas.paste(flat(self.color), (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)

    def to_json(self) -> dict[str, Any]:
        """Class, colour, box and rotation."""
        return {"class": self.name, "color": self.color, "box": list(self.box), "rotation": round(self.rotation, 2)}


def held_color(shape: str, color: str) -> bool:
    """24 of 120 coloured shapes."""
    return (SHAPES.index(shape) + COLORS.index(color)) % 5 == 0


def held_pair(first: str, second: str) -> bool:
    """22 of 66 pairs, as prompts of the tags ``two_object`` and ``color_attr``."""
    return (SHAPES.index(first) + SHAPES.index(second)) % 3 == 0


def held_count(shape: str, num: int) -> bool:
    """12 of 36 counts; one object is never held out."""
    return num > 1 and (SHAPES.index(shape) + num) % 3 == 0


def held_position(subject: str, relation: str, reference: str) -> bool:
    """57 of 528 triples. Their pairs of shapes may occur in other positions."""
    i, r, k = SHAPES.index(subject), RELATIONS.index(relation), SHAPES.index(reference)
    return (i + 3 * k + 5 * r) % 9 == 0


@functools.cache
def training() -> Compositions:
    """The compositions that training may show."""
    pairs = [(a, b) for i, a in enumerate(SHAPES) for b in SHAPES[i + 1 :] if not held_pair(a, b)]
    bindings = {frozenset((entry["class"], entry["color"]) for entry in row.include) for row in _bindings(False)}
    return Compositions(
        classes=SHAPES,
        pairs=pairs,
        coloured=[(shape, color) for shape in SHAPES for color in COLORS if not held_color(shape, color)],
        counts={num: [shape for shape in SHAPES if not held_count(shape, num)] for num in range(1, 5)},
        positions=[
            (subject, relation, reference)
            for subject in SHAPES for relation in RELATIONS for reference in SHAPES
            if subject != reference and not held_position(subject, relation, reference)
        ],
        held_bindings=frozenset(bindings),
    )  # fmt: skip


@functools.cache
def prompts(split: str) -> list[PromptRow]:
    """187 prompts of ``test_held`` (compositions that training never shows) or of ``test_seen`` (that it does).

    The held-out prompts of ``color_attr`` have two tiers: ``binding`` (both coloured shapes are seen, never together)
    and ``novel`` (neither coloured shape is seen).
    """
    held = [rows.single_object(shape) for shape in SHAPES]
    held += [rows.two_object(a, b) for i, a in enumerate(SHAPES) for b in SHAPES[i + 1 :] if held_pair(a, b)]
    held += [rows.counting(shape, num) for num in (2, 3, 4) for shape in SHAPES if held_count(shape, num)]
    held += [rows.colors(shape, color) for shape in SHAPES for color in COLORS if held_color(shape, color)]
    held += [
        rows.position(subject, relation, reference)
        for subject in SHAPES for relation in RELATIONS for reference in SHAPES
        if subject != reference and held_position(subject, relation, reference)
    ]  # fmt: skip
    held += _bindings(False) + _bindings(True)
    if split == "test_held":
        return held
    if split == "test_seen":
        counts = {tag: sum(row.tag == tag for row in held) for tag in rows.TAGS}
        return training().draw_distinct(np.random.default_rng(2), counts)
    raise SpecError(
        "benchmark s12", "unknown prompts", got=repr(split), expected="test_held or test_seen",
        hint=did_you_mean(split, ("test_held", "test_seen")),
    )  # fmt: skip


def scenes(split: str, num: int, seed: int | None = None) -> Iterator[Scene]:
    """``num`` scenes of ``train`` (seed 0 by default) or ``val`` (seed 1), all with training compositions."""
    if split not in ("train", "val"):
        raise SpecError("benchmark s12", "unknown scenes", got=repr(split), expected="train or val")
    number = ("train", "val").index(split)
    for index in range(num):
        rng = np.random.default_rng([12, number, number if seed is None else seed, index])
        yield scene(training().draw(rng), rng)


def scene(row: PromptRow, rng: np.random.Generator) -> Scene:
    """A random scene that fulfils a row; colours that the row leaves open are never held out."""
    wanted = [(entry["class"], entry.get("color")) for entry in row.include for _ in range(entry["count"])]
    smallest, largest = RADII_PX.get(len(wanted), RADII_OF_MANY_PX)
    relation = next((entry["position"][0] for entry in row.include if "position" in entry), None)
    centres = None
    while centres is None:
        radii = rng.integers(smallest, largest + 1, size=len(wanted))
        centres = place(rng, np.stack([radii, radii], axis=1), GAP_PX, discs=True, relation=relation)
    same = _open_colors(row, rng)
    shapes = tuple(
        Shape(name, color or same[name], (int(x), int(y)), int(radius), float(rng.uniform(-MAX_ROTATION, MAX_ROTATION)))
        for (name, color), (x, y), radius in zip(wanted, centres, radii, strict=True)
    )
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    sizes = (radii - smallest) / (largest - smallest)
    return Scene(row, background, shapes, captions(row, background, sizes, rng, told(shapes)))


def told(shapes: Sequence[Shape]) -> PromptRow:
    """All that a picture shows of its shapes: their colours, and the place of two where that is plain.

    A place that is held out is not told.
    """
    first, last = shapes[0], shapes[-1]
    if len(shapes) == 1:
        return rows.colors(first.name, first.color)
    if first.name == last.name:
        return rows.counting(first.name, len(shapes), first.color)
    relation = relation_of(last, first)
    if relation is None or held_position(last.name, relation, first.name):
        return rows.color_attr((first.name, first.color), (last.name, last.color))
    return rows.position(last.name, relation, first.name, (last.color, first.color))


def relation_of(subject: Shape, reference: Shape) -> str | None:
    """Where a shape lies from another, if it is plain: as `place` puts them."""
    offset = np.subtract(subject.centre, reference.centre)
    axis = int(np.abs(offset).argmax())
    if abs(offset[axis]) < MIN_APART_PX or abs(offset[1 - axis]) > MAX_ASIDE * abs(offset[axis]):
        return None
    return (("left of", "right of"), ("above", "below"))[axis][int(offset[axis] > 0)]


def _open_colors(row: PromptRow, rng: np.random.Generator) -> dict[str, str]:
    """A colour for each shape, whether or not the row names one; no binding of a test prompt by chance."""
    seen = training()
    while True:
        colors = {entry["class"]: str(rng.choice(seen.colors_of(entry["class"]))) for entry in row.include}
        if frozenset(colors.items()) not in seen.held_bindings:
            return colors


def draw_mask(name: str, radius: float, rotation: float) -> Image.Image:
    """Coverage of a shape, 8 bits, on a square around its centre; drawn at four times the size and averaged."""
    half = int(np.ceil(radius)) + 1
    side = 2 * half * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    angle = np.deg2rad(rotation)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * radius * SUPERSAMPLING
    for outline, fill in zip(_outlines(name), (255, 0), strict=False):
        pen.polygon((outline @ turn + side / 2).ravel().tolist(), fill=fill)
    return mask.reduce(SUPERSAMPLING)


def look(image: NDArray[np.uint8], tag: str) -> list[Detection]:
    """The shapes of a 256 px picture (256, 256, 3), for ``judge``; alike for prompts of every tag."""
    return [detect(component) for component in components(image)]


def detect(component: Component) -> Detection:
    """The shape and the colour of a component; the score is the overlap with the best template."""
    templates, shape_of = _templates()
    mask = _normalised(component.mask).ravel().astype(np.float32)
    shared = templates @ mask
    iou = shared / (templates.sum(axis=1) + mask.sum() - shared)
    best = np.array([iou[shape_of == index].max() for index in range(len(SHAPES))])
    second, first = np.sort(best)[-2:]
    known = first >= MIN_IOU and first - second >= MIN_MARGIN
    name = SHAPES[int(best.argmax())] if known else None
    return Detection(name, float(first), component.box, name_color(component.core()))


def _bindings(novel: bool) -> list[PromptRow]:
    """30 prompts of ``color_attr`` with seen pairs of shapes; both coloured shapes are held out, or neither is."""
    rng = np.random.default_rng([12, 6, int(novel)])
    chosen: dict[str, PromptRow] = {}
    while len(chosen) < NUM_BINDINGS:
        first, second = (str(name) for name in rng.choice(SHAPES, size=2, replace=False))
        color, other = (str(name) for name in rng.choice(COLORS, size=2, replace=False))
        if held_pair(first, second) or held_color(first, color) != novel or held_color(second, other) != novel:
            continue
        row = rows.color_attr((first, color), (second, other), tier="novel" if novel else "binding")
        chosen.setdefault(row.prompt, row)
    return list(chosen.values())


@functools.cache
def _outlines(name: str) -> list[NDArray[np.float64]]:
    """Polygons (P, 2) in units of the radius, x to the right and y down; a second one is a hole."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)

    def regular(corners: int, radius: float = 1.0, start: float = 0.0) -> NDArray[np.float64]:
        angles = np.deg2rad(start) + 2 * np.pi * np.arange(corners) / corners
        return radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)  # the first corner is at the top

    if name == "circle":
        return [0.9 * circle]
    if name == "square":
        return [0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])]
    if name == "triangle":
        return [regular(3)]
    if name == "diamond":
        return [np.array([(0, -1), (0.68, 0), (0, 1), (-0.68, 0)])]
    if name == "pentagon":
        return [regular(5)]
    if name == "star":
        return [np.stack([regular(5), regular(5, 0.42, 36)], axis=1).reshape(-1, 2)]
    if name == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return [np.stack([x, -y], axis=1) / 17]
    if name == "cross":
        w, a = 0.3, 0.9
        corners = [(-w, -a), (w, -a), (w, -w), (a, -w), (a, w), (w, w)]
        return [np.array(corners + [(-x, -y) for x, y in corners])]
    if name == "ring":
        return [0.95 * circle, 0.5 * circle]
    if name == "crescent":
        return [0.95 * circle, circle * (0.80, 0.85) + (0.45, 0)]
    if name == "arrow":
        shaft, neck, head = 0.28, 0.1, 0.75
        upper = [(-1, -shaft), (neck, -shaft), (neck, -head)]
        return [np.array([*upper, (1, 0), *((x, -y) for x, y in reversed(upper))])]
    half = np.linspace(np.pi, 2 * np.pi, 48)
    return [0.95 * np.stack([np.cos(half), np.sin(half) + 0.45], axis=1)]  # semicircle, flat side down


@functools.cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Normalised masks (12 * 7, 1600) and the index of the shape of each."""
    rotations = range(-12, 13, 4)
    masks = [
        _normalised(np.asarray(draw_mask(name, 40, rotation)) >= 128).ravel()
        for name in SHAPES for rotation in rotations
    ]  # fmt: skip
    return np.stack(masks).astype(np.float32), np.repeat(np.arange(len(SHAPES)), len(rotations))


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask moved and scaled to 40 x 40 pixels: centroid in the middle, 30 % of the area filled."""
    area = mask.sum()
    step = float(np.sqrt(area / (MASK_AREA * MASK_PX**2)))
    y = float((mask.sum(axis=1) * (np.arange(mask.shape[0]) + 0.5)).sum() / area)
    x = float((mask.sum(axis=0) * (np.arange(mask.shape[1]) + 0.5)).sum() / area)
    half = step * MASK_PX / 2
    matrix: Sequence[float] = (step, 0, x - half, 0, step, y - half)
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    moved = image.transform((MASK_PX, MASK_PX), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(moved) >= 128
