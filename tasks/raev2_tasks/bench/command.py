"""The options of `raev2 bench`; how a case is timed is in measure.py, the cases are beside it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from raev2.errors import SpecError
from raev2.task import Command

SIZES = ("small", "base", "published")


def _options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="default: all that fit the device")
    add("--size", choices=SIZES, default="small", help="of the networks (default: small); published: for a GPU")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--rounds", type=int, default=7, help="how often each is timed (default: 7)")
    add(
        "--against",
        metavar="MODULE:FACTORY",
        help="also time what FACTORY(ours) returns, in turns, on the same tensors",
    )
    add("--cpu-time", action="store_true", help="CPU seconds of the process: for a machine that is not idle")
    add("--compile", action="store_true", help="compile generators, as parallel.compile and sampling.compile do")
    add("--json", metavar="FILE", type=Path, help="also write the numbers here, in a new file")


def _bench(options: Namespace) -> None:
    from raev2_tasks.bench.cases import run_benchmarks
    from raev2_tasks.bench.measure import Setting, table, write_results

    if options.json and options.json.exists():
        raise SpecError("--json", "exists already", got=options.json, hint="Choose another file, or move it away.")
    setting = Setting.of(
        options.size, options.device, options.rounds, options.against, options.cpu_time, options.compile
    )
    results = run_benchmarks(options.names, setting)
    print(table(results, setting))
    if options.json:
        write_results(options.json, results, setting)


BENCH = Command("how fast it is here: training, sampling, reading, measuring, as one table", _options, _bench)
