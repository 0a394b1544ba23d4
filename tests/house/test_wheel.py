"""The product as users get it: a wheel, installed outside the checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from built_wheel import HIDDEN, SOURCES

ROOT = Path(__file__).parents[2]


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("raev2-")}
    here = {
        str(file.relative_to(root))
        for package, root in SOURCES.items()
        for file in (root / package).rglob("*")
        if file.is_file() and not HIDDEN & set(file.parts)
    }
    assert here == packed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--help"], "usage: raev2"),
        (["tasks"], "nwm"),
        (["recipes"], "raev2-dinov3l-k7"),
        (["encoders", "check", "micro"], "ok"),
        (["data", "list"], "vizdoom"),
        (["data", "build", "synthetic", "--out", "shapes", "--set", "num_train=2"], "4 classes"),
        (["show", "quickstart", "--task", "t2i"], "generator parameters"),
        (["train", "--task", "nwm", "--dry-run"], "nothing was started"),
        (["nwm", "validate", "--help"], "usage: raev2 nwm validate"),
        (["import", "nowhere.pt", "--out", "weights"], "nowhere.pt"),
    ],
)
def test_commands_run_outside_the_checkout(installed, tmp_path, arguments, text):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import raev2, sys; from raev2.command.cli import main; print(raev2.__file__); sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.stdout.startswith(str(installed)), result.stderr
    assert text in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_every_command_answers_outside_the_checkout(installed, tmp_path):
    """Its help; those of tasks and packages are loaded for it."""
    code = """
import contextlib, io
from raev2.command.cli import COMMANDS, main
from raev2.files.plugins import COMMANDS as ADDED, installed
from raev2.task import usable_tasks
lines = [[name] for name in (*COMMANDS, *installed(ADDED))]
lines += [[task.name, name] for task in usable_tasks() for name in task.commands()]
for line in lines:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*line, "--help"])
    assert printed.getvalue().startswith(f"usage: raev2 {' '.join(line)}"), (line, printed.getvalue()[:200])
print(len(lines), "commands")
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.fullmatch(r"\d\d commands\n", result.stdout), result.stderr


def test_the_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {citation[name] for name in ("title", "version", "license")} == {
        project[name] for name in ("name", "version", "license")
    }


def test_what_the_core_imports_at_the_top_is_declared():
    """A package that others bring along today may be gone tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=; \[]", text)[0].lower().replace("-", "_") for text in project["dependencies"]}
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    imported = {
        name.split(".")[0]
        for file in (ROOT / "raev2").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    others = imported - sys.stdlib_module_names - {"raev2", "__future__"}
    assert {names.get(name, name) for name in others} - declared == set()
