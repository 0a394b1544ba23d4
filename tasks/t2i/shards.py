"""Image-text shards: ordinary tar files, a small index beside each one, and a manifest.

A source folder::

    manifest.json                    licence, options, and every shard with its SHA-256 (`read_manifest` takes it)
    NAME-train-000000.tar            members KEY.jpg or KEY.png, KEY.txt, KEY.json; sorted, uncompressed
    NAME-train-000000.idx            one row of `INDEX_ROW` a usable sample: where its members lie in the tar
    rejects.jsonl                    samples that were left out, with the reason (only when there are some)

A collection is a folder whose `manifest.json` lists several `sources`, each a folder inside it. Read `write_shards`
first, then `scan_shard`, which finds the samples of any such tar, ours or not. Reading samples: tasks/t2i/reader.py.
Page: docs/how_to/shards.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from raev2.errors import DataError
from raev2.manifest import FORMAT_VERSION, fingerprint, read_manifest
from raev2_tasks.t2i.captions import UNLABELLED_KIND, BadSample, Caption, parse_captions, parse_json

FORMAT = "image-text-shards"
SCHEMA_VERSION = 1  # of the json member
MANIFEST, REJECTS = "manifest.json", "rejects.jsonl"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RESERVED = {"v", "key", "source", "source_id", "width", "height", "captions", "default", "sha256"}
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises
JPEG_QUALITY = 95

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
class Example:
    """One image with its captions, to be written.

    key_hint   the name of the sample where it comes from; kept in the json member as `source_id`
    image      a whole jpg, png or webp file, stored as it is if it is upright RGB; or a Pillow image
    captions   at least one; the first is the default
    extra      more fields of the json member: `scene`, `license`, ids
    """

    key_hint: str
    image: bytes | Image.Image
    captions: list[Caption]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Deferred:
    """An example that is read when its turn comes, in a thread; what cannot be read goes to rejects.jsonl.

    read   raises OSError, ValueError, SyntaxError or DataError for an example that cannot be used
    """

    source: str
    read: Callable[[], Example]


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


# Writing.


def write_shards(
    out: Path,
    source: str,
    splits: Mapping[str, Iterable[Example | Deferred]],
    *,
    per_shard: int = 5000,
    licence: str,
    attribution: str,
    recipe: str,
    options: Mapping[str, Any],
    shuffle_seed: int | None = 0,
    image_format: str = "png",
) -> dict[str, Any]:
    """Write a source folder and return its manifest. The same input gives the same bytes.

    source         name of the source, also the first part of every key; letters, digits, '-' and '_'
    splits         examples of 'train' and 'val'. A list or tuple is shuffled by `shuffle_seed`, so that shards are
                   alike; a stream is written in its order
    image_format   'png' or 'jpg' (quality 95, no chroma subsampling) for images that have to be encoded
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", source):
        raise DataError("shards", "not a usable source name", got=repr(source), expected="letters, digits, '-', '_'")
    out.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    kinds: Counter[str] = Counter()
    sizes_px: set[tuple[int, int]] = set()
    rejects: list[str] = []
    for split, examples in splits.items():
        shards: list[dict[str, Any]] = []
        if shuffle_seed is not None and isinstance(examples, list | tuple):
            examples = random.Random(f"{shuffle_seed} {source} {split}").sample(examples, len(examples))
        good = _readable(examples, rejects)
        while first := next(good, None):
            file = out / f"{source}-{split}-{len(shards):06d}.tar"
            prefix = f"{source}_{split}_{len(shards):06d}"
            sizes_px |= _write_tar(file, prefix, source, _take(first, good, per_shard), image_format, rejects)
            scan = scan_shard(file)
            if scan.problems or not len(scan.rows):
                file.unlink()
                if scan.problems:
                    raise AssertionError(f"wrote a bad shard: {scan.problems[0]}")
                continue
            kinds += scan.caption_kinds
            shards.append(_shard_entry(out, file, _write_index(file.with_suffix(".idx"), scan.rows), len(scan.rows)))
        entries[split] = {"num_samples": sum(shard["num_samples"] for shard in shards), "shards": shards}
    if not entries.get("train", {}).get("num_samples"):
        hint = f"First of them: {rejects[0].strip()}" if rejects else ""
        raise DataError(f"data {source}", f"no training samples; {len(rejects)} rejected", hint=hint)
    if rejects:
        (out / REJECTS).write_text("".join(rejects), encoding="utf-8")
    return _write_manifest(
        out, name=source, recipe=recipe, options=options, licence=licence, attribution=attribution,
        image_size_px=list(sizes_px.pop()) if len(sizes_px) == 1 else None, entries=entries, kinds=kinds,
        num_rejected=len(rejects), caption_kind=UNLABELLED_KIND,
    )  # fmt: skip


