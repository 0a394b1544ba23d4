"""Prompts that a user gives: words on the command line, or a file with one prompt a line."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from raev2.errors import DataError, SpecError

logger = logging.getLogger(__name__)


def given_prompts(options: Mapping[str, object]) -> list[str]:
    """Prompts in the options 'prompt' (texts) and 'prompts' (a text file); empty when neither is there."""
    found: list[str] = []
    if options.get("prompt") is not None:
        found += _not_empty(options["prompt"], "--prompt")  # type: ignore[arg-type]
    if options.get("prompts") is not None:
        found += read_prompts(Path(str(options["prompts"])))
    return found


def read_prompts(file: Path) -> list[str]:
    """One prompt a line, UTF-8; empty lines are skipped and counted in the log."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts {file}", "cannot be read", got=str(error), expected="a UTF-8 text file") from error
    return _not_empty(lines, f"prompts {file}")


def spread(prompts: Sequence[str], num: int) -> list[str]:
    """Each prompt once, or repeated in blocks to fill `num` images."""
    if num <= len(prompts):
        return list(prompts)
    return [prompts[i * len(prompts) // num] for i in range(num)]


def _not_empty(lines: Sequence[str], where: str) -> list[str]:
    found = [" ".join(line.split()) for line in lines if line.strip()]
    if not found:
        raise SpecError(where, "no prompt in it", expected="at least one line of text")
    if len(found) < len(lines):
        logger.warning("%s: skipped %d empty lines", where, len(lines) - len(found))
    return found
