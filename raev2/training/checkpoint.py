"""Training checkpoints: complete or absent, verified when read, without pickle.

    checkpoints/000012800/   model.safetensors  ema-0.9995.safetensors  optimizer.safetensors  state.json  MANIFEST.json

A checkpoint is written beside its final place and renamed. `MANIFEST.json` holds the SHA-256 of every file; a
checkpoint that does not match it (killed machine, full disk) is skipped with a warning and the one before is used.
No RNG state is stored: every random number of a step is a function of (seed, images seen).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.files.artefact import write_json
from raev2.files.hashes import file_sha256

logger = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file stem ('model', 'ema-0.9995', 'optimizer', ...) and the plain values of `state.json`."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    path: Path | None = None


def save_checkpoint(folder: Path, images: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/<images>` atomically, then delete all but the newest `keep` checkpoints."""
    path = folder / f"{images:09d}"
    partial = folder / f".{images:09d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for stem, tensors in checkpoint.tensors.items():
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                partial / f"{stem}.safetensors",
            )
        write_json(partial / "state.json", {"images": images, **checkpoint.state})
        write_json(partial / MANIFEST, {file.name: file_sha256(file) for file in sorted(partial.iterdir())})
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # the latter is a full disk too
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            str(path), "could not be saved", got=str(error), hint="Earlier checkpoints are untouched; free some space."
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []


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
    try:
        manifest = json.loads(manifest_file.read_text())
    except ValueError as error:
        raise CheckpointError(str(manifest_file), "damaged, not JSON", hint="Use an earlier checkpoint.") from error
    for name, expected in manifest.items():
        file = path / name
        got = file_sha256(file) if file.is_file() else "no file"
        if got != expected:
            raise CheckpointError(
                str(file),
                "damaged",
                got=got[:12],
                expected=f"SHA-256 {expected[:12]}",
                hint="Use an earlier checkpoint.",
            )
    tensors = {file.stem if file.suffix == ".safetensors" else "": file for file in path.iterdir()}
    return Checkpoint(
        tensors={stem: load_file(file) for stem, file in tensors.items() if stem},
        state=json.loads((path / "state.json").read_text()),
        path=path,
    )


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
        # the step count stays on the CPU, as torch's own optimizers keep it
        optimizer.state[parameter][field] = value if value.ndim == 0 else value.to(parameter.device)
