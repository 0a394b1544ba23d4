"""From a picture to its objects: what differs from the plain background, cut into connected components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError
from raev2_tasks.t2i.benchmark.palette import delta_e, lab
from raev2_tasks.t2i.benchmark.scene import SIZE_PX, Box

FRAME_PX = 6  # the background colour is the median of this frame
THRESHOLD = 14.0  # Delta E
MIN_AREA_PX = 420  # half of the smallest object that is drawn: less is a stain, for which nothing is right or wrong
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Component:
    """One connected region; mask, pixels and Lab are cut to its box."""

    box: Box
    mask: Mask  # (h, w)
    pixels: NDArray[np.uint8]  # (h, w, 3)
    lab: NDArray[np.float32]  # (h, w, 3), smoothed

    def core(self) -> NDArray[np.uint8]:
        """Pixels (P, 3) without those near the edge, or all where few are left."""
        inner = erode(self.mask)
        inner = erode(inner)
        return self.pixels[inner if inner.sum() > 30 else self.mask]


def foreground(image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smoothed Lab (256, 256, 3) and its Delta E to the background (256, 256)."""
    frame = np.concatenate([
        image[:FRAME_PX].reshape(-1, 3), image[-FRAME_PX:].reshape(-1, 3),
        image[FRAME_PX:-FRAME_PX, :FRAME_PX].reshape(-1, 3), image[FRAME_PX:-FRAME_PX, -FRAME_PX:].reshape(-1, 3),
    ])  # fmt: skip
    background = np.median(frame, axis=0).round().astype(np.uint8)
    smooth = _smooth(lab(image))
    return smooth, delta_e(smooth, lab(background))


def components(image: NDArray[np.uint8]) -> list[Component]:
    """The objects of a 256 px picture, at least 420 px large.

    Each component is cut again at 0.3 of its own median contrast: that removes halos of blur around vivid objects and
    keeps pale objects beside them whole.
    """
    from scipy import ndimage

    smooth, contrast = foreground(image)
    labels, _ = ndimage.label(contrast > THRESHOLD, np.ones((3, 3)))
    mask = np.zeros(contrast.shape, dtype=bool)
    areas = np.bincount(labels.ravel())
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        if areas[index] >= MIN_AREA_PX // 8:
            inside = labels[window] == index
            values = contrast[window]
            mask[window] |= inside & (values > max(THRESHOLD, 0.3 * np.median(values[inside])))
    return cut(image, smooth, closing(opening(mask)), MIN_AREA_PX)


def cut(image: NDArray[np.uint8], smooth: NDArray[np.float32], mask: Mask, min_area: int) -> list[Component]:
    """The 8-connected components of ``mask`` with at least ``min_area`` pixels."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    found = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        if areas[index] >= min_area:
            rows, columns = window
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            found.append(Component(box, labels[window] == index, image[window], smooth[window]))
    return found


def erode(mask: Mask) -> Mask:
    """Remove pixels that touch the outside at a side (4 neighbours)."""
    padded = np.pad(mask, 1)
    return padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def opening(mask: Mask) -> Mask:
    """Remove what a square of 2 x 2 pixels does not fit into."""
    squares = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
    opened = np.zeros_like(mask)
    for window in (
        (slice(-1), slice(-1)),
        (slice(1, None), slice(-1)),
        (slice(-1), slice(1, None)),
        (slice(1, None),) * 2,
    ):
        opened[window] |= squares
    return opened


def closing(mask: Mask) -> Mask:
    """Fill what a square of 3 x 3 pixels does not fit into."""
    padded = np.pad(mask, 2)
    wide = padded[1:-1] | padded[:-2] | padded[2:]
    wide = wide[:, 1:-1] | wide[:, :-2] | wide[:, 2:]  # dilated, one pixel larger on each side
    narrow = wide[1:-1] & wide[:-2] & wide[2:]
    return narrow[:, 1:-1] & narrow[:, :-2] & narrow[:, 2:]


def to_pictures(images: Any) -> NDArray[np.uint8]:
    """8-bit images (N, 3, H, H), tensor or array, as (N, 256, 256, 3); resized with bicubic interpolation.

    DataError for other shapes and types.
    """
    from PIL import Image

    array = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    if array.ndim != 4 or array.shape[1] != 3 or array.shape[2] != array.shape[3] or array.dtype != np.uint8:
        got = f"{array.dtype} {array.shape}"
        raise DataError("benchmark images", "not usable", got=got, expected="uint8 (N, 3, H, H), square pictures")
    array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    if array.shape[1] == SIZE_PX:
        return array
    size = (SIZE_PX, SIZE_PX)
    resized = [np.asarray(Image.fromarray(item).resize(size, Image.Resampling.BICUBIC)) for item in array]
    return np.stack(resized) if resized else np.zeros((0, *size, 3), np.uint8)


_KERNEL = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)
_KERNEL = (_KERNEL / _KERNEL.sum()).astype(np.float32)


def _smooth(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gaussian of sigma 0.8 px over the first two axes, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(values, [(3, 3) if a == axis else (0, 0) for a in range(3)], mode="edge")
        size = values.shape[axis]
        parts = [padded[(slice(None),) * axis + (slice(k, k + size),)] for k in range(7)]
        values = _KERNEL[3] * parts[3]
        for k in range(3):
            values += _KERNEL[k] * (parts[k] + parts[6 - k])
    return values
