"""Numbers and picture grids of a run for a tracker. It reads what a run writes anyway, and cannot stop a training."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from raev2.files.damage import read_json
from raev2.files.images import read_rgb
from raev2.spec import RunSpec

logger = logging.getLogger(__name__)
Send = Callable[[dict[str, float], dict[str, Path], int], object]  # numbers, pictures and images seen ->
PACKAGES = {"trackio": "'raev2[track]'", "wandb": "wandb", "tensorboard": "tensorboard"}


class Tracker:
    """Passes log lines on, with the pictures that are new in `samples`. The first failure is a warning and the last.

    A continued run goes on in the tracker's run of the same name, which has the pictures that are there already.
    """

    def __init__(self, run_dir: Path, spec: RunSpec) -> None:
        self.run_dir, self.kind = run_dir, str(spec.tracker)
        self.sent = set(self._pictures())
        with self._harmless():
            started = re.sub(r"\D", "", read_json(run_dir / "provenance.json")["started"])[:14]
            opened = _tensorboard if self.kind == "tensorboard" else _service
            self.send, self.finish = opened(self.kind, run_dir, f"{run_dir.name}-{started}", spec)

    def log(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with self._harmless():
            new = {f"samples/{file.stem}": file for file in self._pictures() if file not in self.sent}
            self.send(_numbers(line), new, line.get("images", 0))
            self.sent.update(new.values())

    def close(self) -> None:
        """Send the last pictures and finish."""
        self.log({})
        with self._harmless():
            self.finish()

    def _pictures(self) -> list[Path]:
        return sorted((self.run_dir / "samples").glob("*.png"))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the library or its service does
            hint = f" Try pip install {PACKAGES[self.kind]}." if isinstance(error, ImportError) else ""
            logger.warning("tracker %s: failed, the run goes on without it; got %r.%s", self.kind, error, hint)
            self.send, self.finish = (lambda *_: None), (lambda: None)


def _tensorboard(kind: str, run_dir: Path, name: str, spec: RunSpec) -> tuple[Send, Callable[[], object]]:
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(run_dir / kind))

    def send(numbers: dict[str, float], pictures: dict[str, Path], images: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, images)
        for name, file in pictures.items():
            writer.add_image(name, np.asarray(read_rgb(file, str(file))), images, dataformats="HWC")
        writer.flush()

    return send, writer.close


def _service(kind: str, run_dir: Path, name: str, spec: RunSpec) -> tuple[Send, Callable[[], object]]:
    """Trackio and wandb, which share their calls. The steps of wandb may not go back, as in a second stage."""
    library, is_wandb = import_module(kind), kind == "wandb"
    own = {"id": name, "dir": str(run_dir)} if is_wandb else {}
    settings = {"project": f"raev2-{spec.task.name}", "name": name, "config": spec.model_dump(mode="json"), **own}
    run = library.init(**settings, resume="allow")
    if is_wandb:
        run.define_metric("*", step_metric="images")

    def send(numbers: dict[str, float], pictures: dict[str, Path], images: int) -> None:
        shown = {name: library.Image(str(file)) for name, file in pictures.items()}
        run.log({"images": images, **numbers, **shown}, step=None if is_wandb else images)

    return send, run.finish


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line by stage, those of an evaluation by protocol."""
    group, named = (line["protocol"], line["metrics"]) if "metrics" in line else (line.get("stage"), line)
    return {
        f"{group}/{name}": float(value)
        for name, value in named.items()
        if type(value) in (int, float) and math.isfinite(value) and name not in ("time", "images")
    }
