"""How a camera frame becomes an image of the model's size. Nothing is padded unless `letterbox` asks for it."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raev2.errors import DataError
from raev2.files.images import CENTRE_CROP, centre_crop
from raev2_tasks.nwm.spec import Fit

FITS: dict[Fit, str] = {
    "squeeze": "largest centred 4:3 part, resized without keeping its aspect (bicubic, antialiased)",
    "crop": CENTRE_CROP,
    "letterbox": "resized to fit inside the size (bicubic, antialiased), black around",
    "none": "resized (bicubic, antialiased)",
}
ASPECT = 4 / 3  # width / height of the part of a frame that `squeeze` keeps


def fit_image(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """An RGB `image` with `size` (height, width) pixels; bicubic, antialiased.

    squeeze     the largest centred 4:3 part, then resized without keeping its aspect: the field of view is kept
    crop        resized so that it covers `size`, then the centre: a 4:3 frame loses a quarter of its width at 1:1
    letterbox   resized to fit inside `size`, black around; where the picture is: `letterbox_box`
    none        resized; DataError when the aspect differs from that of `size` by more than 2 %
    """
    height, width = size
    if fit == "crop":
        return centre_crop(image, size)
    if fit == "squeeze":
        part_width = min(image.width, round(image.height * ASPECT))
        part_height = min(image.height, round(image.width / ASPECT))
        left, top = (image.width - part_width) // 2, (image.height - part_height) // 2
        box = (left, top, left + part_width, top + part_height)
        return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if fit == "letterbox":
        left, top, right, bottom = letterbox_box(image.size, size)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        return canvas
    if abs(image.width * height / (image.height * width) - 1) > 0.02:
        raise DataError(
            "frames", "another aspect than the model's images", got=f"{image.width}x{image.height}",
            expected=f"{width}x{height}", hint="Choose fit=squeeze, crop or letterbox.",
        )  # fmt: skip
    return image.resize((width, height), Image.Resampling.BICUBIC)


def letterbox_box(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where `letterbox` puts an image of (width, height) inside `size` (height, width): left, top, right, bottom."""
    height, width = size
    scale = min(width / image_size[0], height / image_size[1])
    inner_width, inner_height = max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def encode_frame(pixels: NDArray[np.uint8] | Image.Image, suffix: str) -> bytes:
    """An image file: '.png', or '.jpg' with quality 95 and full colour resolution. pixels (H, W, 3)."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    if suffix == ".png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
