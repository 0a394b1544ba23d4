"""The options of `raev2 selftest`; what it does is in faults.py, which needs a POSIX system."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace

from raev2.errors import SpecError
from raev2.task import Command

POSIX = os.name == "posix"


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--task", help="default: every task that has a recipe of this name")
    parser.add_argument(
        "--quick", action="store_true", help="one fault of each kind instead of one at every file operation"
    )
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="only N kills a task, at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the wrong bits")


def _selftest(options: Namespace) -> int:
    if not POSIX:
        raise SpecError("raev2 selftest", "needs signals and limits of POSIX", got=os.name)
    from raev2.command.cli import main
    from raev2_tasks.selftest.faults import run

    return run(options, main)


SELFTEST = Command(
    "kill, starve and damage a tiny training, and compare what comes of it bit by bit", _options, _selftest
)
