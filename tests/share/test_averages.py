"""`--ema`: a model is sampled, scored and exported with other averaged weights than the first that its run kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raev2 import Pipeline, pipeline
from raev2.command.cli import main
from raev2.errors import CheckpointError
from raev2.training.checkpoint import latest_checkpoint, save_checkpoint


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """The tiny run, whose averages of decay 0.9 are made to differ from those of 0.5: they are the weights."""
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    folder = run / "checkpoints" / "generator"
    last = latest_checkpoint(folder)
    weights = {name: last.tensors["model"][name] for name in last.tensors["ema-0.9"]}
    save_checkpoint(folder, 64, replace(last, tensors={**last.tensors, "ema-0.9": weights}), keep=1)
    return run


def test_other_averages_are_sampled(run, tmp_path):
    for ema in ("0.5", "0.9"):
        line = ["sample", "--run", str(run), "--n", "2", "--ema", ema, "--out", str(tmp_path / ema)]
        assert main(line) == 0
    weights = latest_checkpoint(run / "checkpoints" / "generator").tensors["model"]
    first, other = Pipeline.from_pretrained(run), Pipeline.from_pretrained(run, ema=0.9)
    assert all(torch.equal(weights[name], value) for name, value in other.trained.generator.state_dict().items())
    drawn = [np.stack([Image.open(tmp_path / ema / f"0000{i}.png") for i in (0, 1)]) for ema in ("0.5", "0.9")]
    assert np.array_equal(drawn[0], np.stack(first(n=2))) and np.array_equal(drawn[1], np.stack(other(n=2)))
    assert not np.array_equal(*drawn)


def test_their_numbers_stand_beside_those_of_the_run_and_can_be_had_again(run, capsys):
    before = (run / "eval" / "generation-micro.json").read_bytes()
    assert main(["eval", "--run", str(run), "--protocol", "generation-micro", "--ema", "0.9"]) == 0
    assert (run / "eval" / "generation-micro.json").read_bytes() == before
    file = run / "eval" / "generation-micro-ema-0.9.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    assert said["ema_decay"] == 0.9 and said["results"] != json.loads(before)["results"]
    again = {result.name: result.value for result in pipeline.rerun(file)}
    assert again == {row["name"]: row["value"] for row in said["results"]}


def test_an_export_takes_them_along(run, tmp_path):
    line = ["export", "--run", str(run), "--format", "pipeline", "--out", str(tmp_path / "out"), "--ema", "0.9"]
    assert main(line) == 0
    assert json.loads((tmp_path / "out" / "generator" / "config.json").read_text())["extra"]["ema_decay"] == 0.9
    with pytest.raises(CheckpointError, match="none to mix it from; got 0.5; expected near none"):
        Pipeline.from_pretrained(tmp_path / "out", ema=0.5)
