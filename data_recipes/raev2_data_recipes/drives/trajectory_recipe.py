"""What the recipes of trajectories share: they say where trajectories come from, `write_trajectories` writes them.

On the way every trajectory is cut at gaps in time, and its motion is compared with its heading (`MotionCheck`).
"""

from __future__ import annotations

import importlib
import math
import re
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raev2.errors import DataError, SpecError
from raev2.files.damage import stop_if_machine
from raev2.files.picture_folder import PictureFolder, scan_folder, told
from raev2_data_recipes.base import DatasetRecipe, Option
from raev2_data_recipes.drives.cutting import cut_gaps, cut_split
from raev2_data_recipes.drives.pose_files import RawPoses
from raev2_data_recipes.drives.readings import CONTRADICTION, Reading, contradiction, median_error
from raev2_tasks.nwm.data.frames import FITS
from raev2_tasks.nwm.data.trajectories import (
    BAD_SOURCE,
    Source,
    Storage,
    Trajectory,
    reason_of,
    validation_names,
    verify_trajectories,
    write_trajectories,
)
from raev2_tasks.nwm.data.validate import check_trajectory

RULES = ("by-recording", "nwm-legacy", "by-time", "given")
HEADINGS = ("check", "keep")
NUM_TRIED, TRIAL_S = 20, 30.0  # a plan reads the poses of so many sources, for so many seconds
MANY_POSES = 2000  # after so many, and each doubling, heading and motion are compared


def everything_below(src: Path) -> PictureFolder:
    """All files of a folder but for those of tools; links to folders are followed."""
    return scan_folder(src, lambda file: True)


def files_below(src: Path) -> list[Path]:
    """`everything_below` as a list, in path order."""
    return everything_below(src).all_pictures()


