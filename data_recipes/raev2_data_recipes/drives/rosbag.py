"""ROS 1 and ROS 2 bags with a camera and odometry. Needs no ROS: they are read by the package `rosbags`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.sampling import CUTS, Piece, cut, resample
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe, require
from raev2_tasks.nwm.data.trajectories import Frame, Source, Trajectory
from raev2_tasks.nwm.pose import yaw_of_quaternion

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
IMAGE_TYPES = ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image")
POSE_TYPES = (
    "nav_msgs/msg/Odometry",
    "geometry_msgs/msg/PoseWithCovarianceStamped",
    "geometry_msgs/msg/PoseStamped",
)
CHANNELS = {"rgb8": [0, 1, 2], "bgr8": [2, 1, 0], "rgba8": [0, 1, 2], "bgra8": [2, 1, 0], "mono8": [0, 0, 0]}
DEPTHS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}


class RosBag(TrajectoryRecipe):
    """Frames on an exact time grid, poses interpolated at their times; pieces end at gaps."""

    name = "rosbag"
    summary = "ROS 1 and ROS 2 bags with a camera and odometry (TartanDrive, SCAND, your robot)"
    licence = "that of your bags"
    attribution = "The source folder named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a folder of .bag files, .mcap or .db3 folders"),
        "preset": Option("auto", f"topics of a known robot: {', '.join(PRESETS)}"),
        "image_topic": Option("", "topic of the camera; empty = of the preset, or the first that holds images"),
        "pose_topic": Option("", "topic of the odometry; empty = of the preset, or the first that holds poses"),
        "yaw_offset_deg": Option("", "added to every yaw; empty = that of the preset"),
        "rate_hz": Option("4", "frames a second"),
        "filter": Option("keep", "keep; cut-reverse; cut-stops: as published sets, nothing stands, turns or reverses"),
        **TrajectoryRecipe.STORAGE,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        resolved = self.resolve(options)
        bags = list(self.sources(resolved))
        return [
            f"Read {len(bags)} bags from {resolved['src']}, topics: {resolved['preset']}.",
            f"Sample {resolved['rate_hz']} frames a second; {resolved['filter']}.",
        ]

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The rate of the grid."""
        return {"rate_hz": self.number(options, "rate_hz", 0.01), "length_unit": "metre", "camera": None}

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per bag; a bag is a recording."""
        src = self.folder(options)
        require("rosbags")
        self.choice(options, "preset", tuple(PRESETS))
        self.choice(options, "filter", CUTS)
        if options["yaw_offset_deg"]:
            self.number(options, "yaw_offset_deg", -360, 360)
        bags = sorted({*src.rglob("*.bag"), *(file.parent for file in src.rglob("metadata.yaml"))})
        if not bags:
            raise DataError(f"data {self.name}: src", "no bags", got=src, expected=".bag files or ROS 2 bag folders")
        for bag in bags:
            yield Source(bag.stem, str(bag), partial(_read, bag, dict(options)))


def _read(bag: Path, options: Mapping[str, str]) -> Iterator[Trajectory]:
    from rosbags.highlevel import AnyReader, AnyReaderError
    from rosbags.typesys import Stores, get_typestore

    where = f"bag {bag.name}"
    images, poses, preset_offset = PRESETS[options["preset"]]
    offset = float(options["yaw_offset_deg"] or preset_offset)
    try:
        with AnyReader([bag], default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as reader:
            types = {link.topic: link.msgtype for link in reader.connections}
            counts = Counter({link.topic: link.msgcount for link in reader.connections})
            image_topic = _topic(where, types, counts, options["image_topic"], images, IMAGE_TYPES, "image_topic")
            pose_topic = _topic(where, types, counts, options["pose_topic"], poses, POSE_TYPES, "pose_topic")
            logger.info(
                "%s: %s; images from %s, poses from %s", bag.name,
                ", ".join(f"{topic} {count}" for topic, count in sorted(counts.items())), image_topic, pose_topic,
            )  # fmt: skip
            pieces = list(
                _pieces(reader, where, image_topic, pose_topic, float(options["rate_hz"]), np.deg2rad(offset))
            )
            kept = [part for piece in pieces for part in cut(piece, options["filter"])]  # type: ignore[arg-type]
            num, taken = counts[image_topic], sum(len(piece.t) for piece in kept)
            logger.info("%s: %d of %d images taken, in %d pieces", bag.name, taken, num, len(kept))
            longest = max((len(piece.t) for piece in kept), default=0)
            if longest < int(options["min_frames"]):
                raise DataError(
                    where, "no piece is long enough", got=f"{len(kept)} pieces, the longest of {longest} frames, from "
                    f"{num} images and {counts[pose_topic]} poses", expected=f"at least {options['min_frames']} frames",
                )  # fmt: skip
            for number, piece in enumerate(kept):
                name = bag.stem if len(kept) == 1 else f"{bag.stem}_{number}"
                frames = _frames(reader, where, image_topic, piece)
                yield Trajectory(name, piece.t - piece.t[0], piece.poses[:, :2], piece.poses[:, 2], frames)
    except AnyReaderError as error:
        raise DataError(where, "cannot be read", got=error) from error


def _topic(
    where: str,
    types: Mapping[str, str],
    counts: Mapping[str, int],
    asked: str,
    preset: tuple[str, ...],
    known: tuple[str, ...],
    option: str,
) -> str:
    """The topic asked for, the preset's, or the first one of a known type."""
    listed = ", ".join(f"{topic} ({kind}, {counts[topic]})" for topic, kind in sorted(types.items()))
    if asked or preset:
        found = [topic for topic in ((asked,) if asked else preset) if topic in types]
    else:
        found = sorted((topic for topic, kind in types.items() if kind in known), key=lambda t: known.index(types[t]))
    if not found:
        raise DataError(
            where, f"no topic for {option}", got=listed, expected=asked or " or ".join(preset) or " or ".join(known),
            hint=f"Choose one with --set {option}=TOPIC.",
        )  # fmt: skip
    if types[found[0]] not in known:
        raise DataError(where, f"{found[0]} has another type", got=types[found[0]], expected=" or ".join(known))
    return found[0]


