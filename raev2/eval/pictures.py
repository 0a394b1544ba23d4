"""Pictures of any origin, scored without a run. Read `score_pictures` first.

A reference of generation is another set of pictures, or stored statistics; one of reconstruction is the originals, one
for each picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raev2.batch import MetricResult
from raev2.data import FolderDataset, random_subset
from raev2.errors import DataError, SpecError
from raev2.eval.features import FeatureExtractor
from raev2.eval.protocols import GenerationEvaluator, ReconstructionEvaluator
from raev2.eval.references import FORMATS, Reference, check_originals, read_reference
from raev2.eval.sets import PictureSet, SetFeatures, features_file, set_features, split_pictures
from raev2.files.hashes import file_sha256, json_sha256
from raev2.files.images import picture_size, read_rgb
from raev2.files.picture_array import PictureArray
from raev2.files.picture_folder import image_files
from raev2.task import Evaluator, Task, get_recipe

PictureEvaluator = GenerationEvaluator | ReconstructionEvaluator
Features = Callable[[PictureSet, FeatureExtractor], SetFeatures]


def cache_dir() -> Path:
    """Where features are kept for all runs, each under the hash of what it depends on."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raev2" / "features"


def find_evaluator(tasks: Sequence[Task], protocol: str) -> PictureEvaluator:
    """The protocol of this name of the first task that has one, as its quickstart sets it.

    Raises SpecError for an unknown one, and for one that needs a run.
    """
    known: dict[str, Evaluator] = {}
    for task in reversed(tasks):
        known |= {evaluator.protocol: evaluator for evaluator in task.evaluators(get_recipe(task, "quickstart"))}
    found = known.get(protocol)
    if isinstance(found, PictureEvaluator):
        return found
    what = "needs a run, it does not score pictures alone" if found else "unknown protocol"
    usable = sorted(name for name, evaluator in known.items() if isinstance(evaluator, PictureEvaluator))
    raise SpecError("--protocol", what, got=repr(protocol), expected=f"one of {', '.join(usable)}")


def score_pictures(
    evaluator: PictureEvaluator, images: Path, reference: Path, device: torch.device, num_workers: int = 0
) -> tuple[list[MetricResult], dict[str, Any]]:
    """Scores of a folder or an .npz file of pictures by a protocol, and what they depend on."""
    if isinstance(evaluator, ReconstructionEvaluator):
        return _score_pairs(evaluator, images, reference, device, num_workers)
    pictures, _ = open_pictures(images)
    kept = partial(set_features, cache_dir=cache_dir(), num_workers=num_workers, max_rows=evaluator.max_rows)
    against, about = _reference(reference, pictures, evaluator.reference_split, kept)
    extractors = evaluator.open(device)
    known = [(against(extractor), None) for extractor in extractors]  # first: one may not fit
    return evaluator.scores(pictures.name, pictures.places, pictures.chunks(num_workers), extractors, known), {
        "num_samples": len(pictures.places), "pictures": {"path": str(images), **pictures.identity}, "reference": about,
        "features": {own.name: {"preparation": own.preparation, "fingerprint": own.fingerprint} for own in extractors},
    }  # fmt: skip


def build_reference(
    evaluator: PictureEvaluator, data: Path, split: str | None, device: torch.device, num_workers: int = 0
) -> list[Path]:
    """Put features of a dataset folder or of any pictures into the cache, where evaluations look; the files."""
    if isinstance(evaluator, ReconstructionEvaluator):
        raise SpecError("--protocol", "its reference are the originals, nothing is built", got=evaluator.protocol)
    pictures, rows = _reference_set(data, split or evaluator.reference_split), evaluator.max_rows
    extractors = evaluator.open(device)
    for extractor in extractors:
        set_features(pictures, extractor, cache_dir(), num_workers, rows)
    return [features_file(pictures, extractor, cache_dir(), rows)[0] for extractor in extractors]


# Pictures


def open_pictures(path: Path, name: str = "the pictures") -> tuple[PictureSet, list[str]]:
    """Pictures of a folder (to any depth) or an .npz file in random order, and by place their names in it.

    Raises DataError where there is no picture, they differ in size, or the file holds something else.
    """
    if path.is_file():
        array = PictureArray(path)
        names = keys = [str(place) for place in range(array.shape[0])]
        size, content, read = array.shape[1:3], file_sha256(path), partial(_read_array, array)
    else:
        files = image_files([path])
        names = [file.relative_to(path).with_suffix("").as_posix() for file in files]
        size, keys = _common_size(path, files), [file_sha256(file) for file in files]
        content, read = json_sha256(keys), partial(_read_file, files)
    order = random_subset([(key, None) for key in keys], len(keys))
    identity = {
        "num_images": len(order), "image_size": list(size), "sha256": content,
        "preparation": "as stored, Pillow's conversion to RGB, no resizing",
    }  # fmt: skip
    identity["fingerprint"] = json_sha256(identity)
    return PictureSet(name, identity, read, order), names


def _reference_set(path: Path, split: str, size: Sequence[int] | None = None) -> PictureSet:
    """Reference pictures; those of a dataset folder as runs have them, cropped to a size (None: of the first one)."""
    if not (path / "manifest.json").is_file():
        return open_pictures(path, "the reference")[0]
    dataset = FolderDataset(path, split, (0, 0))
    file = dataset.dir / dataset.index[0]["file"]
    height, width = size or picture_size(file, f"data {file}")[::-1]
    dataset.image_size = height, width
    return split_pictures(dataset)


