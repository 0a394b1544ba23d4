"""What installed packages bring to raev2: entry points by group and name. Listing them imports nothing.

The core's own tasks, kinds of guidance and kinds of prediction are in the same groups (pyproject.toml).
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

from raev2.errors import RaeError, TaskError, did_you_mean

TASKS, DATA_RECIPES = "raev2.tasks", "raev2.data_recipes"
GUIDANCE, PREDICTIONS, COMMANDS = "raev2.guidance", "raev2.predictions", "raev2.commands"
GROUPS = {
    TASKS: "task", DATA_RECIPES: "data recipe", GUIDANCE: "guidance", PREDICTIONS: "prediction", COMMANDS: "command"
}  # fmt: skip


def entry_points(group: str) -> EntryPoints:
    """Entry points of a group. Finding them takes 10 ms and a command asks often: read again after a change."""
    return _read(group, tuple((folder, _last_change(folder or ".")) for folder in sys.path))


@cache
def _read(group: str, state: object) -> EntryPoints:
    from importlib import metadata  # 10 ms, and `raev2 --version` asks for none

    return metadata.entry_points(group=group)


def _last_change(folder: str) -> int:
    """When a package was last installed in a folder, or removed; 0 where there is none."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name, not loaded. Two packages with one name are an error that names both."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in found and point.value != found[point.name].value:
            raise TaskError(
                f"{GROUPS[group]} {point.name}",
                "installed twice",
                got=f"{found[point.name].value} and {point.value}",
                expected="one entry point for each name",
                hint="Rename one of the two, or uninstall its package.",
            )
        found[point.name] = point
    return found


def unknown(group: str, name: object) -> str:
    """What to say about a name that is not installed."""
    known = sorted(installed(group))
    hint = did_you_mean(str(name), known) or "Install the package that brings it."
    if not known:  # an installation from before this group
        hint = "Install raev2 again, its entry points are missing."
    return f"unknown {GROUPS[group]}; got {name!r}; expected one of {', '.join(known) or 'none'}. {hint}"


def load(group: str, name: str, where: str) -> Any:
    """What an entry point names. `where` is where an unknown name was given."""
    points = installed(group)
    if name not in points:
        raise TaskError(where, unknown(group, name))
    try:
        return points[name].load()
    except RaeError:
        raise
    except Exception as error:  # a plugin may fail in any way while importing
        raise TaskError(f"{GROUPS[group]} {name}", f"{points[name].value} cannot be loaded", got=repr(error)) from error


def load_kind(group: str, name: str, base: type) -> Any:
    """The subclass of `base` that an entry point names."""
    kind = load(group, name, GROUPS[group])
    if not (isinstance(kind, type) and issubclass(kind, base)):
        owner = installed(group)[name].value
        raise TaskError(f"{GROUPS[group]} {name}", f"{owner} is not a {base.__name__}", got=repr(kind))
    return kind
