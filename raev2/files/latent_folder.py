"""Latents on disk in place of pictures: a folder that `raev2 latents build` writes and training reads.

    latents.json              what they are: identity, dtype, shape, number of samples, samples a file, mirrored or not
    000000.safetensors, ...   'latents' (S, C, H, W) in the order of the split, and 'mirrored' of the mirrored pictures;
                              of int8, also '..._scale' (S, C, 1, 1) in float32, by which they are multiplied

A file is whole or not there, so an interrupted build goes on. Files are mapped into memory: processes share the pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.files.damage import damaged, read_json

ABOUT, SCALE = "latents.json", "_scale"


class LatentFolder:
    """The latents of a split by number, for `ImageDataset.with_latents`. Raises CheckpointError for half a folder."""

    def __init__(self, dir: str | Path) -> None:
        self.dir = Path(dir)
        if not (self.dir / ABOUT).is_file():
            raise CheckpointError(f"latents {dir}", "none here", expected=f"a folder with {ABOUT}", hint=BUILD)
        self.about = read_json(self.dir / ABOUT)
        with damaged(self.dir / ABOUT):
            self.size, self.identity = int(self.about["samples_a_file"]), dict(self.about["identity"])
            files = [latent_file(self.dir, n) for n in range(-(-self.about["num_samples"] // self.size))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            got = f"{len(missing)} of {len(files)} files missing, {missing[0]} first"
            raise CheckpointError(
                f"latents {dir}", "not complete", got=got, hint="The same command that built it goes on."
            )
        self.files = [_mapped(file) for file in files]

    def check(self, identity: Mapping[str, Any], mirrored: bool) -> None:
        """Raise CheckpointError, with both values, unless these are the latents that a run would encode itself."""
        for name, wanted in identity.items():
            if (found := self.identity.get(name)) != wanted:
                where, what = f"latents {self.dir}", f"of another {name}"
                raise CheckpointError(where, what, got=found, expected=str(wanted), hint=BUILD)
        if mirrored and not self.about["mirrored"]:
            hint = "Build them with --mirrored, or set data.horizontal_flip=false."
            raise CheckpointError(f"latents {self.dir}", "without mirrored pictures, which this run shows", hint=hint)

    def __getitem__(self, index: int) -> Tensor:
        """Latents (C, H, W) of sample `index`, in the dtype on disk; int8 in float32."""
        return self._at(index, "latents")

    def mirrored(self, index: int) -> Tensor:
        """Those of the mirrored picture."""
        return self._at(index, "mirrored")

    def _at(self, index: int, name: str) -> Tensor:
        tensors, row = self.files[index // self.size], index % self.size
        latents = tensors[name][row]
        return latents * tensors[name + SCALE][row] if name + SCALE in tensors else latents


BUILD = "Build them: raev2 latents build --run RUN --out DIR."


def latent_file(dir: Path, number: int) -> Path:
    """One of the files of a folder."""
    return dir / f"{number:06d}.safetensors"


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(str(file), "damaged", got=str(error), hint="Delete it and build again.") from error
