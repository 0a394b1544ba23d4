"""Tables of pictures and captions: CSV in any usual dress, JSON lines, JSON, Parquet. Read `open_table`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from raev2.errors import DataError
from raev2_tasks.t2i.text.encodings import encoding_of

Row = Mapping[Any, Any]
DELIMITERS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
CHUNK = 1 << 20


@dataclass(frozen=True)
class Table:
    """An open table.

    about      format and encoding, for people
    columns    names of the columns
    rows       reads the rows from the start; of Parquet only the columns that are named, if any are
    embedded   cells may hold whole pictures, so that the rows do not fit into memory
    """

    about: str
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[Row]]
    embedded: bool = False


def open_table(src: Path, where: str, encoding: str = "") -> Table:
    """Open a .csv, .tsv, .jsonl, .json or .parquet file, or a folder of .parquet files.

    encoding   of a text; '': found by `encoding_of`

    Cells of a CSV row that no column has are under None. Raises DataError for a table that cannot be read.
    """
    if src.is_dir() or src.suffix.lower() == ".parquet":
        return _parquet(src, where)
    if not src.is_file():
        raise DataError(f"{where}: src", "no such table", got=src, hint="Give it with --set src=FILE.")
    opened = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json}
    if src.suffix.lower() not in opened:
        expected = ".csv, .tsv, .jsonl, .json or .parquet"
        raise DataError(f"{where}: src", "unknown kind of table", got=src.name, expected=expected)
    try:
        with src.open("rb") as data:
            encoding = encoding or encoding_of(iter(lambda: data.read(CHUNK), b""))
        "".encode(encoding)
        return opened[src.suffix.lower()](src, encoding)
    except (ValueError, LookupError) as error:
        raise DataError(f"data {src}", "cannot be read as text", got=str(error),
                        hint="Or name its encoding with --set encoding=NAME.") from error  # fmt: skip


def _csv(src: Path, encoding: str) -> Table:
    with src.open(encoding=encoding, newline="") as text:
        head = text.read(CHUNK // 16)
    told = re.match(r"\ufeff?sep=(.)\r?\n", head)  # a line by which spreadsheet programs name the delimiter
    delimiter = told[1] if told else _delimiter(head, "\t" if src.suffix.lower() == ".tsv" else ",")

    def lines() -> Iterator[list[str]]:
        with src.open(encoding=encoding, newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            try:
                yield from islice((cells for cells in reader if cells), 1 if told else 0, None)
            except (csv.Error, UnicodeError) as error:
                raise DataError(
                    f"data {src}", f"line {reader.line_num} cannot be read", got=str(error),
                    hint="Quotation marks inside a quoted text are doubled.",
                ) from error  # fmt: skip

    columns = [name.strip().strip("\ufeff\u200b") for name in next(lines(), [])]

    def rows(_: Sequence[str] = ()) -> Iterator[Row]:
        for cells in islice(lines(), 1, None):
            row: dict[Any, Any] = dict(zip(columns, cells, strict=False))
            if len(cells) > len(columns):
                row[None] = cells[len(columns) :]
            yield row

    return Table(f"CSV in {_name(encoding)} with {DELIMITERS.get(delimiter, delimiter)}", columns, rows)


def _delimiter(head: str, default: str) -> str:
    """The delimiter by which most rows have as many cells as the header, which has two at least."""
    whole = head[: head.rfind("\n") + 1] or head

    def score(delimiter: str) -> tuple[int, int]:
        try:
            rows = [cells for cells in islice(csv.reader(io.StringIO(whole), delimiter=delimiter), 51) if cells]
        except csv.Error:
            return 0, 0
        width = len(rows[0]) if rows else 0
        return (sum(len(cells) == width for cells in rows), width) if width > 1 else (0, 0)

    best = max(DELIMITERS, key=lambda delimiter: (*score(delimiter), delimiter == default))
    return best if score(best) > (0, 0) else default


def _json_lines(src: Path, encoding: str) -> Table:
    def rows(_: Sequence[str] = ()) -> Iterator[Row]:
        with src.open(encoding=encoding) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"data {src}", f"line {number} is not JSON", got=str(error)) from error
                yield _object(row, f"data {src}", f"line {number}")

    columns = dict.fromkeys(name for row in islice(rows(), 100) for name in row)
    return Table(f"JSON lines in {_name(encoding)}", list(columns), rows)


def _json(src: Path, encoding: str) -> Table:
    where = f"data {src}"
    try:
        value = json.loads(src.read_text(encoding=encoding))
    except (ValueError, RecursionError) as error:
        raise DataError(where, "is not JSON", got=str(error)) from error
    entries, form = _entries(value, where)
    found = [_object(entry, where, f"entry {number}") for number, entry in enumerate(entries, start=1)]
    columns = dict.fromkeys(name for row in found[:100] for name in row)

    def rows(_: Sequence[str] = ()) -> Iterator[Row]:
        return iter(found)

    return Table(f"JSON in {_name(encoding)}, {form}", list(columns), rows)


def _entries(value: Any, where: str) -> tuple[Sequence[Any], str]:
    """The rows of a JSON value, and what form it has."""
    if isinstance(value, list):
        return value, "a list of objects"
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        if isinstance(value.get("annotations"), list):
            return _coco(value, where), "COCO captions"
        return value["images"], "a list of images"
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        if len({len(cells) for cells in value.values()}) > 1:
            lengths = ", ".join(f"{name} {len(cells)}" for name, cells in value.items())
            raise DataError(where, "its columns have different lengths", got=lengths)
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)], "columns"
    if isinstance(value, dict) and value and all(isinstance(caption, str) for caption in value.values()):
        return [{"file_name": name, "caption": caption} for name, caption in value.items()], "captions by file"
    expected = "a list of objects, columns, COCO captions, or captions by file"
    raise DataError(where, "unknown form of JSON table", got=f"{value!r:.60}", expected=expected)


def _coco(value: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One row an image, with all of its captions."""
    captions: dict[Any, list[Any]] = {}
    for annotation in value["annotations"]:
        entry = _object(annotation, where, "an annotation")
        captions.setdefault(entry.get("image_id"), []).append(entry.get("caption"))
    images = [_object(image, where, "an image") for image in value["images"]]
    if unknown := captions.keys() - {image.get("id") for image in images}:
        raise DataError(
            where, "captions of images that are not listed", got=f"{len(unknown)}, first {min(unknown, key=str)}"
        )
    return [{**image, "caption": captions.get(image.get("id"), [])} for image in images]


