"""Training captions of a composition: GenEval's template, one of eight paraphrases, and a long one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raev2_tasks.t2i.benchmark.rows import NUMBERS, PromptRow, english_plural, noun, phrase, with_article

WEIGHTS = {"template": 0.45, "short": 0.45, "long": 0.10}  # suggested mixture of the kinds in training
SIZE_WORDS = ("small", "medium-sized", "large")
OTHER_RELATIONS = {
    "left of": ("to the left of", "on the left side of"),
    "right of": ("to the right of", "on the right side of"),
    "above": ("on top of", "over"),
    "below": ("under", "beneath"),
}


def captions(
    row: PromptRow,
    background: str,
    sizes: Sequence[float] | NDArray[np.float64],
    rng: np.random.Generator,
    told: PromptRow | None = None,
) -> list[tuple[str, str]]:
    """Three captions as (text, kind) with the kinds ``template``, ``short`` and ``long``.

    sizes  of the objects in the order of ``row.include``, each between 0 (smallest possible) and 1 (largest)
    told   what the long caption says, where that is more than the row
    """
    template = row.prompt
    if row.tag == "counting" and row.include[0]["count"] == 1 and rng.random() >= 0.2:
        template = f"a photo of {noun(row.include[0])}"
    short = paraphrase(row, int(rng.integers(8)))
    return [(template, "template"), (short, "short"), (long(told or row, background, sizes), "long")]


def paraphrase(row: PromptRow, family: int) -> str:
    """The composition in other words; families 0 to 5 are frames, 6 and 7 depend on the tag."""
    text = phrase(row, naive_plural=False)
    if family < 6:
        plural = row.include[0]["count"] > 1
        frames = (
            "{}", f"there {'are' if plural else 'is'} {{}}", "an illustration of {}", "a picture of {}",
            "an image that shows {}", "{}, nothing else",
        )  # fmt: skip
        return frames[family].format(text)
    variant = family - 6
    first = row.include[0]
    if row.tag == "two_object":
        return f"{noun(first)} {('next to', 'beside')[variant]} {noun(row.include[1])}"
    if row.tag == "position":
        return phrase(row, relation=OTHER_RELATIONS[row.include[1]["position"][0]][variant])
    if row.tag == "counting":
        num, name = first["count"], first["class"]
        many = english_plural(name) if num > 1 else name
        return f"{num} {many}" if variant == 0 else f"exactly {NUMBERS[num]} {many}"
    if row.tag in ("colors", "color_attr"):
        form = ("{} that is {}", "{} in {}")[variant]
        return " and ".join(form.format(with_article(entry["class"]), entry["color"]) for entry in row.include)
    return (f"a single {first['class']}", f"only {noun(first)}")[variant]


def long(row: PromptRow, background: str, sizes: Sequence[float] | NDArray[np.float64]) -> str:
    """The composition with the background and the sizes of the objects."""
    words = [SIZE_WORDS[min(2, int(3 * size))] for size in sizes]
    if row.tag == "counting" and len(words) > 1:
        about = f"they are {words[0]}" if len(set(words)) == 1 else "they differ in size"
    else:
        about = " and ".join(f"the {entry['class']} is {word}" for entry, word in zip(row.include, words, strict=True))
    return f"{phrase(row, naive_plural=False)} on a plain {background} background, {about}"
