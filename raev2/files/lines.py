"""The index of a split: a JSON-lines file of which only the places of its lines are in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raev2.errors import DataError

BLOCK_BYTES = 2**24


class Lines:
    """Objects of a JSON-lines file by number, read when asked for: eight bytes a line, whatever is in it.

    hint   what to do about a damaged line, for the DataError
    """

    def __init__(self, file: Path, hint: str = "") -> None:
        self.file, self.hint, ends, start = file, hint, [np.zeros(1, np.int64)], 0
        with file.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (start + 1))
                start += len(block)
        self.starts = np.concatenate(ends)
        if self.starts[-1] < start:  # no newline at the end
            self.starts = np.append(self.starts, start)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        start, end = map(int, self.starts[number : number + 2])
        with self.file.open("rb") as opened:
            opened.seek(start)
            return self._parsed(number, opened.read(end - start))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All of them in one pass: a third of the time of one by one."""
        with self.file.open("rb") as opened:
            for number, text in enumerate(opened):
                yield self._parsed(number, text)

    def _parsed(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            return {**json.loads(text)}
        except (TypeError, ValueError) as error:
            what = f"damaged, line {number + 1} is not a JSON object"
            raise DataError(f"data {self.file}", what, got=str(error), hint=self.hint) from error
