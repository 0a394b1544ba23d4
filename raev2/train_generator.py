"""The stage 2 loop: flow matching of the generator on the latents of a trained tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from raev2.batch import cond_map
from raev2.data import ImageDataset, ordered_batches, to_float
from raev2.files.artefact import load_artefact, load_strict
from raev2.files.latent_folder import LatentFolder
from raev2.flow import interpolate, sample_t, training_loss
from raev2.model.generator import Generator
from raev2.task import EncodeImages, Task
from raev2.tokenizer.base import Tokenizer
from raev2.tokenizer.encoders import build_encoder
from raev2.train_tokenizer import STATS_BATCH
from raev2.training import dist
from raev2.training.ema import EMA
from raev2.training.optim import build_optimizer, set_learning_rate
from raev2.training.parallel import gradient_sync, is_plain, parallelise, whole
from raev2.training.preflight import fitted, generator_memory
from raev2.training.resume import check_identity
from raev2.training.run import Run, TrainingState, crossed, micro_batches, training_steps, update

STAGE = "generator"
TERMS = ("loss", "full", "base", "repa")


def train_generator(
    run: Run,
    task: Task,
    rae: Tokenizer,
    dataset: ImageDataset,
    look: Callable[[Generator, int], None],
    evaluate: Callable[[Generator, int], None],
    known_latents: Tensor | None = None,
) -> Generator:
    """Train the generator of `run.spec` and save it, with averaged weights, as the artefact `run.dir/generator`.

    look, evaluate   called with the averaged generator and the images seen, every `sample_every_images` and
                     `eval_every_images`
    known_latents    of `dataset`, as `train_tokenizer` returns them

    Continues from the newest checkpoint of the run. Raises Stopped after a signal to stop, with a checkpoint saved.
    """
    spec, loop = run.spec, run.spec.generator_training
    device = run.device

    # Network, optimizer, averages.
    torch.manual_seed(spec.seed)
    generator = Generator(spec.generator, task.condition(spec, dataset), spec.flow, rae.latent_shape).to(device)
    if spec.generator_from is not None:
        load_strict(generator, load_artefact(spec.generator_from, kind=STAGE)[1], spec.generator_from)
    network = parallelise(generator, spec.parallel, generator.blocks(), apart=not generator.conditioner.reads_trunk)
    optimizer = build_optimizer(generator, loop.optimizer, loop.schedule.lr)
    ema, decay = EMA(generator, loop.ema_decays), loop.ema_decays[0]
    modules, optimizers = {"model": generator}, {"optimizer": optimizer}
    if loop.latents is not None:
        stored = LatentFolder(loop.latents)
        stored.check(dataset.latent_identity(rae.identity()), mirrored=spec.data.horizontal_flip)
        dataset, encode = dataset.with_latents(stored), _stored_latents(device)
    elif loop.latent_cache:
        encode = _cached_encoder(rae, dataset, device, known_latents)
    else:
        encode = latent_encoder(rae, device)
    encode_cond = task.cond_encoder(spec, encode, device)
    if hasattr(encode_cond, "fingerprint"):
        check_identity(run, {"condition encoder": encode_cond.fingerprint})
    repa_target = _repa_encoder(run, rae.latent_shape)

    best = partial(run.best_images, STAGE, loop.keep_best)
    best_every = loop.eval_every_images if loop.keep_best is not None else None
    state = TrainingState(run.dir, STAGE, modules, ema, optimizers, best, best_every)
    loop = fitted(run, STAGE, loop, generator.parameters(), partial(generator_memory, task, spec))

    def look_and_evaluate(images: int) -> None:
        """What is due after so many images: pictures, and numbers unless the log has them."""
        before = images - loop.batch_size
        looks, evaluates = (
            crossed(every, before, images) for every in (loop.sample_every_images, loop.eval_every_images)
        )
        if not (looks or evaluates):
            return
        plain = _plain(generator)
        with ema.applied(plain, decay):
            if looks:
                look(plain, images)
            logged = dist.from_main(len(run.history(stage=STAGE, kind="eval", images=images)))
            if images and evaluates and logged < len(spec.evaluation.in_training):
                evaluate(plain, images)

    with training_steps(run, loop, state, dataset, look_and_evaluate, TERMS) as steps:
        for step in steps:
            # Random numbers, those of the global batch: no number of processes or parts changes them.
            num, rng = loop.batch_size, step.rng
            all_drop = dist.own_rows(torch.rand(num, generator=rng, device=device))
            all_t = dist.own_rows(sample_t(num, spec.flow, generator.time_shift, rng, device))
            all_noise = dist.own_rows(torch.randn(num, *rae.latent_shape, generator=rng, device=device))

            draws = (drawn.split(step.size) for drawn in (all_drop, all_t, all_noise))
            for (part, share, last), drop, t, noise in zip(micro_batches(step.batch, step.size), *draws, strict=True):
                # Latents and conditions.
                latents = encode(part.images, part.key)
                cond = encode_cond(cond_map(part.cond, lambda value: value.to(device)))
                cond = generator.conditioner.drop(cond, drop, loop.cond_drop_prob)

                # Path, prediction, loss, gradients.
                point = interpolate(latents, noise, t)
                with gradient_sync(network, last):
                    with run.autocast():
                        output = network(point.z_t, point.t, cond)
                    losses = training_loss(
                        output, point, latents, spec.flow, base_weight=loop.base_weight,
                        repa_target=repa_target(part.images) if repa_target else None,
                        repa_weight=loop.repa.weight if loop.repa else 0.0,
                        repa_cosine=loop.repa is not None and loop.repa.loss == "cosine",
                    )  # fmt: skip
                    (share * losses.total).backward()
                terms = {"loss": losses.total, "full": losses.full, "base": losses.base, "repa": losses.repa}
                step.add(share, terms)
            if step.logged:
                step.seen = dict(zip(("std", "mean"), map(float, torch.std_mean(latents)), strict=True))

            # Update.
            set_learning_rate(optimizer, step.lr)
            step.grad_norm = update(optimizer, list(generator.parameters()), step.values["loss"], loop.clip_grad_norm)

    # Artefact with the averaged weights.
    generator = _plain(generator)
    averages = {name: whole(value) for name, value in ema.state_dict(decay).items()}
    load_strict(generator, {**generator.state_dict(), **averages}, "averaged generator")
    look(generator, state.images)
    with dist.together():
        if dist.is_main():
            trained = {"recipe": spec.recipe, "images_seen": state.images, "ema_decay": decay}
            generator.extra = {**trained, "data": dataset.terms, "tokenizer": rae.identity()}
            generator.extra["commits"] = dict(run.commits)
            generator.save_pretrained(run.dir / STAGE)
    return generator.eval()


def _plain(generator: Generator) -> Generator:
    """The generator to look at and to save: itself, or a copy of a sharded or compiled one."""
    if is_plain(generator):
        return generator
    copy = Generator(generator.network_spec, generator.condition_spec, generator.flow, generator.latent_shape)
    load_strict(copy, {name: whole(value).cpu() for name, value in generator.state_dict().items()}, "generator")
    return copy.to(generator.device).eval()


def latent_encoder(rae: Tokenizer, device: torch.device) -> EncodeImages:
    """(8-bit images, keys) -> latents, encoded now, in float32."""
    return lambda images_u8, keys: rae.encode(to_float(images_u8.to(device)))


def _stored_latents(device: torch.device) -> EncodeImages:
    """(latents in place of images, keys) -> latents, in float32."""
    return lambda latents, keys: latents.to(device, non_blocking=True).float()


def _cached_encoder(rae: Tokenizer, dataset: ImageDataset, device: torch.device, known: Tensor | None) -> EncodeImages:
    """(8-bit images, keys) -> latents, looked up; every image of the split is encoded once: here, unless it is known.

    In batches of the size that stage 1 takes, so that both give the same bits.
    """
    cache = torch.empty(len(dataset), *rae.latent_shape) if known is None else known
    for batch in ordered_batches(dataset, STATS_BATCH, skip_unreadable=True) if known is None else ():
        cache[batch.key] = rae.encode(to_float(batch.images.to(device))).cpu()
    return lambda images_u8, keys: cache[keys].to(device)


def _repa_encoder(run: Run, latent_shape: tuple[int, int, int]) -> Callable[[Tensor], Tensor] | None:
    """8-bit images -> target tokens of the alignment loss, one a patch of latents; None for a run without it."""
    spec, repa = run.spec, run.spec.generator_training.repa
    if repa is None:
        return None
    patch_size = spec.generator.patch_size
    grid = (latent_shape[1] // patch_size, latent_shape[2] // patch_size)
    encoder = build_encoder(repa.encoder, grid).to(run.device)
    return lambda images_u8: encoder(to_float(images_u8.to(run.device)))
