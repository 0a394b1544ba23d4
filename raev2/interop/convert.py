"""What all conversions share: unwrapping, strict checks, and turning foreign tensors into ours one at a time.

A `Conversion` holds foreign tensors, usually mapped from a file, and says which of them make up each of ours. Nothing
is computed before it is asked for, so that a checkpoint of some gigabytes never lies in memory twice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raev2.errors import CheckpointError

Kind = Literal["generator", "decoder", "statistics", "autoencoder"]
Names = dict[str, list[str]]
Change = Callable[[str, int, Tensor], Tensor]


def unchanged(name: str, start: int, value: Tensor) -> Tensor:
    """The `Change` of a tensor that only has another name."""
    return value


@dataclass(frozen=True)
class Conversion:
    """The tensors of one of our modules as functions of foreign ones.

    module    has the names and shapes; its values are not looked at
    tensors   foreign tensors by their names
    names     our name -> the foreign tensors that make it up, joined along the first axis; the others of ours are zeros
    change    (our name, first row, foreign tensor) -> those rows of ours
    """

    module: nn.Module
    tensors: Mapping[str, Tensor]
    names: Names
    change: Change = unchanged

    def check(self, what: str) -> None:
        """Raise CheckpointError unless every foreign tensor finds its place; reads no values."""
        expected = {theirs for group in self.names.values() for theirs in group}
        missing, unexpected = sorted(expected - self.tensors.keys()), sorted(self.tensors.keys() - expected)
        if missing or unexpected:
            raise CheckpointError(
                what, "do not fit the config", got=f"missing {some(missing)}; unexpected {some(unexpected)}",
                expected=f"{len(expected)} tensors", hint=f"The names look like {describe(self.tensors)[1]}.",
            )  # fmt: skip
        state = self.module.state_dict()
        for name, group in self.names.items():
            shape = torch.cat(list(self.parts(name, "meta"))).shape
            if shape != state[name].shape:
                raise CheckpointError(
                    what, f"{' + '.join(group)} has another shape than the config says", got=tuple(shape),
                    expected=str(tuple(state[name].shape)),
                )  # fmt: skip

    def parts(self, name: str, device: str | None = None) -> Iterator[Tensor]:
        """The rows of one of our tensors, in order, float32."""
        start = 0
        for theirs in self.names.get(name, ()):
            value = self.tensors[theirs]
            yield self.change(name, start, value.to(device or value.device).float())
            start += len(value)

    def load(self) -> None:
        """Give the module its tensors. Those that are only renamed share memory with the foreign ones."""
        state = {}
        for name, value in self.module.state_dict().items():
            parts = list(self.parts(name))
            state[name] = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.zeros(value.shape)
        self.module.load_state_dict(state, assign=True)

    def write(self, file: Path) -> None:
        """Write our tensors as safetensors, holding one foreign tensor at a time."""
        header: dict[str, Any] = {}
        end = 0
        for name, value in self.module.state_dict().items():
            start, end = end, end + 4 * value.numel()
            header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in header:
                for part in self.parts(name):
                    out.write(part.detach().contiguous().numpy().data)


def export(module: nn.Module, names: Names, change: Change = unchanged) -> dict[str, Tensor]:
    """The inverse of a `Conversion`: copies of our tensors, cut into foreign ones; `change` gets whole tensors."""
    state, layers = module.state_dict(), dict(module.named_modules())
    tensors: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        value = change(ours, 0, state[ours])
        splits: Any = getattr(layers[ours.rpartition(".")[0]], "splits", None)  # of a FusedLinear
        parts = value.split(splits) if splits and len(theirs) > 1 else value.chunk(len(theirs))
        tensors.update(zip(theirs, (part.clone() for part in parts), strict=True))
    return tensors


def place(ours: Iterable[str], layers: Mapping[str, str | Sequence[str]]) -> Names:
    """The foreign tensors of ours.

    layers   our tensor or layer -> foreign tensors or layers; weight and bias of a layer are called so everywhere

    Raises CheckpointError for a tensor without a place.
    """
    names: Names = {}
    for name in ours:
        layer, dot, part = (name, "", "") if name in layers else name.rpartition(".")
        if layer not in layers:
            raise CheckpointError("interop", "the reference has no place for some weights", got=name)
        theirs = layers[layer]
        names[name] = [other + dot + part for other in ([theirs] if isinstance(theirs, str) else theirs)]
    return names


def rename(name: str, parts: Mapping[str, str]) -> str:
    """A name with some of its parts exchanged."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def sizes(tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """The numbers that shapes tell: name -> (tensor, axis), as far as the tensors are there."""
    return {key: tensors[name].shape[axis] for key, (name, axis) in axes.items() if name in tensors}


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The plain weights of a training checkpoint, without the prefixes of wrappers; averaged weights first."""
    state_dict = state_dict.get(weights_key(state_dict), state_dict)
    others = sorted(name for name, value in state_dict.items() if not isinstance(value, Tensor))
    if others:
        raise CheckpointError(
            "foreign weights", "not a state dict", got=f"entries that are no tensors: {some(others)}",
            expected="tensors by name, or a training checkpoint with them under 'ema' or 'model'",
        )  # fmt: skip
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state_dict.items()}


def weights_key(state_dict: Mapping[str, Any]) -> str:
    """Which of several sets of weights in a training checkpoint is read; '' where there is one."""
    return next((key for key in ("ema", "model", "state_dict") if isinstance(state_dict.get(key), Mapping)), "")


def describe(names: Mapping[str, Any]) -> tuple[Kind | None, str]:
    """What weights are for, and whose they are in words, by their names."""
    parts = {part for name in names for part in name.split(".")[:2]}
    suffixes = {".".join(name.split(".")[2:]) for name in names}
    if names and set(names) <= {"mean", "var"}:
        return "statistics", "latent statistics; use import_stats"
    if any(".attention.to_q." in name for name in names):
        return None, "an AutoencoderRAE of diffusers; import its folder"
    if parts & {"decoder_layers", "decoder_embed"}:
        return "decoder", "a decoder (GeneralDecoder); use import_decoder"
    if {"network", "conditioner"} <= parts:
        return None, "a generator of this package; use Generator.from_pretrained"
    if any(name.startswith("heads.") and name.endswith("weight_orig") for name in names):
        return None, "a discriminator; use import_discriminator"
    if "t_embedder.W" in names:
        version = "RAE (v1)" if "y_embedder" in parts else "RAEv2"
        network = "DiTwDDTHead" if "s_embedder" in parts else "LightningDiT"
        return "generator", f"{version} {network}{'IG' if 'base_final_layer' in parts else ''}"
    if "x_embedder" in parts and "t_embedder" in parts:
        return None, "a DiT, SiT or LightningDiT without Fourier time embedding, which this package does not build"
    if "down_blocks" in parts or "encoder.conv_in.weight" in names:
        return None, "a VAE, which this package does not use"
    if parts & {"embeddings", "vision_model", "patch_embed", "cls_token"} or "attn.qkv.weight" in suffixes:
        return None, "a vision encoder; name its folder as the encoder"
    return None, "neither a generator nor a decoder of RAE or RAEv2"


def some(names: Sequence[str]) -> str:
    """A count and the first names."""
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"
