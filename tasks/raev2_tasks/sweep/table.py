"""What a sweep has measured so far: a table as JSON and CSV, a plot, and which value was best."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raev2.batch import MetricResult
from raev2.errors import SpecError
from raev2.files.artefact import write_json
from raev2.files.damage import read_json
from raev2.files.replace import write_text
from raev2.task import check_known
from raev2.training import dist
from raev2_tasks.report.chart import Series, line_chart, number, standalone

SWEEP_FORMAT_VERSION = 1
TWO_SIDED_95 = 1.96  # standard errors
Row = Mapping[str, Any]  # a MetricResult as a mapping


@dataclass(frozen=True)
class Sweep:
    """Results of a protocol by the value that was tried. `settings` is all that they depend on besides it."""

    file: Path
    settings: Mapping[str, Any]
    rows: dict[str, Sequence[Row]]

    @classmethod
    def open(cls, file: Path, settings: Mapping[str, Any], overwrite: bool) -> Sweep:
        """The sweep in a file, or a new one; SpecError where the file has one with other settings."""
        if overwrite or not file.is_file():
            return cls(file, settings, {})
        old = read_json(file)
        now = json.loads(json.dumps(settings))
        if changed := [name for name, value in now.items() if old["settings"].get(name) != value]:
            raise SpecError(
                str(file), "a sweep with other settings", got=f"another {', '.join(changed)}",
                hint="Choose another --out, or --overwrite to begin again.",
            )  # fmt: skip
        return cls(file, settings, {row["value"]: row["results"] for row in old["rows"]})

    def add(self, value: str, results: Iterable[MetricResult], metric: str | None) -> None:
        """Take a value in and write the files."""
        self.rows[value] = list(map(vars, results))
        best = self.best(metric)
        if dist.is_main():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"value": value, "results": results} for value, results in self.rows.items()]
            write_json(
                self.file,
                {"format_version": SWEEP_FORMAT_VERSION, "settings": dict(self.settings), "rows": rows, "best": best},
            )
            write_text(self.file.with_suffix(".csv"), self._csv())
            write_text(self.file.with_suffix(".svg"), self._plot(metric))

    def chosen_by(self, metric: str | None) -> dict[str, Row]:
        """The result that chooses, by value: that of the metric, or the first headline."""
        results = next(iter(self.rows.values()))
        known = {row["name"]: row for row in results if row["role"] != "scale"}
        if metric is not None:
            check_known("--metric", "no number of this protocol", metric, known)
        name = metric or next((row["name"] for row in results if row["role"] == "headline"), next(iter(known)))
        return {value: next(row for row in rows if row["name"] == name) for value, rows in self.rows.items()}

    def best(self, metric: str | None) -> str:
        """Which value was best, how sure that is, and what it was chosen on."""
        chosen = self.chosen_by(metric)
        first = next(iter(chosen.values()))
        pick = max if first["better"] == "higher" else min
        value = pick(chosen, key=lambda tried: chosen[tried]["value"])
        low, high = _interval(chosen[value])
        equals = [tried for tried, row in chosen.items() if tried != value and _overlap(_interval(row), (low, high))]
        sure = (
            f"95 % interval {number(low)} to {number(high)}" if chosen[value]["stderr"] is not None else "no interval"
        )
        also = f" Not told apart from it (intervals overlap): {', '.join(equals)}." if equals else ""
        return (
            f"Best {self.settings['kind']}: {value}, {first['name']} {number(chosen[value]['value'])}, {sure}.{also} "
            f"Chosen among {len(chosen)} on seed {self.settings['seed']} with {self.settings['protocol']}: evaluate it "
            "with another seed before you quote it."
        )

    def text(self) -> str:
        """The table for a terminal."""
        names = [row["name"] for row in next(iter(self.rows.values())) if row["role"] != "scale"]
        lines = [[self.settings["kind"], *names]]
        lines += [[value, *(_text(row) for row in rows if row["name"] in names)] for value, rows in self.rows.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((self.settings["kind"], "metric", "value", "stderr", "n"))
        writer.writerows(
            (value, row["name"], row["value"], row["stderr"], row["num_samples"])
            for value, rows in self.rows.items() for row in rows
        )  # fmt: skip
        return text.getvalue()

    def _plot(self, metric: str | None) -> str:
        """The metric over the value with its interval; intervals of guidance stand one after another."""
        kind, chosen = self.settings["kind"], self.chosen_by(metric)
        places = {value: float(i) if "," in value else float(value) for i, value in enumerate(chosen)}
        values = sorted(chosen, key=places.__getitem__)
        xs, name = [places[value] for value in values], chosen[values[0]]["name"]
        series = [Series(name, xs, [chosen[value]["value"] for value in values], points=True)]
        if chosen[values[0]]["stderr"] is not None:
            ends = [[_interval(chosen[value])[i] for value in values] for i in (0, 1)]
            series += [Series(f"95 % {end}", xs, ys) for end, ys in zip(("low", "high"), ends, strict=True)]
        label = " | ".join(values) if kind == "interval" else kind
        return standalone(line_chart(series, title=f"{name} by {kind}", x_label=label), series)


def _interval(row: Row) -> tuple[float, float]:
    half = TWO_SIDED_95 * (row["stderr"] or 0.0)
    return row["value"] - half, row["value"] + half


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _text(row: Row) -> str:
    return number(row["value"]) + ("" if row["stderr"] is None else f" ± {row['stderr']:.2g}")
