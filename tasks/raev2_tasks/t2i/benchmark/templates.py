"""Emoji pictures as templates of form, brightness and colour, and how well a component fits each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raev2_tasks.t2i.benchmark.foreground import Component, components
from raev2_tasks.t2i.benchmark.palette import TURQUOISES
from raev2_tasks.t2i.benchmark.scene import SIZE_PX
from raev2_tasks.t2i.benchmark.sprites import size_of, tinted

CELLS = 32  # side of a template
BLURRED_PX = 80
MIN_VARIANCE = 15.0  # of L, per unit of mask


class SpriteTemplates:
    """Templates of the emojis ``codes``: each sharp, and as it looks small in a picture that was 64 px.

    Both are made by the pipeline that also cuts components from a picture.
    """

    def __init__(self, codes: Sequence[str]) -> None:
        self.num_codes = len(codes)
        views = [_view(_alone(code, blurred)) for blurred in (False, True) for code in codes]
        self.mask = np.stack([view[0] for view in views])  # (K, P)
        self.lab = np.stack([view[1] for view in views])  # (K, P, 3)
        self.aspect = np.array([view[2] for view in views])  # (K,)
        self.light = np.stack([view[3] for view in views])  # (K, P)

    def class_scores(self, component: Component, by_form: bool) -> NDArray[np.float64]:
        """Likeness of a component to each emoji, at most 1: that of its better template.

        by_form  leave colour out, for pictures that may be tinted
        """
        mask, lab, aspect, light = _view(component)
        low = np.minimum(self.mask, mask)
        shared = low.sum(axis=1)
        iou = shared / (self.mask.sum(axis=1) + mask.sum() - shared)
        shape = np.exp(-np.abs(self.aspect - aspect) / 0.25)
        correlation = self._correlation(low, light)
        if by_form:
            return self._better(0.5 * iou + 0.3 * correlation + 0.2 * shape)
        difference = self.lab - lab
        distance = np.sqrt(np.einsum("kpc,kpc->kp", difference, difference))
        colour = np.exp(-(low * distance).sum(axis=1) / np.maximum(shared, 1e-6) / 25)
        return self._better(0.40 * iou + 0.20 * correlation + 0.15 * shape + 0.25 * colour)

    def _better(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return scores.reshape(2, self.num_codes).max(axis=0)

    def _correlation(self, weight: NDArray[np.float32], light: NDArray[np.float32]) -> NDArray[np.float64]:
        """Correlation of brightness under the common mask (K, P); flat pictures count as nearly uncorrelated."""
        total = np.maximum(weight.sum(axis=1), 1e-6)
        own = light[None] - ((weight @ light) / total)[:, None]
        other = self.light - (np.einsum("kp,kp->k", weight, self.light) / total)[:, None]
        weighted = weight * own
        covariance = np.einsum("kp,kp->k", weighted, other) / total
        variance_own = np.einsum("kp,kp->k", weighted, own) / total
        variance_other = np.einsum("kp,kp,kp->k", weight, other, other) / total
        return covariance / np.sqrt((variance_own + MIN_VARIANCE) * (variance_other + MIN_VARIANCE))


def _view(
    component: Component,
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, NDArray[np.float32]]:
    """Mask (P,), Lab (P, 3), log aspect and L (P,) of a component at 32 x 32 cells; outside: the mean of the inside."""
    inside = component.mask
    lab = np.where(inside[..., None], component.lab, component.lab[inside].mean(axis=0))
    size = (CELLS, CELLS)

    def shrink(values: NDArray[np.float32]) -> NDArray[np.float32]:
        image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
        return np.asarray(image.resize(size, Image.Resampling.BOX)).ravel()

    mask = shrink(inside.astype(np.float32))
    planes = np.stack([shrink(lab[..., c]) for c in range(3)], axis=1)
    height, width = inside.shape
    return mask, planes, float(np.log(width / height)), np.ascontiguousarray(planes[:, 0])


def _alone(code: str, blurred: bool) -> Component:
    """The emoji at twice its size, cut from a picture of its own; ``blurred``: 80 px wide or high, seen at 64 px."""
    canvas = Image.new("RGB", (SIZE_PX, SIZE_PX), TURQUOISES["turquoise"])
    sprite = tinted(code, None)
    size = size_of(code, BLURRED_PX) if blurred else (2 * sprite.width, 2 * sprite.height)
    picture = sprite.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(picture, ((SIZE_PX - picture.width) // 2, (SIZE_PX - picture.height) // 2), picture)
    if blurred:
        canvas = canvas.reduce(4).resize(canvas.size, Image.Resampling.BICUBIC)
    return max(components(np.asarray(canvas)), key=lambda component: component.mask.sum())
