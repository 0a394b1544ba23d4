"""Folders in the layout of GNM, ViNT, NoMaD and NWM: numbered JPEG files and `traj_data.pkl` per trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raev2.errors import DataError
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.cutting import pieces_of
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe, everything_below
from raev2_tasks.nwm.data.safe_pickle import load_pickle
from raev2_tasks.nwm.data.trajectories import Source, Storage, Trajectory

POSES = "traj_data.pkl"
SPLIT_FOLDERS = {"train": "train", "val": "test"}


class GnmFolder(TrajectoryRecipe):
    """Reads `<src>/<trajectory>/0.jpg, 1.jpg, ...` and its pickled poses, through a restricted unpickler."""

    name = "gnm-folder"
    summary = "trajectories in the layout of GNM, ViNT, NoMaD and NWM"
    licence = "that of your data"
    attribution = "The source folder named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a folder with one sub-folder per trajectory"),
        "splits": Option("", "a folder with train/traj_names.txt and test/traj_names.txt; then split=given"),
        "parent": Option(r"(.+)_r?\d+", "regular expression; its first group in a folder's name is the recording"),
        "rate_hz": Option("4", "frames a second; the layout stores no times"),
        "yaw_offset_deg": Option("0", "added to every yaw"),
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        resolved = self.resolve(options)
        sources = list(self.sources(resolved))
        lines, usable = self.trial(resolved, sources)
        parents = len({source.recording for source in sources})
        return [
            f"Read {len(sources)} folders of {parents} recordings from {resolved['src']}.",
            *lines,
            self.split_line(resolved, usable),
            self.frames_line(resolved),
            *self.ignored_line(resolved),
        ]

    def files_read(self, options: Mapping[str, str]) -> list[Path]:
        """Numbered JPEG files and poses in the folders that are read."""
        folders = self._folders(options)
        return [folder / POSES for folder in folders] + [file for folder in folders for file in _frames(folder)]

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The rate is the one given."""
        return {"rate_hz": self.number(options, "rate_hz", 0.01), "length_unit": "metre", "camera": None}

    def storage(self, options: Mapping[str, str]) -> Storage:
        """A folder of splits decides the split."""
        return super().storage({**options, "split": "given"} if options["splits"] else options)

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per sub-folder, or per name in the files of splits."""
        src = self.folder(options)
        parent = self.pattern(options, "parent")
        rate, offset = self.facts(options)["rate_hz"], np.deg2rad(self.number(options, "yaw_offset_deg", -360, 360))
        split_of, folders = self._given(options), self._folders(options)
        if not folders:
            raise DataError(f"data {self.name}: src", "no sub-folders", got=src)
        for folder in folders:
            match = parent.fullmatch(folder.name)
            read = partial(_read, folder, rate, float(offset), split_of.get(folder.name))
            yield Source(match[1] if match else folder.name, str(folder), read)

    def _folders(self, options: Mapping[str, str]) -> list[Path]:
        """Those that the files of names list, or all."""
        src, named = self.folder(options), self._given(options)
        return [src / name for name in named] or [folder.path for folder in everything_below(src).folders]

    def _given(self, options: Mapping[str, str]) -> dict[str, str]:
        """Split by name, from the files of names; empty without them."""
        if not options["splits"]:
            return {}
        folder = self.folder(options, "splits")
        found: dict[str, str] = {}
        for split, name in SPLIT_FOLDERS.items():
            file = folder / name / "traj_names.txt"
            if not file.is_file():
                raise DataError(f"data {self.name}: splits", "a file of names is missing", got=file)
            found |= {line.strip(): split for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
        return found


def _read(folder: Path, rate_hz: float, yaw_offset: float, split: str | None) -> Iterator[Trajectory]:
    where = f"trajectory {folder.name}"
    if not folder.is_dir():
        raise DataError(where, "its folder is missing", got=folder)
    if not (folder / POSES).is_file():
        raise DataError(where, f"{POSES} is missing")
    values = load_pickle(folder / POSES)
    missing = [key for key in ("position", "yaw") if not isinstance(values, dict) or key not in values]
    if missing:
        raise DataError(where, f"{POSES} has no {missing[0]}")
    try:
        position, yaw = np.asarray(values["position"], np.float64), np.asarray(values["yaw"], np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(where, "its poses are not numbers", got=error) from error
    if position.ndim != 2 or yaw.ndim not in (1, 2):
        raise DataError(where, "its poses have another shape", got=f"position {position.shape}, yaw {yaw.shape}",
                        expected="position (T, 2), yaw (T,)")  # fmt: skip
    numbers = sorted(int(file.stem) for file in _frames(folder))
    gap = next((index for index, number in enumerate(numbers) if index != number), None)
    if gap is not None and len(yaw) != numbers[-1] + 1:
        raise DataError(
            where, "a gap in the numbers of the frames", got=f"{gap}.jpg is missing, {len(yaw)} poses",
            expected=f"{numbers[-1] + 1} poses, one for each number",
        )  # fmt: skip
    whole = Trajectory(
        id=folder.name,
        t=np.arange(len(yaw)) / rate_hz,
        position=position[:, :2],
        yaw=(yaw[:, 0] if yaw.ndim == 2 else yaw) + yaw_offset,
        frames=((folder / f"{number}.jpg").read_bytes() for number in numbers),
        split=split,
    )
    yield from [whole] if gap is None else pieces_of(whole, numbers)


def _frames(folder: Path) -> list[Path]:
    """Numbered JPEG files."""
    return [file for file in folder.glob("*.jpg") if file.stem.isdecimal()]


RECIPE = GnmFolder()
