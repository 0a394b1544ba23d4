"""Image-text shards -> samples, read by offset. The order is a function of (seed, sample number), nothing is stored.

Training draws samples numbered 0, 1, 2, ... Number n is slot `n mod B` of global batch `n div B`. Each batch holds an
exact share of every source (`Mix`), so the position inside a source is a closed form too. A pass over a source visits
its shards in a new permutation, in groups of 16, and the samples of a group in a permutation over the whole group: good
mixing with 16 open files, however few shards there are. Processes and workers own no shards, so any number of them
reads the same batches.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from tarfile import TarError, TarInfo
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from raev2.batch import Cond
from raev2.data import ImageDataset, derived_seed
from raev2.errors import DataError, SpecError
from raev2.files.damage import stop_if_machine
from raev2.files.images import CENTRE_CROP, centre_crop
from raev2.files.manifest import read_manifest
from raev2_tasks.t2i.shards.files import (
    collection_fingerprint,
    manifest_rule,
    read_index,
    source_folders,
    source_manifest,
)
from raev2_tasks.t2i.shards.pixels import read_sample_picture
from raev2_tasks.t2i.shards.tar_scan import MAX_ASPECT, MIN_SIDE, ShapeRule
from raev2_tasks.t2i.text.captions import BadSample, Caption, CaptionRule, json_fields, parse_captions

logger = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]

SHARDS_PER_GROUP = 16  # what is permuted together
PREPARATION = f"upright RGB, transparency on white; {CENTRE_CROP}"  # by `decode_image`
RETRY_AFTER_S = (0.5, 2.0, 8.0)
MAX_OPEN_SHARDS = 64  # of a source: open tars, and indices in memory
BAD_KINDS = ("bad_tar", "dotted_key", "bad_image", "bad_geometry", "bad_caption", "io_error", "converted")
WINDOW, MIN_WINDOW = 10_000, 1_000  # samples over which the share of unusable ones is taken
REPORT_EVERY_S = 60.0
MAX_WORKERS = 64  # rows of the shared counters


class TextImageDataset(ImageDataset):
    """One split of a source or collection of image-text shards.

    By number, training samples stand source after source. Those of other splits alternate between the sources, so that
    the first so many of them are a fair part.

    weights        share of each source in a batch, by name; 0 leaves a source out. None: by size
    batch_size     global batch of the training, in which the shares are exact; needed for training only
    caption_mix    which caption a training step sees: weights by kind, or a whole `CaptionRule`. None: the default
                   caption, which is also what evaluation sees
    tokenize       captions -> tensors with the batch as leading axis, right-padded to the longest; None: no conditions
    seed           of the choice of captions; the order has the seed that the training passes
    cache          keep decoded images in memory
    min_side       images with a shorter side below this share of the image size are left out
    max_aspect     images with a longer side than this many times the shorter one are left out
    max_bad_share  training ends with an error when more of the last 10,000 samples of a worker are unusable, or more
                   than half of a shard
    """

    group_kind = "sources"

    def __init__(
        self,
        dir: str | Path,
        split: str,
        image_size: tuple[int, int],
        *,
        weights: Mapping[str, float] | None = None,
        batch_size: int | None = None,
        caption_mix: Mapping[str, float] | CaptionRule | None = None,
        tokenize: Tokenize | None = None,
        seed: int = 0,
        cache: bool = False,
        min_side: float = MIN_SIDE,
        max_aspect: float = MAX_ASPECT,
        max_bad_share: float = 0.01,
    ) -> None:
        self.dir, self.split, self.image_size, self.seed = Path(dir), split, image_size, seed
        self.shape = ShapeRule.of(image_size, min_side, max_aspect)
        self.tokenize = tokenize
        self.rule = caption_mix if isinstance(caption_mix, CaptionRule) else CaptionRule(caption_mix)
        self.manifest = read_manifest(self.dir)
        self.sources = _open_sources(self.dir, self.manifest, split, weights)
        if "sources" in self.manifest and len(self.sources) < len(self.manifest["sources"]):
            used = {source.name: source.manifest["fingerprint"] for source in self.sources}
            self.manifest = {**self.manifest, "fingerprint": collection_fingerprint(used)}
        sizes = [len(source) for source in self.sources]
        self._starts = np.cumsum([0, *sizes])
        self._places = None if split == "train" else alternate(sizes)
        self._numbers = None if self._places is None else np.argsort(self._places)
        shares = {source.name: weights[source.name] if weights else len(source) for source in self.sources}
        self.mix = Mix(shares, batch_size or 1)
        if split == "train" and batch_size is not None:
            self.mix.check()
        self.bad = BadSamples(self.dir, max_bad_share)
        self._slots: tuple[tuple[int, int], np.ndarray] | None = None
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def preparation(self) -> str:
        """That of `decode_image`."""
        return PREPARATION

    def image(self, index: int) -> Tensor:
        """Image `index` as uint8 (3, H_px, W_px), prepared as `preparation` says."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        source, position = self._locate(index)
        where = f"data {source.where(position)}"
        pixels, converted = decode_image(source.read(position, "image"), self.image_size, where, self.shape)
        if converted:
            self.bad.count("converted")
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def cond(self, index: int) -> dict[str, Any]:
        """The default caption."""
        return {"caption": self.caption(index)}

    def collate_cond(self, conds: Sequence[Mapping[str, Any]]) -> Cond:
        """What `tokenize` makes of the captions."""
        return {} if self.tokenize is None else self.tokenize([cond["caption"] for cond in conds])

    def caption(self, index: int) -> str:
        """Default caption of sample `index`."""
        return self.captions(index)[0].text

    def captions(self, index: int) -> list[Caption]:
        """All captions of sample `index`, the default one first."""
        source, position = self._locate(index)
        row = source.row(position)
        text = source.read(position, "text") if row["text_bytes"] else None
        data = source.read(position, "json") if row["json_bytes"] else None
        try:
            kind = source.rule.caption_kind
            return parse_captions(text, data, kind, self.rule.reading(source.rule.caption_fields, kind))
        except BadSample as error:
            raise BadSample(error.kind, f"data {source.where(position)}", str(error)) from error

    def fields(self, index: int) -> dict[str, Any]:
        """The json member of sample `index`; empty where there is none."""
        source, position = self._locate(index)
        return json_fields(source.read(position, "json") if source.row(position)["json_bytes"] else None)

    def scene(self, index: int) -> dict[str, Any] | None:
        """Ground truth of a rendered picture (objects, boxes, colours), where the sample has it."""
        return self.fields(index).get("scene")

    def key(self, index: int) -> str:
        """Source and name of sample `index`."""
        source, position = self._locate(index)
        return f"{source.name}/{source.key(position)}"

    def group(self, index: int) -> Hashable:
        """The source."""
        return self.source_name(index)

    def key_name(self, index: int) -> str:
        """Name of sample `index` in its tar, unique in its shard."""
        source, position = self._locate(index)
        return source.key(position)

    def source_name(self, index: int) -> str:
        """Name of the source of sample `index`."""
        return self._locate(index)[0].name

    def stream_sample(self, seed: int, number: int, skip: int = 0) -> dict[str, Any]:
        """Sample `number` of the training stream, with a caption drawn by the caption rule.

        skip   how many unusable samples to pass over: the substitute is that many places further in the same pass
        """
        self.bad.drawn(number)
        index = self.stream_index(seed, number, skip)
        try:
            image = self.image(index)
            draws = uniforms(4, "caption", self.seed, number)
            caption = self.rule.choose(self.captions(index), draws, f"data {self.dir}: {self.key_name(index)}")
        except BadSample as error:
            source, position = self._locate(index)
            shard = source.shards[source.shard_of(position)]
            self.bad.skipped(error, index, str(source.dir / shard["file"]), shard["num_samples"])
            raise
        return {"image": image, "cond": {"caption": caption.text}, "key": index}

    def stream_index(self, seed: int, number: int, skip: int = 0) -> int:
        """Which sample is `number` in the training stream."""
        step, slot = divmod(number, self.mix.batch_size)
        if self._slots is None or self._slots[0] != (seed, step):
            self._slots = (seed, step), permutation(self.mix.batch_size, "slots", seed, step)
        which, count = self.mix.draw(step, int(self._slots[1][slot]))
        place = int(self._starts[which]) + self.sources[which].visit(seed, count, skip)
        return place if self._numbers is None else int(self._numbers[place])

    def skipped(self, error: DataError) -> None:
        """Name a sample that was passed over in the log, not too often; end the training when there are too many."""
        if isinstance(error, BadSample):
            self.bad.report(error)
        else:
            super().skipped(error)

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = index if self._places is None else int(self._places[index])
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[which], index - int(self._starts[which])


