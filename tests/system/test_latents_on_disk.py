"""Latents on disk: training reads them in place of pictures, and nothing but its speed changes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from raev2 import RAE, pipeline
from raev2.command.cli import main
from raev2.data import FolderDataset, to_float
from raev2.errors import CheckpointError, SpecError
from raev2.files.latent_folder import LatentFolder
from raev2.spec_io import apply_overrides, save_spec
from raev2_tasks.latents import files


@pytest.fixture
def build(trained_run, tmp_path, monkeypatch, capsys):
    """Builds a folder of latents of the tiny run, some samples a file: (exit code, folder, error)."""
    monkeypatch.setattr(files, "FILE_BYTES", 2**19)  # 10 samples of 192 x 8 x 8 in fp32

    def run(*options: str, out: str = "latents", source: Path = trained_run) -> tuple[int, Path, str]:
        folder = tmp_path / out
        command = ["latents", "build", "--run", str(source), "--out", str(folder), "--workers", "0"]
        code = main([*command, *options])
        return code, folder, capsys.readouterr().err

    return run


BARE = ("evaluation.protocols=[]", "evaluation.in_training=[]", "data.cache=false")


def trained(spec, trained_run, run: Path, *settings: str) -> list[dict]:
    pipeline.train(apply_overrides(spec, [f"tokenizer_from={trained_run / 'tokenizer'}", *BARE, *settings]), run)
    return log(run)


def log(run: Path) -> list[dict]:
    """Steps of stage 2."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == "generator" and line["kind"] == "train"]


SETTINGS = ("data.horizontal_flip=true", "generator_training.micro_batch_size=3")


@pytest.fixture(scope="module")
def online(tiny_spec, trained_run, tmp_path_factory) -> list[dict]:
    """The log of a training that encodes."""
    return trained(tiny_spec, trained_run, tmp_path_factory.mktemp("online") / "run", *SETTINGS)


def assert_near(found: list[dict], expected: list[dict], near: float) -> None:
    assert len(found) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["loss"], ours["base"], ours["grad_norm"]) == pytest.approx(
            (theirs["loss"], theirs["base"], theirs["grad_norm"]), rel=near
        )


@pytest.mark.parametrize(("dtype", "near"), [("fp32", 1e-6), ("fp16", 1e-3), ("int8", 2e-3)])
def test_training_from_disk_is_training_that_encodes(
    build, online, tiny_spec, trained_run, tmp_path, monkeypatch, dtype, near
):
    code, folder, err = build("--dtype", dtype, "--mirrored")
    assert code == 0, err
    monkeypatch.setattr("raev2.data.read_rgb", lambda *_: pytest.fail("a picture was decoded"))
    monkeypatch.setattr(pipeline, "_save_samples", lambda *_: None)
    found = trained(tiny_spec, trained_run, tmp_path / "disk", *SETTINGS, f"generator_training.latents={folder}")
    assert_near(found, online, near)


def test_latents_on_disk_are_those_of_the_tokenizer_by_number(build, trained_run, synthetic_data, caplog):
    caplog.set_level(logging.INFO)
    _, folder, _ = build("--dtype", "bf16", "--mirrored", "--split", "val")
    assert "16 latents of 192 x 8 x 8 in bf16: 0.8 MiB, 0.0 MiB of it there already" in caplog.text
    found, rae = LatentFolder(folder), RAE.from_pretrained(trained_run / "tokenizer")
    assert len(found.files) == 2 and found[0].dtype == torch.bfloat16
    for number in (0, 9, 10, 15):
        image = to_float(FolderDataset(synthetic_data, "val", (64, 64)).image(number))[None]
        for latents, picture in ((found[number], image), (found.mirrored(number), image.flip(3))):
            torch.testing.assert_close(latents.float(), rae.encode(picture)[0], atol=0.02, rtol=0.01)


def test_int8_keeps_every_channel_to_half_a_step_of_its_own(build, trained_run, synthetic_data):
    _, folder, _ = build("--dtype", "int8", "--split", "val")
    found, rae = LatentFolder(folder), RAE.from_pretrained(trained_run / "tokenizer")
    image = to_float(FolderDataset(synthetic_data, "val", (64, 64)).image(12))[None]
    exact = rae.encode(image)[0]
    steps = exact.abs().amax((1, 2), keepdim=True) / 127
    assert ((found[12] - exact).abs() <= 0.501 * steps).all()
    assert steps.max() > 2 * steps.min(), "channels differ"


def test_an_interrupted_build_goes_on_with_the_files_that_are_missing(build, monkeypatch):
    _, whole, _ = build(out="whole")
    real, written = files.save_file, []

    def killed(tensors, path, metadata):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", killed)
    assert build()[0] == 130
    monkeypatch.setattr(files, "save_file", real)
    folder = whole.with_name("latents")
    with pytest.raises(CheckpointError, match=r"not complete; got 1 of 2 files missing, 000001.safetensors first"):
        LatentFolder(folder)
    first = (folder / "000000.safetensors").stat()
    assert build()[0] == 0
    assert (folder / "000000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    for file in sorted(whole.iterdir()):
        assert file.read_bytes() == (folder / file.name).read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in whole.iterdir())


