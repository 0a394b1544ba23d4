"""The manifest of a dataset folder: what data recipes write and training reads (docs/how_to/own_data.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raev2.errors import DataError
from raev2.files.damage import read_json

FORMAT_VERSION = 1
PROGRESS = "progress.jsonl"  # what an interrupted build leaves in its folder when it can go on


def read_manifest(dir: str | Path) -> dict[str, Any]:
    """The manifest of a dataset folder; DataError when there is none or it has another format."""
    file = Path(dir) / "manifest.json"
    if not file.is_file():
        raise DataError(
            f"data {dir}", "no dataset folder here", expected="a folder with manifest.json",
            hint="Build it with `raev2 data build RECIPE --out DIR`; `raev2 data list` shows the recipes.",
        )  # fmt: skip
    manifest = read_json(file, DataError)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"data {dir}", "unknown format_version", got=manifest.get("format_version"), expected=str(FORMAT_VERSION)
        )
    return manifest


def fingerprint(splits: Mapping[str, Any], classes: list[str]) -> str:
    """SHA-256 of the canonical JSON of splits and classes.

    The splits carry the SHA-256 of each index and each index that of every file, so this covers the pictures, the
    labels and the order.
    """
    text = json.dumps({"splits": splits, "classes": classes}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checked_bytes(path: Path, expected: str) -> bytes:
    """The bytes of `path`; DataError when it is missing or its SHA-256 is another one."""
    if not path.is_file():
        raise DataError(f"data {path}", "file is missing", hint="Build the dataset again.")
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise DataError(f"data {path}", "SHA-256 differs", got=got, expected=expected, hint="Build the dataset again.")
    return data
