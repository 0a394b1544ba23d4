"""A run that is killed at any moment and started again is the run that was never killed, bit for bit (fp32, CPU)."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raev2.spec import RunSpec
from raev2.task import get_task

# A server process imports everything once; every start of the command is a fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["raev2.pipeline", "raev2_tasks.report.page", "raev2.command.actions"])

TRAIN = ["train", "--task", "imagenet", "--recipe", "tiny"]
MOMENTARY = ("time", "images_per_s", "data_wait")
PATIENCE = 120.0


def command(spec: RunSpec, argv: list[str], log: Path) -> None:
    """`raev2 ARGV` in a process of its own, with the tiny run among the recipes."""
    from raev2.command.cli import main

    multiprocessing.set_start_method("fork", force=True)  # for data workers: not again a server
    os.setsid()  # a signal to the group reaches the command and its data workers alone
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    get_task("imagenet").recipes()["tiny"] = lambda: spec
    sys.exit(main(argv))


class Trainings:
    """Starts the same command again and again in one run folder."""

    def __init__(self, spec: RunSpec, run: Path, *options: str) -> None:
        self.spec, self.run, self.log = spec, run, run.with_suffix(".log")
        self.argv = [*TRAIN, "--run", str(run), *options]
        self.num_signals = 0

    def start(self) -> multiprocessing.process.BaseProcess:
        process = PROCESSES.Process(target=command, args=(self.spec, self.argv, self.log))
        process.start()
        return process

    def finish(self) -> Path:
        process = self.start()
        process.join(PATIENCE)
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return self.run

    def interrupt(self, number: int, moment: Callable[[float], bool], delay: float) -> int | None:
        """Start, wait for the moment and a little longer, send the signal; the exit code, None if it was too late."""
        process, started = self.start(), time.time()
        while not moment(started):
            process.join(0.01)
            if process.exitcode is not None:
                assert process.exitcode == 0, self.log.read_text()[-3000:]
                return None
            assert time.time() < started + PATIENCE
        process.join(delay)
        if process.exitcode is None:
            os.killpg(process.pid, number)
            self.num_signals += 1
        process.join(PATIENCE)
        return process.exitcode

    def has_finished(self, stage: str) -> bool:
        """Whether the artefact of a stage is there."""
        return (self.run / stage / "config.json").is_file()

    def has_logged(self, stage: str, num_lines: int) -> Callable[[float], bool]:
        """Whether the process that started then has logged so many steps of a stage, or has finished it."""

        def moment(started: float) -> bool:
            lines = read_log(self.run)
            return self.has_finished(stage) or num_lines <= sum(
                line["stage"] == stage and line["kind"] == "train" and line["time"] > started for line in lines
            )

        return moment


def read_log(run: Path) -> list[dict]:
    """Whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def numbers_of(run: Path) -> dict[tuple, dict]:
    """What was logged, by stage, kind and images; a step that is logged twice is an error."""
    found: dict[tuple, dict] = {}
    for line in read_log(run):
        key = (line["stage"], line["kind"], line["images"], line.get("protocol"))
        values = {name: value for name, value in line.items() if name not in MOMENTARY}
        assert key not in found or (line["kind"] == "eval" and found[key] == values), f"logged twice: {key}"
        found[key] = values
    return found


def files_of(run: Path) -> dict[str, bytes]:
    """All weights, optimizer states and pictures."""
    files = [file for pattern in ("*.safetensors", "*.png") for file in run.rglob(pattern)]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def assert_same_run(run: Path, whole: Path) -> None:
    assert numbers_of(run) == numbers_of(whole)
    files, expected = files_of(run), files_of(whole)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    for file in (whole / "eval").glob("*.json"):
        results = [json.loads((folder / "eval" / file.name).read_text())["results"] for folder in (run, whole)]
        assert results[0] == results[1]
    hidden = [file for file in run.rglob("*.partial") if "checkpoints" not in file.parts]
    assert hidden == []


@pytest.fixture(scope="module")
def spec(tiny_spec) -> RunSpec:
    """The tiny run with half of the batch, and its data read from files, so that workers matter."""
    half = {"batch_size": 4, "save_every_images": 8}
    return tiny_spec.replace(
        data=tiny_spec.data.replace(cache=False, horizontal_flip=True),
        tokenizer_training=tiny_spec.tokenizer_training.replace(images=24, sample_every_images=12, **half),
        generator_training=tiny_spec.generator_training.replace(
            images=32, sample_every_images=16, eval_every_images=16, **half
        ),
    )


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory) -> Path:
    """The run that is never interrupted."""
    return Trainings(spec, tmp_path_factory.mktemp("runs") / "whole").finish()


@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (1, 2)])
def test_a_run_that_is_killed_at_random_moments_is_the_same_run(spec, whole, tmp_path, seed, workers):
    trainings = Trainings(spec, tmp_path / "run", "--set", f"data.num_workers={workers}")
    rng = random.Random(seed)
    for stage in ("tokenizer", "generator"):
        for _ in range(3):
            if not trainings.has_finished(stage):
                moment = trainings.has_logged(stage, rng.randint(1, 4))
                trainings.interrupt(signal.SIGKILL, moment, delay=rng.uniform(0, 0.3))
    assert trainings.num_signals >= 2
    assert_same_run(trainings.finish(), whole)


@pytest.mark.parametrize(
    ("stage", "number", "workers"),
    [("tokenizer", signal.SIGTERM, 2), ("generator", signal.SIGINT, 2), ("generator", signal.SIGUSR1, 2),
     ("tokenizer", signal.SIGHUP, 0), ("generator", signal.SIGALRM, 0)],
)  # fmt: skip
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(spec, whole, tmp_path, stage, number, workers):
    """The signal goes to the whole process group, data workers too, as Ctrl-C and a cancelled job do.

    SIGUSR1 is Slurm's warning, SIGALRM the clock of --max-time.
    """
    trainings = Trainings(spec, tmp_path / "run", "--set", f"data.num_workers={workers}")
    code = trainings.interrupt(number, trainings.has_logged(stage, 1), delay=0)
    log = trainings.log.read_text()
    assert code == 75 and f"{stage} stopped after " in log and "saved. The same command continues." in log, log
    assert "Traceback" not in log
    images = int(log.rpartition("stopped after ")[2].split()[0])
    assert (trainings.run / f"checkpoints/{stage}/{images:09d}/MANIFEST.json").is_file()
    assert max(line["images"] for line in read_log(trainings.run) if line["stage"] == stage) == images
    run = trainings.finish()
    kept, expected = (sorted((folder / f"checkpoints/{stage}").iterdir()) for folder in (run, whole))
    if [path.name for path in kept] != [path.name for path in expected]:  # one more checkpoint, and one fewer old one
        for folder in set(kept) - {run / path.relative_to(whole) for path in expected}:
            shutil.rmtree(folder)
        for folder in {run / path.relative_to(whole) for path in expected} - set(kept):
            shutil.copytree(whole / folder.relative_to(run), folder)
    assert_same_run(run, whole)


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(spec, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "generator")
    (run / "eval" / "generation-micro.json").unlink()
    file = run / "checkpoints/generator/000000032/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    trainings = Trainings(spec, run)
    assert_same_run(trainings.finish(), whole)
    assert "checkpoints/generator/000000032/model.safetensors: damaged" in trainings.log.read_text()


def test_a_log_that_was_cut_short_does_not_matter(spec, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "generator")
    shutil.rmtree(run / "checkpoints/generator/000000032")
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"stage": "generator", "kind": "tr')
    assert_same_run(Trainings(spec, run).finish(), whole)
