"""Image-text shards: ordinary tar files, a small index beside each one, and a manifest.

A source folder::

    manifest.json                    licence, options, and every shard with its SHA-256 (`read_manifest` takes it)
    NAME-train-000000.tar            members KEY.jpg or KEY.png, KEY.txt, KEY.json; sorted, uncompressed
    NAME-train-000000.idx            one row of `INDEX_ROW` a usable sample: where its members lie in the tar
    rejects.jsonl                    samples that were left out, with the reason (only when there are some)

A collection is a folder whose `manifest.json` lists several `sources`, each a folder inside it. Read `write_shards`
first. The samples of a tar are found in tar_scan.py and read in reader.py.
Page: docs/how_to/shards.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import random
import re
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raev2.errors import DataError
from raev2.files.damage import stop_if_machine
from raev2.files.hashes import file_sha256
from raev2.files.images import to_rgb
from raev2.files.manifest import FORMAT_VERSION, PROGRESS, fingerprint, read_manifest
from raev2.files.replace import new_file, write_text
from raev2_tasks.t2i.shards.pixels import KEPT_FORMATS, encode_image, read_sample_picture, sample_picture_size
from raev2_tasks.t2i.shards.tar_scan import (
    ANY,
    INDEX_ROW,
    MAX_ASPECT,
    TRAINING_SHAPE,
    Members,
    Scan,
    ScanRule,
    ShapeRule,
    read_sample,
    scan_shard,
    tar_samples,
)
from raev2_tasks.t2i.text.captions import BadSample, Caption, json_fields

logger = logging.getLogger(__name__)

FORMAT = "image-text-shards"
SCHEMA_VERSION = 1  # of the json member
MANIFEST, REJECTS = "manifest.json", "rejects.jsonl"
RESERVED = {"v", "key", "source", "source_id", "width", "height", "captions", "default", "sha256"}


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
    if (out / MANIFEST).is_file():
        raise DataError(f"data {out}", "has shards already", hint="Choose another folder, or delete it yourself.")
    out.mkdir(parents=True, exist_ok=True)
    same = {"source": source, "per_shard": per_shard, "seed": shuffle_seed, "format": image_format, "options": options}
    progress = _Progress(out / PROGRESS, json.loads(json.dumps(same, default=str)))
    entries: dict[str, Any] = {}
    for split, examples in splits.items():
        if shuffle_seed is not None and isinstance(examples, list | tuple):
            examples = random.Random(f"{shuffle_seed} {source} {split}").sample(examples, len(examples))
        shards = progress.shards(split)
        start = progress.num_taken(split)
        pack = partial(_pack, source=source, image_format=image_format)
        good = _packed(islice(examples, start, None), pack, progress.rejects)
        while first := next(good, None):
            file = out / f"{source}-{split}-{len(shards):06d}.tar"
            num_taken = start + _write_tar(
                file, f"{source}_{split}_{len(shards):06d}", chain([first], islice(good, per_shard - 1))
            )
            scan = scan_shard(file)
            if scan.problems:
                raise AssertionError(f"wrote a bad shard {file}: {scan.problems[0]}")
            index = write_index(file.with_suffix(".idx"), scan.rows)
            shards.append(shard_entry(out, file, index, len(scan.rows)))
            progress.add(split, shards[-1], num_taken, scan)
        entries[split] = {"num_samples": sum(shard["num_samples"] for shard in shards), "shards": shards}
    rejects = progress.rejects
    if not entries.get("train", {}).get("num_samples"):
        hint = f"First of them: {rejects[0].strip()}" if rejects else ""
        raise DataError(f"data {source}", f"no training samples; {len(rejects)} rejected", hint=hint)
    manifest = write_manifest(
        out, name=source, recipe=recipe, options=options, licence=licence, attribution=attribution,
        sizes_px=progress.sizes_px, entries=entries, kinds=progress.kinds, rejects=rejects,
        rule=ANY,
    )  # fmt: skip
    progress.file.unlink()
    return manifest


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
    write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


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
    _verify_files(dir, [shard for entry in manifest["splits"].values() for shard in entry["shards"]], rebuild)
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            num_rows = (dir / shard["index"]).stat().st_size // INDEX_ROW.itemsize
            if num_rows != shard["num_samples"]:
                raise DataError(
                    f"data {dir / shard['index']}", "wrong count", got=num_rows, expected=str(shard["num_samples"])
                )
    if num_long := sum(_num_long(dir, shard) for entry in manifest["splits"].values() for shard in entry["shards"]):
        logger.warning(
            "data %s: training leaves out %d samples with an aspect above %g; `raev2 t2i shards check` names them",
            dir, num_long, MAX_ASPECT,
        )  # fmt: skip
    return manifest


def rewrite_shards(
    dir: str | Path, out: str | Path, *, per_shard: int = 5000, shape: ShapeRule = TRAINING_SHAPE
) -> dict[str, Any]:
    """Write the usable samples of a source folder as new shards; return their manifest. Nothing in `dir` changes.

    shape   leave out pictures that a training with this rule would leave out
    """
    dir = Path(dir)
    manifest = source_manifest(dir)
    rule = manifest_rule(manifest)

    def examples(shards: Sequence[Mapping[str, Any]]) -> Iterator[Deferred]:
        for shard in shards:
            offsets = set(read_index(dir, shard)["image_offset"].tolist())
            with (dir / shard["file"]).open("rb") as data:
                for key, members in tar_samples(data, []).items():
                    if any(offset in offsets for offset, _ in members.values()):
                        yield Deferred(f"{shard['file']}: {key}", partial(read, dir / shard["file"], key, members))

    def read(file: Path, key: str, members: Members) -> Example:
        with file.open("rb") as data:
            sample = read_sample(data, key, members)
        shape.check(f"sample {key}", *sample_picture_size(sample.image, f"sample {key}"))
        fields = json_fields(sample.json)
        extra = {name: value for name, value in fields.items() if name not in RESERVED}
        return Example(str(fields.get("source_id", key)), sample.image, rule.captions(sample), extra)

    return write_shards(
        Path(out), Path(out).resolve().name, {split: examples(s["shards"]) for split, s in manifest["splits"].items()},
        per_shard=per_shard, licence=manifest["licence"], attribution=manifest["attribution"], recipe="tar-shards",
        options={"rewritten": manifest["fingerprint"]},
    )  # fmt: skip


def source_manifest(dir: Path) -> dict[str, Any]:
    """Manifest of a source folder; DataError for a collection and for other dataset folders."""
    manifest = read_manifest(dir)
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"data {dir}", "not image-text shards", got=f"a folder of the data recipe {manifest.get('recipe')}",
            hint="Build one with `raev2 data build captioned-folder`, or index tars with `tar-shards`.",
        )  # fmt: skip
    if "sources" in manifest:
        raise DataError(f"data {dir}", "a collection", expected=f"one of its sources: {', '.join(manifest['sources'])}")
    return manifest


def manifest_rule(manifest: Mapping[str, Any]) -> ScanRule:
    """How the samples of a source are read: what its manifest says."""
    fields = [(name, kind) for name, kind in manifest.get("caption_fields", [])]
    shape = manifest.get("shape") or {"least_px": (0, 0), "max_aspect": math.inf}
    return ScanRule(manifest["caption_kind"], fields, ShapeRule(tuple(shape["least_px"]), shape["max_aspect"]))


def source_folders(dir: str | Path) -> dict[str, Path]:
    """Folders of the sources by name: those of a collection, or the folder itself."""
    dir = Path(dir)
    manifest = read_manifest(dir)
    return {name: dir / name for name in manifest["sources"]} if "sources" in manifest else {manifest["name"]: dir}


def read_index(dir: Path, shard: Mapping[str, Any]) -> np.ndarray:
    """Rows of the index of a shard of a manifest, of `INDEX_ROW`. Not mapped: a mapping would keep the file open."""
    file = dir / shard["index"]
    if not file.is_file() or file.stat().st_size != shard["num_samples"] * INDEX_ROW.itemsize:
        raise DataError(
            f"data {file}", "the index is missing or not the one of the manifest",
            hint=f"Run `raev2 data verify {dir}`.",
        )  # fmt: skip
    return np.fromfile(file, dtype=INDEX_ROW)


def collection_fingerprint(sources: Mapping[str, str]) -> str:
    """Hash of the fingerprints of several sources by name."""
    return fingerprint(dict(sources), [])


# Parts of the above.


class _Progress:
    """The finished shards of a build, one line each, so that the same build can go on after an interruption."""

    def __init__(self, file: Path, same: Mapping[str, Any]) -> None:
        self.file, self.same, self.lines = file, same, list[dict[str, Any]]()
        self.rejects: list[str] = []
        self._num_written_rejects = 0
        if file.is_file():
            head, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            if head != same:
                hint = "Delete the folder, or build it with the options that it was begun with."
                raise DataError(f"data {file.parent}", "an unfinished build with other options", hint=hint)
            self.lines = lines
            self.rejects = [reject for line in lines for reject in line["rejects"]]
            self._num_written_rejects = len(self.rejects)

    def shards(self, split: str) -> list[dict[str, Any]]:
        """Manifest entries of the finished shards of a split."""
        return [line["shard"] for line in self.lines if line["split"] == split]

    def num_taken(self, split: str) -> int:
        """How many examples of a split the finished shards have used up, rejected ones included."""
        return max((line["num_taken"] for line in self.lines if line["split"] == split), default=0)

    def add(self, split: str, shard: Mapping[str, Any], num_taken: int, scan: Scan) -> None:
        """Note a finished shard."""
        sizes = np.unique(np.stack([scan.rows["width_px"], scan.rows["height_px"]], axis=1), axis=0)
        line = {
            "split": split, "shard": shard, "num_taken": num_taken, "sizes_px": sizes.tolist(),
            "kinds": scan.caption_kinds, "rejects": self.rejects[self._num_written_rejects :],
        }  # fmt: skip
        self._num_written_rejects = len(self.rejects)
        self.lines.append(json.loads(json.dumps(line)))
        with self.file.open("a", encoding="utf-8") as file:
            file.write((json_line(self.same) if len(self.lines) == 1 else "") + json_line(line))
            file.flush()
            os.fsync(file.fileno())

    @property
    def kinds(self) -> Counter[str]:
        return sum((Counter(line["kinds"]) for line in self.lines), Counter[str]())

    @property
    def sizes_px(self) -> set[tuple[int, int]]:
        return {(width, height) for line in self.lines for width, height in line["sizes_px"]}


@dataclass(frozen=True)
class _Packed:
    """An example ready for the tar; its key is not known yet. `place` counts examples from 1, with rejected ones."""

    place: int
    suffix: str
    image: bytes
    fields: dict[str, Any]


def _packed(
    examples: Iterable[Example | Deferred], pack: Callable[..., _Packed], rejects: list[str]
) -> Iterator[_Packed]:
    """The examples in order, read and encoded by a few threads, at most 64 ahead; bad ones go to `rejects`."""
    waiting: deque[tuple[str, Future[_Packed]]] = deque()

    def finish() -> Iterator[_Packed]:
        source, future = waiting.popleft()
        try:
            yield future.result()
        except (DataError, OSError, ValueError) as error:
            stop_if_machine(error)
            kind = error.kind if isinstance(error, BadSample) else type(error).__name__
            rejects.append(json_line({"path": source, "reason": f"{kind}: {error}"}))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for place, example in enumerate(examples, start=1):
                name = example.source if isinstance(example, Deferred) else example.key_hint
                waiting.append((name, pool.submit(pack, place, example)))
                if len(waiting) == 64:
                    yield from finish()
            while waiting:
                yield from finish()
        finally:
            for _, future in waiting:
                future.cancel()


def _pack(place: int, example: Example | Deferred, *, source: str, image_format: str) -> _Packed:
    if isinstance(example, Deferred):
        example = example.read()
    where = f"sample {example.key_hint}"
    captions = [replace(caption, text=" ".join(caption.text.split())) for caption in example.captions]
    if not captions or not captions[0].text:
        raise BadSample("bad_caption", where, "the default caption is missing or empty")
    reserved = RESERVED & set(example.extra)
    if reserved:
        raise DataError(where, "extra field has a reserved name", got=sorted(reserved)[0])
    suffix, data, (width, height) = _image_of(example.image, image_format, where)
    fields = {
        "v": SCHEMA_VERSION, "source": source, "source_id": example.key_hint, "width": width, "height": height,
        "captions": [caption.as_json() for caption in captions if caption.text], "default": 0,
        "sha256": hashlib.sha256(data).hexdigest(), **example.extra,
    }  # fmt: skip
    return _Packed(place, suffix, data, fields)


def _image_of(image: bytes | Image.Image, image_format: str, where: str) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, file and size of an image; a file that is plain RGB is kept as it is."""
    if isinstance(image, bytes):
        picture = read_sample_picture(image, where)
        if picture.plain and picture.format in KEPT_FORMATS:
            return KEPT_FORMATS[picture.format], image, picture.rgb.size
        rgb = picture.rgb
    else:
        rgb = to_rgb(image, where)
    return image_format, encode_image(rgb, image_format), rgb.size


