"""Images of any kind -> RGB, and RGB -> files. No torch."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

JPEG_QUALITY = 95
ORIENTATION = 0x0112  # EXIF tag


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: the EXIF orientation applied, transparency on white, 16 bits scaled to 8, CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16-bit grey; Pillow would clip it at 255
        pixels = np.asarray(image, dtype=np.float64)
        scale = 1.0 if pixels.size and pixels.max() <= 1.0 and image.mode == "F" else 1 / 65535
        return Image.fromarray(np.rint(np.clip(pixels * scale, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def is_plain_rgb(image: Image.Image) -> bool:
    """Whether an opened image is what shards should hold: RGB without transparency, nothing to rotate."""
    return image.mode == "RGB" and not image.has_transparency_data and image.getexif().get(ORIENTATION, 1) == 1


def encode_image(image: Image.Image, format: str) -> bytes:
    """An RGB image as 'png', or as 'jpg' of quality 95 with 4:4:4 chroma."""
    buffer = io.BytesIO()
    if format == "jpg":
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()
