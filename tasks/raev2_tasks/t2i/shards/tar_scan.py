"""Find the samples in a tar by its headers: which members belong together, where they lie, and what is wrong.

Works for any uncompressed tar of images and captions, ours or not. Read `scan_shard` first. No torch.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from raev2_tasks.t2i.shards.pixels import sample_picture_size
from raev2_tasks.t2i.text.captions import UNLABELLED_KIND, BadSample, Caption, parse_captions, parse_json

BLOCK = 512  # bytes; a tar ends with two blocks of zeros
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INDEX_ROW = np.dtype(
    [
        ("image_offset", "<u8"), ("image_bytes", "<u4"),
        ("text_offset", "<u8"), ("text_bytes", "<u4"),  # 0 bytes: no such member
        ("json_offset", "<u8"), ("json_bytes", "<u4"),
        ("width_px", "<u2"), ("height_px", "<u2"),
        ("num_captions", "u1"), ("num_words", "<u2"),  # of the default caption
        ("flags", "<u4"),
    ]
)  # fmt: skip
HAS_SCENE = 1  # flag: the json member has a scene


@dataclass(frozen=True)
class Problem:
    """What is wrong with a sample; `fatal` False: it can be used, but should be looked at."""

    key: str
    kind: str
    text: str
    fatal: bool = True


@dataclass(frozen=True)
class Scan:
    """What one pass over a tar found.

    rows   usable samples in file order, of `INDEX_ROW`; `keys` are their names
    """

    rows: np.ndarray
    keys: list[str]
    caption_kinds: Counter[str]
    problems: list[Problem]


@dataclass(frozen=True)
class TarSample:
    """Files of one sample as they lie in a tar; `name` says which one it is."""

    name: str
    image: bytes
    text: bytes | None
    json: bytes | None


Members = Mapping[str, tuple[int, int]]
"""Files of a sample in a tar: suffix -> (offset, bytes)."""


def scan_shard(file: Path, caption_kind: str = UNLABELLED_KIND, decode: bool = False) -> Scan:
    """Find the samples of a tar by its headers, and everything that is wrong with it.

    Members are grouped as webdataset does it: neighbours whose names are equal up to the first dot of the last part.

    decode   decode every image completely, instead of reading its size only
    """
    rows, keys, kinds = [], [], Counter[str]()
    problems: list[Problem] = []
    seen: set[str] = set()
    previous = ""
    with file.open("rb") as data:
        for key, members in groups(data, problems):
            if key in seen:
                problems.append(Problem(key, "duplicate_key", "the key occurs twice, or its files are not adjacent"))
                continue
            seen.add(key)
            if key < previous:
                problems.append(Problem(key, "unsorted", "keys are not in sorted order", fatal=False))
            previous = key
            try:
                row, captions = _row(key, members, caption_kind, data, decode)
            except BadSample as error:
                problems.append(Problem(key, error.kind, str(error)))
                continue
            rows.append(row)
            keys.append(key)
            kinds.update(caption.kind for caption in captions)
    return Scan(np.array(rows, dtype=INDEX_ROW), keys, kinds, problems)


def read_sample(data: IO[bytes], name: str, members: Members) -> TarSample:
    """Read the files of a sample of an open tar. Raises BadSample unless it has exactly one image."""
    image, text, json = (
        os.pread(data.fileno(), members[suffix][1], members[suffix][0]) if suffix in members else None
        for suffix in (image_suffix(name, members), "txt", "json")
    )
    return TarSample(name, image or b"", text, json)


def image_suffix(name: str, members: Members) -> str:
    """Suffix of the image of a sample. Raises BadSample unless there is exactly one."""
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if not images and any(suffix.rpartition(".")[2] in IMAGE_SUFFIXES for suffix in members):
        raise BadSample("dotted_key", name, "its key has a dot, which tar readers take for a suffix")
    if len(images) != 1:
        raise BadSample("bad_image", name, f"{len(images) or 'no'} images", hint="Exactly one is needed.")
    return images[0]


def groups(data: IO[bytes], problems: list[Problem]) -> Iterator[tuple[str, Members]]:
    """(key, {suffix: (offset, bytes)}) of neighbouring members with one key."""
    size = os.fstat(data.fileno()).st_size
    key, members = "", dict[str, tuple[int, int]]()
    try:
        tar = tarfile.open(fileobj=data, mode="r:")  # noqa: SIM115, closing it would close nothing of ours
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not member.isfile() or not stem:
                continue
            name, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
            if name != key:
                if members:
                    yield key, members
                key, members = name, {}
            if suffix in members:
                problems.append(Problem(key, "duplicate_key", f"two members {member.name}"))
                continue
            members[suffix] = member.offset_data, member.size
            if member.offset_data + member.size > size:
                problems.append(Problem(key, "bad_tar", "the file ends inside this sample"))
                return
        if os.pread(data.fileno(), BLOCK, tar.offset) != bytes(BLOCK):
            problems.append(Problem(key, "bad_tar", "no end mark: the file may have been cut after here", fatal=False))
    except (tarfile.TarError, OSError) as error:
        problems.append(Problem(key, "bad_tar", f"cannot be read on: {error}"))
    if members:
        yield key, members


def _row(
    key: str, members: Members, caption_kind: str, data: IO[bytes], decode: bool
) -> tuple[tuple[int, ...], list[Caption]]:
    """Index row and captions of a sample; BadSample when it cannot be used."""

    sample = read_sample(data, f"sample {key}", members)
    captions = parse_captions(sample.text, sample.json, caption_kind)
    width, height = sample_picture_size(sample.image, f"sample {key}", decode)
    limit = 2**16 - 1  # of the two-byte fields
    if max(width, height) > limit:
        raise BadSample("bad_geometry", f"sample {key}", "image too large", got=f"{width} x {height} px")
    places = [
        place for suffix in (image_suffix(sample.name, members), "txt", "json") for place in members.get(suffix, (0, 0))
    ]
    flags = HAS_SCENE if parse_json(sample.json).get("scene") else 0
    return (*places, width, height, min(len(captions), 255), min(captions[0].num_words, limit), flags), captions
