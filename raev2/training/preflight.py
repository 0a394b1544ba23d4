"""What a training will need, looked at before it starts: read `preflight`. Also the numbers that a spec stands for."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from raev2.errors import FileError, RaeError, SpecError
from raev2.files.artefact import ENCODER, HUB_FILES, read_artefact
from raev2.files.assets import Asset, need_package
from raev2.files.manifest import read_manifest
from raev2.flow import prediction
from raev2.guidance import build_guidance
from raev2.model.generator import Generator, model_size
from raev2.spec import AnyTokenizerSpec, EncoderSpec, LPIPSLoss, MuonSpec, RunSpec, TokenizerSpec, VAESpec
from raev2.task import Task, get_data_recipe, get_evaluators
from raev2.tokenizer.baselines import VAES, build_tokenizer, tokenizer_spec, vae_asset
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoder_table import ENCODERS, EncoderInfo, check_layers, encoder_asset
from raev2.tokenizer.encoders import build_encoder
from raev2.tokenizer.losses import LPIPS_LOSS
from raev2.training import dist

logger = logging.getLogger(__name__)
TOKENIZER, GENERATOR = "tokenizer", "generator"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that a training needs. `error`: why it cannot do without; None: fine, or the training repairs it."""

    what: str
    state: Literal["ok", "guessed", "missing", "too small", "error"]
    detail: str
    error: RaeError | None = None


@dataclass(frozen=True)
class Plan:
    """A training up to `stage`. `spec` has the tokenizer of `tokenizer_from`, if that is on this machine."""

    task: Task
    spec: RunSpec
    run_dir: Path = Path()
    stage: str = GENERATOR

    @property
    def stages(self) -> list[str]:
        """The trainings that lie ahead."""
        first = isinstance(self.spec.tokenizer, TokenizerSpec) and self.spec.tokenizer_from is None
        wanted = [TOKENIZER] * first + [GENERATOR] * (self.stage == GENERATOR)
        return [stage for stage in wanted if not (self.run_dir / stage / "config.json").is_file()]

    @property
    def encoders(self) -> list[tuple[str, Sequence[int]]]:
        """Encoders that no artefact brings, with the layers that are named."""
        spec, loop, repa = self.spec, self.spec.tokenizer_training, self.spec.generator_training.repa
        source = spec.tokenizer_from or spec.decoder_from
        folder = Asset(TOKENIZER, source).folder() if source else None
        brought = folder is not None and (folder / ENCODER).is_dir()
        parts: list[Any] = [None if brought else getattr(spec.tokenizer, "encoder", None), repa and repa.encoder]
        parts += [loop.perceptual, loop.adversarial] if TOKENIZER in self.stages else []
        return [(getattr(part, "name", None) or part.encoder, part.layers) for part in parts if hasattr(part, "layers")]

    def assets(self) -> list[Asset]:
        """Weights that the training reads and no package brings, each once."""
        spec, evaluation, perceptual = self.spec, self.spec.evaluation, self.spec.tokenizer_training.perceptual
        named = {name: getattr(spec, name) for name in ("tokenizer_from", "decoder_from", "generator_from")}
        for guidance in (spec.sampling.guidance, *evaluation.compare_guidance):
            named[f"guidance {guidance.kind}.weak"] = getattr(guidance, "weak", None)
        found = [Asset(field, source, HUB_FILES) for field, source in named.items() if source]
        found += [*self.task.needs(spec), *(encoder_asset(name) for name, _ in self.encoders)]
        found += [vae_asset(spec.tokenizer.name)] if isinstance(spec.tokenizer, VAESpec) else []
        found += [LPIPS_LOSS] if TOKENIZER in self.stages and isinstance(perceptual, LPIPSLoss) else []
        for evaluator in get_evaluators(self.task, spec, (*evaluation.protocols, *evaluation.in_training)):
            found += evaluator.needs()
        needed_last = sorted(found, key=lambda asset: not asset.without)  # where a source is there twice
        return list({asset.source: asset for asset in needed_last}.values())

    def commits(self) -> dict[str, str]:
        """The commits of hub repositories that the training reads, by source."""
        return {asset.source: asset.commit for asset in self.assets() if asset.commit}


