"""Your own captioned images: a folder with a text file beside each picture, or a table with a caption column."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raev2.errors import DataError, SpecError, did_you_mean
from raev2_data_recipes.base import SPLITS, Option
from raev2_data_recipes.captions.shard_recipe import Deferred, Example, ShardRecipe, prepared
from raev2_data_recipes.pictures.image_folder import SUFFIXES
from raev2_tasks.t2i.shards.index import least_val
from raev2_tasks.t2i.text.captions import BadSample, Caption

IMAGE_COLUMNS = ("file_name", "image", "path", "file", "filename", "image_path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
VAL_FRACTION = Option(
    "0.05", "share for validation, 0 to 0.5, but at least 8 samples; unused where the source has splits"
)


class CaptionedFolder(ShardRecipe):
    """Every picture below ``src`` that has a text file of the same name beside it."""

    name = "captioned-folder"
    summary = "your own folder of pictures, each with a .txt of the same name"
    licence = "that of your pictures"
    attribution = "The source folder named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a folder of pictures and captions, at any depth; train/ and val/ in it are the splits"),
        "kind": Option("alt", "kind of the captions: short, long, alt, prompt, ocr or template"),
        "val_fraction": VAL_FRACTION,
        **ShardRecipe.SHARD_OPTIONS,
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; lists the source folder."""
        files = self._files(options)
        missing = [path for paths in files.values() for path in paths if not path.with_suffix(".txt").is_file()]
        steps = [f"Read {options['src']}: {len(files['train'])} training and {len(files['val'])} validation pictures."]
        if missing:
            steps.append(f"Leave out {len(missing)} pictures without a .txt, such as {missing[0]}.")
        return [*steps, _image_step(self.size_px(options), options)]

    def splits(self, options: Mapping[str, str]) -> dict[str, Iterable[Deferred]]:
        """One example a picture; one without caption is rejected when it is read."""
        src, kind, size_px = self.folder(options), self.kind(options["kind"]), self.size_px(options)
        return {
            split: [
                Deferred(str(path), partial(_read_pair, path, src, kind, size_px, options["format"])) for path in paths
            ]
            for split, paths in self._files(options).items()
        }

    def _files(self, options: Mapping[str, str]) -> dict[str, list[Path]]:
        src, fraction = self.folder(options), self.share(options, "val_fraction")
        if all((src / split).is_dir() for split in SPLITS):
            files = {split: _pictures(src / split) for split in SPLITS}
        else:
            files = _divide(_pictures(src), fraction, lambda path: str(path.relative_to(src)))
        if not files["train"]:
            expected = "files ending in " + ", ".join(sorted(SUFFIXES))
            raise DataError(f"data {self.name}: src", "no pictures found", got=src, expected=expected)
        return files