def _pieces(
    reader: Any, where: str, image_topic: str, pose_topic: str, rate_hz: float, yaw_offset: float
) -> list[Piece]:
    """Both streams by the times at which the bag recorded them, so that they share a clock."""
    image_links = [link for link in reader.connections if link.topic == image_topic]
    pose_links = [link for link in reader.connections if link.topic == pose_topic]
    image_times = [stamp * 1e-9 for _, stamp, _ in reader.messages(image_links)]
    rows: list[tuple[float, float, float, float]] = []
    for link, stamp, raw in reader.messages(pose_links):
        pose = reader.deserialize(raw, link.msgtype).pose
        pose = getattr(pose, "pose", pose)
        turn = pose.orientation
        yaw = float(yaw_of_quaternion(turn.x, turn.y, turn.z, turn.w)) + yaw_offset
        if not rows or stamp * 1e-9 > rows[-1][0]:
            rows.append((stamp * 1e-9, pose.position.x, pose.position.y, yaw))
    table = np.array(rows).reshape(-1, 4)
    start = min(image_times[0] if image_times else 0.0, table[0, 0] if len(table) else 0.0)  # keeps float64 exact
    return resample(where, np.array(image_times) - start, table[:, 0] - start, table[:, 1:], rate_hz)


def _frames(reader: Any, where: str, topic: str, piece: Piece) -> Iterator[Frame]:
    """The images of a piece, in order."""
    wanted = iter(piece.frames.tolist())
    number = next(wanted, None)
    links = [link for link in reader.connections if link.topic == topic]
    for index, (link, _, raw) in enumerate(reader.messages(links)):
        if index == number:
            yield _image(where, reader.deserialize(raw, link.msgtype))
            number = next(wanted, None)
            if number is None:
                return


def _image(where: str, message: Any) -> Frame:
    """A compressed image as it is, a raw one as RGB."""
    if hasattr(message, "format"):
        return bytes(message.data)
    if message.encoding not in CHANNELS:
        raise DataError(where, "unknown image encoding", got=message.encoding, expected=", ".join(CHANNELS))
    depth = DEPTHS[message.encoding]
    rows: NDArray[np.uint8] = np.asarray(message.data, np.uint8).reshape(message.height, message.step)
    pixels = rows[:, : message.width * depth].reshape(message.height, message.width, depth)
    return np.ascontiguousarray(pixels[:, :, CHANNELS[message.encoding]])


RECIPE = RosBag()
