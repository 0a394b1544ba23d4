"""A training step of a recipe's generator, `raev2 bench imagenet`: a published system on a GPU, quickstart on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from raev2.batch import Measurement
from raev2.flow import interpolate, training_loss
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.spec import RunSpec
from raev2.training.ema import EMA
from raev2.training.optim import build_optimizer
from raev2.training.run import make_accelerator, update
from raev2_tasks.bench.measure import timed
from raev2_tasks.imagenet.recipes import RECIPES

# Recipe, latents, and settings: compiled, batch size.
PUBLISHED = "raev2-dinov3l-k7", (1024, 16, 16), ((False, 32), (False, 64), (True, 64))
EMBEDDED = "quickstart", (192, 8, 8), ((False, 32),)


def bench_recipe() -> list[Measurement]:
    """Forward, backward, optimizer and averages in bf16, random latents; eager, and on a GPU compiled too."""
    device = make_accelerator("bf16").device
    name, latents, settings = PUBLISHED if device.type == "cuda" else EMBEDDED
    found: list[Measurement] = []
    for compiled, batch_size in settings:
        try:
            found += _measured(RECIPES[name](), latents, batch_size, device, compiled)
        except torch.OutOfMemoryError:
            found.append(Measurement(f"{name}, batch {batch_size}", 0, "images/s", "out of memory"))
    return found


def _measured(
    spec: RunSpec, latents: tuple[int, int, int], batch_size: int, device: torch.device, compiled: bool
) -> Iterator[Measurement]:
    with FlopCounterMode(display=False) as counter:
        training_step(spec, latents, batch_size, device, False)()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = median(timed({"step": training_step(spec, latents, batch_size, device, compiled)}, rounds=5)["step"])
    where = f"{spec.recipe}, batch {batch_size}, {'compiled' if compiled else 'eager'}"
    note = f"bf16, {spec.generator_training.optimizer.kind}, averages"
    yield Measurement(f"{where}: training step", batch_size / seconds, "images/s", note)
    yield Measurement(f"{where}: arithmetic", counter.get_total_flops() / seconds / 1e12, "TFLOP/s", note)
    if device.type == "cuda":
        yield Measurement(f"{where}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", "allocated")


def training_step(
    spec: RunSpec, latents: tuple[int, int, int], batch_size: int, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """A function that trains the recipe's generator by one step on random latents (C, H, W)."""
    torch.manual_seed(0)
    loop = spec.generator_training
    generator = Generator(spec.generator, LabelCondition(num_classes=1000), spec.flow, latents).to(device)
    net = torch.compile(generator) if compiled else generator
    optimizer, ema = build_optimizer(generator, loop.optimizer, 1e-4), EMA(generator, loop.ema_decays)
    clean, noise = torch.randn(2, batch_size, *latents, device=device).unbind()
    cond = {"label": torch.arange(batch_size, device=device) % 1000}
    point = interpolate(clean, noise, torch.linspace(0.1, 0.9, batch_size, device=device))
    tokens = latents[1] * latents[2] // spec.generator.patch_size**2
    target = (
        torch.randn(batch_size, tokens, spec.generator.repa_dim, device=device) if spec.generator.repa_dim else None
    )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            output = net(point.z_t, point.t, cond)
        loss = training_loss(output, point, clean, spec.flow, base_weight=loop.base_weight, repa_target=target).total
        loss.backward()
        update(optimizer, list(generator.parameters()), loss.detach(), loop.clip_grad_norm)
        ema.update(generator, 1)

    return step
