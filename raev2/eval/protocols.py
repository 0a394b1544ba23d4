"""The protocols that every task may use, and the one function that runs a protocol and writes its result file.

Read `run_protocol` first: training and `raev2 eval` both call it, so their numbers are the same. A task names and
parametrises the two evaluators here; it adds its own beside them where its condition needs other metrics.
"""

from __future__ import annotations

import logging
import math
import platform
import re
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from raev2.batch import Better, Cond, MetricResult, Role
from raev2.data import ImageDataset
from raev2.errors import CheckpointError, DataError, RaeError, TaskError
from raev2.eval.distances import ERROR_NOTE, paired_frechet
from raev2.eval.features import (
    FeatureExtractor,
    build_extractor,
    check_finite,
    extractor_needs,
    frechet_about,
    frechet_name,
    not_finite,
)
from raev2.eval.generate import CHUNK_SIZE, gathered, generated_images, local_chunks
from raev2.eval.image_pairs import PairDistance, build_pair_distance, lpips_available, pair_needs, psnr, ssim
from raev2.eval.sets import (
    MANIFOLD_IMAGES,
    Scale,
    SetFeatures,
    compare,
    coverage,
    of_groups,
    set_features,
    shuffled,
    split_pictures,
    too_few,
)
from raev2.files.artefact import write_json
from raev2.files.assets import Asset
from raev2.shapes import ImagesU8
from raev2.spec import RunSpec
from raev2.spec_io import fingerprint, spec_to_dict
from raev2.task import EvalContext, Evaluator
from raev2.training import dist
from raev2.training.run import package_versions

logger = logging.getLogger(__name__)
NEW_METRIC = "See docs/how_to/new_metric.md."
RESULT_FORMAT_VERSION = 2  # 1 had no meaning in its results and claimed one preparation for all data
PAIR_ABOUT = {
    "psnr": "Peak signal-to-noise ratio of the two pictures in dB, mean over pictures.",
    "ssim": "Structural similarity of the two pictures (Gaussian window, 11 px), mean over pictures; 1 is identical.",
}

Build = Callable[[str, torch.device], FeatureExtractor]
Metrics = Callable[[FeatureExtractor, SetFeatures, SetFeatures, Scale | None], Iterator[MetricResult]]


