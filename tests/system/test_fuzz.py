"""Hundreds of command lines and damaged files: one line on standard error, the right exit code, nothing half-written.

An exception that leaves `main` would be a traceback. Everything runs in this process, so that it takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raev2.command.cli import COMMANDS, main
from raev2.errors import CheckpointError, DataError, FileError, SpecError, TaskError

USAGE, SPEC, DATA, CHECKPOINT, TASK, FILE = (
    2, SpecError.exit_code, DataError.exit_code, CheckpointError.exit_code, TaskError.exit_code, FileError.exit_code,
)  # fmt: skip
SAMPLE = ["sample", "--run", "run", "--n", "1", "--steps", "1", "--out", "out"]
TRAIN = ["train", "--task", "imagenet", "--recipe", "tiny"]
CONTINUE = [*TRAIN, "--run", "run", "--stage", "tokenizer"]
LATENTS = ["latents", "stats", "--run", "run/tokenizer", "--data", "data", "--out", "out"]
LIMIT_S = 20  # of the main thread's work, whatever else the machine does


@pytest.fixture(scope="module")
def made(trained_run, synthetic_data, tmp_path_factory) -> Path:
    """A folder with a finished run, its data and a picture; read only, every case works in links to it."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(trained_run, folder / "run")
    shutil.copytree(synthetic_data, folder / "data")
    shutil.copy(folder / "data/val/000000.png", folder / "picture.png")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A working folder with the files of `made` as hard links; a damaged one is written anew, so `made` stays."""
    shutil.copytree(made, tmp_path / "work", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@contextlib.contextmanager
def no_hang(argv: list[str]) -> Iterator[None]:
    """Fails after LIMIT_S of work in the main thread, and ends what waits for ever."""

    def ended(*_: object) -> None:
        raise AssertionError(f"waits for ever: {argv}")

    before, start = signal.signal(signal.SIGALRM, ended), time.thread_time()
    signal.alarm(10 * LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.thread_time() - start < LIMIT_S, argv


def outcome(argv: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code; the rules that hold for every command line are checked here."""
    try:
        with no_hang(argv):
            code = main(argv)
    except SystemExit as usage:
        code = usage.code
        assert code in (0, USAGE), argv
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and (len(errors) == 1) == (code not in (0, 1) and "usage: " not in err), (argv, err)
    hidden = [path for path in Path().rglob(".*") if path.name.endswith((".partial", ".old", ".lock"))]
    assert hidden == [], (argv, hidden)
    return code


# Command lines.

WORDS = ["", "nowhere", "picture.png", "data", "run/spec.yaml/x", "/dev/null", "x" * 300, "-1", "ü\n"]
NUMBERS = ["", "x", "-1", "0", "nan", "inf", "1e400", "99999999999999999999"]
FILES_OF_SAMPLE = ["--run", "--task", "--weak"]


def command_lines() -> Iterator[list[str]]:
    for command in COMMANDS:
        yield [command, "--nonsense"]
        yield [command, "nowhere", "nowhere", "nowhere"]
    for word in WORDS:
        yield ["report", "--run", word]
        yield ["eval", "--run", word]
        yield ["eval", "--run", "run", "--protocol", word]
        yield ["sample", "--run", word]
        yield ["sample", "--task", word]
        yield ["sample", "--run", "run", "--guidance", "auto", "--weak", word, "--out", "out"]
        yield ["sample", "--run", "run", "--label", word, "--out", "out"]
        yield ["reconstruct", "--run", word, "picture.png", "--out", "out"]
        yield ["reconstruct", "--run", "run", word, "--out", "out"]
        yield ["reconstruct", "--run", "run", "picture.png", "--out", word]
        yield [*TRAIN, "--resume", word, "--run", "new"]
        yield [*TRAIN, "--run", word, "--overwrite", "--set", "data.dir=nowhere", "--set", "data.recipe=null"]
        yield ["train", "--task", word]
        yield ["train", "--task", "imagenet", "--recipe", word]
        yield [*TRAIN, "--dry-run", "--set", word]
        if word not in ("", "data"):  # these two train
            yield [*TRAIN, "--run", "new", "--set", f"data.dir={word}", "--set", "data.recipe=null"]
            yield [*TRAIN, "--run", "new", "--set", f"tokenizer_from={word}"]
        yield ["show", word]
        yield ["show", "tiny", "--task", word]
        yield ["encoders", "check", word]
        yield ["data", "verify", word]
        yield ["data", "plan", word]
        yield ["data", "build", "image-folder", "--set", f"src={word}", "--out", "out"]
        yield ["data", "build", "synthetic", "--set", word, "--out", "out"]
        yield ["latents", "stats", "--run", word, "--data", "data", "--out", "out"]
        yield ["latents", "stats", "--run", "run", "--data", word, "--out", "out"]
        yield ["latents", "build", "--run", "run", "--data", "data", "--split", word, "--out", "out"]
        yield ["import", word, "--out", "out"]
        yield ["import", "picture.png", "--out", word]
        yield ["export", "--run", word, "--format", "pipeline", "--out", "out"]
        yield ["export", "--run", "run", "--format", "pipeline", "--out", word]
        yield ["analyse", word, "--run", "run"]
        yield ["bench", word or "x"]
        yield [word]
    for number in NUMBERS:
        for option in ("--n", "--steps", "--scale", "--seed"):
            if option != "--n" or number[:2] != "99":
                yield ["sample", "--run", "run", "--n", "1", "--steps", "1", "--out", "out", option, number]
        yield ["sample", "--run", "run", "--n", "1", "--steps", "1", "--out", "out", "--interval", number, "1"]
        yield [*TRAIN, "--dry-run", "--max-time", number]
        yield ["data", "build", "synthetic", "--out", "out", "--set", "num_val=0", "--set", f"num_train={number[:3]}"]
        for field in ("seed", "generator.width", "generator_training.images", "sampling.guidance.scale"):
            yield ["show", "tiny", "--set", f"{field}={number}"]


