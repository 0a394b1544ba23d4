"""Folders of TUM RGB-D, KITTI odometry, EuRoC and LeRobot as they are published; frames and poses meet by time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raev2.errors import DataError
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.lerobot import lerobot_files, lerobot_lines, lerobot_sources
from raev2_data_recipes.drives.pose_files import RawPoses, read_raw_poses
from raev2_data_recipes.drives.readings import PoseFile, Reading, apply_reading, matrices
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe, files_below
from raev2_data_recipes.drives.video_poses import pictures_in, trajectories_of
from raev2_tasks.nwm.data.trajectories import Source, Trajectory
from raev2_tasks.nwm.pose import Array

FIXED = {"scale": "1"}
EUROC_POSES = "mav0/state_groundtruth_estimate0/data.csv"
CAMERA_UP_Z, CAMERA_UP_Y = Reading(frozenset({"camera"}), up="z"), Reading(frozenset({"camera"}), up="-y")


class PublishedDrives(TrajectoryRecipe):
    """What the poses mean is known for each layout, so it is not found out; odd headings are only warned of."""

    name = "published-drives"
    summary = "folders of TUM RGB-D, KITTI odometry, EuRoC and LeRobot as they are published"
    licence = "see the page of the dataset"
    attribution = "The source folder named in `options`."
    size = "as the source"
    checks_heading = False  # hands and drones move otherwise than they look
    options = {
        "src": Option(None, "a folder that holds one or more recordings in one of the layouts"),
        "layout": Option("auto", "auto, or tum-rgbd, kitti-odometry, euroc, lerobot"),
        "camera": Option(
            "", "KITTI image_0 to image_3, EuRoC cam0 or cam1, LeRobot key; empty = image_2, cam0, the first"
        ),
        "poses": Option("", "LeRobot: columns of x, y and yaw, such as observation.state; empty = by their names"),
        "rate_hz": Option("4", "frames a second"),
        "segment_s": Option("60", "cut videos into trajectories of at most so many seconds"),
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; looks for recordings."""
        resolved = self.resolve(options)
        layout, found = self.layout(resolved)
        sources = list(self.sources(resolved))
        lines, usable = self.trial(resolved, sources)
        return [
            f"Read {len(sources)} recordings in the layout of {layout} from {len(found)} folders of {resolved['src']}.",
            *self._told(layout, found, resolved),
            f"Sample {resolved['rate_hz']} frames a second, poses interpolated at their times.",
            *lines,
            self.split_line(resolved, usable),
            self.frames_line(resolved),
            *self.ignored_line(resolved),
        ]

    def _told(self, layout: str, folders: Sequence[Path], options: Mapping[str, str]) -> list[str]:
        """Which camera, and how the poses are read."""
        if layout == "lerobot":
            return [line for folder in folders for line in lerobot_lines(folder, options)]
        return [f"Camera: {camera}."] if (camera := options["camera"] or LAYOUTS[layout].camera) else []

    def files_read(self, options: Mapping[str, str]) -> list[Path]:
        """Those of the recordings, of the camera that is chosen."""
        layout, folders = self.layout(options)
        return [file for folder in folders for file in LAYOUTS[layout].files(folder, options)]

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The rate of the grid."""
        layout, _ = self.layout(options)
        rate = self.number(options, "rate_hz", 0.01)
        return {"rate_hz": rate, "length_unit": "metre", "camera": None, "layout": layout}

    def layout(self, options: Mapping[str, str]) -> tuple[str, list[Path]]:
        """The layout of the source folder, and the folders that have it."""
        src = self.folder(options)
        asked = self.choice(options, "layout", ("auto", *LAYOUTS))
        files = files_below(src)
        for name in LAYOUTS if asked == "auto" else [asked]:
            layout = LAYOUTS[name]
            found = sorted({file.parents[layout.level] for file in files if file.match(layout.mark)})
            if found:
                return name, found
        expected = ", ".join(f"{name} ({layout.mark})" for name, layout in LAYOUTS.items())
        raise DataError(f"data {self.name}: src", "no known layout", got=src, expected=expected)

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per recording."""
        self.number(options, "segment_s", 1)
        layout, folders = self.layout(options)
        for folder in folders:
            try:
                yield from LAYOUTS[layout].sources(folder, {**options, **FIXED})
            except DataError as error:
                yield Source(folder.name, str(folder), partial(_fail, error))


def _fail(error: DataError) -> Iterator[Trajectory]:
    raise error


def _tum(folder: Path, options: Mapping[str, str]) -> Iterator[Source]:
    yield Source(folder.name, str(folder), partial(_read_tum, folder, options))


def _read_tum(folder: Path, options: Mapping[str, str]) -> Iterator[Trajectory]:
    """rgb.txt and groundtruth.txt; a camera in a world with z up."""
    found = apply_reading(read_raw_poses(folder / "groundtruth.txt"), CAMERA_UP_Z)
    stamps, files = _listed(folder / "rgb.txt", folder)
    yield from _associated(folder.name, files, stamps, found, options)


def _tum_files(folder: Path, options: Mapping[str, str]) -> list[Path]:
    return [folder / "rgb.txt", folder / "groundtruth.txt", *_listed_or_none(folder / "rgb.txt", folder)]


def _kitti(folder: Path, options: Mapping[str, str]) -> Iterator[Source]:
    """One per sequence, also of those whose poses are not published."""
    for sequence in sorted(path for path in (folder / "sequences").iterdir() if path.is_dir()):
        yield Source(sequence.name, str(sequence), partial(_read_kitti, folder, sequence, options))


