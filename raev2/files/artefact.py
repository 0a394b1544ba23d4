"""Artefact folders: what users exchange. `config.json`, `model.safetensors` and a model card, never a pickle.

save_artefact(dir, kind="tokenizer", config={...}, tensors={...})
config, tensors, path = load_artefact(path_or_hub_id, kind="tokenizer")
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raev2.errors import CheckpointError
from raev2.files.assets import Asset
from raev2.files.card import card_text
from raev2.files.damage import read_json
from raev2.files.replace import ARTEFACT, new_folder, write_text

M = TypeVar("M", bound=nn.Module)
FORMAT_VERSION = 1
ENCODER = "encoder"  # folder with the encoder's weights, in tokenizers that bring their own
PIPELINE = "pipeline.json"  # what a folder with tokenizer and generator has at its top
_PART_FILES = ("config.json", "model.safetensors", f"{ENCODER}/*.json", f"{ENCODER}/*.safetensors")
HUB_FILES = (
    PIPELINE, "README.md", "samples.png", "eval/*.json",
    *(f"{part}{file}" for part in ("", "tokenizer/", "generator/") for file in _PART_FILES),
)  # fmt: skip


def save_artefact(
    path: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | Callable[[Path], None],
    card: str | None = None,
    encoder: Path | None = None,
) -> Path:
    """Write an artefact folder atomically: it is complete or it is not there. An older artefact there is replaced.

    kind      'tokenizer' or 'generator'; checked when loading
    tensors   saved contiguous, on the CPU, in their dtype; or a function that writes them to a safetensors file
    card      model card; None: what `card_text` makes of `config`
    encoder   folder that is copied into the artefact

    Raises FileError when `path` holds anything else than an artefact, or when it cannot be written.
    """
    path = Path(path)
    with new_folder(path, ARTEFACT) as partial:
        weights_file = partial / "model.safetensors"
        if callable(tensors):
            tensors(weights_file)
        else:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, weights_file)
        if encoder is not None:
            shutil.copytree(encoder, partial / ENCODER)
        described = {"format_version": FORMAT_VERSION, "kind": kind, **config}
        write_text(partial / "README.md", card_text(described) if card is None else card)
        write_json(partial / "config.json", described)
    return path


def load_artefact(path_or_hub_id: str | Path, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Read config and tensors of an artefact folder, or of a Hugging Face hub repository with the same layout.

    A hub id may name a branch, tag or commit: OWNER/NAME@REVISION. The folder returned is then named by its commit.
    """
    config, path = read_artefact(path_or_hub_id, kind=kind)
    weights_file = path / "model.safetensors"
    try:
        return config, load_file(weights_file), path
    except SafetensorError as error:
        raise CheckpointError(
            str(weights_file), "truncated or not a safetensors file", got=str(error), hint="Copy or download it again."
        ) from error


def read_artefact(path_or_hub_id: str | Path, *, kind: str) -> tuple[dict[str, Any], Path]:
    """`load_artefact` without reading the tensors. In a pipeline, the part of this kind is meant."""
    path = local_folder(path_or_hub_id)
    path = path / kind if (path / PIPELINE).is_file() else path
    config_file, weights_file = path / "config.json", path / "model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            what, expected = f"not an artefact folder, {file.name} is missing", f"a {kind} folder with config.json"
            raise CheckpointError(str(path), what, expected=expected, hint=_where_instead(path, kind))
    config = read_json(config_file)
    if config.get("kind") != kind:
        raise CheckpointError(
            str(path), "wrong kind of artefact", got=config.get("kind", "a config.json of another program"),
            expected=kind,
        )  # fmt: skip
    check_version(path, config)
    return config, path


def check_version(where: object, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a format that this version does not know."""
    if (got := config.get("format_version")) != FORMAT_VERSION:
        expected = str(FORMAT_VERSION)
        raise CheckpointError(str(where), "unknown format_version", got=got, expected=expected, hint="Update raev2.")


def push_to_hub(
    save: Callable[[Path], Path], repo_id: str, kind: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload what `save` writes to the Hugging Face hub, as a model repository; returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent:
        folder = save(Path(parent) / kind)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {kind}"))
        except Exception as error:  # network and access errors of several libraries
            got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            hint = "Log in with `hf auth login`, with a token that may write, or give one as `token`."
            raise CheckpointError(f"hub {repo_id}", "not uploaded", got=got, hint=hint) from error


def build_strict(build: Callable[[], M], tensors: Mapping[str, Tensor], where: str) -> M:
    """A module with these weights, built once they are known to fit it: what a file claims takes no memory."""
    with torch.device("meta"):
        check_fit(build(), tensors, where)
    module = build()
    module.load_state_dict(dict(tensors))
    return module


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict into a module; raises CheckpointError as `check_fit`."""
    check_fit(module, tensors, where)
    module.load_state_dict(dict(tensors))


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError that lists missing, unexpected and misshapen tensors of a module, if there are any."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointError(
            where, "the weights do not fit the configuration",
            got=f"missing {_some(missing)}, unexpected {_some(unexpected)}, misshapen {_some(misshapen)}",
            expected=f"{len(expected)} tensors of {type(module).__name__}",
        )  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def local_folder(path_or_hub_id: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """The folder itself, or that of a hub repository (OWNER/NAME or OWNER/NAME@REVISION), downloaded at need.

    hub   see `Asset.download`
    """
    if Path(path_or_hub_id).exists():
        return Path(path_or_hub_id) / subfolder
    files = tuple((Path(subfolder) / file).as_posix() for file in HUB_FILES)
    asset = Asset(f"model {path_or_hub_id}", str(path_or_hub_id), files)
    return asset.download(**{name: value for name, value in hub.items() if value}) / subfolder


def _where_instead(path: Path, kind: str) -> str:
    """What to use in place of a folder that is not an artefact."""
    if (path / "spec.yaml").is_file():
        return f"This is a run folder; its {kind} is {path / kind}."
    if (path / "MANIFEST.json").is_file():
        return f"This is a training checkpoint; the artefact of a finished run is RUN/{kind}."
    return ""


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"
