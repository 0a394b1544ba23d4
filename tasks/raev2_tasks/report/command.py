"""The options of `raev2 report`; what it does is in page.py."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from raev2.errors import SpecError
from raev2.files.damage import damaged
from raev2.task import Command


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; several are shown side by side")
    parser.add_argument("--run", metavar="DIR", help="a single run folder")
    parser.add_argument("--task", help="the newest run of this task")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html, of several runs comparison.html here")
    parser.add_argument("--small", action="store_true", help="pictures at half size and lossy: a page to send around")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out, or a comparison")


def _report(options: Namespace) -> int:
    from raev2.model.opened import find_source
    from raev2_tasks.report.page import write_report

    runs = [Path(run) for run in options.runs] or [find_source(options.run, options.task).dir]
    own = runs[0] / "report.html" if len(runs) == 1 else None
    out = Path(options.out or own or "comparison.html")
    taken = [file for file in (out, out.with_suffix(".json")) if file.exists()]
    if out.suffix != ".html":
        raise SpecError("--out", "not usable", got=str(out), expected="a name that ends in .html")
    if taken and out != own and not options.overwrite:
        raise SpecError("--out", "exists already", got=str(taken[0]), hint="Choose another file, or add --overwrite.")
    with damaged(", ".join(map(str, runs))):
        print(write_report(*runs, out=out, small=options.small))
    return 0


REPORT = Command("one page about a run, or about several side by side", _options, _report)
