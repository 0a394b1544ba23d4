"""Videos with a file of poses each, and folders of frames with a file of poses each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raev2.errors import DataError
from raev2.files.picture_folder import scan_folder
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.pose_files import read_raw_poses
from raev2_data_recipes.drives.readings import (
    AXES,
    EPOCH,
    MEANING,
    TIMES,
    PoseFile,
    Reading,
    apply_reading,
    check_files,
    parse_words,
    understand,
)
from raev2_data_recipes.drives.sampling import Piece, resample, split_long
from raev2_data_recipes.drives.trajectory_recipe import (
    HEADINGS,
    TrajectoryRecipe,
    everything_below,
    files_below,
    require,
)
from raev2_tasks.nwm.data.trajectories import Frame, Source, Trajectory
from raev2_tasks.nwm.data.video_frames import (
    DECODERS,
    SUFFIXES,
    Picture,
    Timeline,
    duration_s,
    frame_rate,
    is_video,
    logger,
    read_frames,
    timeline,
)
from raev2_tasks.nwm.pose import Array

POSE_NAMES = ("poses.csv", "poses.txt")
POSE_SUFFIXES = (".csv", ".txt")
POSE_OPTIONS = {
    "reading": Option(
        "auto", f"what the numbers of pose files mean: auto, plain, or words with commas: {', '.join(MEANING)}"
    ),
    "up": Option("", f"axis of the world that points up, for poses in space: {', '.join(AXES)}; empty = as read"),
    "optical": Option("", "axis of the moving frame that looks ahead: x robots, z cameras; empty = as read"),
    "scale": Option("1", "metres per unit of the poses; none: no metric scale, the mean step is called 1"),
}


class _WithPoses(TrajectoryRecipe):
    """What both recipes share: they read all files of poses first, to find out what the numbers mean."""

    licence = "that of your data"
    attribution = "The source folder named in `options`."
    size = "as the source"

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The rate; lengths are metres only with a scale; how the poses were read."""
        unit = "mean step" if options["scale"] == "none" else "metre"
        reading = self.reading(options)
        return {
            "rate_hz": self.number(options, "rate_hz", 0.01),
            "length_unit": unit,
            "camera": None,
            "reading": {"words": sorted(reading.words), "lines": reading.lines},
        }

    def pose_files(self, options: Mapping[str, str]) -> list[Path]:
        """The files of poses of all recordings that have one."""
        raise NotImplementedError

    def period_s(self, options: Mapping[str, str]) -> float | None:
        """Seconds between two poses of files that number frames."""
        raise NotImplementedError

    def reading(self, options: Mapping[str, str]) -> Reading:
        """How the poses are read: as stated, or as the motion in all of the files tells."""
        for name in ("up", "optical"):
            self.choice(options, name, ("", *AXES))
        if options["scale"] != "none":
            self.number(options, "scale", 1e-9)
        words = parse_words(f"data {self.name}: reading", options["reading"])
        keep = self._option(options, "heading", HEADINGS) == "keep"
        raws = []
        for file in self.pose_files(options):
            try:
                raws.append(read_raw_poses(file))
            except DataError:
                continue  # the recording is left out later, with this reason
        where = f"data {self.name}: poses"
        found = understand(
            where, raws, words=words, up=options["up"], optical=options["optical"], keep=keep,
            metric=options["scale"] == "1", period_s=self.period_s(options),
        )  # fmt: skip
        check_files(where, raws, found, keep)
        return found