def write_collection(out: Path, names: Sequence[str], *, recipe: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder that holds the source folders `names`, and return it."""
    sources = {name: read_manifest(out / name) for name in names}
    splits: dict[str, Any] = {}
    for split in dict.fromkeys(split for manifest in sources.values() for split in manifest["splits"]):
        counts = {name: source["splits"].get(split, {}).get("num_samples", 0) for name, source in sources.items()}
        splits[split] = {"num_samples": sum(counts.values()), "sources": counts}
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": FORMAT,
        "name": out.name.removesuffix(".partial"),
        "recipe": recipe,
        "options": dict(options),
        "licence": "; ".join(dict.fromkeys(source["licence"] for source in sources.values())),
        "attribution": " ".join(dict.fromkeys(source["attribution"] for source in sources.values())),
        "image_size_px": _common([source["image_size_px"] for source in sources.values()]),
        "classes": [],
        "sources": {name: source["fingerprint"] for name, source in sources.items()},
        "splits": splits,
        "fingerprint": collection_fingerprint({name: source["fingerprint"] for name, source in sources.items()}),
        "rejected": sum(source["rejected"] for source in sources.values()),
    }
    _write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def index_shards(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    source: str | None = None,
    val_fraction: float = 0.01,
    licence: str = "unstated",
    attribution: str = "",
    caption_kind: str = UNLABELLED_KIND,
    recipe: str = "tar-shards",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make tar shards of other origin readable: an index beside each tar, or in `out`, and a manifest. No tar changes.

    Every `.tar` below `folder` is taken, in sorted order. Tars with 'val' as a word of their path are the validation
    split; where there are none, the share `val_fraction` of the samples is, chosen by the hash of key and tar.

    caption_kind   kind of captions whose files do not say it
    """
    folder = Path(folder)
    out = folder if out is None else Path(out)
    files = sorted(folder.rglob("*.tar"))
    if not files:
        raise DataError(f"data {folder}", "no tar files here", expected="uncompressed .tar shards")
    val_files = {file for file in files if "val" in re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())}
    entries: dict[str, Any] = {split: {"num_samples": 0, "shards": []} for split in ("train", "val")}
    kinds: Counter[str] = Counter()
    sizes_px: set[tuple[int, int]] = set()
    rejects: list[str] = []
    for file in files:
        name = file.relative_to(folder)
        scan = scan_shard(file, caption_kind)
        rejects += [
            _json_line({"path": f"{name}: {problem.key}", "reason": f"{problem.kind}: {problem.text}"})
            for problem in scan.problems
            if problem.fatal
        ]
        kinds += scan.caption_kinds
        sizes_px |= {(int(row["width_px"]), int(row["height_px"])) for row in scan.rows}
        if val_files:
            in_val = np.full(len(scan.rows), file in val_files)
        else:
            in_val = np.array([_hash_fraction(f"{name} {key}") < val_fraction for key in scan.keys], dtype=bool)
        digest = _sha256(file)
        for split, rows in (("train", scan.rows[~in_val]), ("val", scan.rows[in_val])):
            if not len(rows):
                continue
            index = out / name.with_suffix(".idx" if split == "train" or val_files else ".val.idx")
            index.parent.mkdir(parents=True, exist_ok=True)
            entry = _shard_entry(out, file, _write_index(index, rows), len(rows), digest)
            entries[split]["shards"].append(entry)
            entries[split]["num_samples"] += len(rows)
    if not entries["train"]["num_samples"]:
        hint = f"First of them: {rejects[0].strip()}" if rejects else ""
        raise DataError(f"data {folder}", f"no usable training samples; {len(rejects)} rejected", hint=hint)
    if rejects:
        _write_text(out / REJECTS, "".join(rejects))
    return _write_manifest(
        out, name=source or folder.resolve().name, recipe=recipe, options=options or {}, licence=licence,
        attribution=attribution, image_size_px=list(sizes_px.pop()) if len(sizes_px) == 1 else None, entries=entries,
        kinds=kinds, num_rejected=len(rejects), caption_kind=caption_kind,
    )  # fmt: skip


