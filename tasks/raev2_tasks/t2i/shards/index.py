"""Tar shards of other origin: which tars a folder has, to which split they belong, and the index that lets read them.

Read `survey`, which says what is there, and `index_shards`, which writes index and manifest. No tar changes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raev2.errors import DataError, SpecError
from raev2.files.hashes import file_sha256
from raev2.files.picture_folder import scan_folder, told
from raev2_tasks.splits import split_in_name
from raev2_tasks.t2i.shards.files import (
    json_line,
    read_index,
    shard_entry,
    write_index,
    write_manifest,
)
from raev2_tasks.t2i.shards.tar_scan import ANY, Problem, ScanRule, compression, scan_shard, tar_samples
from raev2_tasks.t2i.text.captions import KINDS

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

TAR_NAMES = ("*.tar", "*.tar.*", "*.tgz", "*.tbz2", "*.txz", "*.tzst")
HELD_OUT = "The split test is held out as val, because nothing is named for validation; it is never trained on."
OWN_SUFFIXES = (".idx", ".jsonl", ".json")
BYTES_A_PROCESS = 64 * 2**20  # smaller work is not worth another process


@dataclass(frozen=True)
class Tar:
    """A tar below a folder.

    name         path below the folder
    split        what a word of its path says; 'train' where none does
    num_samples  by its headers, before anything is known about their content
    places       a number for each sample, by which validation samples are drawn; uint64
    problem      what is wrong with the tar itself
    """

    file: Path
    name: str
    split: str
    num_samples: int
    places: np.ndarray
    problem: str = ""


@dataclass(frozen=True)
class Survey:
    """The tars of a folder and how they are divided.

    val_below   samples of training tars with a smaller place validate, because no tar is named for it
    ignored     what else lies there, for people
    note        what else to say about the splits
    """

    tars: list[Tar]
    val_below: int
    ignored: str
    note: str = ""

    def split(self, tar: Tar, place: int) -> str:
        """The split of a sample."""
        return "val" if tar.split == "train" and place < self.val_below else tar.split

    def counts(self) -> dict[str, int]:
        """Samples by split."""
        counts = dict.fromkeys(("train", "val"), 0)
        for tar in self.tars:
            for split, count in self.shares(tar).items():
                counts[split] = counts.get(split, 0) + count
        return counts

    def shares(self, tar: Tar) -> dict[str, int]:
        """Samples of a tar by split."""
        num_val = int((tar.places < self.val_below).sum()) if tar.split == "train" else 0
        return {tar.split: tar.num_samples - num_val, **({"val": num_val} if num_val else {})}

    def lines(self) -> list[str]:
        """One line a tar, and what they come to."""
        lines = []
        for tar in self.tars:
            shares = ", ".join(f"{split} {count:,}" for split, count in self.shares(tar).items())
            lines.append(f"  {tar.name}: {shares}{f' ({tar.problem})' if tar.problem else ''}")
        counts = self.counts()
        lines.append("Samples: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()) + ".")
        if self.val_below:
            lines.append("No tar is named for validation: its samples are drawn from all training tars.")
        if self.note:
            lines.append(self.note)
        if counts.get("test"):
            lines.append("The split test is kept apart; nothing is trained on it.")
        return [*lines, *([self.ignored] if self.ignored else [])]


def survey(folder: str | Path, *, skip: str = "", val_samples: int = 1000, num_workers: int = 1) -> Survey:
    """Find the tars below `folder`, read their headers, and divide their samples.

    A word of a tar's path below `folder` names its split (`split_in_name`). Where none is named for validation, those
    for a test are held out; where there are none either, `val_samples` samples of all training tars are, at most a
    tenth of them, but up to 8 (`least_val`).

    skip         leave out tars whose path matches one of these patterns, separated by commas
    num_workers  processes that read the tars; 0: as many as are worth it

    Raises DataError when there is no tar, when one is compressed, or when none is left for training.
    """
    folder = Path(folder)
    files, ignored = find_tars(folder, skip)
    stamps = tuple((file, (about := file.stat()).st_size, about.st_mtime_ns) for file in files)
    tars = _read_headers(folder, stamps, num_workers or num_processes(files))
    training = [tar for tar in tars if tar.split == "train"]
    if not training:
        got = ", ".join(f"{tar.name} ({tar.split})" for tar in tars[:3])
        raise DataError(
            f"data {folder}", "no tar is left for training", got=f"{len(tars)} tars: {got}",
            expected="tars without val or test in their path", hint="Give the folder that holds them as the source.",
        )  # fmt: skip
    note = HELD_OUT if tests_validate({tar.split for tar in tars}) else ""
    tars = [replace(tar, split="val") if note and tar.split == "test" else tar for tar in tars]
    drawn = any(tar.split == "val" for tar in tars)
    places = np.concatenate([tar.places for tar in training])
    return Survey(tars, 0 if drawn else val_below(places, val_samples), ignored, note)


def find_tars(folder: Path, skip: str = "") -> tuple[list[Path], str]:
    """Tars below a folder in sorted order, and a sentence about what else is there."""
    patterns = [pattern.strip() for pattern in skip.split(",") if pattern.strip()]
    found = scan_folder(folder, lambda file: True)
    tars, ignored = list[Path](), found.all_ignored()
    for file in found.all_pictures():
        name = file.relative_to(folder)
        if not any(fnmatch.fnmatch(file.name.lower(), pattern) for pattern in TAR_NAMES):
            if file.suffix not in OWN_SUFFIXES:
                ignored[file.suffix.lower() or "without suffix"] += 1
        elif any(fnmatch.fnmatch(str(name), pattern) for pattern in patterns):
            ignored[f"left out by skip={skip}"] += 1
        else:
            tars.append(file)
    if not tars:
        raise DataError(f"data {folder}", "no tar files here", expected="uncompressed .tar shards")
    compressed = [(file, how) for file in tars if (how := compression(file))]
    if compressed:
        file, how = compressed[0]
        raise DataError(
            f"data {folder}", "compressed tars cannot be read at a position",
            got=f"{len(compressed)} of {len(tars)}, first {file.relative_to(folder)} ({how})", expected="plain tars",
            hint=f"Unpack each and move it away: {_unpack(file, how)}; or leave them out with the option skip.",
        )  # fmt: skip
    return tars, f"Other files, not read: {told(ignored)}." if ignored else ""


def val_below(places: np.ndarray, num: int) -> int:
    """The bound of the `num` smallest of `places`, at most a tenth of them, but up to 8."""
    num = min(num, max(len(places) // 10, least_val(len(places))))
    return int(np.partition(places, num - 1)[num - 1]) + 1 if num else 0


def tests_validate(splits: Collection[str]) -> bool:
    """Whether 'test' is held out as val among the splits that are there: where nothing is named for validation."""
    return "test" in splits and "val" not in splits


def least_val(num_samples: int) -> int:
    """How many samples should validate at least: 8, or a quarter of very few. Fewer give no usable numbers."""
    return min(8, num_samples // 4)


def place_of(tar_name: str, key: str) -> int:
    """A number in [0, 2^63) that is a function of the names of a sample."""
    return int.from_bytes(hashlib.sha256(f"{tar_name}: {key}".encode(errors="replace")).digest()[:8], "little") >> 1


def index_shards(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    source: str | None = None,
    skip: str = "",
    val_samples: int = 1000,
    rule: ScanRule = ANY,
    max_bad_share: float = 0.5,
    licence: str = "unstated",
    attribution: str = "",
    recipe: str = "tar-shards",
    options: Mapping[str, Any] | None = None,
    num_workers: int = 1,
) -> dict[str, Any]:
    """Make tar shards of other origin readable: an index beside each tar, or in `out`, and a manifest. No tar changes.

    The tars and their splits are those of `survey`.

    rule           which samples are usable, and how their captions are read
    max_bad_share  DataError when a larger share of the samples is unusable
    num_workers    processes that read the tars; 0: as many as are worth it
    """
    if rule.caption_kind not in KINDS:
        expected = f"one of {', '.join(KINDS)}"
        raise SpecError("kind", "unknown kind of caption", got=rule.caption_kind, expected=expected)
    folder = Path(folder)
    out = folder if out is None else Path(out)
    found = survey(folder, skip=skip, val_samples=val_samples, num_workers=num_workers)
    read = partial(_index_tar, out=out, rule=rule)
    scans = []
    num_workers = num_workers or num_processes([tar.file for tar in found.tars])
    for scan in in_processes(read, found.tars, num_workers):
        scans.append(scan)
        logger.info("%s", scan.line())
    rejects = [reject for scan in scans for reject in scan.rejects]
    _refuse_many(folder, scans, max_bad_share)
    usable = [scan.places for scan in scans if scan.tar.split == "train"]
    bound = val_below(np.concatenate(usable), val_samples) if found.val_below else 0
    entries: dict[str, Any] = {split: {"num_samples": 0, "shards": []} for split in ("train", "val")}
    for scan in scans:
        for split, index, num in _divide(out, scan, bound):
            entry = entries.setdefault(split, {"num_samples": 0, "shards": []})
            entry["shards"].append(shard_entry(out, scan.tar.file, index, num, scan.sha256))
            entry["num_samples"] += num
    if not entries["train"]["num_samples"]:
        hint = f"First of them: {rejects[0].strip()}" if rejects else ""
        raise DataError(f"data {folder}", f"no usable training samples; {len(rejects)} rejected", hint=hint)
    return write_manifest(
        out, name=source or folder.resolve().name, recipe=recipe, options=options or {}, licence=licence,
        attribution=attribution, sizes_px={size for scan in scans for size in scan.sizes_px}, entries=entries,
        kinds=sum((scan.kinds for scan in scans), Counter()), rejects=rejects, rule=rule,
    )  # fmt: skip


def num_processes(files: Collection[Path]) -> int:
    """How many processes are worth starting to read files: one for small ones."""
    num_bytes = sum(file.stat().st_size for file in files)
    return max(1, min(os.cpu_count() or 1, len(files), num_bytes // BYTES_A_PROCESS))


def in_processes(work: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`work` of each item in order, done by several processes."""
    if num_workers <= 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, items)


