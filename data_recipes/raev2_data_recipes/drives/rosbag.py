"""ROS 1 and ROS 2 bags with a camera and odometry. Needs no ROS: they are read by the package `rosbags`."""

from __future__ import annotations

import logging
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raev2.errors import DataError
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.bag_files import (
    IMAGE_TYPES,
    METADATA,
    POSE_TYPES,
    STORAGE_SUFFIXES,
    Bag,
    Topic,
    find_bags,
    opened,
    topics_of,
    undamaged,
)
from raev2_data_recipes.drives.bag_images import frame_of
from raev2_data_recipes.drives.bag_poses import read_bag_poses
from raev2_data_recipes.drives.sampling import CUTS, Piece, cut, resample
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe, files_below, require
from raev2_tasks.nwm.data.trajectories import Frame, Source, Trajectory
from raev2_tasks.nwm.pose import Array

logger = logging.getLogger(__name__)
# Topics of known robots: images, odometry, degrees to add to the yaw.
PRESETS: dict[str, tuple[tuple[str, ...], tuple[str, ...], float]] = {
    "auto": ((), (), 0.0),
    "tartan-drive": (("/multisense/left/image_rect_color",), ("/odometry/filtered_odom",), 90.0),
    "scand": (
        ("/image_raw/compressed", "/camera/rgb/image_raw/compressed"),
        ("/odom", "/jackal_velocity_controller/odom"),
        0.0,
    ),
    "sacson": (("/fisheye_image/compressed",), ("/odometry",), 0.0),
    "locobot": (("/usb_cam/image_raw",), ("/odom",), 0.0),
}
CLOCKS = ("auto", "header", "receipt")
SAME_CLOCK_S = 1.0  # header stamps of both streams differ from the times of receipt by the same, but for this
NUM_PEEKED = 10  # image messages whose stamps tell the clock
MANY_IMAGES = 2.0  # times the rate: what comes faster is thinned out while it is read


class RosBag(TrajectoryRecipe):
    """Frames on an exact time grid, poses interpolated at their times; pieces end at gaps."""

    name = "rosbag"
    packages = ("rosbags",)
    summary = "ROS 1 and ROS 2 bags with a camera and odometry (TartanDrive, SCAND, your robot)"
    licence = "that of your bags"
    attribution = "The source folder named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a folder of .bag, .mcap or .db3 files, or of ROS 2 folders"),
        "preset": Option("auto", f"topics of a known robot: {', '.join(PRESETS)}"),
        "image_topic": Option("", "topic of the camera; empty = of the preset, or the one that fits best"),
        "pose_topic": Option("", "topic of the poses; empty = of the preset, or the one that fits best"),
        "tf_frames": Option("", "PARENT,CHILD of a tf topic; empty = to the base of the robot"),
        "clock": Option("auto", "auto; header: when it was measured; receipt: when the bag received it"),
        "yaw_offset_deg": Option("", "added to every yaw; empty = that of the preset"),
        "rate_hz": Option("4", "frames a second"),
        "filter": Option("keep", "keep; cut-reverse; cut-stops: as published sets, nothing stands, turns or reverses"),
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; opens the bags."""
        resolved = self.resolve(options)
        sources = list(self.sources(resolved))
        lines, usable = _topic_lines(find_bags(self.folder(resolved)), resolved)
        return [
            f"Read {len(sources)} bags from {resolved['src']}, topics: {resolved['preset']}.",
            *lines,
            f"Sample {resolved['rate_hz']} frames a second; clock: {resolved['clock']}, filter: {resolved['filter']}.",
            self.split_line(resolved, [source for source in sources if source.recording in usable]),
            self.frames_line(resolved),
            *self.ignored_line(resolved),
        ]

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The rate of the grid."""
        return {"rate_hz": self.number(options, "rate_hz", 0.01), "length_unit": "metre", "camera": None}

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per drive, which is a recording."""
        src = self.folder(options)
        require("rosbags")
        self.choice(options, "preset", tuple(PRESETS))
        self.choice(options, "filter", CUTS)
        self.choice(options, "clock", CLOCKS)
        if options["yaw_offset_deg"]:
            self.number(options, "yaw_offset_deg", -360, 360)
        bags = find_bags(src)
        if not bags:
            expected = ".bag, .mcap or .db3 files, or ROS 2 bag folders"
            raise DataError(f"data {self.name}: src", "no bags", got=src, expected=expected)
        for bag in bags:
            yield Source(bag.name, str(bag.paths[0]), partial(_read, bag, dict(options)))

    def files_read(self, options: Mapping[str, str]) -> list[Path]:
        """Bags and their metadata."""
        suffixes = (".bag", *STORAGE_SUFFIXES)
        return [file for file in files_below(self.folder(options)) if file.suffix in suffixes or file.name == METADATA]


def _chosen(where: str, reader: Any, options: Mapping[str, str]) -> tuple[Topic, Topic]:
    """The topics of images and of poses."""
    topics, rate = topics_of(where, reader), float(options["rate_hz"])
    images, poses, _ = PRESETS[options["preset"]]
    return (
        topics.choose("image_topic", options["image_topic"], images, IMAGE_TYPES, rate),
        topics.choose("pose_topic", options["pose_topic"], poses, POSE_TYPES, rate),
    )


def _topic_lines(bags: list[Bag], options: Mapping[str, str]) -> tuple[list[str], set[str]]:
    """Topics with types, counts and rates, and which are taken; and the names of the bags that have what is needed.

    Bags with the same topics share their lines.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    usable: set[str] = set()
    lines: list[str] = []
    for bag in bags:
        where = f"bag {bag.name}"
        lines += [f"{where}: {bag.note}."] if bag.note else []
        try:
            with opened(bag.paths) as reader:
                topics = topics_of(where, reader)
                image, pose = _chosen(where, reader, options)
                usable.add(bag.name)
                key = tuple(sorted((topic.name, topic.kind) for topic in topics.by_name.values()))
                if key in alike:
                    alike[key].append(bag.name)
                    continue
                alike[key] = [bag.name]
                lines += [f"{where}: {topics.listed()}"]
                lines += [f"{where}: images from {image.name}, poses from {pose.name}."]
        except DataError as error:
            lines += [f"Cannot be used: {error}"]
    lines += [f"{len(names) - 1} more bags have the topics of {names[0]}." for names in alike.values() if names[1:]]
    return lines, usable


