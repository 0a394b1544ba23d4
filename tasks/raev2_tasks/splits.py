"""Words that name a split in the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence

from raev2.errors import DataError

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def split_word(name: str) -> str | None:
    """'train', 'val' or 'test' when `name` is a word for it, in any case; None for other words."""
    return SPLIT_WORDS.get(name.strip().lower())


def split_in_name(parts: Sequence[str], where: str) -> str | None:
    """The split that the parts of a path name, the last part first; None where no part has such a word.

    A word stands between other characters than letters, or begins with a capital: 'cc3m-validation-0000.tar',
    'cc3mVal2.tar'. Raises DataError when one part has words of two splits.
    """
    for part in reversed(parts):
        words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", part).lower())
        found = list(dict.fromkeys(SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS))
        if len(found) > 1:
            raise DataError(
                where, "its name has the words of two splits", got=f"{part} ({' and '.join(found)})", expected="one",
                hint="Rename it, or leave it out with the option skip.",
            )  # fmt: skip
        if found:
            return found[0]
    return None
