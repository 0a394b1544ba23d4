"""`raev2 assets`: the weights that a recipe reads and no package brings; what is missing comes from its source."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from raev2.command.actions import find_recipe, print_table
from raev2.spec_io import apply_overrides
from raev2.task import Command


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "fetch"))
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--task", help="needed when several tasks have a recipe of this name")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")


def _assets(options: Namespace) -> None:
    from raev2.training.preflight import Plan, with_tokenizer

    task, spec = find_recipe(options.recipe, options.task, "raev2 assets")
    found = Plan(task, with_tokenizer(apply_overrides(spec, options.overrides), download=False)).assets()
    rows = [(asset.what, asset.fault() or "ok", asset.url or "local", asset.place) for asset in found]
    print_table(("weights", "state", "from", "to"), rows)
    for asset in found if options.action == "fetch" else ():
        asset.fetch()


ASSETS = Command("the weights that a recipe needs: list them, or get those that are missing", _options, _assets)
