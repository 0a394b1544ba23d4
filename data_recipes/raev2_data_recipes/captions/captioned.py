"""Your own captioned images: a folder with a text file beside each picture, or a table with a caption column."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from raev2.errors import DataError, SpecError, did_you_mean
from raev2.files.damage import stop_if_machine
from raev2.files.images import is_picture
from raev2.files.picture_folder import scan_folder, told
from raev2_data_recipes.base import Option
from raev2_data_recipes.captions.shard_recipe import Deferred, Example, ShardRecipe, prepared, trial_lines
from raev2_data_recipes.captions.tables import Row, Table, open_table
from raev2_tasks.splits import split_in_name, split_word
from raev2_tasks.t2i.shards.index import HELD_OUT, least_val, tests_validate
from raev2_tasks.t2i.text.captions import (
    KNOWN_FIELDS,
    BadSample,
    caption_fields,
    clean,
    parse_captions,
    texts_of,
)
from raev2_tasks.t2i.text.encodings import decode_text

IMAGE_COLUMNS = ("file_name", "image", "path", "file", "filename", "image_path", "filepath", "img")
CAPTION_COLUMNS = tuple(dict.fromkeys(("caption", "text", "prompt", *KNOWN_FIELDS)))
NUM_LOOKED_FOR = 1000  # pictures of a table for which a plan looks
VAL_FRACTION = Option(
    "0.05", "share for validation, 0 to 0.5, but at least 8 samples; unused where the source has splits"
)


@dataclass(frozen=True)
class CaptionedFiles:
    """Pictures by split, what was passed over by kind, and what to say about it."""

    files: dict[str, list[Path]]
    ignored: Counter[str]
    notes: list[str]


class CaptionedFolder(ShardRecipe):
    """Every picture below ``src`` that has a text file of the same name beside it. Links to folders are followed."""

    name = "captioned-folder"
    summary = "your own folder of pictures, each with a .txt of the same name"
    licence = "that of your pictures"
    attribution = "The source folder named in `options`."
    size = "as the source"
    options = {
        "src": Option(
            None, "a folder of pictures and captions, at any depth; train/, val/ and test/ in it are the splits, also "
            "spelled training, valid, validation, dev, testing",
        ),
        "kind": Option("alt", "kind of the captions: short, long, alt, prompt, ocr or template"),
        "val_fraction": VAL_FRACTION,
        **ShardRecipe.SHARD_OPTIONS,
    }  # fmt: skip

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the captions."""
        found = self._found(options)
        states = {path: _text_state(path) for paths in found.files.values() for path in paths}
        texts = Counter(states.values())
        missing = [path for path, state in states.items() if state == "missing"]
        counts = _counts({split: len(paths) for split, paths in found.files.items()})
        steps = [f"Read {options['src']}: {counts}.", *found.notes]
        if missing:
            steps.append(f"Leave out {len(missing)} pictures without a .txt, such as {missing[0]}.")
        for state in ("empty", "unreadable"):
            if texts[state]:
                steps.append(f"Leave out {texts[state]} pictures whose .txt is {state}.")
        encodings = {state: num for state, num in texts.items() if state not in ("missing", "empty", "unreadable")}
        if encodings:
            steps.append("Captions in " + ", ".join(f"{name} {num}" for name, num in sorted(encodings.items())) + ".")
        if found.ignored:
            steps.append(f"Other files, not read: {told(found.ignored)}.")
        steps += trial_lines(self.splits(options)["train"])
        return [*steps, _image_step(self.size_px(options), options)]

    def splits(self, options: Mapping[str, str]) -> dict[str, Iterable[Deferred]]:
        """One example a picture; one without caption is rejected when it is read."""
        src, kind, size_px = self.folder(options), self.kind(options["kind"]), self.size_px(options)
        max_aspect = self.max_aspect(options)
        prepare = partial(prepared, size_px=size_px, image_format=options["format"], max_aspect=max_aspect)
        read = partial(_read_pair, src=src, kind=kind, prepare=prepare)
        return {
            split: [Deferred(str(path), partial(read, path)) for path in paths]
            for split, paths in self._found(options).files.items()
        }

    def _found(self, options: Mapping[str, str]) -> CaptionedFiles:
        src, where = self.folder(options), f"data {self.name}: src"
        top = scan_folder(src, lambda file: file.suffix.lower() != ".txt" and is_picture(file))
        texts = {text for path in top.all_pictures() if (text := _text_file(path)).is_file()}
        ignored, notes = top.all_ignored() - Counter({"no picture (.txt)": len(texts)}), list[str]()
        if not top.has_pictures():
            got = f"{src} ({told(ignored)})" if ignored else src
            raise DataError(where, "no pictures found", got=got, expected="files of a format that Pillow reads")
        files = _by_folder(top.all_pictures(), src, where) or {"train": top.all_pictures()}
        if tests_validate(files):
            files["val"] = files.pop("test")
            notes.append(HELD_OUT)
        if "val" not in files:
            fraction = self.share(options, "val_fraction")
            files |= _divide(files["train"], fraction, lambda path: str(path.relative_to(src)))
        files = {split: files[split] for split in ("train", "val", "test") if split in files}
        return CaptionedFiles(files, ignored, notes)


