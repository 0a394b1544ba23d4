"""The tokenizers that RAE is compared with: VAEs through diffusers, and pixels. Both are fixed, nothing is trained.

    tokenizer = build_tokenizer(VAESpec(name="sdvae-ema", image_size=(256, 256)))
    latents = tokenizer.encode(images)

`load_tokenizer` opens an artefact folder of any kind of tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from raev2.errors import CheckpointError, SpecError, did_you_mean
from raev2.files.artefact import read_artefact, save_artefact
from raev2.files.assets import Asset
from raev2.files.damage import damaged
from raev2.files.spec_base import FILE
from raev2.shapes import Images, Latents
from raev2.spec import AnyTokenizerSpec, PixelSpec, TokenizerSpec, VAESpec
from raev2.tokenizer.base import AnyImages, Tokenizer, check_float
from raev2.tokenizer.rae import RAE

PROBE = 64  # pixels a side of the image that tells channels and downsampling


@dataclass(frozen=True)
class VAEInfo:
    """A published VAE: where it is, its latents, its terms. `gated`: the licence must be accepted at the source."""

    model_id: str
    subfolder: str | None
    channels: int
    downsample: int
    licence: str
    gated: bool = False


# Scale and shift come from the model's own configuration (`_to_latents`), not from here.
VAES: dict[str, VAEInfo] = {
    "sdvae-ema": VAEInfo("stabilityai/sd-vae-ft-ema", None, 4, 8, "MIT"),
    "sdvae-mse": VAEInfo("stabilityai/sd-vae-ft-mse", None, 4, 8, "MIT"),
    "sdxl": VAEInfo("madebyollin/sdxl-vae-fp16-fix", None, 4, 8, "MIT"),
    "sd3.5": VAEInfo(
        "stabilityai/stable-diffusion-3.5-large", "vae", 16, 8, "Stability AI Community Licence", gated=True
    ),
    "flux": VAEInfo("black-forest-labs/FLUX.1-dev", "vae", 16, 8, "FLUX.1 [dev] Non-Commercial", gated=True),
    "flux2": VAEInfo("black-forest-labs/FLUX.2-dev", "vae", 128, 16, "see the model's page", gated=True),
    "qwen-image": VAEInfo("Qwen/Qwen-Image", "vae", 16, 8, "Apache-2.0"),
    "vavae": VAEInfo("REPA-E/vavae-hf", None, 32, 16, "see the model's page"),
    "e2e-vavae": VAEInfo("REPA-E/e2e-vavae-hf", None, 32, 16, "see the model's page"),
    "e2e-sdvae": VAEInfo("REPA-E/e2e-sdvae-hf", None, 4, 8, "see the model's page"),
    "e2e-flux": VAEInfo("REPA-E/e2e-flux-vae", None, 16, 8, "see the model's page"),
    "e2e-sd3.5": VAEInfo("REPA-E/e2e-sd3.5-vae", None, 16, 8, "see the model's page"),
    "e2e-qwen-image": VAEInfo("REPA-E/e2e-qwenimage-vae", None, 16, 8, "see the model's page"),
}


class VAETokenizer(Tokenizer):
    """A VAE of diffusers, frozen: the mode of the posterior, normalised as its own configuration says.

    channel statistics (latents_mean, latents_std)     (z - mean) / std
    a batch norm over 2 x 2 patches (FLUX.2)           patches to channels, then (z - running mean) / std
    otherwise (scaling_factor, shift_factor)           (z - shift) * scale

    Precision is float32 unless the caller runs it under autocast.
    """

    def __init__(self, spec: VAESpec, model: Any) -> None:
        super().__init__()
        self.spec, self.model = spec, model.requires_grad_(False).eval()
        probe = self._to_latents(torch.zeros(1, 3, PROBE, PROBE, device=next(model.parameters()).device))
        factor = PROBE // probe.shape[2]
        if any(side % factor for side in spec.image_size):
            below = [side // factor * factor for side in spec.image_size]
            raise SpecError(
                "tokenizer.image_size", f"this VAE needs multiples of {factor} pixels", got=list(spec.image_size),
                expected=f"for example {[side or factor for side in below]}",
            )  # fmt: skip
        self._shape = (probe.shape[1], spec.image_size[0] // factor, spec.image_size[1] // factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self._shape

    @torch.no_grad()
    def encode(self, images: AnyImages) -> Latents:
        """Images in [0, 1] -> normalised latents (the posterior's mode). No gradient."""
        return self._to_latents(_resized(images, self)).float()

    def decode(self, latents: Latents, clamp: bool = True) -> Images:
        """Normalised latents -> images, clamped to [0, 1] unless `clamp` is False."""
        model = self.model
        shift, scale = self._shift_and_scale(latents)
        z = latents / scale + shift
        if hasattr(model, "bn"):
            z = F.pixel_shuffle(z, 2)
        # Video models have a frame axis, here of one.
        images = model.decode(z[:, :, None]).sample[:, :, 0] if _is_video(model) else model.decode(z).sample
        images = images.float() / 2 + 0.5
        return images.clamp(0, 1) if clamp else images

    def fingerprint(self) -> dict[str, Any]:
        """The model and the image size."""
        return {"kind": "vae", "name": self.spec.name, "image_size": list(self.spec.image_size)}

    def save_pretrained(self, path: str | Path) -> Path:
        """Write an artefact folder that names the VAE; its weights stay where they are."""
        return _save(path, self)

    def _to_latents(self, images: Tensor) -> Tensor:
        model, pixels = self.model, images * 2 - 1
        if _is_video(model):
            z = model.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        else:
            z = model.encode(pixels).latent_dist.mode()
        if hasattr(model, "bn"):
            z = F.pixel_unshuffle(z, 2)
        shift, scale = self._shift_and_scale(z)
        return (z - shift) * scale

    def _shift_and_scale(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        config = self.model.config
        if (bn := getattr(self.model, "bn", None)) is not None:
            return bn.running_mean.view(1, -1, 1, 1), 1 / (bn.running_var + bn.eps).sqrt().view(1, -1, 1, 1)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (z.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            return mean, 1 / std
        return config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0


class PixelTokenizer(Tokenizer):
    """Pixels in [-1, 1] as latents: the baseline without a tokenizer. The generator's patch size does the rest."""

    def __init__(self, spec: PixelSpec) -> None:
        super().__init__()
        self.spec = spec

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(3, height, width)."""
        return 3, *self.spec.image_size

    def encode(self, images: AnyImages) -> Latents:
        """2 x - 1, at the size of the spec."""
        return _resized(images, self).clamp(0, 1) * 2 - 1

    def decode(self, latents: Latents, clamp: bool = True) -> Images:
        """(x + 1) / 2."""
        images = latents.float() / 2 + 0.5
        return images.clamp(0, 1) if clamp else images

    def fingerprint(self) -> dict[str, Any]:
        """The image size."""
        return {"kind": "pixels", "image_size": list(self.spec.image_size)}

    def save_pretrained(self, path: str | Path) -> Path:
        """Write an artefact folder that holds the spec alone."""
        return _save(path, self)


def _resized(images: Tensor, tokenizer: Tokenizer) -> Tensor:
    check_float(images, type(tokenizer).__name__)
    size = tokenizer.spec.image_size
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def _save(path: str | Path, tokenizer: VAETokenizer | PixelTokenizer) -> Path:
    spec, shape = tokenizer.spec, list(tokenizer.latent_shape)
    info = VAES.get(spec.name) if isinstance(spec, VAESpec) else None
    known = info and {"name": info.model_id, "licence": info.licence, "gated": info.gated, "hub_id": info.model_id}
    config = {"tokenizer": spec.model_dump(mode="json"), "latent_shape": shape, "encoder": known, "stats": None}
    return save_artefact(path, kind="tokenizer", config=config, tensors={})


# Build and load


def build_tokenizer(spec: VAESpec | PixelSpec) -> Tokenizer:
    """A fixed tokenizer from its spec."""
    return PixelTokenizer(spec) if isinstance(spec, PixelSpec) else VAETokenizer(spec, load_vae(spec.name))


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """Open an artefact folder or hub repository of any kind of tokenizer."""
    config, _ = read_artefact(path_or_hub_id, kind="tokenizer")
    spec = tokenizer_spec(config)
    return RAE.from_pretrained(path_or_hub_id) if isinstance(spec, TokenizerSpec) else build_tokenizer(spec)


def tokenizer_spec(config: dict[str, Any]) -> AnyTokenizerSpec:
    """The spec in the configuration of a tokenizer artefact."""
    with damaged("config.json of a tokenizer"):
        return TypeAdapter(AnyTokenizerSpec).validate_python(config["tokenizer"], context=FILE)


def load_vae(name: str) -> Any:
    """The diffusers model of a name in `VAES`, a hub id 'ORG/MODEL' or a local folder; its class is read from there."""
    try:
        import diffusers
    except ImportError as error:
        raise SpecError(
            "tokenizer.kind", "VAE latents need diffusers", got="not installed",
            hint="Run pip install 'raev2[diffusers]'.",
        ) from error  # fmt: skip
    info, folder = VAES.get(name), Path(name)
    if info is None and not folder.is_dir() and name.count("/") != 1:
        raise SpecError(
            "tokenizer.name", "unknown VAE", got=repr(name),
            expected=f"one of {', '.join(VAES)}, a hub id ORG/MODEL or a local diffusers folder",
            hint=did_you_mean(name, VAES),
        )  # fmt: skip
    source, subfolder = (info.model_id, info.subfolder) if info else (name, None)
    try:
        config = diffusers.AutoencoderKL.load_config(source, subfolder=subfolder)
        if not isinstance(config, dict) or not hasattr(diffusers, str(config.get("_class_name"))):
            raise CheckpointError(str(name), "not a diffusers autoencoder", got=str(config)[:100])
        model_class = getattr(diffusers, config["_class_name"])
        return model_class.from_pretrained(source, subfolder=subfolder)
    except (OSError, json.JSONDecodeError) as error:
        raise vae_asset(name).error(error) from error


def vae_asset(name: str) -> Asset:
    """The weights of a VAE by a name that `load_vae` takes."""
    info = VAES.get(name)
    if info is None:
        return Asset(f"VAE {name}", name, package="diffusers")
    note = f"Its licence ({info.licence}) must be accepted at its page first" if info.gated else ""
    files = tuple(f"{info.subfolder}/{file}" for file in Asset.files) if info.subfolder else Asset.files
    return Asset(f"VAE {name}", info.model_id, files, gated=info.gated, note=note, package="diffusers")


def _is_video(model: Any) -> bool:
    """Whether latents have a frame axis, as those of Qwen-Image."""
    return "QwenImage" in type(model).__name__
