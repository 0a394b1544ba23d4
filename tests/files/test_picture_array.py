"""Pictures in .npz files: numpy reads what is written, ours reads what numpy writes, a killed writer is continued."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from raev2.errors import DataError, FileError
from raev2.files.picture_array import PictureArray, PictureArrayWriter, holds_plan

PLAN = {"seed": 3}
PICTURES = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)


def write(file: Path, pictures: np.ndarray = PICTURES, plan: dict = PLAN, block: int = 1) -> int:
    """How many pictures were there before."""
    with PictureArrayWriter(file, plan, (4, 6), block) as writer:
        before = writer.done
        for start in range(before, len(pictures), 3):
            writer.append(pictures[start : start + 3])
    return before


def test_numpy_reads_what_is_written(tmp_path):
    write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["arr_0"], PICTURES)
        assert archive["plan.json"] == b'{"seed": 3}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    assert holds_plan(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ours_reads_what_numpy_writes(tmp_path, save):
    save(tmp_path / "a.npz", other=np.arange(7), arr_0=PICTURES)
    array = PictureArray(tmp_path / "a.npz")
    assert array.shape == (10, 4, 6, 3)
    assert np.array_equal(array.read([7, 0, 7]), PICTURES[[7, 0, 7]])
    assert not holds_plan(tmp_path / "a.npz")


def test_a_large_array_is_neither_written_nor_read_in_memory(tmp_path):
    code = f"""
import resource
import numpy as np
from pathlib import Path
from raev2.files.picture_array import PictureArray, PictureArrayWriter
picture = np.ones((1, 500, 500, 3), np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with PictureArrayWriter(Path({str(tmp_path / "a.npz")!r}), {PLAN}, (500, 500)) as writer:
    for _ in range(150):
        writer.append(picture)
array = PictureArray(Path({str(tmp_path / "a.npz")!r}))
assert array.shape[0] == 150 and array.read([0, 149]).all()
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert more < 2**15, f"{{more}} KiB, and the file has 110,000"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_writer_that_was_killed_is_continued_with_the_same_bytes(tmp_path):
    write(tmp_path / "whole.npz")
    code = f"""
import os, signal
import numpy as np
from pathlib import Path
from raev2.files.picture_array import PictureArrayWriter
pictures = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
with PictureArrayWriter(Path({str(tmp_path / "a.npz")!r}), {PLAN}, (4, 6)) as writer:
    writer.append(pictures[:5])
    writer.opened.write(pictures[5].tobytes()[:20])
    writer.opened.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "a.npz").exists() and (tmp_path / ".a.npz.partial").is_file()
    assert write(tmp_path / "a.npz", block=3) == 3, "whole blocks"
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "whole.npz"]


@pytest.mark.parametrize("kept", [0, 5])
def test_a_writer_killed_before_its_first_picture_begins_again(tmp_path, kept):
    (tmp_path / ".a.npz.partial").write_bytes(b'{"seed": 3}\n'[:kept])
    assert write(tmp_path / "a.npz") == 0
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], PICTURES)


def test_a_part_of_other_pictures_is_not_continued_and_not_lost(tmp_path):
    partial = tmp_path / ".a.npz.partial"
    partial.write_bytes(b'{"seed": 4}\n' + bytes(72))
    with pytest.raises(FileError, match=r"\.a\.npz\.partial: holds a part of other pictures\. Give the options it was"):
        write(tmp_path / "a.npz")
    assert partial.stat().st_size == 84


def test_an_error_while_writing_keeps_what_is_there(tmp_path):
    with pytest.raises(RuntimeError), PictureArrayWriter(tmp_path / "a.npz", PLAN, (4, 6)) as writer:
        writer.append(PICTURES[:4])
        raise RuntimeError
    assert os.listdir(tmp_path) == [".a.npz.partial"]
    assert write(tmp_path / "a.npz") == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(3)},
         r"no array arr_0 in it; got mu\.npy, sigma\.npy\. Write it with np\.savez\(FILE, arr_0=pictures\); a"),
        ({"arr_0": PICTURES / 255}, r"arr_0 does not hold 8-bit RGB pictures; got float64 \(10, 4, 6, 3\); expe"),
        ({"arr_0": PICTURES[0]}, r"arr_0 does not hold 8-bit RGB pictures; got uint8 \(4, 6, 3\)"),
        ({"arr_0": PICTURES.transpose(0, 3, 1, 2)}, r"arr_0 does not hold 8-bit RGB pictures; got uint8 \(10, 3, 4, "),
        ({"arr_0": PICTURES[:0]}, r"arr_0 does not hold 8-bit RGB pictures; got uint8 \(0, 4, 6, 3\)"),
    ],
)  # fmt: skip
def test_another_array_is_refused_with_the_way_out(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=rf"^pictures .*a\.npz: {message}"):
        PictureArray(tmp_path / "a.npz")


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PICTURES)
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.npz: damaged, or not an \.npz file; got File is not a zip file"):
        PictureArray(tmp_path / "a.npz")
    short = npy(PICTURES)[:-9]
    for content, message in (
        (b"", "damaged, or not an .npz file; got EOF"),
        (short, "arr_0 is cut short; expected 720 bytes of pixels"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("arr_0.npy", content)
        with pytest.raises(DataError, match=message):
            PictureArray(tmp_path / "a.npz")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