LINES = list(command_lines())


@pytest.mark.parametrize("part", range(10))
def test_no_command_line_ends_in_a_traceback(place, tiny_recipe, capsys, part):
    for argv in LINES[part::10]:
        code = outcome(argv, capsys)
        assert code in (0, 1, SPEC, DATA, CHECKPOINT, TASK, FILE), argv
        assert code != 1 or argv[0] == "encoders", argv
        for made in ("out", "new"):
            assert code == 0 or not Path(made).exists(), f"{argv} left something behind"
            shutil.rmtree(made, ignore_errors=True)
            Path(made).unlink(missing_ok=True)


# Damaged files.

TEXTS = [b"", b"{", b"null", b"[]", b'"text"', b"3", b"{}", b"\xff\xfe\x00\x01", b"a: [", b"NaN"]
VALUES = [None, "x", -1, [], {}, 10**30, math.nan]
# What reads the file, and the exit codes that may come of it: it may not matter what stands in a field.
READERS: dict[str, tuple[list[str], set[int]]] = {
    "run/spec.yaml": (SAMPLE, {0, SPEC, CHECKPOINT, TASK}),
    "run/tokenizer/config.json": (LATENTS, {0, CHECKPOINT}),
    "run/generator/config.json": (SAMPLE, {0, CHECKPOINT}),
    "data/manifest.json": (["data", "verify", "data"], {0, DATA}),
    "run/provenance.json": (["report", "--run", "run"], {0, CHECKPOINT}),
    "run/eval/generation-micro.json": (["report", "--run", "run"], {0, CHECKPOINT}),
    "run/metrics.jsonl": (["report", "--run", "run"], {0, CHECKPOINT}),
    "run/identity.json": (CONTINUE, {0, CHECKPOINT}),
}


def damaged(original: bytes, is_yaml: bool) -> Iterator[tuple[str, bytes]]:
    """Texts that are no such file, the first half of it, and the file with one field missing or of another kind."""
    yield from ((repr(text), text) for text in TEXTS)
    yield "half", original[: len(original) // 2]
    values = (
        yaml.safe_load(original)
        if is_yaml
        else json.loads(original.splitlines()[0] if b"}\n{" in original else original)
    )
    for i, name in enumerate(values):
        fewer: dict[str, Any] = {key: value for key, value in values.items() if key != name}
        yield f"no {name}", dump(fewer, is_yaml)
        for value in VALUES[i % 2 :: 2]:
            yield f"{name} {value!r}", dump({**values, name: value}, is_yaml)


def dump(values: dict[str, Any], is_yaml: bool) -> bytes:
    return (yaml.safe_dump(values) if is_yaml else json.dumps(values) + "\n").encode()


@pytest.mark.parametrize("name", READERS)
def test_no_damaged_file_ends_in_a_traceback(place, tiny_recipe, capsys, name):
    argv, codes = READERS[name]
    file, original = Path(name), Path(name).read_bytes()
    seen = set()
    for what, text in damaged(original, file.suffix == ".yaml"):
        file.unlink()
        file.write_bytes(text)
        code = outcome(argv, capsys)
        assert code in codes, (name, what, code)
        assert code == 0 or not Path("out").exists()
        seen.add(code)
        shutil.rmtree("out", ignore_errors=True)
        Path("out").unlink(missing_ok=True)
    assert len(seen) > 1 or argv[0] == "report", "damage was noticed, and not all of it was fatal"
