"""Folders that appear whole, and older ones that are replaced only where all that is in them is surely ours.

with new_folder(out, SAMPLES) as folder:
    ...                                # write in it; an error or a kill leaves `out` as it was
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from raev2.errors import FileError, SpecError


@dataclass(frozen=True)
class Kind:
    """How folders of one kind are known: `mark` in the file `marker` (if any), and the pattern of all paths in them."""

    marker: str
    mark: str
    paths: str


VERSION = '"format_version"'
_ARTEFACT = r"(config\.json|model\.safetensors|README\.md|encoder/.*)"
_STAGES = "(tokenizer|generator)"
CHECKPOINT = Kind("", "", r"[^/]+\.(json|safetensors)")
ARTEFACT = Kind("config.json", VERSION, _ARTEFACT)
SAMPLES = Kind("plan.json", '"time_shift"', r"plan\.json|grid\.png|\d{5,}\.png")
RECONSTRUCTIONS = Kind("table.json", VERSION, r"table\.(json|csv)|grid\.png|\d{5,}-[^/]*\.png")
EXPORT = Kind("export.json", VERSION, rf"[^/]+\.(json|yaml|pt|safetensors)|{_STAGES}/{_ARTEFACT}")
PIPELINES = Kind(
    "pipeline.json", VERSION,
    rf"(pipeline|metrics)\.jsonl?|README\.md|samples\.png|{_STAGES}/{_ARTEFACT}"
    r"|samples/([^/]+/)?[^/]+\.(png|json)|eval/[^/]+\.(json|png)|\.git(attributes|ignore)|\.cache/.*",
)  # fmt: skip
RUN = Kind(
    "spec.yaml", "fingerprint: ",
    r"spec\.yaml|(provenance|identity|report)\.json|metrics\.jsonl|report\.html|(.*/)?\.[^/]+\.(partial|old)(/.*)?"
    rf"|checkpoints/{_STAGES}/\d+/[^/]+\.(json|safetensors)|{_STAGES}/{_ARTEFACT}"
    r"|samples/([^/]+/)?[^/]+\.(png|json)|eval/[^/]+\.(json|png)|eval/reference/[^/]+\.safetensors"
    r"|rollouts/[^/]+/[^/]+\.(mp4|gif|png|csv|json)|(tensorboard|wandb)/.*",
)  # fmt: skip


def check_replaceable(path: Path, kind: Kind, overwrite: bool = True, needed: Iterable[object] = ()) -> None:
    """Raise unless a command may write the folder `path`: nothing is there, or `overwrite` and all of it is ours.

    needed   what the command reads; values that are no paths are passed over
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise SpecError("--out", "exists already", got=str(path), hint="Choose another folder, or add --overwrite.")
    marker, got = path / kind.marker, None
    if kind.marker and not (marker.is_file() and kind.mark.encode() in marker.read_bytes()):
        got = f"no {kind.marker} of ours in it"
    for entry in path.rglob("*"):
        name = entry.relative_to(path).as_posix()
        if (entry.is_symlink() or not entry.is_dir()) and not re.fullmatch(kind.paths, name):
            got = f"{name} in it"
    texts = [text for value in needed for text in (str(value), str(value).partition("=")[2]) if text]
    for text in texts:
        if Path(text).exists() and Path(text).resolve().is_relative_to(path.resolve()):
            got = f"{text}, which the command needs"
    if got:
        hint = "Choose another folder, or move this one away."
        raise FileError(str(path), "exists and is not replaced", got=got, expected="only what raev2 wrote", hint=hint)


@contextmanager
def new_folder(path: Path, kind: Kind) -> Iterator[Path]:
    """A folder to write in, which is `path` afterwards, on the disk; what was there is moved aside and deleted last.

    Raises FileError when it cannot be written, or something else is there. After an error or a kill, `path` is as it
    was.
    """
    check_replaceable(path, kind)
    target = path.resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        for entry in (*partial.rglob("*"), partial):
            _to_disk(entry)
        replace_folder(partial, target)
    except (OSError, SafetensorError) as error:  # of the latter too: a full disk
        hint = "Nothing was changed; free some space."
        raise FileError(str(path), "could not be saved", got=str(error), hint=hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Give a complete folder its place; what was there is moved aside first, and back if that fails."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    _to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A file to write, which is `path` afterwards: a reader sees the old one or the new one, never half of it.

    shared   other processes may write it at the same time
    """
    partial = path.with_name(f".{path.name}{os.getpid() if shared else ''}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text by `new_file`."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _to_disk(path: Path) -> None:
    if path.is_file() or os.name == "posix":  # folders cannot be opened elsewhere
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
