"""Any folder of pictures: class sub-folders, the ImageNet layout (train/, val/), or a flat folder without labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from raev2.errors import DataError, SpecError
from raev2.files.images import is_picture, read_rgb
from raev2_data_recipes.base import SPLITS, Option, Picture, Recipe, Sample, encode_png


def resize_and_crop(image: Image.Image, size_px: int) -> Image.Image:
    """Short side to ``size_px``, then the central square.

    As in ADM: halve with a box filter while the short side is at least twice the target, then bicubic (Pillow's is
    antialiased), so that the result does not depend on tricks of the decoder.

    Source: Dhariwal and Nichol 2021 (ADM), guided-diffusion `image_datasets.py`, `center_crop_arr`; conventions of
    the ImageNet 256 px evaluation sets.
    """
    while min(image.size) >= 2 * size_px:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size_px / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))


@dataclass(frozen=True)
class Layout:
    """What was found in the source folder. ``files`` are (split, class name or "", path), sorted."""

    kind: str
    classes: list[str]
    files: list[tuple[str, str, Path]]


class ImageFolder(Recipe):
    """Copies or resizes the pictures of ``src``; which layout it is, is decided by what lies there."""

    name = "image-folder"
    summary = "your own folder of pictures; also ImageNet as it is distributed"
    licence = "that of your pictures"
    attribution = "The source folder named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a folder of pictures (class sub-folders, train/ and val/, or flat)"),
        "size": Option("", "resize the short side and crop the centre to this many pixels; empty = keep the files"),
        "val_fraction": Option("0.05", "share of pictures for validation, 0 to 0.5; unused where src/val exists"),
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        size_px, layout = self._size_px(options), self._layout(options)
        num_val = sum(split == "val" for split, _, _ in layout.files)
        return [
            f"Read {self.resolve(options)['src']}: {layout.kind}.",
            f"{len(layout.files) - num_val} training and {num_val} validation pictures, {len(layout.classes)} classes.",
            f"Resize and crop to {size_px} px, save as PNG." if size_px else "Copy the files as they are.",
        ]

    def classes(self, options: Mapping[str, str]) -> list[str]:
        """Names of the class sub-folders, sorted; empty for a flat folder."""
        return self._layout(options).classes

    def samples(self, options: Mapping[str, str]) -> Iterator[Sample]:
        """Pictures sorted by split, class and file name."""
        size_px, layout = self._size_px(options), self._layout(options)
        label_of = {name: label for label, name in enumerate(layout.classes)}
        for split, class_name, path in layout.files:
            read = partial(_read, path, size_px)
            yield Sample(split, class_name or path.stem, str(path), read, label_of.get(class_name))

    def _size_px(self, options: Mapping[str, str]) -> int | None:
        text = self.resolve(options)["size"]
        if text and (not text.isdecimal() or int(text) < 8):
            raise SpecError(f"data {self.name}: size", "not usable", got=text, expected="a number >= 8, or empty")
        return int(text) if text else None

    def _layout(self, options: Mapping[str, str]) -> Layout:
        resolved = self.resolve(options)
        src, fraction = Path(resolved["src"]).expanduser(), resolved["val_fraction"]
        where = f"data {self.name}: src"
        if not src.is_dir():
            raise DataError(where, "no such folder", got=src, hint="Give it with --set src=PATH.")
        val_fraction = _number(fraction)
        if not 0 <= val_fraction <= 0.5:
            expected = "a number from 0 to 0.5"
            raise SpecError(f"data {self.name}: val_fraction", "not usable", got=fraction, expected=expected)
        layout = _find_layout(src, val_fraction)
        if not any(split == "train" for split, _, _ in layout.files):
            raise DataError(where, "no pictures found", got=src, expected="files of a format that Pillow reads")
        return layout


def _number(text: str) -> float:
    """``text`` as a number; not-a-number when it is none, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _find_layout(src: Path, val_fraction: float) -> Layout:
    """Three layouts, tried in this order: src/train and src/val, class sub-folders, flat."""
    if all((src / split).is_dir() for split in SPLITS):
        found = [(split, name, path) for split in SPLITS for name, path in _pictures(src / split)]
        classes = sorted({name for _, name, _ in found if name})
        unsorted = [path for _, name, path in found if classes and not name]
        if unsorted:
            hint = "Sort the pictures of both splits into class sub-folders of the same names."
            raise DataError(f"data image-folder: {unsorted[0].parent}", "pictures without a class folder", hint=hint)
        return Layout("folders train/ and val/", classes, found)
    pictures = _pictures(src)
    classes = sorted({name for name, _ in pictures if name})
    # Hash order instead of a random one: adding a picture moves no other between the splits.
    files = []
    for class_name in classes or [""]:
        paths = [path for name, path in pictures if name == class_name]
        ranked = sorted(paths, key=lambda path: hashlib.sha256(str(path.relative_to(src)).encode()).hexdigest())
        num_val = min(len(paths) - 1, round(len(paths) * val_fraction))
        if val_fraction > 0 and len(paths) > 1:
            num_val = max(1, num_val)
        in_val = set(ranked[:num_val])
        files += [("val" if path in in_val else "train", class_name, path) for path in paths]
    files.sort(key=lambda item: (item[0], item[1], str(item[2])))
    return Layout("class sub-folders" if classes else "flat folder, no labels", classes, files)


def _pictures(folder: Path) -> list[tuple[str, Path]]:
    """(class name or "", path) of every picture in ``folder`` and in its sub-folders, sorted.

    With class sub-folders, pictures beside them have no class and are not taken.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and is_picture(path):
            parts = path.relative_to(folder).parts
            found.append((parts[0] if len(parts) > 1 else "", path))
    return [item for item in found if item[0]] or found


def _read(path: Path, size_px: int | None) -> Picture:
    data = path.read_bytes()
    rgb = read_rgb(data, str(path))
    return (
        Picture(data, path.suffix.lower(), rgb.size) if size_px is None else encode_png(resize_and_crop(rgb, size_px))
    )


RECIPE = ImageFolder()
