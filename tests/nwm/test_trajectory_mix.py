from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from trajectory_folders import walk, write

from raev2.errors import DataError
from raev2.files.manifest import read_manifest
from raev2.model.frames import FramesCondition
from raev2_data_recipes.drives.trajectory_mix import RECIPE
from raev2_tasks.nwm.cond import model_cond
from raev2_tasks.nwm.data.dataset import TrajectoryDataset
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.data.report_data import describe
from raev2_tasks.nwm.data.trajectories import read_trajectories


def test_a_mix_holds_the_trajectories_of_its_folders_and_keeps_their_splits(world, tmp_path):
    (tmp_path / "a").symlink_to(world)
    (tmp_path / "b").symlink_to(world)
    options, spacing = {"src": f"{tmp_path / 'a'}, {tmp_path / 'b'}"}, read_manifest(world)["spacing_m"]
    told = (
        f"train 72, val 48 frames, {spacing:.3g} {read_manifest(world)['length_unit']} apart, the unit of its motions."
    )
    assert RECIPE.plan(options)[:2] == [f"Copy {tmp_path / name}: {told}" for name in "ab"]
    RECIPE.build(tmp_path / "mix", options)
    for split in ("train", "val"):
        parts, mixed = read_trajectories(world, split), read_trajectories(tmp_path / "mix", split)
        assert [one.id for one in mixed] == [f"{name}-{one.id}" for name in "ab" for one in parts]
        for one, other in zip(parts, mixed, strict=False):
            assert np.array_equal(one.poses, other.poses) and np.array_equal(one.t, other.t)
            assert one.frame_file(7).read_bytes() == other.frame_file(7).read_bytes()
    assert read_manifest(tmp_path / "mix")["rate_hz"] == 4.0
    manifest = RECIPE.verify(tmp_path / "mix")
    assert manifest["split_rule"] == "given" and manifest["options"] == {"src": options["src"]} | {
        name: str(RECIPE.options[name].default) for name in ("size", "fit", "format")
    }
    assert {name: part["spacing_m"] for name, part in manifest["parts"].items()} == {"a": spacing, "b": spacing}


@pytest.fixture
def two_robots(tmp_path):
    """A mix of two folders: half a metre a frame, and two metres a frame along the same path."""
    for name, pace in (("slow", 1), ("fast", 4)):
        walks = [walk(f"{letter}-0", 12) for letter in "abcde"]
        write(tmp_path / name, [replace(one, position=pace * one.position) for one in walks])
    RECIPE.build(tmp_path / "mix", {"src": f"{tmp_path / 'slow'},{tmp_path / 'fast'}"})
    return tmp_path / "mix"


def motions(folder) -> dict[str, float]:
    """What a model is told of one frame ahead, by folder."""
    data = TrajectoryDataset(folder, "train", (24, 32))
    spec = FramesCondition(spacing=data.spacing_m)
    samples = {one.id[:4]: data.sample_at(one.id, 3, 1)["cond"] for one in data.trajectories}
    assert {name: float(cond["action"][0]) for name, cond in samples.items()} == {"slow": 0.5, "fast": 2.0}, "metres"
    conds = {name: {key: value[None] for key, value in cond.items()} for name, cond in samples.items()}
    return {name: float(model_cond(spec, cond)["action"][0, 0]) / spec.spacing for name, cond in conds.items()}


def test_a_model_is_told_motions_in_frames_of_their_own_folder(two_robots):
    assert motions(two_robots) == {"slow": 1.0, "fast": 1.0}
    assert Places(TrajectoryDataset(two_robots, "val", (24, 32)), 1).spacing_m(0) == 0.5
    shown = describe(two_robots)
    assert "slow: 0.500 metre a frame" in shown and "fast: 2.000 metre a frame" in shown
    assert "unit of motions for a model: a frame of the folder that they come from" in shown


def test_a_mix_that_was_built_before_keeps_the_mean_as_its_unit(two_robots):
    """Runs that were trained on it go on with the numbers that they know."""
    for split in ("train", "val"):
        lines = [json.loads(line) for line in (two_robots / f"{split}.jsonl").read_text().splitlines()]
        assert {line.pop("spacing_m") for line in lines} == {0.5, 2.0}
        (two_robots / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert motions(two_robots) == pytest.approx({"slow": 0.4, "fast": 1.6})
    assert any(line.startswith("unit of motions for a model: the mean frame of all") for line in describe(two_robots))


def test_units_of_length_do_not_mix(world, tmp_path):
    (tmp_path / "a").symlink_to(world)
    (tmp_path / "b").mkdir()
    manifest = {**read_manifest(world), "length_unit": "mean step"}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match="the folders differ in their unit of length; got .*mean step.*; expected one unit"
    ):
        RECIPE.build(tmp_path / "mix", {"src": f"{tmp_path / 'a'},{tmp_path / 'b'}"})


def test_only_folders_of_one_rate_mix(world, tmp_path):
    (tmp_path / "a").symlink_to(world)
    (tmp_path / "b").mkdir()
    manifest = {**read_manifest(world), "rate_hz": 3.0}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the folders differ in their rate"):
        RECIPE.build(tmp_path / "mix", {"src": f"{tmp_path / 'a'},{tmp_path / 'b'}"})
    with pytest.raises(DataError, match="not a mix; got .*; expected two or more folders of different names"):
        RECIPE.build(tmp_path / "mix", {"src": str(tmp_path / "a")})
