"""Poses out of bags: odometry, stamped poses, transforms (tf), or satellite fixes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from raev2.errors import DataError
from raev2_data_recipes.drives.bag_files import FIX, TFS, Topic
from raev2_tasks.nwm.pose import Array, yaw_of_quaternion

logger = logging.getLogger(__name__)
BASES = ("base_link", "base_footprint", "base", "body", "chassis", "base_stabilized")
EQUATOR_M, FLATTENING = 6_378_137.0, 1 / 298.257223563  # WGS 84
COURSE_M = 0.5  # the direction of motion is that over at least so far


def read_bag_poses(where: str, reader: Any, topic: Topic, tf_frames: str) -> tuple[Array, Array, Array]:
    """Times of receipt (T,), times in the headers (T,) and poses (T, 3), in order of receipt.

    tf_frames   'PARENT,CHILD' of a tf topic; empty: the most frequent one whose child is the base of a robot
    """
    links = [link for link in reader.connections if link.topic == topic.name]
    if topic.kind in TFS:
        rows = _transforms(where, reader, links, tf_frames)
    elif topic.kind == FIX:
        rows = _fixes(where, reader, links)
    else:
        rows = [
            (stamp * 1e-9, header_time(message.header), *_planar(pose.position, pose.orientation))
            for message, stamp in _messages(reader, links)
            for pose in [getattr(message.pose, "pose", message.pose)]
        ]
    if not rows:
        raise DataError(where, f"{topic.name} holds no usable pose")
    table = np.array(rows, np.float64)
    poses = _with_course(table[:, 2:]) if topic.kind == FIX else table[:, 2:]
    return table[:, 0], table[:, 1], poses


def header_time(header: Any) -> float:
    """Seconds of the stamp of a header."""
    return float(header.stamp.sec + header.stamp.nanosec * 1e-9)


def _messages(reader: Any, links: list[Any]) -> Iterator[tuple[Any, int]]:
    for link, stamp, raw in reader.messages(links):
        yield reader.deserialize(raw, link.msgtype), stamp


def _planar(position: Any, turn: Any) -> tuple[float, float, float]:
    return position.x, position.y, float(yaw_of_quaternion(turn.x, turn.y, turn.z, turn.w))


def _transforms(where: str, reader: Any, links: list[Any], tf_frames: str) -> list[tuple[float, ...]]:
    """Of one pair of frames."""
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for message, stamp in _messages(reader, links):
        for one in message.transforms:
            pair = (one.header.frame_id.lstrip("/"), one.child_frame_id.lstrip("/"))
            planar = _planar(one.transform.translation, one.transform.rotation)
            found.setdefault(pair, []).append((stamp * 1e-9, header_time(one.header), *planar))
    counts = Counter({pair: len(rows) for pair, rows in found.items()})
    if tf_frames:
        parent, _, child = tf_frames.partition(",")
        asked = (parent.strip(), child.strip())
        chosen = asked if asked in found else None
    else:
        chosen = next((pair for pair, _ in counts.most_common() if pair[1].split("/")[-1] in BASES), None)
    if chosen is None:
        listed = ", ".join(f"{parent},{child} ({count})" for (parent, child), count in counts.most_common(12))
        raise DataError(
            where, "no transform to the base of a robot", got=listed, expected=tf_frames or f"one to {BASES[0]}",
            hint="Choose one with --set tf_frames=PARENT,CHILD.",
        )  # fmt: skip
    return found[chosen]


def _fixes(where: str, reader: Any, links: list[Any]) -> list[tuple[float, ...]]:
    """East and north of the first fix in metres; fixes without a position are passed over, and counted in the log."""
    rows: list[tuple[float, ...]] = []
    lost = 0
    for message, stamp in _messages(reader, links):
        if message.status.status >= 0 and np.isfinite([message.latitude, message.longitude]).all():
            rows.append((stamp * 1e-9, header_time(message.header), message.longitude, message.latitude))
        else:
            lost += 1
    if lost:
        logger.warning("%s: %d of %d satellite fixes have no position and are left out", where, lost, lost + len(rows))
    if not rows:
        return []
    (_, _, lon0, lat0), squared = rows[0], FLATTENING * (2 - FLATTENING)
    curve = 1 - squared * np.sin(np.deg2rad(lat0)) ** 2
    per_lon = np.deg2rad(EQUATOR_M / np.sqrt(curve) * np.cos(np.deg2rad(lat0)))
    per_lat = np.deg2rad(EQUATOR_M * (1 - squared) / curve**1.5)
    return [(receipt, head, (lon - lon0) * per_lon, (lat - lat0) * per_lat) for receipt, head, lon, lat in rows]


def _with_course(position: Array) -> Array:
    """Poses (T, 3) of positions (T, 2): the heading is the direction of motion, steady while nothing moves."""
    anchors = [0]
    for index in range(1, len(position)):
        if np.hypot(*(position[index] - position[anchors[-1]])) >= COURSE_M:
            anchors.append(index)
    if len(anchors) < 2:
        return np.column_stack([position, np.zeros(len(position))])
    chords = np.diff(position[anchors], axis=0)
    middles = (np.array(anchors[1:]) + np.array(anchors[:-1])) / 2
    course = np.interp(np.arange(len(position)), middles, np.unwrap(np.arctan2(chords[:, 1], chords[:, 0])))
    return np.column_stack([position, course])
