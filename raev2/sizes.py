"""Numbers that a spec stands for, without data, weights or training: shapes, parameters, compute, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from raev2.model.generator import ModelSize, model_size
from raev2.spec import (
    AdamWSpec,
    AnyTokenizerSpec,
    EncoderSpec,
    OptimizerSpec,
    PixelSpec,
    RunSpec,
    TokenizerSpec,
    VAESpec,
)
from raev2.task import Task
from raev2.tokenizer.baselines import VAES, build_tokenizer
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoder_table import ENCODERS, EncoderInfo
from raev2.tokenizer.encoders import build_encoder

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Latents (C, H, W), parameters of the decoder (0: there is none), and the generator."""

    latent_shape: tuple[int, int, int]
    decoder: int
    generator: ModelSize


def sizes_of(task: Task, spec: RunSpec) -> Sizes:
    """Count without data, weights or training."""
    tokenizer, decoder = spec.tokenizer, 0
    shape = latent_shape_of(tokenizer)
    if isinstance(tokenizer, TokenizerSpec):
        with torch.device("meta"):
            layout = ViTDecoder(shape[0], tokenizer.decoder, tokenizer.grid)
        decoder = sum(value.numel() for value in layout.state_dict().values())  # with its position table
    return Sizes(shape, decoder, model_size(spec.generator, task.condition(spec, None), shape))


def run_sizes(task: Task, spec: RunSpec) -> list[tuple[str, str]]:
    """Parameters, compute and memory of a run by name, without data, weights or training."""
    sizes, tokenizer, loop = sizes_of(task, spec), spec.tokenizer, spec.tokenizer_training
    shape, size = sizes.latent_shape, sizes.generator
    state = state_bytes(size.num_parameters, spec.generator_training.optimizer, len(spec.generator_training.ema_decays))
    height, width = tokenizer.image_size
    rows = [("tokenizer", "none, pixels in [-1, 1]")]
    if isinstance(tokenizer, VAESpec):
        vae = VAES.get(tokenizer.name)
        rows = [("tokenizer", f"VAE {vae.model_id}, licence {vae.licence}" if vae else f"VAE {tokenizer.name}")]
    if isinstance(tokenizer, TokenizerSpec):
        layers = list(tokenizer.encoder.layers) or "last"
        licence = encoder_facts(tokenizer.encoder.name).licence
        rows = [
            ("encoder", f"{tokenizer.encoder.name}, layers {layers}, licence {licence}"),
            ("decoder parameters", f"{sizes.decoder / 1e6:.2f} M"),
            ("tokenizer steps", f"{loop.num_steps:,} of {loop.batch_size} images"),
        ]
    return [
        *rows,
        ("images", f"{height} x {width} px"),
        ("latents", " x ".join(map(str, shape))),
        ("image tokens", str(shape[1] * shape[2] // spec.generator.patch_size**2)),
        ("time shift", f"{spec.flow.shift_for(shape):.4g}"),
        ("generator parameters", f"{size.num_parameters / 1e6:.2f} M"),
        ("generator forward", f"{size.macs / 1e9:.2f} GMAC = {2 * size.macs / 1e9:.2f} GFLOPs an image"),
        ("sampling", f"{spec.sampling.steps} steps, {spec.sampling.guidance.kind}"),
        ("training state", f"{state / GIB:.2f} GiB a process (weights, gradients, averages, optimizer)"),
        ("generator steps", f"{spec.generator_training.num_steps:,} of {spec.generator_training.batch_size} images"),
    ]


def activation_bytes(build: Callable[[], tuple[nn.Module, tuple[Any, ...]]], precision: str) -> int:
    """What autograd keeps between forward and backward, in bytes; counted on tensors without memory.

    build   returns the network and the inputs of its forward; called where tensors have no memory
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    bf16 = precision == "bf16"
    with FakeTensorMode(), saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=bf16):
        network, inputs = build()
        output = network(*inputs)  # alive until the count, with what it keeps
        weights = list(network.parameters())
        own = {weight.untyped_storage()._cdata for weight in weights}
        casts = 2 * sum(weight.numel() for weight in weights) if bf16 else 0  # one for the batch, not one an image
        found = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    del output
    return max(found - casts, 0)


def latent_shape_of(tokenizer: AnyTokenizerSpec) -> tuple[int, int, int]:
    """(C, H, W) of the latents of a tokenizer, without loading it where its facts are known."""
    if isinstance(tokenizer, PixelSpec):
        return 3, *tokenizer.image_size
    if isinstance(tokenizer, TokenizerSpec):
        return encoder_facts(tokenizer.encoder.name).width, *tokenizer.grid
    vae = VAES.get(tokenizer.name)
    if vae is None:  # only the model itself knows
        return build_tokenizer(tokenizer).latent_shape
    height, width = (side // vae.downsample for side in tokenizer.image_size)
    return vae.channels, height, width


def encoder_facts(name: str) -> EncoderInfo:
    """Facts about an encoder of the table, or those that its model or folder says."""
    return ENCODERS.get(name) or build_encoder(EncoderSpec(name=name), (1, 1), pretrained=False).info


def state_bytes(parameters: int, optimizer: OptimizerSpec, averages: int) -> int:
    """Weights, gradients, averages and moments in float32; Muon has one moment, AdamW two."""
    return (2 + averages + (2 if isinstance(optimizer, AdamWSpec) else 1)) * 4 * parameters
