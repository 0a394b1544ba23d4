"""Find the samples in a tar by its headers: which members belong together, where they lie, and what is wrong.

Works for any uncompressed tar of images and captions, ours or not. Read `scan_shard` first. No torch.
"""

from __future__ import annotations

import math
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from raev2.files.damage import stop_if_machine
from raev2.files.images import is_picture, picture_suffixes
from raev2_tasks.t2i.shards.pixels import sample_picture_size
from raev2_tasks.t2i.text.captions import (
    TXT,
    UNLABELLED_KIND,
    BadSample,
    Caption,
    CaptionFields,
    json_failure,
    json_fields,
    parse_captions,
)
from raev2_tasks.t2i.text.encodings import decode_text

BLOCK = 512  # bytes; a tar ends with two blocks of zeros
COMPRESSED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
TEXTS = ("txt", "json")  # suffixes of the other members that are read
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
MIN_SIDE = 0.9  # a picture whose short side is less than this share of the wanted size is left out, not enlarged
MAX_ASPECT = 2.5  # a longer picture is left out, not cropped


@dataclass(frozen=True)
class ShapeRule:
    """Which pictures are used, by their size alone: one rule for index, check, rewrite and training.

    least_px     height and width that a picture must have
    max_aspect   longest side over shortest
    """

    least_px: tuple[float, float] = (0, 0)
    max_aspect: float = MAX_ASPECT

    @classmethod
    def of(cls, size_px: tuple[int, int], min_side: float = MIN_SIDE, max_aspect: float = MAX_ASPECT) -> ShapeRule:
        """The rule of a training on images of this height and width."""
        return cls((min_side * size_px[0], min_side * size_px[1]), max_aspect)

    def check(self, where: str, width: int, height: int) -> None:
        """Raises BadSample for a picture that is left out."""
        if height < self.least_px[0] or width < self.least_px[1]:
            raise BadSample(
                "bad_geometry", where, "image too small", got=f"{width} x {height} px",
                hint=f"At least {self.least_px[1]:g} x {self.least_px[0]:g} px are wanted; larger ones are resized.",
            )  # fmt: skip
        if max(width, height) > self.max_aspect * min(width, height):
            raise BadSample("bad_geometry", where, "image too long for a centre crop", got=f"{width} x {height} px")


TRAINING_SHAPE = ShapeRule()  # of a training on images of any size


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
    """Files of one sample as they lie in a tar; `name` says which one it is, `suffix` is that of the image."""

    name: str
    suffix: str
    image: bytes
    text: bytes | None
    json: bytes | None


Members = Mapping[str, tuple[int, int]]
"""Files of a sample in a tar: suffix -> (offset, bytes)."""


@dataclass(frozen=True)
class ScanRule:
    """What makes a sample usable, and how its captions are read: of the manifest of a source.

    caption_kind     kind of captions for which the files do not say it
    caption_fields   which fields hold captions, see `parse_captions`
    shape            which pictures are used
    """

    caption_kind: str = UNLABELLED_KIND
    caption_fields: CaptionFields = ()
    shape: ShapeRule = ShapeRule((0, 0), math.inf)

    def captions(self, sample: TarSample) -> list[Caption]:
        """Captions of a sample, the default one first. Raises BadSample."""
        return parse_captions(sample.text, sample.json, self.caption_kind, self.caption_fields)


ANY = ScanRule()


def scan_shard(file: Path, rule: ScanRule = ANY, decode: bool = False) -> Scan:
    """Find the samples of a tar by its headers, and everything that is wrong with it.

    decode   decode every image completely, instead of reading its size only
    """
    rows, keys, kinds, unread = list[tuple[int, ...]](), list[str](), Counter[str](), Counter[str]()
    problems: list[Problem] = []
    with file.open("rb") as data:
        previous = ""
        for key, members in tar_samples(data, problems).items():
            if key < previous:
                problems.append(Problem(key, "unsorted", "keys are not in sorted order", fatal=False))
            previous = key
            try:
                sample = read_sample(data, f"sample {key}", members)
                captions = rule.captions(sample)
                row = _row(sample, members, captions, rule, decode)
            except BadSample as error:
                problems.append(Problem(key, error.kind, str(error)))
                continue
            rows.append(row)
            keys.append(key)
            kinds.update(caption.kind for caption in captions)
            unread.update(members.keys() - {sample.suffix, *TEXTS})
            problems += _doubts(key, sample, captions[0], rule)
    if unread:
        text = ", ".join(f"{number} .{suffix}" for suffix, number in sorted(unread.items()))
        problems.append(Problem("", "ignored", f"members that are not read: {text}", fatal=False))
    return Scan(np.array(rows, dtype=INDEX_ROW), keys, kinds, problems)