def _read(bag: Bag, options: Mapping[str, str]) -> Iterator[Trajectory]:
    where, rate = f"bag {bag.name}", float(options["rate_hz"])
    offset = np.deg2rad(float(options["yaw_offset_deg"] or PRESETS[options["preset"]][2]))
    with opened(bag.paths) as reader, tempfile.TemporaryFile() as store:
        image, pose = _chosen(where, reader, options)
        logger.info(
            "%s: %s; images from %s, poses from %s", bag.name, topics_of(where, reader).listed(), image.name, pose.name
        )
        received, stamped, poses = read_bag_poses(where, reader, pose, options["tf_frames"])
        by_header = _by_header(bag.name, reader, image, received, stamped, options["clock"])
        pose_t, poses = _increasing(where, stamped if by_header else received, poses + [0, 0, offset])
        spool = _Spool(store, start=float(pose_t[0]), rate_hz=rate)
        images, same = spool.fill(where, reader, image, by_header)
        if same:
            logger.warning("%s: %d images are left out that have the time of another", bag.name, same)
        pieces = resample(
            where, images - spool.start, pose_t - spool.start, poses, rate, spool.grid_start
        )  # differences keep float64 exact
        kept = [part for piece in pieces for part in cut(piece, options["filter"])]  # type: ignore[arg-type]
        taken = sum(len(piece.t) for piece in kept)
        logger.info("%s: %d of %d images taken, in %d pieces", bag.name, taken, image.count, len(kept))
        longest = max((len(piece.t) for piece in kept), default=0)
        if longest < int(options["min_frames"]):
            raise DataError(
                where, "no piece is long enough", got=f"{len(kept)} pieces, the longest of {longest} frames, from "
                f"{image.count} images and {pose.count} poses", expected=f"at least {options['min_frames']} frames",
            )  # fmt: skip
        for number, piece in enumerate(kept):
            name = bag.name if len(kept) == 1 else f"{bag.name}_{number}"
            frames = _frames(where, reader, image, spool, piece)
            yield Trajectory(name, piece.t - piece.t[0], piece.poses[:, :2], piece.poses[:, 2], frames)


def _stamp(raw: bytes) -> float:
    """Seconds in the header with which a message begins, in ROS 1 and in CDR alike."""
    sec, nanosec = struct.unpack_from("<iI", raw, 4)
    return float(sec + nanosec * 1e-9)


