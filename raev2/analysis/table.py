"""What an analysis gives: a table with a plot, written as JSON, Markdown and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raev2.files.artefact import write_json
from raev2.report.chart import Series, line_chart, standalone

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows with the same columns.

    note     what the numbers are and depend on, for the reader of the table
    series   lines of the plot; empty: no plot
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Cell]]
    note: str
    series: Sequence[Series] = ()
    x_label: str = ""
    log: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table with its title and note."""
        lines = [f"# {self.title}", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(_text(row.get(column)) for column in self.columns) + " |" for row in self.rows]
        return "\n".join([*lines, "", self.note, ""])

    def write(self, out: Path) -> list[Path]:
        """Write `NAME.json`, `NAME.md` and, if there is something to draw, `NAME.svg`; returns the files."""
        out.mkdir(parents=True, exist_ok=True)
        files = [out / f"{self.name}.json", out / f"{self.name}.md"]
        rows = [{column: row.get(column) for column in self.columns} for row in self.rows]
        content = {"title": self.title, "settings": dict(self.settings), "rows": rows, "note": self.note}
        write_json(files[0], content)
        files[1].write_text(self.markdown())
        chart = line_chart(self.series, title=self.title, x_label=self.x_label, log=self.log) if self.series else ""
        if chart:
            files.append(out / f"{self.name}.svg")
            files[-1].write_text(standalone(chart, self.series))
        return files


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
