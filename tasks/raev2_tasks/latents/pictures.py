"""What latents are made of: a trained tokenizer and a split of pictures, decoded in other processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raev2.data import FolderDataset, ImageDataset, ignore_signals, to_float
from raev2.errors import RaeError, SpecError
from raev2.model.opened import tokenizer_in
from raev2.spec_io import load_spec
from raev2.task import get_task
from raev2.tokenizer.base import Tokenizer
from raev2.training.run import make_accelerator

BATCH = 64


@dataclass(frozen=True)
class Source:
    """Tokenizer, data, and the device that encodes."""

    tokenizer: Tokenizer
    dataset: ImageDataset
    device: torch.device

    def latents(self, numbers: range, workers: int, mirrored: bool = False) -> Iterator[Tensor]:
        """Latents (B, C, H, W) of these samples in order, on the CPU. Raises DataError for one that is unreadable."""
        batches = [
            range(start, min(start + BATCH, numbers.stop)) for start in range(numbers.start, numbers.stop, BATCH)
        ]
        loader = DataLoader(
            _Pictures(self.dataset), batch_size=None, sampler=batches, num_workers=workers,
            worker_init_fn=ignore_signals, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        for images in loader:
            if isinstance(images, Exception):
                raise images
            images = to_float(images.to(self.device, non_blocking=True))
            yield self.tokenizer.encode(images.flip(3) if mirrored else images).cpu()


class _Pictures(Dataset[Tensor | Exception]):
    """Batches of 8-bit pictures by their numbers. An error is a value: DataLoader would make another one of it."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, numbers: Sequence[int]) -> Tensor | Exception:
        try:
            return torch.stack([self.dataset.image(number) for number in numbers])
        except (RaeError, OSError) as error:
            return error


def open_source(run: str, data: str | None, split: str) -> Source:
    """The tokenizer of a run or an artefact folder, with a split of `data`, or else of the data of the run."""
    device = make_accelerator("fp32").device
    tokenizer, spec_file = tokenizer_in(run).to(device), Path(run) / "spec.yaml"
    if data is not None:
        return Source(tokenizer, FolderDataset(data, split, tokenizer.spec.image_size), device)
    if not spec_file.is_file():
        raise SpecError("--data", "needed with a tokenizer folder", got=run, expected="--data DIR")
    spec = load_spec(spec_file)
    return Source(tokenizer, get_task(spec.task.name).dataset(spec, split), device)