def _write_tar(file: Path, prefix: str, samples: Iterator[_Packed]) -> int:
    """Write one shard through a temporary file; return the place of its last sample."""
    with new_file(file) as partial, partial.open("wb") as handle:
        with tarfile.open(fileobj=handle, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, sample in enumerate(samples):
                key = f"{prefix}_{row:05d}"
                members = {
                    sample.suffix: sample.image,
                    "txt": sample.fields["captions"][0]["text"].encode(errors="replace"),
                    "json": json.dumps({"key": key, **sample.fields}, ensure_ascii=False).encode(errors="replace"),
                }
                for suffix, data in sorted(members.items()):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mode = len(data), 0o644
                    tar.addfile(info, io.BytesIO(data))
        handle.flush()
        os.fsync(handle.fileno())
    return sample.place


def write_index(file: Path, rows: np.ndarray) -> Path:
    """Write index rows through a temporary file; return the file."""
    with new_file(file) as partial:
        partial.write_bytes(rows.tobytes())
    return file


def shard_entry(out: Path, file: Path, index: Path, num_samples: int, digest: str | None = None) -> dict[str, Any]:
    """What the manifest says about a tar and its index."""
    inside = file.is_relative_to(out)
    return {
        "file": str(file.relative_to(out) if inside else file.resolve()),
        "index": str(index.relative_to(out)),
        "num_samples": num_samples,
        "bytes": file.stat().st_size,
        "sha256": digest or file_sha256(file),
        "index_sha256": file_sha256(index),
    }


def write_manifest(
    out: Path, *, name: str, recipe: str, options: Mapping[str, Any], licence: str, attribution: str,
    sizes_px: set[tuple[int, int]], entries: dict[str, Any], kinds: Counter[str], rejects: Sequence[str],
    rule: ScanRule,
) -> dict[str, Any]:  # fmt: skip
    """Write the manifest of a source folder and its list of rejects; return the manifest."""
    if rejects:
        write_text(out / REJECTS, "".join(rejects))
    reasons = Counter(json.loads(line)["reason"].partition(":")[0] for line in rejects)
    if reasons:
        text = ", ".join(f"{kind} {count:,}" for kind, count in sorted(reasons.items()))
        logger.info("left out, see %s: %s", REJECTS, text)
    manifest = {
        "format_version": FORMAT_VERSION,
        "format": FORMAT,
        "name": name,
        "recipe": recipe,
        "options": dict(options),
        "licence": licence,
        "attribution": attribution,
        "image_size_px": list(*sizes_px) if len(sizes_px) == 1 else None,
        "classes": [],
        "caption_kind": rule.caption_kind,
        "caption_fields": [list(field) for field in rule.caption_fields],
        "shape": None if math.isinf(rule.shape.max_aspect) else asdict(rule.shape),
        "caption_kinds": dict(sorted(kinds.items())),
        "splits": entries,
        "fingerprint": _fingerprint(entries),
        "rejected": len(rejects),
        "rejected_kinds": dict(sorted(reasons.items())),
    }
    write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _verify_files(dir: Path, shards: Sequence[Mapping[str, Any]], hint: str) -> None:
    """DataError for the first tar or index that is missing or has another SHA-256; hashed in several threads."""
    expected = [(s["file"], s["sha256"]) for s in shards] + [(s["index"], s["index_sha256"]) for s in shards]
    files = list(dict(expected))
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # hashing holds no lock of the interpreter
    try:
        found = pool.map(lambda name: file_sha256(dir / name) if (dir / name).is_file() else "", files)
        digests = dict(zip(files, found, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    for name, digest in expected:
        if not digests[name]:
            raise DataError(f"data {dir / name}", "file is missing", hint=hint)
        if digests[name] != digest:
            raise DataError(f"data {dir / name}", "SHA-256 differs", got=digests[name], expected=digest, hint=hint)


def _num_long(dir: Path, shard: Mapping[str, Any]) -> int:
    """Samples of a shard that are too long for training, by its index."""
    sides = np.sort(np.stack([(rows := read_index(dir, shard))["width_px"], rows["height_px"]]).astype(int), axis=0)
    return int((sides[1] > MAX_ASPECT * sides[0]).sum())


def _fingerprint(splits: Mapping[str, Any]) -> str:
    """Hash over the content of all shards and indices; where a tar lies does not count."""
    content = {
        split: [[Path(s["file"]).name, s["num_samples"], s["sha256"], s["index_sha256"]] for s in entry["shards"]]
        for split, entry in splits.items()
    }
    return fingerprint(content, [])


def _common(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None


def json_line(value: Mapping[str, Any]) -> str:
    """A line of a JSON-lines file; bytes of names that are no UTF-8 become question marks."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace").decode() + "\n"
