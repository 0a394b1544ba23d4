"""Rollouts, rides and plans that start from your own picture or clip."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import SIZE, Clip, number_of, write_clip
from PIL import Image

from raev2.errors import DataError, SpecError
from raev2_tasks.nwm import TASK
from raev2_tasks.nwm.data.dataset import TrajectoryDataset
from raev2_tasks.nwm.data.own_start import OwnFile, OwnStart
from raev2_tasks.nwm.drive.model_world import model_worlds
from raev2_tasks.nwm.drive.page import open_worlds

av = pytest.importorskip("av")


def run(command: str, *arguments: object) -> None:
    TASK.commands()[command]([str(argument) for argument in arguments])


@pytest.fixture
def dataset(world: Path) -> TrajectoryDataset:
    return TrajectoryDataset(world, "val", (64, 64), num_context=4)


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    """64 x 64 once upright: red above, blue below; stored lying, as a phone does."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32], pixels[32:] = (220, 20, 20), (20, 20, 220)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "own.jpg", quality=98, exif=exif)
    return tmp_path / "own.jpg"


def write_lossless(frames: list[np.ndarray], file: Path, rate: int) -> Path:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file


def test_a_clip_of_recorded_frames_gives_the_context_of_the_data(dataset, tmp_path):
    recorded = [dataset.image(index).permute(1, 2, 0).numpy() for index in range(10)]  # of the first trajectory
    file = write_lossless(recorded, tmp_path / "a.mkv", 4)
    for start_s, frame in ((None, 9), (1.0, 4), (0.25, 1)):
        got = OwnStart(dataset, OwnFile(str(file), "video", start_s)).context([0])
        true = dataset.context_at(0, frame)
        assert torch.equal(got["context_valid"][0], true["context_valid"])
        assert torch.equal(got["context_images"][0], true["context_images"])
        assert torch.allclose(got["context_age"][0], true["context_age"])


def test_of_a_faster_clip_the_frames_at_the_rate_of_the_data_are_taken(world, tmp_path):
    file = write_clip(Clip(".mp4", "libx264", options={"preset": "ultrafast", "bf": "2"}), tmp_path / "a.mp4")
    dataset = TrajectoryDataset(world, "val", SIZE, num_context=4)  # a frame of the model's size is taken as it is
    images = OwnStart(dataset, OwnFile(str(file), "video", 2.0)).context([0])["context_images"][0]
    shown = [number_of(pixels) for pixels in images.permute(0, 2, 3, 1).numpy()]
    assert np.abs(np.array(shown) / 30 - [1.25, 1.5, 1.75, 2.0]).max() < 0.02
    with pytest.raises(SpecError, match="--start: not in the clip; got 9; expected 0 to 4 s"):
        OwnStart(dataset, OwnFile(str(file), "video", 9.0))


def test_a_picture_is_a_context_of_one_upright_frame(dataset, portrait):
    start = OwnStart(dataset, OwnFile(str(portrait), "image"))
    assert start.context([0])["context_valid"].tolist() == [[False, False, False, True]]
    pixels = start.images([0], 0.0)[0].float()
    assert pixels[0, :28].mean() > 180 > 60 > pixels[2, :28].mean() and pixels[2, 36:].mean() > 180
    with pytest.raises(SpecError, match="nothing is known after an own picture or clip; got 1"):
        start.images([0], 1.0)
    with pytest.raises(SpecError, match="an own picture or clip has no recorded path"):
        start.motions([0], 0.0, 1.0)


