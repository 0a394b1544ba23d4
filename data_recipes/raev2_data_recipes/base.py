"""The contract of a data recipe (`DatasetRecipe`), and the folder of pictures that most recipes write (`Recipe`).

A dataset folder has a `manifest.json`; how the rest looks is known to the recipe that wrote it, which also verifies it.
A folder of pictures::

    manifest.json              name, recipe, options, licence, classes, splits, fingerprint
    train.jsonl, val.jsonl     one line per picture: file, label, name, sha256, and what the recipe adds
    train/000012.png, ...      the pictures, RGB
    rejects.jsonl              pictures that could not be read: path and reason (only when there are some)

A ``Recipe`` says which pictures there are (``samples``); everything about files is here, once: the atomic build, the
index, the manifest and the list of rejects. Turning the folder into batches is not here, that is ``raev2/data.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from raev2.errors import DataError, FileError, SpecError, did_you_mean
from raev2.files.damage import json_lines, stop_if_machine
from raev2.files.manifest import FORMAT_VERSION, PROGRESS, checked_bytes, fingerprint, read_manifest
from raev2.files.replace import Kind, check_replaceable, replace_folder
from raev2.training.lock import folder_lock

SPLITS = ("train", "val")
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
# What recipes write: indices and rejects, folders of pictures or poses, tars and their indices.
DATASET = Kind(
    MANIFEST, '"fingerprint"',
    r"manifest\.json|[^/]+\.jsonl|(train|val|frames|poses)/(.*/)?[^/]+\.(png|jpe?g|webp|bmp|gif|npz|idx)|(.*/)?[^/]+\.(tar|idx)",
)  # fmt: skip
PARTIAL_MARK = ".raev2-partial"  # a folder with this file is an unfinished build of ours; it holds recipe and options


@dataclass(frozen=True)
class Picture:
    """One picture as it goes to disk."""

    data: bytes  # the whole file
    suffix: str  # with the dot: ".png"
    size_px: tuple[int, int]  # width, height
    file: Path | None = None  # where these bytes lie and stay; None: they are written into the dataset folder


@dataclass(frozen=True)
class Sample:
    """One picture that a recipe offers; ``read`` does the work and may run in another thread."""

    split: str  # "train" or "val"
    name: str  # for people: "grinning face"
    source: str  # where it comes from; written to rejects.jsonl when ``read`` fails
    read: Callable[[], Picture]  # raises OSError, ValueError or SyntaxError for a picture that cannot be used
    label: int | None = None  # index into ``classes``; None = no label
    extra: Mapping[str, Any] = field(default_factory=dict)  # more fields for the index line


@dataclass(frozen=True)
class Option:
    """One option of a recipe. Values are text, because they come from the command line."""

    default: str | None  # None = must be given
    meaning: str


class DatasetRecipe(ABC):
    """A source of data. Subclasses set five texts and ``options``, and give ``plan``, ``write`` and ``check_files``."""

    name: str
    summary: str
    licence: str
    attribution: str
    size: str  # for people: "about 4,000 pictures, 14 MB"
    options: Mapping[str, Option] = {}
    packages: tuple[str, ...] = ()  # optional distributions that it cannot do without

    @abstractmethod
    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do, one sentence per line. Writes nothing."""

    @abstractmethod
    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """Write the data into ``folder``, with a ``manifest.json``, and return the manifest. Called by ``build``."""

    @abstractmethod
    def check_files(self, data_dir: Path) -> dict[str, Any]:
        """Compare every file of a folder with its SHA-256; return the manifest.

        Raises DataError with the name of the first file that differs.
        """

    def verify(self, data_dir: Path) -> dict[str, Any]:
        """`check_files`, and the folder must come from this recipe."""
        recipe = read_manifest(data_dir)["recipe"]
        if recipe != self.name:
            raise DataError(f"data {data_dir}", "written by another recipe", got=recipe, expected=self.name)
        return self.check_files(data_dir)

    def resolve(self, options: Mapping[str, str]) -> dict[str, str]:
        """``options`` with the defaults filled in; SpecError for an unknown or a missing one."""
        for key in options:
            if key not in self.options:
                raise SpecError(
                    f"data {self.name}",
                    "unknown option",
                    got=key,
                    expected="one of " + ", ".join(self.options) if self.options else "no options",
                    hint=did_you_mean(key, self.options),
                )
        missing = [key for key, option in self.options.items() if option.default is None and key not in options]
        if missing:
            expected, hint = self.options[missing[0]].meaning, f"Give it with --set {missing[0]}=VALUE."
            raise SpecError(f"data {self.name}", f"option {missing[0]} is missing", expected=expected, hint=hint)
        resolved = {key: option.default for key, option in self.options.items()} | dict(options)
        return {key: value for key, value in resolved.items() if value is not None}

    def folder(self, options: Mapping[str, str], name: str = "src") -> Path:
        """An option as an existing folder; DataError when there is none, or when it is one of the files to be read."""
        path = Path(options[name]).expanduser()
        if path.is_dir():
            return path
        what, wanted = ("a file, not a folder", path.parent) if path.exists() else ("no such folder", "PATH")
        raise DataError(f"data {self.name}: {name}", what, got=path, hint=f"Give it with --set {name}={wanted}.")

    def whole_number(self, options: Mapping[str, str], name: str, least: int) -> int:
        """An option as a whole number; SpecError when it is none or too small."""
        text = options[name]
        if not text.isdecimal() or int(text) < least:
            expected = f"a number >= {least}"
            raise SpecError(f"data {self.name}: {name}", "not usable", got=text, expected=expected)
        return int(text)

    def number(self, options: Mapping[str, str], name: str, least: float) -> float:
        """An option as a number; SpecError when it is none or too small."""
        try:
            value = float(options[name])
        except ValueError:
            value = float("nan")
        if not value >= least:
            expected = f"a number >= {least:g}"
            raise SpecError(f"data {self.name}: {name}", "not usable", got=options[name], expected=expected)
        return value

    def build(self, out_dir: Path, options: Mapping[str, str] | None = None, overwrite: bool = False) -> dict[str, Any]:
        """Write the dataset folder ``out_dir`` and return its manifest.

        The folder is written as ``<out_dir>.partial`` and renamed at the end, so it is complete or absent.
        DataError when ``out_dir`` exists (unless ``overwrite``) or when nothing could be read, FileError when it is not
        only a dataset folder, or holds what the recipe reads, BusyError while another process builds it.

        A recipe that leaves a ``PROGRESS`` file when it is interrupted is given its unfinished folder again.
        """
        resolved = self.resolve(options or {})
        out_dir = Path(out_dir).absolute()
        with folder_lock(out_dir):
            if out_dir.exists() and not overwrite:
                raise DataError(f"data {out_dir}", "exists already", hint="Choose another folder or pass --overwrite.")
            check_replaceable(out_dir, DATASET, needed=resolved.values())
            return self._build(out_dir, resolved)

    def _build(self, out_dir: Path, resolved: Mapping[str, str]) -> dict[str, Any]:
        partial = out_dir.with_name(out_dir.name + ".partial")
        _open_partial(partial, _json_line({"recipe": self.name, "options": resolved}))
        try:
            manifest = self.write(partial, out_dir.name, resolved)
            (partial / PARTIAL_MARK).unlink()
        except BaseException:
            if not (partial / PROGRESS).is_file():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        replace_folder(partial, out_dir)
        return manifest


