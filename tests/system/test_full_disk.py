"""Disks that fill up, folders that are read-only, memory that runs out: one line, the right exit code, nothing left."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image

from raev2 import train_generator, train_tokenizer
from raev2.command.cli import main
from raev2.model import opened

resource = pytest.importorskip("resource", reason="POSIX only")
TRAIN = ["train", "--task", "imagenet", "--recipe", "tiny", "--run"]
COMMANDS = {
    "train, a new run": [*TRAIN, "out"],
    "train, its data": [*TRAIN, "out", "--set", "data.dir=new-data", "--set", "data.recipe=synthetic"],
    "train, on and on": [*TRAIN, "half"],
    "sample": ["sample", "--run", "run", "--n", "1", "--steps", "1", "--out", "out"],
    "reconstruct": ["reconstruct", "--run", "run", "picture.png", "--out", "out"],
    "eval": ["eval", "--run", "run", "--protocol", "reconstruction-micro"],
    "report": ["report", "--run", "run"],
    "data build": ["data", "build", "synthetic", "--set", "num_train=3", "--set", "num_val=0", "--out", "out"],
    "data build, pictures": ["data", "build", "image-folder", "--out", "out", "--set", "src=pictures"],
    "data build, shards": [
        "data",
        "build",
        "captioned-folder",
        "--out",
        "out",
        "--set",
        "src=pictures",
        "--set",
        "size=16",
    ],
    "data build, drives": ["data", "build", "frames-poses", "--out", "out", "--set", "src=drives"],
    "latents stats": ["latents", "stats", "--run", "run", "--data", "data", "--out", "out"],
    "latents build": ["latents", "build", "--run", "run", "--data", "data", "--out", "out"],
    "export": ["export", "--run", "run", "--format", "reference", "--out", "out"],
    "export for the hub": ["export", "--run", "run", "--format", "pipeline", "--out", "out"],
}


@pytest.fixture
def place(trained_run, synthetic_data, tiny_recipe, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, "run")
    shutil.copytree(trained_run, "half")
    shutil.rmtree("half/generator")
    shutil.rmtree("half/checkpoints/generator/000000064")
    shutil.copytree(synthetic_data, "data")
    shutil.copy("data/val/000000.png", "picture.png")
    for number in range(48):
        picture = synthetic_data / f"val/{number % 4:06d}.png"
        for file in (f"pictures/{number % 2}/{number}.png", f"drives/{number % 2}/{number:02d}.png"):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, file)
        Path(f"pictures/{number % 2}/{number}.txt").write_text(f"shape {number}", encoding="utf-8")
    for drive in ("0", "1"):
        lines = [f"{step / 4},{step / 4},0,0" for step in range(24)]
        Path("drives", drive, "poses.csv").write_text("\n".join(["t,x,y,yaw", *lines]), encoding="utf-8")
    return tmp_path


@contextmanager
def disk_with(num_bytes: int) -> Iterator[None]:
    """Inside, no file can grow beyond so many bytes: a write fails in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(place, capsys, name):
    before = contents(place)
    with disk_with(64):
        code = main(COMMANDS[name])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 6 and len(error) == 1, error
    assert "File too large" in error[0]
    after = contents(place)
    assert {file: after[file] for file in before if not file.endswith("metrics.jsonl")} == {
        file: data for file, data in before.items() if not file.endswith("metrics.jsonl")
    }
    assert [file for file in after.keys() - before.keys() if not file.endswith("metrics.jsonl")] == []
    if name.startswith("train, on"):
        assert main(COMMANDS[name]) == 0, "and with space again it goes on"
        assert (place / "half/generator/model.safetensors").read_bytes() == (
            place / "run/generator/model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith(("data build, ", "train, a"))])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_what_the_machine_refuses_is_not_left_out_of_the_data(place, monkeypatch, capsys, name, number):
    """An unreadable picture is replaced or left out and counted; here the picture is whole."""
    opened, calls = Image.open, count()

    def refuse(source, *args, **kwargs):
        if next(calls) == 9:
            raise OSError(number, os.strerror(number), "some.png")
        return opened(source, *args, **kwargs)

    monkeypatch.setattr(Image, "open", refuse)
    assert main(COMMANDS[name]) == 6
    assert f"error: some.png: cannot be read or written; got {os.strerror(number)}" in capsys.readouterr().err
    assert not (place / "out/manifest.json").exists() and not (place / "out/generator").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["train, a new run", "sample", "data build", "latents stats", "export"])
def test_a_folder_that_is_read_only_is_one_line(place, capsys, name):
    place.chmod(0o555)
    try:
        assert main(COMMANDS[name]) == 6
    finally:
        place.chmod(0o755)
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("module", "function", "field", "value"),
    [
        (train_tokenizer, "l1_loss", "tokenizer_training.micro_batch_size", 8),
        (train_generator, "training_loss", "generator_training.micro_batch_size", 8),
        (opened, "sample", "sampling.batch_size", 16),
    ],
)
def test_memory_that_runs_out_names_the_field_to_lower(
    tiny_recipe, trained_run, tmp_path, monkeypatch, capsys, error, module, function, field, value
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, function, fail)
    tokenizer = [] if module is train_tokenizer else ["--set", f"tokenizer_from={trained_run / 'tokenizer'}"]
    assert main([*TRAIN, str(tmp_path / "run"), *tokenizer]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: spec.{field}: out of memory; got {value}; expected at most {value // 2}. "
        f"Add --set {field}={value // 2}; it changes speed, not results."
    )


def test_another_error_of_torch_is_still_a_defect(tiny_recipe, trained_run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train_generator, "training_loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main([*TRAIN, str(tmp_path / "run"), "--set", f"tokenizer_from={trained_run / 'tokenizer'}"])


def test_this_machine_says_so_too():
    """The text that `memory_field` looks for is the one of this torch."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(2**55)
