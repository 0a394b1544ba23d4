"""What a report needs of a run folder. A part that is missing is empty, one that is damaged is a warning."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from raev2.errors import CheckpointError
from raev2.files.damage import json_lines

PARTS = ("spec.yaml", "metrics.jsonl", "eval")
MAX_STRIP = 8  # grids a strip: the first, the last, and evenly spread ones between
PAUSE_SECONDS = 1800
NO_MEANING = {"better": "", "role": "detail", "about": "", "of": None, "point": None, "levels": (), "warning": ""}

History = dict[tuple[str, str], list[tuple[float, float]]]  # (protocol, metric) -> (images seen, value)
Meanings = dict[tuple[str, str], Mapping[str, Any]]  # (protocol, metric) -> its last result, which says what it means


@dataclass(frozen=True)
class RunFiles:
    """The files of one run. `name` tells it from the others of a report."""

    dir: Path
    name: str

    def __post_init__(self) -> None:
        if not self.dir.is_dir() or not any((self.dir / part).exists() for part in PARTS):
            expected = "a folder with spec.yaml and metrics.jsonl"
            raise CheckpointError(str(self.dir), "not a run folder", expected=expected)

    @cached_property
    def warnings(self) -> list[str]:
        """What was damaged, filled as the parts are read."""
        return []

    @cached_property
    def spec_text(self) -> str | None:
        """spec.yaml as it is."""
        return _read_text(self.dir / "spec.yaml")

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The spec, as the code that wrote it knew it."""
        return (yaml.safe_load(self.spec_text) if self.spec_text else None) or {}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Machine, versions, command and data."""
        return self._json(self.dir / "provenance.json") or {}

    @property
    def data(self) -> Mapping[str, Any]:
        """The manifest of the training data, without its classes."""
        return self.provenance.get("data") or {}

    @property
    def train_samples(self) -> int | None:
        """Size of the training split."""
        train = (self.data.get("splits") or {}).get("train") or {}
        return train.get("num_samples") if isinstance(train, Mapping) else None

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        lines = json_lines(self.dir / "metrics.jsonl")
        if broken := lines.count(None):
            self.warnings.append(f"Damaged lines of metrics.jsonl that were left out: {broken}.")
        return [{"images": 0, **line} for line in lines if line is not None]

    def trained(self, stage: str) -> list[dict[str, Any]]:
        """Log lines of the training steps of a stage."""
        return [line for line in self.lines if line.get("stage") == stage and line.get("kind") == "train"]

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """Results by protocol; rows of old files get an empty meaning."""
        files = map(self._json, sorted((self.dir / "eval").glob("*.json"), key=lambda file: file.stem))
        return [
            {**result, "results": [{**NO_MEANING, **entry} for entry in result["results"]]}
            for result in files if result and "results" in result
        ]  # fmt: skip

    @cached_property
    def meanings(self) -> Meanings:
        """What the metrics say of themselves."""
        return {(result["protocol"], e["name"]): e for result in self.results for e in result["results"]}

    def scale_of(self, protocol: str, name: str) -> list[Mapping[str, Any]]:
        """Rows of known pictures, beside which a metric is read."""
        return [entry for (owner, _), entry in self.meanings.items() if owner == protocol and entry["of"] == name]

    @cached_property
    def history(self) -> History:
        """Evaluations in order of images seen; the last one is taken from its result file."""
        found: dict[tuple[str, str], dict[float, float]] = {}
        for line in self.lines:
            for name, value in (line.get("metrics") or {}).items() if line.get("kind") == "eval" else ():
                if isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault((line.get("protocol", ""), name), {})[float(line["images"])] = float(value)
        for result in self.results:
            for entry in result["results"]:
                key = (result["protocol"], entry["name"])
                if key in found and result.get("images_seen") is not None:
                    found[key][float(result["images_seen"])] = float(entry["value"])
        return {key: sorted(points.items()) for key, points in found.items()}

    @property
    def wall_seconds(self) -> float:
        """From first to last log line, without pauses of more than half an hour."""
        times = [line["time"] for line in self.lines if "time" in line]
        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        return float(sum(gap for gap in gaps if 0 < gap < PAUSE_SECONDS))

    def grids(self, stage: str) -> list[dict[str, str]]:
        """Grids `<stage>-<images seen>.png` in order, at most `MAX_STRIP` of them."""
        folder = (self.dir / "samples").glob(f"{stage}-*.png")
        files = {int(m[1]): f for f in folder if (m := re.fullmatch(rf"{stage}-(\d+)", f.stem))}
        places = sorted(files)
        if len(places) > MAX_STRIP:
            places = sorted({places[round(i * (len(places) - 1) / (MAX_STRIP - 1))] for i in range(MAX_STRIP)})
        return [picture(files[n], f"{n:,} images") for n in places]

    def _json(self, file: Path) -> dict[str, Any] | None:
        text = _read_text(file)
        try:
            return dict(json.loads(text)) if text is not None else None
        except (TypeError, ValueError):
            self.warnings.append(f"{file.name} is damaged and was left out.")
            return None


def read_runs(dirs: Sequence[Path]) -> list[RunFiles]:
    """Run folders by name, by path where two have one name."""
    names = [dir.resolve().name for dir in dirs]
    return [RunFiles(d, n if names.count(n) == 1 else str(d)) for d, n in zip(dirs, names, strict=True)]


def picture(file: Path, label: str) -> dict[str, str]:
    """A PNG file inside a page."""
    return {"label": label, "data": base64.b64encode(file.read_bytes()).decode()}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a nested mapping by path, as text."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", (" " if name == "command" else ", ").join(map(str, value))
        elif value is not None and value != "":
            yield f"{prefix}{name}", str(value)


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