def _object(row: Any, where: str, which: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            where, f"{which} is no object", got=f"{row!r:.60}", expected='{"file_name": ..., "caption": ...}'
        )
    return row


def _parquet(src: Path, where: str) -> Table:
    files = sorted(src.rglob("*.parquet")) if src.is_dir() else [src]
    if not files or not files[0].is_file():
        raise DataError(f"{where}: src", "no .parquet files", got=src)
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        hint = "Install it: pip install 'raev2[t2i]'"
        raise DataError(where, "reading Parquet needs the package pyarrow", hint=hint) from error

    def rows(columns: Sequence[str] = ()) -> Iterator[Row]:
        for file in files:
            try:
                for batch in parquet.ParquetFile(file).iter_batches(batch_size=256, columns=list(columns) or None):
                    yield from batch.to_pylist()
            except (ArrowException, OSError) as error:
                raise DataError(f"data {file}", "cannot be read as Parquet", got=str(error)) from error

    try:
        names = parquet.read_schema(files[0]).names
    except (ArrowException, OSError) as error:
        raise DataError(f"data {files[0]}", "cannot be read as Parquet", got=str(error)) from error
    return Table(f"Parquet, {len(files)} files", names, rows, embedded=True)


def _name(encoding: str) -> str:
    return {"utf-8": "UTF-8", "utf-8-sig": "UTF-8 with mark"}.get(encoding, encoding)
