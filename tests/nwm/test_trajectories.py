"""Folders of trajectories: what is written, left out, read back and verified; checks, splits, indices, pickles."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trajectory_folders import frame, walk, write

from raev2.errors import DataError, SpecError
from raev2.files.manifest import read_manifest
from raev2_tasks.nwm.data.commands import index as index_command
from raev2_tasks.nwm.data.commands import validate as validate_command
from raev2_tasks.nwm.data.frames import fit_image, letterbox_box
from raev2_tasks.nwm.data.index import build_index, import_nwm_index, read_index, write_index
from raev2_tasks.nwm.data.safe_pickle import load_pickle
from raev2_tasks.nwm.data.trajectories import Storage, read_trajectories, verify_trajectories
from raev2_tasks.nwm.data.validate import heading_error, warnings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recordings a to d with two trajectories of 30 frames each; one recording is for validation."""
    write(tmp_path / "data", [walk(f"{name}-{part}", 30) for name in "abcd" for part in range(2)])
    return tmp_path / "data"


# The folder.


def test_what_is_written_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    path, yaw = rng.normal(size=(6, 2)), np.array([3.0, 3.1, -3.1, -3.0, 3.0, 3.1])
    one = walk("a b/1", 6, position=path, yaw=yaw, command=rng.normal(size=(6, 2)))
    manifest = write(tmp_path / "data", [one, walk("c", 5)], Storage(suffix=".png", val_fraction=0.5))
    assert manifest == read_manifest(tmp_path / "data")
    assert {split: entry["num_samples"] for split, entry in manifest["splits"].items()} in (
        {"train": 5, "val": 6}, {"train": 6, "val": 5},
    )  # fmt: skip
    stored = {found.id: found for split in ("train", "val") for found in read_trajectories(tmp_path / "data", split)}[
        "a_b_1"
    ]
    np.testing.assert_array_equal(stored.poses[:, :2], path)
    np.testing.assert_allclose(stored.poses[:, 2], np.unwrap(yaw))  # no jumps left
    np.testing.assert_array_equal(stored.command, one.command)
    assert np.asarray(Image.open(stored.frame_file(3)))[0, 0, 0] == 43
    assert verify_trajectories(tmp_path / "data") == manifest


def test_statistics_are_those_of_the_training_split(folder):
    manifest = read_manifest(folder)
    assert manifest["spacing_m"] == pytest.approx(0.5)
    assert manifest["actions"]["forward_m"]["quantiles"] == [0.5] * 5
    assert manifest["actions"]["turn_rad"] == {"quantiles": [0.0] * 5, "mean": 0.0, "std": 0.0}
    assert manifest["warnings"] == [] and "p[i+1] - p[i]" in manifest["formulas"]["spacing_m"]


def test_a_recording_is_in_one_split_only(folder):
    parents = {split: {one.recording for one in read_trajectories(folder, split)} for split in ("train", "val")}
    assert len(parents["train"]) == 3 and len(parents["val"]) == 1 and not parents["train"] & parents["val"]


def test_the_legacy_split_cuts_through_recordings_and_says_so(tmp_path):
    many = [walk(f"a-{part}", 20) for part in range(10)]
    with pytest.raises(DataError, match="nothing for the split val; got 10 trajectories. Use split=by-time"):
        write(tmp_path / "strict", many)
    manifest = write(tmp_path / "data", many, Storage(suffix=".png", split="nwm-legacy", val_fraction=0.2))
    assert manifest["splits"]["val"]["num_trajectories"] == 4 and manifest["split_rule"] == "nwm-legacy"
    assert manifest["warnings"] == ["1 of 1 recordings have trajectories in both splits (leakage)"]


