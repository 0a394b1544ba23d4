"""Tar shards that can only be read from the front: at http, s3 or `pipe:` addresses, by the webdataset library.

The order is a function of the seeds, and every process gets as many batches as it asks for, so none waits for another.
The passes over the shards, each in a permutation of its own, are one endless row of shards, which the readers take in
turn. A resumed run goes on in that row at the shard that the stopped one had reached, by the mean number of samples a
shard. What a stream cannot do: coverage exactly once a pass, exact shares of sources, and resume at the same sample.
Prefer reader.py where the files can be opened.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from raev2.batch import Cond
from raev2.data import ImageDataset, derived_seed
from raev2.errors import DataError
from raev2.files.damage import stop_if_machine
from raev2.training import dist
from raev2_tasks.splits import split_in_name
from raev2_tasks.t2i.shards.reader import PREPARATION, BadSamples, Tokenize, decode_image, permutation, uniforms
from raev2_tasks.t2i.shards.tar_scan import MAX_ASPECT, MIN_SIDE, ShapeRule, image_suffix
from raev2_tasks.t2i.text.captions import UNLABELLED_KIND, BadSample, CaptionFields, CaptionRule, parse_captions

logger = logging.getLogger(__name__)
S3_READER = "pipe:aws s3 cp "


class StreamedDataset(ImageDataset):
    """The training split as a stream of shards. It can be trained on, and not be read by number.

    Every pass shuffles the whole list of shards; processes and their workers take them in turn, and each worker mixes
    its samples in a buffer. Shards whose name says val or test are left out.

    urls            paths, or addresses at http(s):// or s3:// (read by `aws s3 cp`); with braces:
                    'https://host/data/{000000..000127}.tar'
    num_samples     how many samples there are, by whoever published them; says where a resumed run goes on
    batch_size      global batch of the training; tells a worker where the run started
    caption_kind    of captions whose files do not say it
    caption_fields  which fields hold captions, see `parse_captions`
    allow_pipe      take addresses that begin with `pipe:` and are commands of the shell
    shuffle_buffer  encoded samples that each worker mixes
    rank            of this process; None: of torch.distributed
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        image_size: tuple[int, int],
        *,
        num_samples: int,
        batch_size: int,
        licence: str,
        attribution: str = "",
        caption_mix: Mapping[str, float] | CaptionRule | None = None,
        caption_kind: str = UNLABELLED_KIND,
        caption_fields: CaptionFields = (),
        allow_pipe: bool = False,
        tokenize: Tokenize | None = None,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        min_side: float = MIN_SIDE,
        max_aspect: float = MAX_ASPECT,
        max_bad_share: float = 0.01,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        urls = [urls] if isinstance(urls, str) else urls
        listed = [url for item in urls for url in _expanded(item)]
        self.urls = [_readable(url, allow_pipe) for url in _for_training(listed)]
        self.dir, self.split, self.image_size = Path("stream"), "train", image_size
        self.rank = dist.rank() if rank is None else rank
        self.world_size = dist.world_size() if world_size is None else world_size
        if len(self.urls) < self.world_size:
            raise _too_few(len(self.urls), self.world_size, 1)
        self.num_samples, self.caption_kind, self.tokenize, self.seed = num_samples, caption_kind, tokenize, seed
        self.batch_size = batch_size
        self.rule = caption_mix if isinstance(caption_mix, CaptionRule) else CaptionRule(caption_mix)
        self.caption_fields = self.rule.reading(caption_fields, caption_kind)
        self.shuffle_buffer = shuffle_buffer
        self.shape = ShapeRule.of(image_size, min_side, max_aspect)
        self.bad = BadSamples(self.dir, max_bad_share)
        self.manifest = {
            "name": "stream", "licence": licence, "attribution": attribution, "classes": [],
            "fingerprint": hashlib.sha256("\n".join(self.urls).encode()).hexdigest(),
        }  # fmt: skip
        self._samples: Iterator[dict[str, Any]] | None = None
        self._failure: DataError | None = None  # what ended the stream

    def __len__(self) -> int:
        return self.num_samples

    @property
    def preparation(self) -> str:
        """That of `decode_image`."""
        return PREPARATION

    def image(self, index: int) -> Tensor:
        """Not possible: DataError."""
        raise DataError(
            "data stream", "a stream cannot be read by number",
            hint="Download the shards and index them with `raev2 t2i shards index DIR`.",
        )  # fmt: skip

    def cond(self, index: int) -> dict[str, Any]:
        """Not possible: DataError."""
        self.image(index)
        raise AssertionError

    def collate_cond(self, conds: Sequence[Mapping[str, Any]]) -> Cond:
        """What `tokenize` makes of the captions."""
        return {} if self.tokenize is None else self.tokenize([cond["caption"] for cond in conds])

    def stream_sample(self, seed: int, number: int, skip: int = 0) -> dict[str, Any]:
        """The next sample of this worker's stream; `number` starts the stream, draws the caption, and is the key."""
        self.bad.drawn(number)
        sample = self._next(seed, number)
        where = f"data {sample['__url__']}: {sample['__key__']}"
        try:
            members = [name for name in sample if not name.startswith("__")]
            image = sample[image_suffix(where, members, sample.__getitem__)]
            pixels, converted = decode_image(image, self.image_size, where, self.shape)
            captions = parse_captions(sample.get("txt"), sample.get("json"), self.caption_kind, self.caption_fields)
            caption = self.rule.choose(captions, uniforms(4, "caption", self.seed, number), where)
        except BadSample as error:
            self.bad.skipped(error, number, sample["__url__"], max(2 * self.num_samples // len(self.urls), 1))
            raise
        if converted:
            self.bad.count("converted")
        return {"image": pixels, "cond": {"caption": caption.text}, "key": number}

    def skipped(self, error: DataError) -> None:
        """Name a sample that was passed over in the log, not too often; anything but a bad sample ends the training."""
        if not isinstance(error, BadSample):
            raise error
        self.bad.report(error)

    def first_shard(self, start: int) -> int:
        """Place in the endless row of shards at which a run begins that has seen `start` samples."""
        return start * len(self.urls) // self.num_samples

    def _next(self, seed: int, number: int) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure
        try:
            if self._samples is None:
                self._samples = self._read(seed, number)
            return next(self._samples)
        except DataError as error:
            self._failure = error
            raise

    def _read(self, seed: int, number: int) -> Iterator[dict[str, Any]]:
        """Samples of this worker as bytes by suffix, endless; `number` is the first one that it is asked for."""
        worker = get_worker_info()
        place, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        start = number - self.rank - place * self.batch_size  # the same in all workers: they get batches in turn
        if len(self.urls) < self.world_size * num_workers:
            raise _too_few(len(self.urls), self.world_size, num_workers)
        reader, num_readers = self.rank * num_workers + place, self.world_size * num_workers
        if any(url.startswith(S3_READER) for url in self.urls) and shutil.which("aws") is None:
            raise DataError("data stream", "s3 addresses are read by the command aws, which is not installed")
        found = 0

        def shards() -> Iterator[dict[str, str]]:
            position, num_empty, before = self.first_shard(start) + reader, 0, -1
            while num_empty <= len(self.urls):  # a pass without any sample would go on for ever
                num_empty = num_empty + 1 if found == before else 0
                before = found
                epoch, place = divmod(position, len(self.urls))
                yield {"url": self.urls[permutation(len(self.urls), "stream", seed, epoch)[place]]}
                position += num_readers
            raise DataError("data stream", "no sample in a whole pass over the shards", got=f"first: {self.urls[0]}")

        def counted(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            nonlocal found
            for sample in samples:
                found += 1
                yield sample

        webdataset = _webdataset()
        rng = random.Random(derived_seed("buffer", seed, start, self.rank, place))
        buffer = self.shuffle_buffer
        return iter(
            webdataset.DataPipeline(
                shards, webdataset.tarfile_to_samples(handler=self._bad_tar), counted,
                webdataset.shuffle(buffer, initial=buffer // 2, rng=rng),
            )
        )  # fmt: skip

    def _bad_tar(self, error: Exception) -> bool:
        """For webdataset: count and name what cannot be read, and go on with the next shard."""
        stop_if_machine(error)
        text = "; ".join(str(part) for part in error.args if isinstance(part, str))
        bad = BadSample("bad_tar", "data stream", "a shard cannot be read to its end", got=text or repr(error))
        self.bad.count(bad.kind)
        self.bad.report(bad)
        return True


def _too_few(num_shards: int, world_size: int, num_workers: int) -> DataError:
    return DataError(
        "data stream", "fewer shards than readers", got=f"{num_shards} shards",
        expected=f"at least {world_size} processes x {num_workers} workers = {world_size * num_workers}",
        hint="Use fewer workers, make smaller shards, or read local files by index, which needs no such number.",
    )  # fmt: skip


def _expanded(url: str) -> list[str]:
    """The addresses that braces stand for; a command is one."""
    return [url] if url.startswith("pipe:") else list(_webdataset().shardlists.expand_urls(url))


def _for_training(urls: Sequence[str]) -> list[str]:
    """The addresses whose file name does not say val or test."""
    kept = [url for url in urls if split_in_name([url.rpartition("/")[2]], f"data {url}") in (None, "train")]
    if not kept:
        got = urls[0] if urls else "no address"
        raise DataError("data stream", "no shard is left for training", got=got, expected="names without val or test")
    if len(kept) < len(urls):
        logger.warning("stream: %d shards named for validation or test are left out", len(urls) - len(kept))
    return kept


def _readable(url: str, allow_pipe: bool) -> str:
    """The address as webdataset opens it; it knows no s3. DataError for one that cannot or must not be read."""
    scheme, separator, rest = url.partition(":")
    if scheme == "pipe" and not allow_pipe:
        raise DataError(
            "data stream", "an address that is a command of the shell", got=url, expected="an address or a path",
            hint="Set allow_pipe (task.stream.allow_pipe=true) if you trust it.",
        )  # fmt: skip
    if separator and rest.startswith("//") and scheme not in ("http", "https", "s3", "file"):
        expected = "http, https, s3 or a path"
        hint = "Other ones work through a command: pipe:COMMAND, with allow_pipe."
        raise DataError("data stream", "unknown kind of address", got=url, expected=expected, hint=hint)
    if scheme in ("http", "https") and re.search(r"[\s'\"]", url):
        raise DataError(
            "data stream", "an address with spaces or quotes", got=url, hint="Write them as %20, %27 and %22."
        )
    if scheme != "s3":
        return url
    return f"{S3_READER}{shlex.quote(url)} -"


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        hint = "Install it: pip install 'raev2[t2i]'"
        raise DataError("data stream", "reading streams needs the package webdataset", hint=hint) from error
    return webdataset