class CaptionTable(ShardRecipe):
    """Rows of a table, with a path or an embedded picture and one or more captions."""

    name = "caption-table"
    packages = ("pyarrow",)
    summary = (
        "a CSV, TSV, JSONL, JSON or Parquet table with pictures and captions (also COCO and Hugging Face datasets)"
    )
    licence = "that of your pictures"
    attribution = "The table named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a .csv, .tsv, .jsonl, .json or .parquet file, or a folder of .parquet files"),
        "image": Option("", "column with a path or an embedded picture; empty = " + ", ".join(IMAGE_COLUMNS)),
        "captions": Option(
            "", "caption columns, the default one first, with a kind each: long_text:long,title:short; "
            "empty = the first of " + ", ".join(CAPTION_COLUMNS),
        ),
        "kind": Option("alt", "kind of captions for which `captions` does not say it"),
        "encoding": Option("", "encoding of a text table; empty = UTF-8, UTF-16 or cp1252, whichever it is"),
        "root": Option("", "folder that paths are relative to; empty = that of the table"),
        "val_fraction": VAL_FRACTION,
        **ShardRecipe.SHARD_OPTIONS,
    }  # fmt: skip

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the columns that say which captions and splits there are."""
        table = self._table(options)
        columns = ", ".join(f"{column} ({kind})" for column, kind in table.captions)
        steps = [
            f"Read {options['src']} ({table.table.about}): pictures from column {table.image}, "
            f"captions from {columns}.",
            f"Rows: {_counts(table.counts())}.",
        ]
        if table.tests_validate:
            steps.append(HELD_OUT)
        if others := table.unknown_splits():
            steps.append(f"Rows whose split is {others} are divided as those without a split.")
        used = {column for column, _ in table.captions}
        if more := [name for name in table.table.columns if name.lower() in CAPTION_COLUMNS and name not in used]:
            steps.append(f"Not read: {', '.join(more)}; to use them too: --set captions={','.join([*used, *more])}")
        if missing := table.missing():
            steps.append(
                f"Of the first {NUM_LOOKED_FOR:,} pictures {len(missing):,} are not there, first {missing[0]}."
            )
        if sample := table.first_caption():
            steps.append(f"A caption: {sample}")
        steps += trial_lines(self.splits(options)["train"], with_caption=False)
        return [*steps, _image_step(self.size_px(options), options)]

    def splits(self, options: Mapping[str, str]) -> dict[str, Iterable[Deferred]]:
        """Rows with paths as lists, which are shuffled; rows with pictures inside as streams."""
        table = self._table(options)
        prepare = partial(
            prepared, size_px=self.size_px(options), image_format=options["format"], max_aspect=self.max_aspect(options)
        )

        def rows(split: str) -> Iterator[Deferred]:
            for number, row in enumerate(table.table.rows(())):
                if table.splits[number] == split:
                    yield Deferred(f"{table.file}: row {number + 1}", partial(table.example, row, number, prepare))

        if table.table.embedded:
            return {split: rows(split) for split in table.counts()}
        return {split: list(rows(split)) for split in table.counts()}

    def _table(self, options: Mapping[str, str]) -> CaptionRows:
        src, where = Path(options["src"]).expanduser(), f"data {self.name}"
        table = open_table(src, where, options["encoding"])
        if not table.columns:
            raise DataError(f"{where}: src", "an empty table", got=src)
        by_name = {name.lower(): name for name in reversed(table.columns)}
        image = options["image"] or next((by_name[name] for name in IMAGE_COLUMNS if name in by_name), "image")
        wanted = options["captions"] or next((by_name[name] for name in CAPTION_COLUMNS if name in by_name), "caption")
        captions = caption_fields(wanted, self.kind(options["kind"]))
        for column in (image, *(column for column, _ in captions)):
            if column not in table.columns:
                raise SpecError(
                    where, "no such column", got=column, expected=f"one of {', '.join(table.columns)}",
                    hint=did_you_mean(column, table.columns)
                    or f"Name them with --set image=... --set captions=...; the table was read as {table.about}.",
                )  # fmt: skip
        root = Path(options["root"]).expanduser() if options["root"] else src if src.is_dir() else src.parent
        return CaptionRows(src, table, image, captions, root, self.share(options, "val_fraction"))


@dataclass
class CaptionRows:
    """The rows of a table as examples, and their splits."""

    file: Path
    table: Table
    image: str
    captions: list[tuple[str, str]]
    root: Path
    val_fraction: float

    @cached_property
    def _named(self) -> list[tuple[str, float]]:
        """What the column ``split`` says about each row, and a number that is a function of its path or number."""
        columns = ["split"] if self.table.embedded else ["split", self.image]
        columns = [name for name in columns if name in self.table.columns] or [self.captions[0][0]]
        rows = enumerate(self.table.rows(columns))
        return [(str(row.get("split") or ""), _fraction(self._name(row, number))) for number, row in rows]

    @cached_property
    def _words(self) -> list[str]:
        return [split_word(said) or "train" for said, _ in self._named]

    @cached_property
    def tests_validate(self) -> bool:
        """Whether rows named for a test are held out as val, because none is named for validation."""
        return tests_validate(self._words)

    @cached_property
    def splits(self) -> list[str]:
        """The split of each row: what it says in any spelling. Where no row is for validation, some of train are."""
        named = ["val" if split == "test" and self.tests_validate else split for split in self._words]
        places = sorted(place for split, (_, place) in zip(named, self._named, strict=True) if split == "train")
        num_val = 0 if "val" in named else _num_val(len(places), self.val_fraction)
        bound = places[num_val] if num_val else 0.0
        return [
            "val" if split == "train" and place < bound else split
            for split, (_, place) in zip(named, self._named, strict=True)
        ]

    def counts(self) -> dict[str, int]:
        """Rows by split, with those that will turn out unusable."""
        found = Counter(self.splits)
        return {split: found[split] for split in ("train", "val", "test") if found[split] or split != "test"}

    def unknown_splits(self) -> str:
        """Values of the column ``split`` that are no word for one, with their counts."""
        values = Counter(said for said, _ in self._named if said and not split_word(said))
        return ", ".join(f"{value!r} ({num})" for value, num in values.items())

    def first_caption(self) -> str:
        """A caption to look at: the first with letters beyond ASCII among the first thousand, else the first."""
        column = self.captions[0][0]
        rows = islice(self.table.rows([column]), 1000)
        texts = [text for row in rows if isinstance(text := row.get(column), str) and text]
        return next((text for text in texts if not text.isascii()), texts[0] if texts else "")[:80]

    def example(self, row: Row, number: int, prepare: Callable[[bytes], bytes]) -> Example:
        """The example of a row; reads the picture."""
        where = f"row {number + 1}"
        if None in row:
            raise BadSample(
                "bad_row", where, "more cells than columns", got=f"{row[None]!r:.60}",
                hint="Quote texts that have the delimiter in them.",
            )  # fmt: skip
        cell = row.get(self.image)
        if isinstance(cell, Mapping):  # an image of a Hugging Face dataset
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and cell.strip():
            name, data = cell, self._path(cell).read_bytes()
        elif isinstance(cell, bytes):
            name, data = f"{self.file.stem}:{number + 1}", cell
        else:
            raise BadSample("bad_image", where, f"no picture in column {self.image}")
        captions = [c for column, kind in self.captions for c in texts_of(row.get(column), kind, column) if c.text]
        if not captions:
            columns = ", ".join(column for column, _ in self.captions)
            raise BadSample("bad_caption", where, f"no caption in column {columns}")
        licence = row.get("license") or row.get("licence")
        return Example(name, prepare(data), captions, {"license": str(licence)} if licence else {})

    def missing(self) -> list[str]:
        """Those of the first paths that lead to no file."""
        cells = (row.get(self.image) for row in islice(self.table.rows([self.image]), NUM_LOOKED_FOR))
        return [cell for cell in cells if isinstance(cell, str) and cell.strip() and not self._path(cell).is_file()]

    def _path(self, cell: str) -> Path:
        """The file that a path names, also in another Unicode form or with the separators of Windows."""
        texts = [cell.strip(), cell.strip().replace("\\", "/")]
        tried = [self.root / text for text in texts]
        tried += [self.root / unicodedata.normalize(form, text) for text in texts for form in ("NFC", "NFD")]
        return next((path for path in tried if path.is_file()), tried[0])

    def _name(self, row: Row, number: int) -> str:
        cell = row.get(self.image)
        return cell if isinstance(cell, str) else str(number)


def _read_pair(path: Path, src: Path, kind: str, prepare: Callable[[bytes], bytes]) -> Example:
    text_file, where = _text_file(path), str(path.relative_to(src))
    if not text_file.is_file():
        raise BadSample("bad_caption", where, f"no {text_file.name} beside it")
    captions = parse_captions(text_file.read_bytes(), None, kind)
    return Example(str(path.relative_to(src).with_suffix("")), prepare(path.read_bytes()), captions)


def _text_state(path: Path) -> str:
    """Encoding of the caption of a picture, or 'missing', 'empty' or 'unreadable'."""
    text_file = _text_file(path)
    if not text_file.is_file():
        return "missing"
    try:
        text, encoding = decode_text(text_file.read_bytes())
    except (ValueError, OSError) as error:
        stop_if_machine(error)
        return "unreadable"
    return encoding if clean(text) else "empty"


def _text_file(path: Path) -> Path:
    """The file of the caption of a picture; it need not be there."""
    found = (path.with_suffix(suffix) for suffix in (".txt", ".TXT"))
    return next((file for file in found if file.is_file()), path.with_suffix(".txt"))


def _by_folder(paths: Sequence[Path], src: Path, where: str) -> dict[str, list[Path]]:
    """Pictures by the split that a folder around them names, the innermost; empty where none is named.

    Names with a word in them, such as train2017, count where all have one. DataError where that leaves a doubt.
    """
    above = [path.relative_to(src).parts[:-1] for path in paths]
    splits = [next(filter(None, map(split_word, reversed(parts))), None) for parts in above]
    if not any(splits):
        splits = [split_in_name(parts, where) for parts in above]
        if None in splits or "train" not in splits:
            return {}
    files: dict[str | None, list[Path]] = {}
    for path, split in zip(paths, splits, strict=True):
        files.setdefault(split, []).append(path)
    outside = files.pop(None, [])
    if "train" not in files or outside:
        got = f"{', '.join(map(str, files))} and {len(outside)} pictures elsewhere" + (
            f", such as {outside[0]}" if outside else ""
        )
        raise DataError(
            where, "some folders are named after splits, but not all pictures are in such folders", got=got,
            expected="all pictures in train/, val/ and test/, or none",
            hint="Move the others into train/, or rename the folders.",
        )  # fmt: skip
    return {str(split): found for split, found in files.items()}


def _divide(paths: list[Path], val_fraction: float, name: Callable[[Path], str]) -> dict[str, list[Path]]:
    """In the order of the hashes of their names, so that a new picture moves hardly any other one."""
    in_val = set(sorted(paths, key=lambda path: _fraction(name(path)))[: _num_val(len(paths), val_fraction)])
    return {
        "train": [path for path in paths if path not in in_val],
        "val": [path for path in paths if path in in_val],
    }


def _num_val(num: int, fraction: float) -> int:
    return max(round(num * fraction), least_val(num)) if fraction else 0


def _fraction(text: str) -> float:
    """A number in [0, 1) that is a function of the text."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "little") / 2**64


def _counts(counts: Mapping[str, int]) -> str:
    """'train 7, val 1, test 2 (kept apart)'."""
    notes = {"test": " (kept apart)"}
    return ", ".join(f"{split} {num:,}{notes.get(split, '')}" for split, num in counts.items())


def _image_step(size_px: int | None, options: Mapping[str, str]) -> str:
    if size_px is None:
        return "Keep the pictures as they are, except for what is not upright RGB."
    return f"Resize and crop to {size_px} px, save as {options['format']}."


FOLDER, TABLE = CaptionedFolder(), CaptionTable()
