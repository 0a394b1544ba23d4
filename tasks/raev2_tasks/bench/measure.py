"""How a piece of work is timed. Read `Work` and `measure` first.

What is compared takes turns in every round, so that a machine that slows down slows all of it. Numbers of two machines
compare machines; ratios within one table compare methods.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from raev2.batch import Measurement
from raev2.errors import SpecError
from raev2.files.artefact import write_json
from raev2.training.dist import usable_device
from raev2.training.run import cpu_name, package_versions

Outputs = Sequence[Tensor]
PROCESS = Path("/proc/self")


def timed(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call of each function, after one warm-up.

    The functions take turns in every round, so that a machine that slows down slows all of them.

    clock   `time.process_time` counts CPU seconds, for a machine that others use too
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - start)
    return seconds


class _Arithmetic(TorchDispatchMode):
    """Adds up floating-point operations by torch's formulas. Its own counter also follows modules by hooks, which
    `autograd.grad` of a module's input, as in stage 1, does not bear."""

    flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=output)
        return output


@dataclass(frozen=True)
class Work:
    """A piece of work.

    count, unit   what one call makes, such as 64 'images'
    subject       what it is done with, and what `--against` replaces: a module or a function
    make          subject -> the function to time; what it returns is compared with that of the other subject
    dtype         of the matrix products whose limit its arithmetic is compared with
    """

    name: str
    count: float
    unit: str
    subject: Any
    make: Callable[[Any], Callable[[], Outputs]]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Timing(Measurement):
    """A rate, with all that was measured beside it; nan: not measured.

    seconds, low, high   of one call: median and range
    faster               how many times as fast as the other subject: median and range over rounds
    difference           of the outputs: the largest, in units of the largest value
    """

    _: KW_ONLY
    seconds: float = math.nan
    low: float = math.nan
    high: float = math.nan
    gflop_per_s: float = math.nan
    gemm_share: float = math.nan
    peak_gib: float = math.nan
    faster: tuple[float, float, float] | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Setting:
    """Where, how often and by which clock; `other` makes the other subject of one of ours.

    compiled   generators that are trained, ours, are compiled as `parallel.compile` does it
    """

    size: str = "small"
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rounds: int = 7
    other: Callable[[Any], Any] | None = None
    clock: Callable[[], float] = time.perf_counter
    compiled: bool = False

    @classmethod
    def of(
        cls, size: str, device: str | None, rounds: int, against: str | None,
        cpu_time: bool = False, compiled: bool = False,
    ) -> Setting:  # fmt: skip
        """From the options of the command."""
        if rounds < 1:
            raise SpecError("--rounds", "nothing to time", got=rounds, expected="at least 1")
        where = cls().device if device is None else usable_device("--device", device)
        clock = time.process_time if cpu_time else time.perf_counter
        return cls(size, where, rounds, load_factory(against) if against else None, clock, compiled)

    def gemm(self, dtype: torch.dtype) -> float:
        """GFLOP/s of a large square matrix product, the best of five: what arithmetic can reach here."""
        if dtype not in self._gemm:
            n = 8192 if self.device.type == "cuda" else 2048
            a, b = torch.ones(2, n, n, device=self.device, dtype=dtype).unbind()
            seconds = timed({"gemm": lambda: a @ b}, 5, self.clock)["gemm"]
            self._gemm[dtype] = 2e-9 * n**3 / min(seconds)
        return self._gemm[dtype]

    @cached_property
    def _gemm(self) -> dict[torch.dtype, float]:
        return {}


def load_factory(name: str) -> Callable[[Any], Any]:
    """The function that MODULE:FACTORY names."""
    module, _, factory = name.partition(":")
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError("--against", "cannot be loaded", got=name, expected="MODULE:FACTORY") from error


def measure(work: Work, setting: Setting) -> Timing:
    """Time a piece of work and, with `setting.other`, the same work done with the other subject."""
    functions = {"ours": work.make(work.subject)}
    difference, other = None, setting.other and setting.other(work.subject)
    if other is not None:
        functions["other"] = work.make(other)
        difference = largest_difference(functions["ours"](), functions["other"]())
    as_written = torch.compiler.set_stance("force_eager") if setting.compiled else nullcontext()
    with as_written, _Arithmetic() as counter:
        functions["ours"]()
    gflop = counter.flop / 1e9
    _forget_peak(setting.device)
    seconds = timed(functions, setting.rounds, setting.clock)
    ours = seconds["ours"]
    ratios = sorted(other / own for own, other in zip(ours, seconds.get("other", []), strict=False))
    timing = Timing(
        work.name, work.count / statistics.median(ours), f"{work.unit}/s",
        seconds=statistics.median(ours), low=min(ours), high=max(ours),
        gflop_per_s=gflop / statistics.median(ours) if gflop else math.nan,
        gemm_share=gflop / statistics.median(ours) / setting.gemm(work.dtype) if gflop else math.nan,
        peak_gib=_peak_gib(setting.device), difference=difference,
        faster=(statistics.median(ratios), ratios[0], ratios[-1]) if ratios else None,
    )  # fmt: skip
    return Timing(**{**vars(timing), "note": _note(timing)})


def largest_difference(ours: Outputs, other: Outputs) -> float:
    """Largest difference of two lists of outputs, each in units of its largest value."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, other, strict=True)]
    found = (float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs if a.numel())
    return max(found, default=0.0)


def machine(setting: Setting) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if cuda else str(setting.device),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": setting.clock.__name__,
        "compiled": setting.compiled,
        "load": round(os.getloadavg()[0], 2),
        "gemm": {str(dtype).removeprefix("torch."): round(rate) for dtype, rate in setting._gemm.items()},
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def table(results: Mapping[str, Sequence[Measurement]], setting: Setting) -> str:
    """Results as lines of text under the machine's description."""
    rows = [(name, m.name, f"{m.value:.4g}", f"{m.unit}  {m.note}") for name in results for m in results[name]]
    first, second, third = (max((len(row[column]) for row in rows), default=0) for column in range(3))
    about = machine(setting)
    lines = [json.dumps({**about, "versions": {"torch": about["versions"]["torch"]}})]
    lines += [f"{name:{first}}  {row:{second}}  {value:>{third}}  {rest}".rstrip() for name, row, value, rest in rows]
    return "\n".join(lines)


def write_results(file: Path, results: Mapping[str, Sequence[Measurement]], setting: Setting) -> None:
    """Results and machine as JSON; what was not measured is null."""
    rows = {name: [_known(asdict(row)) for row in found] for name, found in results.items()}
    write_json(file, {"machine": machine(setting), "size": setting.size, "rounds": setting.rounds, "benchmarks": rows})


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _note(timing: Timing) -> str:
    parts = [f"{1000 * timing.low:.4g} to {1000 * timing.high:.4g} ms"]
    if not math.isnan(timing.gflop_per_s):
        parts.append(f"{timing.gflop_per_s:.0f} GFLOP/s, {timing.gemm_share:.0%} of GEMM")
    parts.append(f"{timing.peak_gib:.2f} GiB")
    if timing.faster:
        median, low, high = timing.faster
        parts.append(f"{median:.2f}x ({low:.2f} to {high:.2f}) as fast as the other, {timing.difference:.1e} apart")
    return "; ".join(parts)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux: the peak of the process begins anew
        (PROCESS / "clear_refs").write_text("5")


def _peak_gib(device: torch.device) -> float:
    """Of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+)", (PROCESS / "status").read_text()):
            return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
