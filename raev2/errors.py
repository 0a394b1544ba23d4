"""The errors a user or a machine can cause; every other exception is a defect of ours.

A message has one form, built by the constructor so that no part is forgotten::

    <where>: <what is wrong>; got <got>; expected <expected>. <what to do>

The command line prints the message without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class RaeError(Exception):
    """Base class: ``where`` and ``what`` are required, the rest is printed when given."""

    exit_code = 1

    def __init__(self, where: str, what: str, *, got: object = None, expected: str = "", hint: str = "") -> None:
        parts = [f"{where}: {what}"]
        if got is not None:
            parts.append(f"got {got}")
        if expected:
            parts.append(f"expected {expected}")
        message = "; ".join(parts)
        text = f"{message}. {hint}" if hint else message
        super().__init__(re.sub(r"\s*\n\s*", " ", text))  # one line, also with the text of another error in it

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by message, so that an error crosses processes."""
        return type(self).__new__, (type(self), *self.args)


class SpecError(RaeError):
    """A recipe, field or option that cannot be used."""

    exit_code = 2


class DataError(RaeError):
    """Missing, damaged or unsuitable data."""

    exit_code = 3


class CheckpointError(RaeError):
    """A run folder, artefact or checkpoint that cannot be read or does not fit."""

    exit_code = 4


class TaskError(RaeError):
    """An unknown or broken plugin."""

    exit_code = 5


class FileError(RaeError):
    """A file, folder or disk that cannot be read, written or replaced: full, read-only, gone, not ours."""

    exit_code = 6


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'Did you mean ...?' with the closest known name, or ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else ""
