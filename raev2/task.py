"""The plugin contract. A task supplies what differs between tasks; the core asks, and never names one.

Read `Task` first. Tasks are found through the entry-point group ``raev2.tasks``; the built-in ones use the same door.
How to write one: docs/how_to/new_task.md.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from raev2.errors import RaeError, SpecError, TaskError, did_you_mean
from raev2.files.plugins import COMMANDS, DATA_RECIPES, TASKS, installed, load
from raev2.spec import RunSpec, TaskSpec

if TYPE_CHECKING:  # light import: the command line lists tasks without torch
    from pathlib import Path

    import torch

    from raev2.batch import Cond, Measurement, MetricResult
    from raev2.data import ImageDataset
    from raev2.files.assets import Asset
    from raev2.model.condition import ConditionSpec
    from raev2.model.generator import Generator
    from raev2.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)
EncodeImages = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class EvalContext:
    """The opened run: what evaluators and commands of a task use. `TrainedRun.context` of raev2.pipeline makes it.

    spec       as the run is used here: its sampling settings and `evaluation.seed` may be others than in the folder
    generate   (raw conditions, global sample indices) -> 8-bit images (B, 3, Hpx, Wpx); the same call in training and
               in `raev2 eval`. None where only a tokenizer exists
    dataset    opens a split of the run's data
    cache_dir  where reference statistics may be kept, by fingerprint
    generator  the network itself, for protocols that sample otherwise than image by image
    weak       second generator, where the sampling settings name one
    picture    where the protocol may save one PNG that the report shows beside its numbers, with `picture` of
               `describe` as its caption
    """

    spec: RunSpec
    rae: Tokenizer
    dataset: Callable[[str], ImageDataset]
    device: torch.device
    cache_dir: Path
    generate: Callable[[Cond, Sequence[int]], torch.Tensor] | None = None
    generator: Generator | None = None
    weak: Generator | None = None
    picture: Path | None = None

    def autocast(self, precision: str | None = None) -> torch.autocast:
        """Inside, networks compute in the precision of the run, or in this one."""
        from raev2.nn import autocast

        return autocast(precision or self.spec.precision, self.device)

    def encode(self, images_u8: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """8-bit images -> normalised latents (B, C, H, W), in float32. An `EncodeImages`, which needs no `keys`."""
        from raev2.data import to_float

        with self._float32():
            return self.rae.encode(to_float(images_u8.to(self.device)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, C, H, W) -> 8-bit images (B, 3, Hpx, Wpx) on the CPU, in float32."""
        from raev2.data import to_uint8

        with self._float32():
            return to_uint8(self.rae.decode(latents.float())).cpu()

    def reconstruct(self, images_u8: torch.Tensor) -> torch.Tensor:
        """8-bit images after encoding and decoding, on the CPU, in float32."""
        from raev2.data import to_float, to_uint8

        with self._float32():
            return to_uint8(self.rae.reconstruct(to_float(images_u8.to(self.device)))).cpu()

    @contextmanager
    def _float32(self) -> Iterator[None]:
        """The tokenizer works in float32 in every run, and without gradients."""
        import torch

        with torch.no_grad(), self.autocast("fp32"):
            yield


@dataclass(frozen=True)
class Command:
    """A command that a package adds to `raev2`: what an entry point of the group `raev2.commands` names.

    options   adds its options to a parser
    run       does it; the exit code, or None for 0
    """

    summary: str
    options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]


class Evaluator(ABC):
    """A protocol: a named, complete recipe for numbers. Loose flags do not exist."""

    protocol: str
    description: str
    needs_generator: bool

    def needs(self) -> Sequence[Asset]:
        """Weights that it reads and no package brings, for `raev2 train --dry-run`. Default: none."""
        return ()

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """What the numbers depend on besides spec and data, for the result file."""
        return {}

    @abstractmethod
    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """Yield the numbers of this protocol. Runs on every process; all processes yield the same values."""


