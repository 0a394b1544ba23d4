"""What a training will need, looked at before it starts: read `preflight`. Also the numbers that a spec stands for.

preflight(task, spec, run_dir)     # findings; nothing is downloaded, built or written
make_ready(task, spec, run_dir)    # at the start of a training: raise the first error, fetch weights that are missing
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._composable import checkpoint

from raev2.errors import CheckpointError, DataError, FileError, RaeError, SpecError
from raev2.files.artefact import ENCODER, artefact_config
from raev2.files.assets import MISSING, Asset
from raev2.files.damage import damaged
from raev2.files.manifest import read_manifest
from raev2.flow import prediction
from raev2.guidance import build_guidance
from raev2.model.generator import Generator, model_size
from raev2.spec import (
    AdamWSpec,
    AnyTokenizerSpec,
    EncoderSpec,
    GeneratorTrainingSpec,
    PixelSpec,
    RunSpec,
    TokenizerSpec,
    TokenizerTrainingSpec,
    VAESpec,
)  # fmt: skip
from raev2.task import Task, get_data_recipe, get_evaluators
from raev2.tokenizer.baselines import VAES, build_tokenizer, tokenizer_spec, vae_asset
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoder_table import ENCODERS, EncoderInfo, encoder_asset
from raev2.tokenizer.encoders import build_encoder
from raev2.tokenizer.losses import perceptual_asset
from raev2.training import dist

logger = logging.getLogger(__name__)
TOKENIZER, GENERATOR = "tokenizer", "generator"
GIB = 2**30
State = Literal["ok", "guessed", "missing", "too small", "wrong"]
STATES: dict[type[RaeError], State] = {DataError: "missing", CheckpointError: "missing", FileError: "too small"}


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


@dataclass(frozen=True)
class Plan:
    """A training as it is asked for. `spec` has the tokenizer of `tokenizer_from`, if that is on this machine."""

    task: Task
    spec: RunSpec
    run_dir: Path
    stage: str = GENERATOR

    @property
    def stages(self) -> list[str]:
        """The trainings that lie ahead."""
        spec = self.spec
        wanted = [TOKENIZER] * (isinstance(spec.tokenizer, TokenizerSpec) and spec.tokenizer_from is None)
        wanted += [GENERATOR] * (self.stage == GENERATOR)
        return [stage for stage in wanted if not (self.run_dir / stage / "config.json").is_file()]

    @property
    def artefacts(self) -> dict[str, Asset]:
        """The artefacts that it begins with, by field."""
        guidances = [self.spec.sampling.guidance, *self.spec.evaluation.compare_guidance]
        named = {"tokenizer_from": self.spec.tokenizer_from, "generator_from": self.spec.generator_from}
        named |= {f"guidance {guidance.kind}.weak": getattr(guidance, "weak", None) for guidance in guidances}
        return {field: Asset(field, source) for field, source in named.items() if source is not None}


def preflight(task: Task, spec: RunSpec, run_dir: Path, stage: str = GENERATOR) -> list[Finding]:
    """Look at everything that training up to `stage` needs later, in seconds and on this machine alone."""
    findings: list[Finding] = []
    try:
        spec = with_tokenizer(spec, download=False)
    except RaeError as error:
        findings.append(_failed("tokenizer_from", error))
    plan = Plan(task, spec, run_dir, stage)
    for what, check in CHECKS.items():
        try:
            findings.extend(check(plan))
        except RaeError as error:
            findings.append(_failed(what, error))
    return findings


def make_ready(task: Task, spec: RunSpec, run_dir: Path, stage: str = GENERATOR) -> None:
    """Raise the first error of `preflight`; then fetch the weights that are missing, where that is possible."""
    findings = dist.on_main(lambda: preflight(task, spec, run_dir, stage))
    raise_first(findings)
    for finding in findings if dist.is_main() else ():
        if finding.state in ("missing", "too small"):
            logger.info("%s: %s; %s", finding.what, finding.state, finding.detail)
    dist.on_main(lambda: fetch_all([finding.asset for finding in findings if finding.asset]))


def raise_first(findings: Sequence[Finding]) -> None:
    """Raise the error of the first finding that has one."""
    for finding in findings:
        if finding.error:
            raise finding.error


def fetch_all(assets: Sequence[Asset]) -> None:
    """Fetch weights; raises the error of the last that cannot be had, after a line in the log for the others."""
    errors = []
    for asset in assets:
        try:
            asset.fetch()
        except CheckpointError as error:
            errors.append(error)
    for problem in errors[:-1]:
        logger.error("%s", problem)
    if errors:
        raise errors[-1]


def with_tokenizer(spec: RunSpec, download: bool = True) -> RunSpec:
    """The spec with the tokenizer fields of the artefact that `tokenizer_from` names.

    download   whether it is fetched where it is not on this machine; else the spec is left as it is
    """
    source = spec.tokenizer_from
    here = None if source is None else Asset("tokenizer_from", source).folder()
    if source is None or (here is None and not download):
        return spec
    return spec.replace(tokenizer=tokenizer_spec(artefact_config(here or source, kind=TOKENIZER)[0]))


def needed_assets(plan: Plan) -> list[Asset]:
    """Weights that a training reads and no package brings, each once."""
    spec, training, tokenizer = plan.spec, plan.spec.tokenizer_training, plan.spec.tokenizer
    found = [*plan.artefacts.values(), *plan.task.needs(spec)]
    if isinstance(tokenizer, VAESpec):
        found.append(vae_asset(tokenizer.name))
    if isinstance(tokenizer, TokenizerSpec):
        artefact = plan.artefacts["tokenizer_from"].folder() if spec.tokenizer_from else None
        brought = artefact is not None and (artefact / ENCODER).is_dir()
        found += [] if brought else [encoder_asset(tokenizer.encoder.name)]
    if TOKENIZER in plan.stages:
        found.append(perceptual_asset(training.perceptual))
        found += [encoder_asset(training.adversarial.encoder)] if training.adversarial else []
    repa = spec.generator_training.repa
    found += [encoder_asset(repa.encoder.name)] if repa else []
    for evaluator in get_evaluators(plan.task, spec, (*spec.evaluation.protocols, *spec.evaluation.in_training)):
        found += evaluator.needs()
    needed_last = sorted(found, key=lambda asset: not asset.without)  # where a source is there twice
    return list({asset.source: asset for asset in needed_last}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def run_sizes(task: Task, spec: RunSpec) -> list[tuple[str, str]]:
    """Parameters, compute and memory of a run by name."""
    tokenizer, shape, loop = spec.tokenizer, latent_shape_of(spec.tokenizer), spec.generator_training
    size, (height, width) = model_size(spec.generator, task.condition(spec, None), shape), tokenizer.image_size
    rows = [("tokenizer", "none, pixels in [-1, 1]")]
    if isinstance(tokenizer, VAESpec):
        vae = VAES.get(tokenizer.name)
        rows = [("tokenizer", f"VAE {vae.model_id}, licence {vae.licence}" if vae else f"VAE {tokenizer.name}")]
    if isinstance(tokenizer, TokenizerSpec):
        name, layers, first = tokenizer.encoder.name, list(tokenizer.encoder.layers) or "last", spec.tokenizer_training
        with torch.device("meta"):
            decoder = ViTDecoder(shape[0], tokenizer.decoder, tokenizer.grid).state_dict()  # with its positions
        rows = [
            ("encoder", f"{name}, layers {layers}, licence {encoder_facts(name).licence}"),
            ("decoder parameters", f"{sum(value.numel() for value in decoder.values()) / 1e6:.2f} M"),
            ("tokenizer steps", f"{first.num_steps:,} of {first.batch_size} images"),
        ]
    return [
        *rows,
        ("images", f"{height} x {width} px"),
        ("latents", f"{shape[0]} x {shape[1]} x {shape[2]}"),
        ("image tokens", str(shape[1] * shape[2] // spec.generator.patch_size**2)),
        ("time shift", f"{spec.flow.shift_for(shape):.4g}"),
        ("generator parameters", f"{size.num_parameters / 1e6:.2f} M"),
        ("generator forward", f"{size.macs / 1e9:.2f} GMAC = {2 * size.macs / 1e9:.2f} GFLOPs an image"),
        ("sampling", f"{spec.sampling.steps} steps, {spec.sampling.guidance.kind}"),
        ("training state", f"{state_bytes(size.num_parameters, loop) / GIB:.2f} GiB a process (weights, gradients, "
         "averages, optimizer)"),
        ("generator steps", f"{loop.num_steps:,} of {loop.batch_size} images"),
    ]  # fmt: skip


def state_bytes(parameters: int, loop: TokenizerTrainingSpec | GeneratorTrainingSpec) -> int:
    """Weights, gradients, averages and moments in float32; Muon has one moment, AdamW two."""
    averages = len(loop.ema_decays) if isinstance(loop, GeneratorTrainingSpec) else 1
    return (2 + averages + (2 if isinstance(loop.optimizer, AdamWSpec) else 1)) * 4 * parameters


def trained_size(task: Task, spec: RunSpec, stage: str) -> tuple[int, int]:
    """Parameters that a stage trains, and the bytes that autograd keeps of one image until the backward.

    Counted on tensors without memory. Losses, frozen networks and workspace come on top.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    bf16, shape = spec.precision == "bf16", latent_shape_of(spec.tokenizer)
    with FakeTensorMode(), saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=bf16):
        network, inputs = _call(task, spec, stage, shape)
        output = network(*inputs)  # it holds what is kept
        own = {weight.untyped_storage()._cdata for weight in network.parameters()}
        parameters = sum(weight.numel() for weight in network.parameters())
        found = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    del output
    casts = 2 * parameters if bf16 else 0  # once, not for each image
    return parameters, max(found - casts, 0)


