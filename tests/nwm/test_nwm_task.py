from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from raev2 import pipeline
from raev2.data import to_float
from raev2.errors import DataError, SpecError
from raev2.eval.protocols import run_protocol
from raev2.task import EvalContext, get_evaluators, get_task
from raev2_tasks.nwm import TASK
from raev2_tasks.nwm.cond import encode_context
from raev2_tasks.nwm.data.index import EvalIndex, Place, write_index
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.data.video import contact_sheet, side_by_side, write_gif, write_mp4
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.pose import relative
from raev2_tasks.nwm.spec import NavigationSpec


def rollout(*arguments: object) -> None:
    TASK.commands()["rollout"]([str(argument) for argument in arguments])


@pytest.fixture
def context(tiny_nwm_run, tmp_path) -> EvalContext:
    context = pipeline.open_trained(tiny_nwm_run).context()
    return replace(context, cache_dir=tmp_path / "cache", picture=tmp_path / "picture.png")


# Spec.


def test_horizons_must_make_sense():
    assert NavigationSpec(max_offset_s=2.0, horizons_s=(1.0, 2.0, 4.0)).jump_horizons_s == (1.0, 2.0)
    with pytest.raises(ValidationError, match="horizons_s must ascend"):
        NavigationSpec(horizons_s=(2.0, 1.0))
    with pytest.raises(ValidationError, match="no horizon is within one jump"):
        NavigationSpec(max_offset_s=0.5, horizons_s=(1.0,))


def test_the_condition_takes_its_scale_from_the_data(tiny_nwm_spec):
    dataset = TASK.dataset(tiny_nwm_spec, "train")
    condition = TASK.condition(tiny_nwm_spec, dataset)
    assert condition.spacing == dataset.spacing_m and condition.frame_period == 0.25
    assert condition.max_time == 1.125, "the longest jump, and half a frame for times that jitter"
    published = get_task("nwm").recipes()["raev2-dinov3l-k7"]()
    condition = TASK.condition(published, None)
    assert condition.form == "in_context" and not condition.frame_positions and condition.action_drop_prob == 0


# Conditions.


def test_a_frame_of_several_contexts_is_encoded_once(tiny_nwm_spec):
    places = Places(TASK.dataset(tiny_nwm_spec, "val"), 6)
    raw = dict(places.context([0, 0, 3]))
    seen = []

    def encode(images, keys):
        seen.extend(keys.tolist())
        return to_float(images).mean((2, 3))[:, :, None, None]

    cond = encode_context(raw, encode)
    assert sorted(set(raw["context_keys"].flatten().tolist())) == sorted(seen) and len(seen) == len(set(seen))
    expected = to_float(raw["context_images"]).mean((3, 4))[..., None, None]
    assert torch.allclose(cond["context_latents"], expected) and torch.equal(cond["context_id"], raw["context_keys"])
    assert "context_images" not in cond


def test_samples_are_frames_of_one_place_at_growing_times(tiny_nwm_spec):
    cond, captions = TASK.sample_cond(tiny_nwm_spec, TASK.dataset(tiny_nwm_spec, "train"), {"n": 16})
    assert len(captions) == 16 and captions[0] == "+0.25 s" and captions[7] == "+1 s"
    assert (cond["context_keys"][:8] == cond["context_keys"][0]).all()
    assert (cond["context_keys"][8] != cond["context_keys"][0]).any()
    assert torch.allclose(cond["rel_time"][7], torch.tensor([1.0]))


# Places.


def test_places_are_spread_and_leave_room(tiny_nwm_spec):
    dataset = TASK.dataset(tiny_nwm_spec, "val")
    places = Places(dataset, 6, 1.0)
    assert len(places) == 6 and {number for number, _ in places.moments} == {0, 1}
    assert all(3 <= frame < 24 - 4 for _, frame in places.moments)
    number, frame = places.moments[2]
    poses = dataset.trajectories[number].poses
    assert np.allclose(places.motions([2], 0.25, 1.0)[0], relative(poses[frame + 1], poses[frame + 4]))
    assert torch.equal(places.images([2], 0.5)[0], dataset.image(dataset.frame_index(number, frame + 2)))
    assert places.identity == Places(dataset, 6, 1.0).identity != Places(dataset, 5, 1.0).identity
    with pytest.raises(SpecError, match="not a whole number of frames; got 0.3; expected a multiple of 0.25 s"):
        places.images([0], 0.3)
    with pytest.raises(DataError, match="no trajectory of 'val' is long enough"):
        Places(dataset, 6, 10.0)


