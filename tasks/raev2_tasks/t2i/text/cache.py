"""Encoded captions on disk, for frozen encoders that cost more than reading: large ones, or small sets seen often.

An entry belongs to a row of token ids, so equal captions share one, whatever image they describe. Files of a cache::

    cache.json    fingerprint of the encoder, width, number type, counts
    index.npz     keys (n, 2) uint64: hash of the token ids; ends (n,) int64: rows of tokens up to the end of entry i
    rows.bin      (tokens, width), one row a token, no padding
    scales.bin    only for int8: (tokens,) float16, the value of 127 of a row
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raev2.errors import DataError, SpecError
from raev2.files.artefact import write_json
from raev2.files.replace import VERSION, Kind, new_folder
from raev2.training import dist
from raev2.training.lock import folder_lock
from raev2_tasks.t2i.text.encoder import ENCODE_ROWS, FrozenTextEncoder, TextTokenizer

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
CHUNK = 16 * (ENCODE_ROWS - 1)  # captions that are encoded together
CAPTIONS = Kind("cache.json", VERSION, r"cache\.json|index\.npz|(rows|scales)\.bin")
NUMBER_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}


class CaptionCache:
    """Outputs of a frozen text encoder, read from a folder; what is not in it is encoded now.

    num_hits, num_misses   rows found and rows encoded, so far
    """

    def __init__(self, dir: Path, encoder: FrozenTextEncoder) -> None:
        """Open a cache. DataError for a folder that is none, or that another encoder made."""
        self.encoder, self.dir = encoder, dir
        self.num_hits = self.num_misses = 0
        try:
            about = json.loads((dir / "cache.json").read_text(encoding="utf-8"))
            index = np.load(dir / "index.npz", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"caption cache {dir}", "cannot be read", got=str(error),
                hint="Write it with `raev2 t2i cache-captions`.",
            ) from error  # fmt: skip
        if about.get("fingerprint") != encoder.fingerprint:
            raise DataError(
                f"caption cache {dir}", "made by another text encoder, tokenizer or setting",
                got=str(about.get("fingerprint"))[:12], expected=encoder.fingerprint[:12],
                hint="Build it again with the settings of this run.",
            )  # fmt: skip
        self.ends = index["ends"]
        self.number = {row.tobytes(): i for i, row in enumerate(index["keys"])}
        num_tokens = about["num_tokens"]
        self.rows = _open_rows(dir / "rows.bin", NUMBER_TYPES[about["number_type"]], (num_tokens, encoder.width))
        quantised = about["number_type"] == "int8"
        self.scales = _open_rows(dir / "scales.bin", torch.float16, (num_tokens,)) if quantised else None

    def __call__(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Outputs (B, M, D) in float32, 0 where there is no token."""
        out = torch.zeros(*token_ids.shape, self.encoder.width)
        missing = []
        lengths = token_mask.sum(1).tolist()
        for row, (ids, length) in enumerate(zip(token_ids.cpu(), lengths, strict=True)):
            number = self.number.get(token_key(ids[:length].tolist()).tobytes())
            if number is None:
                missing.append(row)
                continue
            start, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
            values = self.rows[start:end].float()
            if self.scales is not None:
                values = values * (self.scales[start:end].float() / 127)[:, None]
            out[row, :length] = values
        self.num_hits += len(lengths) - len(missing)
        self.num_misses += len(missing)
        out = out.to(token_ids.device)
        if missing:
            out[missing] = self.encoder(token_ids[missing], token_mask[missing])
        return out


