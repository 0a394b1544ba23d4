"""Bags as robots leave them: loose and split files, clocks that differ, many topics, every encoding of images."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raev2.errors import DataError
from raev2.files.images import read_rgb
from raev2_data_recipes.drives.bag_files import IMAGE_TYPES, POSE_TYPES, find_bags
from raev2_data_recipes.drives.bag_images import BAYER, demosaic, frame_of
from raev2_data_recipes.drives.rosbag import NUM_PEEKED, RECIPE
from raev2_tasks.nwm.data.trajectories import StoredTrajectory, read_trajectories
from raev2_tasks.nwm.pose import steps

rosbags = pytest.importorskip("rosbags")
from rosbags.rosbag1 import Writer as Writer1  # noqa: E402
from rosbags.rosbag2 import StoragePlugin, Writer  # noqa: E402
from rosbags.typesys import Stores, get_typestore  # noqa: E402

EPOCH = 1_700_000_000.0
SPEED, TURN = 1.0, 0.2  # of the robot: an arc to the left


def pose_at(t: float) -> tuple[float, float, float]:
    """Where the robot is after t seconds."""
    return SPEED / TURN * np.sin(TURN * t), SPEED / TURN * (1 - np.cos(TURN * t)), TURN * t


def picture(number: int) -> np.ndarray:
    """(24, 32, 3) of a grey that tells the number."""
    return np.full((24, 32, 3), 40 + number, np.uint8)


class Messages:
    """Messages of a typestore, with the stamps of their headers."""

    def __init__(self, ros1: bool = False) -> None:
        self.store, self.ros1 = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_HUMBLE), ros1
        self.kinds = self.store.types

    def header(self, t: float, frame_id: str = "") -> Any:
        ns = round(t * 1e9)
        stamp = self.kinds["builtin_interfaces/msg/Time"](sec=ns // 10**9, nanosec=ns % 10**9)
        extra = {"seq": 0} if self.ros1 else {}
        return self.kinds["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id, **extra)

    def image(self, t: float, number: int) -> Any:
        buffer = io.BytesIO()
        Image.fromarray(picture(number)).save(buffer, "JPEG", quality=95)
        data = np.frombuffer(buffer.getvalue(), np.uint8)
        return self.kinds["sensor_msgs/msg/CompressedImage"](header=self.header(t), format="jpeg", data=data)

    def turn(self, yaw: float) -> Any:
        return self.kinds["geometry_msgs/msg/Quaternion"](
            x=0.0, y=0.0, z=float(np.sin(yaw / 2)), w=float(np.cos(yaw / 2))
        )

    def pose(self, t: float) -> Any:
        x, y, yaw = pose_at(t)
        position = self.kinds["geometry_msgs/msg/Point"](x=float(x), y=float(y), z=0.0)
        return self.kinds["geometry_msgs/msg/Pose"](position=position, orientation=self.turn(yaw))

    def odometry(self, t: float, stamp: float) -> Any:
        kinds, zero = self.kinds, np.zeros(36)
        vector = kinds["geometry_msgs/msg/Vector3"](x=0.0, y=0.0, z=0.0)
        twist = kinds["geometry_msgs/msg/Twist"](linear=vector, angular=vector)
        return kinds["nav_msgs/msg/Odometry"](
            header=self.header(stamp), child_frame_id="",
            pose=kinds["geometry_msgs/msg/PoseWithCovariance"](pose=self.pose(t), covariance=zero),
            twist=kinds["geometry_msgs/msg/TwistWithCovariance"](twist=twist, covariance=zero),
        )  # fmt: skip

    def goal(self, t: float) -> Any:
        return self.kinds["geometry_msgs/msg/PoseStamped"](header=self.header(EPOCH + t), pose=self.pose(9.0))

    def transform(self, t: float, parent: str, child: str, moving: bool) -> Any:
        x, y, yaw = pose_at(t) if moving else (0.2, 0.0, 0.0)
        kinds = self.kinds
        return kinds["geometry_msgs/msg/TransformStamped"](
            header=self.header(EPOCH + t, parent), child_frame_id=child,
            transform=kinds["geometry_msgs/msg/Transform"](
                translation=kinds["geometry_msgs/msg/Vector3"](x=float(x), y=float(y), z=0.0), rotation=self.turn(yaw)
            ),
        )  # fmt: skip

    def fix(self, t: float) -> Any:
        """By a spherical earth of the local radii: an oracle of its own for short ways."""
        x, y, _ = pose_at(t)
        status = self.kinds["sensor_msgs/msg/NavSatStatus"](status=0, service=1)
        east_m, north_m = 111_412.84 * np.cos(np.deg2rad(48)) - 93.5 * np.cos(3 * np.deg2rad(48)), 111_200.0
        return self.kinds["sensor_msgs/msg/NavSatFix"](
            header=self.header(EPOCH + t), status=status, latitude=48 + y / north_m, longitude=11 + x / east_m,
            altitude=0.0, position_covariance=np.zeros(9), position_covariance_type=0,
        )  # fmt: skip


Event = tuple[float, str, Any]  # time of receipt, topic, message


def drive(
    m: Messages, seconds: float = 6.0, start: float = 0.0, late: float = 0.0, camera_clock: float | None = None
) -> list[Event]:
    """Images 10 times a second, odometry 20 times. Images are received `late`; their stamps may be of another clock."""
    events: list[Event] = []
    for number in range(round(seconds * 10)):
        t = start + number / 10
        stamp = EPOCH + t if camera_clock is None else camera_clock + t
        events.append((EPOCH + t + late, "/camera", m.image(stamp, round(t * 10) % 150)))
    for number in range(round(seconds * 20) + 20):
        t = start + number / 20
        events.append((EPOCH + t, "/odom", m.odometry(t, EPOCH + t)))
    return events


def write_ros2(folder: Path, events: list[Event], plugin: StoragePlugin = StoragePlugin.MCAP) -> Path:
    store = get_typestore(Stores.ROS2_HUMBLE)
    with Writer(folder, version=9, storage_plugin=plugin) as writer:
        links: dict[str, Any] = {}
        for t, topic, message in sorted(events, key=lambda event: event[0]):
            kind = message.__msgtype__
            if topic not in links:
                links[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(links[topic], round(t * 1e9), store.serialize_cdr(message, kind))
    return folder


def write_ros1(file: Path, events: list[Event]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    store = get_typestore(Stores.ROS1_NOETIC)
    with Writer1(file) as writer:
        links: dict[str, Any] = {}
        for t, topic, message in sorted(events, key=lambda event: event[0]):
            kind = message.__msgtype__
            if topic not in links:
                links[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(links[topic], round(t * 1e9), store.serialize_ros1(message, kind))


def build(src: Path, out: Path, **options: str) -> dict[str, StoredTrajectory]:
    RECIPE.build(out, {"src": str(src), "split": "nwm-legacy", "val_fraction": "0.5"} | options)
    return {one.id: one for split in ("train", "val") for one in read_trajectories(out, split)}


def numbers(one: StoredTrajectory) -> np.ndarray:
    """What the pictures show."""
    files = [one.frame_file(index) for index in range(len(one))]
    return np.array([np.asarray(Image.open(file)).mean() - 40 for file in files])


def lag(one: StoredTrajectory) -> float:
    """Seconds by which the pose of a frame is later than its picture (yaw tells the time)."""
    return float(np.median(one.poses[:, 2] / TURN - numbers(one) / 10))


@pytest.fixture(scope="module")
def ros2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ros2(tmp_path_factory.mktemp("bag") / "run", drive(Messages()))


def test_loose_files_and_wrong_metadata_give_what_the_intact_bag_gives(ros2, tmp_path):
    src = tmp_path / "src"
    for name in ("intact", "loose", "missing", "stale", "fewer", "garbage"):
        shutil.copytree(ros2, src / name)
    shutil.move(src / "loose" / "run.mcap", src / "loose.mcap")
    shutil.rmtree(src / "loose")
    (src / "missing" / "metadata.yaml").unlink()
    (src / "missing" / "run.mcap").rename(src / "missing" / "unnamed.mcap")
    metadata = (ros2 / "metadata.yaml").read_text()
    (src / "stale" / "metadata.yaml").write_text(metadata.replace("run.mcap", "gone.mcap"))
    (src / "fewer" / "metadata.yaml").write_text(metadata.replace("message_count: 60", "message_count: 50"))
    (src / "garbage" / "metadata.yaml").write_text("}{")
    write_ros2(src / "sqlite", drive(Messages()), StoragePlugin.SQLITE3)
    shutil.move(src / "sqlite" / "sqlite.db3", src / "database.db3")
    shutil.rmtree(src / "sqlite")
    found = build(src, tmp_path / "out")
    assert set(found) == {"intact", "loose", "unnamed", "stale", "fewer", "garbage", "database"}
    for name, one in found.items():
        assert len(one) == 24 and abs(lag(one)) < 0.02, name
        np.testing.assert_allclose(one.poses, found["intact"].poses)
    notes = {bag.name: bag.note for bag in find_bags(src)}
    assert notes["intact"] == "" and notes["stale"] == "metadata.yaml does not fit the files, it is not used"
    assert notes["fewer"] == notes["garbage"] == notes["stale"]


def test_parts_of_a_ros1_recording_are_one_drive_and_separate_drives_are_not(tmp_path):
    src, m = tmp_path / "src", Messages(ros1=True)
    every = [event for event in drive(m, 9.0) if event[0] < EPOCH + 9]
    for part in range(3):
        write_ros1(src / f"run_{part}.bag", [e for e in every if part * 3 <= e[0] - EPOCH < part * 3 + 3])
    for part in range(2):  # a minute apart: two drives
        write_ros1(src / f"lap_{part}.bag", drive(m, 3.0, start=60.0 * part))
    assert {bag.name: len(bag.paths) for bag in find_bags(src)} == {"run": 3, "lap_0": 1, "lap_1": 1}
    found = build(src, tmp_path / "out")
    assert set(found) == {"run", "lap_0", "lap_1"} and len(found["run"]) == 36 and abs(lag(found["run"])) < 0.02


def test_equal_names_in_different_folders_are_different_drives(tmp_path):
    src, m = tmp_path / "src", Messages(ros1=True)
    for folder in ("monday", "tuesday"):
        write_ros1(src / folder / "run.bag", drive(m, 3.0))
    assert set(build(src, tmp_path / "out")) == {"monday_run", "tuesday_run"}
    assert {one.recording for one in build(src, tmp_path / "again").values()} == {"monday_run", "tuesday_run"}


def test_the_clock_of_the_headers_is_used_where_they_share_one_and_the_difference_is_printed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    src = tmp_path / "src"
    write_ros2(src / "late", drive(Messages(), late=0.3))
    write_ros2(src / "other", drive(Messages(), late=0.0, camera_clock=1000.0))
    found = build(src, tmp_path / "auto")
    assert abs(lag(found["late"])) < 0.02 and abs(lag(found["other"])) < 0.02
    text = caplog.text
    assert "late: received after the stamp in the header by 0.300 s (images), 0.000 s (poses)" in text
    assert "late: the clock of the headers is used" in text
    assert "other: the clock of receipt: the headers do not share one is used" in text
    assert lag(build(src, tmp_path / "receipt", clock="receipt")["late"]) == pytest.approx(0.3, abs=0.02)


def test_topics_are_listed_and_chosen_by_role_and_count(tmp_path):
    m, src = Messages(), tmp_path / "src"
    events = drive(m)
    for number in range(180):  # more of them, but no view ahead
        events.append((EPOCH + number / 30, "/depth/compressed", m.image(EPOCH + number / 30, 3)))
        events.append((EPOCH + number / 30, "/camera_right", m.image(EPOCH + number / 30, 3)))
    events += [(EPOCH + number, "/goal_pose", m.goal(number)) for number in range(6)]
    for name in ("a", "b"):
        write_ros2(src / name, events)
    write_ros2(src / "c", [event for event in events if event[1] != "/odom"])
    (src / "d.bag").write_bytes(b"no bag")
    (src / "notes.txt").write_text("sunny")
    lines = RECIPE.plan({"src": str(src)})
    assert lines[0] == f"Read 4 bags from {src}, topics: auto."
    kinds = {"image": IMAGE_TYPES[0], "goal": POSE_TYPES[2], "odom": POSE_TYPES[0]}
    assert lines[1] == (
        f"bag a: /camera ({kinds['image']}, 60, 8.63 Hz), /camera_right ({kinds['image']}, 180, 25.9 Hz), "
        f"/depth/compressed ({kinds['image']}, 180, 25.9 Hz), /goal_pose ({kinds['goal']}, 6, 0.863 Hz), "
        f"/odom ({kinds['odom']}, 140, 20.1 Hz)"
    )
    assert lines[2] == "bag a: images from /camera, poses from /odom."
    assert "bag c: images from /camera, poses from /goal_pose." in lines
    assert any(line.startswith("Cannot be used: bag d.bag: cannot be read") for line in lines)
    assert "1 more bags have the topics of a." in lines and lines[-1] == "Ignored: 1 files (.txt: 1)."
    found = build(src, tmp_path / "out")
    assert set(found) == {"a", "b"} and abs(lag(found["a"])) < 0.02
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reason.split(":")[0] for reason in reasons] == ["bag c", "bag d.bag"]


def test_poses_from_transforms_and_from_satellite_fixes(tmp_path):
    m, src = Messages(), tmp_path / "src"
    kind = m.kinds["tf2_msgs/msg/TFMessage"]
    images = [event for event in drive(m) if event[1] == "/camera"]
    ticks = [number / 20 for number in range(140)]
    transforms = [
        (
            EPOCH + t,
            "/tf",
            kind(transforms=[m.transform(t, "odom", "base_link", True), m.transform(t, "base_link", "arm", False)]),
        )
        for t in ticks
    ]
    fixes = [(EPOCH + t, "/fix", m.fix(t)) for t in ticks]
    for name in ("a", "b"):
        write_ros2(src / "tf" / name, images + transforms)
        write_ros2(src / "fix" / name, images + fixes)
    one = build(src / "tf", tmp_path / "tf")["a"]
    assert abs(lag(one)) < 0.02
    one = build(src / "fix", tmp_path / "fix")["a"]
    truth = np.array([pose_at(number / 10) for number in numbers(one)])
    np.testing.assert_allclose(one.poses[:, :2] - one.poses[0, :2], truth[:, :2] - truth[0, :2], atol=0.03)
    np.testing.assert_allclose(one.poses[3:-3, 2], truth[3:-3, 2], atol=0.03)  # the course is the heading
    with pytest.raises(DataError, match=r"no transform to the base of a robot; got .*odom,base_link \(140\)"):
        build(src / "tf", tmp_path / "none", tf_frames="map,base_link")
    assert (steps(build(src / "tf", tmp_path / "arm", tf_frames="base_link,arm")["a"].poses) == 0).all()


def test_images_are_read_once(ros2, tmp_path, monkeypatch):
    from rosbags.highlevel import AnyReader

    src, read = tmp_path / "src", []
    for name in ("a", "b"):
        shutil.copytree(ros2, src / name)
    messages = AnyReader.messages

    def counted(self: Any, connections: Any = (), **rest: Any) -> Any:
        for link, stamp, raw in messages(self, connections, **rest):
            read.append(link.topic)
            yield link, stamp, raw

    monkeypatch.setattr(AnyReader, "messages", counted)
    assert len(build(src, tmp_path / "out", min_frames="2")) == 2
    assert read.count("/camera") <= 2 * (60 + NUM_PEEKED) and read.count("/odom") == 2 * 140


# What is wrong with a bag.


def test_bad_bags_are_counted_each_with_its_reason(ros2, tmp_path):
    m, src = Messages(), tmp_path / "src"
    (src / "cut").mkdir(parents=True)
    for name in ("a", "b"):
        shutil.copytree(ros2, src / name)
    whole = next(ros2.glob("*.mcap")).read_bytes()
    (src / "cut" / "cut.mcap").write_bytes(whole[: len(whole) // 2])
    events = drive(m)
    odometry, images = ([event for event in events if event[1] == topic] for topic in ("/odom", "/camera"))

    def changed(number: int, x: float | None = None, data: bytes | None = None, lone: bool = False) -> list[Event]:
        """The drive with another position, or picture, in one message."""
        found = drive(m)
        message = [event for event in found if event[1] == ("/odom" if data is None else "/camera")][number][2]
        if x is not None:
            message.pose.pose.position.x = x
        if data is not None:
            message.data = np.frombuffer(data, np.uint8)
        return found

    later = [(t, topic, m.odometry(t - EPOCH, t + 500)) for t, topic, _ in odometry]
    far = [(t + 500, topic, message) for t, topic, message in later]
    bad = {
        "nopose": (images, "no topic for pose_topic"), "nocamera": (odometry, "no topic for image_topic"),
        "onepose": ([*images, odometry[0]], "no topic for pose_topic"),
        "apart": ([*images, *far], "frames and poses do not overlap in time"),
        "nan": (changed(30, x=float("nan")), "position is not finite"),
        "broken": (changed(7, data=b"no picture"), "frame .*: cannot be read as an image"),
        "short": ([event for event in events if event[0] < EPOCH + 0.6], "no piece is long enough"),
    }  # fmt: skip
    for name, (found, _) in bad.items():
        write_ros2(src / name, found)
    write_ros2(src / "empty", [])
    (src / "d.bag").write_bytes(b"")
    (src / ".hidden.bag").write_bytes(b"x")
    found = build(src, tmp_path / "out")
    assert set(found) == {"a", "b"}
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    reasons = {Path(one["path"]).name: one["reason"] for one in rejects}
    assert len(reasons) == len(rejects) and set(reasons) == {*bad, "empty", "d.bag", "cut.mcap"}
    for name, (_, reason) in bad.items():
        assert re.search(reason, reasons[name]), (name, reasons[name])
    assert "no topic for image_topic" in reasons["empty"]
    assert reasons["d.bag"].startswith("bag d.bag: cannot be read") and "cannot be read" in reasons["cut.mcap"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rejected"] == 10 and manifest["ignored"] == {"hidden file": 1}


@pytest.mark.parametrize("kind", ["mcap", "db3", "bag"])
def test_a_damaged_bag_is_left_out_and_never_ends_the_build(kind, tmp_path):
    src, rng = tmp_path / "src", np.random.default_rng(0)
    events = drive(Messages(ros1=kind == "bag"), seconds=1.5)
    if kind == "bag":
        write_ros1(tmp_path / "whole" / "a.bag", events)
    else:
        plugin = StoragePlugin.MCAP if kind == "mcap" else StoragePlugin.SQLITE3
        write_ros2(tmp_path / "whole", events, plugin)
    whole = next((tmp_path / "whole").glob(f"*.{kind}")).read_bytes()
    src.mkdir()
    (src / f"good.{kind}").write_bytes(whole)
    for number in range(12):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(len(whole), size=40)] = rng.integers(256, size=40)
        cut = int(rng.integers(len(whole)))
        (src / f"b{number:x}.{kind}").write_bytes(damaged.tobytes() if number % 2 else whole[:cut])
    options = {"src": str(src), "split": "by-time", "val_fraction": "0.5", "split_gap_s": "0", "min_frames": "2"}
    manifest = RECIPE.build(tmp_path / "out", options)
    used = {one.recording for split in ("train", "val") for one in read_trajectories(tmp_path / "out", split)}
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert "good" in used and manifest["rejected"] == len(rejects)
    assert used | {Path(one["path"]).stem for one in rejects} == {file.stem for file in src.iterdir()}
    assert len(RECIPE.plan(options)) >= 5


def test_a_clock_that_runs_back_is_not_used(tmp_path, caplog):
    m, src = Messages(), tmp_path / "src"

    def jumping(topics: set[str]) -> list[Event]:
        """The stamps of the second half are those of the first: the clock was set back by 3 s."""
        found = drive(m)
        for t, topic, message in found:
            if topic in topics and t - EPOCH >= 3:
                message.header = m.header(t - 3)
        return found

    write_ros2(src / "both", jumping({"/camera", "/odom"}))
    write_ros2(src / "whole", drive(m))
    with caplog.at_level(logging.INFO):
        found = build(src, tmp_path / "out")
    assert "both: the clock of receipt" in caplog.text
    np.testing.assert_allclose(steps(found["both"].poses), steps(found["whole"].poses), atol=1e-6)
    assert np.array_equal(numbers(found["both"]), numbers(found["whole"]))
    write_ros2(src / "camera", jumping({"/camera"}))
    for options, left_out in (({}, ["camera"]), ({"clock": "header"}, ["both", "camera"]), ({"clock": "receipt"}, [])):
        out = tmp_path / f"out-{len(left_out)}"
        RECIPE.build(out, {"src": str(src), "split": "by-time", "val_fraction": "0.3", "split_gap_s": "0", **options})
        file = out / "rejects.jsonl"
        rejects = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        assert [Path(one["path"]).name for one in rejects] == left_out
        for one in rejects:
            assert re.search("clock of the (poses|images) runs back; got by .* s; .*Set clock=receipt.", one["reason"])


def test_images_with_one_time_are_used_once_and_counted(tmp_path, caplog):
    m = Messages()
    write_ros2(tmp_path / "src" / "a", [*drive(m), *[event for event in drive(m) if event[1] == "/camera"][:3]])
    with caplog.at_level(logging.WARNING):
        found = build(tmp_path / "src", tmp_path / "out", rate_hz="10", split="by-time", split_gap_s="0")
    assert "a: 3 images are left out that have the time of another" in caplog.text
    assert np.array_equal(numbers(found["a_train"]).round(), np.arange(len(found["a_train"])))


# Images.


def colours(height: int = 24, width: int = 32) -> np.ndarray:
    """(H, W, 3) with smooth and different colours."""
    y, x = np.mgrid[:height, :width]
    return np.stack([60 + 4 * x, 200 - 5 * y, 90 + 2 * x + y], axis=-1).astype(np.uint8)


def message(pixels: np.ndarray, encoding: str, padding: int = 0, big: bool = False) -> Any:
    """A sensor_msgs Image of (H, W, ...) values, its rows padded."""
    raw = np.ascontiguousarray(pixels).view(np.uint8).reshape(len(pixels), -1)
    rows = np.pad(raw, ((0, 0), (0, padding)), constant_values=77)
    return SimpleNamespace(
        encoding=encoding, height=pixels.shape[0], width=pixels.shape[1], step=rows.shape[1], is_bigendian=int(big),
        data=rows.ravel(),
    )  # fmt: skip


def mosaic(pixels: np.ndarray, pattern: str) -> np.ndarray:
    """What a sensor with this pattern measures, by the letters of its name."""
    found = np.zeros(pixels.shape[:2], pixels.dtype)
    for index, letter in enumerate(pattern):
        found[index // 2 :: 2, index % 2 :: 2] = pixels[index // 2 :: 2, index % 2 :: 2, "rgb".index(letter)]
    return found


RGB = colours()
GREY = np.repeat(RGB[..., :1], 3, axis=2)
ENCODED = {
    "rgb8": (RGB, RGB), "bgr8": (RGB[..., ::-1], RGB), "8UC3": (RGB[..., ::-1], RGB), "mono8": (GREY[..., 0], GREY),
    "8UC1": (GREY[..., 0], GREY), "bgra8": (np.dstack([RGB[..., ::-1], GREY[..., 0]]), RGB),
    "8UC4": (np.dstack([RGB[..., ::-1], GREY[..., 0]]), RGB), "rgba8": (np.dstack([RGB, GREY[..., 0]]), RGB),
    "mono16": (GREY[..., 0].astype("<u2") * 257, GREY), "16UC1": (GREY[..., 0].astype("<u2") * 257, GREY),
    "rgb16": (RGB.astype("<u2") * 257, RGB), "bgr16": (RGB[..., ::-1].astype("<u2") * 257, RGB),
}  # fmt: skip


@pytest.mark.parametrize("encoding", list(ENCODED))
def test_every_encoding_of_a_camera_is_read(encoding):
    values, expected = ENCODED[encoding]
    np.testing.assert_array_equal(frame_of("bag", message(values, encoding, padding=8)), expected)
    if values.dtype.itemsize == 2:
        swapped = message(values.byteswap(), encoding, big=True)
        np.testing.assert_array_equal(frame_of("bag", swapped), expected)


@pytest.mark.parametrize("encoding", ["yuv422", "uyvy", "yuv422_yuy2", "yuyv"])
def test_yuv_is_converted_as_ffmpeg_does(encoding):
    av = pytest.importorskip("av")
    name = "uyvy422" if encoding in ("yuv422", "uyvy") else "yuyv422"
    picture = av.VideoFrame.from_ndarray(RGB, format="rgb24").reformat(format=name)
    packed = np.frombuffer(bytes(picture.planes[0]), np.uint8).reshape(24, -1)[:, :64].reshape(24, 32, 2)
    expected = picture.reformat(format="rgb24").to_ndarray().astype(int)
    got = frame_of("bag", message(packed, encoding)).astype(int)
    assert np.abs(got - expected).max() <= 4 and np.abs(got - RGB).mean() < 4


@pytest.mark.parametrize("pattern", list(BAYER))
@pytest.mark.parametrize("bits", [8, 16])
def test_bayer_mosaics_become_colours(pattern, bits):
    values = mosaic(RGB, pattern)
    values = values if bits == 8 else values.astype("<u2") * 257
    got = frame_of("bag", message(values, f"bayer_{pattern}{bits}"))
    assert np.abs(got.astype(int) - RGB)[1:-1, 1:-1].max() <= 1  # linear colours are met exactly inside
    flat = np.full((6, 8, 3), (200, 100, 50), np.uint8)
    np.testing.assert_array_equal(demosaic(mosaic(flat, pattern), pattern), flat)


def test_compressed_images_stay_as_they_are_but_for_mosaics():
    def encoded(values: np.ndarray, kind: str) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind, **({"quality": 100} if kind == "JPEG" else {}))
        return np.frombuffer(buffer.getvalue(), np.uint8)

    plain = SimpleNamespace(format="bgr8; jpeg compressed bgr8", data=encoded(RGB, "JPEG"))
    assert frame_of("bag", plain) == plain.data.tobytes()
    coloured = SimpleNamespace(format="bayer_rggb8; jpeg compressed bgr8", data=encoded(RGB, "JPEG"))
    assert frame_of("bag", coloured) == coloured.data.tobytes()  # the driver has made colours of it
    flat = np.full((24, 32, 3), (200, 100, 50), np.uint8)
    raw = SimpleNamespace(format="bayer_gbrg8; jpeg compressed ", data=encoded(mosaic(flat, "gbrg"), "JPEG"))
    assert np.abs(frame_of("bag", raw).astype(int) - flat).max() <= 6
    deep = SimpleNamespace(format="mono16; png compressed ", data=encoded(GREY[..., 0].astype(np.uint16) * 257, "PNG"))
    kept = frame_of("bag", deep)
    assert isinstance(kept, bytes) and (np.asarray(read_rgb(kept, "bag")) == GREY).all()  # as every reader sees it


def test_what_is_no_picture_of_a_camera_is_refused():
    with pytest.raises(DataError, match="bag x: unknown image encoding; got 32FC1; expected rgb8, bgr8, .* bayer_"):
        frame_of("bag x", message(np.zeros((4, 4), np.float32), "32FC1"))
    with pytest.raises(DataError, match="unknown image encoding; got bayer_xyzw8; expected bayer_ with rggb, bggr"):
        frame_of("bag x", message(np.zeros((4, 4), np.uint8), "bayer_xyzw8"))
    broken = SimpleNamespace(format="bayer_rggb8; jpeg compressed ", data=np.zeros(9, np.uint8))
    with pytest.raises(DataError, match="bag x: cannot be read as an image; got UnidentifiedImageError"):
        frame_of("bag x", broken)
