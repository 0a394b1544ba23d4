"""Look at shards without changing them: what is wrong with them, and how long their captions are."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from raev2_tasks.t2i.shards.files import (
    MANIFEST,
    manifest_rule,
    read_index,
    source_folders,
    source_manifest,
    verify_shards,
)
from raev2_tasks.t2i.shards.index import find_tars, in_processes, num_processes
from raev2_tasks.t2i.shards.tar_scan import ANY, TRAINING_SHAPE, Problem, ScanRule, ShapeRule, scan_shard

MAX_WORDS = 1000  # of a caption, above which the check mentions it
MAX_DUPLICATES = 0.001  # share of images with equal bytes, above which the check mentions it


@dataclass(frozen=True)
class CaptionLengths:
    """Words of the default captions of one split of one source, and the sizes of its images."""

    num_samples: int
    num_words: dict[int, int]  # percentile -> words
    least_side_px: int
    num_captions: float  # mean captions of an image


def caption_lengths(dir: str | Path, split: str) -> dict[str, CaptionLengths]:
    """Lengths of the default captions by source, from the indices alone."""
    found = {}
    for name, folder in source_folders(dir).items():
        shards = source_manifest(folder)["splits"].get(split, {"shards": []})["shards"]
        if not shards:
            continue
        rows = np.concatenate([read_index(folder, shard) for shard in shards])
        percentiles = {p: int(np.percentile(rows["num_words"], p, method="nearest")) for p in (50, 90, 99, 100)}
        side = int(np.minimum(rows["width_px"], rows["height_px"]).min())
        found[name] = CaptionLengths(len(rows), percentiles, side, float(rows["num_captions"].mean()))
    return found


def check_shards(dir: str | Path, shape: ShapeRule = TRAINING_SHAPE, num_workers: int = 1) -> dict[Path, list[Problem]]:
    """Decode everything and list what is wrong or odd, by tar. Reads every byte.

    dir          a source, a collection, or any folder with tars
    shape        pictures that a training with this rule leaves out are listed as wrong
    num_workers  processes that read the tars; 0: as many as are worth it
    """
    found: dict[Path, list[Problem]] = {}
    images = Counter[bytes]()
    rules = {file: replace(rule, shape=shape) for file, rule in _rules(Path(dir)).items()}
    checks = in_processes(_check_tar, rules.items(), num_processes(rules) if num_workers == 0 else num_workers)
    for file, (problems, digests) in zip(rules, checks, strict=True):
        images.update(digests)
        if problems:
            found[file] = problems
    num_duplicates = images.total() - len(images)
    if num_duplicates > MAX_DUPLICATES * images.total():
        text = f"{num_duplicates:,} of {images.total():,} images occur before with equal bytes"
        found.setdefault(file, []).append(Problem("", "duplicates", text, fatal=False))
    return found


def _check_tar(item: tuple[Path, ScanRule]) -> tuple[list[Problem], list[bytes]]:
    """What is wrong with a tar, and a hash of each usable picture."""
    file, rule = item
    scan = scan_shard(file, rule, decode=True)
    problems = [*scan.problems]
    for key, words in zip(scan.keys, scan.rows["num_words"], strict=True):
        if words > MAX_WORDS:
            problems.append(Problem(key, "long_caption", f"{words} words", fatal=False))
    digests = []
    with file.open("rb") as data:
        for row in scan.rows:
            data.seek(int(row["image_offset"]))
            digests.append(hashlib.sha256(data.read(int(row["image_bytes"]))).digest()[:8])
    return problems, digests


def _rules(dir: Path) -> dict[Path, ScanRule]:
    """The tars of a folder, each with how its samples are read; those of a dataset are verified first."""
    if not (dir / MANIFEST).is_file():
        return dict.fromkeys(find_tars(dir)[0], ANY)
    verify_shards(dir)
    rules: dict[Path, ScanRule] = {}
    for folder in source_folders(dir).values():
        manifest = source_manifest(folder)
        names = {shard["file"] for entry in manifest["splits"].values() for shard in entry["shards"]}
        rules |= {folder / name: manifest_rule(manifest) for name in sorted(names)}
    return rules
