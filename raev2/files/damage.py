"""Files that may be damaged, cut short or someone else's: whatever is wrong with them becomes one line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raev2.errors import CheckpointError, FileError, RaeError

OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


def stop_if_machine(error: BaseException | None) -> None:
    """Raise FileError where an error, or its cause, tells of the machine and not of a file that could be left out.

    Full or read-only disks, too many open files, no memory: a dataset without what was read meanwhile would be wrong.
    """
    while error is not None:
        if (number := getattr(error, "errno", None)) in OF_THE_MACHINE:
            where = str(getattr(error, "filename", None) or "a file")
            raise FileError(where, "cannot be read or written", got=os.strerror(number)) from error
        error = error.__cause__


@contextmanager
def damaged(where: object, error: type[RaeError] = CheckpointError) -> Iterator[None]:
    """Inside, what a file says is used for the first time; an exception that comes of it is the file's fault."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        raise error(str(where), "damaged, or of another kind", got=f"{type(problem).__name__}: {problem}") from problem


def read_json(file: Path, error: type[RaeError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(file.read_bytes())
    except ValueError as problem:
        raise error(str(file), "damaged, not JSON", got=str(problem), hint="Use an earlier one.") from problem
    if not isinstance(value, dict):
        raise error(str(file), "damaged", got=type(value).__name__, expected="a JSON object")
    return value


def json_lines(file: Path) -> list[dict[str, Any] | None]:
    """The objects in a JSON-lines file; None for a line that was cut short or damaged (killed process, full disk)."""
    lines: list[dict[str, Any] | None] = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            lines.append({**json.loads(text)})
        except (TypeError, ValueError):
            lines.append(None)
    return lines
