"""Look at shards without changing them: what is wrong with them, and how long their captions are."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raev2.errors import DataError
from raev2_tasks.t2i.shards.files import MANIFEST, read_index, source_folders, source_manifest, verify_shards
from raev2_tasks.t2i.shards.tar_scan import Problem, scan_shard

MAX_ASPECT = 2.5  # longer images are left out in training
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


def check_shards(dir: str | Path, size_px: int = 0) -> dict[Path, list[Problem]]:
    """Decode everything and list what is wrong or odd, by tar. Reads every byte.

    dir       a source, a collection, or any folder with tars
    size_px   images with a shorter side are listed as too small
    """
    dir = Path(dir)
    if (dir / MANIFEST).is_file():
        verify_shards(dir)
        folders = source_folders(dir).values()
        shards = [(f, s) for f in folders for split in source_manifest(f)["splits"].values() for s in split["shards"]]
        files = sorted({folder / shard["file"] for folder, shard in shards})
    else:
        files = sorted(dir.rglob("*.tar"))
    if not files:
        raise DataError(f"data {dir}", "no tar files here", expected="a dataset folder, or a folder with tars")
    found: dict[Path, list[Problem]] = {}
    images = Counter[bytes]()
    for file in files:
        scan = scan_shard(file, decode=True)
        problems = [*scan.problems]
        for key, row in zip(scan.keys, scan.rows, strict=True):
            width, height, words = int(row["width_px"]), int(row["height_px"]), int(row["num_words"])
            if max(width, height) > MAX_ASPECT * min(width, height):
                problems.append(Problem(key, "aspect", f"{width} x {height} px is left out in training", fatal=False))
            if min(width, height) < size_px:
                problems.append(Problem(key, "small", f"{width} x {height} px", fatal=False))
            if words > MAX_WORDS:
                problems.append(Problem(key, "long_caption", f"{words} words", fatal=False))
        with file.open("rb") as data:
            for row in scan.rows:
                data.seek(int(row["image_offset"]))
                images[hashlib.sha256(data.read(int(row["image_bytes"]))).digest()[:8]] += 1
        if problems:
            found[file] = problems
    num_duplicates = images.total() - len(images)
    if num_duplicates > MAX_DUPLICATES * images.total():
        text = f"{num_duplicates:,} of {images.total():,} images occur before with equal bytes"
        found.setdefault(files[-1], []).append(Problem("", "duplicates", text, fatal=False))
    return found
