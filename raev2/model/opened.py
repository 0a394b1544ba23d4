"""A trained model opened for use, wherever it lies: a run folder, a pipeline, or a generator and its tokenizer.

trained = open_trained("runs/TASK/NAME")               # or the folder or hub id of a pipeline
images = image_sampler(trained, trained.run.spec.sampling, seed=0)(raw_cond, range(8))
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from raev2.batch import Cond
from raev2.data import ImageDataset, NamesOnly, to_uint8
from raev2.errors import CheckpointError, DataError, SpecError
from raev2.eval.pictures import cache_dir
from raev2.files.artefact import PIPELINE, check_version, load_strict, local_folder, read_artefact
from raev2.files.damage import damaged, read_json
from raev2.files.hashes import folder_sha256
from raev2.guidance import build_guidance
from raev2.model.generator import Generator
from raev2.sampler import sample
from raev2.spec import FlowSpec, NetworkSpec, RunSpec, SamplingSpec
from raev2.spec_io import apply_overrides, load_spec, spec_from_dict
from raev2.task import EvalContext, Task, get_recipe, get_task, usable_tasks
from raev2.tokenizer.base import Tokenizer
from raev2.tokenizer.baselines import load_tokenizer, tokenizer_spec
from raev2.training.checkpoint import averaged_weights, latest_checkpoint
from raev2.training.dist import usable_device
from raev2.training.parallel import compiled
from raev2.training.preflight import GENERATOR, TOKENIZER
from raev2.training.run import Run, make_accelerator, memory_field, newest_run

logger = logging.getLogger(__name__)
STAGES = TOKENIZER, GENERATOR


# Where a model lies


@dataclass(frozen=True)
class Source:
    """What a model is opened from.

    parts     where tokenizer and generator are; a run may have no generator yet
    dir       where results go
    classes   names by label, where they come with the model; None: the data has them
    licence   identifier that the hub knows, if the author of a pipeline chose one
    sha256    of the parts, where they are known
    ema       decay of the averaged weights that are wanted; None: the first of the run, which an artefact has
    """

    spec: RunSpec
    parts: Mapping[str, str | Path]
    dir: Path
    classes: Sequence[str] | None = None
    licence: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    ema: float | None = None

    @classmethod
    def of(cls, run: str | Path, path: Path | None = None) -> Source:
        """A run folder, or a pipeline: its folder or hub id.

        path   where a pipeline was downloaded to; None: where `local_folder` finds it
        """
        path = path or (local_folder(run) if str(run).count("/") == 1 else Path(run))  # OWNER/NAME may be of the hub
        if (path / PIPELINE).is_file():
            return _pipeline(path, path if Path(run).exists() else _results_of(run))
        if not (path / "spec.yaml").is_file():
            expected = f"a run folder with spec.yaml, or a pipeline with {PIPELINE}"
            raise CheckpointError(str(run), "neither a run folder nor a pipeline", expected=expected)
        spec = load_spec(path / "spec.yaml")
        parts = {part: path / part for part in STAGES if (path / part / "config.json").is_file()}
        tokenizer = spec.tokenizer_from or parts.get(TOKENIZER)
        if tokenizer is None:
            hint = "Continue the run with the same `raev2 train` command."
            raise CheckpointError(str(path), "its tokenizer is not trained yet", hint=hint)
        return cls(spec, {**parts, TOKENIZER: tokenizer}, path)

    def check(self) -> None:
        """Raise CheckpointError for parts that are missing, or not those that a pipeline was saved with."""
        for part, sha256 in self.sha256.items():
            folder = Path(self.parts[part])
            got = folder_sha256(folder) if folder.is_dir() else "no such folder"
            if got != sha256:
                what, hint = (
                    "not the part that the pipeline was saved with",
                    "Copy or download the whole pipeline again.",
                )
                raise CheckpointError(str(folder), what, got=got[:14], expected=sha256[:14], hint=hint)


def find_source(
    run: str | Path | None = None, task: str | None = None, *, generator: str | None = None,
    tokenizer: str | None = None, recipe: str | None = None, settings: Sequence[str] = (), data: str | None = None,
    ema: float | None = None,
) -> Source:  # fmt: skip
    """What a command was pointed at: `run`, the newest run of `task`, or two artefacts with the settings of a recipe.

    data   dataset folder in place of that of the spec
    ema    see `Source`
    """
    if generator or tokenizer:
        if run or not (generator and tokenizer and task and recipe):
            what = "a pair of artefacts lacks something, or has --run beside it"
            expected = "--generator G --tokenizer T --task TASK --recipe R, whose settings are used"
            raise SpecError("--generator", what, expected=expected)
        source = _pair(generator, tokenizer, apply_overrides(get_recipe(get_task(task), recipe), settings))
    elif recipe or settings:
        raise SpecError("--recipe" if recipe else "--set", "has no effect without --generator and --tokenizer")
    elif run is None and task is None:
        raise SpecError("--run", "which run?", expected="--run DIR, or --task T for its newest run")
    else:
        source = Source.of(newest_run(get_task(str(task)).name) if run is None else run)
    source = replace(source, ema=ema)
    if data is None:
        return source
    return replace(source, spec=source.spec.replace(data=source.spec.data.replace(dir=data, recipe=None, options={})))


def _pipeline(path: Path, results: Path) -> Source:
    config = read_json(path / PIPELINE)
    check_version(path / PIPELINE, config)
    with damaged(path / PIPELINE):
        sha256 = {part: config["parts"][part] for part in STAGES}
        spec, classes = spec_from_dict(config["spec"]), tuple(config["classes"])
        return Source(spec, {part: path / part for part in STAGES}, results, classes, config["licence"], sha256)


def _pair(generator: str, tokenizer: str, spec: RunSpec) -> Source:
    """Two artefacts with the settings of a spec, whose own networks give way. (Alignment is of training alone.)"""
    (one, _), (other, path) = read_artefact(tokenizer, kind=TOKENIZER), read_artefact(generator, kind=GENERATOR)
    with damaged(path / "config.json"):
        network = TypeAdapter(NetworkSpec).validate_python(other["network"])
        spec = spec.replace(
            tokenizer=tokenizer_spec(one), tokenizer_from=None, flow=FlowSpec.model_validate(other["flow"]),
            generator=network.replace(repa_depth=None, repa_dim=None),
            generator_training=spec.generator_training.replace(repa=None),
        )  # fmt: skip
    return Source(spec, {TOKENIZER: tokenizer, GENERATOR: generator}, _results_of(generator))


def _results_of(name: str | Path) -> Path:
    return Path("results") / "--".join(Path(name).parts[-2:])


# A trained run


@dataclass(frozen=True)
class TrainedRun:
    """A model opened for use. `generator` None: only the tokenizer is trained; `classes`: see `Source`."""

    run: Run
    task: Task
    rae: Tokenizer
    generator: Generator | None
    classes: Sequence[str] | None = None

    def dataset(self, split: str) -> ImageDataset:
        """A split of the data; DataError where its classes are not those of the model."""
        dataset, known = self.task.dataset(self.run.spec, split), [*(self.classes or ())]
        if known and not known[0].isdigit() and dataset.classes != known:  # numbers stand for names nobody knew
            got, expected = (f"{len(names)}: {', '.join(names[:3])}, ..." for names in (dataset.classes, known))
            raise DataError(f"data {dataset.dir}", "not the classes of the model", got=got, expected=expected)
        return dataset

    def names(self) -> ImageDataset:
        """The training split, for its class names; or these alone, where the model brings them. Else numbers."""
        data, classes = self.run.spec.data, self.classes
        if classes is None and (Path(data.dir) / "manifest.json").is_file():
            return self.dataset("train")
        num = getattr(self.need_generator().condition_spec, "num_classes", 0)
        return NamesOnly(data.dir, "train", [*map(str, range(num))] if classes is None else classes)

    def need_generator(self) -> Generator:
        """The generator. Raises CheckpointError where only the tokenizer is trained."""
        if self.generator is None:
            raise CheckpointError(
                str(self.run.dir), "has no trained generator yet",
                hint=f"Run `raev2 train --task {self.run.spec.task.name}` with this --run.",
            )  # fmt: skip
        return self.generator

    def context(self, sampling: SamplingSpec | None = None, seed: int | None = None) -> EvalContext:
        """The run for evaluators and tasks, with its own sampling settings and `evaluation.seed`, or with these."""
        run, task, generator, spec = self.run, self.task, self.generator, self.run.spec
        sampling = sampling or spec.sampling
        evaluation = spec.evaluation if seed is None else spec.evaluation.replace(seed=seed)
        weak, weak_from = None, getattr(sampling.guidance, "weak", None)
        if generator is not None:
            weak = None if weak_from is None else load_generator(weak_from).to(run.device)
            build_guidance(sampling.guidance, generator, weak)  # an unusable setting is reported before any work
            if sampling.compile:
                generator, weak = compiled(generator), weak and compiled(weak)
        spec = spec.replace(sampling=sampling, evaluation=evaluation)
        context = EvalContext(spec, self.rae, self.dataset, run.device, cache_dir(), generator=generator, weak=weak)
        return context if generator is None else replace(context, generate=_image_sampler(task, context))


def open_trained(source: Source | str | Path, device: str | None = None) -> TrainedRun:
    """Load tokenizer and generator; a run that is still training gives its newest averaged weights."""
    source = source if isinstance(source, Source) else Source.of(source)
    source.check()
    spec = source.spec
    chosen = usable_device("device", device) if device else None
    run = Run(source.dir, spec, make_accelerator(spec.precision), other_device=chosen)
    task = get_task(spec.task.name)
    rae = load_tokenizer(source.parts[TOKENIZER]).to(run.device)
    generator = None
    if GENERATOR in source.parts:
        generator = load_generator(source.parts[GENERATOR]).to(run.device)
        _check_pair(rae, generator, str(source.parts[GENERATOR]))
    elif (checkpoint := latest_checkpoint(source.dir / "checkpoints" / GENERATOR)) is not None:
        condition = task.condition(spec, task.dataset(spec, "train"))
        generator = Generator(spec.generator, condition, spec.flow, rae.latent_shape).to(run.device)
        averages = checkpoint.tensors[f"ema-{spec.generator_training.ema_decays[0]}"]
        generator.load_state_dict({**checkpoint.tensors["model"], **averages})
        generator.extra = {"images_seen": checkpoint.state["images"], TOKENIZER: rae.identity()}
        generator.eval()
        logger.info("using averaged weights of %s", checkpoint.path)
    trained = TrainedRun(run, task, rae, generator, source.classes)
    if source.ema is not None:
        use_average(trained, source.ema)
    return trained


def use_average(trained: TrainedRun, decay: float) -> None:
    """Give the generator the averages of this decay, from the checkpoints of its run."""
    generator, loop = trained.need_generator(), trained.run.spec.generator_training
    averages = averaged_weights(trained.run.dir / "checkpoints" / GENERATOR, decay, loop.batch_size)
    load_strict(generator, {**generator.state_dict(), **averages}, f"ema-{decay}")
    generator.extra = {**generator.extra, "ema_decay": decay}


def _check_pair(rae: Tokenizer, generator: Generator, where: str) -> None:
    shape, known = generator.latent_shape, generator.extra.get(TOKENIZER)
    for got, expected in ((rae.latent_shape, shape), (known and rae.identity(), known)):
        if got != expected:
            what, hint = "trained with another tokenizer, which gives other latents", "Use the tokenizer of its run."
            raise CheckpointError(where, what, got=got, expected=str(expected), hint=hint)


def tokenizer_in(source: str) -> Tokenizer:
    """The tokenizer of a run folder, a pipeline, an artefact folder or a hub repository."""
    is_run = (Path(source) / "spec.yaml").is_file()
    return load_tokenizer(Source.of(source).parts[TOKENIZER] if is_run else source)


def load_generator(path: str | Path) -> Generator:
    """A generator artefact; kinds of condition from task plugins are known."""
    types = [type_ for task in usable_tasks() for type_ in task.condition_types()]
    return Generator.from_pretrained(path, types)


def image_sampler(trained: TrainedRun, sampling: SamplingSpec, seed: int) -> Callable[[Cond, Sequence[int]], Tensor]:
    """(raw conditions, global indices) -> 8-bit images: the one way to sample, in training and after it."""
    trained.need_generator()
    generate = trained.context(sampling, seed).generate
    assert generate is not None
    return generate


def _image_sampler(task: Task, context: EvalContext) -> Callable[[Cond, Sequence[int]], Tensor]:
    spec, sampling, generator = context.spec, context.spec.sampling, context.generator
    assert generator is not None
    encode_cond = task.cond_encoder(spec, context.encode, context.device)

    def generate(raw: Cond, indices: Sequence[int]) -> Tensor:
        cond = encode_cond({name: value.to(context.device) for name, value in raw.items()})
        with context.autocast(), memory_field("sampling.batch_size", sampling.batch_size):
            images = sample(
                generator, context.rae, cond, sampling.steps, sampling.guidance, spec.evaluation.seed, indices,
                solver=sampling.solver, batch_size=sampling.batch_size, weak=context.weak,
            )  # fmt: skip
        return to_uint8(images)

    return generate
