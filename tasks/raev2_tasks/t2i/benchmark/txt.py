"""Track TXT: one word in capital letters.

Held out are one invented word in a hundred, and a hundred real words; every letter is seen at every place, so the
held-out words test spelling and not unseen letters. The font is the one inside Pillow.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from raev2.errors import DataError, SpecError, did_you_mean
from raev2_tasks.t2i.benchmark import words
from raev2_tasks.t2i.benchmark.foreground import THRESHOLD, Component, cut, foreground, opening
from raev2_tasks.t2i.benchmark.palette import BACKGROUNDS, COLORS, flat, name_color
from raev2_tasks.t2i.benchmark.rows import PromptRow, with_article
from raev2_tasks.t2i.benchmark.rules import ImageScore
from raev2_tasks.t2i.benchmark.scene import BORDER_PX, SIZE_PX, Box, Scene

IMAGES_PER_PROMPT = 1
TAGS = ("invented_word", "real_word")
NUM_SEEN = {"invented_word": 200, "real_word": 100}
REAL_SHARE = 0.25  # of the training scenes
FONT_PX = (48, 75)
MAX_WIDTH_PX = 232
FONT_SHA256 = "69853909b940023570964e29cffe30da95aea8de3627736b5cd15ab30143169f"

GLYPH_PX = (20, 24)
TEMPLATE_FONTS_PX = (44, 58, 74)
ASPECT_WEIGHT = 0.12
MIN_LETTER_PX = 40
MIN_HEIGHT = 0.6  # of the median height


@dataclass(frozen=True)
class Word:
    """Capital letters on one line; ``corner`` is the top left corner, ``size`` the font size, in pixels."""

    text: str
    color: str
    corner: tuple[int, int]
    size: int

    @property
    def box(self) -> Box:
        """Where it is."""
        width, height = extent(self.text, self.size)
        x, y = self.corner
        return (x, y, x + width, y + height)

    def paint(self, canvas: Image.Image) -> None:
        """Draw it antialiased."""
        x, y = self.corner
        bottom = y + extent(self.text, self.size)[1]
        for letter in self.text:
            mask, descent = glyph(letter, self.size)
            top = bottom - mask.height + descent
            canvas.paste(flat(self.color), (x, top, x + mask.width, top + mask.height), mask)
            x += mask.width + gap(self.size)

    def to_json(self) -> dict[str, Any]:
        """Text, colour, box and font size."""
        return {"class": "word", "text": self.text, "color": self.color, "box": list(self.box), "font": self.size}


def gap(size: int) -> int:
    """Pixels between two letters."""
    return size // 5


def extent(text: str, size: int) -> tuple[int, int]:
    """Width and height of a word in pixels."""
    glyphs = [glyph(letter, size) for letter in text]
    width = sum(mask.width for mask, _ in glyphs) + gap(size) * (len(text) - 1)
    return width, max(mask.height for mask, _ in glyphs)


def row(text: str, color: str, tag: str) -> PromptRow:
    """The prompt of a word."""
    entry = {"class": "word", "count": 1, "text": text, "color": color}
    return PromptRow(f'the word "{text}" in {color} letters', tag, (entry,))


@functools.cache
def prompts(split: str) -> list[PromptRow]:
    """Words that training never shows (``test_held``) or does (``test_seen``), each in a colour; two tags.

    About 200 invented words and 100 real ones.
    """
    rng = np.random.default_rng(2)
    if split == "test_held":
        chosen = {
            "invented_word": [word for word in words.invented() if words.held_out(word)],
            "real_word": list(words.HELD_OUT_REAL),
        }
    elif split == "test_seen":
        chosen = {
            tag: [str(word) for word in rng.choice(known, size=NUM_SEEN[tag], replace=False)]
            for tag, known in zip(TAGS, words.training(), strict=True)
        }
    else:
        raise SpecError(
            "benchmark txt", "unknown prompts", got=repr(split), expected="test_held or test_seen",
            hint=did_you_mean(split, ("test_held", "test_seen")),
        )  # fmt: skip
    return [row(word, str(rng.choice(COLORS)), tag) for tag in TAGS for word in chosen[tag]]


def scenes(split: str, num: int, seed: int | None = None) -> Iterator[Scene]:
    """``num`` scenes of ``train`` (seed 0 by default) or ``val`` (seed 1), all with training words."""
    if split not in ("train", "val"):
        raise SpecError("benchmark txt", "unknown scenes", got=repr(split), expected="train or val")
    number = ("train", "val").index(split)
    for index in range(num):
        rng = np.random.default_rng([25, number, number if seed is None else seed, index])
        tag = TAGS[int(rng.random() < REAL_SHARE)]
        known = words.training()[TAGS.index(tag)]
        word, color = known[int(rng.integers(len(known)))], COLORS[int(rng.integers(len(COLORS)))]
        yield scene(row(word, color, tag), rng)


def scene(row: PromptRow, rng: np.random.Generator) -> Scene:
    """A random scene that shows the word of a row; long words are set smaller until they fit."""
    text, color = row.include[0]["text"], row.include[0]["color"]
    size = int(rng.integers(FONT_PX[0], FONT_PX[1] + 1))
    while extent(text, size)[0] > MAX_WIDTH_PX:
        size -= 1
    width, height = extent(text, size)
    x = int(rng.integers(BORDER_PX, SIZE_PX - BORDER_PX - width + 1))
    y = int(rng.integers(BORDER_PX, SIZE_PX - BORDER_PX - height + 1))
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    short = (
        f'"{text}" written in {color}',
        f'{color} letters that spell "{text}"',
        f'the text "{text}" in {color}',
        f'{with_article(color)} word that reads "{text}"',
        f'"{text}" in {color} capitals',
        f'a picture that says "{text}"',
    )[int(rng.integers(6))]
    long = f"{row.prompt}, {len(text)} letters on a plain {background} background"
    return Scene(
        row,
        background,
        (Word(text, color, (x, y), size),),
        [(row.prompt, "template"), (short, "short"), (long, "long")],
    )


def judge(seen: tuple[str, str | None], row: PromptRow) -> ImageScore:
    """Judge what ``look`` saw; exact = the word in its colour, lenient = the word in any.

    ``values``: ``char_accuracy`` is 1 - edit distance / length, at least 0; ``color`` the share of right colours.
    """
    wanted = row.include[0]
    text, color = seen
    distance = edit_distance(text, wanted["text"])
    same_color = color == wanted["color"]
    wrong = ([f"reads {text!r}"] if distance else []) + ([] if same_color else [f"is {color}"])
    values = {"char_accuracy": max(0.0, 1 - distance / len(wanted["text"])), "color": float(same_color)}
    details = {"wrong": wrong, "text": text, "color": color, "values": values}
    return ImageScore(not wrong, distance == 0, row.tag, details)


def look(image: NDArray[np.uint8], tag: str) -> tuple[str, str | None]:
    """The letters of a 256 px picture from left to right, and their colour (None without letters); for ``judge``."""
    letters = _letters(image)
    if not letters:
        return "", None
    pixels = np.concatenate([letter.core() for letter in letters])
    return "".join(_nearest_letter(letter) for letter in letters), name_color(pixels)


def edit_distance(first: str, second: str) -> int:
    """Least number of inserted, removed and replaced letters."""
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        current = [i]
        for j, b in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


@functools.cache
def glyph(letter: str, size: int) -> tuple[Image.Image, int]:
    """Coverage of a letter, 8 bits, cut to its ink; and how far it reaches below the base line, in pixels."""
    font = _font(size)
    stroke = max(1, size // 24)
    left, top, right, bottom = (int(value) for value in font.getbbox(letter, anchor="ls", stroke_width=stroke))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), letter, fill=255, font=font, anchor="ls", stroke_width=stroke)
    return mask, bottom


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font inside Pillow; DataError where it is another one, because letters are read with it."""
    if not features.check("freetype2"):
        raise DataError("benchmark txt", "Pillow has no FreeType", hint="Install a wheel of Pillow from PyPI.")
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    found = hashlib.sha256(font.font_bytes).hexdigest()
    if found != FONT_SHA256:
        hint = "Install a version of Pillow whose default font is Aileron Regular, such as 13.0."
        raise DataError("benchmark txt", "Pillow has another font", got=found, expected=FONT_SHA256, hint=hint)
    return font


