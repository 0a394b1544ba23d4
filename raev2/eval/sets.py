"""Sets of pictures, what a feature network sees in them, and the metrics between two sets.

Read `compare` first: it is the one place where two sets become numbers, for generators and for pictures of any origin.
The order of a set is random (`ImageDataset.subset`), so that any first so many of its pictures are a fair sample.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from raev2.batch import MetricResult
from raev2.data import ImageDataset, ignore_signals
from raev2.errors import DataError
from raev2.eval.distances import FrechetTo, Gaussian, Moments, inception_score, kernel_distance, precision_recall
from raev2.eval.features import (
    INCEPTION,
    LOGITS,
    SPATIAL,
    FeatureExtractor,
    check_finite,
    frechet_about,
    frechet_name,
    not_finite,
)
from raev2.eval.generate import CHUNK_SIZE, gathered, local_chunks
from raev2.files.hashes import json_sha256
from raev2.files.replace import new_file
from raev2.shapes import ImagesU8
from raev2.training import dist

logger = logging.getLogger(__name__)
NEIGHBOURS = 3  # of a picture, to the last of which its ball in a manifold reaches
MANIFOLD_IMAGES = 10_000  # rows that are kept of a set, the references of precision and recall in the ADM evaluation
SHUFFLE_BLOCKS = 4  # blocks a side of the block-shuffled pictures
PUBLISHED_LEVELS = {INCEPTION: (2.0,)}  # papers state how much training reaches an FID of 2

# Pictures


@dataclass(frozen=True)
class PictureSet:
    """Numbered 8-bit pictures of one size, in random order.

    name      what results call it, such as 'val'
    identity  all that the pictures depend on, as JSON; its SHA-256 names features that are kept
    read      place in the source -> picture (3, Hpx, Wpx) uint8; workers call it, so it can be pickled
    places    where each picture lies in its source; reading goes forward
    blocks    blocks a side into which each picture is cut and shuffled; 1: as it is
    """

    name: str
    identity: Mapping[str, Any]
    read: Callable[[int], Tensor]
    places: Sequence[int]
    blocks: int = 1

    def chunks(self, num_workers: int = 0) -> Iterator[tuple[list[int], ImagesU8]]:
        """Numbers and pictures of this process's share, read ahead by workers. An unreadable picture is an error."""
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        chunks = [[order[i] for i in chunk] for chunk in local_chunks(len(order), CHUNK_SIZE)]
        reader: DataLoader[Any] = DataLoader(
            chunks,  # type: ignore[arg-type]  # any sequence will do
            batch_size=None, collate_fn=self._pictures, num_workers=num_workers, worker_init_fn=ignore_signals,
        )  # fmt: skip
        progress = local_chunks(len(order), CHUNK_SIZE, f"pictures of {self.name}")
        for numbers, images, _ in zip(chunks, reader, progress, strict=True):
            if isinstance(images, DataError):
                raise images
            yield numbers, images

    def _pictures(self, numbers: Sequence[int]) -> Tensor | DataError:
        """An error is a value: DataLoader would make a RuntimeError with a traceback of it."""
        try:
            images = torch.stack([self.read(self.places[number]) for number in numbers])
        except DataError as error:
            return error
        return images if self.blocks == 1 else block_shuffle(images, self.blocks, numbers)


def split_pictures(dataset: ImageDataset, indices: Sequence[int] | None = None) -> PictureSet:
    """Pictures of a split with these indices; None: all of them, in the order of `ImageDataset.subset`."""
    indices = dataset.subset() if indices is None else indices
    identity = {
        "data": dataset.fingerprint, "split": dataset.split, "num_images": len(indices), "of": len(dataset),
        "image_size": list(dataset.image_size), "preparation": dataset.preparation,
        "pictures": json_sha256([dataset.key(index) for index in indices]),
    }  # fmt: skip
    identity["fingerprint"] = json_sha256(identity)
    return PictureSet(dataset.split, identity, dataset.image, indices)