@dataclass(eq=False)
class ReconstructionEvaluator(Evaluator):
    """The tokenizer against the originals: PSNR, SSIM, a perceptual distance, and Fréchet distances of the two sets.

    The reference is always the originals of the same split, prepared in the same way. An r in front of a name
    (`rfd_micro`, `rfid`) says so; these numbers have nothing to do with those of a generator.

    extractors   feature networks of the Fréchet distances, by name
    max_images   a random subset of so many images of the split; None: all
    perceptual   perceptual distances in order of preference; the first that this machine can compute is used
    """

    needs_generator = False
    protocol: str
    extractors: Sequence[str] = ("micro",)
    _: KW_ONLY
    split: str = "val"
    max_images: int | None = None
    perceptual: Sequence[str] = ("lpips_vgg", "feature_distance_micro")
    build: Build = build_extractor
    build_pairs: Callable[[str, torch.device], PairDistance] = build_pair_distance

    def __post_init__(self) -> None:
        count = "all" if self.max_images is None else f"{self.max_images:,} random"
        self.description = f"reconstructions of {count} images of '{self.split}' against their originals"

    def needs(self) -> list[Asset]:
        """Weights of the feature networks and of the perceptual distances; of the latter, all but the last may miss."""
        pairs = zip(self.perceptual, (*self.perceptual[1:], ""), strict=True)
        found = [asset for name, other in pairs for asset in pair_needs(name, other)]
        return [*found, *(asset for name in self.extractors for asset in extractor_needs(name))]

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """What the numbers depend on, for the result file."""
        dataset = context.dataset(self.split)
        indices = dataset.subset(self.max_images)
        return {
            "reference": {**split_pictures(dataset, indices).identity, "what": "originals of the same images"},
            "label_policy": "none, the tokenizer sees no condition",
            "coverage": coverage(dataset, [dataset.group(index) for index in indices]),
            "perceptual": self.available(),
        }

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """PSNR, SSIM, perceptual distance, then one Fréchet distance for each feature network."""
        dataset = context.dataset(self.split)
        chunks = split_pictures(dataset, dataset.subset(self.max_images)).chunks(context.spec.data.num_workers)
        pairs = ((numbers, context.reconstruct(originals), originals) for numbers, originals in chunks)
        yield from self.scores(pairs, context.device)

    def scores(
        self, pairs: Iterable[tuple[Sequence[int], ImagesU8, ImagesU8]], device: torch.device
    ) -> Iterator[MetricResult]:
        """The numbers of any pictures and their originals, from numbered chunks of both."""
        extractors = [self.build(name, device) for name in self.extractors]
        pair_distance = self.build_pairs(self.available(), device)

        def rows(numbers: Sequence[int], images: Tensor, originals: Tensor) -> dict[str, Tensor]:
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
                for kind, own in (("original", originals), ("image", images)):
                    values[f"{kind}/{extractor.name}"] = extractor(own)
            return values

        found = gathered((numbers, rows(numbers, images, originals)) for numbers, images, originals in pairs)
        for name, about in {**PAIR_ABOUT, pair_distance.name: pair_distance.about}.items():
            better: Better = "higher" if name in PAIR_ABOUT else "lower"
            yield MetricResult(name, *mean_and_error(found[name]), better=better, role="headline", about=about)
        for extractor in extractors:
            images, originals = found[f"image/{extractor.name}"], found[f"original/{extractor.name}"]
            bad = not_finite(range(len(images)), {"image": images, "original": originals})
            check_finite(extractor.name, "reconstructions and originals", bad)
            value, stderr = dist.on_main(partial(paired_frechet, images, originals))
            yield MetricResult(
                f"r{frechet_name(extractor.name)}", value, len(images), stderr, ERROR_NOTE if stderr else "",
                better="lower", role="headline", warning=too_few(extractor.dim, len(images)),
                about=frechet_about(extractor.name, "reconstructions and originals, a score of the tokenizer alone,"),
            )  # fmt: skip

    def available(self) -> str:
        """The first perceptual distance that needs no missing weights."""
        for name in self.perceptual:
            if not name.startswith("lpips_") or lpips_available(name.removeprefix("lpips_")):
                return name
        return self.perceptual[-1]


