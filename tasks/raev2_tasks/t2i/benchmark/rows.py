"""Prompts and what must be in their pictures, in the form of GenEval's metadata.

A row asks for objects (``include``) and may forbid some (``exclude``). An entry is a mapping with ``class`` and
``count``, and where the prompt says so ``color``, or ``position``: (relation, index of the reference entry).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four", "five")

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """One prompt; ``tier`` splits a tag further where a track does so."""

    prompt: str
    tag: str
    include: tuple[Entry, ...]
    exclude: tuple[Entry, ...] = ()
    tier: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as GenEval writes it."""
        row: dict[str, Any] = {"tag": self.tag, "include": [dict(entry) for entry in self.include]}
        if self.exclude:
            row["exclude"] = [dict(entry) for entry in self.exclude]
        if self.tier is not None:
            row["tier"] = self.tier
        return row | {"prompt": self.prompt}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> PromptRow:
        """The row of a line of GenEval's metadata."""
        exclude = tuple(row.get("exclude", ()))
        return cls(row["prompt"], row["tag"], tuple(row["include"]), exclude, row.get("tier"))


def single_object(name: str) -> PromptRow:
    """One object."""
    return _row("single_object", {"class": name, "count": 1})


def two_object(first: str, second: str) -> PromptRow:
    """Two objects of different classes."""
    return _row("two_object", {"class": first, "count": 1}, {"class": second, "count": 1})


def counting(name: str, num: int, color: str | None = None) -> PromptRow:
    """Exactly ``num`` objects of a class; in training captions of one colour, too."""
    entry = {"class": name, "count": num} | ({"color": color} if color else {})
    return _row("counting", entry, exclude=({"class": name, "count": num + 1},))


def colors(name: str, color: str) -> PromptRow:
    """One object of a colour."""
    return _row("colors", {"class": name, "count": 1, "color": color})


def position(subject: str, relation: str, reference: str, colors: tuple[str, str] | None = None) -> PromptRow:
    """``subject`` is ``relation`` (one of RELATIONS) ``reference``; in training captions with both colours, too."""
    first, second = ({"color": color} for color in colors) if colors else ({}, {})
    return _row(
        "position",
        {"class": reference, "count": 1, **second}, {"class": subject, "count": 1, **first, "position": (relation, 0)},
    )  # fmt: skip


def color_attr(first: tuple[str, str], second: tuple[str, str], tier: str | None = None) -> PromptRow:
    """Two objects, each (class, colour)."""
    entries = [{"class": name, "count": 1, "color": color} for name, color in (first, second)]
    return _row("color_attr", *entries, tier=tier)


def phrase(row: PromptRow, naive_plural: bool = True, relation: str | None = None) -> str:
    """What a row asks for, in words: "two cats", "a red car and a blue cup".

    naive_plural  add "es" after s and "s" otherwise, as GenEval does: "two sheeps"
    relation      other words for the relation of a position row
    """
    if row.tag == "counting":
        entry = row.include[0]
        num, name = entry["count"], " ".join(word for word in (entry.get("color"), entry["class"]) if word)
        plural = (name + ("es" if name.endswith("s") else "s")) if naive_plural else english_plural(name)
        return f"{NUMBERS[num]} {plural if num > 1 else name}"
    if row.tag == "position":
        reference, subject = row.include
        words = relation or subject["position"][0]
        return f"{noun(subject)} {words} {noun(reference)}"
    return " and ".join(noun(entry) for entry in row.include)


def noun(entry: Entry) -> str:
    """ "a car", "an orange car"."""
    return with_article(" ".join(word for word in (entry.get("color"), entry["class"]) if word))


def with_article(words: str) -> str:
    """ "a" or "an" by the first letter."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def english_plural(name: str) -> str:
    """The plural as people write it."""
    irregular = {
        "person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice",
        "broccoli": "pieces of broccoli", "scissors": "pairs of scissors",
    }  # fmt: skip
    if name in irregular:
        return irregular[name]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _row(tag: str, *include: Entry, exclude: tuple[Entry, ...] = (), tier: str | None = None) -> PromptRow:
    row = PromptRow("", tag, include, exclude, tier)
    return PromptRow(f"a photo of {phrase(row)}", tag, include, exclude, tier)
