"""Work on N numbered samples, shared by any number of processes. Read `collect` first.

Samples are cut into chunks of a fixed size by their global number, and whole chunks go to processes in turn. So the
content of a chunk depends neither on the number of processes nor on who computes it, and one gather at the end puts
every row into its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raev2.batch import Cond
from raev2.errors import TaskError
from raev2.task import EvalContext
from raev2.training import dist

logger = logging.getLogger(__name__)
CHUNK_SIZE = 64  # images a chunk; fixed, so that no result depends on a batch size
PROGRESS_SECONDS = 15.0


def sample_indices(num_samples: int, rank: int, world: int, chunk_size: int = 1) -> list[int]:
    """Global numbers of the samples of one process: chunks rank, rank + world, ... Every number belongs to one rank."""
    return [index for index in range(num_samples) if index // chunk_size % world == rank]


def local_chunks(num_samples: int, chunk_size: int, what: str = "samples") -> Iterator[list[int]]:
    """The chunks of this process, with a status line now and then."""
    indices = sample_indices(num_samples, dist.rank(), dist.world_size(), chunk_size)
    last = time.monotonic()
    for start in range(0, len(indices), chunk_size):
        yield indices[start : start + chunk_size]
        if dist.is_main() and time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            logger.info("evaluation: %d of %d %s", min(start + chunk_size, len(indices)), len(indices), what)


def collect(
    num_samples: int, chunk_size: int, rows: Callable[[Sequence[int]], Mapping[str, Tensor]], what: str = "samples"
) -> dict[str, Tensor]:
    """Rows of all samples in order of their number, on every process.

    rows   global numbers of a chunk -> tensors by name, one row a number
    """
    return gathered((chunk, rows(chunk)) for chunk in local_chunks(num_samples, chunk_size, what))


def gathered(parts: Iterable[tuple[Sequence[int], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Rows of all numbered samples, in order and on every process, from the parts that each process computed."""
    own: list[tuple[Sequence[int], dict[str, Tensor]]] = []
    for chunk, rows in parts:
        own.append((chunk, {name: value.detach().cpu() for name, value in rows.items()}))
        for name, value in rows.items():
            assert len(value) == len(chunk), f"{name}: {len(value)} rows for {len(chunk)} samples"
    found = [part for process in dist.gather_objects(own) for part in process]
    numbers = torch.tensor([number for chunk, _ in found for number in chunk])
    assert len(numbers.unique()) == len(numbers), "every sample exactly once"
    order = numbers.argsort()
    return {name: torch.cat([rows[name] for _, rows in found])[order] for name in found[0][1]}


def generated_images(
    context: EvalContext, cond: Callable[[Sequence[int]], Cond], indices: Sequence[int]
) -> Tensor:  # (B, 3, Hpx, Wpx) uint8
    """Images of the evaluation samples with these global numbers.

    cond   global numbers -> raw conditions
    """
    if context.generate is None:
        raise TaskError("evaluation", "this protocol needs a generator", hint="Train the generator first.")
    images = context.generate(cond(indices), list(indices))
    if images.dtype != torch.uint8 or len(images) != len(indices):
        raise TaskError(
            "evaluation", "generate returned something else than asked for",
            got=f"{images.dtype} {tuple(images.shape)}", expected=f"uint8 images, {len(indices)} of them",
        )  # fmt: skip
    return images
