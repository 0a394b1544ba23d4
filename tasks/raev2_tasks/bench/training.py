"""Steps of both training stages, optimizers, and what a step costs as tokens, batch and width grow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raev2.batch import ModelOutput
from raev2.flow import interpolate, training_loss
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.nn import autocast
from raev2.spec import AdamWSpec, DDTSpec, FlowSpec, MuonSpec, ParallelSpec, TokenizerSpec
from raev2.tokenizer.discriminator import build_discriminator
from raev2.tokenizer.encoders import FrozenEncoder
from raev2.tokenizer.losses import (
    augmentation,
    build_perceptual_loss,
    diffaug,
    hinge_loss,
    shared_layers,
)
from raev2.tokenizer.rae import RAE
from raev2.train_tokenizer import DecoderLosses
from raev2.training.ema import EMA
from raev2.training.optim import build_optimizer, fast_dtype
from raev2.training.parallel import parallelise
from raev2.training.run import attention_kernels
from raev2_tasks.bench.measure import Outputs, Setting, Work
from raev2_tasks.recipe_parts import (
    EMBEDDED_TOKENIZER,
    SHORT_TOKENIZER_TRAINING,
    SMALL_DDT,
    dinov3l_tokenizer,
    published_tokenizer_training,
    trunk_size,
)

Shape = tuple[int, int, int]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IMAGES = 16  # of a step of stage 1
BASE = DDTSpec(width=384, depth=12, num_heads=6, head_width=768, head_depth=2, head_num_heads=12, base_head_depth=6)
PUBLISHED = DDTSpec(**trunk_size("xl1440"), base_head_depth=8)  # RAEv2
# Network, latents and batch size of each `--size`; small is that of the embedded recipes.
SIZES: dict[str, tuple[Any, Shape, int]] = {
    "small": (SMALL_DDT, (192, 8, 8), 64),
    "base": (BASE, (768, 16, 16), 8),
    "published": (PUBLISHED, (1024, 16, 16), 64),
}


def build_generator(setting: Setting, network: Any = None, latent_shape: Shape | None = None) -> Generator:
    """A generator with random weights; those that start at zero are drawn too, so that its outputs say something."""
    torch.manual_seed(0)
    spec, shape, _ = SIZES[setting.size]
    generator = Generator(network or spec, LabelCondition(num_classes=1000), FlowSpec(), latent_shape or shape)
    for parameter in generator.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    generator.to(setting.device)
    if setting.compiled:
        torch.compiler.reset()  # what was compiled for others, of which torch keeps a few
        parallelise(generator, ParallelSpec(compile=True), generator.blocks())
    return generator


def gradients(ours: Generator, batch_size: int, precision: str) -> Callable[[Any], Callable[[], list[Tensor]]]:
    """What makes, of a generator like ours, the function that computes its gradients on fixed tensors."""
    device = ours.device
    latents, noise = torch.randn(2, batch_size, *ours.latent_shape, device=device).unbind()
    cond = {"label": torch.arange(batch_size, device=device) % 1000}
    point = interpolate(latents, noise, torch.linspace(0.1, 0.9, batch_size, device=device))

    def make(module: Any) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            module.zero_grad(set_to_none=True)
            with autocast(precision, device):
                output = module(point.z_t, point.t, cond)
            output = ModelOutput(output.pred, output.base_pred)  # ours, whatever the module is
            training_loss(output, point, latents, ours.flow).total.backward()
            return [output.pred, *(value.grad for value in module.parameters() if value.grad is not None)]

        return step

    return make


def train_step(setting: Setting) -> Iterator[Work]:
    """Forward and backward of the generator; the whole step, with AdamW and averages."""
    _, _, batch_size = SIZES[setting.size]
    for precision, dtype in DTYPES.items():
        generator = build_generator(setting)
        make = gradients(generator, batch_size, precision)
        yield Work(f"forward and backward, {precision}", batch_size, "images", generator, make, dtype)
        parts = (generator, build_optimizer, EMA)
        yield Work(f"whole step, AdamW, {precision}", batch_size, "images", parts, _whole_step(make), dtype)


def _whole_step(make: Callable[[Any], Callable[[], list[Tensor]]]) -> Callable[[Any], Callable[[], list[Tensor]]]:
    def make_step(parts: Any) -> Callable[[], list[Tensor]]:
        module, build, average = parts
        optimizer, ema, compute = build(module, AdamWSpec(), 1e-6), average(module, (0.999,)), make(module)

        def step() -> list[Tensor]:
            found = compute()
            optimizer.step()
            ema.update(module, 10)
            return found

        return step

    return make_step


def optimizers(setting: Setting) -> Iterator[Work]:
    """A step of AdamW, of Muon and of the averages."""
    generator = build_generator(setting)
    gradients(generator, 2, "fp32")(generator)()

    def with_gradients(module: Any) -> Any:
        for value, ours in zip(module.parameters(), generator.parameters(), strict=True):
            value.grad = None if ours.grad is None else ours.grad.clone()
        return module

    def optimizer_step(spec: AdamWSpec | MuonSpec) -> Callable[[Any], Callable[[], Outputs]]:
        def make(parts: Any) -> Callable[[], Outputs]:
            module = with_gradients(parts[0])
            optimizer = parts[1](module, spec, 1e-4)
            return lambda: optimizer.step() or list(module.parameters())

        return make

    def average(parts: Any) -> Callable[[], Outputs]:
        module, ema = parts[0], parts[1](parts[0], (0.999,))
        return lambda: ema.update(module, 10) or list(ema.state_dict(0.999).values())

    yield Work("AdamW", 1, "steps", (generator, build_optimizer), optimizer_step(AdamWSpec()))
    yield Work("Muon", 1, "steps", (generator, build_optimizer), optimizer_step(MuonSpec()), fast_dtype(setting.device))
    yield Work("averages", 1, "steps", (generator, EMA), average)


def tokenizer_of(setting: Setting) -> TokenizerSpec:
    """The embedded tokenizer, or that of RAEv2, whose weights have to be there."""
    if setting.size == "published":
        return dinov3l_tokenizer("k7")
    return EMBEDDED_TOKENIZER.replace(decoder=EMBEDDED_TOKENIZER.decoder.replace(overlap=False))  # as others have it


def stage1_step(setting: Setting) -> Iterator[Work]:
    """Gradients of decoder and discriminator, without and with the adversary."""
    published, batch_size, device = setting.size == "published", IMAGES, setting.device
    spec, loop = tokenizer_of(setting), published_tokenizer_training(1) if published else SHORT_TOKENIZER_TRAINING
    torch.manual_seed(0)
    rae = RAE.from_spec(spec).to(device)
    perceptual = build_perceptual_loss(loop.perceptual, spec.image_size).to(device)
    assert loop.adversarial is not None
    disc = build_discriminator(loop.adversarial).to(device)
    images = torch.rand(batch_size, 3, *spec.image_size, device=device)
    draws = augmentation(batch_size, torch.Generator(device).manual_seed(0))
    num_tokens = spec.grid[0] * spec.grid[1]

    def make(parts: Any, precision: str, gan: bool) -> Callable[[], Outputs]:
        rae, perceptual, disc = parts
        disc = copy.deepcopy(disc)  # its spectral norms advance
        losses = DecoderLosses(loop, perceptual, rae.decoder.last_layer, partial(autocast, precision, device), disc)
        shared = shared_layers(perceptual, rae.encoder) if isinstance(rae.encoder, FrozenEncoder) else ()  # older code

        def step() -> Outputs:
            rae.zero_grad(set_to_none=True)
            disc.zero_grad(set_to_none=True)
            with attention_kernels(device, num_tokens):
                with autocast(precision, device):
                    seen = rae.encoder.with_layers(images, shared) if shared else (rae.tokens(images), [])
                    decoded = rae.decode_tokens(seen[0].float()).float()
                decoded.backward(losses(decoded, images, draws if gan else None, seen[1])[1])
                if gan:
                    with autocast(precision, device):
                        both = torch.cat([diffaug(images, draws), diffaug(decoded.detach(), draws)])
                        hinge_loss(*disc.train()(both).chunk(2)).backward()
            return [decoded, *(value.grad for value in rae.decoder.parameters() if value.grad is not None)]

        return step

    for precision, dtype in DTYPES.items():
        for gan in (True, False):
            name = f"{'with' if gan else 'without'} adversary, {precision}"
            make_this = partial(make, precision=precision, gan=gan)
            yield Work(name, batch_size, "images", (rae, perceptual, disc), make_this, dtype)


def growth(setting: Setting) -> Iterator[Work]:
    """Forward and backward in bf16 for more tokens, a larger batch, a wider network."""
    cases = [(f"{side**2} tokens", 192, side, 4) for side in (8, 16, 22, 24, 32)]
    cases += [(f"batch {batch}", 192, 8, batch) for batch in (1, 4, 16, 64)]
    cases += [(f"width {width}", width, 8, 16) for width in (192, 384, 768)]
    for name, width, side, batch_size in cases:
        network = SMALL_DDT.replace(width=width, num_heads=width // 64, head_width=width, head_num_heads=width // 64)
        generator = build_generator(setting, network, (192, side, side))
        yield Work(name, batch_size, "images", generator, gradients(generator, batch_size, "bf16"), torch.bfloat16)
