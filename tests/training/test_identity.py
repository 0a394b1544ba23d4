"""A run goes on only with what it began with, by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from raev2 import pipeline
from raev2.errors import CheckpointError
from raev2.files.hashes import folder_sha256
from raev2.spec import RunSpec
from raev2.spec_io import apply_overrides
from raev2.task import get_data_recipe, get_task


@pytest.fixture
def spec(tiny_spec, trained_run, synthetic_data, tmp_path, monkeypatch) -> RunSpec:
    """Two steps of stage 2 with every kind of input as a folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(synthetic_data, "data")
    shutil.copytree(trained_run / "tokenizer", "tokenizer")
    for name in ("first", "weak"):
        shutil.copytree(trained_run / "generator", name)
    settings = [
        "data.dir=data", "tokenizer_from=tokenizer", "generator_from=first", "generator_training.images=16",
        "generator_training.eval_every_images=null", "evaluation.protocols=[]",
        "evaluation.compare_guidance=[{kind: auto, weak: weak}]",
    ]  # fmt: skip
    return apply_overrides(tiny_spec, settings)


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    save_file({**tensors, name: tensors[name] + 1}, folder / "model.safetensors")


def test_what_a_run_reads_must_stay_the_same(spec, tmp_path):
    run = pipeline.train(spec, "run")
    before = json.loads((run / "identity.json").read_text())
    assert before.keys() == {"data", "tokenizer", "first", "weak"}
    assert before["data"] == json.loads(Path("data/manifest.json").read_text(encoding="utf-8"))["fingerprint"]
    pipeline.train(spec, "run")
    for name in ("tokenizer", "first", "weak"):
        Path(name, "README.md").write_text("another card is the same tokenizer", encoding="utf-8")
        shutil.copytree(name, "kept")
        other_weights(Path(name))
        with pytest.raises(CheckpointError) as caught:
            pipeline.train(spec, "run")
        assert str(caught.value) == (
            f"run: {name} is not what the run began with; got {folder_sha256(Path(name))[:12]}; "
            f"expected {before[name][:12]}. Bring it back as it was, or choose another --run."
        )
        shutil.rmtree(name)
        Path("kept").rename(name)
    get_data_recipe("synthetic").build(Path("data"), {"num_train": "31", "num_val": "16"}, overwrite=True)
    with pytest.raises(
        CheckpointError, match="run: data is not what the run began with; got .{12}; expected .{12}. Br"
    ):
        pipeline.train(spec, "run")
    assert json.loads((run / "identity.json").read_text()) == before


def test_commits_of_the_hub_are_recorded_and_must_stay_the_same(spec, tmp_path, monkeypatch):
    """A cache as huggingface_hub documents it, without network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache, commits = tmp_path / "hub" / "models--owner--first", ("a" * 40, "b" * 40)
    for commit in commits:
        shutil.copytree("first", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commits[0])
    spec = apply_overrides(spec, ["generator_from=owner/first"])
    run = pipeline.train(spec, "run")
    recorded = {"owner/first": commits[0]}
    assert json.loads((run / "provenance.json").read_text())["commits"] == recorded
    assert json.loads((run / "generator" / "config.json").read_text())["extra"]["commits"] == recorded
    (cache / "refs" / "main").write_text(commits[1])
    with pytest.raises(CheckpointError) as caught:
        pipeline.train(spec, "run")
    assert str(caught.value) == (
        f"run: owner/first is not what the run began with; got {'b' * 12}; expected {'a' * 12}. "
        "Bring it back as it was, or choose another --run."
    )


def test_another_path_in_a_free_field_is_no_difference(spec):
    run = pipeline.train(spec, "run")
    Path("weak").rename("weaker")
    other_weights(Path("weaker"))
    pipeline.train(apply_overrides(spec, ["evaluation.compare_guidance=[{kind: auto, weak: weaker}]"]), "run")
    assert "weaker" in json.loads((run / "identity.json").read_text())


def test_the_tokenizer_that_the_run_has_trained_stays(tiny_spec, trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    other_weights(run / "tokenizer")
    with pytest.raises(CheckpointError, match="run: tokenizer is not what the run began with"):
        pipeline.train(tiny_spec, run)


def test_a_run_of_an_older_version_is_taken_as_it_is(tiny_spec, trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    (run / "identity.json").unlink()
    pipeline.train(tiny_spec, run)
    assert (run / "identity.json").read_bytes() == (trained_run / "identity.json").read_bytes()


def test_what_a_task_loads_for_its_conditions_must_stay_the_same(spec, monkeypatch):
    class Encode:
        fingerprint = "a" * 64

        def __call__(self, raw):
            return raw

    task = get_task("imagenet")
    monkeypatch.setattr(type(task), "cond_encoder", lambda *_: Encode())
    run = pipeline.train(spec, "run")
    shutil.rmtree(run / "generator")
    monkeypatch.setattr(Encode, "fingerprint", "b" * 64)
    with pytest.raises(
        CheckpointError, match="condition encoder is not what the run began with; got b{12}; expected a{12}"
    ):
        pipeline.train(spec, "run")


def test_a_card_that_was_being_written_is_no_change(tmp_path):
    """The selftest found it: killed while a card was written again, the run was refused for what the kill had left."""
    (tmp_path / "config.json").write_text("{}")
    before = folder_sha256(tmp_path)
    for name in ("README.md", ".README.md.partial"):
        (tmp_path / name).write_text("a card")
    assert folder_sha256(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert folder_sha256(tmp_path) != before
