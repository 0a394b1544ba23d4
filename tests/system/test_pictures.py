"""Pictures in and out of a run: `raev2 sample --npz`, `raev2 reconstruct`."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raev2.command.cli import main


def as_array(folder: Path) -> np.ndarray:
    """The pictures of `raev2 sample --out`."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("[0-9]*.png"))])


# raev2 sample --npz


def test_the_array_holds_the_pictures_of_the_folder(trained_run, tmp_path, capsys):
    """70 pictures in chunks of 16; the grid shows the first 64."""
    common = ["sample", "--run", str(trained_run), "--n", "70", "--seed", "5"]
    assert main([*common, "--npz", str(tmp_path / "deep" / "a.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "deep" / "a.npz")
    assert main([*common, "--out", str(tmp_path / "folder")]) == 0
    with np.load(tmp_path / "deep" / "a.npz") as archive:
        pictures, plan = archive["arr_0"], json.loads(archive["plan.json"])
    assert pictures.shape == (70, 64, 64, 3) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, as_array(tmp_path / "folder"))
    assert plan == json.loads((tmp_path / "folder" / "plan.json").read_text())
    assert plan["seed"] == 5 and len(plan["captions"]) == 70 and len(plan["weights"]["generator"]) == 16
    with Image.open(tmp_path / "folder" / "grid.png") as grid:
        assert grid.width == 8 * 66 + 2 and 8 * 64 < grid.height < 8 * 64 * 2, "eight rows and columns"


DIES_IN_THE_SECOND_CHUNK = """
import os, signal, sys
from raev2.command.cli import main
from raev2.files.picture_array import PictureArrayWriter
append = PictureArrayWriter.append
def die(self, pictures):
    append(self, pictures)
    if self.done > 16:
        os.kill(os.getpid(), signal.SIGKILL)
PictureArrayWriter.append = die
main(sys.argv[1:])
"""


def test_an_array_that_was_killed_is_continued_with_the_same_bytes(trained_run, tmp_path):
    common = ["sample", "--run", str(trained_run), "--n", "48", "--steps", "8", "--npz"]
    file, partial = tmp_path / "a.npz", tmp_path / ".a.npz.partial"
    process = subprocess.run([sys.executable, "-c", DIES_IN_THE_SECOND_CHUNK, *common, str(file)], check=False)
    assert process.returncode == -signal.SIGKILL and not file.exists()
    assert partial.stat().st_size > 16 * 64 * 64 * 3
    assert main([*common, str(file)]) == 0
    assert main([*common, str(tmp_path / "whole.npz")]) == 0
    assert file.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_an_array_is_not_continued_with_other_options(trained_run, tmp_path, capsys):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    file = tmp_path / "a.npz"
    (tmp_path / ".a.npz.partial").write_bytes(b'{"run": "another"}\n')
    assert main(["sample", "--run", str(run), "--n", "2", "--npz", str(file)]) == 6
    assert (
        ".a.npz.partial: holds a part of other pictures. Give the options it was begun with" in capsys.readouterr().err
    )


def test_a_file_that_is_there_is_not_lost(trained_run, tmp_path, capsys):
    common = ["sample", "--run", str(trained_run), "--n", "2", "--npz"]

    def refused(code: int, *arguments: str) -> str:
        assert main([*common, *arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    file = tmp_path / "a.npz"
    np.savez(file, arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    before = file.read_bytes()
    assert refused(2, str(file)).startswith(
        f"error: --npz: exists already; got {file}. Choose another file, or add --ov"
    )
    assert refused(6, str(file), "--overwrite").startswith(
        f"error: {file}: exists and is not replaced; got no plan.json of ours in it. Choose another file, or move"
    )
    assert refused(2, str(tmp_path / "a.txt")).endswith("a.txt; expected a name that ends in .npz\n")
    assert file.read_bytes() == before
    assert main([*common, str(tmp_path / "b.npz")]) == main([*common, str(tmp_path / "b.npz"), "--overwrite"]) == 0


# raev2 reconstruct


@pytest.fixture
def inputs(synthetic_data: Path, tmp_path: Path) -> Path:
    """Two pictures of one name, one that is damaged, one with a long name, and a text."""
    folder = tmp_path / "inputs"
    for name, number in (("a/one.png", 0), ("b/one.png", 1), ("c.png", 2), (f"d{'e' * 200}.png", 3)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(synthetic_data / "val" / f"{number:06d}.png", folder / name)
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("notes")
    return folder


def test_reconstruct_goes_on_past_a_bad_file_and_says_so(trained_run, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    reconstruct = ["reconstruct", "--run", str(trained_run), str(inputs), "--out", str(out)]
    assert main(reconstruct) == 3
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == f"not read: 1 of 4: {inputs / 'c.png'}"
    assert len([line for line in captured.out.splitlines() if ".png " in line]) == 3

    table = json.loads((out / "table.json").read_text())
    pictures = ["00000-one.png", "00001-one.png", f"00003-d{'e' * 79}.png"]
    assert [row["picture"] for row in table["rows"]] == pictures
    assert sorted(file.name for file in out.iterdir()) == [*pictures, "grid.png", "table.csv", "table.json"]
    assert [row["file"] for row in table["rows"][:2]] == [str(inputs / "a/one.png"), str(inputs / "b/one.png")]
    (failed,) = table["failed"]
    assert failed["file"] == str(inputs / "c.png") and "cannot be read as an image" in failed["error"]

    with (out / "table.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    for row, known in zip(rows, table["rows"], strict=True):
        assert row["file"] == known["file"] and row["picture"] == known["picture"]
        assert float(row["psnr"]) == known["psnr"] and float(row["ssim"]) == known["ssim"]
        assert float(row["distance"]) == known["distance"] and row["distance_name"] == known["distance_name"]
    assert main([*reconstruct, "--overwrite"]) == 3, "the folder is known as ours"


def test_reconstruct_without_any_readable_picture_is_an_error(trained_run, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["reconstruct", "--run", str(trained_run), str(inputs / "c.png"), "--out", str(out)]) == 3
    where, error = inputs / "c.png", capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {where}: none of 1 pictures can be read; got {where}: cannot be read as an image")
    assert not out.exists()
