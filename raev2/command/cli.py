"""The `raev2` command: parse, then one function a command. `train` is here, others are in actions.py.

No heavy import at the top: `raev2 --help` loads neither torch nor a plugin.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from raev2.task import Command, Task

from raev2 import __version__
from raev2.errors import RaeError, SpecError, TaskError, did_you_mean
from raev2.files.plugins import COMMANDS as ADDED
from raev2.files.plugins import GUIDANCE, TASKS, installed

COMMANDS = ("train", "sample", "eval")
RESUMABLE = 75  # exit code of a training that was asked to stop, as sysexits.h has it: try again
EPILOG = (
    "Every other value is a field of the recipe: `raev2 show RECIPE` prints them, `--set path.to.field=value` sets one."
    " Tasks add commands: `raev2 TASK --help` lists them."
)


def parser(sampled: Task | None = None, added: Mapping[str, Command] = MappingProxyType({})) -> argparse.ArgumentParser:
    """The command line as an argparse parser (docs/reference/cli.md is generated from it).

    sampled   the task whose own options `raev2 sample` takes
    added     commands of packages whose options are wanted
    """
    root = argparse.ArgumentParser(
        prog="raev2",
        description="Generative modelling in the latent space of frozen vision encoders.",
        epilog=EPILOG,
    )
    root.add_argument("--version", action="version", version=__version__, help="print the version")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = root.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=help, description=help, epilog=EPILOG if name == "train" else None)
        parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return parser

    train = command("train", "train a run: the tokenizer if there is none yet, then the generator, then evaluate")
    train.add_argument("--task", required=True, help="see `raev2 tasks`")
    train.add_argument("--recipe", default="quickstart", help="see `raev2 recipes` (default: quickstart)")
    train.add_argument("--stage", choices=("tokenizer", "generator"), default="generator", help="last stage to train")
    train.add_argument("--run", metavar="DIR", help="run folder (default: runs/TASK/RECIPE)")
    train.add_argument(
        "--data", metavar="DIR", help="train on this dataset folder: sets data.dir, and data.recipe=null"
    )
    train.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="continue the run folder if it exists; a checkpoint folder of another run: begin a new run with it",
    )
    train.add_argument("--tracker", metavar="trackio|wandb|tensorboard", help="numbers and pictures go there too")
    train.add_argument("--overwrite", action="store_true", help="delete an existing run folder first")
    train.add_argument("--max-time", type=float, metavar="MINUTES", help="save and stop after this time, exit code 75")
    train.add_argument("--dry-run", action="store_true", help="print sizes, check all that is needed; train nothing")

    sample = command("sample", "images from a trained generator")
    source_options(sample)
    add = sample.add_argument
    add("--n", type=int, default=16, help="number of images (default: 16)")
    add("--steps", type=int, help="solver steps")
    add("--guidance", choices=sorted(installed(GUIDANCE)))
    add("--scale", type=float, help="guidance scale; 1 is off")
    add("--interval", type=float, nargs=2, metavar=("T_MIN", "T_MAX"), help="guide for t in this interval")
    add("--weak", metavar="DIR", help="weak generator for --guidance auto")
    add("--seed", type=int, default=0)
    add = sample.add_mutually_exclusive_group().add_argument
    add("--out", metavar="DIR", help="default: RUN/samples/seed-N")
    add("--npz", metavar="FILE", help="one array instead, as other evaluators read it; an interrupted one is continued")
    sample.add_argument("--overwrite", action="store_true")
    if sampled is not None:
        _add_conditions(sample, sampled)

    evaluate = command("eval", "evaluate a run, or any pictures, by protocol name; writes PROTOCOL.json")
    source_options(evaluate)
    add = evaluate.add_argument
    add("--images", metavar="PATH", help="pictures instead of a run: a folder, or an .npz file")
    add("--reference", metavar="PATH", help="what --images is compared with: pictures, a dataset folder or statistics")
    add("--out", metavar="FILE", help="result of --images (default: beside them)")
    add("--protocol", nargs="+", help="default: the protocols of the recipe")
    expect = "compare with the numbers that a recipe states, by default that of the run; exit code 1 outside"
    add("--expect", nargs="?", const="", metavar="RECIPE", help=expect)
    actions = evaluate.add_subparsers(dest="action", metavar="reference")
    reference = actions.add_parser("reference", help="build reference features")
    reference.description = "features of reference pictures, kept for all runs"
    add = reference.add_argument
    add("verb", choices=("build",), help="the only one")
    add("data", metavar="DATA", help="dataset folder, folder of pictures, or .npz file")
    add("--protocol", nargs="+", required=True)
    add("--split", help="of a dataset folder (default: that of the protocol)")
    for parser in (sample, evaluate):
        parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the generator")
    for parser in (evaluate, reference):
        parser.add_argument("--workers", type=int, help="processes that read pictures (default: up to 8)")

    for name, point in installed(ADDED).items():
        if name in added:
            added[name].options(command(name, added[name].summary))
        else:  # not loaded: another command is meant
            commands.add_parser(name, help=_summary(point))
    return root


def _summary(point: EntryPoint) -> str:
    """The sentence of the `Command` that an entry point names, read in its source: importing may take seconds."""
    with suppress(ImportError, OSError, TypeError):
        source = Path(getattr(find_spec(point.module), "origin", None)).read_text(encoding="utf-8")  # type: ignore[arg-type]
        if found := re.search(rf'^{point.attr} = Command\(\s*"(.*?)"', source, re.M):
            return found[1]
    return f"added by {point.module.partition('.')[0]}: `raev2 {point.name} --help`"


def _run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", help="use the newest run of this task")
    command.add_argument("--run", metavar="DIR", help="run folder")


def source_options(command: argparse.ArgumentParser, own: Collection[str] = ()) -> None:
    """Options that say which model is meant, without the command's `own`; `actions.source_of` reads them."""
    add = command.add_argument
    if "--task" not in own:
        add("--task", help="use the newest run of this task; the task of --generator")
    add("--run", metavar="DIR", help="run folder, or a pipeline: its folder or hub id (default: the newest run)")
    add("--generator", metavar="DIR", help="artefact folder or hub id, with --tokenizer and --recipe")
    add("--tokenizer", metavar="DIR", help="artefact folder or hub id of its tokenizer")
    add("--recipe", help="whose settings such a pair gets: data, sampling, protocols")
    if "--set" not in own:
        add("--set", dest="settings", action="append", default=[], metavar="FIELD=VALUE", help="of that recipe")
    add("--data", metavar="DIR", help="dataset folder in place of the one that the model names")
    add("--ema", type=float, metavar="DECAY", help="averaged weights of the run: kept ones, or mixed from those")


