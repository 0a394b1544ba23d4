"""RAE, the representation autoencoder: a frozen encoder, latent statistics and a pixel decoder.

    rae = RAE.from_pretrained("runs/a/tokenizer")
    latents = rae.encode(images)      # images in [0, 1] -> (B, C, H, W), zero mean and unit variance per element
    images = rae.decode(latents)      # in [0, 1]

Training uses `tokens`, `token_noise` and `decode_tokens`; the loop is in train_tokenizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.files.artefact import ENCODER, build_strict, load_artefact, save_artefact
from raev2.files.damage import damaged
from raev2.files.hashes import json_sha256
from raev2.files.spec_base import FILE
from raev2.shapes import Images, Latents, Tokens
from raev2.spec import TokenizerSpec
from raev2.tokenizer.base import AnyImages, Tokenizer, check_float, part
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoders import FrozenEncoder, build_encoder
from raev2.tokenizer.latent_stats import (
    LatentStats,
    check_same_encoder,
    denormalise,
    mix_channels,
    normalise,
    whitening,
)


class RAE(Tokenizer):
    """The tokenizer. Its parameters are those of the decoder; the encoder is never trained.

    Precision is float32 unless the caller runs it under autocast.

    decoder       a trained one; None: with initial values
    extra         further entries of config.json: where imported weights come from, their licence
    encoder_dir   folder with the encoder's weights, for tokenizers that bring their own; saved with the artefact
    """

    stats_mean: Tensor
    stats_var: Tensor
    whitener: Tensor  # (C, C) for centred tokens, with `TokenizerSpec.whiten`
    colourer: Tensor  # its inverse

    def __init__(
        self,
        spec: TokenizerSpec,
        encoder: FrozenEncoder,
        stats: LatentStats | None = None,
        decoder: ViTDecoder | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.encoder = spec, encoder
        self.extra: dict[str, Any] = {}
        self.encoder_dir: Path | None = None
        self.decoder = decoder or ViTDecoder(encoder.width, spec.decoder, spec.grid)
        if (width := self.decoder.embed.in_features) != encoder.width:
            raise CheckpointError(
                "RAE", "the decoder belongs to another encoder", got=f"latents of width {width}",
                expected=f"{encoder.width}, the width of {encoder.info.name}",
            )  # fmt: skip
        self._stats: LatentStats | None = None
        self.register_buffer("stats_mean", torch.zeros(self.latent_shape), persistent=False)
        self.register_buffer("stats_var", torch.ones(self.latent_shape), persistent=False)
        for name in () if spec.whiten is None else ("whitener", "colourer"):
            self.register_buffer(name, torch.eye(encoder.width), persistent=False)
        if stats is not None:
            self.set_stats(stats)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.encoder.width, *self.spec.grid

    @property
    def latent_stats(self) -> LatentStats | None:
        """Statistics that normalise the latents; None until they were computed."""
        return self._stats

    def set_stats(self, stats: LatentStats) -> None:
        """Use these statistics. Raises CheckpointError if they belong to another encoder or have another shape."""
        check_same_encoder(stats.encoder, self.encoder.fingerprint())
        if not (tuple(stats.mean.shape) == tuple(stats.var.shape) == self.latent_shape):
            raise CheckpointError(
                "latent statistics", "wrong shape", got=f"{tuple(stats.mean.shape)} and {tuple(stats.var.shape)}",
                expected=str(self.latent_shape),
            )  # fmt: skip
        if self.spec.whiten is not None:
            self._set_whitening(stats.cov, self.spec.whiten)
        self._stats = stats
        self.stats_mean.copy_(stats.mean)
        self.stats_var.copy_(stats.var)

    def _set_whitening(self, cov: Tensor | None, share: float) -> None:
        if cov is None:
            raise CheckpointError(
                "latent statistics", "no covariance of channels, which tokenizer.whiten needs",
                hint="Compute them again, or set tokenizer.whiten=null.",
            )  # fmt: skip
        whitener, colourer = whitening(cov, share)
        self.whitener.copy_(whitener)
        self.colourer.copy_(colourer)

    # Images -> latents -> images.

    def encode(self, images: AnyImages) -> Latents:
        """Images in [0, 1], any size -> normalised latents. No gradient, no noise.

        Raises SpecError for images that are not floats: the range is a contract and is never guessed from the data.
        """
        if self._stats is None:
            raise CheckpointError(
                "RAE.encode", "the tokenizer has no latent statistics", hint="Compute them and call RAE.set_stats."
            )
        return self.normalise(self.token_latents(self.tokens(images)))

    def decode(self, latents: Latents, clamp: bool = True) -> Images:
        """Normalised latents -> images, clamped to [0, 1] unless `clamp` is False."""
        images = self.decode_tokens(self.denormalise(latents).flatten(2).transpose(1, 2))
        return images.clamp(0, 1) if clamp else images

    def normalise(self, latents: Latents) -> Latents:
        """Tokens as a map -> latents that a generator sees: of unit variance per element, or whitened."""
        if self.spec.whiten is None:
            return normalise(latents, self.stats_mean, self.stats_var)
        return mix_channels(latents.float() - self.stats_mean, self.whitener)

    def denormalise(self, latents: Latents) -> Latents:
        """The inverse."""
        if self.spec.whiten is None:
            return denormalise(latents, self.stats_mean, self.stats_var)
        return mix_channels(latents, self.colourer) + self.stats_mean

    @torch.no_grad()
    def reconstruct(self, images: AnyImages) -> Images:
        """Decode the tokens of images, clamped to [0, 1]; needs no statistics."""
        return self.decode_tokens(self.tokens(images)).clamp(0, 1)

    def fingerprint(self) -> dict[str, Any]:
        """That of the encoder, with its layers, norm, preprocessing and grid."""
        return self.encoder.fingerprint()

    def identity(self) -> str:
        """That of every tokenizer, with the statistics in it."""
        parts = [self.stats_mean, self.stats_var, *([] if self.spec.whiten is None else [self.whitener])]
        statistics = [value.cpu().numpy().tobytes().hex() for value in parts]
        return json_sha256([self.fingerprint(), *statistics])[:16]

    # Parts, for training.

    @torch.no_grad()
    def tokens(self, images: AnyImages) -> Tokens:
        """Encoder tokens as they are, neither noised nor normalised; no gradient."""
        check_float(images, "RAE")
        return self.encoder(images).float()

    def token_latents(self, tokens: Tokens) -> Latents:
        """Tokens as a map (B, C, H, W), not normalised: what the statistics are computed from."""
        return tokens.transpose(1, 2).unflatten(2, self.spec.grid)

    def token_noise(self, batch_size: int, generator: torch.Generator) -> Tokens:
        """What decoder training adds to tokens, in the unit, strength and distribution of the spec."""
        shape = (batch_size, math.prod(self.spec.grid), self.latent_shape[0])
        return token_noise(shape, self.spec.noise_tau, self.spec.noise_distribution, generator)

    def decode_tokens(self, tokens: Tokens) -> Images:
        """Decoder alone: tokens -> images, not clamped, with gradient."""
        return self.decoder(tokens)

    # Artefacts.

    @classmethod
    def from_spec(cls, spec: TokenizerSpec) -> RAE:
        """A tokenizer with a fresh decoder and no statistics."""
        return cls(spec, build_encoder(spec.encoder, spec.grid))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, encoder: str | Path | None = None) -> RAE:
        """Load an artefact folder or hub repository; the encoder is built from its name, or comes with the folder.

        encoder   local folder with the encoder's weights, in place of its name
        """
        config, tensors, path = load_artefact(path_or_hub_id, kind="tokenizer")
        with damaged(f"{path}/config.json"):
            spec, decoder, stats = read_parts(config, tensors, str(path))
            own = path / ENCODER if (path / ENCODER).is_dir() else None
            rae = cls(spec, build_encoder(spec.encoder, spec.grid, source=encoder or own), stats, decoder)
            rae.extra, rae.encoder_dir = dict(config.get("extra", {})), own
        return rae.eval()

    def save_pretrained(self, path: str | Path) -> Path:
        """Write an artefact folder: spec, decoder, statistics and a model card.

        Encoder weights are in it only where the tokenizer brought its own (`encoder_dir`).
        """
        tensors = {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        stats_config: dict[str, Any] | None = None
        if self._stats is not None:
            tensors |= {"stats.mean": self._stats.mean, "stats.var": self._stats.var}
            if self._stats.cov is not None:
                tensors["stats.cov"] = self._stats.cov
            stats_config = {
                "num_images": self._stats.num_images, "encoder": dict(self._stats.encoder), "data": self._stats.data
            }  # fmt: skip
        info = self.encoder.info
        here = info.route == "local" or Path(info.model_id).exists()
        encoder = {
            "name": info.name, "licence": info.licence, "gated": info.gated, "layers": list(self.encoder.layers),
            "hub_id": None if here else f"{'timm/' * (info.route == 'timm')}{info.model_id}",
            "inside": self.encoder_dir is not None,
        }  # fmt: skip
        config = {
            "tokenizer": self.spec.model_dump(mode="json"), "latent_shape": list(self.latent_shape),
            "image_size": list(self.spec.image_size), "encoder": encoder, "stats": stats_config, "extra": self.extra,
        }  # fmt: skip
        return save_artefact(path, kind="tokenizer", config=config, tensors=tensors, encoder=self.encoder_dir)


def read_parts(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[TokenizerSpec, ViTDecoder, LatentStats | None]:
    """Spec, decoder and statistics in a tokenizer artefact; CheckpointError for a tokenizer without a decoder."""
    kind = config["tokenizer"].get("kind", "rae")
    if kind != "rae":
        hint = "It has no decoder of its own; raev2.tokenizer.baselines.load_tokenizer opens it."
        raise CheckpointError(where, "not an RAE", got=kind, hint=hint)
    spec, stats = TokenizerSpec.model_validate(config["tokenizer"], context=FILE), config["stats"]
    build = partial(ViTDecoder, tensors["decoder.embed.weight"].shape[1], spec.decoder, spec.grid)
    decoder = build_strict(build, part(tensors, "decoder."), where)
    if stats is not None:
        stats = LatentStats(tensors["stats.mean"], tensors["stats.var"], cov=tensors.get("stats.cov"), **stats)
    return spec, decoder, stats


def token_noise(shape: tuple[int, int, int], tau: float, distribution: str, generator: torch.Generator) -> Tokens:
    """sigma * noise with one sigma per sample; added to tokens, so that the decoder accepts imperfect latents.

    uniform: sigma = tau * U[0, 1), as in the released code     half_normal: sigma = |N(0, tau^2)|, as in the paper

    Drawn on the device of the generator: a CPU generator gives the same noise for every accelerator.

    Source: RAE, section 3.3
    """
    per_sample, device = (shape[0], 1, 1), generator.device
    if distribution == "uniform":
        sigma = tau * torch.rand(per_sample, generator=generator, device=device)
    else:
        sigma = tau * torch.randn(per_sample, generator=generator, device=device).abs()
    return sigma * torch.randn(shape, generator=generator, device=device)