def _common_size(path: Path, files: Sequence[Path]) -> tuple[int, int]:
    """Height and width of all pictures."""
    width, height = picture_size(files[0], f"picture {files[0]}")
    for file in files:
        other = picture_size(file, f"picture {file}")
        if other != (width, height):
            raise DataError(
                f"pictures {path}", "pictures of several sizes",
                got=f"{files[0].name} {width} x {height} px, {file.name} {other[0]} x {other[1]} px",
                hint="Bring them to one size: `raev2 data build image-folder --set src=DIR --set size=PX` does.",
            )  # fmt: skip
    return height, width


def _read_array(array: PictureArray, place: int) -> Tensor:
    return torch.from_numpy(array.read([place])[0]).permute(2, 0, 1)


def _read_file(files: Sequence[Path], place: int) -> Tensor:
    return torch.from_numpy(np.array(read_rgb(files[place], f"picture {files[place]}"))).permute(2, 0, 1)


# References


def _reference(
    path: Path, pictures: PictureSet, split: str, features: Features
) -> tuple[Callable[[FeatureExtractor], SetFeatures], dict[str, Any]]:
    """Features of a reference of generation in any space, and what it is."""
    files = [path] if path.suffix in FORMATS else sorted(path.glob("*stats*.npz"))
    if split == "train" and files:  # of validation there are pictures, no statistics
        stored = [read_reference(file) for file in files]
        beside = {own.file: open_pictures(own.file, "the reference")[0] for own in stored if own.has_pictures}
        for own_pictures in beside.values():
            _check_size(path, pictures, own_pictures)
        about = stored[0].identity() if files == [path] else {"files": [own.identity() for own in stored]}
        return partial(_stored, stored, beside, features), {"path": str(path), **about}
    reference = _reference_set(path, split, pictures.identity["image_size"])
    _check_size(path, pictures, reference)
    return partial(features, reference), {"path": str(path), **reference.identity}


def _stored(
    several: Sequence[Reference], beside: Mapping[Path, PictureSet], features: Features, extractor: FeatureExtractor
) -> SetFeatures:
    """Statistics in a file; pictures beside them in it, or their features, give precision, recall and KID.

    Of several files it is the one with the model in its name.
    """
    fitting = [own for own in several if len(several) == 1 or extractor.model in own.file.name]
    if len(fitting) != 1:
        raise DataError(
            f"reference {several[0].file.parent}", f"not one file of statistics for the space '{extractor.name}'",
            got=", ".join(own.file.name for own in several), expected=f"a name with {extractor.model!r} in it",
        )  # fmt: skip
    stored, sizes = fitting[0], {"": extractor.dim, **extractor.more}
    found = {output: stored.of_space(extractor.name, dim, output) for output, dim in sizes.items()}
    sets = {output: SetFeatures("the reference", own, None) for output, own in found.items() if own is not None}
    seen = features(beside[stored.file], extractor) if stored.has_pictures else stored
    return replace(sets.pop(""), rows=seen.rows, more=sets)


def _check_size(path: Path, pictures: PictureSet, reference: PictureSet) -> None:
    (height, width), own = reference.identity["image_size"], pictures.identity["image_size"]
    if [height, width] != own:
        raise DataError(
            f"reference {path}", "pictures of another size", got=f"{width} x {height} px",
            expected=f"{own[1]} x {own[0]} px", hint="Prepare both sets in the same way.",
        )  # fmt: skip


def _score_pairs(
    evaluator: ReconstructionEvaluator, images: Path, reference: Path, device: torch.device, num_workers: int
) -> tuple[list[MetricResult], dict[str, Any]]:
    check_originals(reference)
    (pictures, names), (originals, known) = open_pictures(images), open_pictures(reference)
    _check_size(reference, pictures, originals)
    places = _originals(reference, names, known)
    pairs = replace(pictures, read=partial(_read_pair, pictures.read, originals.read, places))
    chunks = ((numbers, both[:, :3], both[:, 3:]) for numbers, both in pairs.chunks(num_workers))
    return list(evaluator.scores(chunks, device)), {
        "num_samples": len(names),
        "pictures": {"path": str(images), **pictures.identity},
        "reference": {"path": str(reference), **originals.identity},
        "pairs": "by name" if {*names} == {*known} else "by place", "perceptual": evaluator.available(),
    }  # fmt: skip


def _originals(path: Path, names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Places of the originals of each picture: by name, or where they share no name the same places."""
    places, without = {name: place for place, name in enumerate(known)}, {*names} - {*known}
    if len({*names}) == len(names) == len(known) == len(places):
        if not without:
            return [places[name] for name in names]
        if len(without) == len(names):
            return list(range(len(names)))
    raise DataError(
        f"reference {path}", "not one original for each picture",
        got=f"{len(names):,} pictures, {len(known):,} originals, {len(without):,} names without an original",
        hint="Give both the same names, or as many without a common name.",
    )  # fmt: skip


def _read_pair(
    picture: Callable[[int], Tensor], original: Callable[[int], Tensor], places: Sequence[int], place: int
) -> Tensor:
    return torch.cat([picture(place), original(places[place])])