def test_places_are_no_first_ones_and_say_how_many_trajectories_they_are_of(tiny_nwm_spec):
    dataset = TASK.dataset(tiny_nwm_spec, "val")
    every = Places(dataset, horizon_s=1.0)
    assert every.moments == sorted(every.moments), "all of them stand as recorded"
    assert every.coverage == {"what": "trajectories", "asked": 2, "of": 2}
    few = Places(dataset, 10, 1.0)
    assert few.moments != sorted(few.moments) and len({*few.moments} & {*every.moments}) == 10
    assert Places(dataset, 1, 1.0).coverage == {"what": "trajectories", "asked": 1, "of": 2}


def test_places_may_come_from_a_frozen_index(tiny_nwm_spec, world, tmp_path):
    shutil.copytree(world, tmp_path / "data")
    spec = tiny_nwm_spec.replace(data=tiny_nwm_spec.data.replace(dir=str(tmp_path / "data")))
    dataset = TASK.dataset(spec, "val")
    name = dataset.trajectories[1].id
    frozen = EvalIndex("mine", "val", (4,), 4, 4.0, dataset.fingerprint, {}, (Place(name, 5, 77), Place(name, 9, 78)))
    write_index(frozen, tmp_path / "data")
    places = Places(dataset, 64, 1.0, "mine")
    assert dict(zip(places.moments, places.ids, strict=True)) == {(1, 5): 77, (1, 9): 78}
    one = Places(dataset, 1, 1.0, "mine")
    assert (one.moments[0], one.ids[0]) in {((1, 5), 77), ((1, 9), 78)}
    with pytest.raises(
        DataError, match=r"too near to its ends; got frame 9; expected 4 frames of context and 16 frames"
    ):
        Places(dataset, 64, 4.0, "mine")


# A whole run.


def test_training_ends_with_rollouts_in_the_report(tiny_nwm_run):
    result = json.loads((tiny_nwm_run / "eval" / "rollout-4fps-micro.json").read_text())
    names = {entry["name"] for entry in result["results"]}
    for metric in ("psnr", "feature_distance_micro", "latent_distance", "fd_micro"):
        assert {f"{metric}@0.5s", f"{metric}@1s"} <= names
    assert {"psnr@1s_copy", "psnr@1s_nearest", "psnr@1s_reconstruction", "fvd_enc_micro", "kvd_enc_micro"} <= names
    assert all("95 % interval" in entry["note"] for entry in result["results"] if entry["name"].startswith("psnr"))
    assert len(result["places"]["sha256"]) == 64 and result["places"]["num"] == 4
    page = (tiny_nwm_run / "report.html").read_text()
    assert result["picture"] in page and '<th class="num">0.5s</th>' in page
    with Image.open(tiny_nwm_run / "eval" / "rollout-4fps-micro.png") as picture:
        assert picture.size > (64 * 5, 64 * 8)


def test_single_jumps_are_scored_against_all_baselines(context):
    evaluator = get_evaluators(TASK, context.spec, ["single-step-micro"])[0]
    found = {result.name: result for result in run_protocol(evaluator, context)}
    for name in ("copy", "nearest", "no_action", "reconstruction"):
        assert (found[f"psnr@1s_{name}"].role, found[f"psnr@1s_{name}"].of) == ("scale", "psnr@1s")
    assert "latent_distance@1s_nearest" not in found and "latent_distance@1s_no_action" in found
    assert found["psnr@1s"].num_samples == 6 and context.picture.is_file()
    again = {result.name: result for result in run_protocol(evaluator, replace(context, picture=None))}
    assert again == found


def test_a_jump_is_the_first_step_of_a_rollout(context):
    places = Places(context.dataset("val"), 4, 1.0)
    predictor = Predictor(context, places)
    jump, steps = predictor.jumps([0, 1], [0.25])[0.25], predictor.rollout([0, 1], 0.25, 2)
    assert torch.equal(jump, steps[0]) and not torch.equal(steps[0], steps[1])


def test_obedience_is_measured_beside_the_judge_itself(context, monkeypatch):
    monkeypatch.setattr("raev2_tasks.nwm.eval.inverse_dynamics.STEPS", 20)
    monkeypatch.setattr("raev2_tasks.nwm.eval.action_following.NUM_PAIRS", 40)
    evaluator = get_evaluators(TASK, context.spec, ["action-following"])[0]
    found = {result.name: result.value for result in run_protocol(evaluator, context)}
    assert {f"turn_corr@0.5s{kind}" for kind in ("", "_swapped", "_no_action", "_real")} <= found.keys()
    assert all(-1 <= value <= 1 for name, value in found.items() if "_corr@" in name)
    assert len(list(context.cache_dir.glob("inverse-dynamics-*.safetensors"))) == 1
    assert {result.name: result.value for result in run_protocol(evaluator, context)} == found, "the judge was kept"


