"""What a training will need, before it starts: read `preflight`.

preflight(spec, run_dir)          # findings; nothing is downloaded, built or written
make_ready(spec, run_dir)         # the same at the start of a training: fetch weights, raise the first error
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn

from raev2.errors import DataError, FileError, RaeError, SpecError
from raev2.files.artefact import ENCODER, artefact_config, load_strict
from raev2.files.assets import MISSING, Asset, distinct
from raev2.files.damage import damaged
from raev2.files.manifest import read_manifest
from raev2.flow import prediction
from raev2.guidance import build_guidance
from raev2.model.generator import Generator
from raev2.sizes import GIB, Sizes, activation_bytes, encoder_facts, latent_shape_of, sizes_of, state_bytes
from raev2.spec import LoopSpec, RunSpec, TokenizerSpec, VAESpec
from raev2.task import Task, get_data_recipe, get_evaluators, get_task
from raev2.tokenizer.baselines import tokenizer_spec, vae_asset
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoder_table import ENCODERS, encoder_asset
from raev2.tokenizer.losses import perceptual_asset
from raev2.training import dist

logger = logging.getLogger(__name__)
TOKENIZER, GENERATOR = "tokenizer", "generator"
State = Literal["ok", "guessed", "missing", "too small", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that a training needs.

    error   why the training cannot do without; None: nothing is wrong, or the training repairs it
    asset   weights that the training downloads
    """

    what: str
    state: State
    detail: str
    error: RaeError | None = None
    asset: Asset | None = None


def preflight(spec: RunSpec, run_dir: Path, stage: str = GENERATOR) -> list[Finding]:
    """Look at everything that training up to `stage` needs later, in seconds and on this machine alone."""
    findings: list[Finding] = []
    with _reported(findings, TOKENIZER):
        spec = _with_local_tokenizer(spec)
    task = get_task(spec.task.name)
    for what, check in CHECKS.items():
        with _reported(findings, what):
            findings += check(Plan(spec, task, run_dir, stage))
    return findings


def make_ready(spec: RunSpec, run_dir: Path, stage: str = GENERATOR) -> None:
    """Raise the first error of `preflight`; then fetch the weights that are missing, where that is possible."""
    findings = dist.on_main(lambda: preflight(spec, run_dir, stage))
    for error in (finding.error for finding in findings if finding.error):
        raise error
    for finding in findings:
        if finding.state not in ("ok", "guessed") and dist.is_main():
            logger.info("%s: %s; %s", finding.what, finding.state, finding.detail)
    dist.on_main(lambda: fetch_all([finding.asset for finding in findings if finding.asset]))


def fetch_all(assets: list[Asset]) -> None:
    """Fetch weights; the error of the first that cannot be had, after one line in the log for each of them."""
    errors = []
    for asset in assets:
        try:
            asset.fetch()
        except RaeError as error:
            errors.append(error)
    for error in errors if len(errors) > 1 else []:
        logger.error("%s", error)
    for error in errors:
        raise error