def preflight(plan: Plan) -> Iterator[Finding]:
    """Look at everything that a training needs later, in seconds and on this machine alone."""
    plan = replace(plan, spec=with_tokenizer(plan.spec, download=False))
    for what, check in CHECKS.items():
        yield from _findings(what, partial(check, plan))


def _findings(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except RaeError as error:
        yield Finding(what, "error", str(error), error)


def make_ready(plan: Plan) -> None:
    """Raise the first error of `preflight`; then fetch the weights that are missing."""
    for finding in preflight(plan):
        if finding.error:
            raise finding.error
        if finding.state in ("missing", "too small"):
            logger.info("%s: %s", finding.what, finding.detail)
    for asset in replace(plan, spec=with_tokenizer(plan.spec)).assets():
        if not asset.without:
            asset.fetch()


def with_tokenizer(spec: RunSpec, download: bool = True) -> RunSpec:
    """The spec with the tokenizer that `tokenizer_from` or `decoder_from` names, if it is here or may be downloaded."""
    source = spec.tokenizer_from or spec.decoder_from
    here = Asset("tokenizer_from", source).folder() if source else None
    if source is None or not (here or download):
        return spec
    found = tokenizer_spec(read_artefact(here or source, kind=TOKENIZER)[0])
    noise = {name: value for name, value in spec.tokenizer if name.startswith("noise_")} if spec.decoder_from else {}
    return spec.replace(tokenizer=found.replace(**noise))


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
        decoder = network_of(task, spec, TOKENIZER).state_dict()  # with its positions
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


def state_bytes(parameters: int, loop: Any) -> int:
    """Weights, gradients, averages and moments in float32."""
    return (2 + len(getattr(loop, "ema_decays", (0,))) + num_moments(loop)) * 4 * parameters


def num_moments(loop: Any) -> int:
    """Muon has one moment of each weight, AdamW two."""
    return 1 if isinstance(getattr(loop, "optimizer", None), MuonSpec) else 2


def network_of(task: Task, spec: RunSpec, stage: str) -> ViTDecoder | Generator:
    """The network that a stage trains, without memory."""
    shape = latent_shape_of(spec.tokenizer)
    with torch.device("meta"):
        if stage == TOKENIZER and isinstance(spec.tokenizer, TokenizerSpec):
            return ViTDecoder(shape[0], spec.tokenizer.decoder, spec.tokenizer.grid)
        return Generator(spec.generator, task.condition(spec, None), spec.flow, shape)


def latent_shape_of(tokenizer: AnyTokenizerSpec) -> tuple[int, int, int]:
    """(C, H, W) of the latents of a tokenizer, without loading it where its facts are known."""
    if isinstance(tokenizer, TokenizerSpec):
        return encoder_facts(tokenizer.encoder.name).width, *tokenizer.grid
    if isinstance(tokenizer, VAESpec) and (vae := VAES.get(tokenizer.name)):
        height, width = (side // vae.downsample for side in tokenizer.image_size)
        return vae.channels, height, width
    return build_tokenizer(tokenizer).latent_shape


def encoder_facts(name: str) -> EncoderInfo:
    """Facts about an encoder of the table, or those that its model or folder says."""
    return ENCODERS.get(name) or build_encoder(EncoderSpec(name=name), (1, 1), pretrained=False).info


def _networks(plan: Plan) -> Iterator[Finding]:
    """Settings of networks have to fit together; most errors are those that the part itself would raise later."""
    spec, repa = plan.spec, plan.spec.generator_training.repa
    for encoder, layers in plan.encoders:
        if layers and encoder in ENCODERS:
            check_layers(encoder, ENCODERS[encoder].depth, layers)
    if repa and spec.generator.repa_dim != (width := encoder_facts(repa.encoder.name).width):
        what = "differs from the width of the target encoder"
        raise SpecError("spec.generator.repa_dim", what, got=spec.generator.repa_dim, expected=str(width))
    prediction(spec.flow.prediction)  # it may come from a plugin, which may be broken
    own: Any = network_of(plan.task, spec, GENERATOR)
    for guidance in (spec.sampling.guidance, *spec.evaluation.compare_guidance):
        build_guidance(guidance, own, own if "weak generator" in guidance.needs else None)
    height, width = spec.tokenizer.image_size
    latents = " x ".join(map(str, latent_shape_of(spec.tokenizer)))
    yield Finding("networks", "ok", f"latents {latents} of pictures of {height} x {width} px")


def _data(plan: Plan) -> Iterator[Finding]:
    spec, what = plan.spec, f"data {plan.spec.data.dir}"
    if spec.data.recipe and not (Path(spec.data.dir) / "manifest.json").is_file():
        recipe = get_data_recipe(spec.data.recipe)
        for package in getattr(recipe, "packages", ()):
            need_package(f"data recipe {recipe.name}", package)
        recipe.plan(recipe.resolve(spec.data.options))  # it looks at its source
        yield Finding(what, "missing", f"will be built by {recipe.name}: {recipe.size}")
        return
    manifest, (height, width) = read_manifest(spec.data.dir), spec.tokenizer.image_size
    counts = [f"{split} {len(plan.task.dataset(spec, split)):,}" for split in ("train", "val")]
    yield Finding(what, "ok", ", ".join([*counts, f"{len(manifest.get('classes', ()))} classes"]))
    size = manifest.get("image_size_px") or (width, height)
    if size[0] < width or size[1] < height:
        yield Finding(what, "too small", f"{size[1]} x {size[0]} px are enlarged to {height} x {width} px")


def _weights(plan: Plan) -> Iterator[Finding]:
    for asset in plan.assets():
        yield from _findings(asset.what, partial(_weight, asset))


def _weight(asset: Asset) -> Iterator[Finding]:
    fault, then = asset.fault(), asset.without or f"will be downloaded from {asset.url}"
    if asset.package and not asset.without:
        need_package(asset.what, asset.package)
    if fault and not asset.without and (barred := asset.barred()):
        raise asset.error(barred)
    yield Finding(asset.what, "missing" if fault else "ok", f"{fault}; {then}" if fault else str(asset.place))


def _space(plan: Plan) -> Iterator[Finding]:
    """Lower bounds of memory and disk."""
    spec, disk, hint = plan.spec, 0, "Choose a smaller network, parallel.strategy=fsdp, or another machine."
    for stage in plan.stages:
        loop = getattr(spec, f"{stage}_training")
        parameters = sum(weight.numel() for weight in network_of(plan.task, spec, stage).parameters())
        state = state_bytes(parameters, loop)
        disk += (loop.keep_checkpoints + 1) * (state - 4 * parameters)  # no gradients; one more while written
        sharded = stage == GENERATOR and spec.parallel.strategy != "ddp"
        yield _fits(f"memory, {stage}", state // (dist.world_size() if sharded else 1), _memory(), SpecError, hint)
    disk -= sum(file.stat().st_size for file in (plan.run_dir / "checkpoints").rglob("*") if file.is_file())
    folder = next(path for path in (plan.run_dir.absolute(), *plan.run_dir.absolute().parents) if path.is_dir())
    hint = "Choose another --run, or lower keep_checkpoints."
    yield _fits(f"disk of {plan.run_dir}", max(disk, 0), shutil.disk_usage(folder).free, FileError, hint)


CHECKS = {"networks": _networks, "data": _data, "weights": _weights, "space": _space}


def _fits(what: str, needed: int, there: int, error: type[RaeError], hint: str) -> Finding:
    """An estimate in bytes against what is there; raises `error` where that is too small."""
    numbers = f"at least {needed / GIB:.2f} GiB needed, {there / GIB:.2f} GiB there"
    if needed > there:
        raise error(what, numbers, hint=hint)
    return Finding(what, "guessed", numbers)


def _memory() -> int:
    """Memory of the device that trains, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
