"""The picture reader: every mode, orientation and format against numpy, and the files it refuses."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from raev2.errors import DataError
from raev2.files import images
from raev2.files.images import is_picture, picture_size, read_picture, read_rgb, to_rgb

HEIGHT, WIDTH = 16, 24
SMOOTH = np.stack(
    np.broadcast_arrays(np.linspace(40, 220, WIDTH)[None], np.linspace(220, 60, HEIGHT)[:, None], np.float64(90)), -1
).round().astype(np.uint8)  # (H, W, 3), without symmetry  # fmt: skip
RAMP = np.arange(256).reshape(HEIGHT, 16)  # every level of 8 bits once


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(read_rgb(data, "picture")).astype(int)


def greys(data: bytes) -> np.ndarray:
    """Levels of a grey picture; its three channels must be equal."""
    levels = pixels(data)
    assert (levels == levels[..., :1]).all()
    return levels[..., 0]


# Formats

LOSSLESS = ["PNG", "TIFF", "BMP", "DIB", "PPM", "TGA", "SGI", "PCX", "QOI", "DDS", "ICO", "ICNS"]


@pytest.mark.parametrize("format", LOSSLESS)
def test_a_lossless_format_gives_the_pixels_that_were_written(format: str) -> None:
    side = 32 if format in ("ICO", "ICNS") else None
    image = Image.fromarray(SMOOTH) if side is None else Image.fromarray(SMOOTH).resize((side, side))
    options = {"sizes": [(side, side)]} if format == "ICO" else {}
    read = read_picture(file_of(image, format, **options), "picture")
    rgb = read.rgb.resize(image.size, Image.Resampling.NEAREST) if format == "ICNS" else read.rgb
    assert read.format == format and (np.asarray(rgb) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 98, "subsampling": 0}, 4),
        ("WEBP", {"quality": 98}, 16),
        ("WEBP", {"lossless": True}, 0),
        ("AVIF", {"quality": 98}, 12),
        ("JPEG2000", {}, 0),
        ("GIF", {}, 8),
    ],
)
def test_other_formats_give_nearly_the_pixels_that_were_written(format: str, options: Any, tolerance: int) -> None:
    if format in ("AVIF", "JPEG2000") and not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}[format]):
        pytest.skip(f"Pillow was built without {format}")
    assert np.abs(pixels(file_of(Image.fromarray(SMOOTH), format, **options)) - SMOOTH).max() <= tolerance


@pytest.mark.parametrize("name", ["picture.jpg", "picture.png", "picture", "picture.txt", "picture.tiff"])
@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_the_content_tells_the_format_not_the_suffix(tmp_path: Path, name: str, format: str) -> None:
    (tmp_path / name).write_bytes(file_of(Image.fromarray(SMOOTH), format, lossless=True))
    assert is_picture(tmp_path / name)
    assert (np.asarray(read_rgb(tmp_path / name, name)) == SMOOTH).all()


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_an_animated_file_gives_its_first_frame(format: str, options: Any) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == (255, 0, 0)).all()


# Orientation

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF 2.32, 4.6.4 A: where row 0 and column 0 are seen
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
TURNED = [("JPEG", {"quality": 98, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
TURNED += [("AVIF", {"quality": 98})] if features.check("avif") else []


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("format", "options"), TURNED, ids=[format for format, _ in TURNED])
def test_every_orientation_is_made_upright(format: str, options: Any, orientation: int) -> None:
    data = file_of(Image.fromarray(SMOOTH), format, exif=oriented(orientation), **options)
    expected = UPRIGHT[orientation](SMOOTH).astype(int)
    read = pixels(data)
    assert read.shape == expected.shape and np.abs(read - expected).max() <= 12
    assert picture_size(data, "picture") == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_pictures_of_other_modes_are_turned_too(mode: str) -> None:
    stored = np.zeros((HEIGHT, WIDTH), np.uint8)
    stored[:4, :4] = 255  # the corner at the top left is white
    image = Image.fromarray(stored.astype(np.uint16) * 257 if mode == "I;16" else stored)
    image = image if mode == "I;16" else image.convert(mode)
    read = greys(file_of(image, "PNG", exif=oriented(6)))
    assert (read == np.rot90(stored, -1)).all()


def test_only_a_file_that_has_to_be_changed_is_not_plain() -> None:
    image = Image.fromarray(SMOOTH)
    assert read_picture(file_of(image, "JPEG"), "x").plain
    assert read_picture(file_of(image, "JPEG", exif=oriented(1)), "x").plain
    assert not read_picture(file_of(image, "JPEG", exif=oriented(3)), "x").plain
    assert not read_picture(file_of(image.convert("L"), "JPEG"), "x").plain
    assert not read_picture(file_of(image.convert("RGBA"), "PNG"), "x").plain
    assert not read_picture(file_of(image, "PNG", transparency=(40, 220, 90)), "x").plain


@pytest.mark.filterwarnings("ignore")  # of Pillow, about the EXIF block
def test_exif_that_cannot_be_read_counts_as_none() -> None:
    exif = oriented(6)
    exif[0x011A] = 72.0
    good = file_of(Image.fromarray(SMOOTH), "JPEG", exif=exif, quality=98, subsampling=0)
    start, damaged = good.index(b"MM\0*"), 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(good)
        for place in rng.integers(0, 40, 2):
            data[start + place] = rng.integers(256)
        read = pixels(bytes(data))
        damaged += read.shape[0] == HEIGHT
        expected = SMOOTH if read.shape[0] == HEIGHT else np.rot90(SMOOTH, -1)
        assert sorted(read.shape) == sorted(expected.shape)
    assert 0 < damaged < 200


# Modes


@pytest.mark.parametrize(
    ("format", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I;16"), ("JPEG2000", "I;16")]
)
def test_16_bit_grey_is_scaled_by_its_range(format: str, mode: str) -> None:
    if format == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("Pillow was built without JPEG 2000")
    values = (RAMP * 257).astype(">u2" if mode == "I;16B" else "<u2")
    data = file_of(Image.fromarray(values), format)
    assert (greys(data) == RAMP).all()  # 0 -> 0, 32896 -> 128, 65535 -> 255
    assert greys(file_of(Image.fromarray(np.full((8, 8), 32768, np.uint16)), format)).mean() == 128


@pytest.mark.parametrize("format", ["TIFF", "PPM"])
def test_32_bit_integers_are_read_as_16_bit_values(format: str) -> None:
    assert (greys(file_of(Image.fromarray((RAMP * 257).astype(np.int32)), format)) == RAMP).all()


@pytest.mark.parametrize("format", ["TIFF", "PPM"])
def test_floats_are_scaled_from_0_to_1(format: str) -> None:
    assert (greys(file_of(Image.fromarray((RAMP / 255).astype(np.float32)), format)) == RAMP).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70000]], np.int32), r"grey integer values outside their range; got 0 to 70000; expected 0 \(bl"),
        (np.array([[-5, 9]], np.int32), r"got -5 to 9; expected 0 \(black\) to 65535 \(white\)\. Scale them, or save"),
        (np.array([[0, 255]], np.float32), "grey float values outside their range; got 0 to 255; expected 0 .black."),
        (np.array([[np.nan, 1]], np.float32), "got nan to nan; expected 0 .black. to 1 .white."),
    ],
)  # fmt: skip
def test_grey_values_without_a_known_range_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match="^here: .*" + message):
        read_rgb(file_of(Image.fromarray(values), "TIFF"), "here")


def patched(tiff: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another value of a short tag."""
    data, entry = bytearray(tiff), 0
    (start,) = struct.unpack_from("<I", tiff, 4)
    for number in range(struct.unpack_from("<H", tiff, start)[0]):
        entry = start + 2 + 12 * number
        if struct.unpack_from("<H", tiff, entry)[0] == tag:
            struct.pack_into("<H", data, entry + 8, value)
            return bytes(data)
    raise AssertionError(tag)


