"""Feature networks for metrics: 8-bit images -> one float32 vector each, and more outputs of the same pass.

A metric carries the name of its feature network: `fd_micro` is a Fréchet distance in the space of the encoder
'micro'. The name FID belongs to Inception features alone. No network runs under autocast here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from raev2.data import to_float
from raev2.errors import DataError
from raev2.files.assets import INCEPTION_WEIGHTS, Asset, need_package
from raev2.files.hashes import json_sha256
from raev2.shapes import ImagesU8
from raev2.spec import EncoderSpec
from raev2.tokenizer.encoder_table import ENCODERS, encoder_asset
from raev2.tokenizer.encoders import FrozenEncoder, build_encoder
from raev2.training import dist

INCEPTION, LOGITS, SPATIAL = "inception", "logits", "spatial"


class FeatureExtractor(ABC):
    """A frozen network that describes an image by one vector.

    name          part of the metric names
    dim           length of the vector
    preparation   how images are resized and normalised, in words, for the result files
    fingerprint   SHA-256 of the network's name, preparation and weights
    more          length of further outputs of the same pass, by name
    model         what files of published statistics have in their names
    """

    name: str
    dim: int
    preparation: str
    fingerprint: str
    more: Mapping[str, int] = MappingProxyType({})
    model: str = ""

    @abstractmethod
    def __call__(self, images_u8: ImagesU8) -> Float[Tensor, "B D"]:
        """Features of 8-bit images, float32 on the CPU."""

    def outputs(self, images_u8: ImagesU8) -> dict[str, Tensor]:
        """All outputs by name; '' has the features."""
        return {"": self(images_u8)}


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
    """The 2048 pool features of `inception-v3-compat` of torch-fidelity: the network of FID, with its own resize.

    More: `logits` without bias, of the Inception Score, and `spatial`, of sFID: the first 7 channels of the block
    `mixed_6` of TensorFlow, 17 x 17, channels last as ADM's statistics have them.

    file   weights; None: those of FID
    """

    name, model, dim, more = INCEPTION, INCEPTION, 2048, MappingProxyType({LOGITS: 1008, SPATIAL: 17 * 17 * 7})
    preparation = "torch-fidelity inception-v3-compat: TensorFlow 1 bilinear resize to 299 px, pool features"

    def __init__(self, device: torch.device, file: Path | None = None) -> None:
        need_package("features inception", INCEPTION_WEIGHTS.package)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if file is None:  # its hash is checked: it is a pickle that others load for us
            dist.on_main(INCEPTION_WEIGHTS.fetch)
        file, self.device = file or INCEPTION_WEIGHTS.place, device
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
        ).to(device)
        self.network.Mixed_6d.register_forward_hook(self._keep)
        self.fingerprint = json_sha256([self.preparation, file.name])  # the name holds the hash, which was checked

    def __call__(self, images_u8: ImagesU8) -> Float[Tensor, "B D"]:
        """Pool features."""
        return self.outputs(images_u8)[""]

    def outputs(self, images_u8: ImagesU8) -> dict[str, Tensor]:
        """Pool features, `logits` and `spatial`."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            pool, logits = self.network(images_u8.to(self.device))
        found = {"": pool, LOGITS: logits, SPATIAL: self.spatial}
        return {name: value.float().cpu() for name, value in found.items()}

    def _keep(self, block: object, inputs: object, output: Tensor) -> None:
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)


def build_extractor(name: str, device: torch.device) -> FeatureExtractor:
    """The feature network with this name: 'inception', or any encoder of `raev2 encoders`."""
    return InceptionFeatures(device) if name == INCEPTION else EncoderFeatures(name, device)


def extractor_needs(name: str) -> list[Asset]:
    """Weights that `build_extractor` reads."""
    return [INCEPTION_WEIGHTS] if name == INCEPTION else [encoder_asset(name)]


class NotFinite(DataError):
    """Features that are no numbers: evaluation ends, training goes on without this evaluation."""


def not_finite(numbers: Sequence[int], outputs: Mapping[str, Tensor]) -> list[int]:
    """Numbers of the pictures that have an output which is not finite."""
    fine = torch.stack([value.isfinite().all(1) for value in outputs.values()]).all(0)
    return [number for number, good in zip(numbers, fine.tolist(), strict=True) if not good]


def check_finite(space: str, pictures: str, bad: Sequence[int]) -> None:
    """Raise NotFinite on all processes, with space and pictures in it, where one of them has found bad ones."""
    bad = sorted({number for part in dist.gather_objects(list(bad)) for number in part})
    if bad:
        raise NotFinite(
            f"features '{space}' of {pictures}", f"not finite for {len(bad):,} pictures",
            got=f"numbers {', '.join(map(str, bad[:5]))}", hint="The feature network or its weights are broken.",
        )  # fmt: skip


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