class Recipe(DatasetRecipe):
    """A source of pictures. Subclasses set what ``DatasetRecipe`` asks for, and give ``plan`` and ``samples``.

    resumable   whether an interrupted build goes on; for sources of which one picture takes as long as another
    """

    resumable = False

    @abstractmethod
    def classes(self, options: Mapping[str, str]) -> list[str]:
        """Class names in label order; empty when there are no labels."""

    @abstractmethod
    def samples(self, options: Mapping[str, str]) -> Iterator[Sample]:
        """Every picture, in a fixed order. The order gives the file names."""

    def check_files(self, data_dir: Path) -> dict[str, Any]:
        """``verify_dataset``."""
        return verify_dataset(data_dir)

    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """``write_pictures`` of all that the recipe offers."""
        return self.write_pictures(folder, dataset_name, options, self.classes(options), self.samples(options), {})

    def write_pictures(
        self,
        folder: Path,
        dataset_name: str,
        options: Mapping[str, str],
        classes: list[str],
        samples: Iterator[Sample],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write pictures, indices, rejects and manifest, with ``facts`` in it, into ``folder``.

        What an interrupted build of the same pictures left there is kept, and the rest is done.
        """
        for split in SPLITS:
            (folder / split).mkdir(exist_ok=True)
        index_lines: dict[str, list[str]] = {split: [] for split in SPLITS}
        rejects: list[str] = []
        sizes_px: set[tuple[int, int]] = set()
        digests: dict[str, list[str]] = {split: [] for split in SPLITS}
        for record in self._records(folder, samples):
            if "reject" in record:
                rejects.append(_json_line(record["reject"]))
                continue
            index_lines[record["split"]].append(_json_line(record["line"]))
            digests[record["split"]].append(record["line"]["sha256"])
            sizes_px.add(tuple(record["size_px"]))
        if not index_lines["train"]:
            hint = f"First of them: {rejects[0].strip()}" if rejects else ""
            (folder / PROGRESS).unlink(missing_ok=True)
            raise DataError(f"data {self.name}", f"no training pictures; {len(rejects)} rejected", hint=hint)
        splits = {}
        for split, lines in index_lines.items():
            data = "".join(lines).encode()
            (folder / f"{split}.jsonl").write_bytes(data)
            sha256 = hashlib.sha256(data).hexdigest()
            splits[split] = {"num_samples": len(lines), "index": f"{split}.jsonl", "sha256": sha256}
        in_train = set(digests["train"])
        duplicates = sum(digest in in_train for digest in digests["val"])
        if rejects:
            (folder / REJECTS).write_text("".join(rejects), encoding="utf-8")
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": dataset_name,
            "recipe": self.name,
            "options": dict(options),
            "licence": self.licence,
            "attribution": self.attribution,
            "image_size_px": list(sizes_px.pop()) if len(sizes_px) == 1 else None,
            "classes": classes,
            "splits": splits,
            "fingerprint": fingerprint(splits, classes),
            "rejected": len(rejects),
            "duplicates": duplicates,
            **facts,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / PROGRESS).unlink(missing_ok=True)
        return manifest

    def _records(self, folder: Path, samples: Iterator[Sample]) -> Iterator[dict[str, Any]]:
        """What became of every sample, in order: those an interrupted build has noted, then the rest as it is done."""
        done = list(takewhile(lambda record: record is not None, json_lines(folder / PROGRESS)))
        counts: Counter[str] = Counter()
        for record, sample in zip(done, samples, strict=False):
            assert record is not None
            if record["source"] != sample.source:
                where, hint = f"data {folder}", "Delete this folder to begin again."
                raise DataError(
                    where, "the source has changed since", got=sample.source, expected=record["source"], hint=hint
                )
            counts[record.get("split", "")] += 1
            yield record
        with (folder / PROGRESS).open("w", encoding="utf-8") if self.resumable else nullcontext() as noted:
            if noted:
                noted.writelines(map(_json_line, filter(None, done)))
            for sample, picture in _read_in_order(samples):
                record = _record(folder, sample, picture, counts[sample.split])
                counts[record.get("split", "")] += 1
                if noted:
                    noted.write(_json_line(record))
                yield record


def _record(folder: Path, sample: Sample, picture: Picture | Exception, number: int) -> dict[str, Any]:
    """Write a picture, unless it stays where it is; its line in the index, or why it is rejected."""
    if isinstance(picture, Exception):
        reason = f"{type(picture).__name__}: {picture}"
        return {"source": sample.source, "reject": {"path": sample.source, "reason": reason}}
    file = str(picture.file or f"{sample.split}/{number:06d}{picture.suffix}")
    if picture.file is None:
        (folder / file).write_bytes(picture.data)
    label = {} if sample.label is None else {"label": sample.label}
    sha256 = hashlib.sha256(picture.data).hexdigest()
    line = {"file": file, **label, "name": sample.name, "sha256": sha256, **sample.extra}
    return {"source": sample.source, "split": sample.split, "size_px": picture.size_px, "line": line}


def encode_png(image: Image.Image) -> Picture:
    """RGB image as PNG. The bytes depend on the zlib that Pillow was built with, the pixels do not."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return Picture(buffer.getvalue(), ".png", image.size)


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


def _open_partial(partial: Path, mark: str) -> None:
    """Make the folder of a build; what an interrupted build left there is deleted, unless the same build can go on."""
    if partial.exists():
        if not (partial / PARTIAL_MARK).is_file():
            hint = "Move it away."
            raise DataError(f"data {partial}", "exists and is not an unfinished build", hint=hint)
        if (partial / PROGRESS).is_file() and (partial / PARTIAL_MARK).read_text(encoding="utf-8") == mark:
            return
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        (partial / PARTIAL_MARK).write_text(mark, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise FileError(f"data {partial}", "cannot be created", got=error.strerror) from None


def _read_in_order(samples: Iterator[Sample]) -> Iterator[tuple[Sample, Picture | Exception]]:
    """Read with several threads, at most 64 ahead; results in the order of ``samples``."""
    num_threads = min(8, os.cpu_count() or 1)
    pending: deque[tuple[Sample, Future[Picture]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for sample in samples:
                pending.append((sample, pool.submit(sample.read)))
                if len(pending) == 64:
                    yield _result(*pending.popleft())
            while pending:
                yield _result(*pending.popleft())
        finally:
            for _, future in pending:
                future.cancel()


def _result(sample: Sample, future: Future[Picture]) -> tuple[Sample, Picture | Exception]:
    """A picture that cannot be read is a result; any other exception is a defect and stops the build."""
    try:
        return sample, future.result()
    except (DataError, OSError, ValueError) as error:
        stop_if_machine(error)
        return sample, error


def _json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
