"""The manifest of a dataset folder: what data recipes write and training reads (docs/how_to/own_data.md)."""

from __future__ import annotations

import hashlib
import json
import os
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


def verify_dataset(data_dir: Path) -> dict[str, Any]:
    """Check a folder of pictures: fingerprint, counts, labels and the SHA-256 of every file; return the manifest.

    Raises DataError with the name of the first file that differs.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    rebuild = "Build the dataset again."
    if any("index" not in entry for entry in manifest["splits"].values()):
        raise DataError(
            f"data {data_dir}", "not a folder of pictures",
            hint=f"Install the package with the data recipe {manifest.get('recipe')}, which wrote it.",
        )  # fmt: skip
    got = fingerprint(manifest["splits"], manifest["classes"])
    if got != manifest["fingerprint"]:
        where = f"data {data_dir / 'manifest.json'}"
        raise DataError(where, "changed after it was written", got=got, expected=manifest["fingerprint"], hint=rebuild)
    for split, entry in manifest["splits"].items():
        index_data = checked_bytes(data_dir / entry["index"], entry["sha256"])
        lines = index_data.decode().splitlines()
        if len(lines) != entry["num_samples"]:
            where = f"data {data_dir / entry['index']}"
            raise DataError(where, "wrong count", got=len(lines), expected=str(entry["num_samples"]), hint=rebuild)
        for text in lines:
            line = json.loads(text)
            checked_bytes(data_dir / line["file"], line["sha256"])
            label = line.get("label")
            if label is not None and not 0 <= label < len(manifest["classes"]):
                expected = f"0 to {len(manifest['classes']) - 1}"
                raise DataError(f"data {data_dir / line['file']}", "label out of range", got=label, expected=expected)
        own = sum(not Path(json.loads(text)["file"]).is_absolute() for text in lines)  # others lie elsewhere
        if (num_files := sum(1 for _ in os.scandir(data_dir / split))) != own:
            where = f"data {data_dir / split}"
            raise DataError(where, "files that the index does not list", got=num_files, expected=str(own))
    return manifest


def checked_bytes(path: Path, expected: str) -> bytes:
    """The bytes of `path`; DataError when it is missing or its SHA-256 is another one."""
    if not path.is_file():
        raise DataError(f"data {path}", "file is missing", hint="Build the dataset again.")
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise DataError(f"data {path}", "SHA-256 differs", got=got, expected=expected, hint="Build the dataset again.")
    return data
