"""The options of `raev2 selftest`; what it does is in faults.py, which needs a POSIX system."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from raev2.errors import SpecError


def selftest(argv: Sequence[str]) -> int:
    """Kill, starve and damage a tiny training, and compare what comes of it bit by bit; 1 when something was lost."""
    parser = argparse.ArgumentParser(prog="raev2 selftest", description=selftest.__doc__)
    parser.add_argument("--task", help="default: every task that has a recipe of this name")
    parser.add_argument("--quick", action="store_true", help="a few faults instead of one at every file operation")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="only N kills a task, at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the wrong bits")
    options = parser.parse_args(argv)
    if os.name != "posix":
        raise SpecError("raev2 selftest", "needs signals and limits of POSIX", got=os.name)
    from raev2.command.cli import main
    from raev2_tasks.selftest.faults import run

    return run(options, main)
