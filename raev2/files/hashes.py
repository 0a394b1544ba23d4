"""SHA-256 of files and of values: what proves that something is still what it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def file_sha256(file: Path) -> str:
    """Hexadecimal digest of a file's bytes; the file is read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """Hexadecimal digest of names and bytes of a folder's files, apart from texts for people and half-written files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".md", ".partial"))
    return json_sha256({file.relative_to(folder).as_posix(): file_sha256(file) for file in files})


def json_sha256(value: Any) -> str:
    """Hexadecimal digest of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