def _add_conditions(sample: argparse.ArgumentParser, task: Task) -> None:
    """The options of a task that choose conditions; none may take the place of one of ours."""
    ours = {action.dest for action in sample._actions}
    group = sample.add_argument_group(f"conditions of task {task.name}")
    names = []
    for option, arguments in task.sample_options().items():
        try:
            names.append(group.add_argument(option, **arguments).dest)
        except (argparse.ArgumentError, ValueError, TypeError) as error:
            raise TaskError(f"task {task.name}", f"cannot add its option {option}", got=str(error)) from error
        if names[-1] in ours:
            raise TaskError(f"task {task.name}", f"its option {option} takes the name of one of `raev2 sample`")
    sample.set_defaults(conditions=names)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # torchmetrics loads it; it tells of its font cache
    argv = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± gets a question mark
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except (RaeError, OSError) as error:
        if "--debug" in argv:
            raise
        error = error if isinstance(error, RaeError) else _file_error(error)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _file_error(error: OSError) -> RaeError:
    """An error of the operating system as one of ours."""
    from raev2.errors import FileError

    try:
        sys.stdout.flush()
    except OSError:  # the interpreter would try again at its end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    where = str(error.filename or "a file or standard output")
    return FileError(where, "cannot be read or written", got=error.strerror or str(error))


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:  # at once: the parser asks what is installed
        print(__version__)
        return 0
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS and argv[0] in installed(TASKS):
        return _plugin_command(argv[0], argv[1:])
    options = parse(argv)
    if options.command is None:
        parser().print_help()
        return 0
    if options.command == "train":
        return train(options)
    if options.command in installed(ADDED):
        from raev2.task import get_command

        return get_command(options.command).run(options) or 0
    from raev2.command import actions

    return actions.COMMANDS[options.command](options)


