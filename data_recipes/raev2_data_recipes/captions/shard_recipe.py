"""What the data recipes of captioned images share: they say which examples there are, this writes the shards."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from raev2.errors import DataError, SpecError
from raev2.files.damage import stop_if_machine
from raev2.files.picture_folder import told
from raev2_data_recipes.base import DatasetRecipe, Option
from raev2_data_recipes.pictures.image_folder import resize_and_crop
from raev2_tasks.t2i.shards.files import Deferred, Example, verify_shards, write_shards
from raev2_tasks.t2i.shards.pixels import KEPT_FORMATS, encode_image, read_sample_picture
from raev2_tasks.t2i.shards.tar_scan import MAX_ASPECT, ShapeRule
from raev2_tasks.t2i.text.captions import KINDS, Caption

NUM_TRIED = 20  # samples that a plan reads
MAX_ASPECT_OPTION = Option(
    f"{MAX_ASPECT}", "leave out pictures whose longer side is more than this many times the shorter one"
)


class ShardRecipe(DatasetRecipe):
    """A source of captioned images. Subclasses give ``plan`` and ``splits``."""

    SHARD_OPTIONS: Mapping[str, Option] = {
        "size": Option("", "resize the short side and crop the centre to this many pixels; empty = keep the files"),
        "format": Option("jpg", "file format of images that are resized or converted: jpg (quality 95) or png"),
        "max_aspect": MAX_ASPECT_OPTION,
        "per_shard": Option("5000", "samples in a tar"),
    }

    @abstractmethod
    def splits(self, options: Mapping[str, str]) -> dict[str, Iterable[Deferred]]:
        """Examples of 'train' and 'val'. A list is shuffled before it is written, a stream is not."""

    def source_attribution(self, options: Mapping[str, str]) -> str:
        """What to say about the source with these options; it goes on the card of every model."""
        return self.attribution

    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """Write tar shards, indices and manifest."""
        image_format = options["format"]
        if image_format not in ("jpg", "png"):
            raise SpecError(f"data {self.name}: format", "not usable", got=image_format, expected="jpg or png")
        return write_shards(
            folder, "".join(c if c.isalnum() and c.isascii() else "-" for c in dataset_name), self.splits(options),
            per_shard=self.whole_number(options, "per_shard", 1), licence=self.licence, recipe=self.name,
            attribution=self.source_attribution(options), options=options, image_format=image_format,
        )  # fmt: skip

    def check_files(self, data_dir: Path) -> dict[str, Any]:
        """Shards and indices."""
        return verify_shards(data_dir)

    def size_px(self, options: Mapping[str, str]) -> int | None:
        """The option ``size``; None where files are kept."""
        return self.whole_number(options, "size", 8) if options["size"] else None

    def max_aspect(self, options: Mapping[str, str]) -> float:
        """The option ``max_aspect``."""
        return self.number(options, "max_aspect", 1)

    def share(self, options: Mapping[str, str], name: str) -> float:
        """An option as a share from 0 to 0.5."""
        try:
            value = float(options[name])
        except ValueError:
            value = math.nan
        if not 0 <= value <= 0.5:
            expected = "a number from 0 to 0.5"
            raise SpecError(f"data {self.name}: {name}", "not usable", got=options[name], expected=expected)
        return value

    def kind(self, text: str) -> str:
        """A kind of caption; SpecError when it is unknown."""
        if text not in KINDS:
            expected = f"one of {', '.join(KINDS)}"
            raise SpecError(f"data {self.name}", "unknown kind of caption", got=text, expected=expected)
        return text


def trial_lines(examples: Iterable[Deferred], with_caption: bool = True) -> list[str]:
    """For plans: what becomes of the first samples for training, which are read for that."""
    tried, captions, left_out, first = list(islice(examples, NUM_TRIED)), list[Caption](), Counter[str](), ""
    for deferred in tried:
        try:
            captions += deferred.read().captions
        except (DataError, OSError, ValueError) as error:
            stop_if_machine(error)
            left_out[getattr(error, "kind", type(error).__name__)] += 1
            first = first or f"{deferred.source}: {error}"
    lines = [f"Of the first {len(tried)} samples for training {len(tried) - left_out.total()} can be used."]
    if left_out:
        lines += [f"Left out of them: {told(left_out)}. The first: {first}"]
    if captions and with_caption:
        lines += [f"A caption: {captions[0].text:.80} ({captions[0].kind})"]
    return lines


def prepared(data: bytes, size_px: int | None, image_format: str, max_aspect: float = MAX_ASPECT) -> bytes:
    """An image file as it goes into a shard: plain RGB, and ``size_px`` square unless that is None.

    A file that is so already is kept byte for byte. Raises BadSample for an image that cannot be read, that would have
    to be enlarged, or that is too long: what training would leave out.
    """
    picture = read_sample_picture(data, "picture")
    rgb = picture.rgb
    ShapeRule.of((size_px or 0, size_px or 0), max_aspect=max_aspect).check("picture", *rgb.size)
    if (size_px is None or rgb.size == (size_px, size_px)) and picture.plain and picture.format in KEPT_FORMATS:
        return data
    return encode_image(rgb if size_px is None else resize_and_crop(rgb, size_px), image_format)


__all__ = ["MAX_ASPECT_OPTION", "Deferred", "Example", "ShardRecipe", "prepared", "trial_lines"]
