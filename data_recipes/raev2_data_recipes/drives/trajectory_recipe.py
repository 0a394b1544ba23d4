"""What the recipes of trajectories share: they say where trajectories come from, `write_trajectories` writes them."""

from __future__ import annotations

import importlib
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raev2.errors import DataError, SpecError
from raev2_data_recipes.base import DatasetRecipe, Option
from raev2_tasks.nwm.data.frames import FITS
from raev2_tasks.nwm.data.trajectories import Source, Storage, verify_trajectories, write_trajectories

RULES = ("by-recording", "nwm-legacy", "given")


def require(name: str) -> Any:
    """An optional package; DataError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(name, "is not installed", hint="Install it with `pip install 'raev2[nwm]'`.") from error


class TrajectoryRecipe(DatasetRecipe):
    """A source of frames with poses. Subclasses give ``plan``, ``sources`` and ``facts``."""

    STORAGE: Mapping[str, Option] = {
        "size": Option("", "store square frames of this many pixels; empty = keep the frames as they are"),
        "fit": Option("squeeze", "how frames become square: squeeze (4:3 part, aspect not kept), crop or letterbox"),
        "format": Option("jpg", "file format of frames that are resized or decoded: jpg (quality 95) or png"),
        "split": Option(
            "by-recording", "by-recording; nwm-legacy: single trajectories, leaks; given: as in the source"
        ),
        "val_fraction": Option("0.1", "share of recordings for validation, 0 to 0.5"),
        "min_frames": Option("5", "leave out shorter trajectories"),
    }

    @abstractmethod
    def sources(self, options: Mapping[str, str]) -> Iterable[Source]:
        """Where trajectories come from, in a fixed order."""

    @abstractmethod
    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """rate_hz, nominal frames a second; length_unit, such as 'metre'; camera, or None."""

    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """Write poses, frames, indices, rejects and manifest."""
        head = {
            "name": dataset_name,
            "recipe": self.name,
            "options": dict(options),
            "licence": self.licence,
            "attribution": self.attribution,
        }
        return write_trajectories(folder, self.sources(options), self.storage(options), head, self.facts(options))

    def check_files(self, data_dir: Path) -> dict[str, Any]:
        """Poses and frames."""
        return verify_trajectories(data_dir)

    def storage(self, options: Mapping[str, str]) -> Storage:
        """The options of ``STORAGE``, checked; a recipe that lacks one gets its default."""
        options = {name: str(option.default) for name, option in TrajectoryRecipe.STORAGE.items()} | dict(options)
        size = int(self.number(options, "size", 8, whole=True)) if options["size"] else None
        return Storage(
            size=None if size is None else (size, size),
            fit=self.choice(options, "fit", tuple(FITS)[:-1]),  # type: ignore[arg-type]
            suffix="." + self.choice(options, "format", ("jpg", "png")),
            split=self.choice(options, "split", RULES),  # type: ignore[arg-type]
            val_fraction=self.number(options, "val_fraction", 0, 0.5),
            min_frames=int(self.number(options, "min_frames", 2, whole=True)),
        )

    def number(
        self, options: Mapping[str, str], name: str, least: float, most: float = math.inf, whole: bool = False
    ) -> float:
        """An option as a number; SpecError when it is none or out of range."""
        try:
            value = float(options[name])
        except ValueError:
            value = math.nan
        if not least <= value <= most or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            expected = f"{kind} >= {least:g}" if math.isinf(most) else f"{kind} from {least:g} to {most:g}"
            raise SpecError(f"data {self.name}: {name}", "not usable", got=options[name], expected=expected)
        return value

    def choice(self, options: Mapping[str, str], name: str, known: tuple[str, ...]) -> str:
        """An option that is one of some words; SpecError when it is not."""
        if options[name] not in known:
            expected = f"one of {', '.join(known)}"
            raise SpecError(f"data {self.name}: {name}", "not usable", got=options[name], expected=expected)
        return options[name]

    def pattern(self, options: Mapping[str, str], name: str) -> re.Pattern[str]:
        """An option as a regular expression with a group; empty: the whole name."""
        try:
            found = re.compile(options[name] or "(.+)")
        except re.error as error:
            raise SpecError(f"data {self.name}: {name}", "not a regular expression", got=error) from error
        if not found.groups:
            raise SpecError(f"data {self.name}: {name}", "has no group", got=options[name], expected="parentheses")
        return found

    def folder(self, options: Mapping[str, str], name: str = "src") -> Path:
        """An option as an existing folder; DataError when there is none."""
        path = Path(options[name]).expanduser()
        if not path.is_dir():
            raise DataError(
                f"data {self.name}: {name}", "no such folder", got=path, hint=f"Give it with --set {name}=PATH."
            )
        return path
