from __future__ import annotations

import sys
import types

import pytest

from raev2.command.cli import main, parse
from raev2.errors import SpecError, TaskError, did_you_mean
from raev2.files.plugins import DATA_RECIPES, TASKS
from raev2.spec import TaskSpec
from raev2.task import (
    Evaluator,
    Task,
    get_data_recipe,
    get_evaluators,
    get_recipe,
    get_task,
    installed_data_recipes,
    installed_tasks,
)


class Throwaway(Task):
    """The least a task can be; its recipe is the tiny run of the tests."""

    name = "throwaway"
    summary = "for this test"
    spec_type = TaskSpec

    def __init__(self, spec):
        self.spec = spec

    def dataset(self, spec, split):
        raise NotImplementedError

    def condition(self, spec, dataset):
        raise NotImplementedError

    def eval_cond(self, spec, dataset, indices):
        raise NotImplementedError

    def sample_cond(self, spec, dataset, options):
        raise NotImplementedError

    def evaluators(self, spec):
        return [Count("count"), Count("count-twice")]

    def recipes(self):
        return {"quickstart": lambda: self.spec, "laptop": lambda: self.spec}

    def commands(self):
        return {"greet": lambda argv: print("hello", *argv)}


class Count(Evaluator):
    description = "counts"
    needs_generator = False

    def __init__(self, protocol):
        self.protocol = protocol

    def run(self, context):
        raise NotImplementedError


@pytest.fixture
def plugin(monkeypatch, install, tiny_spec):
    """A module with a task, registered as an installed package would."""
    module = types.ModuleType("throwaway_plugin")
    module.TASK = Throwaway(tiny_spec.replace(task=TaskSpec(name="throwaway")))
    module.NOT_A_TASK = 3
    monkeypatch.setitem(sys.modules, "throwaway_plugin", module)
    install(TASKS, "throwaway", "throwaway_plugin:TASK")
    return module


# Names.


def test_an_unknown_task_lists_the_known_ones_and_the_closest():
    with pytest.raises(TaskError, match=r"--task: unknown task; got 'imagenett'; expected one of .*imagenet.*\. Did"):
        get_task("imagenett")
    with pytest.raises(TaskError) as caught:
        get_task("zzz")
    assert "Did you mean" not in str(caught.value)


def test_an_unknown_recipe_lists_the_known_ones_and_the_closest():
    with pytest.raises(SpecError, match=r"--recipe: unknown recipe of task imagenet; got 'quikstart'; .*'quickstart'"):
        get_recipe(get_task("imagenet"), "quikstart")


def test_an_unknown_data_recipe_lists_the_known_ones_and_the_closest():
    with pytest.raises(TaskError, match=r"data recipe: unknown data recipe; got 'emojis'; .*Did you mean 'emoji'\?"):
        get_data_recipe("emojis")


def test_an_unknown_protocol_lists_the_known_ones_and_the_closest(plugin):
    task, spec = get_task("throwaway"), plugin.TASK.spec
    assert [e.protocol for e in get_evaluators(task, spec, ["count-twice", "count"])] == ["count-twice", "count"]
    with pytest.raises(SpecError, match=r"--protocol: unknown protocol of task throwaway; got 'cont'; .*'count'\?"):
        get_evaluators(task, spec, ["cont"])


@pytest.mark.parametrize(
    ("name", "expected"), [("widht", "Did you mean 'width'?"), ("", ""), ("zzz", ""), ("dept", "Did you mean 'depth'?")]
)
def test_did_you_mean(name, expected):
    assert did_you_mean(name, ["width", "depth"]) == expected


# A plugin.


def test_an_installed_plugin_is_a_task_like_the_others(plugin):
    assert "throwaway" in installed_tasks()
    assert get_task("throwaway") is plugin.TASK
    assert get_recipe(get_task("throwaway"), "quickstart").task.name == "throwaway"


def test_the_command_line_knows_a_plugin(plugin, capsys):
    assert main(["tasks"]) == 0
    assert "throwaway" in capsys.readouterr().out
    assert main(["recipes", "--task", "throwaway"]) == 0
    assert "laptop" in capsys.readouterr().out
    assert main(["show", "quickstart"]) == 2
    assert "several tasks have a recipe 'quickstart'; expected --task" in capsys.readouterr().err


