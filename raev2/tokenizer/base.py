"""What every tokenizer can do: images -> normalised latents -> images. RAE is this project's own; see `Tokenizer`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from raev2.errors import SpecError
from raev2.files.artefact import push_to_hub
from raev2.files.hashes import json_sha256
from raev2.shapes import Images, Latents

AnyImages = Shaped[Tensor, "B 3 Hpx Wpx"]  # before the dtype was checked


class Tokenizer(nn.Module, ABC):
    """Images in [0, 1] to latents and back. The latents are what a generator is trained on."""

    spec: Any  # with image_size: height and width of decoded images in pixels

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""

    @abstractmethod
    def encode(self, images: AnyImages) -> Latents:
        """Images in [0, 1] -> normalised latents. No gradient, no noise."""

    @abstractmethod
    def decode(self, latents: Latents, clamp: bool = True) -> Images:
        """Normalised latents -> images, clamped to [0, 1] unless `clamp` is False."""

    @torch.no_grad()
    def reconstruct(self, images: AnyImages) -> Images:
        """Encode and decode, clamped to [0, 1]."""
        return self.decode(self.encode(images))

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the latents depend on: two tokenizers with equal fingerprints give the same latents."""

    def identity(self) -> str:
        """Hash of all that latents depend on: a generator keeps that of the tokenizer it was trained with."""
        return json_sha256(self.fingerprint())[:16]

    @abstractmethod
    def save_pretrained(self, path: str | Path) -> Path:
        """Write an artefact folder of kind 'tokenizer'."""

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the artefact folder to the Hugging Face hub; returns the URL of the commit."""
        return push_to_hub(self.save_pretrained, repo_id, "tokenizer", private=private)


def check_float(images: AnyImages, where: str) -> None:
    """Raise SpecError for images that are not floats: the range is a contract and is never guessed from the data."""
    if not images.is_floating_point():
        raise SpecError(
            where, "images must be floats in [0, 1]", got=images.dtype, expected="torch.float32",
            hint="Convert 8-bit images with images_u8.float() / 255.",
        )  # fmt: skip


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
