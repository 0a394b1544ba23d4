"""RECON as its authors distribute it: one HDF5 file per trajectory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raev2.errors import DataError
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe, files_below, require
from raev2_tasks.nwm.data.trajectories import Source, Trajectory

IMAGES, POSITION, YAW = "images/rgb_left", "jackal/position", "jackal/yaw"
COMMANDS = ("commands/linear_velocity", "commands/angular_velocity")
CAMERA = {
    "model": "wide lens with distortion", "width": 640, "height": 480, "fx": 272.5, "fy": 266.4, "cx": 320.0,
    "cy": 220.0,
}  # fmt: skip


class ReconHdf5(TrajectoryRecipe):
    """Left camera, position and yaw; the JPEG bytes are kept unless a size is asked for."""

    name = "recon-hdf5"
    packages = ("h5py",)
    summary = "RECON (Clearpath Jackal, outdoors), the HDF5 files of its authors"
    licence = "see the RECON dataset page; not stored in the files"
    attribution = "RECON dataset: Shah et al. 2021, Rapid Exploration for Open-World Navigation."
    size = "11,835 trajectories, about 610,000 frames"
    options = {
        "src": Option(None, "the folder recon_release with its .hdf5 files"),
        "rate_hz": Option("4", "frames a second; the files store no times"),
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        resolved = self.resolve(options)
        sources = list(self.sources(resolved))
        lines, usable = self.trial(resolved, sources)
        parents = len({source.recording for source in sources})
        return [
            f"Read {len(sources)} HDF5 files of {parents} recordings from {resolved['src']}.",
            *lines,
            self.split_line(resolved, usable),
            self.frames_line(resolved),
            *self.ignored_line(resolved),
        ]

    def files_read(self, options: Mapping[str, str]) -> list[Path]:
        """HDF5 files."""
        return [file for file in files_below(self.folder(options)) if file.suffix == ".hdf5"]

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The rate is the one given."""
        return {"rate_hz": self.number(options, "rate_hz", 0.01), "length_unit": "metre", "camera": CAMERA}

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per file; files that differ only in `_rNN` are of one recording."""
        src = self.folder(options)
        require("h5py")
        files = self.files_read(options)
        if not files:
            raise DataError(f"data {self.name}: src", "no .hdf5 files", got=src)
        rate = self.facts(options)["rate_hz"]
        for file in files:
            yield Source(re.sub(r"_r\d+$", "", file.stem), str(file), partial(_read, file, rate))


def _read(file: Path, rate_hz: float) -> Iterator[Trajectory]:
    where = f"trajectory {file.stem}"
    h5py = require("h5py")
    try:
        with h5py.File(file) as data:
            missing = [name for name in (IMAGES, POSITION, YAW) if not isinstance(data.get(name), h5py.Dataset)]
            if missing:
                raise DataError(where, f"{missing[0]} is missing from the file")
            position, yaw = np.asarray(data[POSITION][:], np.float64), np.asarray(data[YAW][:], np.float64)
            told = [np.asarray(data[name][:]).reshape(len(yaw)) for name in COMMANDS if name in data]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise DataError(where, "cannot be opened as HDF5", got=error) from error
    yield Trajectory(
        id=file.stem,
        t=np.arange(len(yaw)) / rate_hz,
        position=position[:, :2] if position.ndim == 2 else position,
        yaw=yaw.reshape(len(yaw)),
        frames=_frames(file),
        command=np.column_stack(told) if len(told) == len(COMMANDS) else None,
    )


def _frames(file: Path) -> Iterator[bytes]:
    with require("h5py").File(file) as data:
        yield from map(bytes, data[IMAGES])


RECIPE = ReconHdf5()
