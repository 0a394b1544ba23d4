"""The stage 1 loop: train the pixel decoder on tokens of the frozen encoder, then measure the latent statistics.

    loss = L1 + w_p * perceptual + w_d * lambda * adversarial          (terms: raev2/tokenizer/losses.py)

One decoder forward a step serves the decoder loss and the discriminator. The reference implementation decodes a second
time, without token noise and with the updated weights, to make the discriminator's fakes; here the discriminator sees
the fakes that the decoder loss was computed on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raev2.data import ImageDataset, ordered_batches, to_float, to_uint8
from raev2.files.artefact import load_strict
from raev2.files.grid import save_pairs
from raev2.nn import autocast
from raev2.spec import ParallelSpec, RunSpec, ScheduleSpec, TokenizerSpec, TokenizerTrainingSpec
from raev2.tokenizer.discriminator import build_discriminator
from raev2.tokenizer.latent_stats import LatentStats, LatentStatsAccumulator
from raev2.tokenizer.losses import (
    adaptive_weight,
    augmentation,
    build_perceptual_loss,
    diffaug,
    generator_loss,
    hinge_loss,
    l1_loss,
    quantise_8bit,
    shared_layers,
)
from raev2.tokenizer.rae import RAE
from raev2.training import dist
from raev2.training.ema import EMA
from raev2.training.health import spread
from raev2.training.optim import build_optimizer, learning_rate, set_learning_rate
from raev2.training.parallel import gradient_sync, parallelise
from raev2.training.preflight import CPU, StepMemory, fitted, step_memory
from raev2.training.run import Run, TrainingState, attention_kernels, crossed, micro_batches, training_steps, update

logger = logging.getLogger(__name__)
STAGE = "tokenizer"
NUM_GRID_IMAGES = 32
STATS_BATCH = 64
NUM_FOR_STD = 512  # pictures that tell the unit of the noise


def train_tokenizer(run: Run, dataset: ImageDataset, val: ImageDataset) -> tuple[RAE, Tensor | None]:
    """Train the tokenizer of `run.spec` and save it as the artefact `run.dir/tokenizer`.

    Returned with it: the latents (N, C, H, W) of `dataset`, where its generator keeps them in memory and the statistics
    read them all anyway; else None.

    Continues from the newest checkpoint of the run. Raises Stopped after a signal to stop, with a checkpoint saved.
    """
    spec, loop = run.spec, run.spec.tokenizer_training
    device, adversarial = run.device, loop.adversarial

    # Networks, losses, optimizers, averages.
    if spec.parallel != ParallelSpec() and dist.is_main():
        logger.info("tokenizer: spec.parallel is for the generator; this stage is replicated, and runs as written")
    assert isinstance(spec.tokenizer, TokenizerSpec), "the other kinds are not trained"
    torch.manual_seed(spec.seed)
    rae = _untrained(spec.tokenizer, spec.decoder_from).to(device)
    decoder = parallelise(rae.decoder, ParallelSpec())
    perceptual = build_perceptual_loss(loop.perceptual, spec.tokenizer.image_size).to(device)
    optimizer = build_optimizer(rae.decoder, loop.optimizer, loop.schedule.lr)
    shared = shared_layers(perceptual, rae.encoder)
    ema = EMA(rae.decoder, (loop.ema_decay,))
    modules: dict[str, nn.Module] = {"decoder": rae.decoder}
    optimizers = {"decoder_optimizer": optimizer}
    if adversarial:
        disc = build_discriminator(adversarial).to(device)
        distributed_disc = parallelise(disc, ParallelSpec())
        disc_optimizer = build_optimizer(disc, loop.optimizer, adversarial.lr)
        disc_schedule = ScheduleSpec(lr=adversarial.lr, final_lr=adversarial.lr / 10)
        disc_start, gan_start = (int(share * loop.images) for share in (adversarial.disc_start, adversarial.gan_start))
        modules["discriminator"], optimizers["discriminator_optimizer"] = disc, disc_optimizer

    state = TrainingState(run.dir, STAGE, modules, ema, optimizers)
    losses = DecoderLosses(loop, perceptual, rae.decoder.last_layer, run.autocast, disc if adversarial else None)
    trained, parts = nn.ModuleList(modules.values()), [rae.decoder, perceptual, *([disc] if adversarial else [])]
    loop = fitted(run, STAGE, loop, trained.parameters(), lambda: decoder_memory(rae, parts, spec.precision))

    def decode(network: nn.Module, tokens: Tensor) -> Tensor:
        with run.autocast():
            return network(tokens).float()

    def look(images: int) -> None:
        """Reconstructions, where they are due after so many images."""
        if crossed(loop.sample_every_images, images - loop.batch_size, images):
            with ema.applied(rae.decoder, loop.ema_decay):
                save_reconstructions(run, rae, val, images)

    num_tokens = math.prod(spec.tokenizer.grid)
    noise_std = 1.0 if spec.tokenizer.noise_unit == "tokens" else token_std(rae, dataset, device)
    with training_steps(run, loop, state, dataset, look, shown=("loss", "l1")) as steps:
        for step in steps:
            train_disc = adversarial is not None and step.images >= disc_start
            use_gan = adversarial is not None and step.images >= gan_start
            fakes: list[Tensor] = []

            # Random numbers, those of the global batch: no number of processes or parts changes them.
            rng, size = step.rng, step.size
            all_noise = dist.own_rows(noise_std * rae.token_noise(loop.batch_size, rng)).split(size)
            before_gan, before_real, before_fake = (
                dist.own_rows(augmentation(loop.batch_size, rng)).split(size) for _ in range(3)
            )

            # Decoder. The adversary has one weight for the whole batch, so that its parts are decoded once before.
            batches, shares, lasts = zip(*micro_batches(step.batch, size), strict=True)
            draws = before_gan if use_gan else [None] * len(shares)
            images = [part.images.to(device) for part in batches]
            with torch.no_grad(), attention_kernels(device, num_tokens), run.autocast():
                passes = [rae.encoder.with_layers(to_float(part), shared) for part in images]
            tokens = [clean.float() + noise for (clean, _), noise in zip(passes, all_noise, strict=True)]
            features = [seen for _, seen in passes]
            del all_noise, passes
            known: list[tuple[dict[str, Tensor], Tensor]] = []
            if use_gan and len(shares) > 1:
                with attention_kernels(device, num_tokens):
                    pulls = [
                        losses.apart(decode(rae.decoder, noisy), to_float(part), draw, seen)
                        for noisy, part, draw, seen in zip(tokens, images, draws, features, strict=True)
                    ]
                    known = losses.together(pulls, shares)
                    del pulls
            for i, (share, last) in enumerate(zip(shares, lasts, strict=True)):
                with gradient_sync(decoder, last), attention_kernels(device, num_tokens):
                    decoded = decode(decoder, tokens[i])
                    terms, gradient = known[i] if known else losses(decoded, to_float(images[i]), draws[i], features[i])
                    decoded.backward(share * gradient)
                fakes.append(decoded.detach())
                step.add(share, terms)
            if step.logged:
                step.seen = {"spread": spread(decoded.detach(), to_float(images[-1]))}
            set_learning_rate(optimizer, step.lr)
            step.grad_norm = update(optimizer, list(rae.decoder.parameters()), step.values["loss"], loop.clip_grad_norm)

            # Discriminator, on the images that were just decoded.
            if train_disc:
                for i, (share, last) in enumerate(zip(shares, lasts, strict=True)):
                    disc.train(i == 0)  # one power iteration of the spectral norm a step, not one a part
                    with gradient_sync(distributed_disc, last), attention_kernels(device, num_tokens), run.autocast():
                        real, fake = to_float(images[i]), quantise_8bit(fakes[i])
                        both = torch.cat([diffaug(real, before_real[i]), diffaug(fake, before_fake[i])])
                        disc_loss = hinge_loss(*distributed_disc(both).chunk(2))
                        (share * disc_loss).backward()
                    step.add(share, {"disc": disc_loss})
                disc_lr = learning_rate(disc_schedule, step.images - disc_start, loop.images - disc_start)
                set_learning_rate(disc_optimizer, disc_lr)
                update(disc_optimizer, list(disc.parameters()), step.values["disc"], loop.clip_grad_norm)

    # Averaged weights, statistics of the clean latents, artefact.
    load_strict(rae.decoder, {**rae.decoder.state_dict(), **ema.state_dict(loop.ema_decay)}, "averaged decoder")
    latents = _set_stats(rae, dataset, spec, device) if rae.latent_stats is None else None
    save_reconstructions(run, rae, val, state.images)
    with dist.together():
        if dist.is_main():
            begun = {"begun_with": rae.extra} if rae.extra else {}
            rae.extra = {"data": dataset.terms, "commits": dict(run.commits), **begun}
            rae.save_pretrained(run.dir / STAGE)
    return rae.eval(), latents


def _untrained(spec: TokenizerSpec, decoder_from: str | None) -> RAE:
    """A fresh decoder without statistics; or what `decoder_from` names, with the noise of this training."""
    if decoder_from is None:
        return RAE.from_spec(spec)
    rae = RAE.from_pretrained(decoder_from).train()
    rae.spec = spec
    return rae


class Pull(NamedTuple):
    """What decoded images are drawn to by the losses apart: without the adversary one, with it two."""

    terms: dict[str, Tensor]
    images: list[Tensor]  # the gradient of each at the images
    layer: list[Tensor]  # and at the last layer of the decoder


@dataclass(frozen=True)
class DecoderLosses:
    """The losses of decoded images, and their gradient at the images: the one way to the decoder is its caller's."""

    loop: TokenizerTrainingSpec
    perceptual: nn.Module
    last_layer: Tensor
    autocast: Callable[[], torch.autocast]  # the precision of losses and discriminator
    disc: nn.Module | None = None

    def __call__(
        self, decoded: Tensor, pixels: Tensor, draws: Tensor | None, features: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Named terms, 'loss' their weighted sum, and its gradient; arguments of `apart`."""
        return self.together([self.apart(decoded, pixels, draws, features)], [1.0])[0]

    def apart(self, decoded: Tensor, pixels: Tensor, draws: Tensor | None, features: Sequence[Tensor] = ()) -> Pull:
        """The losses one by one; without `draws` of the augmentation no adversary.

        features   tokens of the pixels, where another pass made them (`shared_layers`)
        """
        leaf = decoded.detach().requires_grad_()
        with self.autocast():
            known = [features] if features else []
            terms = {"l1": l1_loss(leaf, pixels), "perceptual": self.perceptual(leaf, pixels, *known)}
        terms["loss"] = terms["l1"] + self.loop.perceptual.weight * terms["perceptual"]
        at_images = [*torch.autograd.grad(terms["loss"], leaf)]
        if draws is None or self.disc is None:
            return Pull(terms, at_images, [])
        with self.autocast():
            # Heads in eval mode: no power iteration of the spectral norm for the decoder's sake.
            terms["gan"] = generator_loss(self.disc.eval()(diffaug(leaf, draws)))
        at_images += torch.autograd.grad(terms["gan"], leaf)
        at_layer = [torch.autograd.grad(decoded, self.last_layer, one, retain_graph=True)[0] for one in at_images]
        return Pull(terms, at_images, at_layer)

    def together(self, pulls: Sequence[Pull], shares: Sequence[float]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Terms and gradient of each part of a batch; the adversary's weight is one for all of them."""
        adversarial = self.loop.adversarial
        if adversarial is None or not pulls[0].layer:
            return [(pull.terms, pull.images[0]) for pull in pulls]
        rec, gan = (
            sum(share * one.float() for share, one in zip(shares, parts, strict=True))
            for parts in zip(*(pull.layer for pull in pulls), strict=True)
        )
        balance = adaptive_weight(rec, gan, adversarial.max_adaptive_weight)
        weight = adversarial.weight * balance
        total = [terms["loss"] + weight * terms["gan"] for terms, _, _ in pulls]
        return [
            ({**terms, "adaptive_weight": balance, "loss": loss}, images[0] + weight * images[1])
            for loss, (terms, images, _) in zip(total, pulls, strict=True)
        ]


def decoder_memory(rae: RAE, parts: Sequence[nn.Module], precision: str) -> StepMemory:
    """A step of decoder, perceptual loss and discriminator if any: one loss at a time, between the two ways."""

    def step(parts: nn.ModuleList, num: int) -> None:
        with autocast(precision, CPU):
            decoded = parts[0](torch.zeros(num, math.prod(rae.spec.grid), rae.latent_shape[0])).float()
            leaf = decoded.detach().requires_grad_()
            torch.autograd.grad(parts[1](leaf, leaf.detach()), leaf)
            for disc in parts[2:]:
                torch.autograd.grad(generator_loss(disc(diffaug(leaf, torch.zeros(num, 5)))), leaf)
        decoded.backward(leaf)

    return step_memory(nn.ModuleList(parts), step)


@torch.no_grad()
def measure_stats(
    rae: RAE,
    dataset: ImageDataset,
    device: torch.device,
    max_images: int | None = None,
    kept: Tensor | None = None,
) -> LatentStats:
    """Mean and variance of the latents of a split, in float32 without noise, shared by all processes.

    kept   (N, C, H, W), gets the latents that were read, as they are
    """
    indices = dataset.subset(max_images) if max_images else range(len(dataset))
    new = partial(
        LatentStatsAccumulator, rae.encoder.fingerprint(), dataset.fingerprint, with_cov=rae.spec.whiten is not None
    )
    own, total = new(), new()
    for batch in ordered_batches(dataset, STATS_BATCH, indices[dist.rank() :: dist.world_size()], skip_unreadable=True):
        latents = rae.token_latents(rae.tokens(to_float(batch.images.to(device))))
        own.update(latents)
        if kept is not None:
            kept[batch.key] = latents.cpu()
    for part in dist.gather_objects(own):
        total.merge(part)
    return total.result()


def _set_stats(rae: RAE, dataset: ImageDataset, spec: RunSpec, device: torch.device) -> Tensor | None:
    """Measure and set the statistics of the clean latents. Returned: what `train_tokenizer` returns of them."""
    num = spec.tokenizer_training.stats_images
    keep = spec.generator_training.latent_cache and num is None and dist.world_size() == 1
    latents = torch.empty(len(dataset), *rae.latent_shape) if keep else None
    rae.set_stats(measure_stats(rae, dataset, device, num, latents))
    for part in () if latents is None else latents.split(STATS_BATCH):
        part.copy_(rae.normalise(part.to(device)))
    return latents


def token_std(rae: RAE, dataset: ImageDataset, device: torch.device) -> float:
    """Standard deviation of the tokens over pictures, averaged over channels and places: the unit of `noise_tau`."""
    return measure_stats(rae, dataset, device, NUM_FOR_STD).var.mean().sqrt().item()


@torch.no_grad()
def save_reconstructions(run: Run, rae: RAE, val: ImageDataset, images: int) -> None:
    """Write the grid of fixed validation pictures, originals above reconstructions."""
    if dist.is_main():
        stride = max(1, len(val) // NUM_GRID_IMAGES)
        originals = torch.stack([val.image(i * stride) for i in range(min(NUM_GRID_IMAGES, len(val)))])
        decoded = to_uint8(rae.reconstruct(to_float(originals.to(run.device))))
        save_pairs(originals, decoded, run.dir / "samples" / f"{STAGE}-{images:09d}.png")