@dataclass(eq=False)
class GenerationEvaluator(Evaluator):
    """Generated images against a reference split: what `compare` yields, with a scale of real pictures beside it.

    cond            `eval_cond` of the task: raw conditions by global sample number
    extractors      feature networks by name
    label_policy    in words, which conditions these are
    cond_split      the split that `cond` gets
    groups          which group of the data each sample is to show (`ImageDataset.group`), by global sample number;
                    None: that of the sample whose condition `ImageDataset.asked` gives it
    weights         what `build` reads, by name
    metrics         what is computed in each space
    summary         further numbers, from those of all spaces
    max_rows        references whose features are kept
    made_for        published statistics that `--reference` may name, for people
    """

    needs_generator = True
    protocol: str
    cond: Callable[[RunSpec, ImageDataset, Sequence[int]], Cond]
    extractors: Sequence[str] = ("micro",)
    _: KW_ONLY
    label_policy: str
    num_samples: int
    reference_split: str = "train"
    scale_split: str = "val"
    cond_split: str = "val"
    groups: Callable[[RunSpec, ImageDataset, Sequence[int]], Sequence[Hashable]] | None = None
    build: Build = build_extractor
    weights: Callable[[str], list[Asset]] = extractor_needs
    metrics: Metrics = compare
    summary: Callable[[Sequence[MetricResult]], Iterator[MetricResult]] = lambda results: iter(())
    max_rows: int = MANIFOLD_IMAGES
    made_for: str = ""

    def __post_init__(self) -> None:
        self.description = f"{self.num_samples:,} generated images against '{self.reference_split}'"

    def needs(self) -> list[Asset]:
        """Weights of the feature networks."""
        return [asset for name in self.extractors for asset in self.weights(name)]

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """What the numbers depend on, for the result file."""
        reference = context.dataset(self.reference_split)
        return {
            "reference": {**split_pictures(reference).identity, "what": "all images of the split"},
            "label_policy": self.label_policy,
            "made_for": self.made_for,
            "coverage": coverage(reference, self._asked(context)),
            "precision_recall": {"k": 3, "max_references": MANIFOLD_IMAGES},
        }

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """For each feature network what `compare` yields."""
        extractors, name, own = self.open(context.device), "generated pictures", range(self.num_samples)
        cond = partial(self.cond, context.spec, context.dataset(self.cond_split))
        chunks = (
            (numbers, generated_images(context, cond, numbers)) for numbers in local_chunks(len(own), CHUNK_SIZE, name)
        )
        yield from self.scores(name, own, chunks, extractors, self._references(context, extractors))

    def scores(
        self,
        name: str,
        places: Sequence[int],
        chunks: Iterable[tuple[Sequence[int], ImagesU8]],
        extractors: Sequence[FeatureExtractor],
        references: Iterable[tuple[SetFeatures, Scale | None]],
    ) -> list[MetricResult]:
        """The numbers of any pictures, from numbered chunks of them.

        places       what errors call each picture
        references   for each feature network the reference and its scale
        """
        found = gathered(
            (numbers, {(net.name, output): rows for net in extractors for output, rows in net.outputs(images).items()})
            for numbers, images in chunks
        )
        results = list[MetricResult]()
        for extractor, (reference, scale) in zip(extractors, references, strict=True):
            own = {output: found[extractor.name, output] for output in ("", *extractor.more)}
            check_finite(extractor.name, name, not_finite(places, own))
            pictures = SetFeatures.of(name, own.pop(""), **own)
            results += self.metrics(extractor, pictures, reference, scale)
        return [*results, *self.summary(results)]

    def open(self, device: torch.device) -> list[FeatureExtractor]:
        """The feature networks of this protocol. One that cannot be had is told before the others begin."""
        found, errors = list[FeatureExtractor](), list[RaeError]()
        for name in self.extractors:
            try:
                found.append(self.build(name, device))
            except (DataError, CheckpointError) as error:
                errors.append(error)
        if not found:
            raise errors[0]
        for missing in errors:
            logger.warning("%s: goes on without this feature space: %s", self.protocol, missing)
        return found

    def _references(
        self, context: EvalContext, extractors: Sequence[FeatureExtractor]
    ) -> Iterator[tuple[SetFeatures, Scale]]:
        """For each feature network the reference and its scale."""
        reference, held_out = context.dataset(self.reference_split), context.dataset(self.scale_split)
        floor = split_pictures(reference, of_groups(reference, self._asked(context)))
        real = split_pictures(held_out, held_out.subset(self.num_samples))
        sets, workers = (split_pictures(reference), floor, real, shuffled(real)), context.spec.data.num_workers
        for extractor in extractors:
            found = [set_features(own, extractor, context.cache_dir, workers, self.max_rows) for own in sets]
            yield found[0], Scale(*found[1:])

    def _asked(self, context: EvalContext) -> Sequence[Hashable]:
        """The group that each sample is to show."""
        conditions, numbers = context.dataset(self.cond_split), range(self.num_samples)
        if self.groups is not None:
            return self.groups(context.spec, conditions, numbers)
        return [conditions.group(index) for index in conditions.asked(self.num_samples, numbers)]


