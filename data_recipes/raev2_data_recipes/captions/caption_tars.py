"""Published text-to-image data that comes as tar files: BLIP3o, RenderedText, Scale-RAE; and any other, in place.

The first three are decoded, resized once and written as shards of this project. `tar-shards` only writes an index,
beside the tars or in the folder that is built. None of them downloads anything: fetch the tars with
`huggingface-cli download`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from raev2_data_recipes.base import DatasetRecipe, Option
from raev2_data_recipes.captions.shard_recipe import (
    MAX_ASPECT_OPTION,
    Deferred,
    Example,
    ShardRecipe,
    prepared,
    trial_lines,
)
from raev2_tasks.t2i.shards.files import verify_shards
from raev2_tasks.t2i.shards.index import Survey, index_shards, place_of, survey
from raev2_tasks.t2i.shards.pixels import sample_picture_size
from raev2_tasks.t2i.shards.tar_scan import (
    Members,
    Problem,
    ScanRule,
    ShapeRule,
    TarSample,
    read_sample,
    tar_samples,
)
from raev2_tasks.t2i.text.captions import BadSample, Caption, caption_fields, json_fields, parse_captions

logger = logging.getLogger(__name__)

VAL_SAMPLES = Option(
    "1000", "how many samples validate where no tar is named val; at most a tenth of the training samples, but up to 8"
)
SKIP = Option("", "leave out tars whose path matches one of these patterns, separated by commas")
CAPTIONS = Option(
    "", "txt and json fields with captions, the default one first, with a kind each: recaption:long,caption:alt,txt; "
    "empty = `captions` or `conversations` of the json, else the txt, else the first known field of the json"
)  # fmt: skip
SHARD_OPTIONS = {
    **ShardRecipe.SHARD_OPTIONS,
    "captions": CAPTIONS,
    "size": Option("256", "resize the short side and crop the centre to this many pixels; empty = keep the files"),
    "val_samples": VAL_SAMPLES,
    "skip": SKIP,
}


class TarRecipe(ShardRecipe):
    """Captioned images in tars. Subclasses set the texts and may refine ``example``."""

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the headers of the tars."""
        found = self._survey(options)
        size = f"Resize and crop to {options['size']} px" if options["size"] else "Keep the files"
        return [
            _headline(found, options),
            *found.lines(),
            *trial_lines(self._examples(found, "train", options)),
            f"{size}, save as {options['format']}.",
            *self.notes(options),
        ]

    def notes(self, options: Mapping[str, str]) -> list[str]:
        """More sentences for ``plan``."""
        return []

    def splits(self, options: Mapping[str, str]) -> dict[str, Iterable[Deferred]]:
        """Streams in the order of the tars."""
        self.size_px(options)
        found = self._survey(options)
        return {split: self._examples(found, split, options) for split in found.counts()}

    def example(self, sample: TarSample, options: Mapping[str, str]) -> Example:
        """The example of a sample's files. Raises what ``Deferred.read`` may raise."""
        return Example(sample.name, self.image(sample, options), self.captions(sample, options))

    def captions(self, sample: TarSample, options: Mapping[str, str]) -> list[Caption]:
        """Captions of a sample by the options ``kind`` and ``captions``."""
        kind = self.kind(options.get("kind", "long"))
        return parse_captions(sample.text, sample.json, kind, caption_fields(options["captions"], kind))

    def image(self, sample: TarSample, options: Mapping[str, str]) -> bytes:
        """The picture of a sample as it is stored."""
        return prepared(sample.image, self.size_px(options), options["format"], self.max_aspect(options))

    def _examples(self, found: Survey, split: str, options: Mapping[str, str]) -> Iterator[Deferred]:
        for tar in found.tars:
            if split not in found.shares(tar):
                continue
            for key, members in _members(tar.file):
                name = f"{tar.name}: {key}"
                if isinstance(members, Problem):
                    if split == tar.split:
                        yield Deferred(name, partial(_fail, members))
                elif found.split(tar, place_of(tar.name, key)) == split:
                    yield Deferred(name, partial(self._read, name, tar.file, members, options))

    def _read(self, name: str, file: Path, members: Members, options: Mapping[str, str]) -> Example:
        with file.open("rb") as data:
            return self.example(read_sample(data, name, members), options)

    def _survey(self, options: Mapping[str, str]) -> Survey:
        src, num_val = self.folder(options), self.whole_number(options, "val_samples", 0)
        return survey(src, skip=options["skip"], val_samples=num_val, num_workers=0)