def test_a_plugin_adds_commands(plugin, capsys):
    assert main(["throwaway", "greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert main(["throwaway", "gret"]) == 5
    assert capsys.readouterr().err == (
        "error: raev2 throwaway: unknown command; got 'gret'; expected one of greet. Did you mean 'greet'?\n"
    )


def test_the_commands_of_a_plugin_are_listed_with_a_sentence_each(plugin, monkeypatch, capsys):
    def wave(argv):
        """Wave a hand.

        More about it.
        """

    monkeypatch.setattr(Throwaway, "commands", lambda self: {"greet": lambda argv: None, "wave": wave})
    for option in ("--help", "-h"):
        assert main(["throwaway", option]) == 0
        assert capsys.readouterr().out == "usage: raev2 throwaway COMMAND ...\n\n  greet  \n  wave   Wave a hand.\n"


def test_a_plugin_adds_options_to_sample(plugin, monkeypatch, capsys):
    monkeypatch.setattr(Throwaway, "sample_options", lambda self: {"--mood": {"nargs": "+", "help": "moods"}})
    options = parse(["sample", "--task", "throwaway", "--mood", "calm", "wild", "--n", "3"])
    assert (options.mood, options.n, options.conditions) == (["calm", "wild"], 3, ["mood"])
    assert main(["sample", "--task", "throwaway", "--label", "cat"]) == 2
    assert "--label: no option of `raev2 sample` for task throwaway; expected one of --mood" in capsys.readouterr().err
    monkeypatch.setattr(Throwaway, "sample_options", lambda self: {})
    assert main(["sample", "--task", "throwaway", "--mood", "calm"]) == 2
    assert capsys.readouterr().err == "error: --mood: no option of `raev2 sample` for task throwaway; expected none\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"--seed": {}},
            "task throwaway: cannot add its option --seed; got argument --seed: conflicting option string",
        ),
        ({"--start": {"dest": "seed"}}, "task throwaway: its option --start takes the name of one of `raev2 sample`"),
        ({"--mood": {"kind": 3}}, "task throwaway: cannot add its option --mood; got "),
    ],
)
def test_a_plugin_option_that_clashes_names_its_owner(plugin, monkeypatch, capsys, options, message):
    monkeypatch.setattr(Throwaway, "sample_options", lambda self: options)
    assert main(["sample", "--task", "throwaway"]) == 5
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_plugin_without_a_command_says_what_there_is(plugin, capsys):
    assert main(["throwaway"]) == 5
    assert "which command?; expected one of greet" in capsys.readouterr().err


def test_two_packages_with_one_name_are_both_named(install):
    install(TASKS, "twice", "package_a:TASK")
    install(TASKS, "twice", "package_b:TASK")
    with pytest.raises(TaskError, match="task twice: installed twice; got package_a:TASK and package_b:TASK; expect"):
        installed_tasks()
    install(DATA_RECIPES, "emoji", "package_a:RECIPE")
    with pytest.raises(TaskError, match="data recipe emoji: installed twice; got .*package_a:RECIPE"):
        installed_data_recipes()


def test_one_package_that_is_listed_twice_is_no_error(install):
    """As an editable installation is, on some systems."""
    install(TASKS, "once", "package_a:TASK")
    install(TASKS, "once", "package_a:TASK")
    assert "once" in installed_tasks()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package:TASK", r"task broken: no_such_package:TASK cannot be loaded; got ModuleNotFoundError\("),
        ("throwaway_plugin:TYPO", r"task broken: throwaway_plugin:TYPO cannot be loaded; got AttributeError\("),
        ("throwaway_plugin:NOT_A_TASK", "task broken: its entry point is not a Task; got int"),
    ],
)
def test_a_broken_plugin_is_a_task_error(plugin, install, capsys, value, message):
    install(TASKS, "broken", value)
    with pytest.raises(TaskError, match=message):
        get_task("broken")
    assert main(["train", "--task", "broken"]) == 5


def test_a_broken_plugin_does_not_hide_the_others(plugin, install, capsys):
    install(TASKS, "broken", "no_such_package:TASK")
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert "throwaway" in out and "cannot be loaded" in out
    assert main(["recipes"]) == 0
    assert main(["show", "quickstrat"]) == 2
    assert "Did you mean 'quickstart'?" in capsys.readouterr().err


def test_an_error_of_ours_in_a_plugin_keeps_its_text(monkeypatch, install):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "picky_plugin":
                raise SpecError("picky", "needs another version")

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    install(TASKS, "picky", "picky_plugin:TASK")
    with pytest.raises(SpecError, match="^picky: needs another version$"):
        get_task("picky")