def alternate(sizes: Sequence[int]) -> np.ndarray:
    """All positions of a row of blocks of these sizes, so that every beginning has its share of every block."""
    places = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
    return np.argsort(places, kind="stable")


class Mix:
    """Exact shares of several sources in every global batch.

    With cumulative shares W_j and batch size B, sources 0..j have given C_j(T) = floor(B T W_j + 1/2) samples before
    step T. Then every batch is full, and no source is ever more than one sample away from its share.
    """

    def __init__(self, weights: Mapping[str, float], batch_size: int) -> None:
        total = sum(map(Fraction, weights.values()))
        shares = {name: Fraction(weight) / total for name, weight in weights.items()}
        self.shares, self.batch_size = shares, batch_size
        self._cumulative = [sum(list(shares.values())[: j + 1], Fraction()) for j in range(len(shares))]

    def check(self) -> None:
        """SpecError when a source gets less than one sample a batch, for which the shares cannot be exact."""
        for name, share in self.shares.items():
            if share * self.batch_size < 1:
                raise SpecError(
                    "weights", f"source {name} gets less than one sample a batch",
                    got=f"{float(share):.2g} of {self.batch_size}", expected="a share of at least 1 / batch_size",
                    hint="Raise its weight or the batch size, or leave the source out with weight 0.",
                )  # fmt: skip

    def given(self, step: int) -> list[int]:
        """How many samples each source has given before `step`."""
        ends = [
            (2 * self.batch_size * step * w.numerator + w.denominator) // (2 * w.denominator) for w in self._cumulative
        ]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def draw(self, step: int, slot: int) -> tuple[int, int]:
        """Source of a slot, and how many samples that source has given before it. Slots are in order of the sources."""
        for which, (before, after) in enumerate(zip(self.given(step), self.given(step + 1), strict=True)):
            if slot < after - before:
                return which, before + slot
            slot -= after - before
        raise AssertionError("slot outside the batch")