class Blip3o(TarRecipe):
    """BLIP3o pre-training and fine-tuning sets: jpg and txt, without json."""

    name = "blip3o"
    summary = "BLIP3o pre-training (long captions, short captions, JourneyDB) or BLIP3o-60k, from downloaded tars"
    licence = "see the dataset card; the images are of mixed origin"
    attribution = "BLIP3o, huggingface.co/BLIP3o."
    size = "27.2 M long, 4.8 M short, 4.3 M JourneyDB; 57,553 in 60k"
    options = {
        "src": Option(None, "folder with the downloaded tars of one set"),
        "kind": Option("long", "kind of the captions: long, short, or prompt for JourneyDB"),
        **SHARD_OPTIONS,
        "skip": Option("*geneval*", "leave out tars whose path matches; the default leaves out prompts like GenEval's"),
    }

    def notes(self, options: Mapping[str, str]) -> list[str]:
        """Whether prompts like those of GenEval are among the data."""
        return [_geneval_note(names)] if (names := self._geneval(options)) else []

    def source_attribution(self, options: Mapping[str, str]) -> str:
        """Says so where the data has GenEval-style prompts, because GenEval numbers then mean something else."""
        names = self._geneval(options)
        return f"{self.attribution} {_geneval_note(names)}" if names else self.attribution

    def _geneval(self, options: Mapping[str, str]) -> list[str]:
        return [tar.file.name for tar in self._survey(options).tars if "geneval" in tar.file.name.lower()]


class ScaleRae(TarRecipe):
    """Synthetic pictures whose captions are requests in a conversation."""

    name = "scale-rae"
    summary = "Scale-RAE synthetic data (FLUX.1-schnell images), from downloaded tars"
    licence = "MIT by the dataset card"
    attribution = "Scale-RAE, huggingface.co/datasets/nyu-visionx/scale-rae-data."
    size = "about 24.7 M pictures"
    options = {
        "src": Option(None, "folder with the downloaded tars"),
        "kind": Option("long", "kind of the captions, after 'can you generate an image of' is taken off"),
        **SHARD_OPTIONS,
    }


class RenderedText(TarRecipe):
    """Pictures of written text at 1024 px: small writing cannot be read after resizing, so it is left out."""

    name = "rendered-text"
    summary = "RenderedText (pictures of rendered writing, 1024 px), from downloaded tars"
    licence = "unstated"
    attribution = "wendlerc/RenderedText, huggingface.co/datasets/wendlerc/RenderedText."
    size = "about 12 M pictures, 217 GB"
    options = {
        "src": Option(None, "folder with the downloaded tars, also those in remaining*/"),
        "min_text_px": Option("24", "least median height of the writing at 1024 px; 0 = keep all"),
        **SHARD_OPTIONS,
    }

    def notes(self, options: Mapping[str, str]) -> list[str]:
        """Which writing is left out."""
        return [f"Leave out writing that is lower than {options['min_text_px']} px at 1024 px (median)."]

    def example(self, sample: TarSample, options: Mapping[str, str]) -> Example:
        """The caption, and the writing itself as a second caption of kind ``ocr``."""
        captions = self.captions(sample, options)
        annotation = json_fields(sample.json).get("ocr_annotation")
        annotation = annotation if isinstance(annotation, Mapping) else {}
        least_px = self.whole_number(options, "min_text_px", 0)
        if least_px:
            heights = _text_heights(annotation)
            if not heights:
                hint = "Keep such samples with --set min_text_px=0."
                raise BadSample(
                    "bad_caption", sample.name, "no ocr_annotation.bb_relative to measure the writing by", hint=hint
                )
            if median(heights) * 1024 < least_px:
                raise ValueError(f"writing too small: {median(heights) * 1024:.0f} px at 1024 px")
        words = annotation.get("text")
        words = words if isinstance(words, list) else [words] if isinstance(words, str) else []
        if words:
            captions.append(Caption(" ".join(map(str, words)), "ocr"))
        extra = {"license": self.licence, "ocr": dict(annotation)} if annotation else {"license": self.licence}
        return Example(sample.name, self.image(sample, options), captions, extra)


