"""Losses that are not finite in a whole training: what is on the disk, and how the run goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from raev2 import pipeline, train_generator
from raev2.errors import CheckpointError
from raev2.eval.features import EncoderFeatures, NotFinite
from raev2.flow import training_loss
from raev2.spec import RunSpec
from raev2.spec_io import apply_overrides
from raev2.training import run as run_module
from raev2.training.checkpoint import list_checkpoints, load_checkpoint


@pytest.fixture
def spec(tiny_spec, trained_run, monkeypatch) -> RunSpec:
    """Stage 2 alone, 12 steps of 8 images, a checkpoint every second step; 2 skipped steps in a row are many."""
    monkeypatch.setattr(run_module, "MAX_NON_FINITE_STEPS", 2)
    settings = ["images=96", "save_every_images=16", "eval_every_images=null"]
    return apply_overrides(
        tiny_spec.replace(tokenizer_from=str(trained_run / "tokenizer")),
        [*(f"generator_training.{setting}" for setting in settings), "evaluation.protocols=[]"],
    )


def spoil(monkeypatch, steps: set[int]) -> None:
    """Losses of these steps, counted over all starts of the training in this test, are nan."""
    seen = iter(range(10_000))

    def loss(*arguments, **options):
        losses = training_loss(*arguments, **options)
        return dataclasses.replace(losses, total=losses.total * float("nan")) if next(seen) in steps else losses

    monkeypatch.setattr(train_generator, "training_loss", loss)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[int]:
    return [int(path.name) for path in list_checkpoints(run / "checkpoints" / "generator")]


def test_nothing_is_saved_while_steps_are_skipped(spec, tmp_path, monkeypatch):
    """Step 3 ends at 32 images, where a checkpoint is due; it is saved after step 4 instead."""
    spoil(monkeypatch, {3})
    run = pipeline.train(spec, tmp_path / "run")
    assert checkpoints(run) == [64, 80, 96]
    saved = []
    monkeypatch.setattr(run_module, "save_checkpoint", lambda folder, images, *_: saved.append(images))
    spoil(monkeypatch, {3})
    pipeline.train(spec, tmp_path / "again")
    assert saved == [16, 40, 48, 64, 80, 96]


def test_training_goes_back_and_then_on_with_the_images_that_follow(spec, tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, {5, 6})
    run = pipeline.train(spec, tmp_path / "run")
    assert "back to the weights of 32 images" in caplog.text
    (event,) = [line for line in log(run) if line.get("event") == "went_back"]
    assert (event["to_images"], event["step"]) == (32, 6)
    assert max(line["images"] for line in log(run)) == 96 and (run / "generator" / "config.json").is_file()
    finite = load_checkpoint(list_checkpoints(run / "checkpoints" / "generator")[-1])
    assert all(value.isfinite().all() for part in finite.tensors.values() for value in part.values())


def test_a_run_that_stops_keeps_its_last_good_checkpoint_and_goes_on_from_it(spec, tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(5, 100)))
    with pytest.raises(CheckpointError, match="2 steps in a row without a finite loss, stopped at step 8"):
        pipeline.train(spec, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [16, 32]
    spoil(monkeypatch, set())
    assert checkpoints(pipeline.train(spec, tmp_path / "run"))[-1] == 96


def test_weights_that_are_not_finite_push_no_checkpoint_out(spec, tmp_path, monkeypatch, caplog):
    """An update that overflows: its gradient was finite, so the step was taken."""
    update, steps = run_module.update, iter(range(100))

    def overflow(optimizer, parameters, *others):
        norm = update(optimizer, parameters, *others)
        if next(steps) in (3, 8):
            with torch.no_grad():
                parameters[0].view(-1)[0] = float("inf")
        return norm

    monkeypatch.setattr(train_generator, "update", overflow)
    run = pipeline.train(spec, tmp_path / "run")
    assert "weights are not finite after 32 images, no checkpoint" in caplog.text
    assert "back to the weights of 16 images" in caplog.text
    for path in list_checkpoints(run / "checkpoints" / "generator"):
        load_checkpoint(path)


def test_a_checkpoint_due_with_an_evaluation_is_there_when_the_evaluation_begins(spec, tmp_path, monkeypatch):
    """And the evaluation is repeated, once, when it was interrupted."""
    spec = apply_overrides(spec, ["generator_training.eval_every_images=48"])
    there, evaluate = [], pipeline._evaluate

    def interrupted(trained, *arguments, **options):
        there.append(checkpoints(trained.run.dir))
        if len(there) == 1:
            raise KeyboardInterrupt
        return evaluate(trained, *arguments, **options)

    monkeypatch.setattr(pipeline, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(spec, tmp_path / "run")
    assert there == [[16, 32, 48]]
    run = pipeline.train(spec, tmp_path / "run")
    evaluated = [line["images"] for line in log(run) if line["kind"] == "eval"]
    assert evaluated == [48]


# Features of an evaluation that are not finite.


def broken_features(monkeypatch) -> None:
    """Every second picture has features that are no numbers."""
    real = EncoderFeatures.__call__

    def spoiled(self, images_u8):
        features = real(self, images_u8)
        features[::2] = torch.nan
        return features

    monkeypatch.setattr(EncoderFeatures, "__call__", spoiled)


def test_training_goes_on_without_an_evaluation_whose_features_are_not_finite(spec, tmp_path, monkeypatch, caplog):
    broken_features(monkeypatch)
    settings = ["generator_training.eval_every_images=32", "evaluation.num_samples=16"]
    run = pipeline.train(apply_overrides(spec, settings), tmp_path / "run")
    assert (run / "generator" / "config.json").is_file()
    assert "no evaluation after 32 images, the training goes on: features 'micro' of generated pictures" in caplog.text
    assert not [entry for entry in log(run) if entry["kind"] == "eval" and entry["stage"] == "generator"]


def test_an_evaluation_by_command_ends_with_the_space_and_the_pictures(trained_run, tmp_path, monkeypatch):
    broken_features(monkeypatch)
    run = shutil.copytree(trained_run, tmp_path / "run")
    for protocol, what in (
        ("generation-micro", "generated pictures: not finite for 8 pictures; got numbers 0, 2, 4, 6, 8"),
        ("reconstruction-micro", r"reconstructions and originals: not finite for \d+ pictures; got numbers \d"),
    ):
        with pytest.raises(NotFinite, match=f"features 'micro' of {what}.*The feature network or its weights"):
            pipeline.evaluate_run(run, [protocol])