class Source:
    """One split of one source folder: rows of its indices, in the order of the shards, and reads by offset."""

    def __init__(self, dir: Path, split: str, manifest: Mapping[str, Any], name: str) -> None:
        self.dir, self.split, self.manifest, self.name = dir, split, manifest, name
        self.rule = manifest_rule(manifest)
        self.shards = manifest["splits"].get(split, {"shards": []})["shards"]
        self.ends = np.cumsum([shard["num_samples"] for shard in self.shards], dtype=np.int64)
        self._open()

    def _open(self) -> None:
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()  # by shard, least recently used first
        self._files: OrderedDict[int, int] = OrderedDict()  # descriptors
        self._pass: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None
        self._groups: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind when a worker gets the dataset."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def visit(self, seed: int, count: int, skip: int = 0) -> int:
        """Position of visit `count`, counted over all passes; with `skip`, that many places further in the pass."""
        epoch, place = divmod(count, len(self))
        place = (place + skip) % len(self)
        if self._pass is None or self._pass[0] != (seed, epoch):
            order = permutation(len(self.shards), "shards", seed, self.name, epoch)
            sizes = np.diff(self.ends, prepend=0)[order]
            group_ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, len(order), SHARDS_PER_GROUP)))
            self._pass = (seed, epoch), order, group_ends
        _, order, group_ends = self._pass
        group = int(np.searchsorted(group_ends, place, side="right"))
        key = seed, epoch, group
        if key not in self._groups:
            members = order[group * SHARDS_PER_GROUP : (group + 1) * SHARDS_PER_GROUP]
            starts = np.concatenate([[0], self.ends])
            positions = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in members])
            self._groups[key] = positions[permutation(len(positions), "group", seed, self.name, epoch, group)]
            if len(self._groups) > 2:
                self._groups.popitem(last=False)
        return int(self._groups[key][place - (int(group_ends[group - 1]) if group else 0)])

    def shard_of(self, position: int) -> int:
        """Which shard holds the sample at `position`."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def row(self, position: int) -> np.void:
        """Index row of the sample at `position`, of `tar_scan.INDEX_ROW`."""
        shard = self.shard_of(position)
        if shard not in self._rows:
            self._rows[shard] = read_index(self.dir, self.shards[shard])
            if len(self._rows) > MAX_OPEN_SHARDS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(shard)
        start = int(self.ends[shard - 1]) if shard else 0
        return self._rows[shard][position - start]

    def read(self, position: int, member: str) -> bytes:
        """Bytes of a member, 'image', 'text' or 'json'. An I/O error is tried again three times."""
        row, shard = self.row(position), self.shard_of(position)
        return self._read(shard, int(row[f"{member}_offset"]), int(row[f"{member}_bytes"]))

    def key(self, position: int) -> str:
        """Name of the sample, from the header of its image."""
        header = self._read(self.shard_of(position), int(self.row(position)["image_offset"]) - 512, 512)
        try:
            name = TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except TarError as error:
            raise BadSample("bad_tar", f"data {self.where(position)}", "no tar header before the image") from error
        folder, _, base = name.rpartition("/")
        stem = base.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    def where(self, position: int) -> str:
        """Shard and row of a sample, for messages."""
        shard = self.shard_of(position)
        start = int(self.ends[shard - 1]) if shard else 0
        return f"{self.dir / self.shards[shard]['file']}: sample {position - start}"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        file = self.dir / self.shards[shard]["file"]
        for pause_s in (*RETRY_AFTER_S, None):
            try:
                data = os.pread(self._descriptor(shard, file), size, offset)
                break
            except FileNotFoundError as error:
                raise BadSample("bad_tar", f"data {file}", "the shard is missing") from error
            except OSError as error:
                if (descriptor := self._files.pop(shard, None)) is not None:
                    os.close(descriptor)
                if pause_s is None:
                    stop_if_machine(error)
                    raise BadSample("io_error", f"data {file}", "cannot be read", got=error.strerror) from error
                time.sleep(pause_s)
        if len(data) != size:
            raise BadSample(
                "bad_tar", f"data {file}", "ends too early", got=f"{len(data)} bytes at {offset}, {size} expected",
                hint=f"Run `raev2 data verify {self.dir}`.",
            )  # fmt: skip
        return data

    def _descriptor(self, shard: int, file: Path) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(file, os.O_RDONLY)
            if len(self._files) > MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


class BadSamples:
    """Counts unusable samples by kind, over all workers, names them in the log, and says when there are too many."""

    def __init__(self, dir: Path, max_share: float) -> None:
        self.dir, self.max_share = dir, max_share
        self._counts = torch.zeros(MAX_WORKERS, len(BAD_KINDS), dtype=torch.int64).share_memory_()
        self._num_drawn, self._last_drawn = 0, -1
        self._bad_draws: deque[int] = deque()  # at which draw
        self._bad_rows: dict[str, set[int]] = {}  # by shard
        self._worst = ""  # what ends the training
        self._reported_s: dict[str, float] = {}
        self._unreported: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """How many samples were unusable, by kind; `converted` ones were used after a conversion to RGB."""
        return {kind: int(n) for kind, n in zip(BAD_KINDS, self._counts.sum(0), strict=True) if n}

    def count(self, kind: str) -> None:
        """Add one to a kind."""
        worker = get_worker_info()
        self._counts[worker.id % MAX_WORKERS if worker else 0, BAD_KINDS.index(kind)] += 1

    def drawn(self, number: int) -> None:
        """Note that sample `number` of the stream is asked for; substitutes for it are asked for by the same number."""
        if number != self._last_drawn:
            self._num_drawn, self._last_drawn = self._num_drawn + 1, number

    def skipped(self, error: BadSample, index: int, shard: str, shard_samples: int) -> None:
        """Count an unusable sample."""
        self.count(error.kind)
        self._bad_draws.append(self._num_drawn)
        rows = self._bad_rows.setdefault(shard, set())
        rows.add(index)
        if 2 * len(rows) > shard_samples:
            self._worst = f"{len(rows)} of the {shard_samples} samples of {shard}"

    def report(self, error: BadSample) -> None:
        """Name a skipped sample in the log, at most one of a kind every minute. Raises DataError for too many."""
        now = time.monotonic()
        self._unreported[error.kind] += 1
        if now - self._reported_s.get(error.kind, -np.inf) >= REPORT_EVERY_S:
            more = self._unreported[error.kind] - 1
            logger.warning(
                "skipped (%s%s): %s", error.kind, f", {more} more since the last line" if more else "", error
            )
            self._reported_s[error.kind], self._unreported[error.kind] = now, 0
        while self._bad_draws and self._bad_draws[0] <= self._num_drawn - WINDOW:
            self._bad_draws.popleft()
        window = min(self._num_drawn, WINDOW)
        if window >= MIN_WINDOW and len(self._bad_draws) > self.max_share * window:
            self._worst = f"{len(self._bad_draws)} of the last {window} samples"
        if self._worst:
            counts = ", ".join(f"{kind} {count}" for kind, count in self.counts.items())
            raise DataError(
                f"data {self.dir}", "too many unusable samples", got=f"{self._worst} ({counts})",
                expected=f"at most a share of {self.max_share} and half of a shard",
                hint=f"See which with `raev2 data verify {self.dir}`. The last one: {error}",
            )  # fmt: skip


def decode_image(data: bytes, size: tuple[int, int], where: str, shape: ShapeRule) -> tuple[Tensor, bool]:
    """An image file as uint8 (3, H_px, W_px), resized and cropped to `size`; and whether it had to be made RGB.

    BadSample for a damaged or truncated file (there is no switch to take what can be read of it), and for one that
    `shape` leaves out.
    """
    picture = read_sample_picture(data, where)
    shape.check(where, *picture.rgb.size)
    image = centre_crop(picture.rgb, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), not picture.plain


def permutation(n: int, *parts: object) -> np.ndarray:
    """Permutation of 0..n-1 that is a function of `parts`, the same with every version of numpy."""
    return np.argsort(np.random.Philox(key=derived_seed(*parts)).random_raw(n), kind="stable")


def uniforms(n: int, *parts: object) -> list[float]:
    """`n` numbers in [0, 1) that are a function of `parts`."""
    return [int(bits >> 11) / 2**53 for bits in np.random.Philox(key=derived_seed(*parts)).random_raw(n)]


def _open_sources(
    dir: Path, manifest: Mapping[str, Any], split: str, weights: Mapping[str, float] | None
) -> list[Source]:
    """The sources of a folder with a weight above 0; DataError when the split is unknown or empty."""
    if split not in manifest["splits"]:
        raise DataError(f"data {dir}", "unknown split", got=split, expected=f"one of {', '.join(manifest['splits'])}")
    sources = [Source(folder, split, source_manifest(folder), name) for name, folder in source_folders(dir).items()]
    if weights is not None:
        names = [source.name for source in sources]
        wrong = sorted(set(weights) ^ set(names))
        if wrong:
            what = "no weight for" if wrong[0] in names else "weight for an unknown"
            raise SpecError(
                "weights", f"{what} source", got=wrong[0], expected=f"a weight for each of {', '.join(names)}",
                hint="0 leaves a source out.",
            )  # fmt: skip
        bad = [name for name, weight in weights.items() if not 0 <= weight < np.inf]
        if bad or not sum(weights.values()):
            raise SpecError("weights", "weights must be >= 0 and not all 0", got=dict(weights))
        sources = [source for source in sources if weights[source.name]]
    sources = [source for source in sources if len(source)]
    if not sources:
        raise DataError(f"data {dir}", f"split {split} is empty", hint="Build it again with samples for it.")
    return sources