class Task(ABC):
    """What differs between tasks: data, conditions, evaluators, recipes."""

    name: str
    summary: str
    spec_type: type[TaskSpec]

    @abstractmethod
    def dataset(self, spec: RunSpec, split: str) -> ImageDataset:
        """The samples of 'train' or 'val', images with raw conditions."""

    @abstractmethod
    def condition(self, spec: RunSpec, dataset: ImageDataset | None) -> ConditionSpec:
        """How conditions become tokens; the module it builds is trained with the generator and saved with it.

        dataset   the training split; None for estimates before there is data
        """

    def condition_types(self) -> Sequence[type[ConditionSpec]]:
        """Kinds of condition that are not in the core, for loading saved generators. Default: none."""
        return ()

    def cond_encoder(self, spec: RunSpec, encode: EncodeImages, device: torch.device) -> Callable[[Cond], Cond]:
        """Frozen map from raw conditions to what the generator takes, such as a text encoder. Default: identity.

        encode   for conditions that are images: (8-bit images (B, 3, Hpx, Wpx), their indices in the split (B,)) ->
                 normalised latents (B, C, H, W), from the latent cache where the run keeps one

        The map may have a `fingerprint` (text) of what it loads; a run that continues with another one is refused.
        """
        return lambda raw: raw

    @abstractmethod
    def eval_cond(self, spec: RunSpec, dataset: ImageDataset, indices: Sequence[int]) -> Cond:
        """Raw conditions of the evaluation samples with these global indices (the label policy of the protocol)."""

    def sample_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Options of `raev2 sample` that choose conditions: name -> arguments of `add_argument`. Default: none."""
        return {}

    @abstractmethod
    def sample_cond(
        self, spec: RunSpec, dataset: ImageDataset, options: Mapping[str, object]
    ) -> tuple[Cond, list[str]]:
        """Raw conditions and captions for `raev2 sample`: 'n', and by name what was given of `sample_options`."""

    @abstractmethod
    def evaluators(self, spec: RunSpec) -> list[Evaluator]:
        """The protocols of this task."""

    @abstractmethod
    def recipes(self) -> dict[str, Callable[[], RunSpec]]:
        """Named runs. 'quickstart' runs on a 2-core CPU in minutes."""

    def needs(self, spec: RunSpec) -> Sequence[Asset]:
        """Weights that its conditions need and no package brings, for `raev2 train --dry-run`. Default: none."""
        return ()

    def benchmarks(self) -> dict[str, Callable[[], list[Measurement]]]:
        """Benchmarks for `raev2 bench`; one named like the task is listed under that name alone. Default: none."""
        return {}

    def commands(self) -> dict[str, Callable[[Sequence[str]], None]]:
        """Extra commands, reached as `raev2 <task name> <command> ...`. Default: none."""
        return {}


installed_tasks = partial(installed, TASKS)
"""Entry points of tasks by name, not loaded."""

installed_data_recipes = partial(installed, DATA_RECIPES)
"""Entry points of data recipes by name, not loaded."""


def get_task(name: str) -> Task:
    """Load a task by name."""
    task = load(TASKS, name, "--task")
    if not isinstance(task, Task):
        raise TaskError(f"task {name}", "its entry point is not a Task", got=type(task).__name__)
    return task


def usable_tasks() -> list[Task]:
    """All installed tasks by name; one that cannot be loaded is left out with a warning."""
    tasks = []
    for name in sorted(installed_tasks()):
        try:
            tasks.append(get_task(name))
        except RaeError as error:
            logger.warning("left out: %s", error)
    return tasks


def get_command(name: str) -> Command:
    """Load a command that a package adds."""
    command = load(COMMANDS, name, "raev2")
    if not isinstance(command, Command):
        raise TaskError(f"command {name}", "its entry point is not a Command", got=type(command).__name__)
    return command


def run_command(name: str, *argv: str) -> None:
    """Run a command that a package adds with these arguments."""
    command, parser = get_command(name), ArgumentParser()
    command.options(parser)
    command.run(parser.parse_args(argv))


def get_data_recipe(name: str) -> Any:
    """Load a data recipe by name; its contract is `DatasetRecipe` in data_recipes/raev2_data_recipes/base.py."""
    return load(DATA_RECIPES, name, "data recipe")


def check_known(where: str, what: str, name: str, known: Mapping[str, Any]) -> None:
    """Raise `SpecError` with the known names, and the closest of them, unless `name` is one."""
    if name not in known:
        expected = f"one of {', '.join(known)}"
        raise SpecError(where, what, got=repr(name), expected=expected, hint=did_you_mean(name, known))


def get_recipe(task: Task, name: str) -> RunSpec:
    """The run spec of a recipe of a task."""
    recipes = task.recipes()
    check_known("--recipe", f"unknown recipe of task {task.name}", name, recipes)
    try:
        return recipes[name]()
    except (RaeError, ValueError) as error:
        raise TaskError(f"task {task.name}", f"its recipe {name} is not valid", got=str(error)) from error


def get_evaluators(task: Task, spec: RunSpec, protocols: Sequence[str]) -> list[Evaluator]:
    """Evaluators of a task by protocol name, in the order asked for."""
    known = {evaluator.protocol: evaluator for evaluator in task.evaluators(spec)}
    for protocol in protocols:
        check_known("--protocol", f"unknown protocol of task {task.name}", protocol, known)
    return [known[protocol] for protocol in protocols]
