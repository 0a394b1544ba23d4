"""`--overwrite`: what is ours is replaced, everything else survives."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from raev2.command.cli import main
from raev2.errors import FileError, SpecError
from raev2.files.replace import ARTEFACT, CHECKPOINT, EXPORT, RUN, SAMPLES, check_replaceable, new_file, new_folder

TRAIN = ["train", "--task", "imagenet", "--recipe", "tiny"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def samples(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in {"plan.json": '{"time_shift": 1}', "00000.png": "old", **files}.items():
        (folder / name).write_text(text)
    return folder


# The function.


def test_an_older_folder_of_ours_is_replaced_whole(tmp_path):
    out = samples(tmp_path / "out")
    with new_folder(out, SAMPLES) as folder:
        (folder / "00001.png").write_text("new")
        assert contents(out)["00000.png"] == b"old", "until the new one is complete"
    assert contents(out) == {"00001.png": b"new"} and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file.json": b"old"}
    monkeypatch.setattr(os, "getpid", iter([1, 2]).__next__)
    with new_file(file, shared=True) as first, new_file(file, shared=True) as second:
        first.write_text("of process 1")
        second.write_text("of process 2")
        assert file.read_text() == "old"
    assert contents(tmp_path) == {"file.json": b"of process 1"}, "the last to end, whole"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_after_an_error_the_older_folder_is_as_it_was(tmp_path, error):
    before = contents(out := samples(tmp_path / "out"))
    with pytest.raises(type(error)), new_folder(out, SAMPLES) as folder:
        (folder / "00001.png").write_text("new")
        raise error
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_older_folder(tmp_path, monkeypatch, failing):
    """The first rename moves the older folder aside, the second one gives the new folder its name."""
    before = contents(out := samples(tmp_path / "out"))
    replace, calls = os.replace, iter(range(1, 9))

    def fail_once(source, target):
        if next(calls) == failing:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(FileError, match=r"out: could not be saved; got \[Errno 5\] Input/output error. Nothing was"):  # noqa: SIM117
        with new_folder(out, SAMPLES) as folder:
            (folder / "00001.png").write_text("new")
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    samples(tmp_path / "disk" / "out")
    (tmp_path / "out").symlink_to("disk/out")
    with new_folder(tmp_path / "out", SAMPLES) as folder:
        (folder / "00001.png").write_text("new")
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "disk" / "out") == {"00001.png": b"new"}


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        (SAMPLES, {"plan.json": '{"time_shift": 1}', "notes.txt": ""}),
        (SAMPLES, {"plan.json": '{"time_shift": 1}', "deep/00000.png": ""}),
        (SAMPLES, {"plan.json": '{"steps": "buy milk"}', "00000.png": ""}),
        (SAMPLES, {"00000.png": ""}),
        (ARTEFACT, {"config.json": '{"model_type": "dinov2"}', "model.safetensors": "", "README.md": ""}),
        (EXPORT, {"config.json": '{"format_version": 1}', "model.safetensors": ""}),
        (RUN, {"spec.yaml": "openapi: 3.0.0"}),
        (RUN, {"spec.yaml": "fingerprint: 1\n", "samples/holiday.jpg": ""}),
        (RUN, {"spec.yaml": "fingerprint: 1\n", "checkpoints/generator/000000008/thesis.tex": ""}),
        (RUN, {"spec.yaml": "fingerprint: 1\n", ".git/config": ""}),
        (CHECKPOINT, {"model.safetensors": "", "notes.txt": ""}),
    ],
)  # fmt: skip
def test_a_foreign_folder_survives(tmp_path, kind, files):
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    with (
        pytest.raises(FileError, match="out: exists and is not replaced; got .* in it; expected only what raev2 wrote"),
        new_folder(tmp_path / "out", kind),
    ):
        pass
    assert contents(tmp_path / "out") == {name: text.encode() for name, text in files.items()}


def test_a_link_inside_is_foreign(tmp_path):
    (samples(tmp_path / "out") / "00001.png").symlink_to(tmp_path)
    check_replaceable(tmp_path / "out", SAMPLES)  # a link named like a picture goes, what it points to does not
    (tmp_path / "out" / "data").symlink_to(tmp_path)
    with pytest.raises(FileError, match="got data in it"):
        check_replaceable(tmp_path / "out", SAMPLES)


@pytest.mark.parametrize("needed", ["{out}/00000.png", "{out}", "{out}/../out/plan.json", "src={out}/plan.json"])
def test_what_the_command_needs_survives(tmp_path, needed):
    out = samples(tmp_path / "out")
    with pytest.raises(FileError, match="exists and is not replaced; got .*, which the command needs"):
        check_replaceable(out, SAMPLES, needed=[needed.format(out=out)])
    check_replaceable(out, SAMPLES, needed=[str(tmp_path), f"{out}/none.png", None, 3, 0.5, ""])


def test_without_overwrite_only_an_absent_or_empty_folder_is_free(tmp_path):
    out = samples(tmp_path / "out")
    with pytest.raises(SpecError, match="--out: exists already; got .*out. Choose another folder, or add --overwrite."):
        check_replaceable(out, SAMPLES, overwrite=False)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        check_replaceable(tmp_path / name, SAMPLES, overwrite=False)


# Every command with --overwrite.


@pytest.fixture
def place(trained_run, synthetic_data, tiny_recipe, tmp_path, monkeypatch) -> Path:
    """The working folder, with the finished tiny run as `run` and a folder of pictures."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, "run")
    shutil.copytree(synthetic_data / "val", "pictures")
    return tmp_path


