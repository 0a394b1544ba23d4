"""A folder of pictures as it lies on disk: which files are pictures, and what was passed over, by kind. No torch."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raev2.errors import DataError
from raev2.files.images import is_picture
from raev2.files.replace import RECONSTRUCTIONS, SAMPLES

logger = logging.getLogger(__name__)
GRID = "grid.png"

TOOL_NAMES = frozenset(
    {
        "@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information",
        ".ds_store", "desktop.ini", "ehthumbs.db", "thumbs.db", "icon\r",
    }
)  # fmt: skip
"""What programs leave in folders of pictures, in lower case. Names with a leading dot are passed over too."""


@dataclass(frozen=True)
class PictureFolder:
    """A folder and all that is in it; links to folders are followed.

    pictures   files directly in it that claim to be pictures, or are `wanted` by whoever scans, in name order
    folders    its sub-folders in name order, without those of tools
    ignored    how many files directly in it, or in folders of tools, were passed over, by kind
    """

    path: Path
    pictures: list[Path] = field(default_factory=list)
    folders: list[PictureFolder] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def walk(self) -> Iterator[PictureFolder]:
        """This folder and all below it."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def all_pictures(self) -> list[Path]:
        """Its pictures at any depth, in path order."""
        return sorted(picture for folder in self.walk() for picture in folder.pictures)

    def all_ignored(self) -> Counter[str]:
        """What was passed over, at any depth."""
        return sum((folder.ignored for folder in self.walk()), Counter[str]())

    def has_pictures(self) -> bool:
        """Whether there are pictures in it, at any depth."""
        return any(folder.pictures for folder in self.walk())

    def filled(self) -> list[PictureFolder]:
        """Its sub-folders that hold pictures at any depth."""
        return [folder for folder in self.folders if folder.has_pictures()]


def scan_folder(
    path: Path, wanted: Callable[[Path], bool] = is_picture, above: frozenset[str] = frozenset()
) -> PictureFolder:
    """List a folder to any depth.

    wanted   which files to list; the others, and those of tools, are counted
    above    the real paths of the folders around it, which a link must not lead to

    Raises DataError for a folder that cannot be listed.
    """
    found, above = PictureFolder(path), above | {os.path.realpath(path)}
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"data {path}", "cannot be listed", got=error.strerror) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in TOOL_NAMES:
            kind, number = _of_a_tool(entry)
            found.ignored[kind] += number
        elif entry.is_dir() and os.path.realpath(entry) in above:
            found.ignored["link to a folder around it"] += 1
        elif entry.is_dir():
            found.folders.append(scan_folder(path / entry.name, wanted, above))
        elif not entry.is_file():
            found.ignored["broken link" if entry.is_symlink() else "neither file nor folder"] += 1
        elif wanted(path / entry.name):
            found.pictures.append(path / entry.name)
        else:
            found.ignored[f"no picture ({text_of(Path(entry.name).suffix.lower()) or 'no suffix'})"] += 1
    return found


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Image files among paths, folders searched to any depth, in name order; the log says what is left out there.

    The grid that a command of ours puts beside pictures is none of them. Raises DataError where nothing is left.
    """
    found, left_out = [], Counter[str]()
    for path in paths:
        if not path.exists():
            raise DataError(str(path), "no such file or folder")
        folder = scan_folder(path) if path.is_dir() else PictureFolder(path.parent, [path])
        found += [file for file in folder.all_pictures() if file.name != GRID or not _is_ours(file.parent)]
        left_out += folder.all_ignored()
    if not found:
        raise DataError(
            ", ".join(map(str, paths)), "no images here", got=told(left_out) or None,
            expected="files of a format that Pillow reads",
        )  # fmt: skip
    if left_out:
        logger.info("left out: %s", told(left_out))
    return found


def _is_ours(folder: Path) -> bool:
    return any((folder / kind.marker).is_file() for kind in (SAMPLES, RECONSTRUCTIONS))


def text_of(name: str) -> str:
    """A file name as one line of text in Unicode form C; bytes that are no UTF-8 become replacement characters."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return unicodedata.normalize("NFC", " ".join(text.splitlines()))


def told(left_out: Mapping[str, int]) -> str:
    """How many files were left out, by kind, in words; '' for none."""
    return ", ".join(f"{kind}: {number:,}" for kind, number in sorted(left_out.items()))


def _of_a_tool(entry: os.DirEntry[str]) -> tuple[str, int]:
    """Kind of a file or folder of a tool, and how many files that are."""
    if entry.is_dir():
        return f"folder {text_of(entry.name)}", sum(len(files) for _, _, files in os.walk(entry))
    return entry.name.strip() if entry.name.lower() in TOOL_NAMES else "hidden file", 1
