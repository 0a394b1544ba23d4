"""`raev2 selftest` finds nothing in raev2, and finds what is wrong with trainings that lose something."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raev2 import pipeline
from raev2.command.cli import main
from raev2.errors import RaeError
from raev2.files.artefact import write_json
from raev2.files.replace import ARTEFACT, new_folder
from raev2.training.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, save_checkpoint
from raev2_tasks.selftest.faults import Hook, Plan, Trainings, differences
from raev2_tasks.selftest.faults import run as run_selftest


def test_the_short_selftest_finds_nothing(capsys):
    assert main(["selftest", "--task", "imagenet", "--quick"]) == 0
    *rows, counts = capsys.readouterr().out.splitlines()
    faults = [row[10:26].rstrip() for row in rows]
    assert faults == ["none", "file too large", "kill", "truncated", "bit flipped", "disk full", "I/O error", "none"]
    assert [row.split(" exit ")[1].split(maxsplit=1) for row in rows[:6]] == [
        ["0", "identical"], ["6", "as before"], *[["-9", "as before"]] * 3, ["6", "as before"],
    ]  # fmt: skip
    assert rows[-1].endswith("exit 0    identical"), "and it is the same run at its end"
    assert "FAILED" not in counts


# Small trainings of our own: a sum of steps, that keeps all promises or breaks one.


def training(argv: list[str], flaw: str = "") -> int:
    """`raev2 train` as far as the selftest sees it."""
    run = Path(argv[argv.index("--run") + 1])
    try:
        for stage in ("tokenizer", "generator"):
            if not (run / stage / "config.json").is_file():
                train_stage(run, stage, flaw)
    except (OSError, RaeError) as error:
        if flaw == "traceback":
            raise
        print(f"error: {error}")
        return 5 if flaw == "exit code" else getattr(error, "exit_code", 6)
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "protocol.json").write_text('{"results": []}')
    return 0


def train_stage(run: Path, stage: str, flaw: str) -> None:
    folder = run / "checkpoints" / stage
    if flaw == "reads what is damaged":
        newest = (list_checkpoints(folder) or [None])[-1]
        found = newest and Checkpoint({"model": load_anyway(newest)}, {"images": int(newest.name)})
    else:
        found = latest_checkpoint(folder)
    total = found.tensors["model"]["sum"] if found else torch.zeros(5000)
    images = found.state["images"] if found else 0
    if flaw == "depends on the start":
        total = total + os.getpid()
    kept = [] if images == 0 and stage == "tokenizer" else (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    run.mkdir(parents=True, exist_ok=True)
    lines = [line for line in kept if json.loads(line)["stage"] != stage or json.loads(line)["images"] <= images]
    (run / "metrics.jsonl").write_text("".join(lines))
    for now in range(images + 4, 13, 4):
        total = total * 1.5 + now
        with (run / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"stage": stage, "kind": "train", "images": now}) + "\n")
        save_checkpoint(folder, now, Checkpoint({"model": {"sum": total}}, {}), keep=2)
    with new_folder(run / stage, ARTEFACT) as partial:
        save_file({"sum": total}, partial / "model.safetensors")
        write_json(partial / "config.json", {"format_version": 1})


def load_anyway(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def trainings(work: Path, flaw: str = "") -> Trainings:
    return Trainings(partial(training, flaw=flaw), "any", work, seed=0)


def verdicts(work: Path, flaw: str, *, kills: int = 0) -> list[str]:
    return [verdict for *_, verdict in trainings(work, flaw).rows(True, kills)]


def test_a_training_that_loses_nothing_is_found_faultless(tmp_path):
    found = verdicts(tmp_path, "")
    assert len(found) == 8 and set(found) == {"identical", "as before"}


def two_files(argv: list[str]) -> int:
    """A training of eight file operations."""
    run = Path(argv[-1])
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "picture.png"):
            (run / ".partial").write_text("")
            (run / ".partial").replace(run / name)
            (run / name).read_text()
    except OSError as error:
        return print(f"error: {error}") or 6
    return 0


def test_every_file_operation_is_met_by_a_kill_and_then_by_an_error(tmp_path):
    rows = [row[:2] for row in Trainings(two_files, "any", tmp_path, seed=0).rows(False, 0)]
    points = ["write .partial", "rename metrics.jsonl", "read metrics.jsonl", "rename picture.png", "read picture.png"]
    errors = {"write": "disk full", "rename": "disk full", "read": "I/O error"}
    assert rows[1:-1] == [(kind, point) for point in points for kind in ("kill", errors[point.split()[0]])]
    assert rows[0] == rows[-1] == ("none", "to the end")


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("reads what is damaged", "FAILED: other checkpoints/tokenizer/000000012/model.safetensors"),
        ("depends on the start", "FAILED: other checkpoints/tokenizer/"),
        ("traceback", "FAILED: "),
        ("exit code", "FAILED: error: "),
    ],
)
def test_a_training_that_breaks_a_promise_is_found(tmp_path, flaw, message):
    assert any(verdict.startswith(message) for verdict in verdicts(tmp_path, flaw))


def test_an_evaluation_of_the_tokenizer_that_the_log_lacks_is_repeated(tiny_spec, trained_run, tmp_path):
    """The selftest found it: killed between result file and log, the run went on without the line."""
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"protocol": "reconstruction-micro"' not in line))
    assert differences(run, trained_run, to_the_end=True) == ["metrics.jsonl"]
    pipeline.train(tiny_spec, run)
    assert differences(run, trained_run, to_the_end=True) == []


def test_kills_at_random_moments_are_counted_and_compared(tmp_path):
    found = verdicts(tmp_path, "", kills=3)
    assert found.count("as before") >= 3 and set(found) == {"identical", "as before"}
    (other := tmp_path / "other").mkdir()
    assert any("FAILED" in verdict for verdict in verdicts(other, "depends on the start", kills=1))


def test_a_failure_is_exit_code_1_and_counted(tmp_path, capsys):
    options = Namespace(task="imagenet", quick=True, kills=0, seed=0)
    assert run_selftest(options, partial(training, flaw="depends on the start")) == 1
    assert ", FAILED: " in capsys.readouterr().out.splitlines()[-1]


def test_each_start_has_one_fault_and_each_point_two(tmp_path):
    """First a kill, then an error; then it is left alone. Or one point is named, and met alone."""
    run, notes = tmp_path / "run", tmp_path / "notes"
    notes.touch()
    plans = [
        (Plan({}), ["kill"]), (Plan({"write a": 1}), ["disk full"]), (Plan({"write a": 2}), []),
        (Plan(), []), (Plan(at=("I/O error", "write a")), ["I/O error"]), (Plan(at=("kill", "read a")), []),
    ]  # fmt: skip
    for plan, expected in plans:
        hook = Hook(plan, run, notes)
        committed: list[str] = []
        hook.commit = lambda kind, point, committed=committed: committed.append(kind)
        for _ in range(2):
            hook("open", (f"{run}/a", "w", 0))
        hook("open", (str(tmp_path / "elsewhere"), "w", 0))
        hook("import", ("os",))
        assert committed == expected


def test_a_system_without_posix_is_told_so(monkeypatch, capsys):
    with monkeypatch.context() as other:
        other.setattr("raev2_tasks.selftest.command.POSIX", False)
        code = main(["selftest"])
    assert code == 2
    assert "error: raev2 selftest: needs signals and limits of POSIX; got posix" in capsys.readouterr().err


def test_runs_are_compared_by_weights_pictures_results_and_steps(trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    assert differences(run, trained_run, to_the_end=True) == []
    weights, result, log = (
        run / "generator/model.safetensors",
        run / "eval/generation-micro.json",
        run / "metrics.jsonl",
    )
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result.write_text(result.read_text().replace('"value": ', '"value": 1'))
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-3]))
    (run / "samples" / "extra.png").write_bytes(b"")
    shutil.rmtree(run / "checkpoints/tokenizer/000000048")
    found = differences(run, trained_run, to_the_end=True)
    assert [name for name in found if not name.startswith("checkpoints/tokenizer/000000048/")] == [
        "eval/generation-micro.json", "generator/model.safetensors", "metrics.jsonl", "samples/extra.png",
    ]  # fmt: skip
    assert len(found) > 4 and differences(run, trained_run, to_the_end=False) == ["generator/model.safetensors"]
