"""What a training costs, counted on networks without memory: arithmetic by torch's counter, memory as training does.

Nothing here is a formula of ours but the sum of memory: a step is run on tensors that have a shape and no values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raev2.model.generator import Generator
from raev2.spec import RunSpec, TokenizerSpec
from raev2.task import Task
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoder_table import ENCODERS
from raev2.tokenizer.encoders import ASSETS, ROUTES, Trunk
from raev2.training.preflight import (
    GENERATOR,
    GIB,
    TOKENIZER,
    USABLE,
    StepMemory,
    generator_memory,
    network_of,
    state_bytes,
)

GPU_GIB = 80  # of the card that `raev2 show` plans for
NUM_GPUS = (1, 8, 64)
PROJECTIONS = ("mm", "addmm", "convolution")  # operations with weights; the rest is attention
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Arithmetic:
    """Multiply-accumulates of a forward of one sample: all of them, and those of attention, which papers leave out."""

    macs: int
    attention: int

    def __str__(self) -> str:
        attention = f", {self.attention / 1e9:.2f} GMAC of it attention"
        return f"{self.macs / 1e9:.2f} GMAC = {2 * self.macs / 1e9:.2f} GFLOPs an image{attention}"


def cost_rows(task: Task, spec: RunSpec) -> Rows:
    """(what, how much) of compute and memory of a recipe. Takes seconds."""
    rows, frozen = _tokenizer_rows(task, spec)
    generator = network_of(task, spec, GENERATOR)
    assert isinstance(generator, Generator)
    forward, parameters = generator_arithmetic(generator), sum(value.numel() for value in generator.parameters())
    return [
        *rows,
        ("generator forward", str(forward)),
        _sampling(spec, forward),
        *_memory(task, spec, parameters, frozen),
    ]


def generator_arithmetic(generator: Generator) -> Arithmetic:
    """Of a generator on the meta device."""
    latents, times = torch.zeros(1, *generator.latent_shape, device="meta"), torch.zeros(1, device="meta")
    return arithmetic(lambda: generator(latents, times, generator.conditioner.example_cond(1, "meta")))


def arithmetic(forward: Callable[[], object]) -> Arithmetic:
    """Count a forward on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    counts = {
        str(operation).rpartition(".")[2]: count for operation, count in counter.get_flop_counts()["Global"].items()
    }
    total = sum(counts.values())
    return Arithmetic(total // 2, (total - sum(counts.get(name, 0) for name in PROJECTIONS)) // 2)


def _tokenizer_rows(task: Task, spec: RunSpec) -> tuple[Rows, int]:
    """Lines about encoder and decoder, and the bytes of their weights, which stage 2 holds too."""
    if not isinstance(spec.tokenizer, TokenizerSpec):
        return [], 0
    decoder, trunk, rows = network_of(task, spec, TOKENIZER), _trunk(spec.tokenizer), []
    if trunk is not None:
        side = [length * trunk.patch_size for length in spec.tokenizer.grid]
        layers = spec.tokenizer.encoder.layers or (trunk.depth - 1,)
        pixels = torch.zeros(1, 3, *side, device="meta")
        rows.append(("encoder forward", str(arithmetic(lambda: trunk.block_outputs(pixels, layers)))))
    assert isinstance(decoder, ViTDecoder)
    tokens = torch.zeros(1, math.prod(spec.tokenizer.grid), decoder.embed.in_features, device="meta")
    rows.append(("decoder forward", str(arithmetic(lambda: decoder(tokens)))))
    return rows, sum(_weight_bytes(part) for part in (decoder, trunk) if part is not None)


def _trunk(spec: TokenizerSpec) -> Trunk | None:
    """The encoder on the meta device; None where only a download would tell its shape."""
    info = ENCODERS.get(spec.encoder.name)
    if info is None or info.route == "transformers":
        return None
    source = str(ASSETS / info.model_id) if info.route == "local" else info.model_id
    with torch.device("meta"):
        return ROUTES[info.route](info.name, source, info, spec.grid, False)[0]


def _weight_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * 4 for parameter in module.parameters())


def _sampling(spec: RunSpec, forward: Arithmetic) -> tuple[str, str]:
    needs = spec.sampling.guidance.needs
    forwards = 1 + ("condition" in needs) + ("weak generator" in needs)
    steps = spec.sampling.steps if spec.sampling.solver == "euler" else 2 * spec.sampling.steps - 1
    tflops = 2 * forward.macs * forwards * steps / 1e12
    return "sampling an image", f"at most {tflops:.2f} TFLOPs: {steps} evaluations of {forwards} forward(s)"


def _memory(task: Task, spec: RunSpec, parameters: int, frozen: int) -> Iterator[tuple[str, str]]:
    """A step of stage 2, and what a GPU of several would hold."""
    step = generator_memory(task, spec)
    yield "activations", f"{step.sample / 2**20:.0f} MiB an image in {spec.precision}, not compiled"
    for num in NUM_GPUS:
        yield f"{num} GPU{'s' * (num > 1)} of {GPU_GIB} GiB", _plan(spec, num, frozen, parameters, step)


def _plan(spec: RunSpec, num: int, frozen: int, parameters: int, step: StepMemory) -> str:
    """The micro batch that training would choose, and its memory."""
    shards = {"ddp": 1, "fsdp": num, "hsdp": min(num, 8)}[spec.parallel.strategy]
    state = state_bytes(parameters, spec.generator_training) / shards
    share = math.ceil(spec.generator_training.batch_size / num)
    micro = spec.generator_training.micro_batch_size or step.fit(share, USABLE * GPU_GIB * GIB - frozen - state)
    needed = (frozen + state + step.needs(micro)) / GIB
    if needed > USABLE * GPU_GIB:
        return f"does not fit: {needed:.1f} GiB for {micro} at once; set parallel.strategy=fsdp"
    return f"micro batch {micro}: about {needed:.1f} GiB each ({state / GIB:.1f} of it training state)"
