"""The wheel of this checkout, built as a release is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"raev2": ROOT, "raev2_tasks": ROOT / "tasks", "raev2_data_recipes": ROOT / "data_recipes"}
HIDDEN = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def build_wheel(folder: Path, copy: Path) -> Path:
    """Built from the sdist, and that from a copy: setuptools would pack old files from a build folder it left."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    for package, root in SOURCES.items():
        ignore = shutil.ignore_patterns(*HIDDEN)
        shutil.copytree(root / package, copy / (root / package).relative_to(ROOT), ignore=ignore)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, text=True)
    (sdist,) = folder.glob("raev2-*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(sdist)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("raev2-*.whl"))