def test_tiff_with_12_bits_signed_bits_or_white_as_zero_is_scaled_by_what_its_tags_say() -> None:
    deep = file_of(Image.fromarray((RAMP * 257).astype(np.uint16)), "TIFF")
    assert (greys(patched(deep, 262, 0)) == 255 - RAMP).all()
    half = np.rint(RAMP[::-1] * 32767 / 255).astype(np.int16).view(np.int32)  # two values in one, to have tag 339
    signed = greys(patched(file_of(Image.fromarray(half), "TIFF"), 258, 16))
    assert (signed.ravel() == RAMP[::-1].ravel()[:128]).all() and signed.max() == 255
    packed = np.array([[0x80, 0x0F, 0xFF, 0x00, 0x00, 0x80] * 4], np.uint8)  # 0x800, 0xfff, 0x000, 0x080 in 12 bits
    twelve = file_of(Image.fromarray(packed.view("<u2").copy()), "TIFF")
    assert greys(patched(twelve, 258, 12))[0, :4].tolist() == [128, 255, 0, 8]


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, as Pillow does not write 16 bits a channel of colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    parts = [chunk(name, data) for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def test_png_with_16_bits_a_channel_keeps_its_levels() -> None:
    values = np.array([[[65535, 32768, 0], [0, 32768, 65535]]], ">u2")
    assert pixels(png(2, 1, 16, 2, b"\0" + values.tobytes())).tolist() == [[[255, 128, 0], [0, 128, 255]]]
    grey_alpha = np.array([[[32768, 65535], [32768, 0]]], ">u2")
    assert greys(png(2, 1, 16, 4, b"\0" + grey_alpha.tobytes())).tolist() == [[128, 255]]
    key = np.array([[1000, 32768]], ">u2")
    assert greys(png(2, 1, 16, 0, b"\0" + key.tobytes(), (b"tRNS", key[0, :1].tobytes()))).tolist() == [[255, 128]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "GIF", "TGA", "ICO"])
