"""The `raev2` command: parse, call one function of actions.py, print. No logic here, and no heavy import."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

COMMANDS = (
    "train", "sample", "reconstruct", "eval", "report", "show", "recipes", "tasks", "encoders", "data", "latents",
    "import", "export", "analyse", "bench", "doctor",
)  # fmt: skip
EPILOG = (
    "Every other value is a field of the recipe: `raev2 show RECIPE` prints them, `--set path.to.field=value` sets one."
)


def parser() -> argparse.ArgumentParser:
    """The command line as an argparse parser (docs/reference/cli.md is generated from it)."""
    root = argparse.ArgumentParser(
        prog="raev2",
        description="Generative modelling in the latent space of frozen vision encoders.",
        epilog=EPILOG,
    )
    root.add_argument("--version", action="store_true", help="print the version")
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
    train.add_argument("--overwrite", action="store_true", help="delete an existing run folder first")
    train.add_argument("--dry-run", action="store_true", help="print sizes, and what is there already; train nothing")

    sample = command("sample", "images from a trained generator")
    _run_options(sample)
    sample.add_argument("--label", nargs="+", metavar="LABEL", help="class names or indices")
    sample.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts, for tasks with text conditions")
    sample.add_argument("--prompts", metavar="FILE", help="texts, one a line")
    sample.add_argument("--n", type=int, default=16, help="number of images (default: 16)")
    sample.add_argument("--steps", type=int, help="solver steps")
    sample.add_argument("--guidance", choices=("none", "cfg", "internal", "auto", "internal+cfg"))
    sample.add_argument("--scale", type=float, help="guidance scale; 1 is off")
    sample.add_argument(
        "--interval", type=float, nargs=2, metavar=("T_MIN", "T_MAX"), help="guide for t in this interval"
    )
    sample.add_argument("--weak", metavar="DIR", help="weak generator for --guidance auto")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", metavar="DIR", help="default: RUN/samples/seed-N")
    sample.add_argument("--overwrite", action="store_true")

    reconstruct = command("reconstruct", "encode and decode images; grid and PSNR/SSIM table")
    reconstruct.add_argument("images", nargs="+", metavar="PATH", help="image files or folders")
    reconstruct.add_argument("--run", required=True, metavar="DIR", help="run folder, tokenizer folder or hub id")
    reconstruct.add_argument("--out", metavar="DIR", default="reconstructions")
    reconstruct.add_argument("--overwrite", action="store_true")

    evaluate = command("eval", "evaluate by protocol name; writes RUN/eval/PROTOCOL.json")
    _run_options(evaluate)
    evaluate.add_argument("--protocol", nargs="+", help="default: the protocols of the recipe")

    report = command("report", "write RUN/report.html")
    _run_options(report)

    show = command("show", "resolved spec, parameters, compute and memory of a recipe; starts nothing")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("--task", help="needed when several tasks have a recipe of this name")
    show.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")

    recipes = command("recipes", "list recipes")
    recipes.add_argument("--task")
    command("tasks", "list installed tasks and their protocols")
    encoders = command("encoders", "list encoders with licence, or check one")
    encoders.add_argument("action", nargs="?", choices=("list", "check"), default="list")
    encoders.add_argument("name", nargs="?")

    data = command("data", "list, build or verify datasets")
    data.add_argument("action", choices=("list", "plan", "build", "verify"))
    data.add_argument("recipe", nargs="?", help="data recipe; for verify a dataset folder")
    data.add_argument("--out", metavar="DIR", help="default: data/RECIPE")
    data.add_argument("--set", dest="overrides", action="append", default=[], metavar="OPTION=VALUE")
    data.add_argument("--overwrite", action="store_true")

    latents = command("latents", "latent statistics or a latent cache of a dataset, by a trained tokenizer")
    latents.add_argument("action", choices=("stats", "build"))
    latents.add_argument("--run", required=True, metavar="DIR", help="run folder or tokenizer folder")
    latents.add_argument("--data", required=True, metavar="DIR", help="dataset folder")
    latents.add_argument("--split", default="train")
    latents.add_argument("--out", required=True, metavar="FILE")

    analyse = command("analyse", "an analysis of the papers: writes a table (JSON, Markdown) and a plot (SVG)")
    analyse.add_argument(
        "name", metavar="NAME", help="probe, correlation, blocks, width, layers, time-shift or decoder-noise"
    )
    _run_options(analyse)
    analyse.add_argument("--recipe", default="quickstart", help="recipe that is varied (default: quickstart)")
    analyse.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    analyse.add_argument("--data", default="emoji", metavar="DIR", help="labelled dataset folder or data recipe")
    analyse.add_argument("--encoder", nargs="+", metavar="NAME", help="probe: encoders (default: micro)")
    analyse.add_argument("--grid", type=int, nargs=2, default=(8, 8), metavar=("ROWS", "COLS"), help="probe: tokens")
    analyse.add_argument("--layers", type=int, nargs="+", metavar="K", help="probe: numbers of last layers")
    analyse.add_argument("--widths", type=int, nargs="+", metavar="D", help="width: widths of the network")
    analyse.add_argument("--steps", type=int, default=300, help="width: training steps")
    analyse.add_argument("--n", type=int, default=64, help="blocks: number of images")
    analyse.add_argument("--out", metavar="DIR", default="analysis")

    bench = command("bench", "benchmark tables with the machine's description")
    bench.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    bench.add_argument("--json", metavar="FILE", help="also write the numbers here")

    import_ = command("import", "weights of RAE, RAEv2 or diffusers -> artefact folder")
    import_.add_argument(
        "src", metavar="SRC", help="checkpoint or decoder file (.pt, .safetensors), or diffusers folder"
    )
    import_.add_argument("--out", required=True, metavar="DIR", help="artefact folder to write")
    import_.add_argument("--config", metavar="FILE", help="configuration that belongs to the weights, YAML or JSON")
    import_.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE",
                         help="entry of that configuration; encoder.FIELD for the encoder")  # fmt: skip
    import_.add_argument("--encoder", metavar="NAME", help="encoder of a decoder: our name, RAEv2's name, or a folder")
    import_.add_argument("--encoder-dir", metavar="DIR", help="local folder with the weights of that encoder")
    import_.add_argument("--stats", metavar="FILE", help="latent statistics that belong to a decoder")
    import_.add_argument("--from", dest="origin", choices=("rae", "raev2"), help="who trained a decoder")
    import_.add_argument("--overwrite", action="store_true", help="replace an artefact folder")

    export = command("export", "weights of a run in the layout of RAEv2 or diffusers, or ready for the hub")
    export.add_argument("--run", required=True, metavar="DIR", help="run folder, tokenizer or generator folder")
    export.add_argument("--format", required=True, choices=("reference", "diffusers", "hub"))
    export.add_argument("--out", required=True, metavar="DIR")
    export.add_argument("--overwrite", action="store_true")

    command("doctor", "environment, devices, optional parts, reachable and missing assets")
    return root


def _run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", help="use the newest run of this task")
    command.add_argument("--run", metavar="DIR", help="run folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        plugin_command = _plugin_command(argv[0])
        if plugin_command is not None:
            return _call("--debug" in argv, plugin_command, argv[1:])
    root = parser()
    options = root.parse_args(argv)
    if options.version:
        from raev2 import __version__

        print(__version__)
        return 0
    if options.command is None:
        root.print_help()
        return 0

    def action() -> int:
        from raev2.command import actions

        return actions.COMMANDS[options.command](options)

    return _call(options.debug, action)


def _plugin_command(name: str):  # type: ignore[no-untyped-def]
    """`raev2 TASK COMMAND ...`: a command that a task plugin adds, or None."""
    if name in COMMANDS:
        return None
    from raev2.task import get_task, installed_tasks

    if name not in installed_tasks():
        return None

    def action(argv: Sequence[str]) -> int:
        from raev2.errors import TaskError, did_you_mean

        commands = get_task(name).commands()
        if not argv or argv[0] not in commands:
            raise TaskError(
                f"raev2 {name}", "unknown command" if argv else "which command?", got=repr(argv[0]) if argv else None,
                expected=f"one of {', '.join(commands)}" if commands else "none, this task adds no commands",
                hint=did_you_mean(argv[0], commands) if argv else "",
            )  # fmt: skip
        commands[argv[0]](argv[1:])
        return 0

    return action


def _call(debug: bool, action, *arguments: object) -> int:  # type: ignore[no-untyped-def]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from raev2.errors import RaeError

    try:
        return action(*arguments)
    except RaeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