def of_groups(dataset: ImageDataset, groups: Sequence[Hashable]) -> list[int]:
    """For each entry the next picture of that group in random order, from the first again where they are used up.

    A group that the split does not have is served from all of its pictures.
    """
    members: dict[Hashable, list[int]] = {}
    for index in dataset.subset():
        members.setdefault(dataset.group(index), []).append(index)
    pools = {group: cycle(members.get(group) or dataset.subset()) for group in set(groups)}
    return [next(pools[group]) for group in groups]


def coverage(dataset: ImageDataset, asked: Sequence[Hashable]) -> dict[str, Any]:
    """How many of the groups of a split were asked for; empty where it has none."""
    known = {dataset.group(index) for index in range(len(dataset))}
    if known == {None}:
        return {}
    return {"what": dataset.group_kind, "asked": len({*asked} & known), "of": len(known)}


def shuffled(pictures: PictureSet) -> PictureSet:
    """The same pictures, each cut into blocks and these shuffled: right colours and textures, no shapes."""
    identity = {**pictures.identity, "shuffle_blocks": SHUFFLE_BLOCKS}
    return replace(pictures, identity=identity, blocks=SHUFFLE_BLOCKS)


def block_shuffle(images_u8: ImagesU8, blocks: int, numbers: Sequence[int]) -> ImagesU8:
    """Cut each picture into blocks x blocks pieces and shuffle them; the order depends on the picture's number alone.

    Pixels that are left over when the size does not divide are cropped at the right and bottom.
    """
    height, width = images_u8.shape[2] // blocks, images_u8.shape[3] // blocks
    tiles = images_u8[:, :, : height * blocks, : width * blocks]
    tiles = tiles.unflatten(3, (blocks, width)).unflatten(2, (blocks, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    orders = [torch.randperm(blocks**2, generator=torch.Generator().manual_seed(number)) for number in numbers]
    moved = torch.stack([own[order] for own, order in zip(tiles, orders, strict=True)])  # (B, blocks^2, 3, h, w)
    return moved.unflatten(1, (blocks, blocks)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# Features


@dataclass(frozen=True)
class SetFeatures:
    """What a feature network sees in a set.

    moments   of all its pictures
    rows      by number: all, or the first so many; None where only statistics are stored
    more      the same for further outputs of the network
    """

    name: str
    moments: Moments | Gaussian
    rows: Tensor | None
    more: Mapping[str, SetFeatures] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, rows: Tensor, **more: Tensor) -> SetFeatures:
        """A set of which all rows are at hand."""
        return cls(name, Moments.of(rows), rows, {output: cls.of(name, own) for output, own in more.items()})

    def first(self, num: int) -> Moments | Gaussian:
        """Moments of the first `num` pictures."""
        if num == self.moments.count:
            return self.moments
        assert self.rows is not None and len(self.rows) >= num, "a smaller set needs its rows"
        return Moments.of(self.rows[:num])


def set_features(
    pictures: PictureSet,
    extractor: FeatureExtractor,
    cache_dir: Path,
    num_workers: int = 0,
    max_rows: int = MANIFOLD_IMAGES,
) -> SetFeatures:
    """Features of a set, by all processes together, kept in `cache_dir` under the hash of what they depend on."""
    sizes = {"": extractor.dim, **extractor.more}
    file, identity = features_file(pictures, extractor, cache_dir, max_rows)
    if not all(dist.gather_objects(file.is_file())):
        tensors = _features(pictures, extractor, sizes, num_workers, max_rows)
        if dist.is_main():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with new_file(file, shared=True) as partial_file:
                save_file(tensors, partial_file, metadata={"identity": json.dumps(identity)})
        dist.barrier()
    tensors = load_file(file)
    found = {}
    for output in sizes:
        moments = Moments.from_tensors({key: tensors[output + key] for key in ("count", "sum", "outer")})
        found[output] = SetFeatures(pictures.name, moments, tensors.get(f"{output}rows"))
    return replace(found.pop(""), more=found)


def features_file(
    pictures: PictureSet, extractor: FeatureExtractor, cache_dir: Path, max_rows: int = MANIFOLD_IMAGES
) -> tuple[Path, dict[str, Any]]:
    """Where `set_features` keeps the features of a set, and all that they depend on."""
    sizes = {"": extractor.dim, **extractor.more}
    identity = {**pictures.identity, "extractor": extractor.fingerprint, "rows": max_rows, "outputs": sizes}
    name = extractor.name.replace("/", "_").replace(":", "_")
    return cache_dir / f"features-{name}-{json_sha256(identity)[:16]}.safetensors", identity


def _features(
    pictures: PictureSet, extractor: FeatureExtractor, sizes: Mapping[str, int], num_workers: int, max_rows: int
) -> dict[str, Tensor]:
    """Moments and rows of all outputs, with the output in front of their names; of `spatial` there are no rows."""
    moments = {output: Moments.of(torch.empty(0, size)) for output, size in sizes.items()}
    kept, bad = list[tuple[list[int], dict[str, Tensor]]](), list[int]()
    for numbers, images in pictures.chunks(num_workers):
        found = extractor.outputs(images)
        bad += (broken := not_finite(numbers, found))
        for output, values in ({} if broken else found).items():
            moments[output] = moments[output].merge(Moments.of(values))
        first = [place for place, number in enumerate(numbers) if number < max_rows]
        rows = {f"{output}rows": values[first] for output, values in found.items() if output != SPATIAL}
        kept.append(([numbers[place] for place in first], rows))
    check_finite(extractor.name, pictures.name, [pictures.places[number] for number in bad])
    whole = {output: own.over_processes().tensors() for output, own in moments.items()}
    return {output + key: value for output, own in whole.items() for key, value in own.items()} | gathered(kept)


# Metrics


@dataclass(frozen=True)
class Scale:
    """Sets with a known place, measured as generated pictures are.

    floor      as many reference pictures of the labels that were asked for: a perfect generator
    held_out   real pictures that are no references, as many where there are so many
    blocks     the same, cut into blocks and shuffled
    """

    floor: SetFeatures
    held_out: SetFeatures
    blocks: SetFeatures


def compare(
    extractor: FeatureExtractor, pictures: SetFeatures, reference: SetFeatures, scale: Scale | None = None
) -> Iterator[MetricResult]:
    """The metrics of a set against a reference, computed on the main process; every process yields them.

    pictures   generated ones, or others, with all their rows; without rows there is the distance alone
    """
    yield from dist.on_main(lambda: list(_compare(extractor.name, pictures, reference, scale)))


def _compare(net: str, pictures: SetFeatures, reference: SetFeatures, scale: Scale | None) -> Iterator[MetricResult]:
    yield from _distances(net, pictures, reference, scale)
    yield from _from_rows(net, pictures, reference)
    if scale is not None:
        split = scale.held_out.name
        for result in _from_rows(net, replace(scale.held_out, name=f"real pictures of '{split}'"), reference):
            yield replace(result, name=f"{result.name}_{split}", role="scale", of=result.name)


def _from_rows(net: str, pictures: SetFeatures, reference: SetFeatures) -> Iterator[MetricResult]:
    """What needs the features of single pictures, or other outputs of the network."""
    if net == INCEPTION:
        yield from _of_inception(pictures, reference)
    if pictures.rows is not None and reference.rows is not None:
        if (num := min(len(pictures.rows), len(reference.rows))) <= NEIGHBOURS:
            logger.warning("no precision and recall of %s: %d are too few", pictures.name, num)
            return
        yield from _manifolds(net, pictures.name, pictures.rows, reference.rows)


def _distances(net: str, pictures: SetFeatures, reference: SetFeatures, scale: Scale | None) -> Iterator[MetricResult]:
    """The Fréchet distance, its ratio to that of real pictures, and the same distance of sets with a known place."""

    distance = FrechetTo(reference.moments, reference.rows)
    name, num, value = frechet_name(net), pictures.moments.count or 0, distance(pictures.moments)
    warning, known = too_few(len(distance.mean), num, reference.moments.count), reference.moments.count
    floor = distance(scale.floor.moments) if scale else 0.0
    if value < floor:
        warning = f"no headroom at this size: as many real pictures of '{reference.name}' have {floor:.4g}"
    stderr = None if pictures.rows is None else distance.stderr(pictures.rows)
    note = f"against {known:,} pictures" if known else "against stored statistics"
    yield MetricResult(
        name, value, num, stderr, note if stderr is None else f"{note}; {distance.error_note}", warning=warning,
        better="lower", role="headline", levels=PUBLISHED_LEVELS.get(net, ()),
        about=frechet_about(net, f"{pictures.name} and those of '{reference.name}'"),
    )  # fmt: skip
    if scale is None:
        return

    split, num_real = scale.held_out.name, scale.held_out.moments.count or 0
    real, same = distance(scale.held_out.moments), distance(pictures.first(num_real))
    if real > 0:
        yield MetricResult(
            "fid_ratio" if name == "fid" else f"fd_ratio_{net}", same / real, num_real,
            note=f"both with {num_real:,} pictures", warning=warning, better="lower", role="headline",
            about=f"{name} over {name}_{split}: 1 means as close to '{reference.name}' as real pictures are.",
        )  # fmt: skip
    row = partial(MetricResult, better="lower", role="scale", of=name)
    note = "" if num_real == num else f"as many {pictures.name} have {same:.4g}"
    about = f"The same distance for as many pictures of '{reference.name}' of the same kinds: a perfect generator's."
    yield row(f"{name}_floor", floor, num, about=about)
    about = f"The same distance for real pictures of '{split}'"
    yield row(f"{name}_{split}", real, num_real, note=note, about=f"{about}: as good as it gets without copying.")
    about += f", cut into {SHUFFLE_BLOCKS} x {SHUFFLE_BLOCKS} blocks and shuffled: right colours, no shapes."
    yield row(f"{name}_shuffled", distance(scale.blocks.moments), num_real, note=note, about=about)


def too_few(dim: int, *counts: int | None) -> str:
    """A warning where a set has no more pictures than features, so that its covariance lacks rank."""
    num = min(count for count in (*counts, dim + 1) if count is not None)
    return "" if num > dim else f"only {num:,} pictures for {dim:,} features: biased, compare at equal numbers alone"


def _of_inception(pictures: SetFeatures, reference: SetFeatures) -> Iterator[MetricResult]:
    """Inception Score, sFID and KID."""
    row = partial(MetricResult, role="headline")
    logits, spatial, num = pictures.more.get(LOGITS), reference.more.get(SPATIAL), pictures.moments.count or 0
    if logits is not None and logits.rows is not None:
        value, spread = inception_score(logits.rows)
        about = "Inception Score, mean of 10 splits: are the pictures clear and their classes many? Grows with n."
        yield row("inception_score", value, len(logits.rows), spread / 10**0.5, better="higher", about=about)
    if spatial is not None and SPATIAL in pictures.more:
        distance = FrechetTo(spatial.moments, spatial.rows)
        about = "sFID: the Fréchet distance of 2,023 spatial features of Inception; sees where things are."
        warning = too_few(len(distance.mean), num, spatial.moments.count)
        value = distance(pictures.more[SPATIAL].moments)
        yield row("sfid", value, num, better="lower", about=about, warning=warning)
    if pictures.rows is not None and reference.rows is not None:
        num = min(len(pictures.rows), len(reference.rows))
        value, spread = kernel_distance(pictures.rows, reference.rows)
        about = "Kernel Inception Distance, mean of 100 subsets of up to 1,000: unlike FID it does not grow with few."
        yield row("kid", value, num, spread / max(num / 1000, 1) ** 0.5, better="lower", about=about)


def _manifolds(net: str, what: str, rows: Tensor, reference: Tensor) -> Iterator[MetricResult]:
    """Precision and recall."""
    near = f"in the space of '{net}' (manifolds of {NEIGHBOURS} nearest neighbours)"
    abouts = {
        "precision": f"Share of {what} near a reference picture {near}: do they look right?",
        "recall": f"Share of reference pictures near {what} {near}: is the variety covered? Grows with n.",
    }
    shares = precision_recall(reference, rows, NEIGHBOURS)
    for (kind, about), share, num in zip(abouts.items(), shares, (len(rows), len(reference)), strict=True):
        stderr = (share * (1 - share) / num) ** 0.5
        yield MetricResult(f"{kind}_{net}", share, num, stderr, better="higher", role="headline", about=about)
