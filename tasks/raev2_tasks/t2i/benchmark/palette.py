"""Colours of the benchmark: ten object colours, seven backgrounds, and CIE Lab."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RAMPS: dict[str, tuple[Rgb, Rgb]] = {  # dark end, light end
    "red": ((120, 0, 0), (255, 70, 70)),
    "orange": ((200, 90, 0), (255, 165, 60)),
    "yellow": ((190, 160, 0), (255, 240, 80)),
    "green": ((0, 90, 20), (70, 200, 80)),
    "blue": ((10, 40, 140), (80, 130, 255)),
    "purple": ((80, 20, 120), (170, 90, 220)),
    "pink": ((205, 95, 150), (255, 190, 220)),
    "brown": ((70, 35, 10), (150, 92, 48)),
    "black": ((0, 0, 0), (62, 62, 62)),
    "white": ((196, 196, 196), (255, 255, 255)),
}
# A family of turquoises: at least 25 Delta E from every ramp, and almost no emoji has pixels near it.
TURQUOISES: dict[str, Rgb] = {
    "teal": (64, 208, 184),
    "turquoise": (88, 232, 208),
    "mint": (136, 232, 184),
    "aqua": (120, 200, 200),
}
GREYS: dict[str, Rgb] = {"dark grey": (118, 118, 118), "grey": (140, 140, 140), "light grey": (160, 160, 160)}
BACKGROUNDS = TURQUOISES | GREYS

RAMP_STEPS = 11
MAX_VOTES = 512  # pixels of a component that are asked for their colour


def flat(color: str) -> Rgb:
    """The plain fill of a colour: 65 % of the way from dark to light."""
    dark, light = RAMPS[color]
    red, green, blue = (round(d + 0.65 * (bright - d)) for d, bright in zip(dark, light, strict=True))
    return red, green, blue


def tint(rgb: NDArray[np.uint8], opaque: NDArray[np.bool_], color: str) -> NDArray[np.uint8]:
    """Picture (H, W, 3) in shades of ``color``; luminance percentiles 2 and 98 of ``opaque`` become dark and light."""
    luminance = rgb @ np.array([0.2126, 0.7152, 0.0722])
    low, high = np.percentile(luminance[opaque], [2, 98])
    position = np.clip((luminance - low) / (high - low), 0, 1) if high - low >= 20 else np.full(luminance.shape, 0.6)
    dark, light = np.array(RAMPS[color], dtype=float)
    return np.round(dark + position[..., None] * (light - dark)).astype(np.uint8)


def lab(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """8-bit sRGB (..., 3) as CIE 1976 Lab with white D65 (..., 3).

    Works with tables (256 levels of each channel, 4,096 levels of the cube root): within 0.3 Delta E of the formula.
    """
    tables, root = _lab_tables()
    levels = [np.ascontiguousarray(rgb[..., channel]) for channel in range(3)]
    steps = [sum(table[channel].take(levels[channel]) for channel in range(3)) for table in tables]
    fx, fy, fz = (root.take(step.astype(np.int32)) for step in steps)
    out = np.empty(rgb.shape, dtype=np.float32)
    out[..., 0] = 116 * fy - 16
    out[..., 1] = 500 * (fx - fy)
    out[..., 2] = 200 * (fy - fz)
    return out


def delta_e(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Delta E 1976, the Euclidean distance in Lab, over the last axis."""
    difference = first - second
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))


def name_color(pixels: NDArray[np.uint8]) -> str:
    """The colour that most pixels (P, 3) are nearest to; each votes for the nearest of eleven steps of each ramp."""
    ramps = _ramps_lab()  # (10 * 11, 3)
    votes = lab(pixels[:: -(-len(pixels) // MAX_VOTES)])
    squared = (ramps**2).sum(-1) - 2 * votes @ ramps.T  # up to a term of the pixel
    nearest = squared.argmin(axis=1) // RAMP_STEPS
    return COLORS[int(np.bincount(nearest, minlength=len(COLORS)).argmax())]


@functools.cache
def _ramps_lab() -> NDArray[np.float32]:
    steps = np.linspace(0, 1, RAMP_STEPS)[:, None]
    ramps = [np.array(RAMPS[name][0]) * (1 - steps) + np.array(RAMPS[name][1]) * steps for name in COLORS]
    return lab(np.round(np.concatenate(ramps)).astype(np.uint8))


@functools.cache
def _lab_tables() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For X, Y, Z: levels of red, green, blue -> steps of 1/4095 of the white (3, 3, 256); step -> f (4097,)."""
    level = np.arange(256) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    matrix /= matrix.sum(axis=1, keepdims=True)  # the white is (1, 1, 1)
    tables = 4095 * matrix[:, :, None] * linear
    tables[:, 0] += 0.5  # rounds when cut to an integer
    step = np.arange(4097) / 4095
    root = np.where(step > (6 / 29) ** 3, np.cbrt(step), step / (3 * (6 / 29) ** 2) + 4 / 29)
    return tables.astype(np.float32), root.astype(np.float32)
