"""What a training step holds beside its networks, counted without memory, and how many samples at once that allows.

Start with `fitted`: the default micro batch. Of weights, averages and optimizers see `preflight.state_bytes`.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._composable import checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raev2.flow import interpolate, training_loss
from raev2.model.generator import Generator
from raev2.nn import autocast
from raev2.spec import LoopSpec, RunSpec
from raev2.training import dist
from raev2.training.parallel import local
from raev2.training.preflight import GIB, num_moments
from raev2.training.run import Run, add_provenance

logger = logging.getLogger(__name__)
Loop = TypeVar("Loop", bound=LoopSpec)
CPU = torch.device("cpu")
USABLE = 0.9  # the share of a device that is planned
COUNTED = 1, 128  # samples; memory grows faster than their number, so the line through both lies above what is between


@dataclass(frozen=True)
class StepMemory:
    """Bytes of forward and backward at their peak: for each sample, and beside (weights in bfloat16)."""

    sample: int
    fixed: int

    def needs(self, num: int) -> int:
        """Bytes of so many samples at once."""
        return self.fixed + num * self.sample

    def fit(self, share: int, room: float) -> int:
        """The largest of share, share / 2, share / 4, ... that fits into so many bytes; 1 where none does."""
        while share > 1 and self.needs(share) > room:
            share = math.ceil(share / 2)
        return share


def fitted(
    run: Run, stage: str, loop: Loop, parameters: Iterable[Tensor], count: Callable[[], StepMemory],
    there: tuple[int, int] | None,
) -> Loop:  # fmt: skip
    """The settings of a stage with a micro batch for which its device has room, where none is set.

    parameters   that are trained; their gradients and moments are still to come
    there        free bytes of the device and all; None: not known, a process gets its whole share (a CPU)
    """
    share, field = max(loop.batch_size // dist.world_size(), 1), f"{stage}_training.micro_batch_size"
    if loop.micro_batch_size is not None or there is None:
        return loop
    (free, total), own = there, sum(local(value).numel() for value in parameters if value.requires_grad)
    pending = (1 + num_moments(loop)) * 4 * own
    try:
        step = count()
    except (RuntimeError, AssertionError) as error:  # an encoder of others whose forward needs values
        logger.warning("%s: %s images at once, their memory cannot be counted (%s); see %s", stage, share, error, field)
        return loop
    num = min(dist.gather_objects(step.fit(share, free - pending - (1 - USABLE) * total)))  # shards need equal steps
    needed = (total - free + pending + step.needs(num)) / GIB
    chosen = f"{num} of {share} at once, about {needed:.1f} GiB of {total / GIB:.1f}"
    add_provenance(run, field, chosen)
    if dist.is_main():
        logger.info("%s: micro batch %s: chosen; set %s to change it", stage, chosen, field)
    return loop.replace(micro_batch_size=num)


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU that this process may still take, and all; None for a CPU, whose memory it does not have alone."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def generator_memory(generator: Generator, spec: RunSpec) -> StepMemory:
    """A step of stage 2, not compiled; the generator may be sharded or without memory."""
    with torch.device("meta"):
        plain = Generator(generator.network_spec, generator.condition_spec, generator.flow, generator.latent_shape)
    for block in plain.blocks() if spec.parallel.activation_checkpointing else ():
        checkpoint(block)
    return step_memory(plain, partial(_generator_step, precision=spec.precision))


def _generator_step(generator: Generator, num: int, precision: str) -> None:
    latents, t = torch.zeros(num, *generator.latent_shape), torch.full((num,), 0.5)
    point = interpolate(latents, latents, t)
    with autocast(precision, CPU):
        output = generator(point.z_t, t, generator.conditioner.example_cond(num))
    training_loss(output, point, latents, generator.flow).total.backward()


def step_memory(network: nn.Module, step: Callable[[Any, int], None]) -> StepMemory:
    """Count `step(network, number of samples)`, forward and backward on the CPU, for networks on any device."""
    (few, many), mode = COUNTED, FakeTensorMode()
    with _EmptyCopies(mode) as copies:
        copied = copy.deepcopy(network)
    for value in filter(lambda value: value.requires_grad, copied.parameters()):
        value.register_post_accumulate_grad_hook(_forget_grad)  # `preflight.state_bytes` has it
    least, most = (_peak(mode, copies.made, partial(step, copied, num)) for num in COUNTED)
    sample = (most - least) // (many - few)
    return StepMemory(sample, least - few * sample)


def _forget_grad(value: Tensor) -> None:
    value.grad = None


def _peak(mode: FakeTensorMode, weights: Iterable[Tensor], step: Callable[[], None]) -> int:
    with mode, _Living(weights) as living:
        step()
    return living.peak


class _EmptyCopies(TorchFunctionMode):
    """Inside, the deep copy of a tensor is one on a CPU that takes no memory: also where no module registers it."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode, self.made = mode, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.clone, Tensor.__deepcopy__):  # a parameter clones its data
            return func(*args, **(kwargs or {}))
        self.made.append(FakeTensor(self.mode, torch.empty_like(args[0], device="meta"), CPU))
        return self.made[-1]


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


class _Living(TorchDispatchMode):
    """Adds up the storages that operations inside make, as long as each one lives."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = dict.fromkeys(map(_storage, weights))
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and _storage(value) not in self.known:
                self._begin(value.untyped_storage())
        return output

    def _begin(self, storage: torch.UntypedStorage) -> None:
        self.known[storage._cdata] = None
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())

    def _end(self, key: int, size: int) -> None:
        del self.known[key]
        self.bytes -= size
