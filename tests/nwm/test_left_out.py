"""Each recipe of drives gets one bad recording of every kind: each is counted with its reason, and so is every file."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from clips import Clip, write_clip
from PIL import Image
from scipy.spatial.transform import Rotation
from trajectory_folders import frame

from raev2.errors import DataError
from raev2_data_recipes.drives import gnm, recon, trajectory_mix, vizdoom_maze
from raev2_data_recipes.drives.published import RECIPE as PUBLISHED
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe
from raev2_data_recipes.drives.video_poses import FRAMES, VIDEO
from raev2_tasks.nwm.data.trajectories import read_trajectories

NUM = 12
T = np.arange(NUM) / 4
PATH = np.column_stack([T, 0 * T, 0 * T])  # along x, 1 m/s
CAMERA = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # x right, y down, z ahead in the axes of the robot
JUNK = ("Thumbs.db", ".hidden", "@eaDir/0.jpg", "notes.md")


def encoded(number: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame(number)).save(buffer, format)
    return buffer.getvalue()


def put(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def rows(*columns: np.ndarray) -> str:
    return "\n".join(" ".join(f"{value:.9f}" for value in row) for row in np.column_stack(columns))


def lines_but(text: str, number: int, line: str | None) -> str:
    """`text` with another line, or without it."""
    lines = text.splitlines()
    return "\n".join(lines[:number] + ([] if line is None else [line]) + lines[number + 1 :])


def check(
    recipe: TrajectoryRecipe,
    src: Path,
    out: Path,
    good: set[str],
    bad: Mapping[str, str],
    ignored: dict,
    **options: str,
) -> None:
    """`bad`: a word of the path of each bad recording -> what its reason says. No file is in none of the counts."""
    options = {"src": str(src), "split": "nwm-legacy", "val_fraction": "0.5"} | options
    manifest = recipe.build(out, options)
    assert {one.id for split in ("train", "val") for one in read_trajectories(out, split)} == good
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert manifest["rejected"] == len(rejects) == len(bad), [reject["reason"] for reject in rejects]
    for word, reason in bad.items():
        found = [one["reason"] for one in rejects if word in re.split(r"[/.]", one["path"]) + [one.get("trajectory")]]
        assert len(found) == 1 and re.search(reason, found[0]), (word, found)
    assert manifest["ignored"] == ignored
    num_files = sum(len(names) for _, _, names in os.walk(src))
    read = [file for file in set(recipe.files_read(recipe.resolve(options))) if file.is_file()]
    assert num_files == len(read) + sum(ignored.values())
    plan = recipe.plan(options)
    assert plan[-1].startswith(f"Ignored: {sum(ignored.values())} files (") and any("Left out: " in one for one in plan)


IGNORED = {".md": 1, "Thumbs.db": 1, "folder @eaDir": 1, "hidden file": 1}


# Layouts of published datasets.


def quaternions(num: int = NUM) -> np.ndarray:
    return Rotation.from_matrix(np.tile(CAMERA, (num, 1, 1))).as_quat()


def test_tum_rgbd(tmp_path):
    src, names = tmp_path / "src", [f"rgb/{t:.6f}.png" for t in T]
    listed = "# timestamp filename\n" + "\n".join(f"{t:.6f} {name}" for t, name in zip(T, names, strict=True))
    truth = "# timestamp tx ty tz qx qy qz qw\n" + rows(T, PATH[:, :2], np.ones(NUM), quaternions())
    bad = {
        "short": (None, lines_but(truth, 5, "1.0 2.0"), "pose 5 has another number of values than the header; got 2"),
        "letters": (None, lines_but(truth, 5, "1.0 x 0 0 0 0 0 1"), "could not convert string to float: 'x'"),
        "nan": (None, lines_but(truth, 5, "1.0 nan 0 0 0 0 0 1"), "position is not finite in 1 of 12 poses"),
        "zero": (None, lines_but(truth, 5, "1.0 1 0 1 0 0 0 0"), "a quaternion is zero"),
        "twice": (None, lines_but(truth, 5, truth.splitlines()[4]), "do not increase; got 0.75 s after 0.75 s"),
        "empty": (None, "", "groundtruth.txt: empty"),
        "header": (None, truth.splitlines()[0], "groundtruth.txt: empty"),
        "none": (None, None, "groundtruth.txt: pose file is missing"),
        "line": (lines_but(listed, 3, "0.5"), truth, "rgb.txt: a line is no time with the name of a picture"),
        "back": (lines_but(listed, 3, f"0.1 {names[2]}"), truth, "frames do not increase; got 0.1 s after"),
        "later": (None, rows(T + 100, PATH[:, :2], T, quaternions()), "frames and poses do not overlap in time"),
        "lost": (None, truth, "1 of 12 frames are missing"),
        "broken": (None, truth, "frame 3: cannot be read as an image"),
    }  # fmt: skip
    for folder, (pictures, poses, _) in {"a": (None, truth, ""), "b": (None, truth, ""), **bad}.items():
        for number, name in enumerate(names):
            put(src / folder / name, encoded(number))
        put(src / folder / "rgb.txt", pictures or listed)
        if poses is not None:
            put(src / folder / "groundtruth.txt", poses)
    (src / "lost" / names[5]).unlink()
    put(src / "broken" / names[3], encoded(3)[:60])
    for name in ("a/depth.txt", "a/depth/0.png", "a/rgb/unlisted.png", *JUNK):
        put(src / name, encoded(0))
    bad_lines = {name: reason for name, (_, _, reason) in bad.items()}
    unread = {".png": 2 + 12, ".txt": 1}  # with those of the recording whose list cannot be read
    check(PUBLISHED, src, tmp_path / "out", {"a", "b"}, bad_lines, IGNORED | unread)


def test_kitti_odometry(tmp_path):
    src = tmp_path / "src"
    first = CAMERA.T
    position = np.column_stack([PATH[:, :2], np.zeros(NUM)]) @ first.T
    table = rows(np.concatenate([np.tile(np.eye(3), (NUM, 1, 1)), position[..., None]], 2).reshape(NUM, 12))
    bad = {
        "02": (
            rows(T),
            "\n".join(table.splitlines()[:9]),
            "different numbers of frames, times and poses; got 12 frames",
        ),
        "03": (lines_but(rows(T), 4, "x"), table, "times.txt: a line is no time; got could not convert"),
        "04": (rows(T), table, "has no folder of frames"),
        "05": (rows(T), lines_but(table, 4, "1 2 3"), "expected equal numbers of values in every line"),
        "06": (rows(T), None, "06.txt: pose file is missing"),
        "07": (rows(T), table, "frame 3: cannot be read as an image"),
        "08": (rows(T), lines_but(table, 4, " ".join(["nan"] * 12)), "position is not finite in 1 of 12 poses"),
        "09": (rows(T), rows(T), "unknown form; got 1 values a line"),
        "10": (lines_but(rows(T), 4, "0.75"), table, "times of the (poses|frames) do not increase"),
    }
    for name, (times, poses, _) in {"00": (rows(T), table, ""), "01": (rows(T), table, ""), **bad}.items():
        put(src / "sequences" / name / "times.txt", times)
        for number in range(NUM):
            put(src / "sequences" / name / "image_2" / f"{number:06d}.png", encoded(number))
        if poses is not None:
            put(src / "poses" / f"{name}.txt", poses)
    (src / "sequences" / "04" / "image_2").rename(src / "sequences" / "04" / "image_0")
    put(src / "sequences" / "07" / "image_2" / "000003.png", b"<html>no picture</html>")
    for name in ("sequences/00/calib.txt", *JUNK):
        put(src / name, "x")
    bad_lines = {name: reason for name, (_, _, reason) in bad.items()}
    check(PUBLISHED, src, tmp_path / "out", {"00", "01"}, bad_lines, IGNORED | {".png": 12, ".txt": 1})


def test_euroc(tmp_path):
    src, stamps = tmp_path / "src", 10**18 + (T * 1e9).astype(np.int64)
    listed = "#timestamp [ns],filename\n" + "\n".join(f"{stamp},{stamp}.png" for stamp in stamps)
    mounted = f"%YAML:1.0\nT_BS:\n  data: {np.eye(4).ravel().tolist()}\n"
    names = ["#timestamp [ns]", *(f"p_RS_R_{axis} [m]" for axis in "xyz"), *(f"q_RS_{axis} []" for axis in "wxyz")]
    turned = np.roll(quaternions(), 1, axis=1)
    values = np.column_stack([PATH[:, :2], np.ones(NUM), turned]).tolist()
    poses = [f"{stamp}," + ",".join(map(str, row)) for stamp, row in zip(stamps, values, strict=True)]
    truth = "\n".join([",".join(names), *poses])
    good = (listed, mounted, truth)
    bad = {
        "mount": (listed, "T_BS: 3", truth, "where it sits cannot be read"),
        "nomount": (listed, None, truth, "where it sits cannot be read; got FileNotFoundError"),
        "line": (lines_but(listed, 4, "17"), mounted, truth, "data.csv: a line is no time with the name of a picture"),
        "short": (listed, mounted, lines_but(truth, 4, "17,1"), "pose 4 has another number of values than the header"),
        "nan": (
            listed,
            mounted,
            truth.replace(poses[4], poses[4].replace(",1.0,", ",nan,", 1)),
            "position is not finite",
        ),
        "yaw": (listed, mounted, "t,x,y,yaw\n0,0,0,0\n1,1,0,0", "has no quaternions"),
        "none": (listed, mounted, None, "pose file is missing"),
        "broken": (*good, "frame 3: cannot be read as an image"),
    }
    for name, (pictures, camera, poses_of, *_) in {"a": good, "b": good, **bad}.items():
        base = src / name / "mav0"
        put(base / "cam0" / "data.csv", pictures)
        for stamp in stamps:
            put(base / "cam0" / "data" / f"{stamp}.png", encoded(0))
        if camera is not None:
            put(base / "cam0" / "sensor.yaml", camera)
        if poses_of is not None:
            put(base / "state_groundtruth_estimate0" / "data.csv", poses_of)
    put(src / "broken" / "mav0" / "cam0" / "data" / f"{stamps[3]}.png", b"")
    for name in ("a/mav0/imu0/data.csv", "a/mav0/cam1/data/0.png", *JUNK):
        put(src / name, "x")
    bad_lines = {name: reason for name, (*_, reason) in bad.items()}
    check(PUBLISHED, src, tmp_path / "out", {"a", "b"}, bad_lines, IGNORED | {".csv": 1, ".png": 1 + 12})


KEY = "observation.images.front"


def lerobot(folder: Path, num_episodes: int, dtype: str) -> None:
    info = {
        "fps": 4, "total_episodes": num_episodes, "chunks_size": 1000,
        "data_path": "data/{episode_index}.parquet", "video_path": "videos/{video_key}/{episode_index}.mp4",
        "features": {
            KEY: {"dtype": dtype}, "observation.state": {"dtype": "float32", "names": ["x", "y", "yaw"]},
        },
    }  # fmt: skip
    put(folder / "meta" / "info.json", json.dumps(info))


def episode(folder: Path, number: int, **changes: list) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "observation.state": PATH.tolist(), "timestamp": T.tolist(), "episode_index": [number] * NUM,
        KEY: [{"bytes": encoded(index), "path": None} for index in range(NUM)], **changes,
    }  # fmt: skip
    file = put(folder / "data" / f"{number}.parquet", b"")
    parquet.write_table(pyarrow.table(columns), file)


def test_lerobot_with_pictures_in_its_tables(tmp_path):
    src = tmp_path / "src"
    lerobot(src / "d", 9, "image")
    state, pictures = PATH.tolist(), [{"bytes": encoded(index), "path": None} for index in range(NUM)]
    for number, changes in enumerate(
        [
            {}, {}, {"observation.state": [*state[:5], [1.0, float("nan"), 0.0], *state[6:]]},
            {KEY: [*pictures[:3], {"bytes": b"no picture", "path": None}, *pictures[4:]]},
            {KEY: [*pictures[:3], {"bytes": None, "path": "gone.png"}, *pictures[4:]]},
            {"observation.state": [*state[:5], [1.0], *state[6:]]}, {"timestamp": T[::-1].tolist()},
        ]
    ):  # fmt: skip
        episode(src / "d", number, **changes)
    put(src / "d" / "data" / "7.parquet", b"PAR1 no table")
    put(src / "e" / "meta" / "info.json", '{"features": {"x": {}}}')
    put(src / "f" / "meta" / "info.json", "{")
    for name in ("d/videos/other/0.mp4", "d/README.txt", *JUNK):
        put(src / name, "x")
    bad = {
        "2": "position is not finite in 1 of 12 poses; got pose 6", "3": "frame 3: cannot be read as an image",
        "4": "FileNotFoundError", "5": "poses of episode 5 are not numbers",
        "6": "the times of the poses do not increase", "7": "7.parquet: cannot be read",
        "8": "8.parquet: cannot be read", "e": "meta folder is not that of a LeRobot dataset; got KeyError: 'dtype'",
        "f": "meta/info.json cannot be read; got JSONDecodeError",
    }  # fmt: skip
    check(PUBLISHED, src, tmp_path / "out", {"d_000000", "d_000001"}, bad, IGNORED | {".mp4": 1, ".txt": 1})
    plan = PUBLISHED.plan({"src": str(src)})
    assert f"d: camera {KEY}, poses from observation.state." in plan
    assert any(line.startswith("Cannot be used: data ") and "LeRobot" in line for line in plan)


def test_lerobot_with_videos(tmp_path):
    src, t = tmp_path / "src", np.arange(121) / 30
    lerobot(src / "d", 5, "video")
    columns = {
        "observation.state": np.column_stack([t, 0 * t, 0 * t]).tolist(),
        "timestamp": t.tolist(),
        KEY: [None] * 121,
    }
    clip = write_clip(Clip(".mp4", "libx264", options={"preset": "ultrafast"}), tmp_path / "clip.mp4")
    for number in range(5):
        last = 90 if number == 4 else 121
        episode(
            src / "d",
            number,
            **{name: values[:last] for name, values in columns.items()},
            episode_index=[number] * last,
        )
        put(src / "d" / "videos" / KEY / f"{number}.mp4", clip.read_bytes()[: 500 if number == 3 else None])
    (src / "d" / "videos" / KEY / "2.mp4").unlink()
    put(src / "notes.md", "x")
    bad = {
        "2": "video 2.mp4: corrupt, cannot be opened", "3": "video 3.mp4: corrupt, cannot be opened",
        "4": "different numbers of visible frames and poses; got 121 and 90",
    }  # fmt: skip
    check(PUBLISHED, src, tmp_path / "out", {"d_000000", "d_000001"}, bad, {".md": 1})


# Others.


def test_recon(tmp_path):
    h5py, src = pytest.importorskip("h5py"), tmp_path / "src"
    src.mkdir()
    pictures = [encoded(number, "JPEG") for number in range(NUM)]
    names = {"pictures": "images/rgb_left", "position": "jackal/position", "yaw": "jackal/yaw"}
    bad = {
        "nan": ({"yaw": [*[0.0] * 11, np.nan]}, "yaw is not finite in 1 of 12 frames; got frame 11"),
        "fewer": ({"yaw": np.zeros(9)}, "different numbers of poses"),
        "broken": ({"pictures": [*pictures[:3], b"no picture", *pictures[4:]]}, "frame 3: cannot be read as an image"),
        "frames": ({"pictures": pictures[:9]}, "different numbers of frames and poses; got 9 and 12"),
        "words": ({"yaw": ["north"] * NUM}, "cannot be (read|opened)|could not convert"),
        "group": ({"pictures": None}, "images/rgb_left is missing from the file"),
        "flat": ({"position": np.zeros(NUM)}, "wrong shape of position"),
    }
    for name, (changes, _) in {"a": ({}, ""), "b": ({}, ""), **bad}.items():
        values = {"pictures": pictures, "position": PATH, "yaw": np.zeros(NUM)} | changes
        with h5py.File(src / f"{name}.hdf5", "w") as file:
            for key, value in values.items():
                if value is None:
                    file.create_group(names[key])
                    continue
                longest = max(map(len, pictures)) + 1
                file[names[key]] = np.array(value, f"S{longest}") if isinstance(value[0], bytes | str) else value
    put(src / "cut.hdf5", (src / "a.hdf5").read_bytes()[:3000])
    for name in JUNK:
        put(src / name, "x")
    bad_lines = {name: reason for name, (_, reason) in bad.items()} | {"cut": "cannot be opened as HDF5"}
    check(recon.RECIPE, src, tmp_path / "out", {"a", "b"}, bad_lines, IGNORED)


def test_gnm(tmp_path):
    src, yaw, position = tmp_path / "src", np.zeros(NUM), PATH[:, :2]
    bad = {
        "scalar": (
            {"yaw": 0.5, "position": position},
            "another shape; got position .12, 2., yaw ..; expected position",
        ),
        "nan": ({"yaw": yaw, "position": position * np.nan}, "position is not finite in 12 of 12 frames"),
        "words": ({"yaw": ["north"] * NUM, "position": position}, "its poses are not numbers"),
        "list": ([1, 2], "has no position"),
        "fewer": ({"yaw": yaw[:9], "position": position[:9]}, "different numbers of frames and poses; got 12 and 9"),
        "broken": ({"yaw": yaw, "position": position}, "frame 3: cannot be read as an image"),
        "cut": (None, "traj_data.pkl: not loaded"),
        "none": (None, "traj_data.pkl is missing"),
    }
    good = {"yaw": yaw, "position": position}
    for name, (values, _) in {"a": (good, ""), "b": (good, ""), **bad}.items():
        for number in range(NUM):
            put(src / name / f"{number}.jpg", encoded(number, "JPEG"))
        put(src / name / "traj_data.pkl", pickle.dumps(values))
    put(src / "broken" / "3.jpg", b"")
    put(src / "cut" / "traj_data.pkl", pickle.dumps(good)[:20])
    (src / "none" / "traj_data.pkl").unlink()
    for name in ("a/first.jpg", *JUNK):
        put(src / name, "x")
    bad_lines = {name: reason for name, (_, reason) in bad.items()}
    check(gnm.RECIPE, src, tmp_path / "out", {"a", "b"}, bad_lines, IGNORED | {".jpg": 1})


def test_videos(tmp_path):
    src, t = tmp_path / "src", np.arange(0, 4.5, 0.25)
    good = "\n".join(["t,x,y,yaw", *(f"{s},{s},0,0" for s in t)])
    clip = write_clip(Clip(".mp4", "libx264", options={"preset": "ultrafast"}), tmp_path / "clip.mp4").read_bytes()
    write_clip(Clip(".mkv", "libx264", options={"preset": "ultrafast"}), tmp_path / "clip.mkv")
    bad = {
        "cut": (clip[:500], good, "video cut.mp4: corrupt"), "empty": (b"", good, "video empty.mp4: corrupt"),
        "picture": (encoded(1), good, "video picture: frames and poses do not overlap in time; got frames 0 to 0 s"),
        "bare": (clip, None, "its pose file is missing"),
        "letters": (clip, good.replace("1.0,1.0", "1.0,x"), "a value is not a number"),
        "nan": (clip, good.replace("1.0,1.0", "1.0,nan"), "position is not finite in 1 of 18 poses; got pose 5"),
        "other": (clip, "frame,x,y,yaw\n" + "\n".join(f"{i},{i / 30},0,0" for i in range(100)), "got 121 and 100"),
        "later": (clip, "\n".join(["t,x,y,yaw", *(f"{s + 99},{s},0,0" for s in t)]), "do not overlap in time"),
        "column": (clip, good.replace("yaw", "roll"), "a column is missing"), "blank": (clip, "", "blank.csv: empty"),
    }  # fmt: skip
    for name, (data, poses, _) in {"a": (clip, good, ""), **bad}.items():
        put(src / f"{name}.mp4", data)
        if poses is not None:
            put(src / f"{name}.csv", poses)
    put(src / "b.recording", (tmp_path / "clip.mkv").read_bytes())  # told by its content
    put(src / "b.txt", good)
    for name in ("cover.jpg", "stray.csv", "c.doc", *JUNK):
        put(src / name, "x")
    bad_lines = {name: reason for name, (_, _, reason) in bad.items()}
    check(VIDEO, src, tmp_path / "out", {"a", "b"}, bad_lines, IGNORED | {".csv": 1, ".doc": 1, ".jpg": 1})


def test_frames_of_any_format_and_suffix_are_frames_and_what_programs_leave_is_none(tmp_path):
    src = tmp_path / "src"
    for name, suffix, format in (("a", ".webp", "WEBP"), ("b", "", "PNG"), ("c", ".BMP", "BMP"), ("d", ".JPG", "JPEG")):
        for number in range(NUM):
            put(src / name / f"{number}{suffix}", encoded(number, format))
        put(src / name / "poses.csv", "\n".join(["t,x,y,yaw", *(f"{s},{s},0,0" for s in T)]))
        put(src / name / "._0.jpg", b"x")  # of a disk that was copied by a Mac
    (src / "d").rename(tmp_path / "elsewhere")
    (src / "d").symlink_to(tmp_path / "elsewhere")
    options = {"src": str(src), "split": "nwm-legacy", "val_fraction": "0.5"}
    assert FRAMES.plan(options)[0] == f"Read 4 folders of frames of 4 recordings from {src}."
    manifest = FRAMES.build(tmp_path / "out", options)
    found = {one.id: one for split in ("train", "val") for one in read_trajectories(tmp_path / "out", split)}
    assert set(found) == set("abcd") and manifest["rejected"] == 0 and manifest["ignored"] == {"hidden file": 4}
    for one in found.values():
        shown = [np.asarray(Image.open(one.frame_file(index))).mean() - 40 for index in range(NUM)]
        np.testing.assert_allclose(shown, range(NUM), atol=1)


def test_a_mix(world, tmp_path):
    """Frames that are gone or damaged leave their trajectory out; poses that are damaged refuse the folder."""
    for name in "ab":
        shutil.copytree(world, tmp_path / name)
    every = [one for split in ("train", "val") for one in read_trajectories(tmp_path / "a", split)]
    gone, broken = (one for one in read_trajectories(tmp_path / "a", "train")[:2])
    gone.frame_file(3).unlink()
    broken.frame_file(3).write_bytes(b"no picture")
    options = {"src": f"{tmp_path / 'a'},{tmp_path / 'b'}"}
    manifest = trajectory_mix.RECIPE.build(tmp_path / "mix", options)
    rejects = [json.loads(line) for line in (tmp_path / "mix" / "rejects.jsonl").read_text().splitlines()]
    assert manifest["rejected"] == 2 and {one["trajectory"] for one in rejects} == {f"a-{gone.id}", f"a-{broken.id}"}
    assert "FileNotFoundError" in rejects[0]["reason"] and "cannot be read as an image" in rejects[1]["reason"]
    assert sum(entry["num_trajectories"] for entry in manifest["splits"].values()) == 2 * len(every) - 2
    next((tmp_path / "b" / "poses").iterdir()).write_bytes(b"x")
    with pytest.raises(DataError, match="poses cannot be read; got ValueError. Run `raev2 data verify"):
        trajectory_mix.RECIPE.build(tmp_path / "no", options)


def test_a_simulator_that_fails_in_one_maze_costs_the_drives_of_this_maze(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom")
    record, options = vizdoom_maze.record, {"num_train": "3", "num_val": "1", "drives_per_maze": "1", "cells": "3"}

    def failing(engine, number, seed, num_frames):
        if seed[0] == 1:
            raise DataError("maze 1", "the engine has stopped")
        return record(engine, number, seed, num_frames)

    monkeypatch.setattr(vizdoom_maze, "record", failing)
    manifest = vizdoom_maze.RECIPE.build(tmp_path / "out", options | {"num_frames": "12"})
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reject == {"path": "maze 1", "reason": "maze 1: the engine has stopped"} and manifest["rejected"] == 1
    assert [entry["num_trajectories"] for entry in manifest["splits"].values()] == [2, 1]