BAD = {
    "another number": (walk("x", 9, frames=[frame(0)] * 8), "different numbers of frames and poses; got 8 and 9"),
    "poses differ": (walk("x", 9, yaw=np.zeros(8)), "different numbers of poses; got t 9, position 9, yaw 8"),
    "time": (walk("x", 6, t=np.array([0, 1, 2, 3, 3, 4.0])), r"time does not increase; got 3 s, then 3 s at frame 4"),
    "nan": (walk("x", 9, yaw=np.array([0] * 8 + [np.nan])), "yaw is not finite in 1 of 9 frames; got frame 8"),
    "short": (walk("x", 4), "too short; got 4 frames; expected at least 5"),
    "shape": (walk("x", 9, position=np.zeros((9, 3))), r"wrong shape of position; got \(9, 3\); expected \(T, 2\)"),
    "size": (
        walk("x", 6, frames=[frame(0)] * 5 + [frame(0, (10, 10))]), "frame 5 has another size; got 10x10; expected 32",
    ),
    "corrupt": (walk("x", 5, frames=[b"no picture"] * 5), "frame 0: cannot be read as an image; got UnidentifiedImage"),
    "name": (walk("b-0", 9), "its name is empty or taken; got b-0"),
    "commands": (walk("x", 9, command=np.zeros((8, 2))), "different numbers of commands and poses; got 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_trajectory_is_left_out_with_its_reason_and_the_others_are_used(case, tmp_path):
    bad, message = BAD[case]
    manifest = write(tmp_path / "data", [walk("a-0", 9), walk("b-0", 9), bad])
    assert manifest["rejected"] == 1
    assert sum(entry["num_trajectories"] for entry in manifest["splits"].values()) == 2
    (reject,) = [json.loads(line) for line in (tmp_path / "data" / "rejects.jsonl").read_text().splitlines()]
    assert re.search(message, reject["reason"]) and reject["trajectory"] == bad.id
    verify_trajectories(tmp_path / "data")  # nothing of it is left behind


def test_nothing_usable_is_an_error_that_quotes_the_first_reason(tmp_path):
    with pytest.raises(DataError, match="no usable trajectory; 1 rejected. First of them: trajectory x: too short"):
        write(tmp_path / "data", [walk("x", 3)])


def test_verify_names_the_file_that_differs(folder):
    file = next((folder / "frames").glob("*/000007.png"))
    good = file.read_bytes()
    file.write_bytes(good + b"\0")
    with pytest.raises(DataError, match=r"000007\.png: SHA-256 differs"):
        verify_trajectories(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"000007\.png: file is missing"):
        verify_trajectories(folder)
    file.write_bytes(good)
    (folder / "frames" / "stray").mkdir()
    with pytest.raises(DataError, match="stray: a folder that no index lists"):
        verify_trajectories(folder)
    (folder / "frames" / "stray").rmdir()
    poses = next((folder / "poses").iterdir())
    poses.write_bytes(poses.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{poses.name}: SHA-256 differs"):
        verify_trajectories(folder)


def test_other_folders_are_refused(tmp_path, synthetic_data, folder):
    with pytest.raises(
        DataError, match="no trajectories; got data of the recipe synthetic; expected a folder built by"
    ):
        read_trajectories(synthetic_data, "train")
    with pytest.raises(DataError, match="unknown split; got test; expected one of train, val"):
        read_trajectories(folder, "test")
    with pytest.raises(DataError, match="no dataset folder here"):
        read_trajectories(tmp_path, "train")


# Warnings.


def _warned(trajectories, tmp_path, **facts) -> str:
    return "\n".join(write(tmp_path / "data", trajectories, **facts)["warnings"])


def test_a_missing_yaw_offset_is_found(tmp_path):
    rng = np.random.default_rng(0)
    yaw = np.cumsum(rng.normal(0, 0.1, 40))
    path = np.cumsum(np.column_stack([np.cos(yaw), np.sin(yaw)]), axis=0)
    walks = [walk(f"{name}-0", 40, position=path, yaw=yaw - np.pi / 2) for name in "as"]
    assert re.search(
        r"motion points \+(8|9)\d degrees away from the yaw.*lacks an offset", _warned(walks, tmp_path / "1")
    )
    walks = [walk(f"{name}-0", 40, position=path, yaw=yaw + np.pi) for name in "as"]
    assert "camera looks backwards" in _warned(walks, tmp_path / "2")
    assert _warned([walk(f"{name}-0", 40, position=path, yaw=yaw) for name in "as"], tmp_path / "3") == ""


def test_heading_errors_near_half_a_circle_do_not_cancel():
    class One:
        poses = np.column_stack([np.arange(9.0), np.zeros(9), np.pi + np.array([0.1, -0.1] * 4 + [0.1])])

    error, count = heading_error([One()], 1.0)
    assert count == 8 and abs(error) > 3


def test_oddities_are_counted(tmp_path):
    jumping = np.column_stack([np.arange(30) / 2, np.zeros(30)])
    jumping[15:] += 40
    text = _warned([walk("a-0", 30, position=jumping), walk("b-0", 10)], tmp_path / "1")
    assert "1 of 38 steps are longer than 5 times the median (teleport?)" in text
    assert "1 of 2 trajectories have fewer than 20 frames (shortest 10)" in text
    still = [walk(f"{name}-0", 30, position=np.zeros((30, 2))) for name in "ab"]
    assert "100% of the steps do not move" in _warned(still, tmp_path / "2")
    text = _warned(
        [walk(f"{name}-0", 30, frames=[np.zeros((8, 8, 3), np.uint8)] * 30) for name in "ab"], tmp_path / "3"
    )
    assert "58 of 60 frames equal the one before although the pose changed" in text
    assert "60 of 60 frames are nearly black" in text
    assert "frame periods differ from 1/5 s" in _warned([walk("a-0", 30), walk("b-0", 30)], tmp_path / "4", rate_hz=5.0)


def test_warnings_of_trajectories_without_motion():
    assert warnings([], [], 1.0, 4.0) == ["no motion at all: no trajectory has two frames"]


# Frames.


def gradient(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row, blue is 255: black padding is seen at once."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    "size", [(160, 120), (150, 120), (192, 108), (90, 160)], ids=["4:3", "5:4", "16:9", "portrait"]
)
@pytest.mark.parametrize("fit", ["squeeze", "crop"])
def test_nothing_is_padded(size, fit):
    image = np.asarray(fit_image(gradient(*size), (32, 32), fit))
    assert image.shape == (32, 32, 3) and (image[..., 2] > 250).all()


def test_squeeze_keeps_the_field_of_view_and_crop_does_not():
    squeezed = np.asarray(fit_image(gradient(160, 120), (32, 32), "squeeze")).astype(int)
    cropped = np.asarray(fit_image(gradient(160, 120), (32, 32), "crop")).astype(int)
    assert squeezed[0, 0, 0] < 8 and squeezed[0, -1, 0] > 247
    assert 30 < cropped[0, 0, 0] < 40 and 215 < cropped[0, -1, 0] < 225


def test_letterbox_keeps_everything_and_says_where():
    image = np.asarray(fit_image(gradient(160, 120), (32, 32), "letterbox"))
    left, top, right, bottom = letterbox_box((160, 120), (32, 32))
    assert (left, top, right, bottom) == (0, 4, 32, 28)
    assert (image[:4] == 0).all() and (image[28:] == 0).all() and (image[4:28, :, 2] > 250).all()


def test_another_aspect_is_refused_without_a_fit():
    assert fit_image(gradient(160, 120), (24, 32), "none").size == (32, 24)
    with pytest.raises(
        DataError, match="another aspect than the model's images; got 160x120; expected 32x32. Choose fit"
    ):
        fit_image(gradient(160, 120), (32, 32), "none")


# Indices.


def test_an_index_takes_every_candidate_or_draws_some(folder):
    every = build_index(folder, "planning", split="train")
    assert [place.t for place in every.places[:3]] == [3, 11, 19] and len(every.places) == 18
    assert every.offsets == (8,) and every.made_by["candidates"] == 18
    some = build_index(folder, "planning", split="train", num=5, seed=1)
    assert len(some.places) == 5 and set(some.places) != set(
        build_index(folder, "planning", split="train", num=5).places
    )
    assert some == build_index(folder, "planning", split="train", num=5, seed=1)
    assert len({place.noise_seed for place in every.places}) == 18
    backwards = build_index(folder, "time", split="train", offsets=(-5, 10), stride=1)
    assert min(place.t for place in backwards.places) == 5 and max(place.t for place in backwards.places) == 19


def test_an_index_is_stored_with_the_data_it_belongs_to(folder, tmp_path):
    made = build_index(folder, "time", offsets=(4, 8), num=3)
    write_index(made, folder)
    assert read_index(folder, "time") == made and read_index(folder, "time").sha256 == made.sha256
    verify_trajectories(folder)
    file = folder / "index" / "time.json"
    write_index(made, folder)
    with pytest.raises(DataError, match=r"time\.json: exists already, with other places\. Give this one a --name"):
        write_index(build_index(folder, "time", offsets=(4, 8), num=3, seed=1), folder)
    assert read_index(folder, "time") == made
    file.write_text(file.read_text().replace(made.fingerprint, "0" * 64))
    with pytest.raises(DataError, match="made from other data; got 000000000000; expected .* Build it again"):
        read_index(folder, "time")
    with pytest.raises(DataError, match="there is none. Make it with `raev2 nwm index build"):
        read_index(folder, "planning")
    file.write_text("{}")
    with pytest.raises(DataError, match=r"time\.json: damaged"):
        read_index(folder, "time")


def test_impossible_indices_are_refused(folder):
    with pytest.raises(
        DataError, match="no trajectory of val is long enough for the protocol time; got at most 30 frames"
    ):
        build_index(folder, "time")
    with pytest.raises(SpecError, match="unknown protocol; got 'tim'; .* Did you mean 'time'?"):
        build_index(folder, "tim")


def test_index_files_of_nwm_are_imported(folder, tmp_path):
    name = read_trajectories(folder, "val")[0].id
    file = tmp_path / "navigation_eval.pkl"
    file.write_bytes(pickle.dumps([(name, 3, 8, 8), (name, np.int64(11), 8, 8)]))
    index = import_nwm_index(file, folder)
    assert [(place.trajectory, place.t) for place in index.places] == [(name, 3), (name, 11)] and index.offsets == (8,)
    file.write_bytes(pickle.dumps([("elsewhere", 3, 8, 8)]))
    with pytest.raises(DataError, match="trajectory elsewhere is not in the split val"):
        import_nwm_index(file, folder)
    file.write_bytes(pickle.dumps([(name, 27, 8, 8)]))
    with pytest.raises(
        DataError, match="out of reach; got frame 27, frames 27 to 35 are needed; expected context of 4"
    ):
        import_nwm_index(file, folder)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="not an index"):
        import_nwm_index(file, folder)


def test_the_commands(folder, tmp_path, capsys):
    index_command(["build", str(folder), "--protocol", "planning", "--num", "2"])
    assert "2 places, offsets 8 to 8" in capsys.readouterr().out and len(read_index(folder, "planning").places) == 2
    validate_command([str(folder)])
    text = capsys.readouterr().out
    assert "train: 6 trajectories of 3 recordings, 180 frames" in text
    assert "heading: motion points +0.0 degrees from the yaw" in text
    assert "protocol time needs 68 frames: 0 of 8 trajectories have them (0% of the frames)" in text
    next((folder / "frames").glob("*/000003.png")).write_bytes(b"")
    with pytest.raises(DataError, match=r"000003\.png: cannot be read as an image"):
        validate_command([str(folder)])
    validate_command([str(folder), "--fast"])


# Pickles.


class Evil:
    def __reduce__(self):
        return (print, ("arbitrary code",))


def test_pickles_of_values_and_arrays_are_read(tmp_path):
    values = {"position": np.arange(6.0).reshape(3, 2), "yaw": np.float32(1.5), "name": ("a", [1, None, True])}
    for protocol in range(2, 6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(values, protocol=protocol))
        loaded = load_pickle(tmp_path / "x.pkl")
        np.testing.assert_array_equal(loaded["position"], values["position"])
        assert loaded["yaw"] == 1.5 and loaded["name"] == values["name"]


def test_pickles_that_run_code_are_refused(tmp_path, capsys):
    for value in (Evil(), {"position": Evil()}, np.array([Evil()], dtype=object)):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(
            DataError, match=r"only plain values and arrays are; got UnpicklingError: it asks for .*print"
        ):
            load_pickle(tmp_path / "x.pkl")
    assert capsys.readouterr().out == ""
    (tmp_path / "x.pkl").write_bytes(b"\x80garbage")
    with pytest.raises(DataError, match="not loaded"):
        load_pickle(tmp_path / "x.pkl")
    with pytest.raises(DataError, match="cannot be read; got No such file"):
        load_pickle(tmp_path / "none.pkl")