def token_key(ids: Sequence[int]) -> np.ndarray:
    """128-bit hash of token ids, as two numbers."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64)


def write_cache(
    captions: Iterator[str],
    encoder: FrozenTextEncoder,
    out: Path,
    number_type: str | None = None,
    announce: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Encode every different caption once and write the folder `out`; it is complete or absent.

    number_type   'int8' stores a row with its largest magnitude; None: the type in which the encoder computes
    announce      told the size before the work starts

    Raises DataError when the folder exists or the disk is too small.
    """
    number_type = number_type or _own_type(encoder)
    if out.exists():
        raise DataError(f"caption cache {out}", "exists already", hint="Delete it or choose another folder.")
    distinct = _distinct(captions, encoder.tokenizer)
    num_tokens = sum(len(ids) for ids in distinct.values())
    size = num_tokens * (encoder.width * NUMBER_TYPES[number_type].itemsize + (2 if number_type == "int8" else 0))
    announce(
        f"{len(distinct):,} different captions, {num_tokens:,} tokens x {encoder.width} in {number_type}: "
        f"{size / 2**20:,.1f} MiB"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise DataError(
            f"caption cache {out}", "the disk is too small", got=f"{free:,} bytes free", expected=f"{size:,}"
        )
    keys = sorted(distinct, key=lambda key: len(distinct[key]))  # rows of one forward are about as long as each other
    ends = np.cumsum([len(distinct[key]) for key in keys], dtype=np.int64)
    table = np.array([np.frombuffer(key, np.uint64) for key in keys], dtype=np.uint64).reshape(-1, 2)
    about = {
        "format_version": FORMAT_VERSION, "fingerprint": encoder.fingerprint, "width": encoder.width,
        "number_type": number_type, "num_captions": len(keys), "num_tokens": num_tokens,
    }  # fmt: skip
    with new_folder(out, CAPTIONS) as folder:
        _write_rows(folder, [distinct[key] for key in keys], encoder, number_type)
        np.savez(folder / "index.npz", keys=table, ends=ends)
        write_json(folder / "cache.json", about)
    return about


def _write_rows(folder: Path, rows: list[list[int]], encoder: FrozenTextEncoder, number_type: str) -> None:
    """rows.bin and, for int8, scales.bin: the outputs of all tokens of all rows, in that order."""
    with (folder / "rows.bin").open("wb") as file, (folder / "scales.bin").open("wb") as scales:
        for start in range(0, len(rows), CHUNK):
            values = _encode(rows[start : start + CHUNK], encoder)  # (tokens, D)
            if number_type == "int8":
                largest = values.abs().amax(1).clamp_min(1e-6).half()
                scales.write(largest.numpy().tobytes())
                values = (values / largest.float()[:, None] * 127).round().clamp(-127, 127)
            stored = values.to(NUMBER_TYPES[number_type]).contiguous()
            file.write(stored.view(torch.uint8).numpy().tobytes())
    if number_type != "int8":
        (folder / "scales.bin").unlink()


def _encode(rows: list[list[int]], encoder: FrozenTextEncoder) -> Tensor:
    """Outputs (tokens, D) of rows of token ids, without those of padding."""
    device = next(iter(encoder.state_dict().values())).device
    padded = [torch.tensor(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=encoder.tokenizer.pad_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return encoder(ids.to(device), mask.to(device)).cpu()[mask]


def _distinct(captions: Iterator[str], text_tokenizer: TextTokenizer) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for caption in captions:
        ids = text_tokenizer.cut(text_tokenizer.ids(caption))
        if ids:
            found.setdefault(token_key(ids).tobytes(), ids)
    if not found:
        raise DataError("caption cache", "no captions")
    return found


def _own_type(encoder: FrozenTextEncoder) -> str:
    dtype = next(value.dtype for value in encoder.state_dict().values() if value.is_floating_point())
    return next(name for name, type_ in NUMBER_TYPES.items() if type_ == dtype)


def _open_rows(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A file as a tensor that is read where it is indexed."""
    num = int(np.prod(shape))
    if not file.is_file() or file.stat().st_size != num * dtype.itemsize:
        raise DataError(f"caption cache {file}", "missing or not of the size that cache.json says")
    return torch.from_file(str(file), shared=False, size=num, dtype=dtype).view(shape)


def cache_captions(argv: Sequence[str]) -> None:
    """Encode all captions of a recipe's data with its frozen text encoder; set task.caption_cache to use them."""
    from raev2.pipeline import prepare_data
    from raev2.spec_io import apply_overrides
    from raev2.task import get_recipe, get_task
    from raev2_tasks.t2i.spec import task_spec
    from raev2_tasks.t2i.text.encoder import build_text_encoder

    parser = argparse.ArgumentParser("raev2 t2i cache-captions", description=cache_captions.__doc__)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--split", nargs="+", default=["train", "val"])
    parser.add_argument("--number-type", choices=("int8",), help="default: that of the encoder")
    parser.add_argument("--out", required=True, metavar="DIR")
    options = parser.parse_args(argv)
    task = get_task("t2i")
    spec = apply_overrides(get_recipe(task, options.recipe), options.overrides)
    text_encoder = task_spec(spec).text_encoder
    if text_encoder.kind == "scratch":
        raise SpecError(
            "spec.task.text_encoder.name", "this encoder is trained, its outputs change", got="scratch",
            expected="a frozen text encoder",
        )  # fmt: skip
    prepare_data(spec)
    datasets: list[Any] = [task.dataset(spec, split) for split in options.split]
    captions = (caption.text for data in datasets for i in range(len(data)) for caption in data.captions(i))
    encoder = build_text_encoder(text_encoder, dist.device())
    with folder_lock(Path(options.out)):
        write_cache(captions, encoder, Path(options.out), options.number_type, print)
    print(f"use it with --set task.caption_cache={options.out}")


COMMANDS = {"cache-captions": cache_captions}
