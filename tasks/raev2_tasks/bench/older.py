"""An older checkout of this project as the other side of `raev2 bench --against raev2_tasks.bench.older:same`.

    git worktree add --detach older COMMIT
    RAEV2_OLDER=older raev2 bench train-step --against raev2_tasks.bench.older:same

Its core is copied under the name `raev2_older` and imported beside ours, so that both take turns in one process on the
same tensors. It works as long as constructors agree, and for sampling where kinds of guidance are not yet plugins, as
at 9c3efb4. Where the older code has no such thing, there is no other side.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from raev2.errors import SpecError
from raev2.model.generator import Generator
from raev2.spec import Spec
from raev2.tokenizer.rae import RAE

NAME = "raev2_older"


def same(ours: Any) -> Any:
    """What the older code has in the place of a network (with the same weights), function, class or spec of ours."""
    if isinstance(ours, tuple):
        parts = tuple(map(same, ours))
        return None if None in parts else parts
    if isinstance(ours, Spec):
        return _spec(ours)
    if isinstance(ours, nn.Module):
        return _network(ours)
    if isinstance(ours, type):
        return _older(ours)
    if isinstance(ours, FunctionType):
        function = _older(ours)
        return function and (lambda *args: function(*(same(arg) if isinstance(arg, Spec) else arg for arg in args)))
    raise TypeError(type(ours))


def _spec(ours: Spec) -> Any:
    """Without fields that came later, whose values were the only ones then or change no amount of work."""
    older = _older(type(ours))
    given = {name: getattr(ours, name) for name in type(ours).model_fields if name in older.model_fields}
    return older(**{name: _spec(value) if isinstance(value, Spec) else value for name, value in given.items()})


def _network(ours: nn.Module) -> nn.Module:
    if isinstance(ours, Generator):
        parts = (ours.network_spec, ours.condition_spec, ours.flow)
        network = _older(Generator)(*map(same, parts), ours.latent_shape)
    elif isinstance(ours, RAE):
        network = _older(RAE).from_spec(same(ours.spec))
    else:
        return ours  # such as a loss, which is a part of both
    network.load_state_dict(ours.state_dict())
    return network.to(next(ours.parameters()).device).train(ours.training)


def _older(ours: Any) -> Any:
    """The class or function of this name in the older code, where it was then; None: there is none."""
    _copy(NAME, os.environ.get("RAEV2_OLDER"))
    rooms = ours.__module__.split(".")[1:]
    for module in (".".join([NAME, *rooms]), ".".join([NAME, *rooms[1:]])):
        try:
            return getattr(importlib.import_module(module), ours.__qualname__)
        except (ImportError, AttributeError):
            continue
    return None


@cache
def _copy(name: str, checkout: str | None) -> None:
    """The older core in a folder of its own, under its other name."""
    source = Path(checkout or "nowhere") / "raev2"
    if not source.is_dir():
        raise SpecError(
            "RAEV2_OLDER", "no checkout of this project", got=repr(checkout), expected="a folder with raev2/"
        )
    target = Path(tempfile.mkdtemp())
    for file in source.rglob("*"):
        to = target / name / file.relative_to(source)
        if file.suffix == ".py":
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(re.sub(r"\b(from|import) raev2\b", rf"\1 {name}", file.read_text("utf-8")), "utf-8")
    (target / name / "assets").symlink_to((source / "assets").absolute())
    sys.path.append(str(target))
