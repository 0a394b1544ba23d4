"""Image messages of ROS as frames: compressed pictures as they are, everything else as RGB arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError
from raev2.files.images import read_picture
from raev2_tasks.nwm.data.trajectories import Frame

Pixels = NDArray[np.uint8]
# Encodings of sensor_msgs/Image: bits of a value, values of a pixel, which of them are red, green, blue.
ENCODINGS: dict[str, tuple[int, int, list[int]]] = {
    "rgb8": (8, 3, [0, 1, 2]), "bgr8": (8, 3, [2, 1, 0]), "rgba8": (8, 4, [0, 1, 2]), "bgra8": (8, 4, [2, 1, 0]),
    "mono8": (8, 1, [0, 0, 0]), "8UC1": (8, 1, [0, 0, 0]), "8UC3": (8, 3, [2, 1, 0]), "8UC4": (8, 4, [2, 1, 0]),
    "rgb16": (16, 3, [0, 1, 2]), "bgr16": (16, 3, [2, 1, 0]), "16UC3": (16, 3, [2, 1, 0]),
    "rgba16": (16, 4, [0, 1, 2]), "bgra16": (16, 4, [2, 1, 0]),
    "mono16": (16, 1, [0, 0, 0]), "16UC1": (16, 1, [0, 0, 0]),
}  # fmt: skip
YUV = {"yuv422": (1, 0), "uyvy": (1, 0), "yuv422_yuy2": (0, 1), "yuyv": (0, 1)}  # first byte of luma, of chroma
# Colours of the upper left 2 x 2 pixels, row by row: 0 red, 1 green, 2 blue.
BAYER = {"rggb": (0, 1, 1, 2), "bggr": (2, 1, 1, 0), "gbrg": (1, 2, 0, 1), "grbg": (1, 0, 2, 1)}


def frame_of(where: str, message: Any) -> Frame:
    """The picture of a sensor_msgs Image or CompressedImage; DataError for an encoding that is none of a camera."""
    if hasattr(message, "format"):
        return _compressed(where, message.format, bytes(message.data))
    return _raw(where, message)


def _compressed(where: str, form: str, data: bytes) -> Frame:
    """As it is, unless it holds a Bayer mosaic, which is grey in its file."""
    encoding = form.split(";")[0].strip()
    if not encoding.startswith("bayer_"):
        return data
    picture = read_picture(data, where)
    return data if picture.plain else demosaic(np.asarray(picture.rgb)[..., 0], _pattern(where, encoding))


def _raw(where: str, message: Any) -> Pixels:
    encoding = message.encoding
    if encoding in YUV:
        return _yuv(_values(message, 8, 2), *YUV[encoding])
    if encoding.startswith("bayer_"):
        mosaic = _values(message, 16 if encoding.endswith("16") else 8, 1)[..., 0]
        return demosaic(_eight_bits(mosaic), _pattern(where, encoding))
    if encoding not in ENCODINGS:
        expected = ", ".join([*ENCODINGS, *YUV, "bayer_*"])
        raise DataError(where, "unknown image encoding", got=encoding, expected=expected)
    bits, depth, channels = ENCODINGS[encoding]
    return np.ascontiguousarray(_eight_bits(_values(message, bits, depth))[:, :, channels])


def _values(message: Any, bits: int, depth: int) -> NDArray[Any]:
    """(H, W, depth) of a message, whose rows may be padded."""
    kind = np.dtype(np.uint8) if bits == 8 else np.dtype(np.uint16).newbyteorder(">" if message.is_bigendian else "<")
    rows = np.asarray(message.data, np.uint8).reshape(message.height, message.step)
    used = np.ascontiguousarray(rows[:, : message.width * depth * kind.itemsize])
    return used.view(kind).reshape(message.height, message.width, depth)


def _eight_bits(values: NDArray[Any]) -> Pixels:
    """The whole range of the type to 0 to 255."""
    return values.astype(np.uint8) if values.dtype.itemsize == 1 else np.round(values / 257.0).astype(np.uint8)


def _yuv(pairs: Pixels, luma: int, chroma: int) -> Pixels:
    """RGB of YUV 4:2:2 (H, W, 2), two pixels sharing U and V; ITU-R BT.601, 16 to 235, as cv_bridge reads it."""
    y = (pairs[..., luma] - 16.0) * (255 / 219)
    u, v = ((np.repeat(pairs[:, first::2, chroma], 2, axis=1) - 128.0) * (255 / 224) for first in (0, 1))
    rgb = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], axis=-1)
    return np.clip(np.round(rgb), 0, 255).astype(np.uint8)


def _pattern(where: str, encoding: str) -> str:
    pattern = encoding.removeprefix("bayer_").rstrip("0123456789")
    if pattern not in BAYER:
        raise DataError(where, "unknown image encoding", got=encoding, expected=f"bayer_ with {', '.join(BAYER)}")
    return pattern


def demosaic(mosaic: Pixels, pattern: str) -> Pixels:
    """RGB (H, W, 3) of a Bayer mosaic (H, W): where a colour was not measured, the mean of its nearest neighbours."""
    colours = np.array(BAYER[pattern]).reshape(2, 2)
    height, width = mosaic.shape
    planes = []
    for colour in range(3):
        mask = np.tile(colours == colour, (height // 2 + 1, width // 2 + 1))[:height, :width].astype(np.float64)
        summed, weight = _neighbourhood(mosaic * mask), _neighbourhood(mask)
        planes.append(np.where(mask > 0, mosaic, summed / np.maximum(weight, 1e-9)))
    return np.round(np.stack(planes, axis=-1)).astype(np.uint8)


def _neighbourhood(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over 3 x 3 pixels with the weights 1 2 1 in each direction."""
    padded = np.pad(values, 1)
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]
