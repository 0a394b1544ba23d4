"""Sampling: time grid, Euler, Heun, noise by sample index, and `sample`, from a condition to images.

Sample i is a function of (seed, i, condition i) alone: neither the batch size nor the number of processes changes a
bit of it in float32 on a CPU. Two things make it so. The noise comes from a counter-based generator keyed by
(seed, i). And because a matrix product adds in another order for another number of rows or threads, a CPU always
computes the same number of samples at once in one thread, whatever batch size was asked for (`map_rows`), or fewer
where a trial shows the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor

from raev2.batch import Cond, Denoiser, cond_map
from raev2.errors import SpecError
from raev2.flow import shift_time, to_latents, to_velocity
from raev2.guidance import Predictor, build_guidance
from raev2.shapes import Images, Latents
from raev2.spec import FlowSpec, Guidance, NoGuidance, SamplingSpec

CPU_CHUNK = 8  # at 16 images as fast as all at once, where 4 cost 5 % in float32 and 17 % in bfloat16
_TRIED: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()  # by `_same_bits`


def time_grid(steps: int, time_shift: float) -> list[float]:
    """Times from 1 (noise) to exactly 0 (data): u_i = 1 - i / steps, shifted; in float64."""
    uniform = [1 - i / steps for i in range(steps + 1)]
    return [1.0, *(shift_time(u, time_shift) for u in uniform[1:-1]), 0.0]


def euler_step(predict: Predictor, z_t: Latents, t: float, t_next: float, cond: Cond, flow: FlowSpec) -> Latents:
    """z + (t_next - t) * velocity. A step to t = 0 lands on the predicted clean latents, which it returns exactly."""
    pred = predict(z_t, t, cond)
    if t_next == 0 and not flow.reference_clamp:
        return to_latents(pred, z_t, t, flow)
    return z_t + (t_next - t) * to_velocity(pred, z_t, t, flow)


def heun_step(predict: Predictor, z_t: Latents, t: float, t_next: float, cond: Cond, flow: FlowSpec) -> Latents:
    """Euler step, then the mean of the velocities at both ends; order 2. The step to t = 0 is Euler (no division)."""
    if t_next == 0:
        return euler_step(predict, z_t, t, t_next, cond, flow)
    velocity = to_velocity(predict(z_t, t, cond), z_t, t, flow)
    z_next = z_t + (t_next - t) * velocity
    velocity_next = to_velocity(predict(z_next, t_next, cond), z_next, t_next, flow)
    return z_t + (t_next - t) * (velocity + velocity_next) / 2


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler_step, "heun": heun_step}


@torch.no_grad()
def sample_latents(
    generator: Denoiser, cond: Cond, noise: Latents, sampling: SamplingSpec, *, weak: Denoiser | None = None
) -> Latents:
    """Integrate from the noise at t = 1 to latents at t = 0, the whole batch at once.

    weak   second generator of auto guidance
    """
    for point in sample_path(generator, cond, noise, sampling, weak=weak):
        z_t = point[1]
    return z_t


def sample_path(
    generator: Denoiser, cond: Cond, noise: Latents, sampling: SamplingSpec, *, weak: Denoiser | None = None
) -> Iterator[tuple[float, Latents]]:
    """The points (t, z_t) after each step; the last one is at t = 0."""
    predict = build_guidance(sampling.guidance, generator, weak)
    step = SOLVERS[sampling.solver]
    z_t = noise
    for t, t_next in pairwise(time_grid(sampling.steps, generator.time_shift)):
        z_t = step(predict, z_t, t, t_next, cond, generator.flow)
        yield t_next, z_t


def noise_for(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(indices), *shape) on the CPU; row i depends on (seed, indices[i]) alone.

    Philox is a counter-based generator with a 128-bit key, so no two pairs share a stream. (A torch.Generator keeps 32
    bits of its seed: hashing pairs into it would repeat noise within a few tens of thousands of samples.)
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, index])).standard_normal(tuple(shape), dtype=np.float32)
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def sample(
    generator: Denoiser,
    rae: Any,
    cond: Cond,
    steps: int = 50,
    guidance: Guidance | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    *,
    solver: Literal["euler", "heun"] = "euler",
    batch_size: int = 64,
    weak: Denoiser | None = None,
) -> Images:
    """Generate one image per row of the condition, float RGB in [0, 1].

    cond      raw conditions, one row per image, on any device
    rae       decodes latents: `RAE`
    guidance  a guidance spec of raev2.spec, for example InternalGuidance(scale=1.78); None: no guidance
    indices   ids that select the noise; default 0, 1, 2, ... An unconditional generator needs them for its count
    weak      second generator of auto guidance
    """
    if indices is None:
        if not cond:
            raise SpecError("sample.indices", "needed when there is no condition", expected="one id per image")
        indices = range(len(next(iter(cond.values()))))
    generator.check_cond(cond)
    sampling = SamplingSpec(solver=solver, steps=steps, guidance=guidance or NoGuidance(), batch_size=batch_size)
    build_guidance(sampling.guidance, generator, weak)  # an unusable setting is reported before any work

    def images(rows: list[int]) -> Tensor:
        noise = noise_for(seed, [indices[row] for row in rows], generator.latent_shape).to(generator.device)
        chunk_cond = cond_map(cond, lambda value: value[rows].to(generator.device))
        own = len(set(rows))  # the others fill the chunk up
        if own < len(rows) and _same_bits(generator, weak, chunk_cond, noise, own, sampling):
            noise, chunk_cond = noise[:own], cond_map(chunk_cond, lambda value: value[:own])
        latents = sample_latents(generator, chunk_cond, noise, sampling, weak=weak)
        latents = torch.cat([latents, latents[-1:].expand(len(rows) - len(latents), -1, -1, -1)])
        with torch.autocast(generator.device.type, enabled=False):  # pixels are decoded in float32
            return rae.decode(latents).clamp(0, 1)

    return map_rows(images, len(indices), generator.device, batch_size)


def _same_bits(
    generator: Denoiser, weak: Denoiser | None, cond: Cond, noise: Latents, num: int, sampling: SamplingSpec
) -> bool:
    """Whether the first `num` rows are predicted as they are with the others: then these need not be computed.

    Shapes decide, so it is tried once for each, at a time with guidance and at one without; False if that cannot pay.
    """
    dtype = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    key = str((num, dtype, sampling, {name: value.shape for name, value in cond.items()})), weak and ref(weak)
    known = _TRIED.setdefault(generator, {})
    if key not in known:
        low, high = getattr(sampling.guidance, "interval", (0.0, 1.0))
        times = {low <= t <= high: t for t in time_grid(sampling.steps, generator.time_shift)[:-1]}
        predict, own = build_guidance(sampling.guidance, generator, weak), cond_map(cond, lambda value: value[:num])
        known[key] = (len(noise) - num) * sampling.steps > (len(noise) + num) * len(times) and all(
            torch.equal(predict(noise, t, cond)[:num], predict(noise[:num], t, own)) for t in times.values()
        )
    return known[key]


def map_rows(function: Callable[[list[int]], Tensor], count: int, device: torch.device, batch_size: int) -> Tensor:
    """Results for rows 0 .. count - 1, computed in chunks of row numbers and joined.

    On a GPU a chunk has `batch_size` rows. On a CPU it always has `CPU_CHUNK` (the last one is filled up by repeating
    its last row), is computed by one thread, and as many chunks run at once as torch has threads: the bits of a row
    then depend on neither the batch size nor the number of threads or processes.
    """
    if device.type != "cpu":
        chunks = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
        return torch.cat([function(rows) for rows in chunks])

    chunks = [[min(row, count - 1) for row in range(start, start + CPU_CHUNK)] for start in range(0, count, CPU_CHUNK)]
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def compute(rows: list[int]) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):  # both are settings of a thread
            return function(rows)

    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            return torch.cat(list(pool.map(compute, chunks)))[:count]
    finally:
        torch.set_num_threads(num_threads)
