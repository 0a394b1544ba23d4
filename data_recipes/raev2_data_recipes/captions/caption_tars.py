"""Published text-to-image data that comes as tar files: BLIP3o, RenderedText, Scale-RAE; and any other, in place.

The first three are decoded, resized once and written as shards of this project. `tar-shards` only writes an index,
beside the tars or in the folder that is built. None of them downloads anything: fetch the tars with
`huggingface-cli download`.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from raev2.errors import DataError
from raev2_data_recipes.base import DatasetRecipe, Option
from raev2_data_recipes.captions.shard_recipe import Deferred, Example, ShardRecipe, prepared
from raev2_tasks.t2i.shards.files import index_shards, val_keys, verify_shards
from raev2_tasks.t2i.shards.tar_scan import Members, Problem, TarSample, groups, read_sample
from raev2_tasks.t2i.text.captions import BadSample, Caption, parse_captions, parse_json

logger = logging.getLogger(__name__)

SHARD_OPTIONS = {
    **ShardRecipe.SHARD_OPTIONS,
    "size": Option("256", "resize the short side and crop the centre to this many pixels; empty = keep the files"),
    "val_samples": Option("1000", "how many samples of the first tar validate; at most a tenth of it"),
    "skip": Option("", "leave out tars whose path matches one of these patterns, separated by commas"),
}


class TarRecipe(ShardRecipe):
    """Captioned images in tars. Subclasses set the texts and may refine ``example``."""

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the tars."""
        files = self._files(options)
        gib = sum(file.stat().st_size for file in files) / 2**30
        size = f"Resize and crop to {options['size']} px" if options["size"] else "Keep the files"
        num_val = f"up to {options['val_samples']} samples of {files[0].name}"
        return [
            f"Read {len(files)} tars ({gib:.1f} GiB) in {options['src']}.",
            f"{size}, save as {options['format']}; {num_val} for validation.",
            *self.notes(options),
        ]

    def notes(self, options: Mapping[str, str]) -> list[str]:
        """More sentences for ``plan``."""
        return []

    def splits(self, options: Mapping[str, str]) -> dict[str, Iterable[Deferred]]:
        """Streams in the order of the tars."""
        self.size_px(options)
        files, num_val = self._files(options), self.whole_number(options, "val_samples", 0)
        keys = [key for key, members in _members(files[0]) if isinstance(members, Mapping)]
        in_val = val_keys(keys, num_val)
        return {
            "train": self._examples(files, options, lambda file, key: file != files[0] or key not in in_val),
            "val": self._examples(files[:1], options, lambda _, key: key in in_val),
        }

    def example(self, sample: TarSample, options: Mapping[str, str]) -> Example:
        """The example of a sample's files. Raises what ``Deferred.read`` may raise."""
        captions = parse_captions(sample.text, sample.json, self.kind(options.get("kind", "long")))
        return Example(sample.name, prepared(sample.image, self.size_px(options), options["format"]), captions)

    def _examples(
        self, files: list[Path], options: Mapping[str, str], wanted: Callable[[Path, str], bool]
    ) -> Iterator[Deferred]:
        src = self.folder(options)
        for file in files:
            for key, members in _members(file):
                name = f"{file.relative_to(src)}: {key}"
                if not wanted(file, key):
                    continue
                if isinstance(members, Problem):
                    yield Deferred(name, partial(_fail, members))
                else:
                    yield Deferred(name, partial(self._read, name, file, members, options))

    def _read(self, name: str, file: Path, members: Members, options: Mapping[str, str]) -> Example:
        with file.open("rb") as data:
            return self.example(read_sample(data, name, members), options)

    def _files(self, options: Mapping[str, str]) -> list[Path]:
        src = self.folder(options)
        patterns = [pattern.strip() for pattern in options["skip"].split(",") if pattern.strip()]
        files = [
            file for file in sorted(src.rglob("*.tar"))
            if not any(fnmatch.fnmatch(str(file.relative_to(src)), pattern) for pattern in patterns)
        ]  # fmt: skip
        if not files:
            raise DataError(f"data {self.name}: src", "no tar files found", got=src, expected="uncompressed .tar files")
        return files


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
        return [file.name for file in self._files(options) if "geneval" in file.name.lower()]


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

    def example(self, sample: TarSample, options: Mapping[str, str]) -> Example:
        """The caption, and the writing itself as a second caption of kind ``ocr``."""
        captions = parse_captions(sample.text, sample.json, "long")
        annotation = parse_json(sample.json).get("ocr_annotation")
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
        image = prepared(sample.image, self.size_px(options), options["format"])
        return Example(sample.name, image, captions, extra)


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
        "val_samples": Option(
            "1000", "how many samples of the first tar validate; unused where tars have 'val' in their name"
        ),
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the tars."""
        files = sorted(Path(options["src"]).expanduser().rglob("*.tar"))
        gib = sum(file.stat().st_size for file in files) / 2**30
        return [f"Read {len(files)} tars ({gib:.1f} GiB) in {options['src']} once, and write an index. Copy nothing."]

    def write(self, folder: Path, dataset_name: str, options: Mapping[str, str]) -> dict[str, Any]:
        """Write indices and manifest."""
        return index_shards(
            Path(options["src"]).expanduser(), folder, source=dataset_name, caption_kind=options["kind"],
            val_samples=self.whole_number(options, "val_samples", 0), options=options,
            licence=self.licence, attribution=self.attribution,
        )  # fmt: skip

    def check_files(self, data_dir: Path) -> dict[str, Any]:
        """Tars and indices."""
        return verify_shards(data_dir)


def _members(file: Path) -> Iterator[tuple[str, Members | Problem]]:
    """Samples of a tar by key, and at the end what is wrong with others."""
    problems: list[Problem] = []
    with file.open("rb") as data:
        yield from groups(data, problems)
    for problem in problems:
        if problem.fatal:
            yield problem.key, problem
        else:
            logger.warning("%s: %s: %s", file, problem.key, problem.text)


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
