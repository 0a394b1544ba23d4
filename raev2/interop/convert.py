"""What all conversions share: unwrapping, strict checks, and turning foreign tensors into ours one at a time.

A `Conversion` holds foreign tensors, usually mapped from a file, and says which of them make up each of ours. Nothing
is computed before it is asked for, so that a checkpoint of some gigabytes never lies in memory twice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raev2.errors import CheckpointError

Change = Callable[[str, int, Tensor], Tensor]


@dataclass(frozen=True)
class Conversion:
    """Our tensors as functions of foreign ones.

    tensors   foreign tensors by their names
    names     our name -> the foreign tensors that make it up, joined along the first axis
    shapes    our shapes
    change    (our name, first row, foreign tensor) -> those rows of ours
    """

    tensors: Mapping[str, Tensor]
    names: Mapping[str, Sequence[str]]
    shapes: Mapping[str, torch.Size]
    change: Change = lambda name, start, value: value

    def check(self, what: str) -> None:
        """Raise CheckpointError unless every foreign tensor finds its place; reads no values."""
        expected = {theirs for group in self.names.values() for theirs in group}
        missing, unexpected = sorted(expected - self.tensors.keys()), sorted(self.tensors.keys() - expected)
        if missing or unexpected:
            raise CheckpointError(
                what, "do not fit the config", got=f"missing {some(missing)}; unexpected {some(unexpected)}",
                expected=f"{len(expected)} tensors", hint=f"The names look like {describe(self.tensors)}.",
            )  # fmt: skip
        for name, group in self.names.items():
            with torch.device("meta"):
                found = [torch.empty_like(part, device="meta") for part in (self.tensors[theirs] for theirs in group)]
                parts = [self.change(name, start, part) for start, part in _with_start(found)]
                shape = torch.cat(parts).shape if parts else self.shapes[name]
            if shape != self.shapes[name]:
                raise CheckpointError(
                    what, f"{' + '.join(group)} has another shape than the config says", got=tuple(shape),
                    expected=str(tuple(self.shapes[name])),
                )  # fmt: skip

    def parts(self, name: str) -> Iterator[Tensor]:
        """The rows of one of our tensors, in order, float32."""
        for start, value in _with_start([self.tensors[theirs] for theirs in self.names[name]]):
            yield self.change(name, start, value.float())

    def state_dict(self) -> dict[str, Tensor]:
        """Our tensors. Those that are only renamed share memory with the foreign ones."""
        state = {}
        for name, shape in self.shapes.items():
            parts = list(self.parts(name))
            state[name] = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.zeros(shape)
        return state

    def write(self, file: Path) -> None:
        """Write our tensors as safetensors, holding one foreign tensor at a time."""
        header: dict[str, Any] = {}
        end = 0
        for name, shape in self.shapes.items():
            start, end = end, end + 4 * shape.numel()
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in self.shapes:
                for part in self.parts(name):
                    out.write(part.detach().contiguous().numpy().data)


def _with_start(values: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for value in values:
        yield start, value
        start += len(value)


def load(module: nn.Module, conversion: Conversion) -> None:
    """Give a module the converted tensors without copying them."""
    module.load_state_dict(conversion.state_dict(), assign=True)


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The plain weights of a training checkpoint, without the prefixes of wrappers; averaged weights first."""
    for key in ("ema", "model", "state_dict"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    others = sorted(name for name, value in state_dict.items() if not isinstance(value, Tensor))
    if others:
        raise CheckpointError(
            "foreign weights", "not a state dict", got=f"entries that are no tensors: {some(others)}",
            expected="tensors by name, or a training checkpoint with them under 'ema' or 'model'",
        )  # fmt: skip
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state_dict.items()}


def describe(names: Mapping[str, Any]) -> str:
    """Whose weights these are, by their names."""
    parts = {part for name in names for part in name.split(".")[:2]}
    suffixes = {".".join(name.split(".")[2:]) for name in names}
    if names and set(names) <= {"mean", "var"}:
        return "latent statistics; use import_stats"
    if any(".attention.to_q." in name for name in names):
        return "an AutoencoderRAE of diffusers; import its folder"
    if "decoder_layers" in parts:
        return "a decoder (GeneralDecoder); use import_decoder"
    if {"network", "conditioner"} <= parts:
        return "a generator of this package; use Generator.from_pretrained"
    if any(name.startswith("heads.") and name.endswith("weight_orig") for name in names):
        return "a discriminator; use import_discriminator"
    if "t_embedder.W" in names:
        version = "RAE (v1)" if "y_embedder" in parts else "RAEv2"
        network = "DiTwDDTHead" if "s_embedder" in parts else "LightningDiT"
        return f"{version} {network}{'IG' if 'base_final_layer' in parts else ''}"
    if "x_embedder" in parts and "t_embedder" in parts:
        return "a DiT, SiT or LightningDiT without Fourier time embedding, which this package does not build"
    if "down_blocks" in parts or "encoder.conv_in.weight" in names:
        return "a VAE, which this package does not use"
    if parts & {"embeddings", "vision_model", "patch_embed", "cls_token"} or "attn.qkv.weight" in suffixes:
        return "a vision encoder; name its folder as the encoder"
    return "neither a generator nor a decoder of RAE or RAEv2"


def some(names: Sequence[str]) -> str:
    """A count and the first names."""
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"


def linear_names(names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Names of layers -> names of their weights and biases."""
    return {
        f"{ours}.{part}": [f"{name}.{part}" for name in theirs]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }
