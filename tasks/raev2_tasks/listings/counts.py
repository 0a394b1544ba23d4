"""What `raev2 show` says of a recipe, remembered, so that showing one needs no torch: `counts.json` beside this file.

`python docs/generate.py` adds recipes that are not in it; the tests count some of it anew. After a change of how much
a network computes or keeps, delete the file first: counting all recipes takes minutes.
"""

from __future__ import annotations

import json
from pathlib import Path

from raev2.files.hashes import json_sha256
from raev2.spec import RunSpec
from raev2.spec_io import fingerprint
from raev2.task import Task

FILE = Path(__file__).with_name("counts.json")
Counts = dict[str, dict[str, str]]  # the tables "size" and "cost"


def counts(task: Task, spec: RunSpec) -> Counts:
    """As remembered; counted, which takes seconds, where the recipe was changed or is not one of this package."""
    return known().get(_key(task, spec)) or count(task, spec)


def count(task: Task, spec: RunSpec) -> Counts:
    """Count on networks without memory."""
    from raev2.training.preflight import run_sizes
    from raev2_tasks.listings.cost import cost_rows

    return {"size": dict(run_sizes(task, spec)), "cost": dict(cost_rows(task, spec))}


def known() -> dict[str, Counts]:
    """What is remembered, by all that it depends on."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def counts_page(tasks: list[Task]) -> str:
    """The file for the recipes of these tasks; those that it does not have are counted."""
    specs = [(task, recipe()) for task in tasks for recipe in task.recipes().values()]
    return json.dumps({_key(task, spec): counts(task, spec) for task, spec in specs}, indent=1) + "\n"


def _key(task: Task, spec: RunSpec) -> str:
    """The fingerprint says nothing of sampling and parallelism, which are free to change."""
    rest = [part.model_dump(mode="json") for part in (spec.sampling, spec.parallel)]
    return f"{task.name} {fingerprint(spec)} {json_sha256(rest)[:12]}"