# Scanning and checking.


def scan_shard(file: Path, caption_kind: str = UNLABELLED_KIND, decode: bool = False) -> Scan:
    """Find the samples of a tar by its headers, and everything that is wrong with it.

    Members are grouped as webdataset does it: neighbours whose names are equal up to the first dot of the last part.

    decode   decode every image completely, instead of reading its size only
    """
    rows, keys, problems, kinds = [], [], [], Counter[str]()
    seen: set[str] = set()
    previous = ""
    with file.open("rb") as data:
        for key, members in _groups(data, problems):
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


def verify_shards(dir: str | Path) -> dict[str, Any]:
    """Compare every shard and index with the SHA-256 in the manifest; return the manifest.

    Raises DataError with the first file that differs.
    """
    dir = Path(dir)
    manifest = read_manifest(dir)
    rebuild = "Build the dataset again."
    where = f"data {dir / MANIFEST}"
    if manifest.get("format") != FORMAT:
        raise DataError(where, "not image-text shards", got=manifest.get("format"), expected=FORMAT)
    if "sources" in manifest:
        for name, expected in manifest["sources"].items():
            got = verify_shards(dir / name)["fingerprint"]
            if got != expected:
                raise DataError(where, f"source {name} is another one", got=got, expected=expected, hint=rebuild)
        got = collection_fingerprint(manifest["sources"])
    else:
        got = _fingerprint(manifest["splits"])
    if got != manifest["fingerprint"]:
        raise DataError(where, "changed after it was written", got=got, expected=manifest["fingerprint"], hint=rebuild)
    if "sources" in manifest:
        return manifest
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            for file, expected in ((shard["file"], shard["sha256"]), (shard["index"], shard["index_sha256"])):
                if not (dir / file).is_file():
                    raise DataError(f"data {dir / file}", "file is missing", hint=rebuild)
                if (got := _sha256(dir / file)) != expected:
                    raise DataError(f"data {dir / file}", "SHA-256 differs", got=got, expected=expected, hint=rebuild)
            num_rows = (dir / shard["index"]).stat().st_size // INDEX_ROW.itemsize
            if num_rows != shard["num_samples"]:
                raise DataError(
                    f"data {dir / shard['index']}", "wrong count", got=num_rows, expected=str(shard["num_samples"])
                )
    return manifest


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: the EXIF orientation applied, transparency on white, 16 bits scaled to 8, CMYK converted."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16-bit grey; Pillow would clip it at 255
        pixels = np.asarray(image, dtype=np.float64)
        scale = 1.0 if pixels.size and pixels.max() <= 1.0 and image.mode == "F" else 1 / 65535
        return Image.fromarray(np.rint(np.clip(pixels * scale, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def is_plain_rgb(image: Image.Image) -> bool:
    """Whether an opened image is what shards should hold: RGB without transparency, nothing to rotate."""
    return image.mode == "RGB" and not image.has_transparency_data and image.getexif().get(0x0112, 1) == 1


def encode_image(image: Image.Image, format: str) -> bytes:
    """An RGB image as 'png', or as 'jpg' of quality 95 with 4:4:4 chroma."""
    buffer = io.BytesIO()
    if format == "jpg":
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()


def collection_fingerprint(sources: Mapping[str, str]) -> str:
    """Hash of the fingerprints of several sources by name."""
    return fingerprint(dict(sources), [])


# Parts of the above.


def _readable(examples: Iterable[Example | Deferred], rejects: list[str]) -> Iterator[Example]:
    """The examples in order; deferred ones are read by a few threads, at most 64 ahead."""
    waiting: deque[tuple[str, Example | Future[Example]]] = deque()

    def finish() -> Iterator[Example]:
        source, item = waiting.popleft()
        try:
            yield item if isinstance(item, Example) else item.result()
        except (*IMAGE_ERRORS, DataError) as error:
            rejects.append(_json_line({"path": source, "reason": f"{type(error).__name__}: {error}"}))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for example in examples:
                if isinstance(example, Deferred):
                    waiting.append((example.source, pool.submit(example.read)))
                else:
                    waiting.append((example.key_hint, example))
                if len(waiting) == 64:
                    yield from finish()
            while waiting:
                yield from finish()
        finally:
            for _, item in waiting:
                if isinstance(item, Future):
                    item.cancel()


def _take(first: Example, more: Iterator[Example], count: int) -> Iterator[Example]:
    yield first
    for _, example in zip(range(count - 1), more, strict=False):
        yield example


def _write_tar(
    file: Path, prefix: str, source: str, examples: Iterator[Example], image_format: str, rejects: list[str]
) -> set[tuple[int, int]]:
    """Write one shard through a temporary file; return the image sizes in it. Unusable examples go to `rejects`."""
    partial = file.with_name(file.name + ".tmp")
    sizes_px: set[tuple[int, int]] = set()
    row = 0
    with partial.open("wb") as handle:
        with tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for example in examples:
                key = f"{prefix}_{row:05d}"
                try:
                    members, size_px = _members_of(key, source, example, image_format)
                except (*IMAGE_ERRORS, DataError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    rejects.append(_json_line({"path": example.key_hint, "reason": reason}))
                    continue
                row += 1
                sizes_px.add(size_px)
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mode = len(data), 0o644
                    tar.addfile(info, io.BytesIO(data))
        handle.flush()
        os.fsync(handle.fileno())
    partial.rename(file)
    return sizes_px


def _members_of(key: str, source: str, example: Example, image_format: str) -> tuple[dict[str, bytes], tuple[int, int]]:
    """Files of one sample by suffix, and the image size (width, height)."""
    texts = [Caption(" ".join(c.text.split()), c.kind, c.model, c.score) for c in example.captions]
    if not texts or not texts[0].text:
        raise BadSample("bad_caption", f"sample {example.key_hint}", "the default caption is missing or empty")
    reserved = RESERVED & set(example.extra)
    if reserved:
        raise DataError(f"sample {example.key_hint}", "extra field has a reserved name", got=sorted(reserved)[0])
    suffix, data, size_px = _image_of(example.image, image_format)
    fields = {
        "v": SCHEMA_VERSION, "key": key, "source": source, "source_id": example.key_hint,
        "width": size_px[0], "height": size_px[1],
        "captions": [caption.as_json() for caption in texts if caption.text], "default": 0,
        "sha256": hashlib.sha256(data).hexdigest(), **example.extra,
    }  # fmt: skip
    members = {suffix: data, "txt": texts[0].text.encode(), "json": json.dumps(fields, ensure_ascii=False).encode()}
    return dict(sorted(members.items())), size_px


def _image_of(image: bytes | Image.Image, image_format: str) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, file and size of an image; a file that is plain RGB is kept as it is."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()  # raises for a truncated file
            suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(opened.format or "")
            if suffix and is_plain_rgb(opened):
                return suffix, image, opened.size
            rgb = to_rgb(opened)
    else:
        rgb = to_rgb(image)
    return image_format, encode_image(rgb, image_format), rgb.size


def _groups(data: IO[bytes], problems: list[Problem]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
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
    except (tarfile.TarError, OSError) as error:
        problems.append(Problem(key, "bad_tar", f"cannot be read on: {error}"))
    if members:
        yield key, members


def _row(
    key: str, members: Mapping[str, tuple[int, int]], caption_kind: str, data: IO[bytes], decode: bool
) -> tuple[tuple[int, ...], list[Caption]]:
    """Index row and captions of a sample; BadSample when it cannot be used."""

    def read(suffix: str) -> bytes | None:
        if suffix not in members:
            return None
        offset, size = members[suffix]
        return os.pread(data.fileno(), size, offset)

    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if not images and any(suffix.rpartition(".")[2] in IMAGE_SUFFIXES for suffix in members):
        raise BadSample("dotted_key", f"sample {key}", "its key has a dot, which tar readers take for a suffix")
    if len(images) != 1:
        raise BadSample("bad_image", f"sample {key}", f"{len(images) or 'no'} images", hint="Exactly one is needed.")
    text, fields = read("txt"), read("json")
    captions = parse_captions(text, fields, caption_kind)
    if text is not None and not text.strip():
        raise BadSample("bad_caption", f"sample {key}", "its txt is empty")
    try:
        with Image.open(io.BytesIO(read(images[0]) or b"")) as image:
            width, height = image.size
            if decode:
                image.load()
    except IMAGE_ERRORS as error:
        raise BadSample("bad_image", f"sample {key}", "cannot be read as an image", got=type(error).__name__) from error
    places = [place for suffix in (images[0], "txt", "json") for place in members.get(suffix, (0, 0))]
    flags = HAS_SCENE if parse_json(fields).get("scene") else 0
    limit = 2**16 - 1
    return (*places, width, height, min(len(captions), 255), min(captions[0].num_words, limit), flags), captions


def _write_index(file: Path, rows: np.ndarray) -> Path:
    partial = file.with_name(file.name + ".tmp")
    partial.write_bytes(rows.tobytes())
    partial.rename(file)
    return file


def _shard_entry(out: Path, file: Path, index: Path, num_samples: int, digest: str | None = None) -> dict[str, Any]:
    inside = file.is_relative_to(out)
    return {
        "file": str(file.relative_to(out) if inside else file.resolve()),
        "index": str(index.relative_to(out)),
        "num_samples": num_samples,
        "bytes": file.stat().st_size,
        "sha256": digest or _sha256(file),
        "index_sha256": _sha256(index),
    }


def _write_manifest(
    out: Path, *, name: str, recipe: str, options: Mapping[str, Any], licence: str, attribution: str,
    image_size_px: list[int] | None, entries: dict[str, Any], kinds: Counter[str], num_rejected: int, caption_kind: str,
) -> dict[str, Any]:  # fmt: skip
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": FORMAT,
        "name": name,
        "recipe": recipe,
        "options": dict(options),
        "licence": licence,
        "attribution": attribution,
        "image_size_px": image_size_px,
        "classes": [],
        "caption_kind": caption_kind,
        "caption_kinds": dict(sorted(kinds.items())),
        "splits": entries,
        "fingerprint": _fingerprint(entries),
        "rejected": num_rejected,
    }
    _write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _fingerprint(splits: Mapping[str, Any]) -> str:
    """Hash over the content of all shards and indices; where a tar lies does not count."""
    content = {
        split: [[Path(s["file"]).name, s["num_samples"], s["sha256"], s["index_sha256"]] for s in entry["shards"]]
        for split, entry in splits.items()
    }
    return fingerprint(content, [])


def _common(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None


def _hash_fraction(text: str) -> float:
    """A number in [0, 1) that is a function of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.rename(file)


def _json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
