"""What a training costs, counted on networks without memory: arithmetic by torch's counter, activations by autograd.

Nothing here is a formula of ours but the sum of memory: a forward is run on tensors that have a shape and no values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from raev2.model.generator import Generator
from raev2.spec import RunSpec, TokenizerSpec
from raev2.task import Task
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoder_table import ENCODERS
from raev2.tokenizer.encoders import ASSETS, ROUTES, Trunk
from raev2.training.preflight import GENERATOR, TOKENIZER, network_of, state_bytes

GIB = 2**30
GPU_GIB, USABLE = 80, 0.9  # the card that `raev2 show` plans for, and the share of it that is planned
NUM_GPUS = (1, 8, 64)
PROJECTIONS = ("mm", "addmm", "convolution")  # operations with weights; the rest is attention
Rows = list[tuple[str, str]]
Forward = Callable[[int], Tensor]  # number of samples -> output


@dataclass(frozen=True)
class Arithmetic:
    """Multiply-accumulates of a forward of one sample: all of them, and those of attention, which papers leave out."""

    macs: int
    attention: int

    def __str__(self) -> str:
        attention = f", {self.attention / 1e9:.2f} GMAC of it attention"
        return f"{self.macs / 1e9:.2f} GMAC = {2 * self.macs / 1e9:.2f} GFLOPs an image{attention}"


@dataclass(frozen=True)
class Activations:
    """Bytes that a training forward keeps for its backward: for each sample, and beside (weights in bfloat16)."""

    sample: int
    fixed: int


def cost_rows(task: Task, spec: RunSpec) -> Rows:
    """(what, how much) of compute and memory of a recipe. Takes seconds."""
    rows, frozen = _tokenizer_rows(task, spec)
    generator = network_of(task, spec, GENERATOR)
    assert isinstance(generator, Generator)
    forward = arithmetic(lambda: _generate(generator, 1, "meta"))
    return [*rows, ("generator forward", str(forward)), _sampling(spec, forward), *_memory(spec, generator, frozen)]


def arithmetic(forward: Callable[[], object]) -> Arithmetic:
    """Count a forward on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    counts = {
        str(operation).rpartition(".")[2]: count for operation, count in counter.get_flop_counts()["Global"].items()
    }
    total = sum(counts.values())
    return Arithmetic(total // 2, (total - sum(counts.get(name, 0) for name in PROJECTIONS)) // 2)


def activations(module: nn.Module, forward: Forward, precision: str) -> Activations:
    """What autograd saves in a forward of one sample and of two, in a precision, for a module on the meta device."""
    mode = FakeTensorMode()
    _make_fake(module, mode)
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        one, two = (_saved_bytes(module, forward, num) for num in (1, 2))
    return Activations(two - one, 2 * one - two)


def _saved_bytes(module: nn.Module, forward: Forward, num: int) -> int:
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    saved = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # kept, so that no other one takes its place
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = forward(num)
    del output
    return sum(storage.nbytes() for storage in saved.values())


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Parameters and buffers on the meta device as tensors that say they are on the CPU, where autocast sees them."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(FakeTensor(mode, value.detach(), torch.device("cpu")))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = FakeTensor(mode, buffer, torch.device("cpu"))


def _generate(generator: Generator, num: int, device: str) -> Tensor:
    latents, times = torch.zeros(num, *generator.latent_shape, device=device), torch.zeros(num, device=device)
    return generator(latents, times, generator.conditioner.example_cond(num, device))


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


def _memory(spec: RunSpec, generator: Generator, frozen: int) -> Iterator[tuple[str, str]]:
    """Activations of stage 2, and what a GPU of several would hold."""
    state = state_bytes(sum(value.numel() for value in generator.parameters()), spec.generator_training)
    if spec.parallel.activation_checkpointing:
        yield "activations", "not counted with activation checkpointing"
        return
    kept = activations(generator, lambda num: _generate(generator, num, "cpu"), spec.precision)
    yield "activations", f"{kept.sample / 2**20:.0f} MiB an image in {spec.precision}, not compiled"
    for num in NUM_GPUS:
        yield f"{num} GPU{'s' * (num > 1)} of {GPU_GIB} GiB", _plan(spec, num, frozen, state, kept)


def _plan(spec: RunSpec, num: int, frozen: int, state: int, kept: Activations) -> str:
    """The micro batch that fits, and its memory."""
    shards = {"ddp": 1, "fsdp": num, "hsdp": min(num, 8)}[spec.parallel.strategy]
    rest, micro = frozen + state / shards + kept.fixed, math.ceil(spec.generator_training.batch_size / num)
    while micro > 1 and rest + micro * kept.sample > USABLE * GPU_GIB * GIB:
        micro = math.ceil(micro / 2)
    needed = (rest + micro * kept.sample) / GIB
    if needed > USABLE * GPU_GIB:
        return f"does not fit: {needed:.1f} GiB for one image; set parallel.strategy=fsdp"
    return f"micro batch {micro}: about {needed:.1f} GiB each ({state / shards / GIB:.1f} of it training state)"
