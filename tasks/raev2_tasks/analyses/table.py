"""What an analysis gives: a table with a plot, written as JSON, Markdown and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raev2.files.artefact import write_json
from raev2_tasks.analyses.seeds import Claim, Estimate
from raev2_tasks.report.chart import Series, line_chart, standalone


@dataclass(frozen=True)
class Table:
    """Rows by column, all columns that any row has.

    note     what the numbers are and depend on, for the reader of the table
    series   lines of the plot; empty: no plot
    claims   what the numbers are to decide, the most important one first
    """

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str
    series: Sequence[Series] = ()
    x_label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    claims: Sequence[Claim] = ()

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order of their first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def markdown(self) -> str:
        """The table with its title, what it says, and its note."""
        said = [f"- {claim.sentence}" for claim in self.claims]
        lines = [
            f"# {self.title}",
            "",
            *said,
            *[""] * bool(said),
            "| " + " | ".join(self.columns) + " |",
            "|---" * len(self.columns) + "|",
        ]
        lines += ["| " + " | ".join(_text(row.get(column)) for column in self.columns) + " |" for row in self.rows]
        return "\n".join([*lines, "", self.note, ""])

    def write(self, out: Path) -> list[Path]:
        """Write `NAME.json`, `NAME.md` and, if there is something to draw, `NAME.svg`; returns the files."""
        out.mkdir(parents=True, exist_ok=True)
        files = [out / f"{self.name}.json", out / f"{self.name}.md"]
        rows = [{column: _plain(row.get(column)) for column in self.columns} for row in self.rows]
        content = {"title": self.title, "settings": dict(self.settings), "rows": rows, "note": self.note}
        content |= {"claims": [claim.to_json() for claim in self.claims]} if self.claims else {}
        write_json(files[0], content)
        files[1].write_text(self.markdown(), encoding="utf-8")
        chart = line_chart(self.series, title=self.title, x_label=self.x_label) if self.series else ""
        if chart:
            files.append(out / f"{self.name}.svg")
            files[-1].write_text(standalone(chart, self.series), encoding="utf-8")
        return files


def lines(rows: Sequence[Mapping[str, Any]], x: str, ys: Sequence[str], by: str = "") -> list[Series]:
    """Lines of a plot: a column over another one for each of `ys`, and for each value of the column `by`."""

    def label(y: str, group: object) -> str:
        return y if not by else str(group) if len(ys) == 1 else f"{y}, {by} = {group}"

    return [
        Series(label(y, group), [row[x] for row in own], [row[y] for row in own], points=True)
        for group in dict.fromkeys(row.get(by) for row in rows)
        for own in [[row for row in rows if row.get(by) == group]]
        for y in ys
    ]


def _plain(cell: Any) -> Any:
    return cell.to_json() if isinstance(cell, Estimate) else cell


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
