"""Which property of an encoder goes with good generation: Pearson correlations over encoders, with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from raev2_tasks.analyses.table import Table, lines

PROPERTIES = ("LP", "LDS", "mean")


def correlation_table(encoders: Sequence[Mapping[str, Any]], outcomes: Sequence[str], source: str) -> Table:
    """Pearson r of LP, LDS and their mean with every outcome (such as gFID), over encoders.

    encoders   one mapping an encoder: name, LP, LDS and the outcomes
    """
    complete = [row for row in encoders if all(row.get(name) is not None for name in ("LP", "LDS", *outcomes))]
    lp, lds = (min_max([row[name] for row in complete]) for name in ("LP", "LDS"))
    points = [{**row, "mean": (a + b) / 2} for row, a, b in zip(complete, lp, lds, strict=True)]
    points.sort(key=itemgetter("mean"))
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        for name in PROPERTIES:
            r = pearson([point[name] for point in points], [point[outcome] for point in points])
            low, high = fisher_interval(r, len(points))
            rows.append({"outcome": outcome, "property": name, "r": r, "low": low, "high": high, "n": len(points)})
    return Table(
        "correlation",
        "Correlation of encoder properties with generation",
        rows,
        f"{source} low, high: 95 % interval by Fisher's z. mean: of LP and LDS, each scaled to [0, 1] over these "
        "encoders. With so few encoders the intervals are wide; a negative r with gFID means better.",
        lines(points, "mean", outcomes),
        x_label="mean of scaled LP and LDS",
    )


def pearson(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Correlation coefficient; nan where one of the two does not vary."""
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:
        return math.nan


def fisher_interval(r: float, n: int) -> tuple[float | None, float | None]:
    """95 % interval of a correlation over n points; None where n < 4 or r is +-1."""
    if n < 4 or not abs(r) < 1:
        return None, None
    z, half = math.atanh(r), 1.959964 / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)


def min_max(values: Sequence[float]) -> list[float]:
    """Values scaled to [0, 1]."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
