"""Layouts of published datasets, written here from a known drive; frames and poses on their own clocks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from clips import NUM_FRAMES, SIZE, Clip, number_of, picture, write_clip
from PIL import Image
from scipy.spatial.transform import Rotation

from raev2.errors import DataError
from raev2.files.manifest import read_manifest
from raev2_data_recipes.drives.published import RECIPE
from raev2_tasks.nwm.data.trajectories import StoredTrajectory, read_trajectories
from raev2_tasks.nwm.pose import steps

CAMERA = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # x right, y down, z ahead in the axes of the robot
FRAME_T = np.arange(60) / 10 + 0.013  # of the frames; poses come 50 times a second


def path(t: np.ndarray) -> np.ndarray:
    """Poses (T, 3) of the camera at times: an arc to the left, 1 m/s."""
    return np.column_stack([5 * np.sin(0.2 * t), 5 - 5 * np.cos(0.2 * t), 0.2 * t])


def rotations(poses: np.ndarray) -> np.ndarray:
    return Rotation.from_euler("z", poses[:, 2:]).as_matrix()


def save(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number)).save(file)


def every(out: Path) -> dict[str, StoredTrajectory]:
    return {one.id: one for split in ("train", "val") for one in read_trajectories(out, split)}


def shown(one: StoredTrajectory) -> np.ndarray:
    """Numbers that the pictures carry."""
    return np.array([number_of(np.asarray(Image.open(one.frame_file(index)))) for index in range(len(one))])


def check(out: Path, name: str, count: int = 29) -> None:
    """Pictures and poses of one trajectory at 5 Hz belong together, and the motions are true."""
    one = every(out)[name]
    assert len(one) >= count and set(np.diff(shown(one))) == {2}
    np.testing.assert_allclose(steps(one.poses), steps(path(FRAME_T[shown(one)])), atol=2e-3)


def build(src: Path, out: Path, **options: str) -> dict:
    return RECIPE.build(out, {"src": str(src), "rate_hz": "5", "split": "nwm-legacy"} | options)


def rows(*columns: np.ndarray) -> str:
    return "\n".join(" ".join(f"{value:.9f}" for value in row) for row in np.column_stack(columns))


def test_tum_rgbd(tmp_path):
    src, start = tmp_path / "src", 1_305_031_102.0
    t = np.arange(0, 7, 0.02)
    for name in ("rgbd_dataset_freiburg1_xyz", "rgbd_dataset_freiburg2_desk"):
        listed = [f"{start + s:.6f} rgb/{start + s:.6f}.png" for s in FRAME_T]
        for number, line in enumerate(listed):
            save(src / name / line.split()[1], number)
        head = ["# color images", "# file: 'x.bag'", "# timestamp filename"]
        (src / name / "rgb.txt").write_text("\n".join([*head, *listed]))
        poses = path(t)
        position = np.column_stack([poses[:, :2], np.full(len(t), 1.3)])
        turn = Rotation.from_matrix(rotations(poses) @ CAMERA).as_quat()
        text = "# ground truth trajectory\n# timestamp tx ty tz qx qy qz qw\n" + rows(start + t, position, turn)
        (src / name / "groundtruth.txt").write_text(text)
    (src / "rgbd_dataset_freiburg2_desk" / "groundtruth.txt").unlink()
    lines = RECIPE.plan({"src": str(src)})
    assert lines[0] == f"Read 2 recordings in the layout of tum-rgbd from 2 folders of {src}."
    manifest = build(src, tmp_path / "out", split="by-time", val_fraction="0.3", split_gap_s="0.5")
    assert manifest["rejected"] == 1 and manifest["layout"] == "tum-rgbd"
    check(tmp_path / "out", "rgbd_dataset_freiburg1_xyz_train", count=15)


def test_kitti_odometry(tmp_path):
    dataset = tmp_path / "src" / "dataset"
    (dataset / "poses").mkdir(parents=True)
    for name in ("00", "01", "02", "11"):
        for number in range(60):
            save(dataset / "sequences" / name / "image_2" / f"{number:06d}.png", number)
        (dataset / "sequences" / name / "times.txt").write_text(rows(FRAME_T))
        if name == "11":
            continue  # its poses are not published
        poses = path(FRAME_T)
        first = CAMERA.T @ rotations(poses[:1])[0].T
        turn = first @ rotations(poses) @ CAMERA
        position = (np.column_stack([poses[:, :2], np.zeros(60)]) - [*poses[0, :2], 0]) @ first.T
        table = np.concatenate([turn, position[..., None]], 2).reshape(60, 12)
        (dataset / "poses" / f"{name}.txt").write_text(rows(table[: 50 if name == "02" else 60]))
    build(tmp_path / "src", tmp_path / "out")
    for name in ("00", "01"):
        check(tmp_path / "out", name)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reasons[0] == (
        "trajectory 02: different numbers of frames, times and poses; got 60 frames, 60 times, 50 poses"
    )
    assert "poses/11.txt: pose file is missing" in reasons[1] and len(reasons) == 2


def test_euroc(tmp_path):
    src, start = tmp_path / "src", 1_403_636_579_000_000_000
    mounted = np.eye(4)  # from the camera to the body
    mounted[:3, :3] = Rotation.from_euler("xyz", [0.2, -0.4, 1.6]).as_matrix()
    mounted[:3, 3] = [0.05, -0.02, 0.01]
    t = np.arange(0, 7, 0.02)
    stamps = start + np.round(FRAME_T * 1e9).astype(np.int64)
    for name in ("MH_01_easy", "MH_02_easy"):
        camera = src / name / "mav0" / "cam0"
        for number, stamp in enumerate(stamps):
            save(camera / "data" / f"{stamp}.png", number)
        listed = [f"{stamp},{stamp}.png" for stamp in stamps]
        (camera / "data.csv").write_text("\n".join(["#timestamp [ns],filename", *listed]) + "\n")
        data = ", ".join(map(str, mounted.ravel()))
        (camera / "sensor.yaml").write_text(
            f"%YAML:1.0\nsensor_type: camera\nT_BS:\n  cols: 4\n  rows: 4\n  data: [{data}]\nrate_hz: 20\n"
        )
        poses = path(t)
        body = rotations(poses) @ CAMERA @ mounted[:3, :3].T
        position = np.column_stack([poses[:, :2], np.ones(len(t))]) - body @ mounted[:3, 3]
        turn = Rotation.from_matrix(body).as_quat(scalar_first=True)
        truth = src / name / "mav0" / "state_groundtruth_estimate0"
        truth.mkdir()
        lines = [
            f"{start + round(s * 1e9)}," + ",".join(f"{value:.9f}" for value in (*p, *q, 0))
            for s, p, q in zip(t, position, turn, strict=True)
        ]
        names = [f"p_RS_R_{axis} [m]" for axis in "xyz"] + [f"q_RS_{axis} []" for axis in "wxyz"]
        (truth / "data.csv").write_text("\n".join([", ".join(["#timestamp", *names, "v_RS_R_x [m s^-1]"]), *lines]))
    build(src, tmp_path / "out")
    for name in ("MH_01_easy", "MH_02_easy"):
        check(tmp_path / "out", name)
    (src / "MH_01_easy" / "mav0" / "cam0" / "sensor.yaml").write_text("T_BS: 3")
    (src / "MH_02_easy" / "mav0" / "cam0" / "data" / f"{stamps[5]}.png").unlink()
    with pytest.raises(DataError, match="no usable trajectory; 2 rejected. First of them: camera .*where it sits"):
        build(src, tmp_path / "bad")


# LeRobot.

KEY = "observation.images.front"
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [4], "names": {"motors": ["speed", "x", "y", "theta"]}},
    "action": {"dtype": "float32", "shape": [3], "names": ["x", "y", "yaw"]},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
}
PLACES = {
    2: "chunk-{episode_chunk:03d}/%sepisode_{episode_index:06d}",
    3: "%schunk-{chunk_index:03d}/file-{file_index:03d}",
}
PLAIN = Clip(".mp4", "libx264", options={"preset": "ultrafast", "g": "10"})


def write_table(file: Path, columns: dict[str, list]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)


def episode_columns(episodes: list[int], t: np.ndarray) -> dict[str, list]:
    state = np.column_stack([np.ones(len(t)), path(t)]).tolist()
    return {
        "observation.state": state * len(episodes), "action": [[9.0, 9.0, 9.0]] * len(t) * len(episodes),
        "timestamp": t.tolist() * len(episodes), "episode_index": np.repeat(episodes, len(t)).tolist(),
    }  # fmt: skip


def write_info(folder: Path, version: int, dtype: str) -> None:
    (folder / "meta").mkdir(parents=True)
    info = {
        "codebase_version": f"v{version}.0", "fps": 30, "total_episodes": 2, "chunks_size": 1000,
        "data_path": f"data/{PLACES[version] % ''}.parquet",
        "video_path": f"videos/{PLACES[version] % '{video_key}/'}.mp4",
        "features": {KEY: {"dtype": dtype, "shape": [*SIZE, 3]}, **FEATURES},
    }  # fmt: skip
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def test_lerobot_of_version_2_with_videos(tmp_path):
    folder, t = tmp_path / "src" / "drive", np.arange(NUM_FRAMES) / 30
    write_info(folder, 2, "video")
    (folder / "videos" / "chunk-000" / KEY).mkdir(parents=True)
    for number in range(2):
        columns = episode_columns([number], t)
        write_table(folder / "data" / "chunk-000" / f"episode_{number:06d}.parquet", columns)
        write_clip(PLAIN, folder / "videos" / "chunk-000" / KEY / f"episode_{number:06d}.mp4")
    build(tmp_path / "src", tmp_path / "out", rate_hz="10", format="png")
    found = every(tmp_path / "out")
    assert sorted(found) == ["drive_000000", "drive_000001"]
    for one in found.values():
        assert shown(one).tolist() == list(range(0, NUM_FRAMES, 3))
        np.testing.assert_allclose(one.poses, path(shown(one) / 30), atol=1e-5)


def test_lerobot_of_version_3_with_episodes_of_one_video(tmp_path):
    folder = tmp_path / "src" / "drive"
    write_info(folder, 3, "video")
    write_table(folder / "data" / "chunk-000" / "file-000.parquet", episode_columns([0, 1], np.arange(60) / 30))
    (folder / "videos" / KEY / "chunk-000").mkdir(parents=True)
    write_clip(PLAIN, folder / "videos" / KEY / "chunk-000" / "file-000.mp4")
    zeros = {f"{kind}/{name}": [0, 0] for kind in ("data", f"videos/{KEY}") for name in ("chunk_index", "file_index")}
    window = {f"videos/{KEY}/from_timestamp": [0.0, 2.0], f"videos/{KEY}/to_timestamp": [2.0, 4.0]}
    table = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    write_table(table, {"episode_index": [0, 1], **zeros, **window})
    build(tmp_path / "src", tmp_path / "out", rate_hz="10", format="png")
    found = every(tmp_path / "out")
    assert sorted(found) == ["drive_000000", "drive_000001"]
    for number, name in enumerate(sorted(found)):
        assert shown(found[name]).tolist() == list(range(60 * number, 60 * number + 60, 3))
        np.testing.assert_allclose(found[name].poses, path(shown(found[name]) / 30 - 2 * number), atol=1e-5)


def test_lerobot_with_pictures_in_the_tables(tmp_path):
    folder = tmp_path / "src" / "drive"
    write_info(folder, 2, "image")
    for episode in range(2):
        pictures = []
        for number in range(60):
            buffer = io.BytesIO()
            Image.fromarray(picture(number)).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        columns = {**episode_columns([episode], FRAME_T), KEY: pictures}
        write_table(folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet", columns)
    build(tmp_path / "src", tmp_path / "out")
    check(tmp_path / "out", "drive_000000")
    assert read_manifest(tmp_path / "out")["layout"] == "lerobot"
    for options, message in (
        ({"camera": "rear"}, f"no such camera; got rear; expected {KEY}"),
        (
            {"poses": "observation.pose"},
            "no columns of x, y and yaw; got observation.state .*Choose columns",
        ),
    ):
        with pytest.raises(DataError, match=message):
            build(tmp_path / "src", tmp_path / "no", **options)
    build(tmp_path / "src", tmp_path / "stated", poses="observation.state")


def test_a_folder_of_no_known_layout_is_refused(tmp_path):
    with pytest.raises(DataError, match="no known layout; got .*; expected tum-rgbd .rgb.txt., kitti-odometry"):
        RECIPE.plan({"src": str(tmp_path)})
