"""Pictures of samples: read them, write them. No torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from raev2.errors import DataError
from raev2.files.images import PictureFile, picture_size, read_picture
from raev2_tasks.t2i.text.captions import BadSample

JPEG_QUALITY = 95
KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Files that go into a shard as they are when they hold upright RGB -> their suffix. An MPO begins as a JPEG."""


def read_sample_picture(data: bytes, where: str) -> PictureFile:
    """`read_picture` of a sample; BadSample where it cannot be used."""
    with _bad_sample(where):
        return read_picture(data, where)


def sample_picture_size(data: bytes, where: str, decode: bool = False) -> tuple[int, int]:
    """Upright width and height in pixels of the picture of a sample; with `decode` it is read completely for that."""
    with _bad_sample(where):
        return read_picture(data, where).rgb.size if decode else picture_size(data, where)


@contextmanager
def _bad_sample(where: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise BadSample("bad_image", where, str(error).removeprefix(f"{where}: ")) from error


def encode_image(image: Image.Image, format: str) -> bytes:
    """An RGB image as 'png', or as 'jpg' of quality 95 with 4:4:4 chroma."""
    buffer = io.BytesIO()
    if format == "jpg":
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()