def _call(task: Task, spec: RunSpec, stage: str, shape: tuple[int, int, int]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The network that a stage trains, and inputs of one image."""
    if stage == TOKENIZER:
        assert isinstance(spec.tokenizer, TokenizerSpec)
        decoder = ViTDecoder(shape[0], spec.tokenizer.decoder, spec.tokenizer.grid)
        return decoder, (torch.zeros(1, shape[1] * shape[2], shape[0]),)
    generator = Generator(spec.generator, task.condition(spec, None), spec.flow, shape)
    for block in generator.blocks() if spec.parallel.activation_checkpointing else ():
        checkpoint(block)
    return generator, (torch.zeros(1, *shape), torch.zeros(1), generator.conditioner.example_cond(1))


def _loop(spec: RunSpec, stage: str) -> TokenizerTrainingSpec | GeneratorTrainingSpec:
    return spec.tokenizer_training if stage == TOKENIZER else spec.generator_training


def latent_shape_of(tokenizer: AnyTokenizerSpec) -> tuple[int, int, int]:
    """(C, H, W) of the latents of a tokenizer, without loading it where its facts are known."""
    if isinstance(tokenizer, PixelSpec):
        return 3, *tokenizer.image_size
    if isinstance(tokenizer, TokenizerSpec):
        return encoder_facts(tokenizer.encoder.name).width, *tokenizer.grid
    vae = VAES.get(tokenizer.name)
    if vae is None:  # only the model itself knows
        return build_tokenizer(tokenizer).latent_shape
    height, width = (side // vae.downsample for side in tokenizer.image_size)
    return vae.channels, height, width


def encoder_facts(name: str) -> EncoderInfo:
    """Facts about an encoder of the table, or those that its model or folder says."""
    if name in ENCODERS:
        return ENCODERS[name]
    asset, source = encoder_asset(name), None
    if name.startswith("hf:") and (source := asset.folder()) is None:
        raise asset.error("unknown sizes")
    return build_encoder(EncoderSpec(name=name), (1, 1), pretrained=False, source=source).info


# ---------------------------------------------------------------------------------------------------------------------
# Checks: each looks at one part


def _protocols(plan: Plan) -> Iterator[Finding]:
    names = (*plan.spec.evaluation.protocols, *plan.spec.evaluation.in_training)
    get_evaluators(plan.task, plan.spec, names)
    prediction(plan.spec.flow.prediction)  # it may come from a plugin, which may be broken
    yield Finding("protocols", "ok", ", ".join(dict.fromkeys(names)) or "none")


def _networks(plan: Plan) -> Iterator[Finding]:
    """Settings of networks and of what sees their pictures, which have to fit together."""
    spec, shape = plan.spec, latent_shape_of(plan.spec.tokenizer)
    for field, encoder, layers in _layer_fields(spec.model_dump()):
        if layers and encoder in ENCODERS and max(layers) >= (depth := ENCODERS[encoder].depth):
            expected = f"block indices from 0 to {depth - 1}"
            raise SpecError(field, f"{encoder} has {depth} blocks", got=list(layers), expected=expected)
    repa, field = spec.generator_training.repa, "spec.generator.repa_dim"
    if repa and spec.generator.repa_dim != (dim := encoder_facts(repa.encoder.name).width):
        what = "differs from the width of the target encoder"
        raise SpecError(field, what, got=spec.generator.repa_dim, expected=str(dim))
    with torch.device("meta"):
        generator: Any = Generator(spec.generator, plan.task.condition(spec, None), spec.flow, shape)
    for guidance in (spec.sampling.guidance, *spec.evaluation.compare_guidance):
        build_guidance(guidance, generator, generator if "weak generator" in guidance.needs else None)
    for field, asset in plan.artefacts.items():
        if field != "tokenizer_from" and (folder := asset.folder()):
            _check_generator(field, folder, generator.config())
    height, width = spec.tokenizer.image_size
    latents = f"{shape[0]} x {shape[1]} x {shape[2]}"
    yield Finding("networks", "ok", f"latents {latents} of pictures of {height} x {width} px")


def _layer_fields(value: Any, path: str = "spec.") -> Iterator[tuple[str, str, Sequence[int]]]:
    """Field, encoder and layers, wherever a spec names layers of an encoder."""
    if isinstance(value, dict):
        if "layers" in value:
            yield f"{path}layers", value.get("name") or value["encoder"], value["layers"]
        for name, part in value.items():
            yield from _layer_fields(part, f"{path}{name}.")


def _check_generator(field: str, folder: Path, own: dict[str, Any]) -> None:
    """A generator that sampling or training begins with predicts the same; training goes on with the same blocks."""
    config, _ = artefact_config(folder, kind=GENERATOR)
    blocks = ("width", "depth", "patch_size") if field == "generator_from" else ()
    with damaged(folder / "config.json"):
        got, expected = (
            {"prediction": it["flow"]["prediction"], "latents": it["latent_shape"]}
            | {name: it["network"][name] for name in blocks} for it in (config, own)
        )  # fmt: skip
    if got != expected:
        raise SpecError(f"spec.{field}", f"{folder} is another generator", got=got, expected=str(expected))


def _data(plan: Plan) -> Iterator[Finding]:
    spec, what = plan.spec, f"data {plan.spec.data.dir}"
    if not (Path(spec.data.dir) / "manifest.json").is_file() and spec.data.recipe:
        recipe = get_data_recipe(spec.data.recipe)
        for package in getattr(recipe, "packages", ()):
            _need_package(f"data recipe {recipe.name}", package)
        recipe.plan(recipe.resolve(spec.data.options))  # it looks at its source
        yield Finding(what, MISSING, f"will be built by {recipe.name}: {recipe.size}")
        return
    manifest = read_manifest(spec.data.dir)
    counts = {split: len(plan.task.dataset(spec, split)) for split in ("train", "val")}
    numbers = [f"{split} {num:,}" for split, num in counts.items()]
    yield Finding(what, "ok", ", ".join([*numbers, f"{len(manifest.get('classes', ()))} classes"]))
    size, (height, width) = manifest.get("image_size_px"), spec.tokenizer.image_size
    if size and (size[0] < width or size[1] < height):
        yield Finding(what, "too small", f"{size[1]} x {size[0]} px are enlarged to {height} x {width} px")
    latent = 4 * math.prod(latent_shape_of(spec.tokenizer))
    caches = {"data.cache": 3 * height * width, "generator_training.latent_cache": latent}
    for field, one in caches.items():
        if attrgetter(field)(spec):
            fail = partial(SpecError, f"spec.{field}", hint=f"Add --set {field}=false.")
            yield _room(field, counts["train"] * one, _ram(), fail)


def _weights(plan: Plan) -> Iterator[Finding]:
    for asset in needed_assets(plan):
        fault, barred = asset.fault(), asset.barred()
        try:
            if asset.package:
                _need_package(asset.what, asset.package)
            if fault and barred and not asset.without:
                raise asset.error(barred)
        except RaeError as error:
            yield _failed(asset.what, error)
            continue
        if fault is None:
            yield Finding(asset.what, "ok", str(asset.place))
        elif asset.without:
            yield Finding(asset.what, MISSING, f"{asset.without}; `raev2 assets fetch` gets it")
        else:
            yield Finding(asset.what, MISSING, f"{fault}; will be downloaded from {asset.url}", asset=asset)


def _space(plan: Plan) -> Iterator[Finding]:
    """Disk and memory."""
    spec, disk, (device, memory) = plan.spec, 0, _device_memory()
    for stage in plan.stages:
        loop, processes, where = _loop(spec, stage), dist.world_size(), f"spec.{stage}_training"
        if loop.batch_size % processes:
            raise SpecError(
                f"{where}.batch_size", "the global batch must split evenly",
                got=f"{loop.batch_size} over {processes} processes", expected=f"a multiple of {processes}",
            )  # fmt: skip
        parameters, one = trained_size(plan.task, spec, stage)
        state = state_bytes(parameters, loop)
        disk += (loop.keep_checkpoints + 1) * (state - 4 * parameters)  # no gradients; one more while written
        if stage == GENERATOR and spec.parallel.strategy != "ddp":
            state //= processes
        micro, field = loop.micro_batch_size or loop.batch_size // processes, f"{stage}_training.micro_batch_size"
        fitting = 2 ** int(math.log2(max((memory - state) / max(one, 1), 1)))
        hint = f"Add --set {field}={fitting}; it changes speed, not results."
        fail = partial(SpecError, f"spec.{field}", got=micro, expected=f"at most {fitting}", hint=hint)
        if state + one > memory:
            fail = partial(SpecError, f"spec.{stage}", hint="Choose a smaller network, or another machine.")
        yield _room(f"memory of {device}, {stage}, {micro} images", state + micro * one, memory, fail)
    there = sum(file.stat().st_size for file in (plan.run_dir / "checkpoints").rglob("*") if file.is_file())
    folder = next(path for path in (plan.run_dir.absolute(), *plan.run_dir.absolute().parents) if path.is_dir())
    hint = "Choose another --run, or lower keep_checkpoints."
    full = partial(FileError, f"checkpoints in {plan.run_dir}", hint=hint)
    yield _room(f"disk of {plan.run_dir}", max(disk - there, 0), shutil.disk_usage(folder).free, full)


CHECKS: dict[str, Callable[[Plan], Iterator[Finding]]] = {
    "protocols": _protocols, "networks": _networks, "data": _data, "weights": _weights, "space": _space,
}  # fmt: skip


def _failed(what: str, error: RaeError) -> Finding:
    return Finding(what, STATES.get(type(error), "wrong"), str(error), error)


def _room(what: str, needed: int, there: int, fail: Callable[[str], RaeError]) -> Finding:
    """An estimate in bytes against what is there; an error where that is too small."""
    numbers = f"at least {needed / GIB:.2f} GiB needed, {there / GIB:.2f} GiB there"
    if needed <= there:
        return Finding(what, "guessed", numbers)
    return Finding(what, "too small", str(error := fail(numbers)), error)


def _need_package(where: str, package: str) -> None:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        hint = f"Run `pip install {package}`."
        raise DataError(where, f"the package {package} is not installed", hint=hint) from None


def _device_memory() -> tuple[str, int]:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, properties.total_memory
    return "this machine", _ram()


def _ram() -> int:
    """Memory of this machine in bytes, or what its container may use of it."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, int(text)) if text.isdecimal() else total
