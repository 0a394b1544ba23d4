"""Any folder of pictures as a dataset; what its sub-folders mean is decided in class_folders.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from raev2.errors import SpecError
from raev2.files.images import read_picture
from raev2.files.picture_folder import text_of
from raev2_data_recipes.base import Option, Picture, Recipe, Sample, encode_png
from raev2_data_recipes.pictures.class_folders import Choice, read_layout
from raev2_data_recipes.pictures.layout import MAX_HASHED, Layout, count_duplicates, num_pictures, source_name

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}  # of the others: the name of the format


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


class ImageFolder(Recipe):
    """Copies, resizes or lists the pictures of ``src``; which layout it is, is decided by what lies there."""

    resumable = True
    name = "image-folder"
    summary = "your own folder of pictures; also ImageNet as it is distributed"
    licence = "that of your pictures"
    attribution = "The source folder named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a folder of pictures (class sub-folders, train/ and val/ or test/, or flat)"),
        "size": Option("", "resize the short side and crop the centre to this many pixels; empty = keep the files"),
        "in_place": Option("no", "yes: the pictures stay where they are, and the index has their paths"),
        "val_fraction": Option(
            "0.05", "share of pictures for validation, 0 to 0.5; unused where src/val or src/test exists"
        ),
        "class_level": Option(
            "", "0 = no classes, 1 = the folders in src (or in the folder of a split) are the classes, 2 = the folders "
            "in those, ...; empty = as it looks"
        ),
        "splits": Option("", "yes or no: whether folders called train, val or test are splits; empty = as it looks"),
    }  # fmt: skip

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        size_px, layout = self._size_px(options), self._layout(options)
        found = count_duplicates(layout.files)
        return [
            *layout.lines(),
            f"More than {MAX_HASHED:,} pictures: `build` counts those that are in both splits."
            if found is None
            else f"In val and in train, byte for byte: {num_pictures(found)}.",
            "The pictures stay where they are."
            if self._in_place(options)
            else f"Resize and crop to {size_px} px, save as PNG."
            if size_px
            else "Copy the files as they are.",
        ]

    def classes(self, options: Mapping[str, str]) -> list[str]:
        """Names of the class folders, sorted; empty where there are none."""
        return self._layout(options).classes

    def samples(self, options: Mapping[str, str]) -> Iterator[Sample]:
        """Pictures sorted by split, class and file name."""
        return self._samples(self._layout(options), options)

    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """The folder of pictures, from one look at the source; what was understood goes into the manifest."""
        layout = self._layout(options)
        samples = self._samples(layout, options)
        facts = {"understood": layout.lines(), "left_out": dict(sorted(layout.left_out.items()))}
        return self.write_pictures(folder, dataset_name, options, layout.classes, samples, facts)

    def _samples(self, layout: Layout, options: Mapping[str, str]) -> Iterator[Sample]:
        size_px, in_place = self._size_px(options), self._in_place(options)
        label_of = {name: label for label, name in enumerate(layout.classes)}
        for file in layout.files:
            yield Sample(
                file.split,
                file.class_name or text_of(file.path.stem),
                text_of(str(file.path)),
                partial(_read, file.path, size_px, in_place),
                label_of.get(file.class_name),
                {"source": source_name(layout.src, file.path)},
            )

    def _size_px(self, options: Mapping[str, str]) -> int | None:
        text = self.resolve(options)["size"]
        if text and (not text.isdecimal() or int(text) < 8):
            raise SpecError(f"data {self.name}: size", "not usable", got=text, expected="a number >= 8, or empty")
        return int(text) if text else None

    def _in_place(self, options: Mapping[str, str]) -> bool:
        resolved = self.resolve(options)
        if resolved["in_place"] not in ("yes", "no"):
            got = resolved["in_place"]
            raise SpecError(f"data {self.name}: in_place", "not usable", got=got, expected="yes or no")
        if resolved["in_place"] == "yes" and resolved["size"]:
            what, got = "pictures that stay are not resized", f"size={resolved['size']}"
            raise SpecError(f"data {self.name}: in_place", what, got=got, expected="no size")
        return resolved["in_place"] == "yes"

    def _layout(self, options: Mapping[str, str]) -> Layout:
        resolved = self.resolve(options)
        src, fraction = self.folder(resolved), resolved["val_fraction"]
        val_fraction = _number(fraction)
        if not 0 <= val_fraction <= 0.5:
            expected = "a number from 0 to 0.5"
            raise SpecError(f"data {self.name}: val_fraction", "not usable", got=fraction, expected=expected)
        return read_layout(src, val_fraction, self._choice(resolved))

    def _choice(self, resolved: Mapping[str, str]) -> Choice:
        level, splits = resolved["class_level"], resolved["splits"]
        if level and not level.isdecimal():
            raise SpecError(f"data {self.name}: class_level", "not usable", got=level, expected="a number, or empty")
        if splits not in ("", "yes", "no"):
            raise SpecError(f"data {self.name}: splits", "not usable", got=splits, expected="yes, no, or empty")
        return Choice(int(level) if level else None, {"": None, "yes": True, "no": False}[splits])


def _number(text: str) -> float:
    """``text`` as a number; not-a-number when it is none, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _read(path: Path, size_px: int | None, in_place: bool) -> Picture:
    if in_place:
        str(path).encode()  # the index is UTF-8: a name that is none is an error, so the picture is rejected
    data = path.read_bytes()
    picture = read_picture(data, text_of(str(path)))
    if size_px is not None:
        return encode_png(resize_and_crop(picture.rgb, size_px))
    suffix = SUFFIXES.get(picture.format, f".{picture.format.lower()}")
    return Picture(data, suffix, picture.rgb.size, path.absolute() if in_place else None)


RECIPE = ImageFolder()