TWO = """
import sys
from raev2 import pipeline
from raev2.command.cli import main
from raev2.spec_io import load_spec

run, out, spec, train = sys.argv[1:]
assert main(["latents", "build", "--run", run, "--out", out, "--dtype", "fp32", "--mirrored", "--workers", "1"]) == 0
pipeline.train(load_spec(spec), train)
"""


def test_two_processes_write_the_same_folder_and_train_from_it(build, online, tiny_spec, trained_run, tmp_path):
    """Each writes its files, and reads its samples of those of both."""
    _, expected, _ = build("--dtype", "fp32", "--mirrored", out="expected")
    (tmp_path / "two.py").write_text(TWO)
    settings = [*BARE, *SETTINGS, f"generator_training.latents={tmp_path / 'two'}"]
    save_spec(apply_overrides(tiny_spec, [f"tokenizer_from={trained_run / 'tokenizer'}", *settings]), tmp_path / "spec")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    names = [tmp_path / "two.py", trained_run, tmp_path / "two", tmp_path / "spec", tmp_path / "run"]
    result = subprocess.run(
        [*command, *map(str, names)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    ours, theirs = LatentFolder(tmp_path / "two"), LatentFolder(expected)
    assert ours.identity == theirs.identity
    assert all(torch.equal(ours[number], theirs[number]) for number in range(32))
    assert_near(log(tmp_path / "run"), online, 1e-5)


def test_latents_of_something_else_are_refused_with_both_values(build, tiny_spec, trained_run, tmp_path, monkeypatch):
    _, folder, _ = build()
    about = json.loads((folder / "latents.json").read_text())
    for name, message in (
        ("tokenizer", r"latents .*: of another tokenizer; got xyz; expected [0-9a-f]{16}\. Build them: raev2 latents"),
        ("data", "of another data; got xyz; expected [0-9a-f]{64}"),
        ("split", "of another split; got xyz; expected train"),
    ):  # fmt: skip
        (folder / "latents.json").write_text(json.dumps({**about, "identity": {**about["identity"], name: "xyz"}}))
        with pytest.raises(CheckpointError, match=message):
            trained(tiny_spec, trained_run, tmp_path / name, f"generator_training.latents={folder}")
    (folder / "latents.json").write_text(json.dumps(about))
    with pytest.raises(
        CheckpointError, match="without mirrored pictures, which this run shows. Build them with --mirr"
    ):
        trained(
            tiny_spec, trained_run, tmp_path / "f", f"generator_training.latents={folder}", "data.horizontal_flip=true"
        )
    with pytest.raises(CheckpointError, match=r"latents nowhere: none here; expected a folder with latents.json"):
        trained(tiny_spec, trained_run, tmp_path / "n", "generator_training.latents=nowhere")
    (folder / "000000.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="000000.safetensors: damaged; got .*Delete it and build again"):
        LatentFolder(folder)


def test_statistics_are_part_of_what_latents_depend_on(trained_run):
    rae = RAE.from_pretrained(trained_run / "tokenizer")
    before = rae.identity()
    rae.stats_var.mul_(2)
    assert rae.identity() != before


def test_a_build_that_cannot_be_is_refused_before_it_starts(build, trained_run, monkeypatch):
    _, folder, _ = build()
    code, _, err = build("--dtype", "fp32")
    assert (
        code == 4 and "latents: there is something with another dtype; got fp16; expected fp32. Choose another" in err
    )
    (folder / "latents.json").unlink()
    assert build()[0] == 4, "a folder that is not ours is not written to"
    code, _, err = build(source=trained_run / "tokenizer", out="other")
    assert code == 2 and "--data: needed with a tokenizer folder; got " in err
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    code, other, err = build(out="full")
    assert code == 6 and not other.exists()
    assert "full: no room for the latents; got 0.0 MiB free; expected 0.8 MiB. Choose another disk for --out" in err


def test_an_unreadable_picture_ends_a_build_and_names_it(build, tiny_spec, trained_run, synthetic_data, tmp_path):
    data = Path(shutil.copytree(synthetic_data, tmp_path / "data"))
    (data / "train" / "000005.png").write_bytes(b"")
    code, _, err = build("--data", str(data))
    assert code == 3 and "train/000005.png" in err.splitlines()[-1]


def test_the_alignment_loss_needs_pictures(tiny_spec):
    repa = "generator_training.repa={encoder: {name: micro}}"
    settings = [repa, "generator.repa_depth=1", "generator.repa_dim=192", "generator_training.latents=x"]
    with pytest.raises(SpecError, match=r"generator_training.repa needs pictures. Set generator_training.latents=null"):
        apply_overrides(tiny_spec, settings)
