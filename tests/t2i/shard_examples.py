"""Small shards for the tests of the data side of t2i: pictures of noise whose captions say which one it is."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raev2.data import train_batches
from raev2_tasks.t2i.shards.files import Caption, Example, write_collection, write_shards

SIZE = (16, 16)


def picture(number: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Noise, different for every number; size is (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def examples(source: str, count: int, first: int = 0, size: tuple[int, int] = (16, 16)) -> list[Example]:
    return [
        Example(
            f"{source}-{n}", picture(n, size),
            [Caption(f"{source} {n}", "short"), Caption(f"{source} {n} at length. It has noise.", "long", "test", 0.5)],
            {"scene": {"number": n}, "license": "CC0-1.0"},
        )
        for n in range(first, first + count)
    ]  # fmt: skip


def write_source(
    out: Path, source: str, num_train: int, num_val: int = 4, per_shard: int = 7, size=(16, 16), **options
) -> dict:
    splits = {"train": examples(source, num_train, size=size), "val": examples(source, num_val, first=10_000)}
    options = {"licence": "CC0-1.0", "attribution": "Tests.", "recipe": "tar-shards", "options": {}, **options}
    return write_shards(out, source, splits, per_shard=per_shard, **options)


def write_two_sources(out: Path, num_a: int = 50, num_b: int = 23) -> Path:
    write_source(out / "a", "a", num_a)
    write_source(out / "b", "b", num_b, per_shard=5)
    write_collection(out, ["a", "b"], recipe="tar-shards", options={})
    return out


def write_tar(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar as others write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def pair(key: str, number: int, caption: str = "", suffix: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", file_of(picture(number))), (f"{key}.txt", (caption or f"picture {number}").encode())]


def tokenize(captions: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """Characters, right-padded to the longest caption."""
    longest = max(map(len, captions))
    ids = torch.tensor([[ord(c) for c in caption.ljust(longest, "\0")] for caption in captions])
    lengths = torch.tensor([len(caption) for caption in captions])
    return {"token_ids": ids, "token_mask": torch.arange(longest) < lengths[:, None]}


def texts(cond: Mapping[str, torch.Tensor]) -> list[str]:
    return [
        "".join(map(chr, row[mask].tolist()))
        for row, mask in zip(cond["token_ids"], cond["token_mask"], strict=True)
    ]  # fmt: skip


def stream(dataset, num_batches: int, **options) -> list[tuple[int, str]]:
    """(key, caption) of the first batches of one process."""
    batches = islice(train_batches(dataset, seed=0, **options), num_batches)
    return [item for batch, _ in batches for item in zip(batch.key.tolist(), texts(batch.cond), strict=True)]


@contextmanager
def no_more_files() -> Iterator[None]:
    """Inside, the system opens no file, as after too many; on Windows the test is skipped."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
