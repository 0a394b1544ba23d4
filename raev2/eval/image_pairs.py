"""Scores of an image against its original, one number a pair. Pairs are matched by index; nothing is averaged here.

All functions take 8-bit images, so what is scored is what would be saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from raev2.data import to_float
from raev2.errors import DataError
from raev2.eval.features import load_encoder
from raev2.files.assets import LPIPS_WEIGHTS, Asset
from raev2.shapes import ImagesU8
from raev2.tokenizer.encoder_table import encoder_asset
from raev2.tokenizer.encoders import FrozenEncoder

MAX_PSNR_DB = 100.0


def psnr(images_u8: ImagesU8, reference_u8: ImagesU8) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio in dB: -10 log10(MSE) of values in [0, 1]; identical images score 100."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # seconds to import

    values = peak_signal_noise_ratio(
        to_float(images_u8), to_float(reference_u8), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=MAX_PSNR_DB)


def ssim(images_u8: ImagesU8, reference_u8: ImagesU8) -> Float[Tensor, " B"]:
    """Structural similarity, 1 = identical; Gaussian window of 11 pixels with sigma 1.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        to_float(images_u8), to_float(reference_u8), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)  # a tuple only when the full map is asked for
    return values.reshape(len(images_u8))


class PairDistance(ABC):
    """A perceptual distance of image pairs, 0 = identical. `name` and `about` are those of the metric."""

    name: str
    about: str

    @abstractmethod
    def __call__(self, images_u8: ImagesU8, reference_u8: ImagesU8) -> Float[Tensor, " B"]:
        """One distance a pair."""


class LPIPS(PairDistance):
    """LPIPS through torchmetrics, named `lpips_vgg` or `lpips_alex`: the two differ several-fold."""

    def __init__(self, backbone: Literal["vgg", "alex"], device: torch.device) -> None:
        if not lpips_available(backbone):
            raise LPIPS_WEIGHTS[backbone].error()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.name = f"lpips_{backbone}"
        self.about = f"LPIPS with the {backbone} backbone; 0 is identical, and other backbones differ several-fold."
        self.metric = LearnedPerceptualImagePatchSimilarity(backbone, reduction="none", normalize=True).to(device)
        self.device = device

    def __call__(self, images_u8: ImagesU8, reference_u8: ImagesU8) -> Float[Tensor, " B"]:
        """LPIPS of each pair."""
        with torch.no_grad():
            values = self.metric.net(
                to_float(images_u8.to(self.device)), to_float(reference_u8.to(self.device)), normalize=True
            )
        return values.flatten().cpu()


class FeatureDistance(PairDistance):
    """Distance of unit-normalised tokens of a frozen encoder, named `feature_distance_<encoder>`.

    mean over layers and tokens of |u(f) - u(f_reference)|^2 = 2 - 2 cos, with u(f) = f / |f|

    It stands in for LPIPS where no weights can be fetched. Its values are not comparable with LPIPS.

    tokens   float images in [0, 1] (B, 3, Hpx, Wpx) -> tokens (B, N, D) of each layer
    """

    def __init__(self, encoder: str, tokens: Callable[[Tensor], Sequence[Tensor]], device: torch.device) -> None:
        self.name, self.tokens, self.device = f"feature_distance_{encoder}", tokens, device
        self.about = (
            f"Squared distance of unit tokens of the encoder '{encoder}', over four layers; not LPIPS, 0 is equal."
        )

    @classmethod
    def of_encoder(cls, encoder: FrozenEncoder, device: torch.device) -> FeatureDistance:
        """The distance over four blocks spread evenly through an encoder, the last one included."""
        layers = sorted({max((quarter * encoder.depth) // 4 - 1, 0) for quarter in (1, 2, 3, 4)})
        return cls(encoder.spec.name, lambda images: encoder.layers_tokens(images, layers), device)

    def __call__(self, images_u8: ImagesU8, reference_u8: ImagesU8) -> Float[Tensor, " B"]:
        """Feature distance of each pair, between 0 and 4."""
        with torch.no_grad():
            ours, theirs = (self.tokens(to_float(images.to(self.device))) for images in (images_u8, reference_u8))
            layers = [
                (normalize(a.float(), dim=-1) - normalize(b.float(), dim=-1)).square().sum(-1).mean(-1)
                for a, b in zip(ours, theirs, strict=True)
            ]
        return torch.stack(layers).mean(0).cpu()


def lpips_available(backbone: str) -> bool:
    """Whether LPIPS can be computed here without a download."""
    return LPIPS_WEIGHTS[backbone].folder() is not None


def pair_needs(name: str, without: str = "") -> list[Asset]:
    """Weights that `build_pair_distance` reads. `without`: the distance that is used when they are missing."""
    if name.startswith("lpips_"):
        return [replace(LPIPS_WEIGHTS[name.removeprefix("lpips_")], without=without and f"{without} is used instead")]
    return [encoder_asset(name.removeprefix("feature_distance_"))]


def build_pair_distance(name: str, device: torch.device) -> PairDistance:
    """A perceptual distance by the name of its metric: 'lpips_vgg', 'lpips_alex' or 'feature_distance_<encoder>'."""
    kind = "lpips" if name.startswith("lpips_") else "feature_distance"
    model = name.removeprefix(f"{kind}_")
    if kind == "lpips" and model in LPIPS_WEIGHTS:
        return LPIPS("vgg" if model == "vgg" else "alex", device)
    if kind == "feature_distance" and model != name:
        return FeatureDistance.of_encoder(load_encoder(model, device), device)
    raise DataError(
        "metric", "unknown perceptual distance", got=repr(name),
        expected="lpips_vgg, lpips_alex or feature_distance_<encoder>",
    )  # fmt: skip
