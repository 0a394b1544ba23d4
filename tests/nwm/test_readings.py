"""Pose files in every unit and convention: a simulated drive is written so, read, and compared with the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from raev2.errors import DataError, SpecError
from raev2.files.manifest import read_manifest
from raev2_data_recipes.drives.pose_files import RawPoses, read_raw_poses
from raev2_data_recipes.drives.readings import Reading, apply_reading, parse_words, understand
from raev2_data_recipes.drives.video_poses import FRAMES
from raev2_tasks.nwm.data.trajectories import read_trajectories
from raev2_tasks.nwm.pose import accumulate, steps

RATE = 10.0


def drive(seed: int, num: int = 200) -> np.ndarray:
    """Poses (T, 3) of a robot that bends left and right, stops at times and reverses a little."""
    rng = np.random.default_rng(seed)
    turn = np.convolve(rng.normal(0, 0.15, num + 20), np.ones(20) / 20, "same")[:num] + 0.01
    speed = rng.uniform(0.5, 1.5) * np.where(rng.random(num) < 0.05, 0, 1)
    first = int(rng.integers(num - 10))
    speed[first : first + 8] *= -0.4
    motions = np.column_stack([speed / RATE, rng.normal(0, 0.002, num), turn])
    return accumulate(motions, [3.0, -2.0, rng.uniform(-3, 3)])


# The truth as files of each convention. World of the truth: x ahead at yaw 0, y left, z up.
X_AHEAD = np.eye(3)
CAMERA = np.array(
    [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
)  # columns: what x right, y down, z ahead are in the robot's frame
OPENGL = np.array([[0, 0, -1], [-1, 0, 0], [0, 1, 0]])  # x right, y up, z back


def table(poses: np.ndarray, t: np.ndarray, names: str = "t,x,y,yaw") -> str:
    return "\n".join([names, *(",".join(map(repr, map(float, row))) for row in np.column_stack([t, poses]))])


def in_space(poses: np.ndarray, body: np.ndarray, world: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and rotations of a moving frame with the axes `body`, in a world turned by `world`."""
    turned = Rotation.from_euler("z", poses[:, 2:]).as_matrix() @ body
    position = np.column_stack([poses[:, :2], np.full(len(poses), 0.3)])
    return position @ world.T, world @ turned


def tum(poses: np.ndarray, t: np.ndarray, body: np.ndarray, world: np.ndarray = X_AHEAD, first_w: bool = False) -> str:
    position, rotation = in_space(poses, body, world)
    quaternion = Rotation.from_matrix(rotation).as_quat(scalar_first=first_w)
    rows = np.column_stack([t, position, quaternion])
    return "\n".join(" ".join(map(repr, map(float, row))) for row in rows)


def kitti(poses: np.ndarray, body: np.ndarray, world: np.ndarray, inverse: bool = False) -> str:
    position, rotation = in_space(poses, body, world)
    if inverse:
        rotation = rotation.transpose(0, 2, 1)
        position = -(rotation @ position[..., None])[..., 0]
    rows = np.concatenate([rotation, position[..., None]], axis=2).reshape(len(poses), 12)
    return "\n".join(" ".join(map(repr, map(float, row))) for row in rows)


