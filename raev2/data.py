"""Prepared dataset folders -> batches. The order is a function of (seed, epoch), the position is one integer.

A dataset folder holds `manifest.json` and one JSON-lines index a split (docs/how_to/own_data.md). Training reads an
endless stream of samples numbered 0, 1, 2, ...; sample number k is entry k mod n of the permutation of epoch k div n.
A checkpoint therefore needs only "images seen" to go on with exactly the same batches, on any number of processes.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raev2.batch import Batch, Cond
from raev2.errors import DataError, RaeError
from raev2.files.images import CENTRE_CROP, centre_crop, read_rgb
from raev2.files.latent_folder import LatentFolder
from raev2.files.lines import Lines
from raev2.files.manifest import read_manifest

logger = logging.getLogger(__name__)
# What asks a run to stop: Ctrl-C, a cancelled job, a closed terminal, Slurm's warning, the clock of --max-time.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGALRM") if hasattr(signal, name)
]


class ImageDataset(Dataset[dict[str, Any]], ABC):
    """One split of prepared data: 8-bit RGB images of one size with raw conditions. Read by number.

    A subclass says where images and conditions come from. It may also override what the training stream draws
    (`stream_sample`), what is done about unreadable samples (`skipped`), and how the conditions of a batch become
    tensors (`collate_cond`).

    manifest      what the data is: at least name, fingerprint, licence, attribution, classes
    image_size    height and width in pixels of every image
    group_kind    what `group` tells apart, in the plural
    """

    manifest: dict[str, Any]
    dir: Path
    split: str
    image_size: tuple[int, int]
    group_kind = "groups"
    latents: LatentFolder | None = None  # in place of pictures
    _order: tuple[tuple[int, int], Tensor] | None = None  # (seed, epoch) and its permutation
    _subset: tuple[tuple[int, int], list[int]] | None = None  # (number, seed) and its indices

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Image `index` as uint8 (3, H_px, W_px)."""

    @abstractmethod
    def cond(self, index: int) -> dict[str, Any]:
        """Raw conditions of sample `index`: numbers, lists or arrays by name."""

    @property
    @abstractmethod
    def preparation(self) -> str:
        """How a stored picture becomes an image: resizing, crop, interpolation. Result files quote it."""

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty for unlabelled data."""
        return self.manifest["classes"]

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""
        return self.manifest["fingerprint"]

    @property
    def terms(self) -> dict[str, Any]:
        """What a model that is trained on this says of it."""
        return {name: self.manifest[name] for name in ("name", "fingerprint", "licence", "attribution")}

    def key(self, index: int) -> str:
        """What sample `index` is, wherever it stands in the split: a hash of its content, or a name."""
        return str(index)

    def group(self, index: int) -> Hashable:
        """What subsets spread over, such as the class of sample `index`; None: there are no groups."""
        return None

    def keys_and_groups(self) -> Iterable[tuple[str, Hashable]]:
        """`key` and `group` of every sample, in index order."""
        return ((self.key(index), self.group(index)) for index in range(len(self)))

    def subset(self, num: int | None = None, seed: int = 0) -> list[int]:
        """Indices of `num` samples (None: all) in random order, chosen by `random_subset`."""
        wanted = min(len(self), num or len(self)), seed
        if self._subset is None or self._subset[0] != wanted:
            self._subset = wanted, random_subset(self.keys_and_groups(), *wanted)
        return self._subset[1]

    def asked(self, num_samples: int, numbers: Sequence[int]) -> list[int]:
        """The samples whose conditions evaluation samples with these numbers get: a subset, repeated as needed."""
        order = self.subset(num_samples)
        return [order[number % len(order)] for number in numbers]

    def with_latents(self, latents: LatentFolder) -> ImageDataset:
        """This split with latents on disk as its images: no picture is decoded."""
        view = copy.copy(self)
        view.latents = latents
        setattr(view, "image", latents.__getitem__)  # noqa: B010  in the way of the method, whatever calls it
        return view

    def mirrored(self, sample: Mapping[str, Any]) -> Tensor:
        """The image of a sample, or its latents, of the mirrored picture."""
        return sample["image"].flip(2) if self.latents is None else self.latents.mirrored(sample["key"])

    def latent_identity(self, tokenizer: str) -> dict[str, Any]:
        """What latents of this split depend on, by the tokenizer with this identity."""
        return {
            "tokenizer": tokenizer, "data": self.fingerprint, "split": self.split, "preparation": self.preparation,
            "number of samples": len(self),
        }  # fmt: skip

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image(index), "cond": self.cond(index), "key": index}

    def stream_sample(self, seed: int, number: int, skip: int = 0) -> dict[str, Any]:
        """Sample `number` of the endless training stream: entry `number mod n` of the permutation of its epoch.

        skip   how many unreadable samples to pass over, within the same epoch
        """
        epoch, position = divmod(number, len(self))
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
            self._order = (seed, epoch), torch.randperm(len(self), generator=generator)
        return self[int(self._order[1][(position + skip) % len(self)])]

    def skipped(self, error: DataError) -> None:
        """Called for every sample that is passed over: a line in the log. A DataError raised here ends the training."""
        logger.warning("skipped: %s", error)

    def collate_cond(self, conds: Sequence[Mapping[str, Any]]) -> Cond:
        """Conditions of a batch, one tensor a name with the batch as leading axis."""
        return {name: _stack([cond[name] for cond in conds]) for name in conds[0]}


class NamesOnly(ImageDataset):
    """Data that is not here, of which a model kept the class names; whatever else is asked for is a DataError."""

    def __init__(self, dir: str | Path, split: str, classes: Sequence[str]) -> None:
        self.dir, self.split, self.manifest = Path(dir), split, {"classes": list(classes)}

    def _absent(self, index: int = 0) -> NoReturn:
        raise DataError(f"data {self.dir}", "needed, and a model brings only its class names", hint="Give --data DIR.")

    __len__ = image = cond = _absent
    preparation = property(_absent)


class FolderDataset(ImageDataset):
    """One split of a dataset folder: images of its index, fields of the index as conditions.

    fields   index fields that become raw conditions, e.g. ('label',)
    """

    group_kind = "classes"

    def __init__(
        self,
        dir: str | Path,
        split: str,
        image_size: tuple[int, int],
        fields: tuple[str, ...] = (),
        cache: bool = False,
    ) -> None:
        self.dir, self.split, self.image_size, self.fields = Path(dir), split, image_size, fields
        self.manifest = read_manifest(self.dir)
        if split not in self.manifest["splits"]:
            raise DataError(
                f"data {self.dir}", "unknown split", got=split, expected=f"one of {', '.join(self.manifest['splits'])}"
            )
        index_file = self.dir / self.manifest["splits"][split]["index"]
        if not index_file.is_file():
            raise DataError(f"data {self.dir}", f"index {index_file.name} is missing", hint=_rebuild(self.manifest))
        self.index = Lines(index_file, _rebuild(self.manifest))
        expected = self.manifest["splits"][split]["num_samples"]
        if len(self.index) != expected:
            raise DataError(
                f"data {self.dir}", f"{index_file.name} has {len(self.index):,} samples, manifest says {expected:,}",
                hint=f"Run `raev2 data verify {self.dir}`.",
            )  # fmt: skip
        if not len(self.index):
            raise DataError(f"data {self.dir}", f"split {split} is empty", hint=_rebuild(self.manifest))
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def preparation(self) -> str:
        """The centre crop, of what Pillow converts to RGB."""
        return f"Pillow's conversion to RGB, then {CENTRE_CROP}"

    def image(self, index: int) -> Tensor:
        """Image `index` as uint8 (3, H_px, W_px), prepared as `preparation` says."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        file = self.dir / self.index[index]["file"]
        rgb = read_rgb(file, f"data {file}", f"Run `raev2 data verify {self.dir}`.")
        pixels = torch.from_numpy(np.array(centre_crop(rgb, self.image_size))).permute(2, 0, 1).contiguous()
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def cond(self, index: int) -> dict[str, Any]:
        """Raw conditions of sample `index`."""
        entry = self.index[index]
        missing = [field for field in self.fields if field not in entry]
        if missing:
            raise DataError(
                f"data {self.dir}", f"sample {entry['file']} has no {missing[0]}", expected=f"fields {self.fields}",
                hint="Use data with class folders, or build it again with labels.",
            )  # fmt: skip
        return {field: entry[field] for field in self.fields}

    def key(self, index: int) -> str:
        """The SHA-256 of the file where the index has it, else its name."""
        return _key_and_group(self.index[index])[0]

    def group(self, index: int) -> Hashable:
        """The label."""
        return _key_and_group(self.index[index])[1]

    def keys_and_groups(self) -> Iterable[tuple[str, Hashable]]:
        """`key` and `group` of every sample, in one pass over the index."""
        return map(_key_and_group, self.index)


