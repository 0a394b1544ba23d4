"""The one reader of picture files: any format Pillow decodes -> upright 8-bit RGB. And the crop. No torch.

Read `to_rgb` first: it says what becomes of every kind of pixel.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from raev2.errors import DataError
from raev2.files.damage import stop_if_machine

BAD_FILE = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError,
    struct.error,
)  # fmt: skip
"""What Pillow raises for a damaged file, found by flipping bytes in files of every format."""
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
CENTRE_CROP = "resized to cover the size (bicubic, antialiased), centre crop"
MAX_PIXELS = 2**26  # 8192 x 8192; Pillow refuses at 2.7 times this
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})  # Pillow only recognises them

TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two


@dataclass(frozen=True)
class PictureFile:
    """A picture file that was read.

    rgb      what `to_rgb` makes of it
    format   Pillow's name of the file format, such as 'JPEG'
    plain    whether the file holds these pixels as they are, so that its bytes can be kept where RGB is wanted
    """

    rgb: Image.Image
    format: str
    plain: bool


def read_rgb(source: Path | bytes, where: str, hint: str = "") -> Image.Image:
    """A picture file (or its bytes) as upright 8-bit RGB, see `to_rgb`; its format is told by its content.

    Raises DataError at `where` for a file that cannot be read, for more than `MAX_PIXELS` pixels, and for values
    without a known range.
    """
    return read_picture(source, where, hint).rgb


def read_picture(source: Path | bytes, where: str, hint: str = "") -> PictureFile:
    """`read_rgb`, and what the file was."""
    with _opened(source, where, hint) as image:
        rgb = to_rgb(image, where)
        plain = image.mode == "RGB" and not image.has_transparency_data and _orientation(image) not in TURNS
        return PictureFile(rgb, str(image.format), plain)


def picture_size(source: Path | bytes, where: str) -> tuple[int, int]:
    """Width and height in pixels of a picture file once it is upright, from its header where that says it."""
    with _opened(source, where) as image:
        if image.format == "TIFF":
            image.load()  # which turns it
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


@contextmanager
def _opened(source: Path | bytes, where: str, hint: str = "") -> Iterator[Image.Image]:
    """An opened picture file of bearable size; DataError at `where` for what Pillow raises, also inside."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(where, f"{image.width} x {image.height} px")
            if image.format in NOT_DECODED:
                raise DataError(where, "a format that is not read as a picture", got=image.format)
            yield image
    except BOMBS as error:
        raise _too_large(where, type(error).__name__) from error
    except BAD_FILE as error:
        stop_if_machine(error)
        raise DataError(where, "cannot be read as an image", got=type(error).__name__, hint=hint) from error


def to_rgb(image: Image.Image, where: str = "picture") -> Image.Image:
    """Any Pillow image as upright 8-bit RGB.

    orientation     applied, from EXIF (JPEG, PNG, WebP, AVIF, TIFF) or XMP; EXIF that cannot be read counts as none
    transparency    composed on white
    16-bit grey     65535 -> 255; TIFF of fewer or signed bits by the range of those; 32-bit integers as 16-bit ones
    float grey      0 -> 0, 1 -> 255
    palette, grey, 1-bit, CMYK, YCbCr, LAB, HSV     converted; colour profiles are not applied
    animation       the frame that `image` stands at, the first one of an opened file

    Raises DataError at `where` for grey values outside their range.
    """
    image.load()  # raises for a truncated file
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rgb = Image.fromarray(_grey_levels(image, where)).convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def is_picture(source: Path | bytes) -> bool:
    """Whether a file claims to be a picture, by its suffix or by its first bytes. It may still be damaged."""
    if isinstance(source, Path) and source.suffix.lower() in picture_suffixes():
        return True
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.format not in NOT_DECODED
    except BOMBS:
        return True
    except BAD_FILE as error:
        stop_if_machine(error)
        return False


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


def _too_large(where: str, got: str) -> DataError:
    return DataError(
        where, "picture too large", got=got, expected=f"at most {MAX_PIXELS:,} pixels", hint="Make it smaller first."
    )


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow decodes, with the dot."""
    suffixes = Image.registered_extensions()  # loads every format
    return frozenset(end for end, name in suffixes.items() if name in Image.OPEN and name not in NOT_DECODED)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BAD_FILE:
        return 1


def _grey_levels(image: Image.Image, where: str) -> NDArray[np.uint8]:
    """Grey of 16 bits, 32 bits or floats as (H, W) levels of 8 bits, transparent pixels white."""
    pixels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    white, slack = (1, 1 / 510) if image.mode == "F" else (_white_level(tags), 0)  # half a level, for resampled floats
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -slack and high <= white + slack):  # also for not-a-number
        kind = "float" if image.mode == "F" else "integer"
        raise DataError(
            where, f"grey {kind} values outside their range", got=f"{low:g} to {high:g}",
            expected=f"0 (black) to {white} (white)", hint="Scale them, or save the picture with 8 bits.",
        )  # fmt: skip
    levels = np.rint(np.clip(pixels.astype(np.float32) * np.float32(255 / white), 0, 255)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    if (key := image.info.get("transparency")) is not None:
        levels = np.where(pixels == key, np.uint8(255), levels)
    return levels


def _white_level(tags: Mapping[int, Any]) -> int:
    """The integer that is white: the largest of the type, of 16 bits where it has more."""
    bits, signed = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    return 2 ** (bits - signed) - 1 if bits <= 16 else 2**16 - 1
