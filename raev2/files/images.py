"""Picture files: what Pillow raises, an error that says which file, and the standard crop. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from raev2.errors import DataError

IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a bad file
MAX_PIXELS = 50_000_000  # of a picture that is decoded; Pillow itself stops at 179 million


@contextmanager
def opened_image(file: Path, where: str, hint: str = "") -> Iterator[Image.Image]:
    """An image file, opened; DataError at `where` when it, or what is done with it inside, fails to read it."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise DataError(where, "too large a picture", got=size, expected=f"at most {MAX_PIXELS:,} pixels")
            yield image
    except IMAGE_ERRORS as error:
        raise DataError(where, "cannot be read as an image", got=type(error).__name__, hint=hint) from error


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize (bicubic, antialiased) so that the image covers `size` (height, width), then crop the centre."""
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    resized = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))