def test_transparency_is_composed_on_white_whatever_colour_hides_below(format: str) -> None:
    image = Image.new("RGBA", (32, 32), (200, 10, 10, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 32))
    read = pixels(file_of(image, format, **({"lossless": True} if format == "WEBP" else {})))
    assert (read[:, :16] == (0, 0, 255)).all() and (read[:, 16:] == 255).all()


def test_half_transparent_grey_and_palette_pixels_mix_with_white() -> None:
    half = Image.new("LA", (8, 8), (100, 51))  # 0.2 * 100 + 0.8 * 255
    assert (greys(file_of(half, "PNG")) == 224).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (pixels(file_of(palette, "PNG")) == (255, 0, 0)).all()
    assert (pixels(file_of(palette, "PNG", transparency=bytes([255, 51]))) == (255, 204, 204)).all()
    assert (pixels(file_of(palette, "PNG", transparency=1)) == 255).all()
    grey = Image.new("L", (8, 8), 7)
    assert (greys(file_of(grey, "PNG", transparency=7)) == 255).all()
    assert (greys(file_of(grey, "PNG", transparency=8)) == 7).all()


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 1, (255, 255, 255)), ("L", 128, (128, 128, 128)), ("LA", (128, 255), (128, 128, 128)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)), ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("I;16", 32768, (128, 128, 128)), ("I", 65535, (255, 255, 255)), ("F", 0.5, (128, 128, 128)),
        ("RGBa", (0, 0, 51, 51), (204, 204, 255)), ("HSV", (170, 255, 255), (0, 0, 255)),
    ],
)  # fmt: skip
def test_every_mode_becomes_the_colour_it_means(mode: str, colour: Any, rgb: tuple[int, int, int]) -> None:
    assert to_rgb(Image.new(mode, (4, 4), colour)).getpixel((0, 0)) == pytest.approx(rgb, abs=1)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_files_are_converted(format: str) -> None:
    read = pixels(file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), format))
    assert np.abs(read - (255, 0, 0)).max() <= 3


# Refused


def bomb(width: int, height: int) -> bytes:
    """A small file that claims to be large."""
    return png(width, height, 8, 2, b"")


@pytest.mark.parametrize("size", [(8193, 8192), (2**26 + 1, 1), (20_000, 20_000), (10_000, 9_000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    for read in (read_rgb, picture_size):
        with pytest.raises(
            DataError, match="^big: picture too large; got .*; expected at most 67,108,864 pixels. Make"
        ):
            read(bomb(*size), "big")
    assert Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS > 1.3 * images.MAX_PIXELS


def test_a_picture_just_below_the_limit_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH)
    assert read_rgb(file_of(Image.fromarray(SMOOTH), "PNG"), "x").size == (WIDTH, HEIGHT)
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DataError, match=f"got {WIDTH} x {HEIGHT} px"):
        read_rgb(file_of(Image.fromarray(SMOOTH), "PNG"), "x")


def test_formats_that_need_another_program_are_refused() -> None:
    with pytest.raises(DataError, match="^x: a format that is not read as a picture; got EPS$"):
        read_rgb(file_of(Image.fromarray(SMOOTH), "EPS"), "x")


@pytest.mark.filterwarnings("ignore")  # of Pillow, about tags
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000", "DDS", "ICNS"])
def test_damaged_files_are_data_errors_whatever_pillow_raises(format: str) -> None:
    if format in ("AVIF", "JPEG2000") and not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}[format]):
        pytest.skip(f"Pillow was built without {format}")
    good, refused = file_of(Image.fromarray(SMOOTH), format), 0
    rng = np.random.default_rng(0)
    for number in range(150):
        data = bytearray(good if number % 2 else good[: rng.integers(len(good))])
        for place in rng.integers(0, max(1, min(len(data), 200)), number % 5):
            data[place : place + 1] = bytes([rng.integers(256)])
        try:
            read_rgb(bytes(data), "picture")
        except DataError as error:
            refused += 1
            assert re.match("picture: (cannot be read as an image; got|picture too large|a format)", str(error))
    assert refused > 30


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(file_of(Image.fromarray(SMOOTH), "JPEG")[:200])
    assert not is_picture(tmp_path / "notes.txt") and is_picture(tmp_path / "cut.jpg")
    with pytest.raises(DataError, match="^notes: cannot be read as an image; got UnidentifiedImageError. Look"):
        read_rgb(tmp_path / "notes.txt", "notes", "Look at it.")
    with pytest.raises(DataError, match="got OSError"):
        read_rgb(tmp_path / "cut.jpg", "cut")
    with pytest.raises(DataError, match="got FileNotFoundError"):
        read_rgb(tmp_path / "absent.png", "absent")
