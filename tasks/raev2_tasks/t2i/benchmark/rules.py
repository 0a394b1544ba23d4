"""GenEval's rules on detections: counts, colours, positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raev2_tasks.t2i.benchmark.rows import PromptRow
from raev2_tasks.t2i.benchmark.scene import Box


@dataclass(frozen=True)
class Detection:
    """One object in a picture; ``name`` is None where it is like no class."""

    name: str | None
    score: float
    box: Box
    color: str | None = None


@dataclass(frozen=True)
class ImageScore:
    """The judgement of one picture.

    exact    what the prompt asks for is there, and nothing else
    lenient  GenEval's rule: more objects of other classes do no harm
    details  what was seen, and why it is wrong; ``values`` are numbers that a summary averages
    """

    exact: bool
    lenient: bool
    tag: str
    details: dict[str, Any]


def judge(detections: Sequence[Detection], row: PromptRow) -> ImageScore:
    """Apply the rules of a row; the ``count`` best detections of a class are the ones that are looked at."""
    of_class: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.name is not None:
            of_class.setdefault(detection.name, []).append(detection)
    wrong: list[str] = []
    matched: list[list[Detection] | None] = []  # of each entry; None: not as asked for
    for entry in row.include:
        name, count = entry["class"], entry["count"]
        best = of_class.get(name, [])[:count]
        problem = ""
        if len(best) < count:
            problem = f"{len(best)} of {count} {name}"
        elif "color" in entry and any(detection.color != entry["color"] for detection in best):
            problem = f"{name} is {best[0].color}, not {entry['color']}"
        elif "position" in entry:
            relation, target = entry["position"]
            pairs = [(item, other) for item in best for other in matched[target] or ()]
            if matched[target] is None:
                problem = f"nothing that {name} could be {relation}"
            elif any(relation not in relations(item.box, other.box) for item, other in pairs):
                problem = f"{name} is not {relation} {row.include[target]['class']}"
        matched.append(None if problem else best)
        wrong += [problem] if problem else []
    for entry in row.exclude:
        if len(of_class.get(entry["class"], [])) >= entry["count"]:
            wrong.append(f"{entry['count']} {entry['class']} or more")
    num_unknown = sum(detection.name is None for detection in detections)
    wanted = Counter[str]()
    for entry in row.include:
        wanted[entry["class"]] += entry["count"]
    nothing_else = not num_unknown and {name: len(found) for name, found in of_class.items()} == dict(wanted)
    lenient = not wrong
    if lenient and not nothing_else:
        wrong.append("more than was asked for")
    details = {
        "wrong": wrong,
        "detections": [vars(detection) for detection in detections],
        "values": {"components": float(len(detections)), "unknown": float(num_unknown)},
    }
    return ImageScore(not wrong, lenient, row.tag, details)


def relations(subject: Box, reference: Box) -> set[str]:
    """Where ``subject`` is, seen from ``reference``; two relations can hold at once, and none can.

    The offset of the centres is shrunk by a tenth of the summed extents in each axis; a relation holds when what is
    left is more than half of the whole offset.
    """
    a, b = np.array(subject).reshape(2, 2), np.array(reference).reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    dead_zone = 0.1 * ((a[1] - a[0]) + (b[1] - b[0]))
    shrunk = np.maximum(np.abs(offset) - dead_zone, 0) * np.sign(offset)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in found.items() if holds}
