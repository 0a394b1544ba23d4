"""Pictures as one array in an .npz file, as other people's evaluators have it: `arr_0`, (N, H, W, 3), uint8. No torch.

Neither reading nor writing holds the array in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from raev2.errors import DataError, FileError

ARRAY, PLAN = "arr_0.npy", "plan.json"  # members of the archive
LOCAL_HEADER = 30  # bytes before the name of a member


class PictureArray:
    """The pictures of an .npz file, read by number. A compressed array is unpacked into a temporary file first.

    Raises DataError for a file that holds anything else than 8-bit RGB pictures.
    """

    def __init__(self, file: Path) -> None:
        self.where = f"pictures {file}"
        try:
            with zipfile.ZipFile(file) as archive:
                if ARRAY not in archive.namelist():
                    raise self._unsuitable("no array arr_0 in it", ", ".join(archive.namelist()))
                self.shape = self._shape(archive)
                self.data, self.offset = self._data(archive, file)
        except zipfile.BadZipFile as error:
            raise DataError(self.where, "damaged, or not an .npz file", got=str(error)) from error

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, numbers: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures (B, H, W, 3)."""
        # Opened for each reading: other processes get the name of the file, not its content.
        return np.memmap(self.data, np.uint8, "r", self.offset, self.shape)[list(numbers)]

    def _shape(self, archive: zipfile.ZipFile) -> tuple[int, ...]:
        with archive.open(ARRAY) as member:
            try:
                version = npy.read_magic(member)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, by_column, dtype = read(member)
            except ValueError as error:
                raise DataError(self.where, "arr_0 is damaged", got=str(error)) from error
            self.header = member.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or by_column or 0 in shape:
            raise self._unsuitable("arr_0 does not hold 8-bit RGB pictures", f"{dtype} {shape}")
        if archive.getinfo(ARRAY).file_size != self.header + math.prod(shape):
            raise DataError(self.where, "arr_0 is cut short", expected=f"{math.prod(shape):,} bytes of pixels")
        return shape

    def _data(self, archive: zipfile.ZipFile, file: Path) -> tuple[Path, int]:
        """The file with the pixels, and where in it they begin."""
        info = archive.getinfo(ARRAY)
        if info.compress_type == zipfile.ZIP_STORED:
            with file.open("rb") as opened:
                opened.seek(info.header_offset + LOCAL_HEADER - 4)
                names = int.from_bytes(opened.read(2), "little") + int.from_bytes(opened.read(2), "little")
            return file, info.header_offset + LOCAL_HEADER + names + self.header
        self.unpacked = tempfile.NamedTemporaryFile(suffix=".npy")  # noqa: SIM115, kept as long as this object
        with archive.open(ARRAY) as member:
            shutil.copyfileobj(member, self.unpacked, 2**20)
        self.unpacked.flush()
        return Path(self.unpacked.name), self.header

    def _unsuitable(self, what: str, got: str) -> DataError:
        hint = "Write it with np.savez(FILE, arr_0=pictures); a file of statistics belongs to --reference."
        return DataError(self.where, what, got=got, expected="arr_0, (N, H, W, 3), uint8", hint=hint)


def holds_plan(file: Path) -> bool:
    """Whether a `PictureArrayWriter` wrote this file."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return PLAN in archive.namelist()


class PictureArrayWriter:
    """Writes an .npz file picture by picture; what a killed process had written is kept for the next one.

    with PictureArrayWriter(file, plan, size) as writer:
        for number in range(writer.done, n): writer.append(...)

    Until the end the pixels are in a file beside it, after a line with the plan. An error leaves that file.

    plan   what the pictures depend on, saved with them; one that was begun with another plan is not continued
    size   height and width in pixels
    done   how many pictures are there, a multiple of `block`
    """

    def __init__(self, file: Path, plan: Mapping[str, Any], size: tuple[int, int], block: int = 1) -> None:
        self.file, self.picture, self.block = file, (*size, 3), block
        self.head = (json.dumps(plan) + "\n").encode()
        self.partial = file.with_name(f".{file.name}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> PictureArrayWriter:
        begun = b""
        if self.partial.is_file():
            with self.partial.open("rb") as opened:
                begun = opened.read(len(self.head))
        if not self.head.startswith(begun):
            raise FileError(
                str(self.partial), "holds a part of other pictures",
                hint="Give the options it was begun with, choose another file, or delete it.",
            )  # fmt: skip
        self.opened = self.partial.open("r+b" if begun == self.head else "w+b")
        self.opened.write(self.head)
        whole = (self.partial.stat().st_size - len(self.head)) // math.prod(self.picture)
        self.done = max(whole, 0) // self.block * self.block
        self.opened.truncate(len(self.head) + self.done * math.prod(self.picture))
        self.opened.seek(0, os.SEEK_END)
        return self

    def append(self, pictures: NDArray[np.uint8]) -> None:
        """Add pictures (B, H, W, 3); they are on the disk afterwards."""
        assert pictures.shape[1:] == self.picture and pictures.dtype == np.uint8
        self.opened.write(pictures.tobytes())
        self.opened.flush()
        os.fsync(self.opened.fileno())
        self.done += len(pictures)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Write the archive and give it its name, unless something failed."""
        with self.opened:
            if failed is None:
                whole = self.file.with_name(f".{self.file.name}.whole")
                with zipfile.ZipFile(whole, "w") as archive:
                    self._write(archive)
                os.replace(whole, self.file)
                self.partial.unlink()

    def _write(self, archive: zipfile.ZipFile) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.done, *self.picture)}
        with archive.open(zipfile.ZipInfo(ARRAY), "w", force_zip64=True) as member:  # without the date of today
            npy.write_array_header_1_0(member, header)
            self.opened.seek(len(self.head))
            shutil.copyfileobj(self.opened, member, 2**20)
        archive.writestr(zipfile.ZipInfo(PLAN), self.head)