# Parts of the above.


def _unpack(file: Path, how: str) -> str:
    plain = file.name.removesuffix(file.suffix) if file.suffix.lower() != ".tar" else f"plain-{file.name}"
    tool = {"gzip": "gzip -dc", "zstd": "zstd -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc", "zip": "unzip -p"}[how]
    return f"`{tool} {file.name} > {plain if plain.endswith('.tar') else plain + '.tar'}`"


@lru_cache(maxsize=2)
def _read_headers(folder: Path, stamps: tuple[tuple[Path, int, int], ...], num_workers: int) -> list[Tar]:
    """The tars by their headers; kept, because a build plans first."""
    return list(in_processes(partial(_read_tar, folder), [file for file, *_ in stamps], num_workers))


def _read_tar(folder: Path, file: Path) -> Tar:
    problems: list[Problem] = []
    with file.open("rb") as data:
        keys = list(tar_samples(data, problems))
    name = str(file.relative_to(folder))
    kinds = Counter(problem.kind for problem in problems if problem.fatal or problem.kind == "bad_tar")
    split = split_in_name(Path(name).parts, f"data {file}") or "train"
    problem = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    return Tar(file, name, split, len(keys), _places(name, keys), problem)


def _places(name: str, keys: Sequence[str]) -> np.ndarray:
    return np.array([place_of(name, key) for key in keys], dtype=np.uint64)


