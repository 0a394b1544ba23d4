"""Foreign files: what is in them, told from their content.

`read_source` accepts a PyTorch file, a safetensors file, or a folder of diffusers. Pickles are read with
`weights_only=True` and mapped, so that only what is used reaches memory.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.files.damage import read_json
from raev2.files.hashes import file_sha256
from raev2.interop.convert import Kind, describe, some, unwrap, weights_key
from raev2.interop.generators import NETWORKS
from raev2.spec_io import read_yaml

LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class Source:
    """A foreign file or folder.

    kind      what it is
    layout    whose layout it has, for people
    tensors   by their foreign names, without the prefixes of wrappers
    config    what lies beside the weights
    weights   which of several sets of weights: 'ema', 'model' or ''
    files     name -> SHA-256 of everything that was read
    licence   texts of licence files beside the weights
    """

    path: Path
    kind: Kind
    layout: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""


def read_source(path: str | Path) -> Source:
    """Open a foreign file or folder; raises CheckpointError that says what it is when it cannot be imported."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    content = read_tensors(path)
    tensors = unwrap(content)
    kind, layout = describe(tensors)
    if kind is None:
        raise CheckpointError(
            str(path), "not something that can be imported", got=f"{layout}: {some(sorted(tensors))}",
            expected="a generator, decoder or statistics file of RAE or RAEv2, or a folder with an AutoencoderRAE",
        )  # fmt: skip
    return Source(
        path, kind, layout.partition(";")[0], tensors, weights=weights_key(content),
        files={path.name: file_sha256(path)}, licence=licence_text(path.parent),
    )  # fmt: skip


def read_tensors(path: Path) -> Mapping[str, Any]:
    """The content of a PyTorch or safetensors file, mapped where the format allows it."""
    if not path.is_file():
        raise CheckpointError(
            str(path), "no such file or folder", expected="a local file or folder",
            hint="Get weights of the Hugging Face hub with `hf download ORG/MODEL --local-dir DIR`.",
        )  # fmt: skip
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(str(path), "truncated or not a safetensors file", got=str(error)) from error
    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            str(path), "holds Python objects besides tensors, which are not loaded because they can run code",
            got=str(error).partition("\n")[0][:200], expected="a file for torch.load(weights_only=True)",
            hint="If you trust it, save only its tensors from the program that wrote it.",
        ) from error  # fmt: skip
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            str(path), "truncated or not a PyTorch file", got=str(error).partition("\n")[0][:200],
            hint="Copy or download it again.",
        ) from error  # fmt: skip
    if not isinstance(content, Mapping):
        raise CheckpointError(str(path), "not a state dict", got=type(content).__name__, expected="tensors by name")
    return content


def _read_folder(path: Path) -> Source:
    config_file = path / "config.json"
    if not config_file.is_file():
        inside = sorted(file.name for file in path.iterdir())
        known = {"spec.yaml": "a run folder of raev2", "MANIFEST.json": "a training checkpoint of raev2"}
        what = next((text for name, text in known.items() if name in inside), some(inside))
        raise CheckpointError(
            str(path), "not a folder that can be imported", got=what,
            expected="a folder of diffusers with config.json, or one file",
        )  # fmt: skip
    config = read_json(config_file)
    name = config.get("_class_name")
    if name != "AutoencoderRAE":
        hint = ""
        if config.get("kind") in ("tokenizer", "generator"):
            what, hint = f"a {config['kind']} of raev2", "It needs no import: use it as it is."
        elif "model_type" in config or "architecture" in config:
            what, hint = "a vision encoder", "Name this folder as the encoder of a tokenizer."
        else:
            what = f"{name} of diffusers" if name else f"keys {sorted(config)[:6]}"
        raise CheckpointError(
            str(path), "not something that can be imported", got=what, expected="an AutoencoderRAE of diffusers",
            hint=hint,
        )  # fmt: skip
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(str(path), "no weights", expected="diffusion_pytorch_model.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    hashes = {file.name: file_sha256(file) for file in (config_file, *files)}
    return Source(path, "autoencoder", "AutoencoderRAE of diffusers", tensors, config, "", hashes, licence_text(path))


def licence_text(folder: Path) -> str:
    """The licence files of a folder, one after the other."""
    files = [folder / name for name in LICENCE_NAMES]
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace").strip() for file in files if file.is_file())


def read_config(file: str | Path) -> dict[str, Any]:
    """A configuration as YAML or JSON."""
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(str(file), "no such file", expected="YAML or JSON")
    return read_yaml(file, "a mapping")


def generator_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of a generator in a configuration of RAE or RAEv2.

    They are the mapping itself, or the 'params' beside a 'target' that ends with the class name. 'prediction' is taken
    from wherever it stands.
    """
    nodes = list(_mappings(values))
    found = next(filter(None, map(_arguments, nodes)), dict(values))  # the outer one: autoguidance has a second inside
    predictions = [node["prediction"] for node in nodes if isinstance(node.get("prediction"), str)]
    return {**({"prediction": predictions[0]} if predictions else {}), **found}


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    target = str(node.get("target", "")).rpartition(".")[2]
    if target in NETWORKS and isinstance(node.get("params"), Mapping):
        return {"model": target, **node["params"]}
    return dict(node) if {"hidden_size", "depth", "num_heads"} <= node.keys() else {}


def tokenizer_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of a tokenizer in a configuration of RAE or RAEv2, or the tokenizer of our run spec."""
    for node in _mappings(values):
        if node.keys() & {"encoder_name", "encoder_cls"} or ("encoder" in node and "decoder" in node):
            return dict(node)
    return dict(values)


def _mappings(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All mappings in a nested one, the outer ones first."""
    level = [values]
    while level:
        yield from level
        level = [value for node in level for value in node.values() if isinstance(value, Mapping)]