def _read_kitti(folder: Path, sequence: Path, options: Mapping[str, str]) -> Iterator[Trajectory]:
    """times.txt and poses/NN.txt, one line a frame; a camera in the world of its first frame."""
    raw = read_raw_poses(folder / "poses" / f"{sequence.name}.txt")
    times, files = _times(sequence / "times.txt"), _pictures(_kitti_camera(sequence, options))
    counts = {"frames": len(files), "times": len(times), "poses": len(raw)}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise DataError(f"trajectory {sequence.name}", "different numbers of frames, times and poses", got=got)
    found = PoseFile(apply_reading(raw, CAMERA_UP_Y).poses, times, None)
    yield from _associated(sequence.name, files, times, found, options)


def _kitti_camera(sequence: Path, options: Mapping[str, str]) -> Path:
    return sequence / (options["camera"] or LAYOUTS["kitti-odometry"].camera)


def _kitti_files(folder: Path, options: Mapping[str, str]) -> list[Path]:
    found = []
    for sequence in (folder / "sequences").iterdir():
        camera = _kitti_camera(sequence, options)
        found += [sequence / "times.txt", folder / "poses" / f"{sequence.name}.txt"]
        found += _pictures(camera) if camera.is_dir() else []
    return found


def _euroc(folder: Path, options: Mapping[str, str]) -> Iterator[Source]:
    yield Source(folder.name, str(folder), partial(_read_euroc, folder, options))


def _read_euroc(folder: Path, options: Mapping[str, str]) -> Iterator[Trajectory]:
    """Poses of the body, nanoseconds; the camera sits on it as sensor.yaml says; a world with z up."""
    camera = _euroc_camera(folder, options)
    stamps, files = _listed(camera / "data.csv", camera / "data")
    raw = read_raw_poses(folder / EUROC_POSES)
    if raw.quaternion is None:
        raise DataError(raw.where, "has no quaternions")
    mounted, body = _mounted(camera / "sensor.yaml"), matrices(raw.quaternion)
    position = raw.position + (body @ mounted[:3, 3])
    ns = Reading(frozenset({"camera", "ns"}), up="z")
    seen = RawPoses(raw.where, position, rotation=body @ mounted[:3, :3], t=raw.t)
    yield from _associated(folder.name, files, stamps * 1e-9, apply_reading(seen, ns), options)


def _euroc_camera(folder: Path, options: Mapping[str, str]) -> Path:
    return folder / "mav0" / (options["camera"] or LAYOUTS["euroc"].camera)


def _euroc_files(folder: Path, options: Mapping[str, str]) -> list[Path]:
    camera = _euroc_camera(folder, options)
    tables = [camera / "data.csv", camera / "sensor.yaml", folder / EUROC_POSES]
    return tables + _listed_or_none(camera / "data.csv", camera / "data")


def _mounted(file: Path) -> Array:
    """(4, 4) from the camera to the body."""
    try:
        text = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("%"))
        return np.array(yaml.safe_load(text)["T_BS"]["data"], np.float64).reshape(4, 4)
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"camera {file}", "where it sits cannot be read", got=type(error).__name__) from error


def _associated(
    name: str, files: Sequence[Path], times: Array, found: PoseFile, options: Mapping[str, str]
) -> Iterator[Trajectory]:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(f"trajectory {name}", f"{len(missing)} of {len(files)} frames are missing", got=missing[0])
    yield from trajectories_of(f"trajectory {name}", name, files, times, found, options)


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"trajectory {folder.parent.name}", "has no folder of frames", got=folder)
    return pictures_in(folder)


def _listed(file: Path, folder: Path) -> tuple[Array, list[Path]]:
    """Times, and pictures in `folder`, of a table with a time and a name a line."""
    rows = [re.split(r"[,\s]+", line, maxsplit=1) for line in _lines(file)]
    try:
        return np.array([float(time) for time, _ in rows]), [folder / name.strip() for _, name in rows]
    except ValueError as error:
        raise DataError(f"data {file}", "a line is no time with the name of a picture", got=error) from error


def _listed_or_none(file: Path, folder: Path) -> list[Path]:
    try:
        return _listed(file, folder)[1]
    except DataError:
        return []  # the recording is left out with this reason


def _times(file: Path) -> Array:
    try:
        return np.array([float(line) for line in _lines(file)])
    except ValueError as error:
        raise DataError(f"data {file}", "a line is no time", got=error) from error


def _lines(file: Path) -> list[str]:
    """Lines of a small table without comments; DataError for a missing file."""
    if not file.is_file():
        raise DataError(f"data {file}", "is missing")
    return [
        line.strip()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]


@dataclass(frozen=True)
class Layout:
    """What marks a folder, how far below it that lies, its recordings, the files that are read, the usual camera."""

    mark: str
    level: int
    sources: Callable[[Path, Mapping[str, str]], Iterator[Source]]
    files: Callable[[Path, Mapping[str, str]], list[Path]]
    camera: str = ""


LAYOUTS = {
    "tum-rgbd": Layout("rgb.txt", 0, _tum, _tum_files),
    "kitti-odometry": Layout("sequences/*/times.txt", 2, _kitti, _kitti_files, "image_2"),
    "euroc": Layout("mav0/cam0/data.csv", 2, _euroc, _euroc_files, "cam0"),
    "lerobot": Layout("meta/info.json", 1, lerobot_sources, lerobot_files),
}
RECIPE = PublishedDrives()
