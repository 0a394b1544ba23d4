"""Track G60: emoji sprites of 60 COCO classes with 366 of GenEval's 553 prompts, word for word.

The prompts are those whose classes all have a usable sprite. What they ask for is held out: no training scene shows
such a pair of classes, such a colour of a class, or such a number of a class. The rows are those of GenEval
(https://github.com/djghosh13/geneval, MIT); the scorer is ours, so scores of this track
are not GenEval scores.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from raev2.errors import SpecError, did_you_mean
from raev2_tasks.t2i.benchmark import rows, rules
from raev2_tasks.t2i.benchmark.captions import captions
from raev2_tasks.t2i.benchmark.compositions import Compositions
from raev2_tasks.t2i.benchmark.foreground import Component, components
from raev2_tasks.t2i.benchmark.palette import COLORS, TURQUOISES, name_color
from raev2_tasks.t2i.benchmark.rows import RELATIONS, PromptRow
from raev2_tasks.t2i.benchmark.rules import Detection
from raev2_tasks.t2i.benchmark.scene import Scene, place
from raev2_tasks.t2i.benchmark.sprites import Sprite, size_of
from raev2_tasks.t2i.benchmark.templates import SpriteTemplates

CLASSES = {  # class -> code of its emoji
    "person": "1f9cd", "bicycle": "1f6b2", "car": "1f697", "motorcycle": "1f3cd", "airplane": "2708", "bus": "1f68c",
    "train": "1f682", "truck": "1f69a", "boat": "26f5", "traffic light": "1f6a6", "stop sign": "1f6d1",
    "bird": "1f426", "cat": "1f431", "dog": "1f436", "horse": "1f434", "sheep": "1f411", "cow": "1f42e",
    "elephant": "1f418", "bear": "1f43b", "zebra": "1f993", "giraffe": "1f992", "backpack": "1f392",
    "umbrella": "2602", "handbag": "1f45c", "tie": "1f454", "suitcase": "1f9f3", "sports ball": "26bd",
    "kite": "1fa81", "skateboard": "1f6f9", "bottle": "1f37c", "wine glass": "1f377", "cup": "1f964", "knife": "1f52a",
    "spoon": "1f944", "bowl": "1f963", "banana": "1f34c", "apple": "1f34e", "sandwich": "1f96a", "orange": "1f34a",
    "broccoli": "1f966", "carrot": "1f955", "hot dog": "1f32d", "pizza": "1f355", "donut": "1f369", "cake": "1f382",
    "chair": "1fa91", "couch": "1f6cb", "potted plant": "1fab4", "bed": "1f6cf", "toilet": "1f6bd", "tv": "1f4fa",
    "laptop": "1f4bb", "computer mouse": "1f5b1", "computer keyboard": "2328", "cell phone": "1f4f1", "book": "1f4d6",
    "clock": "23f0", "vase": "1f3fa", "scissors": "2702", "teddy bear": "1f9f8",
}  # fmt: skip
IMAGES_PER_PROMPT = 4
SMALLEST_PX = 60
LARGEST_PX = {1: 120, 2: 100}  # by number of objects
LARGEST_OF_MANY_PX = 84
GAP_PX = 6
MIN_SCORE = 0.60
judge = rules.judge


@functools.cache
def geneval_rows() -> tuple[PromptRow, ...]:
    """All 553 rows of GenEval, in the order of its file."""
    file = importlib.resources.files(__package__) / "data" / "geneval_prompts.jsonl"
    return tuple(PromptRow.from_json(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines())


@functools.cache
def prompts(split: str) -> list[PromptRow]:
    """366 prompts of ``test_held`` (GenEval's) or of ``test_seen`` (compositions of training, as many of each tag)."""
    held = [row for row in geneval_rows() if all(entry["class"] in CLASSES for entry in row.include)]
    if split == "test_held":
        return held
    if split == "test_seen":
        counts = {tag: sum(row.tag == tag for row in held) for tag in rows.TAGS}
        return training().draw_distinct(np.random.default_rng(2), counts)
    raise SpecError(
        "benchmark g60", "unknown prompts", got=repr(split), expected="test_held or test_seen",
        hint=did_you_mean(split, ("test_held", "test_seen")),
    )  # fmt: skip


@functools.cache
def held_pairs() -> frozenset[frozenset[str]]:
    """Unordered pairs of classes that occur together in a prompt."""
    return frozenset(
        frozenset(entry["class"] for entry in row.include) for row in prompts("test_held") if len(row.include) == 2
    )


@functools.cache
def held_colors() -> frozenset[tuple[str, str]]:
    """(class, colour) of the prompts."""
    return frozenset(
        (entry["class"], entry["color"])
        for row in prompts("test_held") for entry in row.include if "color" in entry
    )  # fmt: skip


@functools.cache
def held_counts() -> frozenset[tuple[str, int]]:
    """(class, number) of the counting prompts."""
    return frozenset(
        (row.include[0]["class"], row.include[0]["count"]) for row in prompts("test_held") if row.tag == "counting"
    )


@functools.cache
def training() -> Compositions:
    """The compositions that training may show. As in GenEval, people have no colour."""
    names = list(CLASSES)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if frozenset((a, b)) not in held_pairs()]
    return Compositions(
        classes=names,
        pairs=pairs,
        coloured=[
            (name, color) for name in names[1:] for color in COLORS if (name, color) not in held_colors()
        ],
        counts={num: [name for name in names if (name, num) not in held_counts()] for num in range(1, 5)},
        positions=[(a, relation, b) for pair in pairs for a, b in (pair, pair[::-1]) for relation in RELATIONS],
    )  # fmt: skip


