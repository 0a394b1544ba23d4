"""A hook of mkdocs: links that leave docs/ name the file instead, as the site has no page for it."""

from __future__ import annotations

import os
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """[text](../../raev2/x.py) -> text (`raev2/x.py`)."""
    folder = os.path.dirname(page.file.src_uri)

    def named(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(folder, match[2].partition("#")[0]))
        return f"{match[1]} (`{path.removeprefix('../')}`)" if path.startswith("../") else match[0]

    return re.sub(r"\[([^\]\n]+)\]\(((?:\.\./)+[^)\s]+)\)", named, markdown)