def test_a_rollout_starts_from_a_picture_and_can_be_repeated(tiny_nwm_run, dataset, portrait, tmp_path):
    run("rollout", "--run", tiny_nwm_run, "--image", portrait, "--seconds", 1, "--out", tmp_path / "a")
    rows = list(csv.DictReader((tmp_path / "a" / "poses.csv").read_text().splitlines()))
    spacing = TrajectoryDataset(dataset.dir, "train", (64, 64)).spacing_m
    assert [float(row["x_m"]) for row in rows] == pytest.approx([spacing * step for step in range(5)], abs=1e-5)
    with av.open(str(tmp_path / "a" / "rollout.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5 and frames[0][20, 100, 0] > 180 and frames[0][-20, 100, 2] > 180
    record = json.loads((tmp_path / "a" / "rollout.json").read_text())
    assert record["own"]["kind"] == "image" and record["own"]["file"] == str(portrait) and "trajectory" not in record
    repeat = ("rollout", "--run", tiny_nwm_run, "--commands", tmp_path / "a" / "rollout.json", "--out")
    run(*repeat, tmp_path / "b")
    assert (tmp_path / "a" / "rollout.gif").read_bytes() == (tmp_path / "b" / "rollout.gif").read_bytes()
    with pytest.raises(SpecError, match="--image, --video: have no effect with a record, which names its start"):
        run(*repeat, tmp_path / "c", "--image", portrait)
    Image.new("RGB", (64, 64)).save(portrait)
    with pytest.raises(DataError, match="own.jpg: is not the file that the record was made with"):
        run(*repeat, tmp_path / "c")


def test_a_rollout_goes_on_where_a_clip_ends(tiny_nwm_run, dataset, tmp_path):
    recorded = [dataset.image(index).permute(1, 2, 0).numpy() for index in range(8)]
    file = write_lossless(recorded, tmp_path / "clip.mkv", 4)
    commands = tmp_path / "commands.csv"
    lines = [f"0.25,{x},{y},{np.rad2deg(yaw)}" for x, y, yaw in dataset.commands(0, 7, 4)]
    commands.write_text("\n".join(["seconds,forward_m,left_m,turn_deg", *lines]))
    where, name = ("rollout", "--run", tiny_nwm_run, "--out"), dataset.trajectories[0].id
    run(*where, tmp_path / "own", "--video", file, "--commands", commands)
    run(*where, tmp_path / "data", "--trajectory", name, "--start", 1.75, "--seconds", 1)
    poses = [(tmp_path / which / "poses.csv").read_text() for which in ("own", "data")]
    assert poses[0] == poses[1]
    own, true = (Image.open(tmp_path / which / "sheet.png").convert("L") for which in ("own", "data"))
    size = (min(own.width, true.width), own.height - 8)
    first, second = (np.asarray(image.crop((0, 20, *size))).astype(int) for image in (own, true))
    assert np.abs(first - second).mean() < 2  # the same frames predicted, here without the true ones below


def test_a_ride_starts_from_a_picture(tiny_nwm_run, portrait):
    world, engine = model_worlds(str(tiny_nwm_run), engine=False, own=OwnFile(str(portrait), "image"))()
    first = world.reset(5)
    assert engine is None and first[10, 30, 0] > 180 and first[-10, 30, 2] > 180
    assert not (world.step(np.array([0.2, 0, 0]), 0.25) == first).all()
    with pytest.raises(SpecError, match="--engine: cannot stand where your own picture was taken"):
        model_worlds(str(tiny_nwm_run), engine=True, own=OwnFile(str(portrait), "image"))
    with pytest.raises(SpecError, match="--toy: needs none of --run, --engine, --image, --video"):
        open_worlds(toy=True, own=OwnFile(str(portrait), "image"))


def test_a_plan_leads_from_a_picture_to_a_picture(tiny_nwm_run, portrait, tmp_path, capsys):
    goal = tmp_path / "goal.png"
    Image.new("RGB", (80, 60), (30, 120, 60)).save(goal)
    small = ("--set", "sampler.iterations=1", "--set", "sampler.population=8", "--set", "sampler.elites=2")
    own = ("plan", "--run", tiny_nwm_run, "--image", portrait, "--seconds", 0.5, "--out", tmp_path / "out", *small)
    run(*own, "--goal", goal)
    result = json.loads((tmp_path / "out" / "own-0.5s.json").read_text())
    assert len(result["path"]) == len(result["commands"]) and np.isfinite(result["cost"])
    with Image.open(tmp_path / "out" / "own-0.5s.png") as picture:
        assert picture.width > 700
    assert f"ends {result['path'][-1][0]:.2f} m ahead" in capsys.readouterr().out
    with pytest.raises(SpecError, match="--goal: goes with --image or --video; expected both, or neither"):
        run(*own)
    with pytest.raises(SpecError, match="--toy: needs no --run, --image or --video"):
        run("plan", "--toy", "--image", portrait, "--goal", goal)


def test_options_that_make_no_sense_are_refused(tiny_nwm_run, portrait, tmp_path):
    here = ("rollout", "--run", tiny_nwm_run, "--out", tmp_path / "out")
    with pytest.raises(SpecError, match="--start: has no effect with --image"):
        run(*here, "--image", portrait, "--start", 1)
    with pytest.raises(SpecError, match="--trajectory: has no effect with --image or --video"):
        run(*here, "--image", portrait, "--trajectory", "t0")
    with pytest.raises(DataError, match="image nowhere.png: no such file"):
        run(*here, "--image", "nowhere.png")
    with pytest.raises(DataError, match="video nowhere.mp4: no such file"):
        run(*here, "--video", "nowhere.mp4")
    with pytest.raises(SystemExit):
        run(*here, "--image", portrait, "--video", portrait)
