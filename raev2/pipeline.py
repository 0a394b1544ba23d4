"""Whole capabilities: train, sample, reconstruct, evaluate. What the commands do, as functions.

run_dir = train(spec, "runs/TASK/NAME")
sample_run(run_dir, {"n": 16}, out=Path("samples"))
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raev2.batch import Cond, MetricResult
from raev2.data import ImageDataset, to_uint8
from raev2.errors import CheckpointError, SpecError
from raev2.eval.features import NotFinite
from raev2.eval.generate import PROGRESS_SECONDS
from raev2.eval.pictures import cache_dir
from raev2.eval.protocols import run_protocol
from raev2.eval.reconstruct import Reconstruction, reconstruct_pictures
from raev2.files.artefact import write_json
from raev2.files.grid import save_grid
from raev2.files.hashes import folder_sha256
from raev2.files.manifest import read_manifest
from raev2.files.picture_array import PictureArrayWriter
from raev2.files.replace import SAMPLES, new_folder
from raev2.guidance import build_guidance
from raev2.model.generator import Generator
from raev2.sampler import sample
from raev2.spec import Guidance, NoGuidance, RunSpec, SamplingSpec, TokenizerSpec
from raev2.spec_io import load_spec, spec_from_dict
from raev2.task import EvalContext, Evaluator, Task, get_data_recipe, get_evaluators, get_task, usable_tasks
from raev2.tokenizer.base import Tokenizer
from raev2.tokenizer.baselines import build_tokenizer, load_tokenizer
from raev2.tokenizer.encoders import hash_weights
from raev2.train_generator import train_generator
from raev2.train_tokenizer import train_tokenizer
from raev2.training import dist
from raev2.training.checkpoint import latest_checkpoint
from raev2.training.lock import run_lock
from raev2.training.preflight import GENERATOR, TOKENIZER, Plan, make_ready, with_tokenizer
from raev2.training.resume import Origin, check_identity, local_identity
from raev2.training.run import Run, add_provenance, make_accelerator, memory_field, newest_run, open_run

logger = logging.getLogger(__name__)
EVAL = "eval"  # folder of a run
NUM_GRID_IMAGES = 32
NUM_SHOWN = 64  # pictures in the grid of `raev2 sample`


# ---------------------------------------------------------------------------------------------------------------------
# Train


def train(
    spec: RunSpec, run_dir: str | Path, *, stage: str = GENERATOR, resume: bool | Path = True, overwrite: bool = False
) -> Path:
    """Train up to `stage`, evaluate and write the report; returns the run folder.

    Parts that are there already are used: the dataset folder, the tokenizer artefact, checkpoints of a stopped run.

    resume   whether an existing run folder is continued; a path: begin a new run with this checkpoint of another one
    """
    origin = Origin.open(resume) if isinstance(resume, Path) else None
    spec = origin.fitted(spec, Path(run_dir)) if origin else spec
    task = get_task(spec.task.name)
    make_accelerator(spec.precision)  # from here on the processes know each other
    dist.on_main(lambda: make_ready(Plan(task, spec, Path(run_dir), stage)))
    prepare_data(spec)
    spec = with_tokenizer(spec)
    with run_lock(Path(run_dir)), closing(open_run(run_dir, spec, resume=bool(resume), overwrite=overwrite)) as run:
        return _train(run, task, stage, origin)


def _train(run: Run, task: Task, stage: str, origin: Origin | None) -> Path:
    spec = run.spec
    protocols = get_evaluators(task, spec, spec.evaluation.protocols)
    if origin:
        origin.copy_into(run)
    train_set, val_set = task.dataset(spec, "train"), task.dataset(spec, "val")
    check_identity(run, {"data": train_set.fingerprint, **local_identity(spec)})
    add_provenance(run, "data", {name: value for name, value in train_set.manifest.items() if name != "classes"})

    # Stage 1.
    tokenizer_dir = spec.tokenizer_from or run.dir / TOKENIZER
    rae: Tokenizer
    if spec.tokenizer_from or (run.dir / TOKENIZER / "config.json").is_file():
        rae = load_tokenizer(tokenizer_dir).to(run.device)
    elif not isinstance(spec.tokenizer, TokenizerSpec):
        rae = build_tokenizer(spec.tokenizer).to(run.device)
        if dist.is_main():
            rae.save_pretrained(run.dir / TOKENIZER)
        dist.barrier()
    else:
        logger.info("no tokenizer in %s yet: training it first", run.dir / TOKENIZER)
        rae = train_tokenizer(run, train_set, val_set)
    if spec.tokenizer_from is None:
        check_identity(run, {TOKENIZER: folder_sha256(run.dir / TOKENIZER)})
    for evaluator in protocols:
        done = dist.from_main(len(run.history(stage=TOKENIZER, kind="eval", protocol=evaluator.protocol)))
        if not evaluator.needs_generator and not done:  # the log is written last
            _evaluate(TrainedRun(run, task, rae, None), [evaluator.protocol])

    # Stage 2.
    if stage == GENERATOR:
        if (run.dir / GENERATOR / "config.json").is_file():
            logger.info("%s is trained; delete it or choose another --run to train again", run.dir / GENERATOR)
            generator = load_generator(run.dir / GENERATOR).to(run.device)
        else:
            unguided = spec.sampling.replace(guidance=NoGuidance())

            def evaluate_now(generator: Generator, images: int) -> None:
                now = TrainedRun(run, task, rae, generator)
                try:
                    _evaluate(now, spec.evaluation.in_training, images, unguided, suffix="-none")
                except NotFinite as error:
                    logger.error("no evaluation after %s images, the training goes on: %s", f"{images:,}", error)

            def look(generator: Generator, images: int) -> None:
                file = run.dir / "samples" / f"{GENERATOR}-{images:09d}.png"
                _save_samples(TrainedRun(run, task, rae, generator), train_set, spec.sampling, file)

            generator = train_generator(run, task, rae, train_set, look, evaluate_now)
        final = [evaluator.protocol for evaluator in protocols if evaluator.needs_generator]
        trained, images = TrainedRun(run, task, rae, generator), spec.generator_training.final_images
        _evaluate(trained, final, images)
        for guidance in spec.evaluation.compare_guidance:
            sampling, name = spec.sampling.replace(guidance=guidance), guidance_name(guidance)
            _save_samples(trained, train_set, sampling, run.dir / "samples" / f"guidance-{name}.png")
            _evaluate(trained, final, images, sampling, suffix=f"-{name}")
    if dist.is_main():
        from raev2.report.page import write_report  # plots: heavy to import

        logger.info("report: %s", write_report(run.dir))
    return run.dir


def prepare_data(spec: RunSpec) -> None:
    """Build the dataset folder of a spec if it is missing and the spec names a data recipe."""
    folder = Path(spec.data.dir)
    if not (folder / "manifest.json").is_file() and spec.data.recipe and dist.is_main():
        recipe = get_data_recipe(spec.data.recipe)
        logger.info("building %s with the data recipe %s", folder, recipe.name)
        for line in recipe.plan(recipe.resolve(spec.data.options)):
            logger.info("%s", line)
        recipe.build(folder, spec.data.options)
    dist.barrier()
    read_manifest(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A trained run


@dataclass(frozen=True)
class TrainedRun:
    """A run folder opened for use. `generator` None: only the tokenizer is trained."""

    run: Run
    task: Task
    rae: Tokenizer
    generator: Generator | None

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
        spec = spec.replace(sampling=sampling, evaluation=evaluation)
        context = EvalContext(
            spec, self.rae, lambda split: task.dataset(spec, split), run.device, cache_dir(),
            generator=generator, weak=weak,
        )  # fmt: skip
        return context if generator is None else replace(context, generate=_image_sampler(task, context))


def open_trained(run_dir: str | Path) -> TrainedRun:
    """Load tokenizer and generator of a run folder; a run that is still training gives its newest averaged weights."""
    run_dir = Path(run_dir)
    spec = load_spec(run_dir / "spec.yaml")
    run = Run(run_dir, spec, make_accelerator(spec.precision))
    task = get_task(spec.task.name)
    rae = load_tokenizer(tokenizer_of(run_dir, spec)).to(run.device)
    generator = None
    if (run_dir / GENERATOR / "config.json").is_file():
        generator = load_generator(run_dir / GENERATOR).to(run.device)
    else:
        checkpoint = latest_checkpoint(run_dir / "checkpoints" / GENERATOR)
        if checkpoint is not None:
            condition = task.condition(spec, task.dataset(spec, "train"))
            generator = Generator(spec.generator, condition, spec.flow, rae.latent_shape).to(run.device)
            averages = checkpoint.tensors[f"ema-{spec.generator_training.ema_decays[0]}"]
            generator.load_state_dict({**checkpoint.tensors["model"], **averages})
            generator.eval()
            logger.info("using averaged weights of %s", checkpoint.path)
    return TrainedRun(run, task, rae, generator)


def load_generator(path: str | Path) -> Generator:
    """A generator artefact; kinds of condition from task plugins are known."""
    types = [type_ for task in usable_tasks() for type_ in task.condition_types()]
    return Generator.from_pretrained(path, types)


def find_run(run_dir: str | None, task_name: str | None) -> Path:
    """The run folder that a command means: the one given, or the newest of a task."""
    if run_dir is not None:
        if not (Path(run_dir) / "spec.yaml").is_file():
            raise CheckpointError(run_dir, "not a run folder, spec.yaml is missing", expected="runs/TASK/NAME")
        return Path(run_dir)
    if task_name is None:
        raise SpecError("--run", "which run?", expected="--run DIR, or --task T for its newest run")
    get_task(task_name)
    return newest_run(task_name)


# ---------------------------------------------------------------------------------------------------------------------
# Sample


class Samples:
    """Pictures that were asked for; each chunk is drawn when it is reached.

    size         height and width in pixels
    chunk_size   pictures a chunk
    plan         what the pictures depend on
    """

    def __init__(self, run_dir: Path, options: Mapping[str, object], sampling: SamplingSpec | None, seed: int) -> None:
        trained = open_trained(run_dir)
        generator, spec = trained.need_generator(), trained.run.spec
        sampling = sampling or spec.sampling
        self.cond, self.captions = trained.task.sample_cond(spec, trained.task.dataset(spec, "train"), options)
        context = trained.context(sampling, seed)
        assert context.generate is not None
        self.generate = context.generate
        self.size, self.chunk_size = trained.rae.spec.image_size, sampling.batch_size
        self.plan = {
            "run": str(run_dir), "seed": seed, "captions": self.captions, "sampling": sampling.model_dump(mode="json"),
            "time_shift": generator.time_shift, "precision": spec.precision, "size": list(self.size),
            "weights": _weights(context),
        }  # fmt: skip

    def chunks(self, start: int = 0) -> Iterator[NDArray[np.uint8]]:
        """Pictures (B, H, W, 3) from number `start` on, on the main process; every process draws whole chunks."""
        num, size, told = len(self.captions), self.chunk_size, time.monotonic()
        for first in range(start, num, size * dist.world_size()):
            own = range(num)[first + size * dist.rank() :][:size]
            cond = {name: value[own.start : own.stop] for name, value in self.cond.items()}
            drawn = self.generate(cond, own).permute(0, 2, 3, 1).cpu().numpy() if own else np.empty(0, np.uint8)
            gathered = dist.gather_objects(drawn)
            if dist.is_main():
                yield from (chunk for chunk in gathered if len(chunk))
            if dist.is_main() and time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                logger.info("%d of %d pictures", min(first + size * dist.world_size(), num), num)


def sample_run(
    run_dir: Path, options: Mapping[str, object], sampling: SamplingSpec | None = None, seed: int = 0, *, out: Path
) -> Path:
    """Images for the conditions in `options` (see Task.sample_cond): single PNGs, a grid, and the plan as JSON."""
    samples = Samples(run_dir, options, sampling, seed)
    if not dist.is_main():
        list(samples.chunks())
        return out
    shown: list[NDArray[np.uint8]] = []
    with new_folder(out, SAMPLES) as folder:
        for number, pixels in enumerate(picture for chunk in samples.chunks() for picture in chunk):
            Image.fromarray(pixels).save(folder / f"{number:05d}.png")
            if number < NUM_SHOWN:
                shown.append(pixels)
        grid = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
        save_grid(grid, folder / "grid.png", captions=samples.captions[:NUM_SHOWN])
        write_json(folder / "plan.json", samples.plan)
    return out


def sample_array(
    run_dir: Path, options: Mapping[str, object], sampling: SamplingSpec | None = None, seed: int = 0, *, file: Path
) -> Path:
    """The same images as one array in an .npz file, with the plan; what a killed process had drawn is kept."""
    samples = Samples(run_dir, options, sampling, seed)
    if not dist.is_main():
        list(samples.chunks(dist.from_main(0)))
        return file
    with PictureArrayWriter(file, samples.plan, samples.size, samples.chunk_size) as writer:
        for pictures in samples.chunks(dist.from_main(writer.done)):
            writer.append(pictures)
    return file


def _save_samples(trained: TrainedRun, dataset: ImageDataset, sampling: SamplingSpec, file: Path) -> None:
    """Grid with fixed noise and conditions, to compare over training and settings."""
    if dist.is_main():
        spec = trained.run.spec
        raw, captions = trained.task.sample_cond(spec, dataset, {"n": NUM_GRID_IMAGES})
        generate = image_sampler(trained, sampling, spec.seed)
        save_grid(generate(raw, range(len(captions))), file, columns=8, captions=captions)
    dist.barrier()


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


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate


def evaluate_run(run_dir: Path, protocols: Sequence[str] = ()) -> dict[str, list[MetricResult]]:
    """Evaluate a run by protocol name (default: those of its spec); writes `eval/<protocol>.json`."""
    trained = open_trained(run_dir)
    spec = trained.run.spec
    images = spec.generator_training.final_images
    if trained.generator is not None and not (run_dir / GENERATOR).is_dir():
        images = latest_checkpoint(run_dir / "checkpoints" / GENERATOR).state["images"]  # type: ignore[union-attr]
    names = list(protocols) or list(spec.evaluation.protocols)
    return _evaluate(trained, names, images)


def _evaluate(
    trained: TrainedRun,
    protocols: Sequence[str],
    images: int = 0,
    sampling: SamplingSpec | None = None,
    suffix: str = "",
) -> dict[str, list[MetricResult]]:
    """Run protocols on one state of the networks, write their files and log the numbers.

    images     what the generator has seen; protocols of the tokenizer belong to the end of stage 1
    sampling   other settings than those of the run
    suffix     added to the protocol's name, with other settings
    """
    run, spec, results = trained.run, trained.run.spec, {}
    opened = trained.context(sampling)
    weights = _weights(opened)
    for evaluator in get_evaluators(trained.task, spec, protocols):
        context, name = _context_for(evaluator, opened), evaluator.protocol
        evaluator.protocol += suffix
        stage, seen, decay = GENERATOR, images, spec.generator_training.ema_decays[0]
        if not evaluator.needs_generator:
            loop = spec.tokenizer_training
            stage, seen, decay = TOKENIZER, loop.final_images, loop.ema_decay
        origin = {
            "images_seen": seen, "ema_decay": decay,
            "evaluator": name, "run": str(run.dir.resolve()),
            "weights": weights if evaluator.needs_generator else {TOKENIZER: weights[TOKENIZER]},
        }  # fmt: skip
        context = replace(context, picture=run.dir / EVAL / f"{evaluator.protocol}.png")
        found = run_protocol(evaluator, context, run.dir / EVAL, origin)
        run.log(
            stage=stage, kind="eval", images=seen, protocol=evaluator.protocol,
            metrics={result.name: result.value for result in found},
            better={result.name: result.better for result in found},
        )  # fmt: skip
        results[evaluator.protocol] = found
    return results


def _context_for(evaluator: Evaluator, context: EvalContext) -> EvalContext:
    """The opened run as a protocol sees it; one of the tokenizer sees no generator."""
    return context if evaluator.needs_generator else replace(context, generate=None, generator=None, weak=None)


def _weights(context: EvalContext) -> dict[str, str]:
    networks = {TOKENIZER: context.rae, GENERATOR: context.generator}
    return {name: hash_weights(network) for name, network in networks.items() if network is not None}


def rerun(file: Path) -> list[MetricResult]:
    """The numbers of a result file once more, as the file says and whatever the spec of its run says by now.

    Raises CheckpointError where weights or data are no longer those of the file.
    """
    said = json.loads(file.read_text())
    home = Path(said["run"])
    trained = open_trained(home if home.is_dir() else file.absolute().parent.parent)
    trained = replace(trained, run=replace(trained.run, spec=spec_from_dict(said["spec"])))
    (evaluator,) = get_evaluators(trained.task, trained.run.spec, [said["evaluator"]])
    context = _context_for(evaluator, trained.context())
    now = {"weights": _weights(context), **json.loads(json.dumps(evaluator.describe(context)))}
    changed = [name for name, value in now.items() if said.get(name) != value]
    if changed:
        raise CheckpointError(
            str(file), "what it measured is another now", got=", ".join(changed), hint="Evaluate the run again."
        )
    return run_protocol(evaluator, context)


def guidance_name(guidance: Guidance) -> str:
    """Short name of a guidance setting for file names: 'none', 'cfg-2', 'internal-1.5'."""
    scale = getattr(guidance, "scale", None)
    return guidance.kind + ("" if scale is None else f"-{scale:g}")


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruct


def reconstruct_files(source: str, paths: Sequence[Path], out: Path) -> tuple[list[Reconstruction], dict[str, str]]:
    """`reconstruct_pictures` with the tokenizer in `source` (run folder, artefact folder or hub id)."""
    device = make_accelerator("fp32").device
    return reconstruct_pictures(tokenizer_in(source).to(device), device, paths, out)


def tokenizer_in(source: str) -> Tokenizer:
    """The tokenizer of a run folder, an artefact folder or a hub repository."""
    if not (Path(source) / "spec.yaml").is_file():
        return load_tokenizer(source)
    return load_tokenizer(tokenizer_of(Path(source), load_spec(Path(source) / "spec.yaml")))


def tokenizer_of(run_dir: Path, spec: RunSpec) -> str | Path:
    """Where the tokenizer of a run is; CheckpointError while there is none."""
    if spec.tokenizer_from is None and not (run_dir / TOKENIZER / "config.json").is_file():
        raise CheckpointError(
            str(run_dir),
            "its tokenizer is not trained yet",
            hint="Continue the run with the same `raev2 train` command.",
        )
    return spec.tokenizer_from or run_dir / TOKENIZER