def with_tokenizer(spec: RunSpec) -> RunSpec:
    """The spec with the tokenizer fields of the artefact that `tokenizer_from` names."""
    if spec.tokenizer_from is None:
        return spec
    return spec.replace(tokenizer=tokenizer_spec(artefact_config(spec.tokenizer_from, kind=TOKENIZER)[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Checks: each looks at one part of a run


@dataclass(frozen=True)
class Plan:
    """A training as it is asked for."""

    spec: RunSpec
    task: Task
    run_dir: Path
    stage: str = GENERATOR

    @property
    def loops(self) -> dict[str, LoopSpec]:
        """The trainings that lie ahead, by field."""
        spec, found = self.spec, {}
        if self.trains_tokenizer:
            found["tokenizer_training"] = spec.tokenizer_training
        if self.stage == GENERATOR and not (self.run_dir / GENERATOR / "config.json").is_file():
            found["generator_training"] = spec.generator_training
        return found

    @property
    def trains_tokenizer(self) -> bool:
        """Whether stage 1 lies ahead."""
        done = self.spec.tokenizer_from or (self.run_dir / TOKENIZER / "config.json").is_file()
        return isinstance(self.spec.tokenizer, TokenizerSpec) and not done

    @property
    def guidances(self) -> list[Any]:
        """All settings that will be sampled with."""
        return [self.spec.sampling.guidance, *self.spec.evaluation.compare_guidance]


def needed_assets(plan: Plan) -> list[Asset]:
    """Weights that a training reads and no package brings, each once."""
    spec, training = plan.spec, plan.spec.tokenizer_training
    found = [*_artefacts(plan), *plan.task.needs(spec)]
    if isinstance(spec.tokenizer, VAESpec):
        found.append(vae_asset(spec.tokenizer.name))
    if isinstance(spec.tokenizer, TokenizerSpec):
        own = Path(spec.tokenizer_from or "") / ENCODER
        asset = encoder_asset(spec.tokenizer.encoder.name)
        found.append(replace(asset, source=str(own)) if spec.tokenizer_from and own.is_dir() else asset)
    if plan.trains_tokenizer:
        found.append(perceptual_asset(training.perceptual))
        found += [encoder_asset(training.adversarial.encoder)] if training.adversarial else []
    repa = spec.generator_training.repa
    found += [encoder_asset(repa.encoder.name)] if repa else []
    for evaluator in get_evaluators(plan.task, spec, (*spec.evaluation.protocols, *spec.evaluation.in_training)):
        found += evaluator.needs()
    return distinct(found)


def _artefacts(plan: Plan) -> list[Asset]:
    named = {"tokenizer_from": plan.spec.tokenizer_from, "generator_from": plan.spec.generator_from}
    found = [Asset(what, source) for what, source in named.items() if source]
    return found + [Asset("weak generator", weak) for g in plan.guidances if (weak := getattr(g, "weak", None))]


def _protocols(plan: Plan) -> Iterator[Finding]:
    names = (*plan.spec.evaluation.protocols, *plan.spec.evaluation.in_training)
    get_evaluators(plan.task, plan.spec, names)
    prediction(plan.spec.flow.prediction)  # it may come from a plugin, which may be broken
    yield Finding("protocols", "ok", ", ".join(dict.fromkeys(names)) or "none")


def _fields(plan: Plan) -> Iterator[Finding]:
    for name, loop in plan.loops.items():
        _check_split(name, loop)
        schedule = loop.schedule
        starts = {
            f"{name}.schedule.warmup_images": schedule.warmup_images,
            f"{name}.schedule.decay_start_images": schedule.decay_start_images,
            f"{name}.save_every_images": loop.save_every_images,
        }
        for field, images in starts.items():
            if images > loop.images:
                detail = f"ends before {field}={images:,}"
                yield Finding(f"{name}.images={loop.images:,}", "too small", detail)


def _check_split(name: str, loop: LoopSpec) -> None:
    if loop.batch_size % (processes := dist.world_size()):
        raise SpecError(
            f"spec.{name}.batch_size", "the global batch must split evenly",
            got=f"{loop.batch_size} over {processes} processes", expected=f"a multiple of {processes}",
        )  # fmt: skip


def _tokenizer(plan: Plan) -> Iterator[Finding]:
    spec, training = plan.spec, plan.spec.tokenizer_training
    parts: dict[str, tuple[str, tuple[int, ...]]] = {}
    if isinstance(spec.tokenizer, TokenizerSpec):
        parts["tokenizer.encoder.layers"] = spec.tokenizer.encoder.name, spec.tokenizer.encoder.layers
    if plan.trains_tokenizer:
        for name, part in (("perceptual", training.perceptual), ("adversarial", training.adversarial)):
            if hasattr(part, "encoder"):
                parts[f"tokenizer_training.{name}.layers"] = part.encoder, part.layers  # type: ignore[union-attr]
    if repa := spec.generator_training.repa:
        parts["generator_training.repa.encoder.layers"] = repa.encoder.name, repa.encoder.layers
    for field, (encoder, layers) in parts.items():
        depth = ENCODERS[encoder].depth if encoder in ENCODERS else math.inf  # the model itself knows
        if max(layers, default=0) >= depth:
            raise SpecError(
                f"spec.{field}", f"{encoder} has {depth} blocks", got=list(layers),
                expected=f"block indices from 0 to {depth - 1}",
            )  # fmt: skip
    height, width = spec.tokenizer.image_size
    shape = " x ".join(map(str, latent_shape_of(spec.tokenizer)))
    yield Finding(TOKENIZER, "ok", f"latents {shape} of pictures of {height} x {width} px")


def _generator(plan: Plan) -> Iterator[Finding]:
    spec, shape = plan.spec, latent_shape_of(plan.spec.tokenizer)
    with torch.device("meta"):
        generator = Generator(spec.generator, plan.task.condition(spec, None), spec.flow, shape)
    repa = spec.generator_training.repa
    if repa and repa.encoder.name in ENCODERS and ENCODERS[repa.encoder.name].width != spec.generator.repa_dim:
        raise SpecError(
            "spec.generator.repa_dim", "differs from the width of the target encoder", got=spec.generator.repa_dim,
            expected=str(ENCODERS[repa.encoder.name].width),
        )  # fmt: skip
    for guidance in plan.guidances:
        needs_weak = "weak generator" in guidance.needs
        build_guidance(guidance, generator, generator if needs_weak else None)  # type: ignore[arg-type]
    for asset in _artefacts(plan):
        folder = None if asset.what == "tokenizer_from" else asset.folder()
        if folder is not None:
            config, _ = artefact_config(folder, kind=GENERATOR)
            with damaged(folder / "config.json"):
                got = f"{config['flow']['prediction']} of latents {config['latent_shape']}"
            if got != (expected := f"{spec.flow.prediction} of latents {list(shape)}"):
                raise SpecError(f"spec: {asset.what}", "predicts something else", got=got, expected=expected)
            if asset.what == "generator_from":
                _check_start(generator, folder)
    yield Finding(GENERATOR, "ok", f"{spec.flow.prediction} of latents {' x '.join(map(str, shape))}")


def _check_start(generator: Generator, folder: Path) -> None:
    """Names and shapes of the network's weights; those of its condition may depend on the data."""
    with damaged(folder), safe_open(folder / "model.safetensors", "pt") as file:
        found = {
            name.removeprefix("network."): torch.empty(file.get_slice(name).get_shape(), device="meta")
            for name in file.keys()  # noqa: SIM118
            if name.startswith("network.")
        }
    load_strict(generator.network, found, str(folder))


def _data(plan: Plan) -> Iterator[Finding]:
    spec = plan.spec
    what = f"data {spec.data.dir}"
    if not (Path(spec.data.dir) / "manifest.json").is_file() and spec.data.recipe:
        recipe = get_data_recipe(spec.data.recipe)
        for package in getattr(recipe, "packages", ()):
            _need_package(f"data recipe {recipe.name}", package)
        recipe.plan(recipe.resolve(spec.data.options))  # reads its source
        yield Finding(what, MISSING, f"will be built by {recipe.name}: {recipe.size}")
        return
    manifest = read_manifest(spec.data.dir)
    counts = {split: len(plan.task.dataset(spec, split)) for split in ("train", "val")}
    text = ", ".join(f"{split} {num:,}" for split, num in counts.items())
    yield Finding(what, "ok", f"{text}, {len(manifest.get('classes', ()))} classes")
    size, (height, width) = manifest.get("image_size_px"), spec.tokenizer.image_size
    if size and (size[0] < width or size[1] < height):
        detail = f"{size[1]} x {size[0]} px, enlarged to {height} x {width} px"
        yield Finding(f"pictures in {spec.data.dir}", "too small", detail)


def _need_package(where: str, package: str) -> None:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        hint = f"Run `pip install {package}`."
        raise DataError(where, f"the package {package} is not installed", hint=hint) from None


def _weights(plan: Plan) -> Iterator[Finding]:
    for asset in needed_assets(plan):
        fault, findings = asset.fault(), list[Finding]()
        with _reported(findings, asset.what):
            if asset.package:
                _need_package(asset.what, asset.package)
            if fault is None:
                yield Finding(asset.what, "ok", str(asset.place))
            elif asset.without:
                yield Finding(asset.what, MISSING, f"{asset.without}; `raev2 assets fetch` gets it")
            elif barred := asset.barred():
                raise asset.error(barred)
            else:
                yield Finding(asset.what, MISSING, f"{fault}; will be downloaded from {asset.url}", asset=asset)
        yield from findings


def _disk(plan: Plan) -> Iterator[Finding]:
    spec, sizes = plan.spec, sizes_of(plan.task, plan.spec)
    needed = 0
    for name, parameters in (
        ("tokenizer_training", sizes.decoder),
        ("generator_training", sizes.generator.num_parameters),
    ):
        if name in plan.loops:
            loop = getattr(spec, name)
            one = state_bytes(parameters, loop.optimizer, len(getattr(loop, "ema_decays", (0,)))) - 4 * parameters
            needed += (loop.keep_checkpoints + 1) * one + 4 * parameters  # one more while it is written; the artefact
    there = sum(file.stat().st_size for file in (plan.run_dir / "checkpoints").rglob("*") if file.is_file())
    folder = next(path for path in (plan.run_dir.absolute(), *plan.run_dir.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(folder).free, max(needed - there, 0)
    detail = f"{needed / GIB:.2f} GiB of checkpoints, {free / GIB:.2f} GiB free"
    if needed > free:
        raise FileError(
            f"run folder {plan.run_dir}", "the disk is too small for the checkpoints", got=f"{free / GIB:.2f} GiB free",
            expected=f"{needed / GIB:.2f} GiB", hint="Choose another --run, or lower keep_checkpoints.",
        )  # fmt: skip
    yield Finding(f"disk of {plan.run_dir}", "guessed", detail)


def _memory(plan: Plan) -> Iterator[Finding]:
    spec, sizes = plan.spec, sizes_of(plan.task, plan.spec)
    frozen = 4 * sizes.decoder
    if isinstance(spec.tokenizer, TokenizerSpec):
        info = encoder_facts(spec.tokenizer.encoder.name)
        frozen += 4 * 12 * info.depth * info.width**2
    builders = {"tokenizer_training": _one_decoded, "generator_training": _one_generated}
    for name, loop in plan.loops.items():
        parameters = sizes.decoder if name == "tokenizer_training" else sizes.generator.num_parameters
        averages = len(getattr(loop, "ema_decays", (0,)))
        state = state_bytes(parameters, loop.optimizer, averages) + frozen  # type: ignore[attr-defined]
        one = activation_bytes(partial(builders[name], plan, sizes), spec.precision)
        yield _fits(name, loop, state, one)
    yield from _caches(plan, sizes)


def _one_decoded(plan: Plan, sizes: Sizes) -> tuple[nn.Module, tuple[Any, ...]]:
    tokenizer = plan.spec.tokenizer
    assert isinstance(tokenizer, TokenizerSpec)
    decoder = ViTDecoder(sizes.latent_shape[0], tokenizer.decoder, tokenizer.grid)
    return decoder, (torch.zeros(1, math.prod(tokenizer.grid), sizes.latent_shape[0]),)


def _one_generated(plan: Plan, sizes: Sizes) -> tuple[nn.Module, tuple[Any, ...]]:
    spec, condition = plan.spec, plan.task.condition(plan.spec, None)
    generator = Generator(spec.generator, condition, spec.flow, sizes.latent_shape)
    return generator, (torch.zeros(1, *sizes.latent_shape), torch.zeros(1), generator.conditioner.example_cond(1))


def _fits(name: str, loop: LoopSpec, state: int, one: int) -> Finding:
    """At least so much memory is used: losses, workspace and kernels of a library come on top."""
    micro = loop.micro_batch_size or math.ceil(loop.batch_size / dist.world_size())
    device, available = _device_memory()
    needed, room = state + micro * one, (available - state) // max(one, 1)
    detail = f"at least {needed / GIB:.2f} GiB of {available / GIB:.2f} GiB, {micro} images a forward"
    if needed <= available:
        return Finding(f"memory of {device}, {name}", "guessed", detail)
    if room < 1:
        raise SpecError(
            f"spec.{name}", f"too much for the memory of {device}", got=f"at least {(state + one) / GIB:.2f} GiB",
            expected=f"at most {available / GIB:.2f} GiB", hint="Choose a smaller width or depth, or another machine.",
        )  # fmt: skip
    fitting = 2 ** int(math.log2(room))
    raise SpecError(
        f"spec.{name}.micro_batch_size", f"too many images at once for {device} ({detail})", got=micro,
        expected=f"at most {fitting}",
        hint=f"Add --set {name}.micro_batch_size={fitting}; it changes speed, not results.",
    )  # fmt: skip


def _device_memory() -> tuple[str, int]:
    """Name of the device that trains, and all of its memory in bytes."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, properties.total_memory
    return "this machine", _ram()


def _ram() -> int:
    """Memory of this machine in bytes, or what a container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdecimal() else total


def _caches(plan: Plan, sizes: Sizes) -> Iterator[Finding]:
    """Pictures and latents that are kept in memory, of a dataset that is there."""
    spec, folder = plan.spec, Path(plan.spec.data.dir)
    if not (folder / "manifest.json").is_file():
        return
    with damaged(folder / "manifest.json", DataError):
        num = int(read_manifest(folder)["splits"]["train"]["num_samples"])
    wanted = {
        "data.cache": num * 3 * math.prod(spec.tokenizer.image_size),
        "generator_training.latent_cache": num * 4 * math.prod(sizes.latent_shape),
    }
    for field, needed in wanted.items():
        part, _, name = field.partition(".")
        if getattr(getattr(spec, part), name):
            if needed > (ram := _ram()):
                raise SpecError(
                    f"spec.{field}", "does not fit into the memory of this machine", got=f"{needed / GIB:.2f} GiB",
                    expected=f"at most {ram / GIB:.2f} GiB", hint=f"Add --set {field}=false.",
                )  # fmt: skip
            yield Finding(field, "guessed", f"{needed / GIB:.2f} GiB of {ram / GIB:.2f} GiB of this machine")


CHECKS: dict[str, Callable[[Plan], Iterator[Finding]]] = {
    "protocols": _protocols, "fields": _fields, TOKENIZER: _tokenizer, GENERATOR: _generator, "data": _data,
    "weights": _weights, "disk": _disk, "memory": _memory,
}  # fmt: skip


@contextmanager
def _reported(findings: list[Finding], what: str) -> Iterator[None]:
    """An error inside becomes a finding."""
    try:
        yield
    except RaeError as error:
        state: State = MISSING if isinstance(error, DataError) else "wrong"
        findings.append(Finding(what, state, str(error), error))


def _with_local_tokenizer(spec: RunSpec) -> RunSpec:
    """`with_tokenizer` where the artefact is on this machine; the spec as it is where it has to be downloaded."""
    if spec.tokenizer_from is None:
        return spec
    folder = Asset("tokenizer_from", spec.tokenizer_from).folder()
    return spec if folder is None else with_tokenizer(spec.replace(tokenizer_from=str(folder)))
