"""The stage 2 loop: flow matching of the generator on the latents of a trained tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raev2.batch import cond_map
from raev2.data import ImageDataset, ordered_batches, to_float, train_batches
from raev2.files.artefact import load_artefact, load_strict
from raev2.flow import interpolate, sample_t, training_loss
from raev2.model.generator import Generator, generator_card
from raev2.task import EncodeImages, Task
from raev2.tokenizer.base import Tokenizer
from raev2.tokenizer.encoders import build_encoder
from raev2.training import dist
from raev2.training.ema import EMA
from raev2.training.optim import build_optimizer, learning_rate, set_learning_rate
from raev2.training.parallel import gradient_sync, is_plain, parallelise, whole
from raev2.training.resume import check_identity
from raev2.training.run import (
    NonFiniteGuard,
    Progress,
    Run,
    Stopped,
    StopSignal,
    TrainingState,
    crossed,
    memory_field,
    micro_batches,
    step_generator,
    update,
)

STAGE = "generator"
CACHE_BATCH = 64


def train_generator(
    run: Run,
    task: Task,
    rae: Tokenizer,
    dataset: ImageDataset,
    look: Callable[[Generator, int], None],
    evaluate: Callable[[Generator, int], None],
) -> Generator:
    """Train the generator of `run.spec` and save it, with averaged weights, as the artefact `run.dir/generator`.

    look, evaluate   called with the averaged generator and the images seen, every `sample_every_images` and
                     `eval_every_images`

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
    encode = _cached_encoder(rae, dataset, device) if loop.latent_cache else latent_encoder(rae, device)
    encode_cond = task.cond_encoder(spec, encode, device)
    if hasattr(encode_cond, "fingerprint"):
        check_identity(run, {"condition encoder": encode_cond.fingerprint})
    repa_target = _repa_encoder(run, rae.latent_shape)

    # Resume.
    state = TrainingState(run.dir, STAGE, modules, ema, optimizers)
    images = state.restore()
    run.forget_after(STAGE, images)
    batches = train_batches(
        dataset, batch_size=loop.batch_size, seed=spec.seed, start_images=images, flip=spec.data.horizontal_flip,
        num_workers=spec.data.num_workers, rank=dist.rank(), world_size=dist.world_size(),
    )  # fmt: skip
    guard, progress, skipped_images = NonFiniteGuard(run, state), Progress(STAGE, loop, images), 0
    due = False  # a checkpoint

    def look_and_evaluate(images: int) -> None:
        """What is due after so many images: pictures, and numbers unless the log has them."""
        before = images - loop.batch_size
        looks, evaluates = (
            crossed(every, before, images) for every in (loop.sample_every_images, loop.eval_every_images)
        )
        if images >= loop.images or not (looks or evaluates):
            return
        plain = _plain(generator)
        with ema.applied(plain, decay):
            if looks:
                look(plain, images)
            logged = dist.from_main(len(run.history(stage=STAGE, kind="eval", images=images)))
            if images and evaluates and logged < len(spec.evaluation.in_training):
                evaluate(plain, images)

    micro = loop.micro_batch_size or loop.batch_size // dist.world_size()
    with StopSignal() as stop, memory_field(f"{STAGE}_training.micro_batch_size", micro):
        look_and_evaluate(images)  # at the start, and again where a killed run may have stopped before it did
        while images < loop.images:
            # Stop?
            if stop:
                if guard.steady:
                    state.save(images, loop.keep_checkpoints)
                raise Stopped(f"{STAGE} stopped after {images:,} images")

            # Batch.
            with progress.waiting():
                batch, skipped = next(batches)
            skipped_images += skipped
            step = images // loop.batch_size
            rng = step_generator(device, spec.seed, STAGE, images)
            values: dict[str, Tensor] = {}

            # Random numbers, those of the global batch: no number of processes or parts changes them.
            num, size = loop.batch_size, loop.micro_batch_size or len(batch.key)
            all_drop = dist.own_rows(torch.rand(num, generator=rng, device=device))
            all_t = dist.own_rows(sample_t(num, spec.flow, generator.time_shift, rng, device))
            all_noise = dist.own_rows(torch.randn(num, *rae.latent_shape, generator=rng, device=device))

            parts = zip(
                micro_batches(batch, size), all_drop.split(size), all_t.split(size), all_noise.split(size), strict=True
            )
            for (part, share, last), drop, t, noise in parts:
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
                    )  # fmt: skip
                    (share * losses.total).backward()
                terms = {"loss": losses.total, "full": losses.full, "base": losses.base, "repa": losses.repa}
                for name, term in terms.items():
                    if term is not None:
                        values[name] = values.get(name, 0) + share * term.detach().mean()

            # Update, averages.
            lr = learning_rate(loop.schedule, images, loop.images, loop.batch_size)
            set_learning_rate(optimizer, lr)
            grad_norm = update(optimizer, list(generator.parameters()), values["loss"], loop.clip_grad_norm)
            if guard.check(grad_norm, images, step, batch.key):
                ema.update(generator, step)
            before, images = images, images + loop.batch_size

            # Report, save, look, evaluate: saved before what takes long, which a resumed run repeats if it has to.
            if (step + 1) % loop.log_every_steps == 0 or images >= loop.images:
                numbers = {name: float(dist.mean_over_processes(value)) for name, value in values.items()}
                speed = progress.report(images, **numbers)
                run.log(
                    stage=STAGE, kind="train", images=images, step=step + 1, lr=lr, grad_norm=grad_norm,
                    skipped_images=skipped_images, **numbers, **speed,
                )  # fmt: skip
            due = due or crossed(loop.save_every_images, before, images) or images >= loop.images
            if due and guard.steady:
                due = not state.save(images, loop.keep_checkpoints)
            look_and_evaluate(images)

    # Artefact with the averaged weights.
    state.require_finite()
    generator = _plain(generator)
    averages = {name: whole(value) for name, value in ema.state_dict(decay).items()}
    load_strict(generator, {**generator.state_dict(), **averages}, "averaged generator")
    look(generator, images)
    if dist.is_main():
        generator.extra = {"recipe": spec.recipe, "images_seen": images, "ema_decay": decay}
        generator.save_pretrained(run.dir / STAGE, card=_card(run, dataset, images))
    dist.barrier()
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


def _cached_encoder(rae: Tokenizer, dataset: ImageDataset, device: torch.device) -> EncodeImages:
    """(8-bit images, keys) -> latents, looked up; every image of the split is encoded once, here."""
    cache = torch.empty(len(dataset), *rae.latent_shape)
    for batch in ordered_batches(dataset, CACHE_BATCH, skip_unreadable=True):
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


def _card(run: Run, dataset: ImageDataset, images: int) -> str:
    manifest = dataset.manifest
    return generator_card(
        f"Generator: {run.spec.task.name} / {run.spec.recipe}",
        f"Trained on {images:,} images of `{manifest['name']}` (fingerprint {dataset.fingerprint[:12]}), averaged "
        "weights.\nIt needs the tokenizer it was trained with. Numbers, protocols and settings: `report.html` of its "
        f"run.\n\n## Data and licence\n\n{manifest['licence']}. {manifest['attribution']}",
    )
