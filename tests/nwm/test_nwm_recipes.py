"""Recipes of trajectories, each on data that is made here; the simulator where it is installed."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trajectory_folders import frame

from raev2.errors import DataError, SpecError
from raev2.files.manifest import read_manifest
from raev2.task import get_data_recipe
from raev2_data_recipes.base import DatasetRecipe
from raev2_data_recipes.drives import gnm, recon, rosbag, video_poses, vizdoom_maze
from raev2_data_recipes.drives.pose_files import read_raw_poses
from raev2_data_recipes.drives.readings import Reading, apply_reading
from raev2_data_recipes.drives.sampling import Piece, cut, resample, split_long
from raev2_tasks.nwm.data.trajectories import StoredTrajectory, read_trajectories
from raev2_tasks.nwm.pose import relative, steps
from raev2_tasks.nwm.worlds.maze import UNITS_PER_M, WALL, make_maze, textures, write_pwad

RECIPES = [gnm.RECIPE, recon.RECIPE, rosbag.RECIPE, video_poses.VIDEO, video_poses.FRAMES, vizdoom_maze.RECIPE]
BEND = np.column_stack([np.cumsum(np.cos(np.arange(40) / 10)), np.cumsum(np.sin(np.arange(40) / 10))])
YAW = np.arange(40) / 10  # BEND looks where it goes


def jpeg(number: int, size: tuple[int, int] = (24, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame(number, size)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def every(dir: Path) -> dict[str, StoredTrajectory]:
    return {one.id: one for split in ("train", "val") for one in read_trajectories(dir, split)}


def rejects(dir: Path) -> list[str]:
    file = dir / "rejects.jsonl"
    return [json.loads(line)["reason"] for line in file.read_text().splitlines()] if file.is_file() else []


def shown(one: StoredTrajectory) -> list[int]:
    """Number that each frame shows."""
    files = [one.frame_file(index) for index in range(len(one))]
    return [round(float(np.asarray(Image.open(file)).mean())) - 40 for file in files]


def build(recipe: DatasetRecipe, out: Path, **options: object) -> dict[str, StoredTrajectory]:
    recipe.build(out, {name: str(value) for name, value in options.items()})
    recipe.verify(out)
    return every(out)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_installed_and_describes_itself(recipe):
    assert get_data_recipe(recipe.name) is recipe
    assert all([recipe.summary, recipe.licence, recipe.attribution, recipe.size])
    assert all(option.meaning for option in recipe.options.values())


def test_options_are_checked_before_anything_is_read(tmp_path):
    for options, message in (
        ({"rate_hz": "fast"}, "rate_hz: not usable; got fast; expected a number >= 0.01"),
        ({"fit": "stretch"}, "fit: not usable; got stretch; expected one of squeeze, crop, letterbox"),
        ({"size": "12.5"}, "size: not usable; got 12.5; expected a whole number >= 8"),
        ({"parent": "("}, "parent: not a regular expression"),
        ({"parent": "abc"}, "parent: has no group"),
    ):
        with pytest.raises(SpecError, match=message):
            gnm.RECIPE.build(tmp_path / "out", {"src": str(tmp_path)} | options)
    with pytest.raises(DataError, match="src: no such folder; got nowhere. Give it with --set src=PATH"):
        gnm.RECIPE.build(tmp_path / "out", {"src": "nowhere"})


def test_training_mazes_end_where_validation_mazes_begin(tmp_path):
    message = "seed: not usable; got 999999; expected a whole number from 0 to 999998"
    with pytest.raises(SpecError, match=message):
        vizdoom_maze.RECIPE.build(tmp_path / "out", {"seed": "999999", "num_train": "8", "drives_per_maze": "4"})


# GNM folders.


def write_gnm(folder: Path, length: int = 10, **changes: object) -> None:
    folder.mkdir(parents=True)
    for number in range(length):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    values = {"position": BEND[:length], "yaw": YAW[:length]} | changes
    (folder / "traj_data.pkl").write_bytes(pickle.dumps({name: v for name, v in values.items() if v is not None}))


def test_gnm_folders(tmp_path):
    src = tmp_path / "src"
    for name in ("a_r0", "a_r1", "b_0", "c_7"):
        write_gnm(src / name, 12)
    write_gnm(src / "d_0", 12, yaw=YAW[:12, None])  # NWM squeezes a trailing axis, and so do we
    assert "5 folders of 4 recordings" in gnm.RECIPE.plan({"src": str(src)})[0]
    found = build(gnm.RECIPE, tmp_path / "out", src=src, val_fraction=0.25)
    assert shown(found["a_r0"]) == list(range(12)) and found["a_r0"].recording == found["a_r1"].recording == "a"
    assert found["a_r0"].frame_file(3).read_bytes() == jpeg(3)  # as it is, not encoded again
    np.testing.assert_array_equal(found["d_0"].poses, np.column_stack([BEND[:12], YAW[:12]]))
    assert found["b_0"].t[-1] == 11 / 4 and rejects(tmp_path / "out") == []
    small = build(gnm.RECIPE, tmp_path / "small", src=src, size=16, format="png", yaw_offset_deg=90, heading="keep")
    assert np.asarray(Image.open(small["b_0"].frame_file(0))).shape == (16, 16, 3) and small["b_0"].suffix == ".png"
    np.testing.assert_allclose(small["b_0"].poses[:, 2], YAW[:12] + np.pi / 2)


def test_a_plan_tells_what_will_stop_the_build(tmp_path):
    for name in ("a_0", "b_0"):
        write_gnm(tmp_path / "src" / name, 40)
    options = {"src": str(tmp_path / "src")}

    def degrees(options: dict[str, str]) -> int:
        (line,) = [line for line in gnm.RECIPE.plan(options) if line.startswith("Heading: ")]
        return int(line.split()[1])

    assert degrees(options) < 5 and 85 < degrees(options | {"yaw_offset_deg": "90", "heading": "keep"}) < 95
    turned = options | {"yaw_offset_deg": "90"}
    (line,) = [line for line in gnm.RECIPE.plan(turned) if line.startswith("The build will stop: ")]
    with pytest.raises(DataError) as stopped:
        gnm.RECIPE.build(tmp_path / "out", turned)
    assert line == f"The build will stop: {stopped.value}" and "the heading contradicts the motion" in line


def test_gnm_splits_that_come_with_the_data(tmp_path):
    for name in ("a_0", "a_1", "a_2"):
        write_gnm(tmp_path / "src" / name)
    for split, names in (("train", "a_0\na_1\n"), ("test", "a_2\ngone\n")):
        (tmp_path / "splits" / split).mkdir(parents=True)
        (tmp_path / "splits" / split / "traj_names.txt").write_text(names)
    build(gnm.RECIPE, tmp_path / "out", src=tmp_path / "src", splits=tmp_path / "splits")
    assert [one.id for one in read_trajectories(tmp_path / "out", "val")] == ["a_2"]
    assert rejects(tmp_path / "out")[0].startswith("trajectory gone: its folder is missing")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["split_rule"] == "given"
    assert "1 of 1 recordings have trajectories in both splits (leakage)" in manifest["warnings"]


def test_bad_gnm_folders_are_listed(tmp_path):
    src = tmp_path / "src"
    for name in ("a_0", "b_0"):
        write_gnm(src / name)
    write_gnm(src / "gap_0", 11)
    (src / "gap_0" / "5.jpg").unlink()
    write_gnm(src / "lost_0", yaw=YAW[:9], position=BEND[:9])
    (src / "lost_0" / "4.jpg").unlink()
    for name in ("notes.txt", "a_0/cover.jpg", "b_0/0.png"):
        (src / name).write_bytes(b"x")
    write_gnm(src / "nopose_0")
    (src / "nopose_0" / "traj_data.pkl").unlink()
    write_gnm(src / "count_0", yaw=YAW[:9], position=BEND[:9])
    write_gnm(src / "noyaw_0", yaw=None)
    write_gnm(src / "code_0", yaw=print)
    found = build(gnm.RECIPE, tmp_path / "out", src=src)
    assert {name: shown(one) for name, one in found.items() if "gap" in name} == {
        "gap_0_0": [0, 1, 2, 3, 4], "gap_0_1": [6, 7, 8, 9, 10],
    }  # fmt: skip
    np.testing.assert_array_equal(found["gap_0_1"].poses[:, :2], BEND[6:11])
    manifest = read_manifest(tmp_path / "out")
    assert manifest["rejected"] == 5 and manifest["ignored"] == {".jpg": 1, ".png": 1, ".txt": 1}
    assert gnm.RECIPE.plan({"src": str(src)})[-1] == "Ignored: 3 files (.jpg: 1, .png: 1, .txt: 1)."
    assert sorted(rejects(tmp_path / "out")) == [
        f"data {src}/code_0/traj_data.pkl: not loaded, only plain values and arrays are; got UnpicklingError: it asks "
        "for builtins.print. If you trust the file, convert it yourself.",
        "trajectory count_0: different numbers of frames and poses; got 10 and 9; expected one pose a frame",
        "trajectory lost_0: a gap in the numbers of the frames; got 4.jpg is missing, 9 poses; expected 10 poses, one "
        "for each number",
        "trajectory nopose_0: traj_data.pkl is missing",
        "trajectory noyaw_0: traj_data.pkl has no yaw",
    ]


# RECON.


def test_recon(tmp_path):
    h5py = pytest.importorskip("h5py")
    src = tmp_path / "src"
    src.mkdir()
    for name, length in (("jackal_1_0_r00", 10), ("jackal_1_0_r01", 10), ("jackal_2_0_r00", 8), ("jackal_3_0_r00", 2)):
        with h5py.File(src / f"{name}.hdf5", "w") as file:
            pictures = [jpeg(number) for number in range(length)]
            file["images/rgb_left"] = np.array(pictures, dtype=f"S{max(map(len, pictures)) + 9}")
            file["jackal/position"] = np.column_stack([BEND[:length], np.full(length, 9.0)])
            file["jackal/yaw"] = YAW[:length]
            file["commands/linear_velocity"] = np.ones((length, 1))
            file["commands/angular_velocity"] = np.full(length, 0.4)
    (src / "broken.hdf5").write_bytes(b"nothing")
    with h5py.File(src / "empty.hdf5", "w") as file:
        file["jackal/yaw"] = YAW
    found = build(recon.RECIPE, tmp_path / "out", src=src)
    assert set(found) == {"jackal_1_0_r00", "jackal_1_0_r01", "jackal_2_0_r00"}
    one = found["jackal_1_0_r01"]
    assert one.recording == "jackal_1_0" and shown(one) == list(range(10))
    np.testing.assert_array_equal(one.poses, np.column_stack([BEND[:10], YAW[:10]]))
    np.testing.assert_allclose(one.command, [[1, 0.4]] * 10)
    text = "\n".join(rejects(tmp_path / "out"))
    assert "trajectory broken: cannot be opened as HDF5" in text
    assert "trajectory empty: images/rgb_left is missing from the file" in text
    assert "trajectory jackal_3_0_r00: too short; got 2 frames" in text
    (src / "readme.md").write_text("x")
    assert recon.RECIPE.plan({"src": str(src)})[-1] == "Ignored: 1 files (.md: 1)."
    assert recon.RECIPE.build(tmp_path / "again", {"src": str(src)})["ignored"] == {".md": 1}


# Time grids.


def test_frames_are_taken_on_an_exact_grid_with_interpolated_poses():
    frame_t = np.arange(0, 10, 0.1) + 0.01 * np.sin(np.arange(100))
    pose_t = np.arange(-1, 11, 0.05)
    poses = np.column_stack([pose_t, 2 * pose_t, 0.1 * pose_t])
    (piece,) = resample("x", frame_t, pose_t, poses, 4.0)
    assert len(piece.t) == 40 and np.abs(piece.t - piece.t[0] - np.arange(40) / 4).max() < 0.08
    np.testing.assert_allclose(piece.poses, np.column_stack([piece.t, 2 * piece.t, 0.1 * piece.t]), atol=1e-9)
    np.testing.assert_allclose(frame_t[piece.frames], piece.t)


def test_pieces_end_at_gaps_of_either_stream():
    t = np.arange(0, 10, 0.25)
    frames = t[(t < 4) | (t > 6)]
    pieces = resample("x", frames, t, np.zeros((len(t), 3)), 4.0)
    assert [len(piece.t) for piece in pieces] == [16, 15] and pieces[1].t[0] > 6
    pieces = resample("x", t, frames, np.zeros((len(frames), 3)), 4.0)
    assert all(not ((piece.t > 3.8) & (piece.t < 6.2)).any() for piece in pieces) and len(pieces) == 2


def test_streams_that_do_not_meet_are_refused():
    with pytest.raises(
        DataError, match="do not overlap in time; got frames 0 to 1 s, poses 100 to 101 s. Set time_off"
    ):
        resample("x", [0.0, 1.0], [100.0, 101.0], np.zeros((2, 3)), 4.0)
    with pytest.raises(DataError, match="the times of the poses do not increase"):
        resample("x", [0.0, 1.0], [0.0, 0.0], np.zeros((2, 3)), 4.0)
    with pytest.raises(DataError, match="no frames or no poses; got 0 frames and 1 poses"):
        resample("x", [], [0.0], np.zeros((1, 3)), 4.0)


def test_stops_and_reverses_are_kept_unless_asked():
    x = np.array([0, 1, 2, 2, 2, 3, 4, 3, 2, 3.0])
    piece = Piece(np.arange(10), np.arange(10.0), np.column_stack([x, np.zeros((10, 2))]))
    assert cut(piece, "keep") == [piece]
    assert [part.frames.tolist() for part in cut(piece, "cut-reverse")] == [[0, 1, 2, 3, 4, 5, 6], [8, 9]]
    assert [part.frames.tolist() for part in cut(piece, "cut-stops")] == [[0, 1, 2], [4, 5, 6], [8, 9]]
    assert [len(part.t) for part in split_long(piece, 4)] == [4, 4, 2]


# Bags.


def write_bag(path: Path, seconds: float, raw: bool = False, yaw_offset: float = 0.0, gap: bool = False) -> None:
    """ROS 1 bag: images 10 times a second, odometry 20 times, a drive along a circle."""
    from rosbags.rosbag1 import Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC)
    kinds = store.types
    stamp = kinds["builtin_interfaces/msg/Time"]
    header, point = kinds["std_msgs/msg/Header"], kinds["geometry_msgs/msg/Point"]
    image_kind = "sensor_msgs/msg/Image" if raw else "sensor_msgs/msg/CompressedImage"
    with Writer(path) as writer:
        image = writer.add_connection("/camera", image_kind, typestore=store)
        odom = writer.add_connection("/odom", "nav_msgs/msg/Odometry", typestore=store)
        events = [(number / 10, "image", number) for number in range(int(seconds * 10))]
        events += [(number / 20, "odom", number) for number in range(int(seconds * 20))]
        for t, kind, number in sorted(events):
            ns = int((1000 + t) * 1e9)
            head = header(seq=0, stamp=stamp(sec=ns // 10**9, nanosec=ns % 10**9), frame_id="")
            if kind == "image":
                if gap and 3 < t < 5:
                    continue
                if raw:
                    pixels = frame(number % 100).copy()
                    pixels[..., 0] = 0  # blue, in the order of the message
                    message = kinds[image_kind](
                        header=head, height=24, width=32, encoding="bgr8", is_bigendian=0, step=96, data=pixels.ravel()
                    )
                else:
                    message = kinds[image_kind](
                        header=head, format="jpeg", data=np.frombuffer(jpeg(number % 100), np.uint8)
                    )
                writer.write(image, ns, store.serialize_ros1(message, image_kind))
            else:
                yaw = 0.2 * t + yaw_offset
                pose = kinds["geometry_msgs/msg/Pose"](
                    position=point(x=5 * np.sin(0.2 * t), y=5 - 5 * np.cos(0.2 * t), z=0.0),
                    orientation=kinds["geometry_msgs/msg/Quaternion"](
                        x=0.0, y=0.0, z=float(np.sin(yaw / 2)), w=float(np.cos(yaw / 2))
                    ),
                )
                vector = kinds["geometry_msgs/msg/Vector3"](x=0.0, y=0.0, z=0.0)
                twist = kinds["geometry_msgs/msg/Twist"](linear=vector, angular=vector)
                message = kinds["nav_msgs/msg/Odometry"](
                    header=head, child_frame_id="",
                    pose=kinds["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=np.zeros(36)),
                    twist=kinds["geometry_msgs/msg/TwistWithCovariance"](twist=twist, covariance=np.zeros(36)),
                )  # fmt: skip
                writer.write(odom, ns, store.serialize_ros1(message, "nav_msgs/msg/Odometry"))


def test_bags(tmp_path, caplog):
    pytest.importorskip("rosbags")
    caplog.set_level("INFO")
    src = tmp_path / "src"
    src.mkdir()
    write_bag(src / "one.bag", 6)
    write_bag(src / "two.bag", 8, raw=True, gap=True)
    found = build(rosbag.RECIPE, tmp_path / "out", src=src)
    assert set(found) == {"one", "two_0", "two_1"}
    one = found["one"]
    assert len(one) == 24 and np.abs(np.diff(one.t) - 0.25).max() <= 0.1
    numbers = np.array(shown(one))
    np.testing.assert_allclose(numbers / 10, one.t, atol=1e-6)  # frames and times belong together
    np.testing.assert_allclose(one.poses[:, 2], 0.2 * one.t, atol=1e-6)
    np.testing.assert_allclose(steps(one.poses)[:, :2].sum(1) > 0, True)
    blue = np.asarray(Image.open(found["two_0"].frame_file(0)))
    assert blue[0, 0, 2] < 5 < 35 < blue[0, 0, 0]  # channels swapped
    assert "120, 20.2 Hz); images from /camera, poses from /odom" in caplog.text
    assert "24 of 60 images taken, in 1 pieces" in caplog.text


def test_bags_with_a_yaw_offset_or_the_wrong_topic(tmp_path):
    pytest.importorskip("rosbags")
    src = tmp_path / "src"
    src.mkdir()
    for name in ("a", "b"):
        write_bag(src / f"{name}.bag", 3, yaw_offset=-np.pi / 2)
    with pytest.raises(
        DataError, match="heading contradicts the motion; got 90 degrees .* 90 degrees must be added to"
    ):
        build(rosbag.RECIPE, tmp_path / "wrong", src=src)
    build(rosbag.RECIPE, tmp_path / "wrong", src=src, heading="keep")
    assert any("degrees away from the yaw" in line for line in read_manifest(tmp_path / "wrong")["warnings"])
    build(rosbag.RECIPE, tmp_path / "right", src=src, yaw_offset_deg=90)
    assert not any("away from the yaw" in line for line in read_manifest(tmp_path / "right")["warnings"])
    (src / "c.bag").write_bytes(b"no bag")
    with pytest.raises(DataError, match=r"no topic for image_topic; got /camera .sensor_msgs/msg/CompressedImage, 30"):
        rosbag.RECIPE.build(tmp_path / "out", {"src": str(src), "image_topic": "/front"})
    with pytest.raises(DataError, match="/odom has another type; got nav_msgs/msg/Odometry"):
        rosbag.RECIPE.build(tmp_path / "out", {"src": str(src), "image_topic": "/odom"})
    with pytest.raises(
        DataError, match="no piece is long enough; got 1 pieces, the longest of 12 frames, from 30 images"
    ):
        rosbag.RECIPE.build(tmp_path / "out", {"src": str(src), "min_frames": "20"})
    build(rosbag.RECIPE, tmp_path / "third", src=src, heading="keep")
    assert [reason[:16] for reason in rejects(tmp_path / "third")] == ["bag c.bag: canno"]


# Videos.


def write_video(path: Path, num_frames: int, fps: int = 10) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 2_000_000
        for number in range(num_frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame(2 * number, (48, 64)), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_csv(path: Path, times: np.ndarray, name: str = "t") -> None:
    rows = [f"{t},{t},{2 * t},{np.rad2deg(np.arctan2(2, 1))}" for t in times]
    path.write_text("\n".join([f"{name},x,y,yaw_deg", *rows]) + "\n", encoding="utf-8")


def test_videos(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for name in ("a", "b"):
        write_video(src / f"{name}.mp4", 60)
    write_csv(src / "a.csv", np.arange(0, 6, 0.5) + 100)
    (src / "b.txt").write_text("\n".join(f"{100 + t} {t} 0 1 0 0 0 1" for t in np.arange(0, 6, 0.2)))
    write_video(src / "nopose.mp4", 10)
    (src / "corrupt.mp4").write_bytes(b"\0" * 1000)
    write_csv(src / "corrupt.csv", np.arange(9))
    write_csv(src / "orphan.csv", np.arange(9))
    (src / "cover.jpg").write_bytes(jpeg(0))
    found = build(video_poses.VIDEO, tmp_path / "out", src=src, time_offset_s=100, rate_hz=2, segment_s=3)
    assert set(found) == {"a_0", "a_1", "b_0", "b_1"}
    one = found["a_0"]
    assert len(one) == 6 and one.recording == "a"
    np.testing.assert_allclose(one.t, np.arange(6) / 2, atol=1e-3)
    np.testing.assert_allclose(one.poses[:, 0], 100 + one.t, atol=1e-3)  # interpolated at the time of the frame
    np.testing.assert_allclose(shown(one), 20 * one.t, atol=1.6)
    text = "\n".join(rejects(tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["rejected"] == 2 and manifest["ignored"] == {".csv": 1, ".jpg": 1}
    lines = video_poses.VIDEO.plan({"src": str(src), "time_offset_s": "100", "rate_hz": "2", "segment_s": "3"})
    (held_out,) = {one.recording for one in read_trajectories(tmp_path / "out", "val")}
    assert lines[0] == f"Read 4 videos (0.2 minutes) from {src}, 1 of them without poses."
    assert lines[-3] == f"Split: 1 of 2 recordings for validation, by their names: {held_out}."
    assert lines[-1] == "Ignored: 2 files (.csv: 1, .jpg: 1)."
    assert "video nopose: its pose file is missing; expected nopose.csv or nopose.txt" in text
    assert "video corrupt.mp4: corrupt, cannot be opened" in text


def test_videos_with_poses_by_frame(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for name in ("a", "b"):
        write_video(src / f"{name}.mp4", 30)
        write_csv(src / f"{name}.csv", np.arange(0, 30), "frame")
    found = build(video_poses.VIDEO, tmp_path / "out", src=src, rate_hz=5, scale="none")
    np.testing.assert_allclose(np.hypot(*np.diff(found["a"].poses[:, :2], axis=0).T).mean(), 1)
    assert read_manifest(tmp_path / "out")["length_unit"] == "mean step"
    write_csv(src / "b.csv", np.arange(0, 31), "frame")
    build(video_poses.VIDEO, tmp_path / "two", src=src, split="nwm-legacy", segment_s=1, val_fraction=0.5, min_frames=4)
    assert rejects(tmp_path / "two")[0].startswith(
        "video b: different numbers of visible frames and poses; got 30 and 31; expected one pose for each frame that "
    )
    write_csv(src / "b.csv", np.arange(0, 40, 8), "frame")
    build(video_poses.VIDEO, tmp_path / "sparse", src=src, split="nwm-legacy", segment_s=1, min_frames=4)
    assert rejects(tmp_path / "sparse") == [
        "video b: poses for frames that it does not have; got frame 32; expected 0 to 29"
    ]


# Frames.


def test_folders_of_frames(tmp_path):
    src = tmp_path / "src"
    for name in ("a_0", "b_0", "bad_0", "none_0"):
        (src / name).mkdir(parents=True)
        for number in range(12):
            (src / name / f"image{number}.jpg").write_bytes(jpeg(number))
        write_csv(src / name / "poses.csv", np.arange(12), "frame")
    (src / "b_0" / "poses.csv").unlink()
    quarter = "0 0 1 {0} 0 1 0 0 -1 0 0 {1}"  # a camera that looks along +x of a world with y down
    (src / "b_0" / "poses.txt").write_text("\n".join(quarter.format(n, 0) for n in range(12)))
    write_csv(src / "bad_0" / "poses.csv", np.arange(11), "frame")
    (src / "none_0" / "poses.csv").unlink()
    found = build(video_poses.FRAMES, tmp_path / "out", src=src, every=2, up="-y", optical="z", min_frames=3)
    assert shown(found["a_0"]) == [0, 2, 4, 6, 8, 10]  # by number, not by text
    np.testing.assert_allclose(found["a_0"].poses[:, :2], np.arange(0, 12, 2)[:, None] * [1, 2], atol=1e-9)
    motion = steps(found["b_0"].poses)
    np.testing.assert_allclose(motion, [[2, 0, 0]] * 5, atol=1e-9)  # it goes where it looks
    assert sorted(rejects(tmp_path / "out")) == [
        "trajectory bad_0: different numbers of frames and poses; got 12 and 11. Frames whose names are their times, "
        "in seconds or nanoseconds since 1970, need no pose each.",
        f"trajectory none_0: its pose file is missing; expected poses.csv or poses.txt in {src}/none_0",
    ]


def test_files_of_poses(tmp_path):
    file = tmp_path / "poses.txt"
    half = np.sin(np.pi / 4)
    file.write_text(f"# tum\n1.5 1 2 3 0 0 {half} {half}\n2.0 1 3 3 0 0 0 2\n")  # not normalised
    found = apply_reading(read_raw_poses(file), Reading())
    np.testing.assert_allclose(found.poses, [[1, 2, np.pi / 2], [1, 3, 0]], atol=1e-9)
    np.testing.assert_allclose(found.t, [1.5, 2.0])
    # A camera in a world with z up that looks along +x and moves there: left of it is +y.
    file.write_text("0 0 1 0 -1 0 0 0 0 -1 0 0\n0 0 1 1 -1 0 0 1 0 -1 0 0\n")
    poses = apply_reading(read_raw_poses(file), Reading(up="z", optical="z")).poses
    np.testing.assert_allclose(relative(*poses), [1, 1, 0], atol=1e-9)
    for text, message in (
        ("", "empty"),
        ("1 2 3\n", r"unknown form; got 3 values a line; expected a CSV header, 8 \(TUM\) or 12 \(KITTI\)"),
        ("1 2\n1 2 3\n", "cannot be read"),
        ("t,x,y\n0,1,2\n", "a column is missing; got t, x, y; expected x, y, yaw or yaw_deg, t or frame"),
        ("t,x,y,yaw\n0,1,2,north\n", "a value is not a number"),
        ("t,x,y,yaw\n0,1,2,0\n1,1,2\n", "pose 2 has another number of values than the header; got 3; expected 4"),
        ("t,x,y,yaw\n0,1,2,0,9\n", "pose 1 has another number of values than the header; got 5; expected 4"),
        ("frame,x,y,yaw\n0.5,1,2,0\n", "a frame number is not whole; got 0.5"),
        ("0 0 0 0 0 0 0 0\n", "a quaternion is zero"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_raw_poses(file)
    file.write_bytes(b"t,x,y,yaw\n0,1,\xff,0\n")
    with pytest.raises(DataError, match="is not text in UTF-8; got byte 14"):
        read_raw_poses(file)


# Mazes.


def test_mazes_are_connected_and_differ():
    for seed in range(20):
        maze = make_maze(seed, 5)
        seen, todo = {(0, 0)}, [(0, 0)]
        while todo:
            for cell in maze.neighbours(todo.pop()):
                if cell not in seen:
                    seen.add(cell)
                    todo.append(cell)
        assert len(seen) == 25
        assert all(maze.is_free(maze.centre(cell)) and maze.cell_at(maze.centre(cell)) == cell for cell in seen)
        assert maze.solid[0].all() and maze.solid[:, -1].all()
    assert (make_maze(1).solid != make_maze(2).solid).any()
    assert write_pwad([make_maze(1)]) == write_pwad([make_maze(1)])


def test_walls_keep_their_distance():
    maze = make_maze(0)
    assert not maze.is_free((WALL + 10, WALL + 64)) and maze.is_free((WALL + 20, WALL + 64))
    assert not maze.is_free((-5, 64)) and not maze.is_free((10_000, 64))


def test_textures_are_ours_and_different():
    found = textures()
    assert len(set(found.values())) == len(found) > 60 and all(len(name) <= 8 for name in found)


def test_without_the_simulator_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(
        DataError, match=r"vizdoom: the simulator is not installed. Install it with `pip install 'raev2\[n"
    ):
        vizdoom_maze.RECIPE.build(tmp_path / "out", {})


OPTIONS = {"num_train": "3", "num_val": "2", "drives_per_maze": "2", "num_frames": "30", "cells": "4"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vizdoom")
    out = tmp_path_factory.mktemp("doom") / "data"
    before = set(os.listdir())
    vizdoom_maze.RECIPE.build(out, OPTIONS)
    assert set(os.listdir()) == before  # the engine writes into a temporary folder
    return out


def test_recorded_drives(recorded):
    manifest = vizdoom_maze.RECIPE.verify(recorded)
    assert {split: entry["num_samples"] for split, entry in manifest["splits"].items()} == {"train": 90, "val": 60}
    parents = [{one.recording for one in read_trajectories(recorded, split)} for split in ("train", "val")]
    assert len(parents[0]) == 2 and len(parents[1]) == 1 and not parents[0] & parents[1]
    assert not any("away from the yaw" in line or "teleport" in line for line in manifest["warnings"])
    for one in every(recorded).values():
        np.testing.assert_allclose(one.t[::4], np.arange(8), atol=1e-9)  # 4 frames a second, exactly
        assert len(np.unique(one.frame_sha256, axis=0)) > 15
        maze = make_maze(int(one.recording.split("-")[1]), 4)
        assert all(maze.is_free(point * UNITS_PER_M, 15) for point in one.poses[:, :2])
        turn = one.command[:-1, 1] * np.array([9, 9, 9, 8] * 8)[:29]
        np.testing.assert_allclose(np.rad2deg(np.diff(one.poses[:, 2])), turn, atol=0.1)  # positive is left


def test_the_same_options_record_the_same_drives(recorded, tmp_path):
    again = vizdoom_maze.RECIPE.build(tmp_path / "again", OPTIONS)
    assert again["fingerprint"] == read_manifest(recorded)["fingerprint"]


def test_a_maze_world_moves_exactly(recorded):
    from raev2_tasks.nwm.worlds.engine import MazeWorld

    world = MazeWorld(1, size=(32, 32))
    first = world.reset(7)
    start = world.pose
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(world.reset(7), first)
    moved = world.step([0.5, 0, 0.2], 0.25)
    np.testing.assert_allclose(relative(start, world.pose), [0.5, 0, 0.2], atol=1e-9)
    assert np.abs(moved.astype(int) - first).mean() > 3
    world.step([0, 0, -0.2])
    world.undo()
    world.undo()
    np.testing.assert_array_equal(world.pose, start)
    np.testing.assert_array_equal(world.look(start), first)
    for _ in range(60):  # a wall stops it
        world.step([0.5, 0, 0])
    assert world.maze.is_free(world.pose[:2] * UNITS_PER_M)
    blocked = world.pose
    world.step([0.5, 0, 0])
    np.testing.assert_allclose(world.pose, blocked, atol=0.13)
    with pytest.raises(DataError, match="inside a wall, or outside the maze"):
        world.look([0, 0, 0])
    world.close()


def test_a_maze_world_shows_what_was_recorded(recorded):
    from raev2_tasks.nwm.worlds.engine import MazeWorld

    one = read_trajectories(recorded, "val")[0]
    world = MazeWorld(int(one.recording.split("-")[1]), num_cells=4)
    differences = []
    for index in (0, 10, 20):
        pixels = np.asarray(Image.open(one.frame_file(index))).astype(int)
        differences.append(np.abs(world.look(one.poses[index]).astype(int) - pixels).mean())
    assert max(differences) < 12 and np.abs(world.look(one.poses[0]).astype(int) - pixels).mean() > 20
    world.close()


def test_a_forgotten_engine_leaves_nothing_behind(recorded, tmp_path):
    code = "from raev2_tasks.nwm.worlds.engine import MazeWorld; MazeWorld(0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [] and "could not be saved" not in done.stdout + done.stderr