class VideoPoses(_WithPoses):
    """Frames on an exact time grid, by their true presentation times; poses interpolated there."""

    name = "video-poses"
    packages = ("av",)
    summary = "videos with a CSV, TUM or KITTI file of poses each"
    options = {
        "src": Option(None, "a folder of videos, each with a .csv or .txt file of poses of the same name"),
        "rate_hz": Option("4", "frames a second"),
        "time_offset_s": Option("0", "time of the poses at the first frame of a video"),
        "segment_s": Option("60", "cut recordings into trajectories of at most so many seconds"),
        "times": Option("auto", "auto: presentation times of the container where they can be trusted; decoded: never"),
        "decoder": Option("pyav", "pyav; decord: for files where its pictures are those of PyAV"),
        **POSE_OPTIONS,
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the files of poses."""
        resolved = self.resolve(options)
        sources = list(self.sources(resolved))
        bare = len(sources) - len(self.pose_files(resolved))
        lines, usable = self.trial(resolved, sources)
        seconds = sum(duration_s(file) for file in self._videos(resolved))
        return [
            f"Read {len(sources)} videos ({seconds / 60:.1f} minutes) from {resolved['src']}"
            + (f", {bare} of them without poses." if bare else "."),
            *self.reading(resolved).lines,
            f"Sample {resolved['rate_hz']} frames a second, in pieces of at most {resolved['segment_s']} s.",
            *lines,
            self.split_line(resolved, usable),
            self.frames_line(resolved),
            *self.ignored_line(resolved),
        ]

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per video; a video is a recording."""
        src = self.folder(options)
        self.number(options, "time_offset_s", -np.inf)
        self.number(options, "segment_s", 1)
        self.choice(options, "times", ("auto", "decoded"))
        self.choice(options, "decoder", DECODERS)
        require("av")
        reading = self.reading(options)
        files = self._videos(options)
        if not files:
            expected = f"files ending in {', '.join(SUFFIXES)}, or videos by their content"
            raise DataError(f"data {self.name}: src", "no videos", got=src, expected=expected)
        names = ["_".join(file.relative_to(src).with_suffix("").parts) for file in files]
        for file, name in zip(files, names, strict=True):
            name = name if names.count(name) == 1 else f"{name}_{file.suffix[1:]}"
            yield Source(name, str(file), partial(_read_video, file, name, reading, dict(options)))

    def _videos(self, options: Mapping[str, str]) -> list[Path]:
        files = files_below(self.folder(options))
        return [file for file in files if file.suffix not in POSE_SUFFIXES and is_video(file)]

    def pose_files(self, options: Mapping[str, str]) -> list[Path]:
        """Beside the videos."""
        found = (_first(file.with_suffix(suffix) for suffix in POSE_SUFFIXES) for file in self._videos(options))
        return [file for file in found if file is not None]

    def period_s(self, options: Mapping[str, str]) -> float | None:
        """That of the first video that tells its rate."""
        rates = (frame_rate(file) for file in self._videos(options))
        return next((1 / rate for rate in rates if rate), None)

    def files_read(self, options: Mapping[str, str]) -> list[Path]:
        """Videos, and the files of poses beside them."""
        return self._videos(options) + self.pose_files(options)


class FramesPoses(_WithPoses):
    """Frames as they are, with the poses of their numbers or times."""

    name = "frames-poses"
    summary = "folders of frames with a CSV, TUM or KITTI file of poses each"
    options = {
        "src": Option(None, "a folder with one sub-folder per trajectory: frames in order of name, poses.csv or .txt"),
        "rate_hz": Option("4", "frames a second; where poses have times, frames are taken on this grid"),
        "every": Option("1", "take every so manieth frame; rate_hz is the rate after that"),
        "parent": Option(r"(.+)_r?\d+", "regular expression; its first group in a folder's name is the recording"),
        **POSE_OPTIONS,
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the files of poses."""
        resolved = self.resolve(options)
        sources = list(self.sources(resolved))
        bare = len(sources) - len(self.pose_files(resolved))
        lines, usable = self.trial(resolved, sources)
        recordings = len({source.recording for source in sources})
        return [
            f"Read {len(sources)} folders of frames of {recordings} recordings from {resolved['src']}"
            + (f", {bare} of them without poses." if bare else "."),
            *self.reading(resolved).lines,
            *lines,
            self.split_line(resolved, usable),
            self.frames_line(resolved),
            *self.ignored_line(resolved),
        ]

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per sub-folder."""
        src = self.folder(options)
        self.number(options, "every", 1, whole=True)
        reading = self.reading(options)
        folders = self._folders(options)
        if not folders:
            raise DataError(f"data {self.name}: src", "no sub-folders", got=src)
        parent = self.pattern(options, "parent")
        for folder in folders:
            match = parent.fullmatch(folder.name)
            recording = match[1] if match else folder.name
            yield Source(recording, str(folder), partial(_read_folder, folder, reading, dict(options)))

    def _folders(self, options: Mapping[str, str]) -> list[Path]:
        return [folder.path for folder in everything_below(self.folder(options)).folders]

    def pose_files(self, options: Mapping[str, str]) -> list[Path]:
        """Inside the folders."""
        found = (_first(folder / name for name in POSE_NAMES) for folder in self._folders(options))
        return [file for file in found if file is not None]

    def period_s(self, options: Mapping[str, str]) -> float | None:
        """As stated."""
        return 1 / (self.number(options, "rate_hz", 0.01) * self.number(options, "every", 1, whole=True))

    def files_read(self, options: Mapping[str, str]) -> list[Path]:
        """Frames and files of poses in the sub-folders."""
        return [file for folder in self._folders(options) for file in pictures_in(folder)] + self.pose_files(options)


def _read_video(file: Path, name: str, reading: Reading, options: Mapping[str, str]) -> Iterator[Trajectory]:
    where = f"video {name}"
    found = _poses_beside(where, [file.with_suffix(suffix) for suffix in POSE_SUFFIXES], reading)
    shown = timeline(file, decode=options["times"] == "decoded")
    offset = float(options["time_offset_s"])
    pose_t = _times_of_frames(where, shown.t, found) if found.t is None else found.t - offset
    yield from video_trajectories(name, file, shown, pose_t, found.poses, options)


def video_trajectories(
    name: str,
    file: Path,
    shown: Timeline,
    pose_t: Array,
    poses: Array,
    options: Mapping[str, str],
    window_s: tuple[float, float] = (-np.inf, np.inf),
) -> Iterator[Trajectory]:
    """Frames of a video on a grid with the poses at their times, in one pass over the part of it in `window_s`.

    pose_t    seconds from the first frame of the video
    """
    rate, first = float(options["rate_hz"]), int(np.searchsorted(shown.t, window_s[0] - 1e-6))
    last = int(np.searchsorted(shown.t, window_s[1] - 1e-6))
    pieces = resample(f"video {name}", shown.t[first:last], pose_t, poses, rate)
    pieces = [Piece(piece.frames + first, piece.t, piece.poses) for piece in pieces]
    longest = len(shown) if options["split"] == "by-time" else max(2, round(float(options["segment_s"]) * rate))
    parts = [part for piece in pieces for part in split_long(piece, longest)]
    scale = _scale(options, parts)
    wanted = [number for part in parts for number in part.frames.tolist()]
    logger.info("%s: %d of %d frames taken, in %d pieces", name, len(wanted), len(shown), len(parts))
    pictures = read_frames(file, shown, wanted, options["decoder"])
    for number, part in enumerate(parts):
        yield Trajectory(
            id=name if len(parts) == 1 else f"{name}_{number}",
            t=part.t,
            position=part.poses[:, :2] * scale,
            yaw=part.poses[:, 2],
            frames=_pictures(pictures, part.frames.tolist()),
        )


def _pictures(pictures: Iterator[tuple[int, Picture]], numbers: Sequence[int]) -> Iterator[Picture]:
    """The pictures of a part out of a pass over the whole video; those of parts that nobody read are passed over."""
    for number, picture in pictures:
        if number >= numbers[0]:
            yield picture
        if number >= numbers[-1]:
            return


def _times_of_frames(where: str, times: Array, found: PoseFile) -> Array:
    """Times of poses that belong to frames; DataError unless they are numbers of frames that are shown."""
    assert found.frame is not None
    one_each = np.array_equal(found.frame, np.arange(len(found.frame)))
    if one_each and len(found.frame) != len(times):
        raise DataError(
            where, "different numbers of visible frames and poses", got=f"{len(times)} and {len(found.frame)}",
            expected="one pose for each frame that a player shows",
            hint="Frames that an edit list cuts off need no pose; or give each pose its time, in a column t.",
        )  # fmt: skip
    bad = found.frame[(found.frame < 0) | (found.frame >= len(times))]
    if len(bad):
        expected = f"0 to {len(times) - 1}"
        raise DataError(where, "poses for frames that it does not have", got=f"frame {bad[0]}", expected=expected)
    return times[found.frame]


def _read_folder(folder: Path, reading: Reading, options: Mapping[str, str]) -> Iterator[Trajectory]:
    where = f"trajectory {folder.name}"
    found = _poses_beside(where, [folder / name for name in POSE_NAMES], reading)
    yield from trajectories_of(where, folder.name, pictures_in(folder), None, found, options)


def trajectories_of(
    where: str, name: str, files: Sequence[Path], times: Array | None, found: PoseFile, options: Mapping[str, str]
) -> Iterator[Trajectory]:
    """Picture files with poses, associated by time where both have times, else one by one.

    times   seconds of the files; None: those in their names, or those of the poses
    """
    rate, every = float(options["rate_hz"]), int(options.get("every", "1"))
    if times is None and found.t is not None and len(files) != len(found.poses):
        times = times_in_names(files)
    if times is None and len(files) != len(found.poses):
        raise DataError(
            where, "different numbers of frames and poses", got=f"{len(files)} and {len(found.poses)}",
            hint="Frames whose names are their times, in seconds or nanoseconds since 1970, need no pose each.",
        )  # fmt: skip
    if found.t is None:
        pieces = _numbered(where, files, found, rate, every)
    else:
        times = (found.t if times is None else times)[::every]
        files, start = files[::every], found.t[0]
        pieces = resample(where, times - start, found.t - start, found.poses, rate)
    scale = _scale(options, pieces)
    logger.info("%s: %d of %d frames taken, in %d pieces", name, sum(len(p.t) for p in pieces), len(files), len(pieces))
    for number, piece in enumerate(pieces):
        frames: Iterable[Frame] = (files[index].read_bytes() for index in piece.frames.tolist())
        part = name if len(pieces) == 1 else f"{name}_{number}"
        yield Trajectory(part, piece.t, piece.poses[:, :2] * scale, piece.poses[:, 2], frames)


def _numbered(where: str, files: Sequence[Path], found: PoseFile, rate_hz: float, every: int) -> list[Piece]:
    """One pose a file, in order; a piece ends where the numbers of the frames leave some out."""
    assert found.frame is not None
    if (np.diff(found.frame) <= 0).any():
        raise DataError(where, "the numbers of the frames do not increase")
    runs = np.split(np.arange(len(files)), np.flatnonzero(np.diff(found.frame) > 1) + 1)
    taken = [run[::every] for run in runs]
    return [Piece(run, (found.frame[run] - found.frame[0]) / every / rate_hz, found.poses[run]) for run in taken]


def times_in_names(files: Sequence[Path]) -> Array | None:
    """Seconds since 1970 that names of files give, in any decimal unit; None where they are no such times."""
    try:
        values = np.array([float(file.stem) for file in files])
    except ValueError:
        return None
    units = (factor for factor in (1.0, *TIMES.values()) if EPOCH[0] <= np.median(values) * factor <= EPOCH[1])
    factor = next(units, None) if len(values) else None
    return None if factor is None or (np.diff(values) <= 0).any() else values * factor


def _poses_beside(where: str, candidates: list[Path], reading: Reading) -> PoseFile:
    file = _first(candidates)
    if file is None:
        expected = " or ".join(path.name for path in candidates)
        raise DataError(where, "its pose file is missing", expected=f"{expected} in {candidates[0].parent}")
    return apply_reading(read_raw_poses(file), reading)


def _first(candidates: Iterable[Path]) -> Path | None:
    return next((path for path in candidates if path.is_file()), None)


def _scale(options: Mapping[str, str], pieces: list[Piece]) -> float:
    """Metres per unit; without a metric scale what makes the mean step of this recording 1."""
    if options["scale"] != "none":
        return float(options["scale"])
    steps = np.concatenate([np.hypot(*np.diff(piece.poses[:, :2], axis=0).T) for piece in pieces])
    return 1 / float(steps.mean()) if len(steps) and steps.any() else 1.0


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder, in order of the numbers in their names."""
    return sorted(scan_folder(folder).pictures, key=natural)


def natural(file: Path) -> list[int | str]:
    """Sort key: numbers in a name by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]


VIDEO, FRAMES = VideoPoses(), FramesPoses()
