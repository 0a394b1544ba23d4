"""Bags on disk: which files make a drive, what topics they hold, and which of them are the camera and the poses."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from raev2.errors import DataError
from raev2.files.damage import stop_if_machine
from raev2_data_recipes.drives.trajectory_recipe import files_below

STORAGE_SUFFIXES = (".mcap", ".db3")
METADATA = "metadata.yaml"
SPLIT_GAP_S = 5.0  # parts of one recording follow each other within this
TFS, FIX = ("tf2_msgs/msg/TFMessage", "tf/msg/tfMessage"), "sensor_msgs/msg/NavSatFix"
IMAGE_TYPES = ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image")
POSE_TYPES = (
    "nav_msgs/msg/Odometry",
    "geometry_msgs/msg/PoseWithCovarianceStamped",
    "geometry_msgs/msg/PoseStamped",
    *TFS,
    FIX,
)
# What a topic is for, told by its name: words of topics that are no camera view ahead, or no measured pose.
SIDE = re.compile(r"right|rear|back|side|down", re.I)
NO_CAMERA = re.compile(
    r"depth|disparity|mask|label|segment|infra|thermal|(^|[/_])ir\d?([/_]|$)|map|debug|overlay", re.I
)
NO_POSE = re.compile(r"goal|initial|target|setpoint|cmd|command|waypoint|desired|tf_static", re.I)


@dataclass(frozen=True)
class Bag:
    """The files of one drive, in order; `note` says what is unusual about them."""

    name: str
    paths: tuple[Path, ...]
    note: str = ""


@dataclass(frozen=True)
class Topic:
    """A topic of a bag and how often it is sent."""

    name: str
    kind: str
    count: int
    rate_hz: float

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.count}, {self.rate_hz:.3g} Hz)"


def find_bags(src: Path) -> list[Bag]:
    """ROS 1 files, ROS 2 folders and loose ROS 2 files, anywhere below the folder; parts of one recording together."""
    found: list[Bag] = []
    files = files_below(src)
    folders = {file.parent for file in files if file.name == METADATA}
    for folder in sorted(folders):
        found.append(_folder_bag(folder))
    loose = [file for file in files if file.suffix in (".bag", *STORAGE_SUFFIXES) and file.parent not in folders]
    for _, parts in groupby(loose, key=lambda file: (file.parent, file.suffix, _prefix(file))):
        found.extend(_drives(sorted(parts, key=_number)))
    names = [bag.name for bag in found]
    return [bag if names.count(bag.name) == 1 else _with_folders(src, bag) for bag in found]


def _with_folders(src: Path, bag: Bag) -> Bag:
    """Named by its folders too, because its name occurs in several."""
    parts = bag.paths[0].parent.relative_to(src).parts
    return Bag("_".join([*parts, bag.name]), bag.paths, bag.note)


def _folder_bag(folder: Path) -> Bag:
    """A ROS 2 folder; its files themselves where its metadata do not fit them."""
    files = sorted((file for file in folder.iterdir() if file.suffix in STORAGE_SUFFIXES), key=_number)
    try:
        listed = set(
            re.findall(r"[^\s/'\"]+\.(?:mcap|db3)(?:\.zstd)?", (folder / METADATA).read_text(encoding="utf-8"))
        )
        with opened([folder]) as reader:
            counted = sum(link.msgcount for link in reader.connections)
        there = {file.name for file in files}
        fits = there <= listed and counted == _count(files) if not any(".zstd" in name for name in listed) else True
    except (DataError, OSError, UnicodeDecodeError) as error:
        stop_if_machine(error)
        fits = False
    if fits or not files:
        return Bag(folder.name, (folder,))
    return Bag(folder.name, tuple(files), f"{METADATA} does not fit the files, it is not used")


def _count(files: Iterable[Path]) -> int:
    with opened(list(files)) as reader:
        return sum(link.msgcount for link in reader.connections)


def _drives(files: list[Path]) -> Iterator[Bag]:
    """Files of one prefix, those together that follow each other in number and time."""
    parts: list[Path] = []
    end: float | None = None
    for file in files:
        start, stop = _span(file)
        follows = parts and end is not None and start is not None and 0 <= start - end <= SPLIT_GAP_S
        if parts and not (follows and _number(file) == _number(parts[-1]) + 1):
            yield _drive(parts)
            parts = []
        parts, end = [*parts, file], stop
    yield _drive(parts)


def _drive(parts: list[Path]) -> Bag:
    if len(parts) == 1:
        return Bag(parts[0].stem, tuple(parts))
    return Bag(_prefix(parts[0]), tuple(parts), f"{len(parts)} files of one recording")


def _span(file: Path) -> tuple[float | None, float | None]:
    """First and last time of a file, seconds; None where it cannot be opened or is empty."""
    try:
        with opened([file]) as reader:
            return (reader.start_time * 1e-9, reader.end_time * 1e-9) if reader.message_count else (None, None)
    except DataError:
        return None, None


def _prefix(file: Path) -> str:
    """Name without the number of a part."""
    return re.sub(r"_\d+$", "", file.stem)


def _number(file: Path) -> int:
    match = re.search(r"_(\d+)$", file.stem)
    return int(match[1]) if match else -1


@contextmanager
def opened(paths: Iterable[Path]) -> Iterator[Any]:
    """A reader of rosbags over files of one drive; DataError for files that it cannot read."""
    from rosbags.highlevel import AnyReader
    from rosbags.typesys import Stores, get_typestore

    paths = list(paths)
    with (
        undamaged(f"bag {paths[0].name}"),
        AnyReader(paths, default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as reader,
    ):
        yield reader


@contextmanager
def undamaged(where: str) -> Iterator[None]:
    """DataError at `where` for what a damaged bag makes its readers raise."""
    try:
        yield
    except DataError:
        raise
    except _damage() as error:
        raise DataError(where, "cannot be read", got=f"{type(error).__name__}: {error}") from error


def _damage() -> tuple[type[Exception], ...]:
    """What rosbags and the databases below it raise for a damaged bag, found by flipping bytes."""
    from rosbags import highlevel, rosbag1, rosbag2, serde, typesys

    databases = [sys.modules[name].Error for name in ("apsw", "sqlite3") if name in sys.modules]
    return (
        highlevel.AnyReaderError, rosbag1.ReaderError, rosbag2.ReaderError, serde.SerdeError, typesys.TypesysError,
        struct.error, OSError, ValueError, LookupError, AssertionError, OverflowError, MemoryError, *databases,
    )  # fmt: skip


# Topics


@dataclass
class Topics:
    """The topics of a bag."""

    where: str
    by_name: dict[str, Topic] = field(default_factory=dict)

    def listed(self) -> str:
        """For messages."""
        return ", ".join(str(topic) for _, topic in sorted(self.by_name.items()))

    def choose(self, option: str, asked: str, preset: tuple[str, ...], known: tuple[str, ...], rate_hz: float) -> Topic:
        """The topic asked for, the preset's, or the one whose type, name and count fit the role best."""
        wanted = (asked,) if asked else preset
        if wanted:
            found = [self.by_name[name] for name in wanted if name in self.by_name]
        else:
            found = [topic for topic in self.by_name.values() if topic.kind in known and topic.count > 1]
            found.sort(key=lambda topic: (_unfit(topic, rate_hz), known.index(topic.kind), -topic.count, topic.name))
        if not found:
            raise DataError(
                self.where, f"no topic for {option}", got=self.listed(),
                expected=asked or " or ".join(preset) or " or ".join(known),
                hint=f"Choose one with --set {option}=TOPIC.",
            )  # fmt: skip
        if found[0].kind not in known:
            raise DataError(
                self.where, f"{found[0].name} has another type", got=found[0].kind, expected=" or ".join(known)
            )
        return found[0]


def _unfit(topic: Topic, rate_hz: float) -> int:
    """0 for a topic whose name and rate suit its role; more the less they do."""
    is_image = topic.kind in IMAGE_TYPES
    wrong = (NO_CAMERA if is_image else NO_POSE).search(topic.name) is not None
    aside = is_image and SIDE.search(topic.name) is not None
    return 4 * wrong + 2 * (topic.rate_hz < rate_hz / 1.5) + aside


def topics_of(where: str, reader: Any) -> Topics:
    """What an opened bag holds; rates are means over its duration."""
    seconds = max((reader.end_time - reader.start_time) * 1e-9, 1e-9) if reader.message_count else 1.0
    counts: Mapping[str, Topic]
    counts = {}
    for link in reader.connections:
        before = counts[link.topic].count if link.topic in counts else 0
        count = before + link.msgcount
        counts[link.topic] = Topic(link.topic, link.msgtype, count, count / seconds)
    return Topics(where, counts)
