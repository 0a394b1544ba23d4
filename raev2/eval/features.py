"""Feature networks for metrics: 8-bit images -> one float32 vector each.

A metric carries the name of its feature network: `fd_micro` is a Fréchet distance in the space of the encoder
'micro'. The name FID belongs to Inception features alone. No network runs under autocast here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from raev2.data import to_float
from raev2.errors import DataError
from raev2.files.assets import INCEPTION_WEIGHTS, Asset
from raev2.files.hashes import json_sha256
from raev2.shapes import ImagesU8
from raev2.spec import EncoderSpec
from raev2.tokenizer.encoder_table import ENCODERS, encoder_asset
from raev2.tokenizer.encoders import FrozenEncoder, build_encoder
from raev2.training import dist

INCEPTION = "inception"


class FeatureExtractor(ABC):
    """A frozen network that describes an image by one vector.

    name          part of the metric names
    dim           length of the vector
    preparation   how images are resized and normalised, in words, for the result files
    fingerprint   SHA-256 of the network's name, preparation and weights
    """

    name: str
    dim: int
    preparation: str
    fingerprint: str

    @abstractmethod
    def __call__(self, images_u8: ImagesU8) -> Float[Tensor, "B D"]:
        """Features of 8-bit images, float32 on the CPU."""


class EncoderFeatures(FeatureExtractor):
    """Mean over the patch tokens of a registered encoder, last block, its default final norm."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.encoder = load_encoder(name, device)
        height, width = self.encoder.input_size
        self.preparation = f"bicubic to {height} x {width} px, antialiased when shrinking; mean of the patch tokens"
        self.fingerprint = json_sha256([self.preparation, self.encoder.fingerprint()])
        self.dim = self.encoder.width

    def __call__(self, images_u8: ImagesU8) -> Float[Tensor, "B D"]:
        """Mean patch token."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.encoder(to_float(images_u8.to(self.device))).float().mean(1).cpu()


class InceptionFeatures(FeatureExtractor):
    """The 2048 pool features of `inception-v3-compat` of torch-fidelity: the network of FID, with its own resize."""

    name, dim = INCEPTION, 2048
    preparation = "torch-fidelity inception-v3-compat: TensorFlow 1 bilinear resize to 299 px, pool features"

    def __init__(self, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise DataError(
                "features inception", "torch-fidelity is not installed", hint="Run `pip install raev2[eval]`."
            ) from error
        dist.on_main(INCEPTION_WEIGHTS.fetch)
        self.device = device
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(INCEPTION_WEIGHTS.place)
        ).to(device)
        self.fingerprint = json_sha256(
            [self.preparation, INCEPTION_WEIGHTS.place.name]
        )  # the name holds the hash, which was checked

    def __call__(self, images_u8: ImagesU8) -> Float[Tensor, "B D"]:
        """Pool features."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.network(images_u8.to(self.device))[0].float().cpu()


def build_extractor(name: str, device: torch.device) -> FeatureExtractor:
    """The feature network with this name: 'inception', or any encoder of `raev2 encoders`."""
    return InceptionFeatures(device) if name == INCEPTION else EncoderFeatures(name, device)


def extractor_needs(name: str) -> list[Asset]:
    """Weights that `build_extractor` reads."""
    return [INCEPTION_WEIGHTS] if name == INCEPTION else [encoder_asset(name)]


def frechet_name(extractor_name: str) -> str:
    """Name of the Fréchet distance in a feature space: 'fid' for Inception, else 'fd_<name>'."""
    return "fid" if extractor_name == INCEPTION else f"fd_{extractor_name}"


def frechet_about(extractor_name: str, sets: str) -> str:
    """What the Fréchet distance between two sets means, for a report."""
    if extractor_name == INCEPTION:
        return f"Fréchet Inception Distance of {sets}; compare at the same reference, number and preparation."
    return f"Fréchet distance of {sets} in features of '{extractor_name}'; not FID, which uses Inception."


def load_encoder(name: str, device: torch.device) -> FrozenEncoder:
    """A frozen encoder at its usual input size, whatever the size of the images."""
    info = ENCODERS.get(name)
    side = info.side if info else 16
    return build_encoder(EncoderSpec(name=name), (side, side)).to(device)
