"""The six feature spaces of FDr^6 and MIND, and these two numbers. Read `SPACES` first.

Inception is the core's. The others are networks of timm, prepared as the published evaluation does: bicubic to a side,
without clamping what the resize overshoots, then the network's own normalisation. On CUDA a backbone computes in
bfloat16, everywhere else in float32; the last convolution map of ConvNeXt is averaged as it is, without the norm of
its classifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from raev2.batch import MetricResult
from raev2.errors import DataError
from raev2.eval.features import INCEPTION, FeatureExtractor, InceptionFeatures, frechet_name
from raev2.eval.sets import Scale, SetFeatures, compare
from raev2.files.assets import INCEPTION_WEIGHTS, Asset
from raev2.files.hashes import file_sha256, json_sha256
from raev2.shapes import ImagesU8
from raev2.training import dist


class Space(NamedTuple):
    """A feature space.

    model    of timm
    output   'token': the class token; 'mean': of the last map; 'pool': the network's attention pool
    side     pixels that pictures are resized to; a ViT pads what its patches do not fill
    fd_val   published Fréchet distance of the 50,000 validation pictures of ImageNet to the training ones
    """

    model: str
    output: Literal["token", "mean", "pool"]
    side: int
    dim: int
    fd_val: float


SPACES = {
    "convnext": Space("convnextv2_base.fcmae_ft_in22k_in1k", "mean", 224, 1024, 56.87),
    "dinov2": Space("vit_large_patch14_dinov2.lvd142m", "token", 256, 1024, 14.19),
    "mae": Space("vit_large_patch16_224.mae", "token", 224, 1024, 0.04),
    "siglip": Space("vit_so400m_patch16_siglip_256.v2_webli", "pool", 256, 1152, 0.60),
    "clip": Space("vit_large_patch14_clip_224.openai", "token", 256, 1024, 5.60),
}
FD_VAL = {INCEPTION: 1.68, **{name: space.fd_val for name, space in SPACES.items()}}
NUM_DIRECTIONS = 1000


class TimmFeatures(FeatureExtractor):
    """A network of timm as one of the spaces."""

    def __init__(self, name: str, space: Space, device: torch.device) -> None:
        import timm

        file = _weights(space.model)
        options: dict[str, Any] = {"pretrained": True, "num_classes": 0, "pretrained_cfg_overlay": {"file": str(file)}}
        if space.output != "mean":
            options |= {"dynamic_img_size": True, "dynamic_img_pad": True}
        network: Any = timm.create_model(space.model, **options)
        self.network = network.to(device).eval().requires_grad_(False)
        stats = [torch.tensor(network.pretrained_cfg[key], device=device) for key in ("mean", "std")]
        self.mean, self.std = (255 * value.view(3, 1, 1) for value in stats)
        self.name, self.model, self.dim, self.space, self.device = name, space.model, space.dim, space, device
        precision = "bf16" if device.type == "cuda" and space.output != "mean" else "fp32"
        self.preparation = f"{space.model}: bicubic to {space.side} px, antialiased; {space.output}; {precision}"
        self.fingerprint = json_sha256([self.preparation, file_sha256(file)])

    @torch.no_grad()
    def __call__(self, images_u8: ImagesU8) -> Float[Tensor, "B D"]:
        """Features of one vector a picture."""
        images, side, output = images_u8.to(self.device).float(), self.space.side, self.space.output
        if images.shape[2:] != (side, side):
            images = interpolate(images, (side, side), mode="bicubic", antialias=True)
        half = self.device.type == "cuda" and output != "mean"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            features = self.network.forward_features((images - self.mean) / self.std)
        features = features.float()
        if output == "pool":
            return self.network.attn_pool(features).cpu()
        return (features[:, 0] if output == "token" else features.mean((2, 3))).cpu()


def build_space(name: str, device: torch.device) -> FeatureExtractor:
    """The feature network of a space: 'inception' or a name in `SPACES`."""
    return InceptionFeatures(device) if name == INCEPTION else TimmFeatures(name, SPACES[name], device)


def space_needs(name: str) -> list[Asset]:
    """The weights of a space; the other spaces come out without it."""
    without = "the space is left out"
    if name == INCEPTION:
        return [replace(INCEPTION_WEIGHTS, without=without)]
    model = SPACES[name].model
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{model}.safetensors"
    return [Asset(f"space {name}", str(file) if file.is_file() else f"timm/{model}", without=without)]


def distances_alone(
    extractor: FeatureExtractor, pictures: SetFeatures, reference: SetFeatures, scale: Scale | None = None
) -> Iterator[MetricResult]:
    """What `compare` yields of Fréchet distances; manifolds of 50,000 pictures in six spaces would take hours."""

    def bare(own: SetFeatures) -> SetFeatures:
        return replace(own, more={})

    if scale is not None:
        scale = Scale(bare(scale.floor), bare(scale.held_out), bare(scale.blocks))
    return compare(extractor, bare(pictures), replace(bare(reference), rows=None), scale)


def fdr6(results: Sequence[MetricResult]) -> Iterator[MetricResult]:
    """FDr of each space, FD over FD of real validation pictures, and FDr^6, their mean, where all six are there.

    With validation pictures at hand both have equal numbers; else the denominator is the published one.
    """
    found = {result.name: result for result in results}
    ratios = []
    for space in FD_VAL:
        name = frechet_name(space)
        measured = found.get("fid_ratio" if name == "fid" else f"fd_ratio_{space}")
        if measured is None and name not in found:
            continue
        value = found[name].value / FD_VAL[space] if measured is None else measured.value
        note = f"FD_val {FD_VAL[space]:g} as published for ImageNet" if measured is None else "FD_val measured here"
        ratios.append(value)
        yield MetricResult(
            f"fdr_{space}", value, (measured or found[name]).num_samples, None, note, better="lower", role="detail",
            about=f"{name} over that of real validation pictures; 1 is as close to training pictures as those are.",
        )  # fmt: skip
    if len(ratios) == len(FD_VAL):
        yield MetricResult(
            "fdr6", sum(ratios) / len(ratios), found["fid"].num_samples, better="lower", role="headline",
            about="FDr^6: mean over six feature spaces of FD over FD_val; real validation pictures have 1.",
        )  # fmt: skip


def mind(features: Float[Tensor, "S D"], reference: Float[Tensor, "R D"], seed: int = 2020) -> float:
    """Monge Inception Distance: mean over directions of the squared Wasserstein-2 distance in one dimension, times 3 D.

    The larger set is cut to a random subset, then 1000 normal directions are drawn, from one generator.

    Source: arXiv 2605.06797
    """
    generator, num = torch.Generator().manual_seed(seed), min(len(features), len(reference))
    one, two = (
        rows[torch.randperm(len(rows), generator=generator)[:num]].float() if len(rows) > num else rows.float()
        for rows in (features, reference)
    )
    directions = normalize(torch.randn(NUM_DIRECTIONS, one.shape[1], generator=generator), dim=1)
    costs = [
        ((one @ some.T).sort(0).values - (two @ some.T).sort(0).values).double().square().mean(0)
        for some in directions.split(100)
    ]
    return float(3 * one.shape[1] * torch.cat(costs).mean())


def mind_of(
    extractor: FeatureExtractor, pictures: SetFeatures, reference: SetFeatures, scale: Scale | None = None
) -> Iterator[MetricResult]:
    """MIND in one space against real validation pictures; beside it that of real training pictures."""

    def distance(own: SetFeatures) -> float:
        one, two = own.rows, reference.rows
        if one is None or two is None:
            hint = "Give a folder of pictures."
            raise DataError("MIND", "needs features of reference pictures, not their statistics", hint=hint)
        return dist.on_main(lambda: mind(one, two))

    name, about = f"mind_{extractor.name}", f"Monge Inception Distance in the space of '{extractor.name}'"
    row, note = partial(MetricResult, better="lower"), f"against pictures of {reference.name}"
    num = pictures.moments.count or 0
    yield row(name, distance(pictures), num, note=note, role="detail", about=f"{about}: along random directions.")
    if scale is None:
        return
    for own, kind in ((scale.held_out, scale.held_out.name), (scale.blocks, "shuffled")):
        what = f"{about} of real pictures of '{own.name}'" + (", in blocks, shuffled." if kind == "shuffled" else ".")
        yield row(f"{name}_{kind}", distance(own), num, note=note, role="scale", of=name, about=what)


def mind6(results: Sequence[MetricResult]) -> Iterator[MetricResult]:
    """The mean of MIND over the six spaces, where all are there."""
    values = [result for result in results if result.name.removeprefix("mind_") in FD_VAL]
    if len(values) == len(FD_VAL):
        yield MetricResult(
            "mind6", sum(result.value for result in values) / len(values), values[0].num_samples, better="lower",
            role="headline", about="Monge Inception Distance, mean over six feature spaces.",
        )  # fmt: skip


def _weights(model: str) -> Path:
    """Weights in torch's cache, or from the hub: downloaded, or in its cache already."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{model}.safetensors"
    if file.is_file():
        return file
    from huggingface_hub import hf_hub_download

    found, failure = None, ""
    if dist.is_main():
        try:
            found = Path(hf_hub_download(f"timm/{model}", "model.safetensors"))
        except Exception as error:  # network, access and file errors of several libraries
            failure = str(error).split("\n")[0]
    found, failure = dist.from_main((found, failure))
    if found is None:
        raise DataError(
            f"weights {file}", f"the weights of {model} are missing", got=failure,
            hint=f"Download https://huggingface.co/timm/{model}/resolve/main/model.safetensors and put it there.",
        )  # fmt: skip
    return found
