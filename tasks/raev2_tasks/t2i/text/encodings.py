"""In which encoding a text is written: UTF-8, UTF-16 or cp1252, by its bytes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

MARKS = [  # the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
]  # fmt: skip
NOT_CP1252 = re.compile("[\udc81\udc8d\udc8f\udc90\udc9d]")
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8


def decode_text(data: bytes) -> tuple[str, str]:
    """A text, and the encoding it was written in. Raises ValueError as `encoding_of` does."""
    encoding = encoding_of([data])
    return data.decode(encoding), encoding


def encoding_of(chunks: Iterable[bytes]) -> str:
    """The encoding of a text that comes in pieces.

    By its mark; UTF-16 without a mark by its zero bytes; else UTF-8 when all of it is; else cp1252, which spreadsheet
    programs write. Raises ValueError for a text that is partly UTF-8 and partly not, and for other bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    num_letters = num_other = 0  # beyond ASCII: as UTF-8, and not UTF-8
    for number, chunk in enumerate(chunks):
        if number == 0:
            mark = next((name for mark, name in MARKS if chunk.startswith(mark)), None)
            if mark is not None:
                return mark
            if b"\0" in chunk[:4096]:
                return "utf-16-le" if chunk[:4096:2].count(0) < chunk[1:4096:2].count(0) else "utf-16-be"
        text = decoder.decode(chunk)
        if text.isascii():
            continue
        other = len(ESCAPED.findall(text))
        num_other += other
        num_letters += sum(not letter.isascii() for letter in text) - other
        if num_other and (num_letters or NOT_CP1252.search(text)):
            break
    else:
        other = len(ESCAPED.findall(decoder.decode(b"", final=True)))
        return "cp1252" if num_other + other else "utf-8"
    what = "partly UTF-8 and partly not" if num_letters else "neither UTF-8, UTF-16 nor cp1252"
    raise ValueError(f"{what}; save it as UTF-8")
