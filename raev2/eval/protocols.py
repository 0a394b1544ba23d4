"""The protocols that every task may use, and the one function that runs a protocol and writes its result file.

Read `run_protocol` first: training and `raev2 eval` both call it, so their numbers are the same. A task names and
parametrises the two evaluators here; it adds its own beside them where its condition needs other metrics.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raev2.batch import Better, Cond, MetricResult, Role
from raev2.data import ImageDataset
from raev2.errors import DataError, TaskError
from raev2.eval.distances import Moments, frechet_stderr, moments_distance, precision_recall
from raev2.eval.features import (
    INCEPTION,
    FeatureExtractor,
    build_extractor,
    extractor_needs,
    frechet_about,
    frechet_name,
)
from raev2.eval.generate import collect, generated_images, local_chunks
from raev2.eval.image_pairs import PairDistance, build_pair_distance, lpips_available, pair_needs, psnr, ssim
from raev2.files.artefact import write_json
from raev2.files.assets import Asset
from raev2.files.hashes import json_sha256
from raev2.shapes import ImagesU8
from raev2.spec import RunSpec
from raev2.spec_io import fingerprint, spec_to_dict
from raev2.task import EvalContext, Evaluator
from raev2.training import dist
from raev2.training.run import package_versions

logger = logging.getLogger(__name__)
CHUNK_SIZE = 64  # images a chunk; fixed, so that no result depends on a batch size
MANIFOLD_IMAGES = 10_000  # images a set in precision and recall, as in the ADM evaluation
NEW_METRIC = "See docs/how_to/new_metric.md."
SHUFFLE_BLOCKS = 4  # blocks a side of the block-shuffled pictures
RESULT_FORMAT_VERSION = 2  # 1 had no meaning in its results and claimed one preparation for all data
PUBLISHED_LEVELS = {INCEPTION: (2.0,)}  # papers state how much training reaches an FID of 2
PAIR_ABOUT = {
    "psnr": "Peak signal-to-noise ratio of the two pictures in dB, mean over pictures.",
    "ssim": "Structural similarity of the two pictures (Gaussian window, 11 px), mean over pictures; 1 is identical.",
}

Build = Callable[[str, torch.device], FeatureExtractor]


class ReconstructionEvaluator(Evaluator):
    """The tokenizer against the originals: PSNR, SSIM, a perceptual distance, and Fréchet distances of the two sets.

    The reference is always the originals of the same split, prepared in the same way. An r in front of a name
    (`rfd_micro`, `rfid`) says so; these numbers have nothing to do with those of a generator.
    """

    needs_generator = False

    def __init__(
        self,
        protocol: str,
        extractors: Sequence[str] = ("micro",),
        *,
        split: str = "val",
        max_images: int | None = None,
        perceptual: Sequence[str] = ("lpips_vgg", "feature_distance_micro"),
        build: Build = build_extractor,
        build_pairs: Callable[[str, torch.device], PairDistance] = build_pair_distance,
    ) -> None:
        """Name a protocol.

        extractors   feature networks of the Fréchet distances, by name
        max_images   first images of the split; None: all
        perceptual   perceptual distances in order of preference; the first that this machine can compute is used
        """
        self.protocol, self.extractors, self.split, self.max_images = protocol, tuple(extractors), split, max_images
        self.perceptual, self.build, self.build_pairs = tuple(perceptual), build, build_pairs
        count = "all" if max_images is None else f"the first {max_images:,}"
        self.description = f"reconstructions of {count} images of '{split}' against their originals"

    def needs(self) -> list[Asset]:
        """Weights of the feature networks and of the perceptual distances; of the latter, all but the last may miss."""
        pairs = zip(self.perceptual, (*self.perceptual[1:], ""), strict=True)
        found = [asset for name, other in pairs for asset in pair_needs(name, other)]
        return [*found, *(asset for name in self.extractors for asset in extractor_needs(name))]

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """What the numbers depend on, for the result file."""
        dataset = context.dataset(self.split)
        return {
            "reference": {**_split_identity(dataset, self._count(dataset)), "what": "originals of the same images"},
            "label_policy": "none, the tokenizer sees no condition",
            "perceptual": self._available(),
        }

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """PSNR, SSIM, perceptual distance, then one Fréchet distance for each feature network."""
        dataset = context.dataset(self.split)
        num = self._count(dataset)
        extractors = [self.build(name, context.device) for name in self.extractors]
        pair_distance = self.build_pairs(self._available(), context.device)

        def rows(indices: Sequence[int]) -> dict[str, Tensor]:
            originals = _images(dataset, indices)
            images = context.reconstruct(originals)
            if images.shape != originals.shape:
                raise DataError(
                    f"protocol {self.protocol}", "reconstruction and original differ in size",
                    got=tuple(images.shape[2:]), expected=str(tuple(originals.shape[2:])),
                )  # fmt: skip
            values = {
                "psnr": psnr(images, originals),
                "ssim": ssim(images, originals),
                pair_distance.name: pair_distance(images, originals),
            }
            for extractor in extractors:
                values[f"original/{extractor.name}"] = extractor(originals)
                values[f"image/{extractor.name}"] = extractor(images)
            return values

        found = collect(num, CHUNK_SIZE, rows, "reconstructions")
        for name, about in {**PAIR_ABOUT, pair_distance.name: pair_distance.about}.items():
            better: Better = "higher" if name in PAIR_ABOUT else "lower"
            yield MetricResult(name, *mean_and_error(found[name]), better=better, role="headline", about=about)
        for extractor in extractors:
            images, originals = found[f"image/{extractor.name}"], found[f"original/{extractor.name}"]
            yield MetricResult(
                f"r{frechet_name(extractor.name)}", moments_distance(Moments.of(images), Moments.of(originals)), num,
                frechet_stderr(images, originals), better="lower", role="headline",
                about=frechet_about(extractor.name, "reconstructions and originals, a score of the tokenizer alone,"),
            )  # fmt: skip

    def _count(self, dataset: ImageDataset) -> int:
        return min(len(dataset), self.max_images or len(dataset))

    def _available(self) -> str:
        """The first perceptual distance that needs no missing weights."""
        for name in self.perceptual:
            if not name.startswith("lpips_") or lpips_available(name.removeprefix("lpips_")):
                return name
        return self.perceptual[-1]


class GenerationEvaluator(Evaluator):
    """Generated images against a reference split: Fréchet distance, precision and recall, with a scale beside them.

    The scale are two sets with a known place, measured against the same reference by the same code: real pictures of
    `scale_split` (as good as it gets) and the same pictures cut into blocks and shuffled (right colours and textures,
    no shapes). `fd_ratio_<net>` is the distance of generated images over that of real ones, both with as many images.
    """

    needs_generator = True

    def __init__(
        self,
        protocol: str,
        cond: Callable[[RunSpec, ImageDataset, Sequence[int]], Cond],
        extractors: Sequence[str] = ("micro",),
        *,
        label_policy: str,
        num_samples: int,
        reference_split: str = "train",
        scale_split: str = "val",
        cond_split: str = "val",
        build: Build = build_extractor,
    ) -> None:
        """Name a protocol.

        cond            `eval_cond` of the task: raw conditions by global sample number
        label_policy    in words, which conditions these are
        extractors      feature networks by name
        cond_split      the split that `cond` gets
        """
        self.protocol, self.cond, self.extractors, self.build = protocol, cond, tuple(extractors), build
        self.label_policy, self.num_samples = label_policy, num_samples
        self.reference_split, self.scale_split, self.cond_split = reference_split, scale_split, cond_split
        self.description = f"{num_samples:,} generated images against '{reference_split}'"

    def needs(self) -> list[Asset]:
        """Weights of the feature networks."""
        return [asset for name in self.extractors for asset in extractor_needs(name)]

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """What the numbers depend on, for the result file."""
        dataset = context.dataset(self.reference_split)
        return {
            "reference": {**_split_identity(dataset, len(dataset)), "what": "all images of the split"},
            "label_policy": self.label_policy,
            "precision_recall": {"k": 3, "max_images_per_set": MANIFOLD_IMAGES},
        }

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """For each feature network: distance, ratio, precision, recall, then the scale."""
        extractors = [self.build(name, context.device) for name in self.extractors]
        conditions = context.dataset(self.cond_split)

        def rows(indices: Sequence[int]) -> dict[str, Tensor]:
            images = generated_images(context, lambda i: self.cond(context.spec, conditions, i), indices)
            return {extractor.name: extractor(images) for extractor in extractors}

        found = collect(self.num_samples, CHUNK_SIZE, rows, "generated images")
        reference_set, scale_set = context.dataset(self.reference_split), context.dataset(self.scale_split)
        num_scale = min(len(scale_set), self.num_samples)
        for extractor in extractors:
            reference = split_features(context, extractor, reference_set, len(reference_set))
            real = split_features(context, extractor, scale_set, num_scale)
            shuffled = split_features(context, extractor, scale_set, num_scale, shuffle_blocks=SHUFFLE_BLOCKS)
            yield from self._results(extractor.name, found[extractor.name], reference, real, shuffled)

    def _results(
        self, net: str, features: Tensor, reference: SplitFeatures, real: SplitFeatures, shuffled: SplitFeatures
    ) -> Iterator[MetricResult]:
        name, num, num_scale = frechet_name(net), len(features), real.moments.count
        scale, same = f"{name}_{self.scale_split}", f"The same distance for real pictures of '{self.scale_split}'"
        real_distance = moments_distance(real.moments, reference.moments)
        same_number = moments_distance(Moments.of(features[:num_scale]), reference.moments)
        yield MetricResult(
            name, moments_distance(Moments.of(features), reference.moments), num,
            frechet_stderr(features, reference.moments), f"against {reference.moments.count:,} images",
            better="lower", role="headline", levels=PUBLISHED_LEVELS.get(net, ()),
            about=frechet_about(net, f"generated pictures and those of '{self.reference_split}'"),
        )  # fmt: skip
        if real_distance > 0:
            yield MetricResult(
                "fid_ratio" if name == "fid" else f"fd_ratio_{net}", same_number / real_distance, num_scale,
                note=f"both with {num_scale:,} images", better="lower", role="headline",
                about=f"{name} over {scale}: 1 means as close to '{self.reference_split}' as real pictures are.",
            )  # fmt: skip
        yield from self._manifold(net, reference.rows, _strided(features, MANIFOLD_IMAGES))

        # The scale.
        about = f"{same}: about as good as it gets."
        yield MetricResult(scale, real_distance, num_scale, better="lower", role="scale", of=name, about=about)
        distance = moments_distance(shuffled.moments, reference.moments)
        about = f"{same}, cut into {SHUFFLE_BLOCKS} x {SHUFFLE_BLOCKS} blocks and shuffled: right colours, no shapes."
        yield MetricResult(f"{name}_shuffled", distance, num_scale, better="lower", role="scale", of=name, about=about)
        yield from self._manifold(net, reference.rows, real.rows, self.scale_split)

    def _manifold(self, net: str, reference: Tensor, rows: Tensor, split: str = "") -> Iterator[MetricResult]:
        """Precision and recall of generated pictures, or as their scale those of real ones of a split."""
        what = f"real pictures of '{split}'" if split else "generated pictures"
        near = f"in the space of '{net}' (manifolds of 3 nearest neighbours)"
        abouts = {
            "precision": f"Share of {what} near a reference picture {near}: do they look right?",
            "recall": f"Share of reference pictures near {what} {near}: is the variety covered? Grows with n.",
        }
        role: Role = "scale" if split else "headline"
        shares = precision_recall(reference, rows)
        for (kind, about), share, num in zip(abouts.items(), shares, (len(rows), len(reference)), strict=True):
            name = f"{kind}_{net}"
            own, of = (f"{name}_{split}", name) if split else (name, None)
            stderr = (share * (1 - share) / num) ** 0.5
            yield MetricResult(own, share, num, stderr, better="higher", role=role, about=about, of=of)


def mean_and_error(values: Tensor) -> tuple[float, int, float | None]:
    """Mean, number and standard error of independent values: what a `MetricResult` has after its name."""
    values = values.double()
    return float(values.mean()), len(values), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


class SplitFeatures(NamedTuple):
    """Features of a split: moments of all images, rows of at most `MANIFOLD_IMAGES` evenly spread ones."""

    moments: Moments
    rows: Tensor


def split_features(
    context: EvalContext, extractor: FeatureExtractor, dataset: ImageDataset, num: int, shuffle_blocks: int = 0
) -> SplitFeatures:
    """Features of the first `num` images of a split, kept in `context.cache_dir` by fingerprint.

    shuffle_blocks   cut each image into this many blocks a side and shuffle them; 0: as it is
    """
    identity = {
        **_split_identity(dataset, num), "extractor": extractor.fingerprint, "shuffle_blocks": shuffle_blocks,
        "rows": MANIFOLD_IMAGES,
    }  # fmt: skip
    key = json_sha256({**identity, "fingerprint": None})[:16]
    file = context.cache_dir / f"features-{extractor.name.replace('/', '_').replace(':', '_')}-{key}.safetensors"
    if all(dist.gather_objects(file.is_file())):
        tensors = load_file(file)
        return SplitFeatures(Moments.from_tensors(tensors), tensors["rows"])

    moments = Moments(extractor.dim)
    wanted = set(_strided(torch.arange(num), MANIFOLD_IMAGES).tolist())
    kept: dict[int, Tensor] = {}
    for indices in local_chunks(num, CHUNK_SIZE, f"images of '{dataset.split}'"):
        images = _images(dataset, indices)
        if shuffle_blocks:
            images = block_shuffle(images, indices, shuffle_blocks)
        features = extractor(images)
        moments.update(features)
        kept |= {index: row for index, row in zip(indices, features, strict=True) if index in wanted}
    moments = moments.over_processes()
    merged = {index: row for part in dist.gather_objects(kept) for index, row in part.items()}
    rows = torch.stack([merged[index] for index in sorted(merged)])
    if dist.is_main():
        context.cache_dir.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({**moments.tensors(), "rows": rows}, partial, metadata={"identity": json.dumps(identity)})
        partial.replace(file)
    dist.barrier()
    return SplitFeatures(moments, rows)


def block_shuffle(images_u8: ImagesU8, indices: Sequence[int], blocks: int) -> ImagesU8:
    """Cut each image into blocks x blocks pieces and shuffle them; the order depends on the image's index alone.

    Pixels that are left over when the size does not divide are cropped at the right and bottom.
    """
    height, width = images_u8.shape[2] // blocks, images_u8.shape[3] // blocks
    tiles = images_u8[:, :, : height * blocks, : width * blocks]
    tiles = tiles.unflatten(3, (blocks, width)).unflatten(2, (blocks, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    orders = [torch.randperm(blocks**2, generator=torch.Generator().manual_seed(index)) for index in indices]
    shuffled = torch.stack([own[order] for own, order in zip(tiles, orders, strict=True)])  # (B, blocks^2, 3, h, w)
    return shuffled.unflatten(1, (blocks, blocks)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def run_protocol(
    evaluator: Evaluator,
    context: EvalContext,
    eval_dir: Path | None = None,
    *,
    images_seen: int | None = None,
    ema_decay: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[MetricResult]:
    """Run one protocol on all processes and write `<eval_dir>/<protocol>.json` on the main one.

    `context.spec` must be the spec as it is used, with changed sampling settings in it: the file quotes it.
    """
    if evaluator.needs_generator and context.generate is None:
        raise TaskError(
            f"protocol {evaluator.protocol}", "needs a generator, the run has only a tokenizer",
            hint="Choose a reconstruction protocol, or train the generator.",
        )  # fmt: skip
    with torch.no_grad():
        results = _results(evaluator, context)
    if eval_dir is not None and dist.is_main():
        about = {"description": evaluator.description, "needs_generator": evaluator.needs_generator}
        about |= {"preparation": context.dataset("val").preparation, **evaluator.describe(context), **(extra or {})}
        name, file = evaluator.protocol, eval_dir / f"{evaluator.protocol}.json"
        write_result(file, name, results, context, about, images_seen=images_seen, ema_decay=ema_decay)
    dist.barrier()
    return results


def _results(evaluator: Evaluator, context: EvalContext) -> list[MetricResult]:
    owner = f"protocol {evaluator.protocol} ({type(evaluator).__module__}.{type(evaluator).__qualname__})"
    try:
        results = list(evaluator.run(context))
    except TypeError as error:
        if not re.search("missing.*'(better|role|about)'", str(error)):
            raise
        raise TaskError(owner, "yields a metric without meaning", got=str(error), hint=NEW_METRIC) from error
    check_results(owner, results)
    return results


def check_results(owner: str, results: Sequence[MetricResult]) -> None:
    """Names differ, values are finite, every metric says what it means; else a TaskError at `owner`."""
    names = [result.name for result in results]
    if len(set(names)) < len(names):
        raise TaskError(owner, "yields a name twice", got=", ".join(sorted(names)))
    measured = [result.name for result in results if result.role != "scale"]
    for result in results:
        name, of = result.name, measured if result.role == "scale" else [None]
        if not math.isfinite(result.value):
            raise TaskError(owner, f"{name} is not finite", got=result.value)
        for field, fine, expected in (
            ("better", result.better in get_args(Better), " or ".join(get_args(Better))),
            ("role", result.role in get_args(Role), ", ".join(get_args(Role))),
            ("about", bool(result.about and result.about.strip()), "a sentence for the reader of a report"),
            ("of", result.of in of, f"for a scale row one of {', '.join(measured)}, for others nothing"),
            ("point", result.point is None or f"@{result.point}" in name, "what follows @ in the name"),
        ):
            if not fine:
                got = f"{field}={getattr(result, field)!r}"
                what = f"{name} does not say what it means"
                raise TaskError(owner, what, got=got, expected=expected, hint=NEW_METRIC)


def write_result(
    path: Path,
    protocol: str,
    results: Sequence[MetricResult],
    context: EvalContext,
    extra: Mapping[str, Any],
    *,
    images_seen: int | None = None,
    ema_decay: float | None = None,
) -> None:
    """Write the numbers of a protocol with everything they depend on."""
    spec = context.spec
    installed = {name: version for name, version in package_versions().items() if version}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "format_version": RESULT_FORMAT_VERSION,
            "protocol": protocol,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "results": [vars(result) for result in results],
            "num_samples": max((result.num_samples for result in results), default=0),
            "images_seen": images_seen,
            "ema_decay": ema_decay,
            "sampling": spec.sampling.model_dump(mode="json") if context.generate else None,
            "seed": spec.evaluation.seed,
            "seed_scheme": "noise and condition of a sample depend on the seed and its global number alone",
            "precision": {"generator": spec.precision, "tokenizer": "fp32", "features": "fp32", "sums": "fp64"},
            "image_size": list(spec.tokenizer.image_size),
            "to_uint8": "clamp to [0, 1], times 255, rounded",
            **extra,
            "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "cpu",
            "processes": dist.world_size(),
            "versions": {"python": platform.python_version(), **installed},
            "spec_fingerprint": fingerprint(spec),
            "spec": spec_to_dict(spec),
        },
    )  # fmt: skip


def ep_fid(history: Sequence[tuple[float | int, float | int]], k: float | int) -> float | None:
    """Where a metric first reaches k (at or below): linear between the evaluations around it. None: never.

    history   (images or epochs, value) in any order

    With epochs and unguided FID this is EP_FID@k.
    """
    before: tuple[float | int, float | int] | None = None
    for where, value in sorted(history):
        if value <= k:
            if before is None:
                return float(where)
            share = (before[1] - k) / (before[1] - value)
            return before[0] + share * (where - before[0])
        before = (where, value)
    return None


def _images(dataset: ImageDataset, indices: Sequence[int]) -> Tensor:
    return torch.stack([dataset.image(index) for index in indices])


def _split_identity(dataset: ImageDataset, num: int) -> dict[str, Any]:
    """A split as a reference: the SHA-256 covers data, preparation and number of images."""
    identity = {
        "data": dataset.fingerprint, "split": dataset.split, "num_images": num,
        "image_size": list(dataset.image_size), "preparation": dataset.preparation,
    }  # fmt: skip
    return {**identity, "fingerprint": json_sha256(identity)}


def _strided(rows: Tensor, limit: int) -> Tensor:
    """At most `limit` rows, evenly spread: deterministic, and mixed in class when the rows are sorted by class."""
    if len(rows) <= limit:
        return rows
    return rows[torch.arange(limit) * len(rows) // limit]
