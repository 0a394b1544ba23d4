from __future__ import annotations

import json

import numpy as np
import pytest

from raev2.errors import DataError
from raev2.files.manifest import read_manifest
from raev2_data_recipes.drives.trajectory_mix import RECIPE
from raev2_tasks.nwm.data.trajectories import read_trajectories


def test_a_mix_holds_the_trajectories_of_its_folders_and_keeps_their_splits(world, tmp_path):
    (tmp_path / "a").symlink_to(world)
    (tmp_path / "b").symlink_to(world)
    options, spacing = {"src": f"{tmp_path / 'a'}, {tmp_path / 'b'}"}, read_manifest(world)["spacing_m"]
    told = f"train 72, val 48 frames, {spacing:.3g} {read_manifest(world)['length_unit']} apart."
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