@dataclass(frozen=True)
class _Indexed:
    """What reading a tar once gave; its rows are in the file `index`."""

    tar: Tar
    index: Path
    places: np.ndarray
    rejects: list[str]
    bad: Counter[str]
    notes: Counter[str]
    kinds: Counter[str]
    sizes_px: set[tuple[int, int]]
    sha256: str

    def line(self) -> str:
        """The tar, its usable samples and what was left out, for the log."""
        parts = [f"{self.tar.name}: {len(self.places):,} usable samples, named {self.tar.split}"]
        if self.bad:
            parts.append("left out " + ", ".join(f"{kind} {count}" for kind, count in self.bad.items()))
        if self.notes:
            parts.append("noted " + ", ".join(f"{kind} {count}" for kind, count in self.notes.items()))
        return "; ".join(parts)


def _index_tar(tar: Tar, out: Path, rule: ScanRule) -> _Indexed:
    scan = scan_shard(tar.file, rule)
    index = out / Path(tar.name).with_suffix(".idx")
    index.parent.mkdir(parents=True, exist_ok=True)
    write_index(index, scan.rows)
    fatal = [problem for problem in scan.problems if problem.fatal]
    rejects = [json_line({"path": f"{tar.name}: {p.key}", "reason": f"{p.kind}: {p.text}"}) for p in fatal]
    return _Indexed(
        tar, index, _places(tar.name, scan.keys), rejects, Counter(problem.kind for problem in fatal),
        Counter(problem.kind for problem in scan.problems if not problem.fatal), scan.caption_kinds,
        {(int(row["width_px"]), int(row["height_px"])) for row in scan.rows}, file_sha256(tar.file),
    )  # fmt: skip


def _divide(out: Path, scan: _Indexed, val_below: int) -> Iterator[tuple[str, Path, int]]:
    """(split, index, samples) of a tar; with drawn validation samples its index becomes two."""
    in_val = scan.places < val_below if scan.tar.split == "train" else np.zeros(len(scan.places), dtype=bool)
    if in_val.any():
        rows = read_index(out, {"index": str(scan.index.relative_to(out)), "num_samples": len(in_val)})
        write_index(scan.index.with_suffix(".val.idx"), rows[in_val])
        write_index(scan.index, rows[~in_val])
        yield "val", scan.index.with_suffix(".val.idx"), int(in_val.sum())
    if in_val.all():
        scan.index.unlink()
    else:
        yield scan.tar.split, scan.index, int((~in_val).sum())


def _refuse_many(folder: Path, scans: Sequence[_Indexed], max_bad_share: float) -> None:
    """DataError when a larger share of the samples than `max_bad_share` is unusable."""
    bad: Counter[str] = sum((scan.bad for scan in scans), Counter())
    num = bad.total() + sum(len(scan.places) for scan in scans)
    if bad.total() > max_bad_share * num and bad.total() < num:
        first = next(reject for scan in scans for reject in scan.rejects).strip()
        raise DataError(
            f"data {folder}", "too many unusable samples",
            got=f"{bad.total()} of {num} ({', '.join(f'{kind} {count}' for kind, count in bad.items())})",
            expected=f"at most a share of {max_bad_share:g}",
            hint=f"Raise max_bad_share if that is right. First of them: {first}",
        )  # fmt: skip
