"""One network on several processes: DDP, FSDP2 or both (HSDP), activation checkpointing, compilation.

`parallelise` prepares the network of stage 2. The rest lets loops, averages, optimizers and checkpoints ignore whether
a tensor is a shard: `local` is the part of this process, `whole` gathers, `shard_like` cuts.
"""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from raev2.errors import SpecError
from raev2.model.generator import Generator
from raev2.spec import ParallelSpec
from raev2.training import dist


def parallelise(
    model: nn.Module, spec: ParallelSpec, blocks: Sequence[nn.Module] = (), apart: bool = True
) -> nn.Module:
    """The model ready to be trained by all processes: what the loop calls. Its parameters are those of `model`.

    blocks   transformer blocks, which are recomputed and compiled one by one
    apart    whether they are sharded one by one too; not where their weights are read outside of their forward
    """
    if spec.compile:
        need_compiler("parallel")
    for block in blocks:
        if spec.activation_checkpointing:
            checkpoint(block)
        if spec.compile:
            block.compile()  # not `fullgraph`, which ends a run that meets more shapes than torch compiles
    if not dist.is_distributed():
        return model
    parameter = next(model.parameters())
    if spec.strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[parameter.device] if parameter.is_cuda else None)
    mesh = _mesh(spec, parameter.device.type)
    for part in (*(blocks if apart else ()), model):
        fully_shard(part, mesh=mesh)
    return model


def compiled(generator: Generator) -> Generator:
    """A twin that shares the weights and has compiled blocks, to sample from; the generator stays as written."""
    need_compiler("sampling")
    shared = {id(value): value for value in (*generator.parameters(), *generator.buffers())}
    twin = copy.deepcopy(generator, shared)
    for block in twin.blocks():
        block.compile()
    return twin


def gradient_sync(model: nn.Module, sync: bool) -> AbstractContextManager[object]:
    """Forward and backward inside: processes exchange gradients only where `sync` is True."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not sync else nullcontext()


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor; shares its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """The full tensor, on every process; all of them have to ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def for_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors on the CPU of the main process, gathered one by one; the others get nothing."""
    gathered = ((name, whole(value.detach())) for name, value in tensors.items())
    return {name: value.cpu() for name, value in gathered if dist.is_main()}


def shard_like(value: Tensor, reference: Tensor) -> Tensor:
    """A full tensor, which every process has, sharded as `reference` is."""
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(
        value.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def is_plain(model: nn.Module) -> bool:
    """Whether the model computes as written: neither sharded nor compiled."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return not compiled and not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _mesh(spec: ParallelSpec, device: str) -> DeviceMesh:
    """All processes in one row; for HSDP one row a machine, sharded along it and replicated across."""
    world = dist.world_size()
    if spec.strategy == "fsdp":
        return init_device_mesh(device, (world,))
    each = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return init_device_mesh(device, (world // each, each), mesh_dim_names=("machine", "process"))


def need_compiler(part: str) -> None:
    """Raise SpecError, of this part of the spec, unless `torch.compile` finds what it compiles with, on any device."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"])):
        needs, got, package = "a C++ compiler", "none on PATH", "g++"
    elif not header.is_file():
        needs, got, package = "the headers of Python", f"no {header}", "them (Debian: python3-dev)"
    else:
        return
    hint = f"Install {package}, or set {part}.compile=false."
    raise SpecError(f"spec.{part}.compile", f"torch.compile needs {needs}", got=got, hint=hint)
