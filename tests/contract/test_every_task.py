"""What every installed task and each of its recipes promises. A new one is tested without a new line here."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from raev2.model.condition import ConditionSpec
from raev2.model.generator import Generator
from raev2.spec import PixelSpec, RunSpec, TaskSpec, TokenizerSpec
from raev2.spec_io import apply_overrides, fingerprint, load_spec, save_spec, spec_from_dict, spec_to_dict
from raev2.task import Evaluator, Task, get_evaluators, get_recipe, get_task, installed_data_recipes, installed_tasks
from raev2.tokenizer.baselines import VAES
from raev2.tokenizer.encoder_table import ENCODERS
from raev2.training.preflight import run_sizes

TASKS = sorted(installed_tasks())
RECIPES = [(name, recipe) for name in TASKS for recipe in get_task(name).recipes()]
IDS = [f"{name}/{recipe}" for name, recipe in RECIPES]


@pytest.fixture(params=TASKS)
def task(request) -> Task:
    return get_task(request.param)


@pytest.fixture(params=RECIPES, ids=IDS)
def run(request) -> tuple[Task, str, RunSpec]:
    task = get_task(request.param[0])
    return task, request.param[1], get_recipe(task, request.param[1])


# Tasks.


def test_a_task_describes_itself(task):
    assert re.fullmatch(r"[a-z][a-z0-9-]*", task.name) and task.name in TASKS
    assert get_task(task.name) is task
    assert task.summary and "\n" not in task.summary


def test_the_fields_of_a_task_are_frozen_and_complete(task):
    assert issubclass(task.spec_type, TaskSpec)
    spec = task.spec_type(name=task.name)
    assert spec.name == task.name, "a recipe that only names the task is enough"
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        task.spec_type(name=task.name, no_such_field=1)
    with pytest.raises(ValidationError):
        task.spec_type(name="another-task")
    for name, field in task.spec_type.model_fields.items():
        assert name == "name" or field.description, f"{name} has no description for the reference page"


def test_a_task_has_the_recipe_that_train_takes_by_default(task):
    assert "quickstart" in task.recipes()


def test_kinds_of_condition_of_a_task_have_a_kind(task):
    for type_ in task.condition_types():
        assert issubclass(type_, ConditionSpec) and type_.model_fields["kind"].default


def test_extra_commands_of_a_task_are_documented(task):
    for name, command in task.commands().items():
        assert re.fullmatch(r"[a-z][a-z-]*", name) and inspect.getdoc(command)


# Recipes.


def test_a_recipe_names_itself_and_its_task(run):
    task, name, spec = run
    assert spec.recipe == name
    assert type(spec.task) is task.spec_type and spec.task.name == task.name
    assert spec.summary and "\n" not in spec.summary


def test_a_recipe_is_the_same_every_time(run):
    task, name, spec = run
    assert get_recipe(task, name) == spec
    assert fingerprint(get_recipe(task, name)) == fingerprint(spec)


def test_a_recipe_survives_yaml(run, tmp_path):
    _, _, spec = run
    assert spec_from_dict(yaml.safe_load(yaml.safe_dump(spec_to_dict(spec)))) == spec
    save_spec(spec, tmp_path / "spec.yaml")
    loaded = load_spec(tmp_path / "spec.yaml")
    assert loaded == spec and fingerprint(loaded) == fingerprint(spec)
    assert apply_overrides(spec, []) == spec


def tokenizer_is_known(spec):
    if isinstance(spec, TokenizerSpec):
        return spec.encoder.name in ENCODERS
    return isinstance(spec, PixelSpec) or spec.name in VAES


def test_a_recipe_names_parts_that_exist(run):
    _, _, spec = run
    training = spec.tokenizer_training
    assert tokenizer_is_known(spec.tokenizer)
    assert spec.data.recipe is None or spec.data.recipe in installed_data_recipes()
    for encoder in (training.adversarial, training.perceptual):
        assert getattr(encoder, "encoder", "micro") in ENCODERS


def test_the_layers_of_a_recipe_are_in_its_encoder(run):
    _, _, spec = run
    if isinstance(spec.tokenizer, TokenizerSpec):
        info = ENCODERS[spec.tokenizer.encoder.name]
        assert all(layer < info.depth for layer in spec.tokenizer.encoder.layers)


def test_a_recipe_fits_together(run):
    """Schedules end inside the training, checkpoints are written, guidance finds the head it needs."""
    _, _, spec = run
    for loop in (spec.tokenizer_training, spec.generator_training):
        assert loop.save_every_images <= loop.images
        assert loop.schedule.warmup_images < loop.images
        assert loop.schedule.decay_start_images < loop.images
        assert loop.schedule.final_lr <= loop.schedule.lr
    if "base head" in spec.sampling.guidance.needs:
        assert spec.generator.base_head_depth is not None


def test_a_recipe_can_be_laid_out(run):
    """Decoder and generator are built on the meta device: their sizes fit."""
    task, _, spec = run
    sizes = dict(run_sizes(task, spec))
    trained = isinstance(spec.tokenizer, TokenizerSpec)
    for name in ("decoder parameters",) * trained + ("generator parameters",):
        assert float(sizes[name].split()[0]) >= 0.1


@pytest.mark.parametrize("name", ["quickstart", "laptop"])
def test_small_recipes_need_nothing_that_is_not_in_the_package(task, name):
    if name not in task.recipes():
        pytest.skip(f"{task.name} has no recipe {name}")
    spec = get_recipe(task, name)
    training = spec.tokenizer_training
    encoders = {spec.tokenizer.encoder.name, getattr(training.perceptual, "encoder", None)}
    if training.adversarial:
        encoders.add(training.adversarial.encoder)
    assert encoders == {"micro"}
    for protocol in (*spec.evaluation.protocols, *spec.evaluation.in_training):
        assert "inception" not in protocol


# Evaluators.


def test_protocols_are_found_by_unique_names(run):
    task, _, spec = run
    evaluators = task.evaluators(spec)
    names = [evaluator.protocol for evaluator in evaluators]
    assert len(set(names)) == len(names) > 0
    for evaluator in evaluators:
        assert (
            isinstance(evaluator, Evaluator) and evaluator.description and isinstance(evaluator.needs_generator, bool)
        )
        assert re.fullmatch(r"[a-z0-9-]+", evaluator.protocol), "it is the name of a file"
    assert get_evaluators(task, spec, spec.evaluation.protocols), "training ends with an evaluation"
    assert all(e.needs_generator for e in get_evaluators(task, spec, spec.evaluation.in_training))


# Conditions.


def test_the_null_condition_has_the_shape_of_a_condition(run):
    task, _, spec = run
    conditioner = task.condition(spec, None).build(spec.generator, (4, 2, 2))
    cond = conditioner.complete(conditioner.example_cond(3))
    conditioner.check(cond)
    null_cond = conditioner.null_cond(cond)
    assert null_cond.keys() == cond.keys() >= conditioner.fields.keys()
    for name, value in cond.items():
        assert null_cond[name].shape == value.shape and null_cond[name].dtype == value.dtype
    conditioner.check(null_cond)


def test_a_condition_reaches_the_generator(task):
    """The networks of the quickstart run with the condition of the task, and another condition gives another output."""
    spec = get_recipe(task, "quickstart")
    generator = Generator(spec.generator, task.condition(spec, None), spec.flow, (4, 2, 2)).eval()
    torch.manual_seed(0)
    for parameter in generator.parameters():  # output layers start at zero
        torch.nn.init.normal_(parameter, std=0.05)
    cond = generator.conditioner.example_cond(2)
    z_t, t = torch.randn(2, 4, 2, 2), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        output = generator(z_t, t, cond)
        assert output.pred.shape == z_t.shape
        if cond:
            assert not torch.allclose(output.pred, generator(z_t, t, generator.null_cond(cond)).pred)


OLDER = json.loads((Path(__file__).parent / "recipe_fingerprints.json").read_text())


@pytest.mark.parametrize("name", OLDER)
def test_a_recipe_has_the_fingerprint_that_older_runs_of_it_carry(name):
    """As commit 9c3efb4 computed it: run folders of that time continue. Recipes changed since are left out."""
    task, _, recipe = name.partition("/")
    assert fingerprint(get_recipe(get_task(task), recipe)) == OLDER[name]