def parse(argv: Sequence[str]) -> Namespace:
    """Options of a command line; SystemExit for usage that cannot be, SpecError for options that a task lacks."""
    command = next((word for word in argv if not word.startswith("-")), None)
    task = _sampled_task(argv) if command == "sample" else None
    root = parser(task, _added(command))
    options, rest = root.parse_known_args(argv)
    if rest and task is not None:
        own = ", ".join(task.sample_options())
        expected = f"one of {own}" if own else "none"
        raise SpecError(rest[0], f"no option of `raev2 sample` for task {task.name}", expected=expected)
    if rest:
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _added(name: str | None) -> dict[str, Command]:
    """The command of a package that a line is about."""
    if name is None or name not in installed(ADDED):
        return {}
    from raev2.task import get_command

    return {name: get_command(name)}


def _sampled_task(argv: Sequence[str]) -> Task | None:
    """The task that `raev2 sample` is asked about by --run or --task; None where the line does not say."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _run_options(finder)
    found, _ = finder.parse_known_args(argv)
    if found.run is None and found.task is None:
        return None
    from raev2.task import get_task

    if found.run is None:
        return get_task(found.task)
    from raev2.model.opened import Source

    return get_task(Source.of(found.run).spec.task.name)


def _plugin_command(name: str, argv: list[str]) -> int:
    """`raev2 TASK COMMAND ...`: a command that a task plugin adds."""
    from raev2.task import get_task

    commands = get_task(name).commands()
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: raev2 {name} COMMAND ...\n")
        for command, sentence in command_sentences(commands):
            print(f"  {command:<{max(map(len, commands))}}  {sentence}")
        return 0
    if not argv or argv[0] not in commands:
        raise TaskError(
            f"raev2 {name}", "unknown command" if argv else "which command?", got=repr(argv[0]) if argv else None,
            expected=f"one of {', '.join(commands)}" if commands else "none, this task adds no commands",
            hint=did_you_mean(argv[0], commands) if argv else "",
        )  # fmt: skip
    commands[argv[0]](argv[1:])
    return 0


def command_sentences(commands: Mapping[str, Callable[..., Any]]) -> list[tuple[str, str]]:
    """Commands of a task, each with the first line of its docstring."""
    return [(name, (command.__doc__ or "").strip().partition("\n")[0]) for name, command in commands.items()]


# Train


def train(options: Namespace) -> int:
    """`raev2 train`."""
    from raev2.command import actions
    from raev2.files.manifest import read_manifest
    from raev2.spec_io import apply_overrides
    from raev2.task import get_recipe, get_task

    task = get_task(options.task)
    spec = get_recipe(task, options.recipe)
    if options.data:
        read_manifest(options.data)  # raises where it is no dataset folder
        spec = spec.replace(data=spec.data.replace(dir=options.data, recipe=None, options={}))
    tracker = [f"tracker={options.tracker}"] if options.tracker else []
    spec = apply_overrides(spec, [*options.overrides, *tracker])
    run_dir = Path(options.run or Path("runs") / task.name / options.recipe)
    if options.dry_run:
        return actions.dry_run(task, spec, run_dir, options.stage)
    if options.max_time is not None and not 0 < options.max_time < 1e6:
        raise SpecError("--max-time", "not usable", got=options.max_time, expected="minutes above 0")
    from raev2 import pipeline
    from raev2.training import dist
    from raev2.training.run import Stopped, StopSignal

    try:
        with StopSignal(at_once=True):
            signal.setitimer(signal.ITIMER_REAL, 60 * (options.max_time or 0))  # 0: none
            resume = {"auto": True, "never": False}.get(options.resume, Path(options.resume))
            pipeline.train(spec, run_dir, stage=options.stage, resume=resume, overwrite=options.overwrite)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Stopped as stopped:
        print(f"{stopped}; saved. The same command continues.", file=sys.stderr)
        return RESUMABLE
    if dist.is_main():
        actions._print_results(run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
