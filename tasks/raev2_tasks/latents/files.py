"""What `raev2 latents` writes: a file of statistics, and a `LatentFolder`, of which each process writes its files."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raev2.errors import CheckpointError, FileError, SpecError
from raev2.files.artefact import write_json
from raev2.files.damage import read_json
from raev2.files.latent_folder import ABOUT, SCALE, latent_file
from raev2.files.replace import new_file
from raev2.tokenizer.rae import RAE
from raev2.train_tokenizer import measure_stats
from raev2.training import dist
from raev2.training.lock import folder_lock
from raev2_tasks.latents.pictures import Source

logger = logging.getLogger(__name__)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
FILE_BYTES = 2**29


@dataclass(frozen=True)
class Format:
    """Number format, and whether latents of mirrored pictures are there too."""

    dtype: str
    mirrored: bool


def write_statistics(source: Source, out: Path) -> Path:
    """Latent statistics of the split as safetensors (mean, var; cov with `tokenizer.whiten`) with their identity."""
    if out.exists():
        raise SpecError("--out", "exists already", got=str(out), hint="Choose another file.")
    if not isinstance(source.tokenizer, RAE):
        kind = type(source.tokenizer).__name__
        raise SpecError("raev2 latents stats", "this tokenizer is normalised by its own configuration", got=kind)
    stats = measure_stats(source.tokenizer, source.dataset, source.device)
    identity = {"num_images": stats.num_images, "encoder": dict(stats.encoder), "data": stats.data}
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"mean": stats.mean, "var": stats.var} | ({} if stats.cov is None else {"cov": stats.cov})
    _save(out, tensors, {"stats": json.dumps(identity)})
    return out


def build(source: Source, out: Path, format: Format, workers: int) -> None:
    """Write what is missing of the folder `out`; every process makes its own files.

    Raises CheckpointError where `out` holds other latents, FileError without room for all of it, BusyError while
    another such command writes it.
    """
    with folder_lock(out):
        _build(source, out, format, workers)


def _build(source: Source, out: Path, format: Format, workers: int) -> None:
    samples_a_file = dist.on_main(lambda: _prepare(source, out, format))
    num_samples = len(source.dataset)
    for number in range(dist.rank(), math.ceil(num_samples / samples_a_file), dist.world_size()):
        file, start = latent_file(out, number), number * samples_a_file
        if not file.is_file():
            numbers = range(start, min(start + samples_a_file, num_samples))
            _save(file, _encode(source, numbers, format, workers), {})
            logger.info("%s: %s of %s latents", file, f"{numbers.stop:,}", f"{num_samples:,}")
    dist.barrier()


def _encode(source: Source, numbers: range, format: Format, workers: int) -> dict[str, Tensor]:
    names = {"latents": False, "mirrored": True} if format.mirrored else {"latents": False}
    stored: dict[str, Tensor] = {}
    for name, mirrored in names.items():
        parts = [_stored(name, part, format.dtype) for part in source.latents(numbers, workers, mirrored)]
        stored |= {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return stored


def _stored(name: str, latents: Tensor, dtype: str) -> dict[str, Tensor]:
    """Latents in a number format; int8 has one scale a sample and channel, so that its largest value is 127."""
    if dtype != "int8":
        return {name: latents.to(DTYPES[dtype])}
    scale = (latents.abs().amax((2, 3), keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return {name: (latents / scale).round().to(torch.int8), f"{name}{SCALE}": scale}


def _prepare(source: Source, out: Path, format: Format) -> int:
    """Say what will be written and see that it can be; the samples in each file."""
    shape, num_samples = source.tokenizer.latent_shape, len(source.dataset)
    sample_bytes = math.prod(shape) * DTYPES[format.dtype].itemsize + (4 * shape[0] if format.dtype == "int8" else 0)
    sample_bytes *= 2 if format.mirrored else 1
    samples_a_file, identity = max(1, FILE_BYTES // sample_bytes), source.tokenizer.identity()
    about = {
        "format_version": 1, "identity": source.dataset.latent_identity(identity), "dtype": format.dtype,
        "mirrored": format.mirrored, "shape": list(shape), "num_samples": num_samples, "samples_a_file": samples_a_file,
    }  # fmt: skip
    _check_same(out, about)
    there = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    total, free = (
        num_samples * sample_bytes,
        shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free,
    )
    logger.info(
        "%s latents of %s in %s: %s, %s of it there already, %s free", f"{num_samples:,}", " x ".join(map(str, shape)),
        format.dtype, *map(_size, (total, there, free)),
    )  # fmt: skip
    if total - there > free:
        hint = "Choose another disk for --out, or a smaller --dtype."
        raise FileError(
            str(out), "no room for the latents", got=f"{_size(free)} free", expected=_size(total - there), hint=hint
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / ABOUT, about)
    return samples_a_file


def _check_same(out: Path, about: Mapping[str, Any]) -> None:
    """Raise where `out` is there and is not the beginning of these latents."""
    if not out.exists() or not any(out.iterdir()):
        return
    old = read_json(out / ABOUT) if (out / ABOUT).is_file() else {}
    for name, value in about.items():
        if old.get(name) != value:
            hint = "Choose another folder."
            raise CheckpointError(
                str(out), f"there is something with another {name}", got=old.get(name), expected=str(value), hint=hint
            )


def _save(out: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all."""
    try:
        with new_file(out) as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise FileError(str(out), "could not be saved", got=str(error), hint="Free some space.") from error


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"