def _by_header(name: str, reader: Any, image: Topic, received: Array, stamped: Array, clock: str) -> bool:
    """Whether the stamps in the headers are used. Logs how far they lie from the times of receipt."""
    links = [link for link in reader.connections if link.topic == image.name]
    late = [stamp * 1e-9 - _stamp(bytes(raw)) for _, stamp, raw in islice(reader.messages(links), NUM_PEEKED)]
    images, poses = float(np.median(late)), float(np.median(received - stamped))
    logger.info("%s: received after the stamp in the header by %.3f s (images), %.3f s (poses)", name, images, poses)
    if clock != "auto":
        return clock == "header"
    same = abs(images - poses) < SAME_CLOCK_S and stamped[0] > 0 and (np.diff(stamped) > -SAME_CLOCK_S).all()
    logger.info("%s: the clock of %s is used", name, "the headers" if same else "receipt: the headers do not share one")
    return bool(same)


def _increasing(where: str, t: Array, poses: Array) -> tuple[Array, Array]:
    """In order of time, one pose a time."""
    _check_forward(where, t, "poses")
    order = np.argsort(t, kind="stable")
    t, poses = t[order], poses[order]
    new = np.diff(t, prepend=-np.inf) > 0
    if not new.all():
        logger.warning("%s: %d poses are left out that have the time of another", where, (~new).sum())
    return t[new], poses[new]


def _check_forward(where: str, t: Array, of: str) -> None:
    """DataError for times, in order of receipt, that run back: what was measured twice would be mixed."""
    back = -float(np.diff(t).min(initial=0))
    if back >= SAME_CLOCK_S:
        raise DataError(
            where, f"the clock of the {of} runs back", got=f"by {back:.3g} s", expected=f"less than {SAME_CLOCK_S:g} s",
            hint="Set clock=receipt.",
        )  # fmt: skip


@dataclass
class _Held:
    t: float
    distance: float  # from the time of the grid
    raw: bytes


class _Spool:
    """Image messages of one pass over a bag, those that a grid of times can need, in a temporary file.

    start        seconds; the grid begins here, and no image before is kept
    grid_start   that of the grid relative to `start`, None where every image is kept because they come slowly
    """

    def __init__(self, store: BinaryIO | Any, start: float, rate_hz: float) -> None:
        self._store, self.start, self.rate_hz = store, start, rate_hz
        self.grid_start: float | None = None
        self._places: list[tuple[float, int, int]] = []  # time, offset, length

    def fill(self, where: str, reader: Any, topic: Topic, by_header: bool) -> tuple[Array, int]:
        """Read the topic once; the times of the images kept, in order, and how many had the time of another."""
        links = [link for link in reader.connections if link.topic == topic.name]
        thin = topic.rate_hz >= MANY_IMAGES * self.rate_hz
        slot, held, times = -1, _Held(0.0, np.inf, b""), list[float]()
        for _, stamp, raw in reader.messages(links):
            t = _stamp(bytes(raw[:16])) if by_header else stamp * 1e-9
            times.append(t)
            if not thin:
                self._keep(t, bytes(raw))
                continue
            if self.grid_start is None:
                self.start = max(self.start, t)
                self.grid_start = 0.0
            ahead = (t - self.start) * self.rate_hz
            number = int(np.floor(ahead + 0.5))
            if number > slot:
                self._keep_held(held)
                slot, held = number, _Held(0.0, np.inf, b"")
            if number == slot and abs(ahead - number) < held.distance - 1e-6:
                held = _Held(t, abs(ahead - number), bytes(raw))
        self._keep_held(held)
        _check_forward(where, np.array(times), "images")
        by_time = {
            t: (t, offset, length) for t, offset, length in sorted(self._places, reverse=True)
        }  # the first stays
        same, self._places = len(self._places) - len(by_time), sorted(by_time.values())
        return np.array([t for t, _, _ in self._places]), same

    def _keep_held(self, held: _Held) -> None:
        if held.raw:
            self._keep(held.t, held.raw)

    def _keep(self, t: float, raw: bytes) -> None:
        self._places.append((t, self._store.tell(), len(raw)))
        self._store.write(raw)

    def message(self, number: int) -> bytes:
        """The raw message of the image kept as `number`."""
        _, offset, length = self._places[number]
        self._store.seek(offset)
        return bytes(self._store.read(length))


def _frames(where: str, reader: Any, topic: Topic, spool: _Spool, piece: Piece) -> Iterator[Frame]:
    """The images of a piece, in order."""
    for number in piece.frames.tolist():
        with undamaged(where):
            message = reader.deserialize(spool.message(number), topic.kind)
        yield frame_of(where, message)


RECIPE = RosBag()