# The command.


def test_a_rollout_can_be_repeated(tiny_nwm_run, tmp_path, capsys):
    rollout("--run", tiny_nwm_run, "--seconds", 1, "--out", tmp_path / "a")
    assert str(tmp_path / "a") in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "a").iterdir()} == {
        "rollout.mp4", "rollout.gif", "sheet.png", "poses.csv", "rollout.json"
    }  # fmt: skip
    record = json.loads((tmp_path / "a" / "rollout.json").read_text())
    assert record["follows_recorded_path"] and len(record["steps"]) == 4
    rollout("--run", tiny_nwm_run, "--commands", tmp_path / "a" / "rollout.json", "--out", tmp_path / "b")
    for name in ("sheet.png", "rollout.gif", "poses.csv", "rollout.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(SpecError, match="exists already; got .*a. Choose another folder, or add --overwrite"):
        rollout("--run", tiny_nwm_run, "--seconds", 1, "--out", tmp_path / "a")


def test_commands_come_from_a_file_in_degrees(tiny_nwm_run, tmp_path):
    file = tmp_path / "commands.csv"
    file.write_text("seconds,forward_m,left_m,turn_deg\n0.25,1,0,90\n0.5,1,0,0\n")
    rollout("--run", tiny_nwm_run, "--commands", file, "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "poses.csv").read_text().splitlines()))
    assert [[float(row[name]) for name in ("time_s", "x_m", "y_m", "yaw_deg")] for row in rows] == [
        [0, 0, 0, 0], [0.25, 1, 0, 90], [0.75, 1, 1, 90]
    ]  # fmt: skip
    file.write_text("seconds,forward_m\n0.25,1\n")
    with pytest.raises(
        DataError, match=r"commands.csv, line 2: no command.*expected seconds,forward_m,left_m,turn_deg"
    ):
        rollout("--run", tiny_nwm_run, "--commands", file, "--out", tmp_path / "other")
    file.write_text("seconds,forward_m,left_m,turn_deg\n9,1,0,0\n")
    with pytest.raises(SpecError, match="not trained for this duration; got 9; expected above 0, at most 1.125"):
        rollout("--run", tiny_nwm_run, "--commands", file, "--out", tmp_path / "other")


def test_where_a_rollout_starts_must_exist(tiny_nwm_run, tmp_path):
    with pytest.raises(DataError, match="no trajectory of this name in val; got nowhere"):
        rollout("--run", tiny_nwm_run, "--trajectory", "nowhere", "--out", tmp_path / "out")
    with pytest.raises(DataError, match="no such place; got trajectory any, start 5 s"):
        rollout("--run", tiny_nwm_run, "--start", 5, "--seconds", 1, "--out", tmp_path / "out")
    with pytest.raises(
        SpecError, match="seconds: not a whole number of frames; got 1.1; expected a multiple of 0.25 s"
    ):
        rollout("--run", tiny_nwm_run, "--seconds", 1.1, "--out", tmp_path / "out")


# Video.


def test_videos_have_all_frames(tmp_path):
    clip = torch.randint(0, 255, (6, 3, 64, 48), dtype=torch.uint8)
    both = side_by_side(clip, clip[:5])
    assert both.shape == (5, 3, 64, 98)
    write_mp4(clip, tmp_path / "clip.mp4", 4)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
        assert len(frames) == 6 and (frames[0].width, frames[0].height) == (144, 192)
        assert container.streams.video[0].average_rate == 4
    write_gif(clip, tmp_path / "clip.gif", 4)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 6 and image.info["duration"] == 250


def test_a_long_clip_shows_its_last_frame_on_the_sheet():
    clip = torch.arange(33, dtype=torch.uint8).view(-1, 1, 1, 1).expand(33, 3, 16, 16) * 7
    sheet = np.asarray(
        contact_sheet([("model", clip), ("true", clip[:20])], [str(i) for i in range(33)], max_columns=5)
    )
    assert (sheet[-10, -6] == 255).all(), "the shorter clip leaves its place empty"
    assert (sheet[sheet.shape[0] // 2 - 10, -6] == 32 * 7).all()