def tar_samples(data: IO[bytes], problems: list[Problem]) -> dict[str, Members]:
    """The samples of an open tar by key, in file order; each one that is left out gets a problem.

    Members are grouped as webdataset does it: neighbours whose names are equal up to the first dot of the last part.
    Of samples with one key the first is kept. A sample whose files lie apart is left out: other readers would take it
    for two.
    """
    samples: dict[str, Members] = {}
    apart: dict[str, str] = {}
    for key, members in groups(data, problems):
        known = samples.setdefault(key, members)
        if known is members:
            continue
        if known.keys() & members.keys():
            problems.append(Problem(key, "duplicate_key", "the key occurs twice; the first sample is kept"))
        else:
            apart[key] = ", ".join(members)
    for doubled in [problem.key for problem in problems if problem.kind == "duplicate_member"]:
        samples.pop(doubled, None)
    for key, suffixes in apart.items():
        text = f"the files of the sample are not adjacent: {suffixes} after files of other samples"
        problems.append(Problem(key, "not_adjacent", f"{text}. Write the tar with its members sorted by name."))
        samples.pop(key, None)
    return samples


def compression(file: Path) -> str:
    """How a file is compressed, by its first bytes; '' for plain ones."""
    with file.open("rb") as data:
        head = data.read(6)
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), "")


def read_sample(data: IO[bytes], name: str, members: Members) -> TarSample:
    """Read the files of a sample of an open tar. Raises BadSample unless it has exactly one image."""

    def read(suffix: str) -> bytes:
        offset, num_bytes = members[suffix]
        return os.pread(data.fileno(), num_bytes, offset)

    suffix = image_suffix(name, members, read)
    text, json = (read(one) if one in members else None for one in TEXTS)
    return TarSample(name, suffix, read(suffix), text, json)


def image_suffix(name: str, suffixes: Iterable[str], read: Callable[[str], bytes]) -> str:
    """Suffix of the image of a sample: one that Pillow knows, else that of the file that is a picture by its content.

    read   the bytes of the file with a suffix

    Raises BadSample unless there is exactly one image.
    """
    others = [suffix for suffix in suffixes if suffix not in TEXTS]
    images = [suffix for suffix in others if f".{suffix}" in picture_suffixes()]
    if not images and any(f".{suffix.rpartition('.')[2]}" in picture_suffixes() for suffix in others):
        raise BadSample("dotted_key", name, "its key has a dot, which tar readers take for a suffix")
    images = images or [suffix for suffix in others if is_picture(read(suffix))]
    if len(images) != 1:
        raise BadSample("bad_image", name, f"{len(images) or 'no'} images", hint="Exactly one is needed.")
    return images[0]


def groups(data: IO[bytes], problems: list[Problem]) -> Iterator[tuple[str, Members]]:
    """(key, {suffix: (offset, bytes)}) of neighbouring members with one key."""
    size = os.fstat(data.fileno()).st_size
    key, members, ignored = "", dict[str, tuple[int, int]](), list[str]()
    try:
        tar = tarfile.open(fileobj=data, mode="r:")  # noqa: SIM115, closing it would close nothing of ours
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if member.isdir():
                continue
            if not member.isfile() or not stem:
                ignored.append(member.name)
                continue
            name, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
            if name != key:
                if members:
                    yield key, members
                key, members = name, {}
            if suffix in members:
                problems.append(Problem(key, "duplicate_member", f"two members {member.name}"))
                continue
            members[suffix] = member.offset_data, member.size
            if member.offset_data + member.size > size:
                problems.append(Problem(key, "bad_tar", "the file ends inside this sample"))
                return
        if size > tar.offset and os.pread(data.fileno(), BLOCK, tar.offset) != bytes(BLOCK):
            text = f"cannot be read on: no file begins after this one, and {size - tar.offset:,} bytes are left"
            problems.append(Problem(key, "bad_tar", text))
        elif size <= tar.offset:
            problems.append(Problem(key, "bad_tar", "no end mark: the file may have been cut after here", fatal=False))
    except (tarfile.TarError, OSError) as error:
        stop_if_machine(error)
        problems.append(Problem(key, "bad_tar", f"cannot be read on: {error}"))
    if ignored:
        text = f"{len(ignored)} links or hidden files, such as {ignored[0]}, are ignored"
        problems.append(Problem("", "ignored", text, fatal=False))
    if members:
        yield key, members


def _row(sample: TarSample, members: Members, captions: list[Caption], rule: ScanRule, decode: bool) -> tuple[int, ...]:
    """Index row of a sample; BadSample when it cannot be used."""
    width, height = sample_picture_size(sample.image, sample.name, decode)
    limit = 2**16 - 1  # of the two-byte fields
    if max(width, height) > limit:
        raise BadSample("bad_geometry", sample.name, "image too large", got=f"{width} x {height} px")
    rule.shape.check(sample.name, width, height)
    places = [place for suffix in (sample.suffix, *TEXTS) for place in members.get(suffix, (0, 0))]
    flags = HAS_SCENE if json_fields(sample.json).get("scene") else 0
    return (*places, width, height, min(len(captions), 255), min(captions[0].num_words, limit), flags)


def _doubts(key: str, sample: TarSample, default: Caption, rule: ScanRule) -> Iterator[Problem]:
    """What should be looked at in a sample that can be used."""
    if default.field != TXT:
        return
    encoding = decode_text(sample.text or b"")[1]
    if not encoding.startswith("utf-8"):
        yield Problem(key, "encoding", f"the txt is not UTF-8, it is read as {encoding}", fatal=False)
    if failure := json_failure(sample.json, rule.caption_kind, rule.caption_fields):
        yield Problem(key, "json_unused", f"the txt serves: {failure}", fatal=False)
