"""Pictures as one array in an .npz file, as other people's evaluators have it: `arr_0`, (N, H, W, 3), uint8. No torch.

Neither reading nor writing holds the array in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from raev2.errors import DataError, FileError

ARRAY, PLAN = "arr_0.npy", "plan.json"  # members of the archive


class PictureArray:
    """The pictures of an .npz file, compressed or not, read by number; going forward is fast.

    Raises DataError for a file that holds anything else than 8-bit RGB pictures.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.process, where = file, 0, f"pictures {file}"
        hint = "Write it with np.savez(FILE, arr_0=pictures); a file of statistics belongs to --reference."
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if ARRAY not in names:
                    raise DataError(where, "no array arr_0 in it", got=", ".join(names), hint=hint)
                size = archive.getinfo(ARRAY).file_size
                with archive.open(ARRAY) as member:
                    read = npy.read_array_header_1_0 if npy.read_magic(member)[0] == 1 else npy.read_array_header_2_0
                    self.shape, by_column, dtype = read(member)
                    self.start = member.tell()
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise DataError(where, "damaged, or not an .npz file", got=str(error)) from error
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or by_column or 0 in self.shape:
            raise DataError(
                where, "arr_0 does not hold 8-bit RGB pictures", got=f"{dtype} {self.shape}",
                expected="uint8 (N, H, W, 3)", hint=hint,
            )  # fmt: skip
        if size != self.start + math.prod(self.shape):
            raise DataError(where, "arr_0 is cut short", expected=f"{math.prod(self.shape):,} bytes of pixels")

    def read(self, numbers: Sequence[int]) -> NDArray[np.uint8]:
        """Pictures (B, H, W, 3)."""
        if self.process != os.getpid():  # each process has its own place in the file
            self.process, self.member = os.getpid(), zipfile.ZipFile(self.file).open(ARRAY)  # noqa: SIM115
        size = math.prod(self.shape[1:])
        pictures = bytearray()
        for number in numbers:
            self.member.seek(self.start + number * size)
            pictures += self.member.read(size)
        return np.frombuffer(pictures, np.uint8).reshape(-1, *self.shape[1:])


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

    def __enter__(self) -> PictureArrayWriter:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.partial.touch()
        self.opened = self.partial.open("r+b")
        begun = self.opened.read(len(self.head))
        if not self.head.startswith(begun):
            self.opened.close()
            raise FileError(
                str(self.partial), "holds a part of other pictures",
                hint="Give the options it was begun with, choose another file, or delete it.",
            )  # fmt: skip
        self.opened.seek(0)
        self.opened.write(self.head)
        whole = (self.opened.seek(0, os.SEEK_END) - len(self.head)) // math.prod(self.picture)
        self.done = whole // self.block * self.block
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
            if failed is not None:
                return
            whole = self.file.with_name(f".{self.file.name}.whole")
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.done, *self.picture)}
            with zipfile.ZipFile(whole, "w") as archive:  # its members without the date of today
                with archive.open(zipfile.ZipInfo(ARRAY), "w", force_zip64=True) as member:
                    npy.write_array_header_1_0(member, header)
                    self.opened.seek(len(self.head))
                    shutil.copyfileobj(self.opened, member, 2**20)
                archive.writestr(zipfile.ZipInfo(PLAN), self.head)
        os.replace(whole, self.file)
        self.partial.unlink()
