"""What was understood of a folder of pictures, as values and in words. class_folders.py decides it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raev2.files.picture_folder import text_of, told

MAX_HASHED = 20_000  # pictures; a plan compares no more


@dataclass(frozen=True)
class File:
    """One picture and its place in the data; split is "train" or "val", class_name "" where there are no classes."""

    split: str
    class_name: str
    path: Path


@dataclass
class Layout:
    """What was understood.

    src             the folder that was read
    split_folders   split -> its folder below `src`; empty where there are none
    left_out        how many files take no part, by kind; with `files` they are all the files below `src`
    notes           what else to say, one sentence each
    """

    src: Path
    split_folders: dict[str, str] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """All of it in words."""
        kind = "class folders" if self.classes else "no labels"
        if self.split_folders:
            kind = f"folders {' and '.join(self.split_folders.values())} with {kind}"
        return [
            f"Read {text_of(str(self.src))}: {kind}.",
            *self._split_lines(),
            *(self._class_lines() if self.classes else []),
            *self.notes,
            f"Left out: {told(self.left_out)}." if self.left_out else "No file is left out.",
        ]

    def _split_lines(self) -> list[str]:
        counts = Counter(file.split for file in self.files)
        origins = {split: f", from {folder}" for split, folder in self.split_folders.items()}
        if counts["val"]:
            origins.setdefault("val", ", a share of every class" if self.classes else ", a share of all")
        return [f"{split}: {num_pictures(counts[split])}{origins.get(split, '')}." for split in ("train", "val")]

    def _class_lines(self) -> list[str]:
        sizes = {split: Counter(f.class_name for f in self.files if f.split == split) for split in ("train", "val")}
        train = sizes["train"]
        small, large = min(self.classes, key=train.__getitem__), max(self.classes, key=train.__getitem__)
        span = f"smallest {small} ({train[small]:,} for training), largest {large} ({train[large]:,})"
        if train[small] == train[large]:
            span = f"each with {train[small]:,} for training"
        lines = [f"{len(self.classes):,} classes, first {self.classes[0]}, last {self.classes[-1]}; {span}."]
        if len(self.classes) == 1:
            lines = [f"1 class: {large}; for pictures without labels: --set class_level=0."]
        for split, other in (("train", "val"), ("val", "train")):
            only = [name for name in self.classes if sizes[split][name] and not sizes[other][name]]
            if only and sizes[other]:
                lines.append(f"Only in {split}{' (never trained)' * (split == 'val')}: {few(only)}.")
        return lines


def count_duplicates(files: Iterable[File]) -> int | None:
    """How many pictures for validation have the bytes of one for training; None where they are too many to compare."""
    paths = defaultdict[str, list[Path]](list)
    for file in files:
        paths[file.split].append(file.path)
    if len(paths["train"]) + len(paths["val"]) > MAX_HASHED:
        return None
    sizes = {path.stat().st_size for path in paths["val"]}
    known = {_sha256(path) for path in paths["train"] if path.stat().st_size in sizes}
    return sum(_sha256(path) in known for path in paths["val"])


def num_pictures(number: int) -> str:
    """'1 picture', '2 pictures'."""
    return f"{number:,} picture{'s' * (number != 1)}"


def source_name(src: Path, path: Path) -> str:
    """A path below `src` as text, with '/' and in one Unicode form."""
    return text_of(path.relative_to(src).as_posix())


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