def require(name: str) -> Any:
    """An optional package; DataError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(name, "is not installed", hint="Install it with `pip install 'raev2[nwm]'`.") from error


class _Stop(Exception):
    """Carries an error through the loop that leaves out single sources, so that it ends the build."""

    def __init__(self, error: DataError) -> None:
        super().__init__(str(error))
        self.error = error


class MotionCheck:
    """Compares the direction of motion with the heading, over all trajectories that pass."""

    def __init__(self, where: str) -> None:
        self.where, self._raws, self._num, self._checked = where, list[RawPoses](), 0, 0

    def add(self, one: Trajectory) -> None:
        """Take in a trajectory; now and then, look at all so far."""
        self.take(one)
        if self._num >= max(MANY_POSES, 2 * self._checked):
            self._checked = self._num
            self.finish()

    def take(self, one: Trajectory) -> None:
        """Take in a trajectory."""
        position, yaw = np.asarray(one.position, np.float64), np.asarray(one.yaw, np.float64)
        if position.shape != (len(yaw), 2) or not (np.isfinite(position).all() and np.isfinite(yaw).all()):
            return  # left out later, with the reason
        self._raws.append(RawPoses(one.id, np.column_stack([position, np.zeros(len(yaw))]), yaw))
        self._num += len(yaw)

    def error(self) -> float | None:
        """Degrees between motion and heading (median); None where too little moves to tell."""
        return median_error(self._raws, Reading())

    def finish(self) -> None:
        """DataError when motion and heading lie more than 60 degrees apart (median)."""
        error = self.error()
        if error is not None and error > CONTRADICTION:
            raise contradiction(self.where, self._raws, Reading(), error, "yaw_offset_deg or reading, if it has it")


class TrajectoryRecipe(DatasetRecipe):
    """A source of frames with poses. Subclasses give ``plan``, ``sources`` and ``facts``."""

    checks_heading = True
    STORAGE: Mapping[str, Option] = {
        "size": Option("", "store square frames of this many pixels; empty = keep the frames as they are"),
        "fit": Option("squeeze", "how frames become square: squeeze (4:3 part, aspect not kept), crop or letterbox"),
        "format": Option("jpg", "file format of frames that are resized or decoded: jpg (quality 95) or png"),
        "split": Option(
            "by-recording",
            "by-recording; by-time: the end of each recording; nwm-legacy: single trajectories, leaks; given: that of "
            "the source",
        ),
        "val_fraction": Option("0.1", "share of recordings for validation, 0 to 0.5"),
        "split_gap_s": Option("5", "seconds that split=by-time leaves out between training and validation"),
        "min_frames": Option("5", "leave out shorter trajectories"),
        "heading": Option(
            "check", "check: stop where heading and motion lie over 60 degrees apart; keep: it is meant so"
        ),
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
        check, keep = MotionCheck(f"data {self.name}"), self._keeps_heading(options)
        facts = self.facts(options) | {"ignored": self.ignored(options)}
        read = partial(self._read, options, None if keep else check, facts["rate_hz"])
        sources = (replace(source, read=partial(read, source)) for source in self.sources(options))
        try:
            manifest = write_trajectories(folder, sources, self.storage(options), head, facts)
        except _Stop as stop:
            raise stop.error from None
        if not keep:
            check.finish()
        return manifest

    def _read(
        self, options: Mapping[str, str], check: MotionCheck | None, rate_hz: float, source: Source
    ) -> Iterator[Trajectory]:
        """The trajectories of a source: cut at gaps, split in time where asked, their motion compared with the yaw."""
        for whole in source.read():
            for one in cut_gaps(whole, rate_hz):
                if check is not None:
                    try:
                        check.add(one)
                    except DataError as error:
                        raise _Stop(error) from None
                yield from self._split(options, one)

    def _keeps_heading(self, options: Mapping[str, str]) -> bool:
        return self._option(options, "heading", HEADINGS) == "keep" or not self.checks_heading

    def _split(self, options: Mapping[str, str], one: Trajectory) -> list[Trajectory]:
        if self._option(options, "split", RULES) != "by-time":
            return [one]
        fraction, gap = self.number(options, "val_fraction", 0, 0.5), self.number(options, "split_gap_s", 0)
        return cut_split(one, fraction, gap)

    def _option(self, options: Mapping[str, str], name: str, known: tuple[str, ...]) -> str:
        """An option of ``STORAGE``; a recipe that lacks it gets its default."""
        return self.choice({name: str(self.STORAGE[name].default)} | dict(options), name, known)

    def files_read(self, options: Mapping[str, str]) -> Collection[Path]:
        """The files of the source folder that the recipe reads; the others are counted as ignored."""
        return ()

    def ignored(self, options: Mapping[str, str]) -> dict[str, int]:
        """How many files of the source folder are not read, by the ending of their names, or the tool they are of."""
        if "src" not in options or not Path(options["src"]).expanduser().is_dir():
            return {}
        found, read = everything_below(self.folder(options)), set(self.files_read(options))
        unread = Counter(file.suffix.lower() or file.name for file in found.all_pictures() if file not in read)
        return dict(sorted((found.all_ignored() + unread).items()))

    def trial(self, options: Mapping[str, str], sources: Sequence[Source]) -> tuple[list[str], list[Source]]:
        """For plans: lines about what the poses of the first sources give, and the sources but for those that fail.

        No picture is read.
        """
        least, rate = self.storage(options).min_frames, self.number(options, "rate_hz", 0.01)
        lengths, left_out, usable = list[int](), list[str](), list[Source]()
        check = MotionCheck(f"data {self.name}")
        end, num = time.monotonic() + TRIAL_S, 0
        while num < min(len(sources), NUM_TRIED) and time.monotonic() < end:
            source, before, num = sources[num], len(lengths), num + 1
            try:
                for one in self._read(options, None, rate, source):
                    try:
                        check_trajectory(f"trajectory {one.id}", one.t, one.position, one.yaw, least)
                        lengths.append(len(one.t))
                        check.take(one)
                    except DataError as error:
                        left_out.append(str(error))
            except BAD_SOURCE as error:
                stop_if_machine(error)
                left_out.append(reason_of(error))
            usable += [source] if len(lengths) > before else []
        of = f"all {num}" if num == len(sources) else f"the first {num} of {len(sources)}"
        lines = [f"By their poses {of} give {len(lengths)} trajectories with {sum(lengths):,} frames."]
        if "reading" not in options:  # whose lines tell it already
            lines += self._heading_lines(options, check)
        lines += [f"Left out: {reason}" for reason in left_out[:5]]
        lines += [f"Left out: {len(left_out) - 5} more."] if left_out[5:] else []
        return lines, usable + list(sources[num:])

    def _heading_lines(self, options: Mapping[str, str], check: MotionCheck) -> list[str]:
        error = check.error()
        if error is None:
            return ["Heading: too little motion to test it."]
        try:
            if not self._keeps_heading(options):
                check.finish()
        except DataError as stop:
            return [f"The build will stop: {stop}"]
        return [f"Heading: {error:.0f} degrees from the motion (median)."]

    def frames_line(self, options: Mapping[str, str]) -> str:
        """For plans: how frames are stored."""
        storage = self.storage(options)
        if storage.size is None:
            return f"Keep JPEG and PNG files as they are, store other frames as {storage.suffix[1:]}."
        return f"Store frames of {storage.size[1]} px ({storage.fit}) as {storage.suffix[1:]}."

    def split_line(self, options: Mapping[str, str], sources: Iterable[Source]) -> str:
        """For plans: which recordings are kept for validation, as far as that is known before they are read."""
        rule = self.storage(options).split
        if rule != "by-recording":
            return f"Split: {rule}."
        names = sorted({source.recording for source in sources})
        chosen, _ = validation_names(names, self.storage(options).val_fraction)
        listed = ", ".join(sorted(chosen)[:5]) + (", ..." if len(chosen) > 5 else "")
        return f"Split: {len(chosen)} of {len(names)} recordings for validation, by their names: {listed or 'none'}."

    def ignored_line(self, options: Mapping[str, str]) -> list[str]:
        """A line about `ignored`, for plans; none where nothing is."""
        ignored = self.ignored(options)
        return [f"Ignored: {sum(ignored.values()):,} files ({told(ignored)})."] if ignored else []

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
