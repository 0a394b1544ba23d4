"""Which compositions may be seen in training, and random draws from them. Shared by the tracks S12 and G60."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from raev2_tasks.t2i.benchmark import rows
from raev2_tasks.t2i.benchmark.rows import TAGS, PromptRow

TAG_WEIGHTS = {
    "single_object": 0.15, "two_object": 0.20, "counting": 0.20, "colors": 0.15, "position": 0.15, "color_attr": 0.15,
}  # fmt: skip
Coloured = tuple[str, str]  # class, colour
Item = TypeVar("Item")


@dataclass(frozen=True)
class Compositions:
    """The allowed compositions of a track."""

    classes: Sequence[str]
    pairs: Sequence[tuple[str, str]]  # unordered
    coloured: Sequence[Coloured]
    counts: Mapping[int, Sequence[str]]  # number -> classes, for 1 to 4
    positions: Sequence[tuple[str, str, str]]  # subject, relation, reference
    held_bindings: frozenset[frozenset[Coloured]] = frozenset()  # allowed pairs of coloured objects, but not together

    def draw(self, rng: np.random.Generator, tag: str | None = None) -> PromptRow:
        """A row with an allowed composition; a tag is drawn by TAG_WEIGHTS where none is given."""
        if tag is None:
            tag = TAGS[int(rng.choice(len(TAGS), p=[TAG_WEIGHTS[tag] for tag in TAGS]))]
        if tag == "single_object":
            return rows.single_object(_pick(rng, self.classes))
        if tag == "two_object":
            return rows.two_object(*_in_any_order(rng, _pick(rng, self.pairs)))
        if tag == "counting":
            num = int(rng.integers(1, 5))
            return rows.counting(_pick(rng, self.counts[num]), num)
        if tag == "colors":
            return rows.colors(*_pick(rng, self.coloured))
        if tag == "position":
            return rows.position(*_pick(rng, self.positions))
        while True:
            names = _in_any_order(rng, _pick(rng, self.pairs))
            colors = [self.colors_of(name) for name in names]
            if not all(colors):
                continue
            first, second = ((name, _pick(rng, colors)) for name, colors in zip(names, colors, strict=True))
            if first[1] != second[1] and frozenset((first, second)) not in self.held_bindings:
                return rows.color_attr(first, second)

    def colors_of(self, name: str) -> list[str]:
        """Colours that a class may have."""
        return [color for other, color in self.coloured if other == name]

    def draw_distinct(self, rng: np.random.Generator, counts: Mapping[str, int]) -> list[PromptRow]:
        """So many rows of each tag, no prompt twice; counting asks for two to four objects."""
        drawn: dict[str, PromptRow] = {}
        for tag, num in counts.items():
            wanted = len(drawn) + num
            if tag == "single_object":
                chosen = [rows.single_object(name) for name in self.classes[:num]]
                drawn |= {row.prompt: row for row in chosen}
            while len(drawn) < wanted:
                row = self.draw(rng, tag)
                if tag != "counting" or row.include[0]["count"] > 1:
                    drawn.setdefault(row.prompt, row)
        return list(drawn.values())


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _in_any_order(rng: np.random.Generator, pair: tuple[str, str]) -> tuple[str, str]:
    return pair if rng.random() < 0.5 else (pair[1], pair[0])
