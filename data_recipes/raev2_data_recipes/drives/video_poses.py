"""Videos with a file of poses each, and folders of frames with a file of poses each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raev2.errors import DataError
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.pose_files import AXES, PoseFile, read_poses
from raev2_data_recipes.drives.sampling import Piece, resample, split_long
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe, require
from raev2_data_recipes.drives.video_frames import frame_times, read_frames
from raev2_tasks.nwm.data.trajectories import Source, Trajectory

VIDEO_SUFFIXES = {".mp4", ".mkv", ".mov", ".avi", ".webm"}
FRAME_SUFFIXES = {".jpg", ".jpeg", ".png"}
POSE_NAMES = ("poses.csv", "poses.txt")
POSE_SUFFIXES = (".csv", ".txt")
AXIS_OPTIONS = {
    "up": Option("z", f"axis of the world that points up, for TUM and KITTI files: {', '.join(AXES)}"),
    "optical": Option("x", "axis of the moving frame that looks ahead, for TUM and KITTI files: x robots, z cameras"),
    "scale": Option("1", "metres per unit of the poses; none: no metric scale, the mean step is called 1"),
}


class _WithPoses(TrajectoryRecipe):
    """What both recipes share."""

    licence = "that of your data"
    attribution = "The source folder named in `options`."
    size = "as the source"

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The rate; lengths are metres only with a scale."""
        unit = "mean step" if options["scale"] == "none" else "metre"
        return {"rate_hz": self.number(options, "rate_hz", 0.01), "length_unit": unit, "camera": None}

    def check_axes(self, options: Mapping[str, str]) -> None:
        """SpecError for an axis or a scale that is none."""
        for name in ("up", "optical"):
            self.choice(options, name, tuple(AXES))
        if options["scale"] != "none":
            self.number(options, "scale", 1e-9)


class VideoPoses(_WithPoses):
    """Frames on an exact time grid, by their true presentation times; poses interpolated there."""

    name = "video-poses"
    summary = "videos with a CSV, TUM or KITTI file of poses each"
    options = {
        "src": Option(None, "a folder of videos, each with a .csv or .txt file of poses of the same name"),
        "rate_hz": Option("4", "frames a second"),
        "time_offset_s": Option("0", "time of the poses at the first frame of a video"),
        "segment_s": Option("60", "cut recordings into trajectories of at most so many seconds"),
        **AXIS_OPTIONS,
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        resolved = self.resolve(options)
        return [
            f"Read {len(list(self.sources(resolved)))} videos from {resolved['src']}.",
            f"Sample {resolved['rate_hz']} frames a second, in pieces of at most {resolved['segment_s']} s.",
        ]

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per video; a video is a recording."""
        src = self.folder(options)
        self.check_axes(options)
        self.number(options, "time_offset_s", -np.inf)
        self.number(options, "segment_s", 1)
        require("av")
        files = sorted(file for file in src.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            expected = f"files ending in {', '.join(sorted(VIDEO_SUFFIXES))}"
            raise DataError(f"data {self.name}: src", "no videos", got=src, expected=expected)
        for file in files:
            name = "_".join(file.relative_to(src).with_suffix("").parts)
            yield Source(name, str(file), partial(_read_video, file, name, dict(options)))


class FramesPoses(_WithPoses):
    """Frames as they are, one pose each."""

    name = "frames-poses"
    summary = "folders of frames with a CSV, TUM or KITTI file of poses each"
    options = {
        "src": Option(None, "a folder with one sub-folder per trajectory: frames in order of name, poses.csv or .txt"),
        "rate_hz": Option("4", "frames a second, where the file of poses has no times"),
        "every": Option("1", "take every so manieth frame; rate_hz is the rate after that"),
        "parent": Option(r"(.+)_r?\d+", "regular expression; its first group in a folder's name is the recording"),
        **AXIS_OPTIONS,
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        resolved = self.resolve(options)
        return [f"Read {len(list(self.sources(resolved)))} folders of frames from {resolved['src']}."]

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per sub-folder."""
        src = self.folder(options)
        self.check_axes(options)
        self.number(options, "every", 1, whole=True)
        folders = sorted(path for path in src.iterdir() if path.is_dir())
        if not folders:
            raise DataError(f"data {self.name}: src", "no sub-folders", got=src)
        parent = self.pattern(options, "parent")
        for folder in folders:
            match = parent.fullmatch(folder.name)
            recording = match[1] if match else folder.name
            yield Source(recording, str(folder), partial(_read_folder, folder, dict(options)))


def _read_video(file: Path, name: str, options: Mapping[str, str]) -> Iterator[Trajectory]:
    found = _poses_beside(f"video {name}", [file.with_suffix(suffix) for suffix in POSE_SUFFIXES], options)
    times = frame_times(file)
    rate, offset = float(options["rate_hz"]), float(options["time_offset_s"])
    if found.t is not None:
        pose_t = found.t - offset
    else:
        assert found.frame is not None
        if found.frame.min() < 0 or found.frame.max() >= len(times):
            got = f"frame {found.frame.max()}" if found.frame.min() >= 0 else f"frame {found.frame.min()}"
            raise DataError(
                f"video {name}", "poses for frames that it does not have", got=got, expected=f"0 to {len(times) - 1}"
            )
        pose_t = times[found.frame]
    pieces = resample(f"video {name}", times, pose_t, found.poses, rate)
    parts = [part for piece in pieces for part in split_long(piece, max(2, round(float(options["segment_s"]) * rate)))]
    scale = _scale(options, parts)
    for number, part in enumerate(parts):
        yield Trajectory(
            id=name if len(parts) == 1 else f"{name}_{number}",
            t=part.t,
            position=part.poses[:, :2] * scale,
            yaw=part.poses[:, 2],
            frames=read_frames(file, part.frames.tolist()),
        )


def _read_folder(folder: Path, options: Mapping[str, str]) -> Iterator[Trajectory]:
    where = f"trajectory {folder.name}"
    found = _poses_beside(where, [folder / name for name in POSE_NAMES], options)
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES), key=_natural)
    if len(files) != len(found.poses):
        raise DataError(where, "different numbers of frames and poses", got=f"{len(files)} and {len(found.poses)}")
    taken = slice(None, None, int(options["every"]))
    poses, files = found.poses[taken], files[taken]
    t = np.arange(len(files)) / float(options["rate_hz"]) if found.t is None else found.t[taken] - found.t[0]
    scale = _scale(options, [Piece(np.arange(len(t)), t, poses)])
    frames = (file.read_bytes() for file in files)
    yield Trajectory(folder.name, t, poses[:, :2] * scale, poses[:, 2], frames)


def _poses_beside(where: str, candidates: list[Path], options: Mapping[str, str]) -> PoseFile:
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        expected = " or ".join(path.name for path in candidates)
        raise DataError(where, "its pose file is missing", expected=f"{expected} in {candidates[0].parent}")
    return read_poses(file, options["up"], options["optical"])


def _scale(options: Mapping[str, str], pieces: list[Piece]) -> float:
    """Metres per unit; without a metric scale what makes the mean step of this recording 1."""
    if options["scale"] != "none":
        return float(options["scale"])
    steps = np.concatenate([np.hypot(*np.diff(piece.poses[:, :2], axis=0).T) for piece in pieces])
    return 1 / float(steps.mean()) if len(steps) and steps.any() else 1.0


def _natural(file: Path) -> list[int | str]:
    """Sort key: numbers in a name by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]


VIDEO, FRAMES = VideoPoses(), FramesPoses()
