"""Benchmarks: `raev2 bench`. Read `timed` first; a benchmark is a function that returns `Measurement`s.

The core measures what every task pays for; a task adds its own (`Task.benchmarks`). Sizes are those of the embedded
recipes, so that a table is there in a minute on a laptop; numbers of two machines compare machines, ratios within one
table compare methods.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from raev2.batch import Measurement
from raev2.files.artefact import write_json
from raev2.flow import interpolate, training_loss
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.sampler import sample_latents
from raev2.spec import CFG, DDTSpec, FlowSpec, Guidance, InternalGuidance, MuonSpec, NoGuidance, SamplingSpec
from raev2.task import check_known, usable_tasks
from raev2.training.optim import build_optimizer
from raev2.training.run import cpu_name, update

Benchmark = Callable[[], "list[Measurement]"]
ROUNDS = 7
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(functions: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each function, after one warm-up call.

    The functions take turns in every round, so that a machine that slows down slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name: those of the core, then `<task>` or `<task>-<name>` of the installed tasks."""
    found: dict[str, Benchmark] = {"generator": bench_generator, "sampling": bench_sampling}
    for task in usable_tasks():
        found |= {name if name == task.name else f"{task.name}-{name}": f for name, f in task.benchmarks().items()}
    return found


def run_benchmarks(names: Sequence[str] = (), json_file: Path | None = None) -> dict[str, list[Measurement]]:
    """Run benchmarks by name (default: all) and, with `json_file`, write them with the machine's description."""
    known = benchmarks()
    for name in names:
        check_known("raev2 bench", "unknown benchmark", name, known)
    results = {name: known[name]() for name in names or known}
    if json_file is not None:
        rows = {name: [asdict(row) for row in found] for name, found in results.items()}
        write_json(json_file, {"machine": machine(), "benchmarks": rows})
    return results


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(results: Mapping[str, Sequence[Measurement]]) -> str:
    """Results as lines of text under the machine's description."""
    rows = [(name, m.name, f"{m.value:.4g}", f"{m.unit}  {m.note}") for name in results for m in results[name]]
    first, second, third = (max((len(row[column]) for row in rows), default=0) for column in range(3))
    lines = [json.dumps(machine())]
    lines += [f"{name:{first}}  {row:{second}}  {value:>{third}}  {rest}".rstrip() for name, row, value, rest in rows]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The core's benchmarks


def small_generator() -> Generator:
    """A DiT^DH of the embedded recipes' size, random weights: 192 wide, 8 blocks, 8 x 8 latents of 192 channels."""
    torch.manual_seed(0)
    network = DDTSpec(
        width=192, depth=8, num_heads=3, head_width=384, head_depth=2, head_num_heads=6, base_head_depth=4
    )
    return Generator(network, LabelCondition(num_classes=100), FlowSpec(), (192, 8, 8)).to(DEVICE)


def bench_generator() -> list[Measurement]:
    """A training step (forward, backward, optimizer) in bf16 autocast and in float32."""
    batch_size, generator = 32, small_generator()
    optimizer = build_optimizer(generator, MuonSpec(), 1e-3)
    latents = torch.randn(batch_size, *generator.latent_shape, device=DEVICE)
    cond = {"label": torch.zeros(batch_size, dtype=torch.int64, device=DEVICE)}
    t = torch.linspace(0.1, 0.9, batch_size, device=DEVICE)

    def step(autocast: bool) -> None:
        point = interpolate(latents, torch.randn_like(latents), t)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            output = generator(point.z_t, point.t, cond)
        loss = training_loss(output, point, latents, generator.flow).total
        loss.backward()
        update(optimizer, list(generator.parameters()), loss.detach(), 1.0)

    seconds = timed({"bf16": lambda: step(True), "fp32": lambda: step(False)})
    return [
        Measurement(f"training step, {name}", batch_size / value, "images/s", f"batch {batch_size}, Muon")
        for name, value in seconds.items()
    ]


def bench_sampling() -> list[Measurement]:
    """Latents of 16 images in 10 Euler steps for each kind of guidance; network only, no decoder."""
    count, generator = 16, small_generator().eval()
    noise = torch.randn(count, *generator.latent_shape, device=DEVICE)
    cond = {"label": torch.zeros(count, dtype=torch.int64, device=DEVICE)}
    settings = {
        "none": NoGuidance(),
        "internal": InternalGuidance(scale=1.5),
        "cfg": CFG(scale=2.0),
        "cfg in [0.1, 0.6]": CFG(scale=2.0, interval=(0.1, 0.6)),
    }

    def run(guidance: Guidance) -> Callable[[], Any]:
        return lambda: sample_latents(generator, cond, noise, SamplingSpec(steps=10, guidance=guidance))

    seconds = timed({name: run(guidance) for name, guidance in settings.items()}, rounds=5)
    return [
        Measurement(f"guidance {name}", count / value, "images/s", f"{seconds['none'] / value:.2f} of no guidance")
        for name, value in seconds.items()
    ]