def _letters(image: NDArray[np.uint8]) -> list[Component]:
    smooth, contrast = foreground(image)
    rough = opening(contrast > THRESHOLD)
    if not rough.any():
        return []
    threshold = max(THRESHOLD, 0.5 * float(np.percentile(contrast[rough], 90)))
    parts = cut(image, smooth, contrast > threshold, MIN_LETTER_PX)
    heights = [part.mask.shape[0] for part in parts]
    median = float(np.median(heights)) if parts else 0.0
    tall = [part for part, height in zip(parts, heights, strict=True) if height >= MIN_HEIGHT * median]
    return sorted(tall, key=lambda part: part.box[0])


def _nearest_letter(part: Component) -> str:
    templates, aspects = _letter_templates()
    mask, aspect = _letter_view(part.mask)
    distance = np.abs(templates - mask).mean(axis=1) + ASPECT_WEIGHT * np.abs(aspects - aspect)
    return words.ALPHABET[int(distance.argmin()) % len(words.ALPHABET)]


@functools.cache
def _letter_templates() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Masks and log aspects of the alphabet in three sizes, each letter cut from a picture of its own."""
    views = []
    for size in TEMPLATE_FONTS_PX:
        for letter in words.ALPHABET:
            canvas = Image.new("RGB", (SIZE_PX, SIZE_PX), BACKGROUNDS["grey"])
            Word(letter, "black", (90, 90), size).paint(canvas)
            views.append(_letter_view(_letters(np.asarray(canvas))[0].mask))
    return np.stack([mask for mask, _ in views]), np.array([aspect for _, aspect in views])


def _letter_view(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], float]:
    height, width = mask.shape
    small = Image.fromarray(mask.astype(np.float32)).resize(GLYPH_PX, Image.Resampling.BOX)
    return np.asarray(small).ravel(), float(np.log(width / height))
