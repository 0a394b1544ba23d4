"""`raev2 nwm validate` and `raev2 nwm index`: look at trajectories, and freeze places for evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def validate(argv: Sequence[str]) -> None:
    """Print what is unusual about a dataset folder of trajectories: poses, heading, frames, splits."""
    parser = argparse.ArgumentParser(prog="raev2 nwm validate", description=validate.__doc__)
    parser.add_argument("dir", help="dataset folder")
    parser.add_argument("--fast", action="store_true", help="poses only, do not open frames")
    options = parser.parse_args(argv)
    from raev2_tasks.nwm.data.report_data import describe

    for line in describe(options.dir, open_frames=not options.fast):
        print(line)


def index_parser() -> argparse.ArgumentParser:
    """Options of `raev2 nwm index`."""
    parser = argparse.ArgumentParser(prog="raev2 nwm index", description=index.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="choose places by the rules of a protocol")
    build.add_argument("dir", help="dataset folder")
    build.add_argument("--protocol", required=True, help="time, rollout-1fps, rollout-4fps or planning")
    build.add_argument("--num", type=int, help="places (default: as published)")
    build.add_argument("--stride", type=int, help="frames between candidates (default: 8)")
    build.add_argument("--offsets", type=int, nargs="+", help="frames from now (default: as published)")
    build.add_argument("--seed", type=int, default=0)
    imported = actions.add_parser("import-nwm", help="take the places of an index file of NWM")
    imported.add_argument("file", help="time.pkl, rollout.pkl or navigation_eval.pkl")
    imported.add_argument("dir", help="dataset folder")
    for each in (build, imported):
        each.add_argument("--split", default="val", help="default: val")
        each.add_argument("--num-context", type=int, default=4, help="context frames (default: 4)")
        each.add_argument("--name", help="name of the file (default: the protocol)")
    return parser


def index(argv: Sequence[str]) -> None:
    """Freeze places of a dataset folder for evaluations, as DIR/index/NAME.json."""
    options = index_parser().parse_args(argv)
    from raev2_tasks.nwm.data.index import build_index, import_nwm_index, write_index

    if options.action == "build":
        found = build_index(
            options.dir, options.protocol, num=options.num, stride=options.stride, offsets=options.offsets,
            split=options.split, num_context=options.num_context, seed=options.seed,
        )  # fmt: skip
    else:
        found = import_nwm_index(options.file, options.dir, split=options.split, num_context=options.num_context)
    file = write_index(found, options.dir, options.name)
    print(f"{file}: {len(found.places)} places, offsets {found.offsets[0]} to {found.offsets[-1]}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"validate": validate, "index": index}