def mean_and_error(values: Tensor) -> tuple[float, int, float | None]:
    """Mean, number and standard error of independent values: what a `MetricResult` has after its name."""
    values = values.double()
    return float(values.mean()), len(values), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


def run_protocol(
    evaluator: Evaluator,
    context: EvalContext,
    eval_dir: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[MetricResult]:
    """Run one protocol on all processes and write `<eval_dir>/<protocol>.json` on the main one, with `extra` in it.

    `context.spec` must be the spec as it is used, with changed sampling settings in it: the file quotes it.
    """
    if evaluator.needs_generator and context.generate is None:
        raise TaskError(
            f"protocol {evaluator.protocol}", "needs a generator, the run has only a tokenizer",
            hint="Choose a reconstruction protocol, or train the generator.",
        )  # fmt: skip
    with torch.no_grad():
        results = _results(evaluator, context)
    with dist.together():
        if eval_dir is not None and dist.is_main():
            about = {"description": evaluator.description, "needs_generator": evaluator.needs_generator}
            about |= {"preparation": context.dataset("val").preparation, **evaluator.describe(context), **(extra or {})}
            write_result(eval_dir / f"{evaluator.protocol}.json", evaluator.protocol, results, context, about)
    return results


def _warnings(about: Mapping[str, Any], results: Sequence[MetricResult]) -> list[str]:
    """What forbids to read the numbers as they stand; the log says it too."""
    found = [f"{result.name}: {result.warning}" for result in results if result.warning]
    part = about.get("coverage") or {"asked": 0, "of": 0}
    if part["asked"] < part["of"]:
        found.append("asks for {asked} of {of} {what} of the data, and says nothing about the others".format(**part))
    for text in found:
        logger.warning("%s", text)
    return found


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
) -> None:
    """Write the numbers of a protocol of a run with everything they depend on."""
    spec = context.spec
    about = {
        "sampling": spec.sampling.model_dump(mode="json") if context.generate else None,
        "seed": spec.evaluation.seed,
        "seed_scheme": "noise and condition of a sample depend on the seed and its global number alone",
        "precision": {"generator": spec.precision, "tokenizer": "fp32", "features": "fp32", "sums": "fp64"},
        "image_size": list(spec.tokenizer.image_size),
        "to_uint8": "clamp to [0, 1], times 255, rounded",
        **extra,
        "spec_fingerprint": fingerprint(spec),
        "spec": spec_to_dict(spec),
    }
    write_numbers(path, protocol, results, about, context.device)


def write_numbers(
    path: Path, protocol: str, results: Sequence[MetricResult], about: Mapping[str, Any], device: torch.device
) -> None:
    """Write numbers with what they depend on, and the machine and the versions that made them."""
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
            **about,
            "warnings": _warnings(about, results),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": dist.world_size(),
            "versions": {"python": platform.python_version(), **installed},
        },
    )


def ep_fid(history: Sequence[tuple[float | int, float | int]], k: float | int) -> float | None:
    """Where a metric first reaches k (at or below): linear between the evaluations around it. None: never.

    history   (images or epochs, value) in any order

    With epochs and unguided FID this is EP_FID@k.
    """
    points = sorted(history)
    first = next((place for place, (_, value) in enumerate(points) if value <= k), None)
    if first is None:
        return None
    (start, above), (end, below) = points[max(first - 1, 0)], points[first]
    return float(np.interp(k, (below, above), (end, start)))


def direction(entry: Mapping) -> str:
    """'lower' or 'higher' is better, or what a row is the scale of; empty for results of old files."""
    return f"scale of {entry['of']}" if entry.get("of") else entry.get("better", "")


def glossary(entries: Iterable[Mapping]) -> list[tuple[str, str]]:
    """(names, what they mean); names with one meaning together."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        if entry.get("about"):
            better = " A scale row." if entry["of"] else f" {entry['better'].capitalize()} is better."
            found.setdefault(entry["about"] + better, {})[entry["name"]] = None
    return [(", ".join(names), text) for text, names in found.items()]
