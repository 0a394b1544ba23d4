"""`raev2 data`: list, plan, build and verify datasets."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from raev2.command.actions import print_table
from raev2.errors import DataError, SpecError
from raev2.files.damage import damaged
from raev2.files.manifest import read_manifest
from raev2.task import Command, get_data_recipe, installed_data_recipes
from raev2_data_recipes.base import verify_dataset


def _options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("list", "plan", "build", "verify"))
    add("recipe", nargs="?", help="data recipe; for verify a dataset folder")
    add("--out", metavar="DIR", help="default: data/RECIPE")
    add("--set", dest="overrides", action="append", default=[], metavar="OPTION=VALUE")
    add("--overwrite", action="store_true")


def _data(options: Namespace) -> None:
    if options.action == "list":
        found = [get_data_recipe(name) for name in sorted(installed_data_recipes())]
        print_table(
            ("recipe", "size", "licence", "what it is", "options"),
            [(r.name, r.size, r.licence, r.summary, ", ".join(r.options)) for r in found],
        )
        return
    if options.recipe is None:
        raise SpecError(
            f"raev2 data {options.action}", "which one?", expected="a recipe, or for verify a dataset folder"
        )
    if options.action == "verify":
        folder = Path(options.recipe)
        name = str(read_manifest(folder).get("recipe"))
        # The recipe that wrote a folder knows its format; a folder written by hand is one of pictures.
        verify = get_data_recipe(name).verify if name in installed_data_recipes() else verify_dataset
        with damaged(f"data {folder / 'manifest.json'}", DataError):
            manifest = verify(folder)
            counts = ", ".join(f"{name} {split['num_samples']:,}" for name, split in manifest["splits"].items())
            print(f"{options.recipe}: intact ({counts}; fingerprint {manifest['fingerprint'][:12]})")
        return
    recipe = get_data_recipe(options.recipe)
    pairs = [override.partition("=") for override in options.overrides]
    settings = {name: value for name, _, value in pairs}
    out = Path(options.out or Path("data") / options.recipe)
    print("\n".join(recipe.plan(recipe.resolve(settings))))
    if options.action == "build":
        manifest = recipe.build(out, settings, options.overwrite)
        counts = ", ".join(f"{name} {split['num_samples']:,}" for name, split in manifest["splits"].items())
        classes = f", {len(manifest['classes'])} classes" if manifest["classes"] else ""
        print(f"{out}: {counts}{classes}, {manifest['rejected']} rejected")
        if manifest.get("duplicates"):
            print(f"in val and in train: {manifest['duplicates']:,}")


DATA = Command("list, build or verify datasets", _options, _data)
