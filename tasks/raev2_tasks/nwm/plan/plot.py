"""Pictures of plans: what is seen at the start and at the goal, and everything that was tried, from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raev2_tasks.nwm.plan.planning import Plan, accumulate_batch, best_first

Array = NDArray[np.float64]
SIZE, GAP, LINE, SCALE = 256, 8, 22, 3  # pixels; lines are drawn larger by SCALE and then reduced
COLOURS = {"plan": (37, 99, 201), "true": (24, 140, 72), "straight": (120, 120, 120), "random": (200, 120, 40)}
BEST, WORST = np.array([120, 150, 235.0]), np.array([236, 236, 236.0])
MAX_CANDIDATES = 400


@dataclass(frozen=True)
class PlanPicture:
    """One row of the figure.

    paths   poses (S, 3) by name: plan, true, straight, random; seen from the start
    """

    caption: str
    start: NDArray[np.uint8]  # (Hpx, Wpx, 3)
    goal: NDArray[np.uint8]
    plan: Plan
    paths: Mapping[str, Array]


def save_plans(rows: Sequence[PlanPicture], file: Path) -> None:
    """Write one PNG: a row for each plan with the frame at the start, the goal, and the map. Forward is up."""
    width, height = 3 * SIZE + 4 * GAP, len(rows) * (SIZE + LINE + GAP) + LINE + 2 * GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for number, row in enumerate(rows):
        top = GAP + number * (SIZE + LINE + GAP)
        draw.text((GAP, top), row.caption, fill="black", font=font)
        pictures = [
            Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.NEAREST) for pixels in (row.start, row.goal)
        ]
        for column, picture in enumerate([*pictures, draw_map(row.plan, row.paths)]):
            canvas.paste(picture, (GAP + column * (SIZE + GAP), top + LINE))
    left = GAP
    for name, colour in {"start, goal, then from above:": (0, 0, 0), **COLOURS, "candidates": (120, 150, 235)}.items():
        draw.text((left, height - LINE), name, fill=colour, font=font)
        left += int(draw.textlength(name, font)) + 14
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(file)


def draw_map(plan: Plan, paths: Mapping[str, Array]) -> Image.Image:
    """Candidates, the better the darker, and named paths, from above."""
    commands = np.concatenate([tried.commands for tried in plan.iterations])
    costs = np.concatenate([tried.costs for tried in plan.iterations])
    worst_first = best_first(costs)[:MAX_CANDIDATES][::-1]
    candidates = accumulate_batch(commands[worst_first])
    points = np.concatenate([candidates.reshape(-1, 3), *paths.values()])[:, :2]
    low, high = np.minimum(points.min(0), 0), np.maximum(points.max(0), 0)
    middle, reach = (low + high) / 2, max(float((high - low).max()) / 2, 0.5) * 1.1
    size = SIZE * SCALE

    def place(path: Array) -> list[tuple[float, float]]:
        full = np.concatenate([np.zeros((1, 2)), path[:, :2]]) - middle
        return [(size / 2 * (1 - y / reach), size / 2 * (1 - x / reach)) for x, y in full]

    image = Image.new("RGB", (size, size), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for number, path in enumerate(candidates):
        share = number / max(len(candidates) - 1, 1)
        draw.line(place(path), fill=tuple((WORST + share * (BEST - WORST)).astype(int)), width=SCALE)
    for name in [name for name in ("random", "straight", "true", "plan") if name in paths]:
        line = place(paths[name])
        draw.line(line, fill=COLOURS[name], width=3 * SCALE, joint="curve")
        for x, y in line[1:]:
            draw.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], fill=COLOURS[name])
    metre = size / 2 / reach
    bar = next(length for length in (5.0, 2.0, 1.0, 0.5, 0.2, 0.1) if length * metre < size / 2)
    draw.line([(12, size - 18), (12 + bar * metre, size - 18)], fill="black", width=SCALE)
    draw.text((12, size - 62), f"{bar:g} m", fill="black", font=ImageFont.load_default(12 * SCALE))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
