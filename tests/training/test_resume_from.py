"""`--resume PATH`: a new run that begins with a checkpoint of another one."""

import json

import pytest

from raev2.command.cli import main
from raev2.errors import CheckpointError, SpecError
from raev2.files.artefact import load_artefact
from raev2.pipeline import train
from raev2.spec_io import apply_overrides
from raev2.training.checkpoint import list_checkpoints
from raev2.training.resume import Origin


@pytest.fixture
def halfway(trained_run):
    """The checkpoint of the tiny run that lies furthest back."""
    return list_checkpoints(trained_run / "checkpoints" / "generator")[0]


def log(run):
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_same_spec_ends_with_the_same_weights(tiny_recipe, trained_run, halfway, tmp_path, capsys):
    command = [
        "train",
        "--task",
        "imagenet",
        "--recipe",
        "tiny",
        "--run",
        str(tmp_path / "b"),
        "--resume",
        str(halfway),
    ]
    assert main(command) == 0
    first, second = (load_artefact(run / "generator", kind="generator")[1] for run in (trained_run, tmp_path / "b"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    assert json.loads((tmp_path / "b" / "provenance.json").read_text())["resumed_from"] == str(halfway)
    steps = [line["images"] for line in log(tmp_path / "b") if line["kind"] == "train"]
    assert min(steps) == int(halfway.name) + 8, "nothing before it is trained again"
    assert not (tmp_path / "b" / "tokenizer").exists(), "the tokenizer of the first run serves both"
    assert main(command) == 0, "the same command continues, here with nothing left to do"
    command[-1] = str(list_checkpoints(halfway.parent)[-1])
    assert main(command) == 4
    assert f"exists and was not begun with --resume {command[-1]}; got {halfway}" in capsys.readouterr().err


def test_another_schedule_goes_on_from_there(tiny_spec, halfway, tmp_path):
    longer = apply_overrides(tiny_spec, ["generator_training.images=72", "evaluation.protocols=[]"])
    run = train(longer, tmp_path / "b", resume=halfway)
    assert [int(path.name) for path in list_checkpoints(run / "checkpoints" / "generator")][-1] >= 64
    assert max(line["images"] for line in log(run)) == 72


def test_a_tokenizer_goes_on_too(tiny_spec, trained_run, tmp_path):
    checkpoint = list_checkpoints(trained_run / "checkpoints" / "tokenizer")[0]
    run = train(tiny_spec, tmp_path / "b", stage="tokenizer", resume=checkpoint)
    first, second = (load_artefact(folder / "tokenizer", kind="tokenizer")[1] for folder in (trained_run, run))
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_run_of_the_checkpoint_is_not_touched(tiny_spec, trained_run, halfway, overwrite):
    before = {file: file.stat().st_mtime_ns for file in trained_run.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match="holds the checkpoint that the new run should begin with"):
        train(tiny_spec, trained_run, resume=halfway, overwrite=overwrite)
    after = {file: file.stat().st_mtime_ns for file in trained_run.rglob("*") if file.is_file()}
    assert before == after


def test_what_cannot_go_on_is_said_before_anything_starts(tiny_spec, trained_run, halfway, tmp_path):
    for path in (tmp_path, trained_run, halfway.parent):
        with pytest.raises(CheckpointError, match="not a checkpoint of a run; expected auto, never or RUN/checkpoints"):
            train(tiny_spec, tmp_path / "b", resume=path)
    origin = Origin.open(halfway)
    for override, name in (("optimizer.momentum=0.5", "optimizer"), ("ema_decays=[0.7]", "ema_decays")):
        with pytest.raises(SpecError, match=rf"generator_training.{name}: differs from the checkpoint's"):
            origin.fitted(apply_overrides(tiny_spec, [f"generator_training.{override}"]), tmp_path / "b")
    tokenizer = Origin.open(list_checkpoints(trained_run / "checkpoints" / "tokenizer")[0])
    with pytest.raises(SpecError, match="leaves no tokenizer to train"):
        tokenizer.fitted(tiny_spec.replace(tokenizer_from="x"), tmp_path / "b")
    with pytest.raises(CheckpointError, match="size mismatch|shape"):
        train(apply_overrides(tiny_spec, ["generator.width=64"]), tmp_path / "c", resume=halfway)
    assert not (tmp_path / "b").exists()