def turned(poses: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.column_stack([poses[:, :2], change(poses[:, 2])])


Writer = Callable[[np.ndarray, np.ndarray], str]
DEG, ONE = np.array([1, 1, 180 / np.pi]), np.ones(3)
FOUND: dict[str, tuple[set[str], Writer]] = {
    "plain": (set(), lambda p, t: table(p, t)),
    "plain, since 1970": (set(), lambda p, t: table(p, t + 1.7e9)),
    "wrapped": (set(), lambda p, t: table(turned(p, lambda yaw: np.angle(np.exp(1j * yaw))), t)),
    "degrees": ({"degrees"}, lambda p, t: table(p * DEG, t)),
    "degrees from 0 to 360": ({"degrees"}, lambda p, t: table(turned(p, lambda yaw: np.rad2deg(yaw) % 360), t)),
    "degrees, by name": (set(), lambda p, t: table(p * DEG, t, "t,x,y,yaw_deg")),
    "milliseconds": ({"ms"}, lambda p, t: table(p, t * 1e3)),
    "milliseconds since 1970": ({"ms"}, lambda p, t: table(p, (t + 1.7e9) * 1e3)),
    "microseconds": ({"us"}, lambda p, t: table(p, t * 1e6)),
    "nanoseconds": ({"ns"}, lambda p, t: table(p, t * 1e9)),
    "nanoseconds, by name": (set(), lambda p, t: table(p, t * 1e9, "timestamp [ns],x [m],y [m],yaw [rad]")),
    "degrees and nanoseconds": ({"degrees", "ns"}, lambda p, t: table(p * DEG, t * 1e9)),
    "compass": (
        {"compass", "degrees"},
        lambda p, t: table(turned(p, lambda yaw: (90 - np.rad2deg(yaw)) % 360), t),
    ),
    "robot, TUM": (set(), lambda p, t: tum(p, t, X_AHEAD)),
    "robot, w first": ({"wxyz"}, lambda p, t: tum(p, t, X_AHEAD, first_w=True)),
    "camera in a world with z up": ({"camera"}, lambda p, t: tum(p, t, CAMERA)),
    "camera in a world like the camera": ({"camera"}, lambda p, t: tum(p, t, CAMERA, CAMERA.T)),
    "camera, w first": ({"camera", "wxyz"}, lambda p, t: tum(p, t, CAMERA, first_w=True)),
    "OpenGL in a world with y up": ({"opengl"}, lambda p, t: tum(p, t, OPENGL, OPENGL.T)),
    "camera, KITTI": ({"camera"}, lambda p, t: kitti(p, CAMERA, CAMERA.T)),
    "camera from the world, KITTI": ({"camera", "inverse"}, lambda p, t: kitti(p, CAMERA, CAMERA.T, inverse=True)),
}  # fmt: skip


def raw(text: str, folder: Path) -> RawPoses:
    (folder / "poses.txt").write_text(text)
    return read_raw_poses(folder / "poses.txt")


@pytest.mark.parametrize("name", list(FOUND))
def test_the_reading_that_explains_the_motion_is_found_and_gives_the_true_motions(name, tmp_path):
    words, write = FOUND[name]
    for seed in range(8):
        truth, t = drive(seed), np.arange(200) / RATE
        one = raw(write(truth, t), tmp_path)
        found = understand("poses", [one], period_s=1 / RATE)
        assert found.words == words, seed
        read = apply_reading(one, found)
        np.testing.assert_allclose(steps(read.poses), steps(truth), atol=1e-6)
        if read.t is not None:
            np.testing.assert_allclose(np.diff(read.t), 1 / RATE, atol=1e-6)
        assert all(f"reading={','.join(sorted(words))}" in "\n".join(found.lines) or len(words) > 1 for _ in words)


MIRROR = "yaw runs clockwise .*; or y points to the right"
ASKED: dict[str, tuple[str, str, Writer]] = {
    "clockwise": ("clockwise", MIRROR, lambda p, t: table(p * [1, 1, -1], t)),
    "y-right": ("y-right", MIRROR, lambda p, t: table(p * [1, -1, 1], t)),
    "offset": (
        "yaw+90", r"90 degrees must be added to the yaw \(--set reading=yaw.90",
        lambda p, t: table(p - [0, 0, np.pi / 2], t),
    ),
    "backwards": ("yaw+180", "the camera looks back", lambda p, t: table(p + [0, 0, np.pi], t)),
    "millimetres": (
        "millimetres", r"not possible; got a speed of .* metres a second. Explained by: lengths in millimetres "
        r"\(--set reading=millimetres\); or lengths in centimetres", lambda p, t: table(p * [1e3, 1e3, 1], t),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ASKED))
def test_what_the_motion_cannot_decide_is_refused_with_each_way_out(name, tmp_path):
    word, message, write = ASKED[name]
    truth, t = drive(3), np.arange(200) / RATE
    one = raw(write(truth, t), tmp_path)
    with pytest.raises(DataError, match=message):
        understand("poses", [one])
    stated = understand("poses", [one], words=parse_words("reading", word))
    np.testing.assert_allclose(steps(apply_reading(one, stated).poses), steps(truth), atol=1e-6)


def test_a_plain_drive_is_never_read_otherwise(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(60):
        truth = drive(seed, int(rng.integers(30, 400)))
        noisy = truth + rng.normal(0, [0.005, 0.005, 0.03], truth.shape)
        period = float(rng.choice([0.005, 0.02, 0.1, 0.25, 1.0]))
        one = RawPoses(
            "x", np.column_stack([noisy[:, :2], np.zeros(len(noisy))]), noisy[:, 2], t=np.arange(len(noisy)) * period
        )
        assert understand("poses", [one]).words == frozenset()


def test_a_contradiction_stops_unless_told_otherwise_and_standing_still_proves_nothing(tmp_path):
    truth, t = drive(3), np.arange(200) / RATE
    sideways = raw(table(truth + [0, 0, 1.3], t), tmp_path)  # 75 degrees: no convention explains it
    with pytest.raises(
        DataError,
        match=r"the heading contradicts the motion; got 7\d degrees between them \(median\); expected at most 60. "
        r"If the data are meant so: --set heading=keep",
    ):
        understand("poses", [sideways])
    assert understand("poses", [sideways], keep=True).lines[-1].startswith("Heading: 7")
    assert understand("poses", [raw(table(truth + [0, 0, 0.8], t), tmp_path)]).words == frozenset()  # 46 degrees
    tremble = np.random.default_rng(0).normal(0, [0.003, 0.003, 0.01], (300, 3))
    for standing in (np.zeros((50, 3)), tremble):
        still = raw(table(standing, np.arange(len(standing)) / RATE), tmp_path)
        assert understand("poses", [still]).lines == ["Heading: too little motion to test it."]
    fast = np.column_stack([np.arange(600) * 0.005, np.zeros(600), np.zeros(600)])  # 1 m/s at 200 Hz
    noisy = raw(table(fast + np.tile(tremble, (2, 1)), np.arange(600) / 200), tmp_path)
    assert understand("poses", [noisy]).error < 8


def test_words_of_the_option_are_checked():
    assert parse_words("reading", "auto") is None and parse_words("reading", "plain") == frozenset()
    assert parse_words("reading", "degrees, ns") == {"degrees", "ns"}
    with pytest.raises(SpecError, match="reading: unknown word; got grads; expected auto, plain, or some of degrees"):
        parse_words("reading", "grads")
    with pytest.raises(SpecError, match="reading: words exclude each other; got ms, ns"):
        parse_words("reading", "ms,ns")


def test_given_axes_hold(tmp_path):
    truth, t = drive(1), np.arange(200) / RATE
    one = raw(tum(truth, t, CAMERA, CAMERA.T), tmp_path)
    found = understand("poses", [one], up="-y", optical="z")
    assert found.words == frozenset()
    np.testing.assert_allclose(steps(apply_reading(one, found).poses), steps(truth), atol=1e-6)
    with pytest.raises(DataError, match="the heading contradicts the motion"):
        understand("poses", [one], optical="-x")
    assert apply_reading(one, Reading(up="y", optical="z")).poses[5, 2] == pytest.approx(
        -apply_reading(one, found).poses[5, 2]
    )


# Through the recipe.


def write_folder(folder: Path, text: str, num: int, name: str = "{:04d}.png") -> None:
    folder.mkdir(parents=True)
    for number in range(num):
        Image.new("RGB", (16, 12), (number, 90, 90)).save(folder / name.format(number))
    (folder / "poses.csv").write_text(text)


def test_plan_and_build_name_the_reading_and_the_manifest_keeps_it(tmp_path):
    src, t = tmp_path / "src", np.arange(40) / 4
    truth = {name: drive(seed, 40) for seed, name in enumerate(("a_0", "b_0", "c_0"))}
    for name, poses in truth.items():
        write_folder(src / name, table(poses * DEG, t * 1e3), 40)
    options = {"src": str(src), "val_fraction": "0.3"}
    lines = FRAMES.plan(options)
    assert lines[0] == f"Read 3 folders of frames of 3 recordings from {src}."
    assert lines[1] == "Poses: times in milliseconds: they are 0.25 s apart, not 250 s. (reading=ms)"
    assert lines[2].startswith("Poses: yaw in degrees: the heading is then ") and "(reading=degrees,ms)" in lines[2]
    FRAMES.build(tmp_path / "out", options)
    assert read_manifest(tmp_path / "out")["reading"] == {"words": ["degrees", "ms"], "lines": lines[1:4]}
    for split in ("train", "val"):
        for one in read_trajectories(tmp_path / "out", split):
            np.testing.assert_allclose(steps(one.poses), steps(truth[one.id]), atol=1e-6)
            np.testing.assert_allclose(one.t, t, atol=1e-6)


def test_one_file_that_contradicts_the_others_stops_the_build_by_name(tmp_path):
    src, t = tmp_path / "src", np.arange(40) / 4
    for seed, name in enumerate(("a_0", "b_0", "c_0", "d_0")):
        poses = drive(seed, 40)
        write_folder(src / name, table(poses * DEG if name == "c_0" else poses, t), 40)
    with pytest.raises(
        DataError, match=r"c_0/poses.csv: the heading contradicts .* yaw in degrees .--set reading=degrees"
    ):
        FRAMES.build(tmp_path / "out", {"src": str(src)})
    FRAMES.build(tmp_path / "out", {"src": str(src), "heading": "keep"})


def test_frames_are_associated_with_poses_by_their_times(tmp_path):
    src, start = tmp_path / "src", 1_403_636_579_000_000_000
    t = np.arange(0, 20, 0.05)  # 20 Hz
    for seed, name in enumerate(("a_0", "b_0")):
        poses = drive(seed, len(t))
        write_folder(src / name, table(poses, t + start * 1e-9), 0)
        for number in range(60):  # 4 Hz, from 1 s on
            stamp = start + 10**9 + number * 250_000_000
            Image.new("RGB", (16, 12), (number, 90, 90)).save(src / name / f"{stamp}.png")
        for gone in (20, 21, 22):
            (src / name / f"{start + 10**9 + gone * 250_000_000}.png").unlink()
    FRAMES.build(tmp_path / "out", {"src": str(src), "split": "nwm-legacy", "val_fraction": "0.4"})
    found = [one for split in ("train", "val") for one in read_trajectories(tmp_path / "out", split)]
    assert sorted((one.id, len(one)) for one in found) == [("a_0_0", 20), ("a_0_1", 37), ("b_0_0", 20), ("b_0_1", 37)]
    for one in found:
        truth = drive("ab".index(one.id[0]), len(t))
        for index in range(len(one)):
            number = int(np.asarray(Image.open(one.frame_file(index)))[0, 0, 0])
            np.testing.assert_allclose(one.poses[index, :2], truth[20 + number * 5, :2], atol=1e-3)


def test_a_single_recording_is_split_by_time_with_a_gap(tmp_path):
    src, t = tmp_path / "src", np.arange(200) / 4
    write_folder(src / "a_0", table(drive(0), t), 200)
    with pytest.raises(
        DataError, match="nothing for the split val; got 1 trajectories. Use split=by-time to keep the end"
    ):
        FRAMES.build(tmp_path / "out", {"src": str(src)})
    options = {"src": str(src), "split": "by-time", "val_fraction": "0.2", "split_gap_s": "5"}
    manifest = FRAMES.build(tmp_path / "out", options)
    (train,), (val,) = (read_trajectories(tmp_path / "out", split) for split in ("train", "val"))
    assert train.t[0] == 0 and val.t[-1] == t[-1] and manifest["split_rule"] == "by-time"
    assert val.t[0] == pytest.approx(t[-1] * 0.8, abs=0.25) and val.t[0] - train.t[-1] == pytest.approx(5, abs=0.3)
    shown = [np.asarray(Image.open(val.frame_file(index)))[0, 0, 0] for index in range(len(val))]
    assert shown == list(range(200 - len(val), 200))


def test_bad_folders_are_counted_each_with_its_reason_and_nothing_else_is_lost(tmp_path):
    src, t = tmp_path / "src", np.arange(12) / 4
    straight = np.column_stack([t, 0 * t, 0 * t])
    good = table(straight, t)
    for name in ("a_0", "b_0"):
        write_folder(src / name, good, 12)
    for name, text in {
        "letters": good.replace("1.5", "north"), "short": "\n".join(good.splitlines()[:4]), "empty": "",
        "backwards": table(straight, t[::-1]), "nan": good.replace("2.0,2.0", "2.0,nan"),
        "fewer": table(straight[:9], t[:9]),
    }.items():  # fmt: skip
        write_folder(src / name, text, 3 if name == "short" else 12)
    write_folder(src / "nopose", good, 12)
    (src / "nopose" / "poses.csv").unlink()
    write_folder(src / "broken", good, 12)
    (src / "broken" / "0005.png").write_bytes(b"no picture")
    for file in ("Thumbs.db", "notes.md", "a_0/track.gpx", ".cache/x.png"):
        (src / file).parent.mkdir(exist_ok=True)
        (src / file).write_bytes(b"x")
    options = {"src": str(src)}
    lines = FRAMES.plan(options)
    assert lines[0].startswith("Read 10 folders of frames of 10 recordings") and "1 of them without poses" in lines[0]
    assert "By their poses all 10 give 3 trajectories with 36 frames." in lines  # one has a broken picture
    assert any(line.startswith("Left out: poses ") and "pose 9" in line for line in lines)
    assert lines[-1] == "Ignored: 4 files (.gpx: 1, .md: 1, Thumbs.db: 1, folder .cache: 1)."
    manifest = FRAMES.build(tmp_path / "out", options)
    reasons = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (
        manifest["rejected"] == len(reasons) == 8
        and sum(s["num_trajectories"] for s in manifest["splits"].values()) == 2
    )
    assert sorted(Path(reason["path"]).name for reason in reasons) == [
        "backwards", "broken", "empty", "fewer", "letters", "nan", "nopose", "short",
    ]  # fmt: skip
    assert manifest["ignored"] == {".gpx": 1, ".md": 1, "Thumbs.db": 1, "folder .cache": 1}
