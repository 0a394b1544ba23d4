"""Published numbers as data: what papers report, with setting, source and how it was read. Never measured here."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

FILE = "published.json"


@cache
def published() -> dict[str, Any]:
    """The whole file: `sources`, `encoders` and `results`; fields are explained in its `about`."""
    return json.loads((resources.files("raev2") / "assets" / FILE).read_text(encoding="utf-8"))


def published_results(recipe: str | None = None) -> list[dict[str, Any]]:
    """Result rows, all or those that belong to a recipe."""
    rows = published()["results"]
    return rows if recipe is None else [row for row in rows if row.get("recipe") == recipe]


def published_encoders() -> list[dict[str, Any]]:
    """Encoders of the RAEv2 study with LP, LDS and gFID after 20 epochs of RAE and RAEv2."""
    return published()["encoders"]
