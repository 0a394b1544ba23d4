"""The recipes own-photos-*: they fit their machines by the cost model, and their lengths follow the data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from raev2.command.cli import main, parse
from raev2.errors import SpecError
from raev2.spec_io import apply_overrides
from raev2.task import get_recipe, get_task
from raev2.training.optim import learning_rate
from raev2.training.preflight import GENERATOR, generator_memory, network_of, state_bytes
from raev2_tasks.imagenet.recipes import OWN_PHOTOS
from raev2_tasks.listings import cost


@pytest.mark.parametrize("memory", OWN_PHOTOS)
def test_what_is_computed_at_once_fits_the_memory(memory):
    """Stage 2, with 10 % to spare and without leaving half of it empty."""
    task = get_task("imagenet")
    spec = get_recipe(task, f"own-photos-{memory}gb")
    _, frozen = cost._tokenizer_rows(task, spec)
    generator = network_of(task, spec, GENERATOR)
    loop = spec.generator_training
    state = state_bytes(sum(value.numel() for value in generator.parameters()), loop)
    needed = frozen + state + generator_memory(task, spec).needs(loop.micro_batch_size)
    assert 0.45 * memory < needed / 1e9 < 0.9 * memory


@pytest.fixture
def photos(tmp_path) -> Path:
    """What says of a dataset folder how many pictures and classes it has."""
    manifest = {"format_version": 1, "splits": {"train": {"num_samples": 2_500}}, "classes": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return tmp_path


def test_the_printed_command_trains_as_long_as_the_data_is_large(photos, capsys):
    assert main(["imagenet", "own-photos", "--data", str(photos), "--run", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "of 2,500 pictures" in printed and "20,000  8 times each picture" in printed
    options = parse(shlex.split(printed.splitlines()[-1])[1:])
    assert (options.command, options.recipe, options.data, options.run) == (
        "train",
        "own-photos-cpu",
        str(photos),
        "mine",
    )
    spec = apply_overrides(get_recipe(get_task("imagenet"), "own-photos-cpu"), options.overrides)
    assert (spec.tokenizer_training.images, spec.generator_training.images) == (20_000, 49_984)
    assert spec.task.unconditional, "there are no classes"
    loop = spec.generator_training
    rates = [learning_rate(loop.schedule, images, loop.images, 32) for images in (0, 24_000, 49_952)]
    assert rates[0] == rates[1] == loop.schedule.lr and rates[2] == pytest.approx(loop.schedule.final_lr, rel=0.02)
    assert loop.eval_every_images == loop.images / 2, "as often as in the recipe"


def test_a_size_that_no_recipe_has_names_those_there_are(photos, capsys):
    assert main(["imagenet", "own-photos", "--data", str(photos), "--size", "25gb"]) == SpecError.exit_code
    assert "--size: no recipe for it; got '25gb'; expected one of cpu, 12gb, 24gb, 80gb. " in capsys.readouterr().err
