"""Training checkpoints: complete or absent, verified when read, without pickle.

    checkpoints/000012800/   model.safetensors  ema-0.9995.safetensors  optimizer.safetensors  state.json  MANIFEST.json

A checkpoint is written beside its final place, brought to the disk and renamed. `MANIFEST.json` holds the SHA-256 of
every file; a checkpoint that does not match it (killed machine, full disk), or has values that are not finite, is
skipped with a warning and the one before is used.
No RNG state is stored: every random number of a step is a function of (seed, images seen).
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.files.artefact import write_json
from raev2.files.damage import read_json
from raev2.files.hashes import file_sha256
from raev2.files.replace import CHECKPOINT, new_folder
from raev2.training.ema import mix
from raev2.training.parallel import local, shard_like

logger = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
MAX_MISSED = 0.1  # of an average that is mixed from others


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file stem ('model', 'ema-0.9995', 'optimizer', ...) and the plain values of `state.json`."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    path: Path | None = None


def save_checkpoint(folder: Path, images: int, checkpoint: Checkpoint, keep: int, best: int | None = None) -> Path:
    """Write `folder/<images>` atomically; with it, the newest `keep` are kept, and the one of `best` images.

    Later ones go: training went back behind them, because they are damaged or led nowhere.
    """
    path = folder / f"{images:09d}"
    with new_folder(path, CHECKPOINT) as partial:
        for stem, tensors in checkpoint.tensors.items():
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                partial / f"{stem}.safetensors",
            )
        write_json(partial / "state.json", {"images": images, **checkpoint.state})
        write_json(partial / MANIFEST, {file.name: file_sha256(file) for file in sorted(partial.iterdir())})
    found = list_checkpoints(folder)
    newest = found.index(path) + 1
    for other in (*found[: max(newest - keep, 0)], *found[newest:]):
        if int(other.name) != best:
            shutil.rmtree(other)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first: by number, names of a billion images are longer."""
    found = [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is nan or infinite: one fused reduction and one synchronisation a device."""
    floats = [own for value in tensors if value.is_floating_point() and (own := local(value.detach())).numel()]
    for device in {tensor.device for tensor in floats}:
        largest = torch._foreach_norm([tensor for tensor in floats if tensor.device == device], math.inf)
        if not torch.stack([value.float() for value in largest]).isfinite().all():
            return False
    return True


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact, or None."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("skipped: %s", error)
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and compare every file with its manifest."""
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        raise CheckpointError(str(path), f"not a checkpoint, {MANIFEST} is missing", expected="checkpoints/<images>")
    manifest = read_json(manifest_file)
    for name, expected in manifest.items():
        file = path / name
        got = file_sha256(file) if file.is_file() else "no file"
        if got != expected:
            hint = "Use an earlier checkpoint."
            raise CheckpointError(
                str(file), "damaged", got=got[:12], expected=f"SHA-256 {str(expected)[:12]}", hint=hint
            )
    tensors = {file.stem: load_file(file) for file in path.iterdir() if file.suffix == ".safetensors"}
    if not all_finite(value for part in tensors.values() for value in part.values()):
        raise CheckpointError(str(path), "holds values that are not finite", hint="Use an earlier checkpoint.")
    return Checkpoint(tensors, state=read_json(path / "state.json"), path=path)


def averaged_weights(folder: Path, decay: float, batch_size: int) -> dict[str, Tensor]:
    """Average of this decay at the newest checkpoint; where none was kept, mixed from those of all checkpoints.

    Raises CheckpointError where mixing misses more than `MAX_MISSED` of it.
    """
    files = [file for path in list_checkpoints(folder) for file in sorted(path.glob("ema-*.safetensors"))]
    kept = {file: (float(file.stem.removeprefix("ema-")), int(file.parent.name) // batch_size) for file in files}
    newest = max((updates for _, updates in kept.values()), default=0)
    kept = {file: one for file, one in kept.items() if one == (decay, newest)} or kept
    shares, missed = mix(decay, newest, [*kept.values()]) if kept else ((), 1.0)
    if not (0 <= decay < 1 and missed <= MAX_MISSED):
        raise CheckpointError(
            str(folder), "no averaged weights of this decay, and none to mix it from", got=decay,
            expected=f"near {', '.join(sorted({file.stem.removeprefix('ema-') for file in kept})) or 'none'}",
            hint="generator_training.ema_decays says which ones a run keeps.",
        )  # fmt: skip
    total: dict[str, Tensor] = {}
    for file, share in zip(kept, shares, strict=True):
        for name, tensor in load_checkpoint(file.parent).tensors[file.stem].items():
            total[name] = total.get(name, 0) + float(share) * tensor
    return total


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Optimizer state as named tensors, e.g. 'blocks.0.mlp.w3.weight/exp_avg'. Hyper-parameters come from the spec."""
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        if name not in by_name:
            raise CheckpointError("optimizer state", f"names a parameter that the model has not: {name}")
        parameter = by_name[name]
        value = value.to(parameter.device)
        optimizer.state[parameter][field] = shard_like(value, parameter) if value.shape == parameter.shape else value