def scenes(split: str, num: int, seed: int | None = None) -> Iterator[Scene]:
    """``num`` scenes of ``train`` (seed 0 by default) or ``val`` (seed 1), all with training compositions."""
    if split not in ("train", "val"):
        raise SpecError("benchmark g60", "unknown scenes", got=repr(split), expected="train or val")
    number = ("train", "val").index(split)
    for index in range(num):
        rng = np.random.default_rng([60, number, number if seed is None else seed, index])
        yield scene(training().draw(rng), rng)


def scene(row: PromptRow, rng: np.random.Generator) -> Scene:
    """A random scene that fulfils a row; colours that the row leaves open are those of the emoji."""
    wanted = [(entry["class"], entry.get("color")) for entry in row.include for _ in range(entry["count"])]
    largest = LARGEST_PX.get(len(wanted), LARGEST_OF_MANY_PX)
    relation = next((entry["position"][0] for entry in row.include if "position" in entry), None)
    centres = None
    while centres is None:
        sides = rng.integers(SMALLEST_PX, largest + 1, size=len(wanted))
        half = np.array([size_of(CLASSES[name], int(side)) for (name, _), side in zip(wanted, sides, strict=True)])
        half = (half + 1) // 2
        centres = place(rng, half, GAP_PX, relation=relation)
    corners = centres - half
    sprites = tuple(
        Sprite(name, CLASSES[name], color, (int(x), int(y)), int(side))
        for (name, color), (x, y), side in zip(wanted, corners, sides, strict=True)
    )
    background = list(TURQUOISES)[int(rng.integers(len(TURQUOISES)))]
    sizes = (sides - SMALLEST_PX) / (largest - SMALLEST_PX)
    return Scene(row, background, sprites, captions(row, background, sizes, rng))


def look(image: NDArray[np.uint8], tag: str) -> list[Detection]:
    """The sprites of a 256 px picture (256, 256, 3), for ``judge``; prompts of some tags tint them."""
    coloured = tag in ("colors", "color_attr")
    return [detect(component, coloured) for component in components(image)]


def detect(component: Component, coloured: bool) -> Detection:
    """The class of a component; by form alone where it may be tinted (``coloured``), and then with its colour."""
    scores = _templates().class_scores(component, coloured)
    best = int(scores.argmax())
    name = list(CLASSES)[best] if scores[best] >= MIN_SCORE else None
    color = name_color(component.core()) if coloured else None
    return Detection(name, float(scores[best]), component.box, color)


@functools.cache
def _templates() -> SpriteTemplates:
    return SpriteTemplates(list(CLASSES.values()))
