"""Trackers, read back by readers of their own: Trackio's SQLite file, TensorBoard's events, wandb's offline file."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from raev2.errors import SpecError
from raev2.files.replace import RUN, check_replaceable
from raev2.spec import RunSpec, TaskSpec
from raev2.spec_io import apply_overrides, spec_differences
from raev2.training import tracker as trackers
from raev2.training.run import open_run

START = """
import math, pickle, sys
from pathlib import Path
from PIL import Image
from raev2.training.tracker import Tracker
folder, images = Path(sys.argv[1]), int(sys.argv[2])
tracker = Tracker(folder, pickle.loads((folder.parent / "spec").read_bytes()))
tracker.log(dict(stage="generator", kind="train", images=images, step=1, loss=images / 32, grad_norm=math.nan))
(folder / "samples").mkdir(exist_ok=True)
Image.new("RGB", (8, 6), (10, 20, 30)).save(folder / "samples" / f"generator-{images:09d}.png")
tracker.log(dict(stage="generator", kind="eval", images=images, protocol="fd-8", metrics={"fd": 3.0}))
tracker.log(dict(stage="tokenizer", kind="train", images=8, step=1, loss=0.75))
tracker.close()
"""


def train(folder: Path, spec: RunSpec, images: int) -> None:
    """What a training logs, in a process of its own: services start threads and keep files open."""
    (folder.parent / "spec").write_bytes(pickle.dumps(spec.replace(task=TaskSpec(name="toy"))))
    env = os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", START, str(folder), str(images)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "failed" not in done.stderr, done.stderr


@pytest.fixture
def folder(tiny_spec, tmp_path):
    return open_run(tmp_path / "kept", tiny_spec).dir


def test_trackio_has_numbers_and_pictures_and_a_continued_run_goes_on_in_it(folder, tiny_spec):
    pytest.importorskip("trackio")
    for images in (8, 16):
        train(folder, tiny_spec.replace(tracker="trackio"), images)
    (file,) = (folder / "trackio").glob("raev2-toy*.db")
    with sqlite3.connect(file) as db:
        rows = db.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = db.execute("SELECT config FROM configs").fetchall()
    assert len({name for name, _, _ in rows}) == 1 and rows[0][0].startswith("kept-20")
    lines = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, line["generator/loss"]) for step, line in lines if "generator/loss" in line] == [
        (8, 0.25),
        (16, 0.5),
    ]
    assert [line["fd-8/fd"] for _, line in lines if "fd-8/fd" in line] == [3.0, 3.0]
    assert [line["tokenizer/loss"] for _, line in lines if "tokenizer/loss" in line] == [0.75, 0.75]
    assert not any("generator/grad_norm" in line for _, line in lines), "not finite"
    shown = {name: value for _, line in lines for name, value in line.items() if name.startswith("samples/")}
    assert sorted(shown) == ["samples/generator-000000008", "samples/generator-000000016"], "each once"
    for picture in shown.values():
        with Image.open(folder / "trackio" / "media" / picture["file_path"]) as image:
            assert image.size == (8, 6) and image.convert("RGB").getpixel((0, 0)) == (10, 20, 30)
    assert json.loads(config)["recipe"] == "tiny"


def test_tensorboard_has_numbers_and_pictures(folder, tiny_spec):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(folder, tiny_spec.replace(tracker="tensorboard"), 8)
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("generator/loss")] == [(8, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("fd-8/fd")] == [(8, 3.0)]
    (picture,) = events.Images("samples/generator-000000008")
    assert (picture.step, picture.width, picture.height) == (8, 8, 6)
    check_replaceable(folder, RUN)  # --overwrite may delete what the tracker wrote


def test_wandb_writes_its_offline_file_without_an_account(folder, tiny_spec):
    pytest.importorskip("wandb")
    train(folder, tiny_spec.replace(tracker="wandb"), 8)
    (kept,) = (folder / "wandb").glob("offline-run-*")
    (file,) = kept.glob("run-kept-20*.wandb")
    (picture,) = kept.glob("files/media/images/samples/generator-000000008*.png")
    told = file.read_bytes()  # records of protobuf; text stands in them as it is
    assert all(name in told for name in (b"generator/loss", b"fd-8/fd", b"tokenizer/loss", b"raev2-toy"))
    assert b"generator/grad_norm" not in told, "not finite"
    with Image.open(picture) as image:
        assert image.size == (8, 6) and image.convert("RGB").getpixel((0, 0)) == (10, 20, 30)


def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(folder, tiny_spec, monkeypatch, caplog):
    def broken(*_):
        def send(*_):
            raise ConnectionError("no account")

        return send, send

    monkeypatch.setattr(trackers, "_service", broken)
    run = open_run(folder, tiny_spec.replace(tracker="wandb"))
    for images in (8, 16):
        run.log(stage="generator", kind="train", images=images, loss=0.5)
    run.close()
    assert [line["images"] for line in run.history(kind="train")] == [8, 16]
    text = "tracker wandb: failed, the run goes on without it; got ConnectionError('no account')."
    assert [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()] == [text]


def test_a_tracker_that_is_not_installed_says_how_to_get_it(folder, tiny_spec, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trackio", None)
    open_run(folder, tiny_spec.replace(tracker="trackio")).close()
    (said,) = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert said.startswith("tracker trackio: failed") and said.endswith("Try pip install 'raev2[track]'.")


def test_the_tracker_is_a_free_field_of_three_values(tiny_spec):
    assert spec_differences(tiny_spec, apply_overrides(tiny_spec, ["tracker=tensorboard"])) == []
    with pytest.raises(SpecError, match=r"spec.tracker: not valid; got 'visdom'; expected input should be 'trackio'"):
        apply_overrides(tiny_spec, ["tracker=visdom"])
