"""Whole capabilities: train, sample, evaluate. What the commands do, as functions.

run_dir = train(spec, "runs/TASK/NAME")
sample_run(run_dir, {"n": 16}, out=Path("samples"))
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raev2.batch import MetricResult
from raev2.data import ImageDataset
from raev2.errors import CheckpointError, RaeError
from raev2.eval.features import NotFinite
from raev2.eval.generate import PROGRESS_SECONDS
from raev2.eval.protocols import run_protocol
from raev2.files.artefact import write_json
from raev2.files.card import card_text
from raev2.files.damage import read_json
from raev2.files.grid import save_grid
from raev2.files.hashes import folder_sha256
from raev2.files.manifest import read_manifest
from raev2.files.picture_array import PictureArrayWriter
from raev2.files.replace import SAMPLES, new_folder, write_text
from raev2.model.generator import Generator
from raev2.model.opened import Source, TrainedRun, image_sampler, load_generator, open_trained, use_average
from raev2.spec import Guidance, NoGuidance, RunSpec, SamplingSpec, TokenizerSpec
from raev2.spec_io import spec_from_dict
from raev2.task import EvalContext, Evaluator, Task, get_data_recipe, get_evaluators, get_task, run_command
from raev2.tokenizer.base import Tokenizer
from raev2.tokenizer.baselines import build_tokenizer, load_tokenizer
from raev2.tokenizer.encoders import hash_weights
from raev2.train_generator import train_generator
from raev2.train_tokenizer import train_tokenizer
from raev2.training import dist
from raev2.training.lock import BusyError, folder_lock
from raev2.training.preflight import GENERATOR, TOKENIZER, Plan, make_ready, with_tokenizer
from raev2.training.resume import Origin, check_identity, local_identity
from raev2.training.run import Run, add_provenance, make_accelerator, open_run

logger = logging.getLogger(__name__)
EVAL = "eval"  # folder of a run
OTHER_AVERAGE = "-ema-"  # in names of results of another average than the run's first
NUM_GRID_IMAGES = 32
NUM_SHOWN = 64  # pictures in the grid of `raev2 sample`
WAIT_S = 15.0


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
    with folder_lock(Path(run_dir)), closing(open_run(run_dir, spec, resume=bool(resume), overwrite=overwrite)) as run:
        return _train(run, task, stage, origin)


def _train(run: Run, task: Task, stage: str, origin: Origin | None) -> Path:
    spec = run.spec
    protocols = get_evaluators(task, spec, spec.evaluation.protocols)
    if origin:
        origin.copy_into(run)
    train_set, val_set = task.dataset(spec, "train"), task.dataset(spec, "val")
    run.commits = dist.from_main(Plan(task, spec, run.dir, stage).commits())
    check_identity(run, {"data": train_set.fingerprint, **local_identity(spec), **run.commits})
    add_provenance(run, "commits", run.commits)
    add_provenance(run, "data", {name: value for name, value in train_set.manifest.items() if name != "classes"})

    # Stage 1.
    tokenizer_dir = spec.tokenizer_from or run.dir / TOKENIZER
    rae: Tokenizer
    latents = None
    if spec.tokenizer_from or (run.dir / TOKENIZER / "config.json").is_file():
        rae = load_tokenizer(tokenizer_dir).to(run.device)
    elif not isinstance(spec.tokenizer, TokenizerSpec):
        rae = build_tokenizer(spec.tokenizer).to(run.device)
        with dist.together():
            if dist.is_main():
                rae.save_pretrained(run.dir / TOKENIZER)
    else:
        logger.info("no tokenizer in %s yet: training it first", run.dir / TOKENIZER)
        rae, latents = train_tokenizer(run, train_set, val_set)
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

            generator = train_generator(run, task, rae, train_set, look, evaluate_now, latents)
        final = [evaluator.protocol for evaluator in protocols if evaluator.needs_generator]
        trained, images = TrainedRun(run, task, rae, generator), spec.generator_training.final_images
        _evaluate(trained, final, images)
        for guidance in spec.evaluation.compare_guidance:
            sampling, name = spec.sampling.replace(guidance=guidance), guidance_name(guidance)
            _save_samples(trained, train_set, sampling, run.dir / "samples" / f"guidance-{name}.png")
            _evaluate(trained, final, images, sampling, suffix=f"-{name}")
    if dist.is_main():
        _write_cards(run)
        run_command("report", str(run.dir))
    return run.dir


def _write_cards(run: Run) -> None:
    """The cards of what was trained, with its numbers."""
    files = sorted((run.dir / EVAL).glob("*.json"))
    results = [read_json(file) for file in files if OTHER_AVERAGE not in file.name]
    for part in (TOKENIZER, GENERATOR):
        if (run.dir / part / "config.json").is_file():
            own = [result for result in results if result["needs_generator"] == (part == GENERATOR)]
            write_text(run.dir / part / "README.md", card_text(read_json(run.dir / part / "config.json"), own))


def prepare_data(spec: RunSpec) -> None:
    """Build the dataset folder of a spec if it is missing and the spec names a data recipe; or wait for who does."""
    folder = Path(spec.data.dir)
    manifest = folder / "manifest.json"
    with dist.together():
        if not manifest.is_file() and spec.data.recipe and dist.is_main():
            recipe = get_data_recipe(spec.data.recipe)
            logger.info("building %s with the data recipe %s", folder, recipe.name)
            for line in recipe.plan(recipe.resolve(spec.data.options)):
                logger.info("%s", line)
            while not manifest.is_file():
                try:
                    recipe.build(folder, spec.data.options)
                except RaeError as error:
                    if not isinstance(error, BusyError) and not manifest.is_file():
                        raise
                    logger.info("waiting: %s", error)
                    time.sleep(WAIT_S)
    read_manifest(folder)


# Sample


class Samples:
    """Pictures that were asked for; each chunk is drawn when it is reached.

    size         height and width in pixels
    chunk_size   pictures a chunk
    plan         what the pictures depend on
    """

    def __init__(
        self, trained: TrainedRun, options: Mapping[str, object], sampling: SamplingSpec | None, seed: int
    ) -> None:
        generator, spec = trained.need_generator(), trained.run.spec
        sampling = sampling or spec.sampling
        self.cond, self.captions = trained.task.sample_cond(spec, trained.names(), options)
        context = trained.context(sampling, seed)
        assert context.generate is not None
        self.generate = context.generate
        self.size, self.chunk_size = trained.rae.spec.image_size, sampling.batch_size
        self.plan = {
            "run": str(trained.run.dir), "seed": seed, "captions": self.captions,
            "sampling": sampling.model_dump(mode="json"),
            "time_shift": generator.time_shift, "precision": spec.precision, "size": list(self.size),
            "weights": weights_of(context),
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
    source: Source | Path,
    options: Mapping[str, object],
    sampling: SamplingSpec | None = None,
    seed: int = 0,
    *,
    out: Path,
) -> Path:
    """Images for the conditions in `options` (see Task.sample_cond): single PNGs, a grid, and the plan as JSON."""
    samples = Samples(open_trained(source), options, sampling, seed)
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
    source: Source | Path,
    options: Mapping[str, object],
    sampling: SamplingSpec | None = None,
    seed: int = 0,
    *,
    file: Path,
) -> Path:
    """The same images as one array in an .npz file, with the plan; what a killed process had drawn is kept."""
    samples = Samples(open_trained(source), options, sampling, seed)
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


# Evaluate


def evaluate_run(source: Source | Path, protocols: Sequence[str] = ()) -> dict[str, list[MetricResult]]:
    """Evaluate a model by protocol name (default: those of its spec); writes `eval/<protocol>.json`."""
    source = source if isinstance(source, Source) else Source.of(source)
    trained, suffix = open_trained(source), "" if source.ema is None else f"{OTHER_AVERAGE}{source.ema}"
    trained.run.dir.mkdir(parents=True, exist_ok=True)
    spec, generator = trained.run.spec, trained.generator
    images = generator.extra.get("images_seen", 0) if generator else 0
    return _evaluate(trained, list(protocols) or list(spec.evaluation.protocols), images, suffix=suffix)


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
    weights = weights_of(opened)
    for evaluator in get_evaluators(trained.task, spec, protocols):
        context, name = _context_for(evaluator, opened), evaluator.protocol
        evaluator.protocol += suffix
        stage, seen, decay = GENERATOR, images, _decay(trained)
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
        results[name] = found
    return results


def _decay(trained: TrainedRun) -> float:
    """Of the averaged weights of the generator, so far as it is known."""
    known = {} if trained.generator is None else trained.generator.extra
    return float(known.get("ema_decay", trained.run.spec.generator_training.ema_decays[0]))


def _context_for(evaluator: Evaluator, context: EvalContext) -> EvalContext:
    """The opened run as a protocol sees it; one of the tokenizer sees no generator."""
    return context if evaluator.needs_generator else replace(context, generate=None, generator=None, weak=None)


def weights_of(model: EvalContext | TrainedRun) -> dict[str, str]:
    """Hashes of the networks, which tie numbers to them."""
    networks = {TOKENIZER: model.rae, GENERATOR: model.generator}
    return {name: hash_weights(network) for name, network in networks.items() if network is not None}


def rerun(file: Path) -> list[MetricResult]:
    """The numbers of a result file once more, as the file says and whatever the spec of its run says by now.

    Raises CheckpointError where weights or data are no longer those of the file.
    """
    said = json.loads(file.read_text(encoding="utf-8"))
    home = Path(said["run"])
    trained = open_trained(home if home.is_dir() else file.absolute().parent.parent)
    trained = replace(trained, run=replace(trained.run, spec=spec_from_dict(said["spec"])))
    (evaluator,) = get_evaluators(trained.task, trained.run.spec, [said["evaluator"]])
    if evaluator.needs_generator and said["ema_decay"] != _decay(trained):
        use_average(trained, said["ema_decay"])
    context = _context_for(evaluator, trained.context())
    now = {"weights": weights_of(context), **json.loads(json.dumps(evaluator.describe(context)))}
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