class _Stream(Dataset[Any]):
    """Sample numbers -> samples: the dataset's own order, the flip, and the policy for unreadable images.

    An error is a value here: DataLoader would turn an exception in a worker into a RuntimeError with a traceback.
    """

    def __init__(self, dataset: ImageDataset, seed: int, flip: bool) -> None:
        self.dataset, self.seed, self.flip = dataset, seed, flip

    def __getitem__(self, numbers: Sequence[int]) -> list[dict[str, Any]] | Exception:
        try:
            return [self._sample(number) for number in numbers]
        except (RaeError, OSError) as error:
            return error

    def _sample(self, number: int) -> dict[str, Any]:
        skipped = 0
        while True:  # an unreadable image is replaced by the next readable one of the same epoch
            try:
                sample = self.dataset.stream_sample(self.seed, number, skipped)
                break
            except DataError as error:
                skipped += 1
                self.dataset.skipped(error)
                if skipped == min(100, len(self.dataset)):
                    where, what = f"data {self.dataset.dir}", f"{skipped} unreadable images in a row"
                    raise DataError(where, what, hint=str(error)) from error
        if self.flip and derived_seed("flip", self.seed, number) % 2:
            sample["image"] = self.dataset.mirrored(sample)
        return {**sample, "skipped": skipped}


