"""How the code is laid out, counted: files on the way to a gradient, entries of a room, circles of imports."""

from __future__ import annotations

import ast
import graphlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raev2.command.cli import main
from raev2.spec import RunSpec

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "raev2": ROOT / "raev2",
    "raev2_tasks": ROOT / "tasks" / "raev2_tasks",
    "raev2_data_recipes": ROOT / "data_recipes" / "raev2_data_recipes",
}
MODULES = {
    ".".join((package, *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): file
    for package, folder in PACKAGES.items()
    for file in sorted(folder.rglob("*.py"))
}

# What tasks and commands share: parts of recipes, charts, numbers of papers, the stopwatch, words of splits.
SHARED = {
    "raev2_tasks.recipe_parts",
    "raev2_tasks.bench.measure",
    "raev2_tasks.report.chart",
    "raev2_tasks.report.published",
    "raev2_tasks.splits",
}


class Reached(Exception):
    """The first `backward()` of stage 2."""


def files_of(stack: Iterator[str] | list[str]) -> set[str]:
    """Files of the core in lines of tracebacks."""
    found = (re.search(rf'File "{ROOT}/(raev2/[^"]+)"', line) for line in stack)
    return {match[1] for match in found if match}


@pytest.fixture
def way(tiny_spec: RunSpec, trained_run: Path, tiny_recipe: RunSpec, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Files with a function on the way from `raev2 train` to `backward()`.

    Those are the files on the call stack of `backward()`, and of every operation that its gradient goes through: in
    anomaly mode torch keeps that stack with each node of the graph.
    """
    seen: set[str] = set()

    def backward(loss: torch.Tensor) -> None:
        seen.update(files_of(traceback.format_stack()))
        nodes, visited = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in visited:
                visited.add(node)
                seen.update(files_of(node.metadata.get("traceback_", [])))
                nodes += [parent for parent, _ in node.next_functions]
        raise Reached

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    run = ["--set", f"tokenizer_from={trained_run / 'tokenizer'}", "--run", str(trained_run.parent / "way")]
    with torch.autograd.set_detect_anomaly(True), pytest.raises(Reached):
        main(["train", "--task", "imagenet", "--recipe", "tiny", *run, "--debug"])
    return seen


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_eight_files_from_the_command_to_the_gradient_and_the_tour_lists_them(way):
    tour = (ROOT / "docs" / "tour.md").read_text()
    listed = re.search(r"<!-- way -->(.*?)<!-- /way -->", tour, re.S)
    assert len(way) <= 8, sorted(way)
    assert listed is not None and sorted(re.findall(r"`([\w/]+\.py)`", listed[1])) == sorted(way)


@pytest.mark.parametrize(
    ("folder", "most"), [("raev2", 17), ("tasks/raev2_tasks/nwm", 13), ("tasks/raev2_tasks/t2i", 9)]
)
def test_a_room_holds_no_more_than_a_reader_can_see_at_once(folder, most):
    entries = [entry for entry in (ROOT / folder).iterdir() if entry.name != "__pycache__"]
    files = [entry.name for entry in entries if entry.suffix == ".py" or (folder != "raev2" and entry.is_dir())]
    assert len(files) <= most, sorted(files)


def imported(name: str, file: Path) -> set[str]:
    """Modules of ours that a file imports: anywhere in it, for type checkers alone too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {str(node.module)}
    return found & MODULES.keys() - {name}


IMPORTS = {name: imported(name, file) for name, file in MODULES.items()}


def test_no_import_goes_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # CycleError names the modules


def test_the_core_knows_no_plugin_and_tasks_know_neither_recipes_nor_each_other():
    order = list(PACKAGES)

    def may(name: str, other: str) -> bool:
        (package, *inner), (target, *its) = name.split("."), other.split(".")
        if package == target == "raev2_tasks":
            return its[0] in inner[:1] or other in SHARED
        return order.index(target) <= order.index(package)

    wrong = [f"{name} imports {other}" for name in IMPORTS for other in IMPORTS[name] if not may(name, other)]
    assert wrong == []
