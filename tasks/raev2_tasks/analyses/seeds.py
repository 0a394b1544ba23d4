"""Numbers over seeds: a mean with its interval, and what a paired difference says in one sentence.

A seed gives every variant the same pictures in the same order and the same noise, so the difference within a seed
varies less than the numbers do. Intervals are Student's, 95 %, over seeds: with three of them they are wide.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from raev2.batch import Better
from raev2_tasks.report.chart import Series, number

# Two-sided 95 % quantiles of Student's t for 2 to 10 values; more values use the last one, which is a little wider.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean; (None, None) of a single value."""
    if len(values) < 2:
        return None, None
    half = STUDENT_95[min(len(values), 10) - 2] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return mean - half, mean + half


@dataclass(frozen=True)
class Estimate:
    """A number over seeds: `values` by seed."""

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.mean(self.values.values())

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """95 % interval of the mean."""
        return interval([*self.values.values()])

    def __str__(self) -> str:
        low, high = self.ends
        return number(self.mean) + ("" if low is None or high is None else f" ({number(low)} to {number(high)})")

    def to_json(self) -> dict[str, Any]:
        """Mean, interval, and the value of every seed."""
        low, high = self.ends
        return {"mean": self.mean, "low": low, "high": high, "seeds": {str(s): v for s, v in self.values.items()}}


@dataclass(frozen=True)
class Claim:
    """That `first` is better than `second` in a metric, and what the seeds that both have say about it."""

    first: str
    second: str
    metric: str
    better: Better
    first_values: Mapping[int, float]
    second_values: Mapping[int, float]

    @property
    def gains(self) -> list[float]:
        """How much better the first one is, by seed; below zero: worse."""
        sign = 1 if self.better == "higher" else -1
        pairs = [(self.first_values[s], self.second_values[s]) for s in self.first_values if s in self.second_values]
        return [sign * (first - second) for first, second in pairs]

    @property
    def sentence(self) -> str:
        """What the numbers support."""
        gains, (low, high) = self.gains, interval(self.gains)
        if low is None or high is None:
            return f"{self.first} against {self.second}: {len(gains)} seed, which says nothing about {self.metric}."
        one, other = self.first, self.second
        if high < 0:
            one, other, gains, low, high = other, one, [-gain for gain in gains], -high, -low
        ahead = f"in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
        told = f"paired difference {number(statistics.mean(gains))}, 95 % interval {number(low)} to {number(high)}"
        if low > 0:
            return (
                f"{one} has {'more' if self.better == 'higher' else 'less'} {self.metric} than {other} {ahead}; {told}."
            )
        return (
            f"{self.metric} of {one} and {other}: no difference that this budget shows ({one} better {ahead}; {told})."
        )

    def to_json(self) -> dict[str, Any]:
        """The sentence and its numbers; differences above zero: the first one is better."""
        low, high = interval(self.gains)
        numbers = {"difference": statistics.mean(self.gains), "low": low, "high": high, "n": len(self.gains)}
        return {"first": self.first, "second": self.second, "metric": self.metric, **numbers, "says": self.sentence}


def whiskers(lines: Mapping[str, Sequence[tuple[float, Estimate]]]) -> list[Series]:
    """Lines through the means, up and down the interval at every place; side by side, a little off their places."""
    places = [place for line in lines.values() for place, _ in line]
    step = 0.008 * (max(places) - min(places)) if places else 0.0
    series = list[Series]()
    for number_of, (name, line) in enumerate(lines.items()):
        xs, ys = list[float](), list[float]()
        for place, estimate in sorted(line, key=itemgetter(0)):
            ends = [end for end in estimate.ends if end is not None]
            ys += [estimate.mean, *ends, estimate.mean] if ends else [estimate.mean]
            xs += [place + step * (number_of - (len(lines) - 1) / 2)] * (len(ys) - len(xs))
        series.append(Series(name, xs, ys, points=len(line) == 1))
    return series