def train_batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start_images: int = 0,
    flip: bool = False,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """Endless batches of this process, from image number `start_images` on, each with its count of skipped images.

    `batch_size` is global; this process gets rows rank, rank + world_size, ... of every global batch, so the global
    batch does not depend on the number of processes.
    """
    if batch_size % world_size:
        raise DataError(
            "batch_size", "the global batch must split evenly", got=f"{batch_size} over {world_size} processes",
            expected=f"a multiple of {world_size}",
        )  # fmt: skip

    starts = count(start_images, batch_size)
    loader = DataLoader(
        _Stream(dataset, seed, flip), num_workers=num_workers, worker_init_fn=ignore_signals,
        batch_size=None, sampler=(list(range(start + rank, start + batch_size, world_size)) for start in starts),
        collate_fn=partial(_collate, dataset),
    )  # fmt: skip
    return _raise_errors(iter(loader))


def ordered_batches(
    dataset: ImageDataset, batch_size: int, indices: Sequence[int] | None = None, *, skip_unreadable: bool = False
) -> Iterator[Batch]:
    """The samples of a split once, in index order.

    An unreadable image is an error, because a metric must not skip; with `skip_unreadable` it is left out, as in
    training.
    """
    indices = range(len(dataset)) if indices is None else indices
    for start in range(0, len(indices), batch_size):
        samples = []
        for index in indices[start : start + batch_size]:
            try:
                samples.append(dataset[index])
            except DataError as error:
                if not skip_unreadable:
                    raise
                dataset.skipped(error)
        if samples:
            yield _batch(dataset, samples)


def random_subset(keys_and_groups: Iterable[tuple[str, Hashable]], num: int, seed: int = 0) -> list[int]:
    """Positions of `num` of these items in random order. Every group has its share; which items, only their keys say.

    Items are in the order of a hash of (seed, key). Item j of n of a group stands at (j + u) / n, with u of [0, 1) by
    a hash of (seed, group), and the `num` items that stand first are taken: systematic sampling.
    """
    groups: dict[Hashable, int] = {}
    pairs = ((derived_seed("subset", seed, key), groups.setdefault(g, len(groups))) for key, g in keys_and_groups)
    hashes, numbers = np.fromiter(pairs, np.dtype((np.int64, 2))).T
    order = np.argsort(hashes, kind="stable")
    numbers = numbers[order]
    sizes = np.bincount(numbers)
    seen = np.empty(len(order))
    seen[np.argsort(numbers, kind="stable")] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    starts = np.array([derived_seed("group", seed, group) / 2**63 for group in groups])
    places = (seen + starts[numbers]) / sizes[numbers]
    return order[np.sort(np.argsort(places, kind="stable")[:num])].tolist()


def to_float(images_u8: Tensor) -> Tensor:
    """8-bit images to floats in [0, 1]."""
    return images_u8.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [0, 1] to 8 bits, rounded (the reference implementations truncate, which darkens by half a level)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _key_and_group(entry: Mapping[str, Any]) -> tuple[str, Hashable]:
    return entry.get("sha256") or entry["file"], entry.get("label")


def _stack(values: Sequence[Any]) -> Tensor:
    if isinstance(values[0], np.ndarray | Tensor):
        return torch.stack([torch.as_tensor(value) for value in values])
    return torch.tensor(values)


def _collate(dataset: ImageDataset, samples: list[dict[str, Any]] | Exception) -> tuple[Batch, int] | Exception:
    """A batch and its count of skipped images."""
    if isinstance(samples, Exception):
        return samples
    return _batch(dataset, samples), sum(sample["skipped"] for sample in samples)


def _batch(dataset: ImageDataset, samples: Sequence[dict[str, Any]]) -> Batch:
    return Batch(
        images=torch.stack([sample["image"] for sample in samples]),
        cond=dataset.collate_cond([sample["cond"] for sample in samples]),
        key=torch.tensor([sample["key"] for sample in samples]),
    )


def ignore_signals(_: int) -> None:
    """In a worker: Ctrl-C and a cancelled job reach the whole process group, and the training still needs a batch."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raise_errors(batches: Iterator[tuple[Batch, int] | Exception]) -> Iterator[tuple[Batch, int]]:
    error: Exception | None = None
    for batch in batches:
        if isinstance(batch, Exception):
            error = batch
            break
        yield batch
    del batches  # stop the workers now; the garbage collector would wait ten seconds for them
    if error is not None:
        raise error


def derived_seed(*parts: object) -> int:
    """63-bit seed from a hash of the parts: equal parts, equal seed, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _rebuild(manifest: dict[str, Any]) -> str:
    return f"Build it again with `raev2 data build {manifest.get('recipe', 'RECIPE')} --overwrite`."