class TarShards(DatasetRecipe):
    """An index for tars that stay where and as they are."""

    name = "tar-shards"
    summary = "any tar shards of jpg/png + txt (+ json), indexed where they lie, not copied"
    licence = "that of the shards"
    attribution = "The folder named in `options`."
    size = "about 50 bytes a sample"
    options = {
        "src": Option(None, "folder with uncompressed tars, at any depth"),
        "kind": Option("alt", "kind of captions whose files do not say it: short, long, alt, prompt, ocr or template"),
        "captions": CAPTIONS,
        "min_side": Option("0", "leave out pictures with a shorter side of less than this many pixels"),
        "max_aspect": MAX_ASPECT_OPTION,
        "max_bad_share": Option("0.5", "stop when a larger share of the samples is unusable"),
        "val_samples": VAL_SAMPLES,
        "skip": SKIP,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the headers of the tars."""
        src = self.folder(options)
        num_val = self.whole_number(options, "val_samples", 0)
        found = survey(src, skip=options["skip"], val_samples=num_val, num_workers=0)
        tried = trial_lines(_indexed(found, self._rule(options)))
        return [
            _headline(found, options),
            *found.lines(),
            *tried,
            "Write an index of the usable samples. Copy nothing.",
        ]

    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """Write indices and manifest."""
        src = self.folder(options)
        return index_shards(
            src, folder, source=dataset_name, skip=options["skip"], rule=self._rule(options),
            val_samples=self.whole_number(options, "val_samples", 0), options=options, licence=self.licence,
            max_bad_share=self.number(options, "max_bad_share", 0), attribution=self.attribution,
            num_workers=0,
        )  # fmt: skip

    def _rule(self, options: Mapping[str, str]) -> ScanRule:
        least_px = self.whole_number(options, "min_side", 0)
        shape = ShapeRule((least_px, least_px), self.number(options, "max_aspect", 1))
        return ScanRule(options["kind"], caption_fields(options["captions"], options["kind"]), shape)

    def check_files(self, data_dir: Path) -> dict[str, Any]:
        """Tars and indices."""
        return verify_shards(data_dir)


def _indexed(found: Survey, rule: ScanRule) -> Iterator[Deferred]:
    """The samples for training as they would be indexed."""
    for tar in found.tars:
        for key, members in _members(tar.file) if tar.split == "train" else ():
            name = f"{tar.name}: {key}"
            yield Deferred(name, partial(_read_indexed, name, tar.file, members, rule))


def _read_indexed(name: str, file: Path, members: Members | Problem, rule: ScanRule) -> Example:
    if isinstance(members, Problem):
        return _fail(members)
    with file.open("rb") as data:
        sample = read_sample(data, name, members)
    rule.shape.check(name, *sample_picture_size(sample.image, name))
    return Example(name, sample.image, rule.captions(sample))


def _members(file: Path) -> Iterator[tuple[str, Members | Problem]]:
    """Samples of a tar by key, and at the end what is wrong with others."""
    problems: list[Problem] = []
    with file.open("rb") as data:
        yield from tar_samples(data, problems).items()
    for problem in problems:
        if problem.fatal:
            yield problem.key, problem
        else:
            logger.warning("%s: %s: %s", file, problem.key, problem.text)


def _headline(found: Survey, options: Mapping[str, str]) -> str:
    gib = sum(tar.file.stat().st_size for tar in found.tars) / 2**30
    captions = options["captions"] or "those of the json or txt"
    return f"Read {len(found.tars)} tars ({gib:.1f} GiB) in {options['src']}; captions: {captions}."


def _geneval_note(names: list[str]) -> str:
    return f"GenEval-style data used ({', '.join(names)}): say so beside any GenEval number."


def _fail(problem: Problem) -> Example:
    raise BadSample(problem.kind, problem.key or "tar", problem.text)


def _text_heights(annotation: Mapping[str, Any]) -> list[float]:
    """Heights of the lines of writing, as shares of the picture's height, from their corner points."""
    boxes = annotation.get("bb_relative")
    if not isinstance(boxes, list):
        return []
    heights = [[point[1] for point in box] for box in boxes if box and all(isinstance(p, list) for p in box)]
    return [max(ys) - min(ys) for ys in heights]


BLIP3O, RENDERED_TEXT, SCALE_RAE, TAR_SHARDS = Blip3o(), RenderedText(), ScaleRae(), TarShards()
