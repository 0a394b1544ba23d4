"""`raev2 show`, `recipes`, `tasks`, `encoders` and `doctor`: options, and the shorter of the tables."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence

from raev2.command.actions import FAILED, OK, find_recipe, print_table
from raev2.errors import RaeError, SpecError
from raev2.spec import RunSpec
from raev2.task import Command, get_task, installed_tasks, usable_tasks
from raev2.tokenizer.encoder_table import ENCODERS


def print_rows(options: Namespace, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table, or with --json a list of mappings by column."""
    if options.json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))
    else:
        print_table(header, rows)


def _json_option(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


# Recipes, tasks, encoders


def _recipes_options(parser: ArgumentParser) -> None:
    parser.add_argument("--task", help="only those of this task")
    _json_option(parser)


def _recipes(options: Namespace) -> None:
    found = [get_task(options.task)] if options.task else usable_tasks()
    specs = [(task.name, name, recipe()) for task in found for name, recipe in task.recipes().items()]
    rows = [(task, name, spec.summary, spec.cost, _expected(spec)) for task, name, spec in specs]
    print_rows(options, ("task", "recipe", "what it is", "hardware and time", "number to expect"), rows)


def _expected(spec: RunSpec) -> str:
    """The numbers that a recipe states, and who reports them."""
    rows = spec.evaluation.expected
    sources = "; ".join(dict.fromkeys(row.source for row in rows))
    return f"{', '.join(f'{row.metric} {row.value:g}' for row in rows)} (quoted: {sources})" if rows else ""


def _tasks(options: Namespace) -> None:
    rows = []
    for name, point in sorted(installed_tasks().items()):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            task = get_task(name)
            rows.append((name, origin, ", ".join(task.recipes()), task.summary))
        except RaeError as error:
            rows.append((name, origin, "", str(error)))
    print_rows(options, ("task", "from", "recipes", "what it is"), rows)


def _encoders_options(parser: ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "check"), default="list")
    parser.add_argument("name", nargs="?")
    _json_option(parser)


def _encoders(options: Namespace) -> int:
    if options.action == "check":
        return _check_encoder(options)
    header = ("name", "route", "id", "width", "depth", "patch", "norm", "licence", "access")
    rows = [
        (e.name, e.route, e.model_id, e.width, e.depth, e.patch_size, e.norm, e.licence, "gated" if e.gated else "")
        for e in ENCODERS.values()
    ]
    print_rows(options, header, rows)
    return OK


def _check_encoder(options: Namespace) -> int:
    from raev2_tasks.listings.check import check_encoder

    if options.name is None:
        raise SpecError("raev2 encoders check", "which encoder?", expected="a name, timm:ID, hf:ID or a folder")
    checks = check_encoder(options.name)
    print_rows(
        options, ("check", "result", "detail"), [(name, "ok" if ok else "FAILED", text) for name, ok, text in checks]
    )
    return OK if all(ok for _, ok, _ in checks) else FAILED


# One recipe, this machine


def _show_options(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--task", help="needed when several tasks have a recipe of this name")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    _json_option(parser)


def _show(options: Namespace) -> None:
    import yaml

    from raev2.command.actions import print_sizes
    from raev2.spec_io import apply_overrides, fingerprint, spec_to_dict
    from raev2_tasks.listings.counts import counts

    task, spec = find_recipe(options.recipe, options.task, "raev2 show")
    spec = apply_overrides(spec, options.overrides)
    sizes, cost = counts(task, spec).values()
    if options.json:
        about = {"spec": spec_to_dict(spec), "fingerprint": fingerprint(spec), "sizes": sizes | cost}
        print(json.dumps(about, indent=2, ensure_ascii=False))
    else:
        print(yaml.safe_dump(spec_to_dict(spec), sort_keys=False, allow_unicode=True))
        print_sizes(task, spec, sizes.items())
        print()
        print_table(("cost", "value"), cost.items())


def _doctor(options: Namespace) -> None:
    from raev2_tasks.listings.doctor import machine

    print_rows(options, ("what", "state"), machine())


SHOW = Command("resolved spec, parameters, compute and memory of a recipe; starts nothing", _show_options, _show)
RECIPES = Command("list recipes, with hardware, time and number to expect", _recipes_options, _recipes)
TASKS = Command("list installed tasks and their recipes", _json_option, _tasks)
ENCODERS_COMMAND = Command("list encoders with licence, or check one", _encoders_options, _encoders)
DOCTOR = Command("environment, devices, optional parts, reachable and missing assets", _json_option, _doctor)