class CaptionTable(ShardRecipe):
    """Rows of a CSV, TSV, JSON-lines or Parquet table, with a path or an embedded picture and one or more captions."""

    name = "caption-table"
    summary = "a CSV, TSV, JSONL or Parquet table with pictures and captions (also Hugging Face datasets)"
    licence = "that of your pictures"
    attribution = "The table named in `options`."
    size = "as the source"
    options = {
        "src": Option(None, "a .csv, .tsv, .jsonl or .parquet file, or a folder of .parquet files"),
        "image": Option("", "column with a path or an embedded picture; empty = " + ", ".join(IMAGE_COLUMNS)),
        "captions": Option(
            "", "caption columns, the default one first, with a kind each: long_text:long,title:short; "
            "empty = " + ", ".join(CAPTION_COLUMNS),
        ),
        "root": Option("", "folder that paths are relative to; empty = that of the table"),
        "val_fraction": VAL_FRACTION,
        **ShardRecipe.SHARD_OPTIONS,
    }  # fmt: skip

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the head of the table."""
        table = self._table(options)
        columns = ", ".join(f"{column} ({kind})" for column, kind in table.captions)
        return [
            f"Read {options['src']}: pictures from column {table.image}, captions from {columns}.",
            "Rows whose column `split` is train or val go there; "
            f"of the others, {self.share(options, 'val_fraction'):.0%} (at least 8) go to validation.",
            _image_step(self.size_px(options), options),
        ]

    def splits(self, options: Mapping[str, str]) -> dict[str, Iterable[Deferred]]:
        """Rows with paths as lists, which are shuffled; rows with pictures inside as streams."""
        table, fraction, size_px = self._table(options), self.share(options, "val_fraction"), self.size_px(options)
        if fraction:
            num_rows = table.num_rows()
            fraction = max(fraction, least_val(num_rows) / max(num_rows, 1))

        def rows(split: str) -> Iterator[Deferred]:
            for number, row in enumerate(table.rows()):
                if table.split_of(row, number, fraction) == split:
                    name = f"{table.file}: row {number + 1}"
                    yield Deferred(name, partial(table.example, row, number, size_px, options["format"]))

        if table.embedded:
            return {split: rows(split) for split in SPLITS}
        return {split: list(rows(split)) for split in SPLITS}

    def _table(self, options: Mapping[str, str]) -> _Table:
        src = Path(options["src"]).expanduser()
        where = f"data {self.name}"
        rows, num_rows, columns = _open_table(src, where)
        image = options["image"] or next((name for name in IMAGE_COLUMNS if name in columns), "image")
        wanted = options["captions"] or next((name for name in CAPTION_COLUMNS if name in columns), "caption")
        captions = []
        for item in wanted.split(","):
            column, _, kind = item.strip().partition(":")
            captions.append((column, self.kind(kind or "alt")))
        for column in (image, *(column for column, _ in captions)):
            if column not in columns:
                raise SpecError(
                    where, "no such column", got=column, expected=f"one of {', '.join(columns)}",
                    hint=did_you_mean(column, columns) or "Name the columns with --set image=... --set captions=...",
                )  # fmt: skip
        root = Path(options["root"]).expanduser() if options["root"] else src if src.is_dir() else src.parent
        return _Table(src, rows, num_rows, image, captions, root, embedded=src.is_dir() or src.suffix == ".parquet")


@dataclass(frozen=True)
class _Table:
    """An open table. ``embedded``: cells may hold whole pictures, so that its rows do not fit into memory."""

    file: Path
    rows: Callable[[], Iterator[Mapping[str, Any]]]
    num_rows: Callable[[], int]
    image: str
    captions: list[tuple[str, str]]
    root: Path
    embedded: bool

    def split_of(self, row: Mapping[str, Any], number: int, val_fraction: float) -> str:
        """The column ``split`` where it names one of ours; else by the hash of path or row number."""
        if row.get("split") in SPLITS:
            return str(row["split"])
        cell = row[self.image]
        name = cell if isinstance(cell, str) else str(number)
        return "val" if _fraction(name) < val_fraction else "train"

    def example(self, row: Mapping[str, Any], number: int, size_px: int | None, image_format: str) -> Example:
        """The example of a row; reads the picture."""
        cell = row[self.image]
        if isinstance(cell, Mapping):  # an image of a Hugging Face dataset
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and cell:
            name, data = cell, (self.root / cell).read_bytes()
        elif isinstance(cell, bytes):
            name, data = f"{self.file.stem}:{number + 1}", cell
        else:
            raise BadSample("bad_image", f"row {number + 1}", f"no picture in column {self.image}")
        texts = [(str(row[column] or "").strip(), kind) for column, kind in self.captions]
        if not texts[0][0]:
            raise BadSample("bad_caption", f"row {number + 1}", f"no caption in column {self.captions[0][0]}")
        licence = row.get("license") or row.get("licence")
        extra = {"license": str(licence)} if licence else {}
        captions = [Caption(text, kind) for text, kind in texts if text]
        return Example(name, prepared(data, size_px, image_format), captions, extra)


def _open_table(
    src: Path, where: str
) -> tuple[Callable[[], Iterator[Mapping[str, Any]]], Callable[[], int], list[str]]:
    """Functions that read the rows of a table and count them, and its column names."""
    if src.is_dir() or src.suffix == ".parquet":
        files = sorted(src.rglob("*.parquet")) if src.is_dir() else [src]
        if not files or not files[0].is_file():
            raise DataError(f"{where}: src", "no .parquet files", got=src)
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            hint = "Install it: pip install 'raev2[t2i]'"
            raise DataError(where, "reading Parquet needs the package pyarrow", hint=hint) from error

        def parquet_rows() -> Iterator[Mapping[str, Any]]:
            for file in files:
                for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                    yield from batch.to_pylist()

        def num_parquet_rows() -> int:
            return sum(parquet.read_metadata(file).num_rows for file in files)

        return parquet_rows, num_parquet_rows, parquet.read_schema(files[0]).names
    if not src.is_file():
        raise DataError(f"{where}: src", "no such table", got=src, hint="Give it with --set src=FILE.")
    if src.suffix == ".jsonl":

        def json_rows() -> Iterator[Mapping[str, Any]]:
            with src.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise DataError(f"data {src}", f"line {number} is not JSON", got=str(error)) from error

        return json_rows, lambda: sum(1 for _ in json_rows()), list(next(json_rows(), {}))
    if src.suffix in (".csv", ".tsv"):

        def text_rows() -> Iterator[Mapping[str, Any]]:
            with src.open(encoding="utf-8-sig", newline="") as lines:
                yield from csv.DictReader(lines, delimiter="\t" if src.suffix == ".tsv" else ",")

        return text_rows, lambda: sum(1 for _ in text_rows()), list(next(text_rows(), {}))
    expected = ".csv, .tsv, .jsonl or .parquet"
    raise DataError(f"{where}: src", "unknown kind of table", got=src.name, expected=expected)


def _read_pair(path: Path, src: Path, kind: str, size_px: int | None, image_format: str) -> Example:
    text_file = path.with_suffix(".txt")
    if not text_file.is_file():
        raise BadSample("bad_caption", str(path.relative_to(src)), f"no {text_file.name} beside it")
    text = text_file.read_text(encoding="utf-8")
    name = str(path.relative_to(src).with_suffix(""))
    return Example(name, prepared(path.read_bytes(), size_px, image_format), [Caption(text, kind)])


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )  # fmt: skip


def _divide(paths: list[Path], val_fraction: float, name: Callable[[Path], str]) -> dict[str, list[Path]]:
    """In the order of the hashes of their names, so that a new picture moves hardly any other one."""
    num_val = max(round(len(paths) * val_fraction), least_val(len(paths))) if val_fraction else 0
    in_val = set(sorted(paths, key=lambda path: _fraction(name(path)))[:num_val])
    return {
        "train": [path for path in paths if path not in in_val],
        "val": [path for path in paths if path in in_val],
    }


def _fraction(text: str) -> float:
    """A number in [0, 1) that is a function of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64


def _image_step(size_px: int | None, options: Mapping[str, str]) -> str:
    if size_px is None:
        return "Keep the pictures as they are, except for what is not upright RGB."
    return f"Resize and crop to {size_px} px, save as {options['format']}."


FOLDER, TABLE = CaptionedFolder(), CaptionTable()
