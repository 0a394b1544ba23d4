"""Processes: rank, world size and reductions. Does nothing with one process; accelerate sets up the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from accelerate import PartialState
from torch import Tensor

from raev2.errors import SpecError

Value = TypeVar("Value")
PATIENCE = timedelta(days=2)  # with the main process while it builds data, samples or evaluates


def read_environment() -> None:
    """What torch has to know of this process: torchrun said it, or Slurm does to what `srun` starts without torchrun.

    Variables that are set stay. Raises SpecError for more processes than GPUs, and for a device that is not there.

    Source: slurm.schedmd.com/srun.html, output environment variables
    """
    here, num = os.environ, int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" not in here and num > 1:
        first = re.match(r"([^,[]|\[[^]]*\])+", here["SLURM_STEP_NODELIST"])  # up to the first comma outside brackets
        found = {
            "RANK": here["SLURM_PROCID"], "WORLD_SIZE": str(num), "LOCAL_RANK": here["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(num // int(here["SLURM_STEP_NUM_NODES"])),
            "MASTER_ADDR": re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0] if first else ""),
            "MASTER_PORT": str(61440 + int(here["SLURM_JOB_ID"]) % 4096),
        }  # fmt: skip
        here.update({name: value for name, value in found.items() if name not in here})
    each, gpus = int(here.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    own_gpu = gpus == 1 and "TORCHELASTIC_RUN_ID" not in here  # Slurm may show each process one; torchrun does not
    if each > gpus > 0 and not own_gpu:
        raise SpecError("processes", "more than GPUs on this machine", got=each, expected=f"at most {gpus}")
    if name := here.get("ACCELERATE_TORCH_DEVICE"):
        usable_device("ACCELERATE_TORCH_DEVICE", name)
    if "RANK" in here and not torch.accelerator.is_available():
        here.setdefault("ACCELERATE_USE_CPU", "true")  # accelerate would take each process for one that is alone


def usable_device(where: str, name: str) -> torch.device:
    """The device of this name; SpecError where this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError(where, "not usable here", got=name, expected="cpu, cuda, cuda:1, ...") from error


def is_distributed() -> bool:
    """Whether several processes run."""
    return torch_dist.is_available() and torch_dist.is_initialized() and torch_dist.get_world_size() > 1


def rank() -> int:
    """Index of this process."""
    return torch_dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return torch_dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def own_rows(values: Tensor) -> Tensor:
    """The rows of this process of something that was drawn for the global batch: those of `train_batches`."""
    return values[rank() :: world_size()].contiguous()


def mean_over_processes(value: Tensor) -> Tensor:
    """Average of a tensor over all processes; the input is not changed."""
    if is_distributed():
        value = value.clone()
        torch_dist.all_reduce(value)
    return value / world_size()


def gather_rows(own: Tensor, count: int) -> Tensor:
    """Rows in turn: row i is row i // world of process i % world. Every process gives as many (padded)."""
    if not is_distributed():
        return own[:count]
    gathered = own.new_empty(world_size() * len(own), *own.shape[1:])
    torch_dist.all_gather_into_tensor(gathered, own.contiguous())
    return gathered.unflatten(0, (world_size(), len(own))).transpose(0, 1).flatten(0, 1)[:count]


def gather_objects(value: Any) -> Sequence[Any]:
    """The value of every process, in rank order."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(gathered, value, group=_messages())
    return gathered


def from_main(value: Any) -> Any:
    """The value that the main process has."""
    return gather_objects(value)[0]


@contextmanager
def together() -> Iterator[None]:
    """Inside, processes do different things. All wait at the end, and an error of one is raised on all."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    first = next(filter(None, gather_objects(error)), None)
    if error or first:
        raise error or first  # type: ignore[misc]


def on_main(function: Callable[[], Value]) -> Value:
    """What a function returns on the main process alone, on every process; an error of it is raised on all."""
    value = None
    with together():
        if is_main():
            value = function()
    return from_main(value)


def device() -> torch.device:
    """Device of this process, as accelerate chose it."""
    return PartialState().device


def barrier() -> None:
    """Wait for all processes."""
    gather_objects(None)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if not is_distributed():
        return flag
    flags = torch.tensor(float(flag))
    torch_dist.all_reduce(flags, group=_messages())
    return bool(flags > 0)


@cache
def _messages() -> Any:
    """Words between processes go over the CPU: no GPU is waited for, and one that works for hours is waited for."""
    return torch_dist.new_group(backend="gloo", timeout=PATIENCE)