COMMANDS = {
    "train": [*TRAIN, "--stage", "tokenizer", "--run", "out", "--set", "tokenizer_from=run/tokenizer"],
    "sample": ["sample", "--run", "run", "--n", "1", "--out", "out"],
    "reconstruct": ["reconstruct", "--run", "run", "pictures/000000.png", "--out", "out"],
    "data": ["data", "build", "synthetic", "--set", "num_train=2", "--set", "num_val=1", "--out", "out"],
    "export": ["export", "--run", "run", "--format", "reference", "--out", "out"],
    "import": ["import", "decoder/decoder.pt", "--config", "decoder/config.yaml", "--from", "raev2", "--out", "out"],
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_replaces_what_it_wrote_and_nothing_else(place, synthetic_data, capsys, name):
    if name == "import":
        assert main(["export", "--run", "run", "--format", "reference", "--out", "decoder"]) == 0
    command = [*COMMANDS[name], "--overwrite"]
    assert main(command) == 0 and main(command) == 0
    first = contents(place / "out")
    (place / "out" / "thesis.tex").write_text("years of work")
    capsys.readouterr()
    assert main(command) == 6
    assert capsys.readouterr().err == (
        "error: out: exists and is not replaced; got thesis.tex in it; expected only what raev2 wrote. "
        "Choose another folder, or move this one away.\n"
    ).replace("error: out", f"error: {place / 'out'}" if name == "data" else "error: out")
    assert contents(place / "out") == {**first, "thesis.tex": b"years of work"}
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "command",
    [
        [*TRAIN, "--run", "run", "--set", "tokenizer_from=run/tokenizer"],
        [*TRAIN, "--run", "run", "--set", "generator_from=run/generator"],
        [*TRAIN, "--run", "run", "--set", "sampling.guidance={kind: auto, weak: run/generator}"],
        ["export", "--run", "run", "--format", "pipeline", "--out", "run"],
        ["sample", "--run", "run", "--out", "run"],
        ["reconstruct", "--run", "run", "run/samples", "--out", "run/samples"],
        ["data", "build", "image-folder", "--set", "src=data/train", "--out", "data"],
        ["import", "run/generator/model.safetensors", "--out", "run/generator"],
    ],
)
def test_nothing_is_lost_that_the_command_itself_reads(place, synthetic_data, capsys, command):
    shutil.copytree(synthetic_data, "data")
    before = contents(place)
    assert main([*command, "--overwrite"]) == 6
    assert "exists and is not replaced" in capsys.readouterr().err and contents(place) == before


def test_latents_never_replace_a_file(place, synthetic_data, capsys):
    shutil.copytree(synthetic_data, "data")
    command = ["latents", "stats", "--run", "run", "--data", "data", "--out", "out/latents.safetensors"]
    assert main(command) == 0
    before = contents(place)
    capsys.readouterr()
    assert main(command) == 2 and contents(place) == before
    assert capsys.readouterr().err == (
        "error: --out: exists already; got out/latents.safetensors. Choose another file.\n"
    )
