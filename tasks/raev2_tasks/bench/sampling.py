"""Sampling with each kind of guidance, the public `sample` beside the raw loop, encoding and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from raev2.nn import autocast
from raev2.sampler import noise_for, sample, sample_latents
from raev2.spec import CFG, Guidance, InternalGuidance, NoGuidance, SamplingSpec
from raev2.tokenizer.rae import RAE
from raev2_tasks.bench.measure import Outputs, Setting, Work
from raev2_tasks.bench.training import DTYPES, build_generator, tokenizer_of

STEPS, IMAGES = 25, 16
GUIDANCE: dict[str, Guidance] = {
    "none": NoGuidance(),
    "cfg": CFG(scale=2.0),
    "cfg in [0.1, 0.6]": CFG(scale=2.0, interval=(0.1, 0.6)),
    "internal": InternalGuidance(scale=1.5),
}


class NoDecoder:
    """In the place of a tokenizer: three channels of the latents are the pictures."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The first three."""
        return latents[:, :3]


def sampling(setting: Setting) -> Iterator[Work]:
    """Latents by the raw loop, all at once; by `sample`, which promises the same bits for every batch size; of one."""

    def network() -> Any:
        """Another one for each row: torch keeps eight compiled versions of a block, and not those of all rows."""
        return build_generator(setting).eval()

    def cond(num: int) -> dict[str, torch.Tensor]:
        return {"label": torch.arange(num, device=setting.device)}

    def loop(parts: Any, guidance: Guidance, precision: str, num: int) -> Callable[[], Outputs]:
        module, integrate = parts
        given, noise = cond(num), noise_for(0, range(num), module.latent_shape).to(setting.device)

        def run() -> Outputs:
            with autocast(precision, setting.device):
                return [integrate(module, given, noise, SamplingSpec(steps=STEPS, guidance=guidance))]

        return run

    def public(parts: Any, precision: str, num: int) -> Callable[[], Outputs]:
        module, draw = parts

        def run() -> Outputs:
            with autocast(precision, setting.device):
                return [draw(module, NoDecoder(), cond(num), STEPS)]

        return run

    for precision, dtype in DTYPES.items():
        for num in (IMAGES, 1):
            where = f"{precision}, {num} at once"
            make = partial(loop, guidance=NoGuidance(), precision=precision, num=num)
            yield Work(f"loop, {where}", num, "images", (network(), sample_latents), make, dtype)
            make = partial(public, precision=precision, num=num)
            yield Work(f"sample(), {where}", num, "images", (network(), sample), make, dtype)
    for name, guidance in GUIDANCE.items():
        make = partial(loop, guidance=guidance, precision="fp32", num=IMAGES)
        yield Work(f"loop, guidance {name}", IMAGES, "images", (network(), sample_latents), make)


def encode(setting: Setting) -> Iterator[Work]:
    """Pictures to tokens."""
    yield from _tokenizer(setting, lambda rae, images, latents: rae.tokens(images))


def decode(setting: Setting) -> Iterator[Work]:
    """Latents to pictures."""
    yield from _tokenizer(setting, lambda rae, images, latents: rae.decode(latents))


def _tokenizer(setting: Setting, compute: Callable[..., torch.Tensor]) -> Iterator[Work]:
    spec = tokenizer_of(setting)
    torch.manual_seed(0)
    rae = RAE.from_spec(spec).to(setting.device).eval()
    images = torch.rand(IMAGES, 3, *spec.image_size, device=setting.device)
    latents = torch.randn(IMAGES, *rae.latent_shape, device=setting.device)

    def make(module: Any, precision: str) -> Callable[[], Outputs]:
        @torch.no_grad()
        def run() -> Outputs:
            with autocast(precision, setting.device):
                return [compute(module, images, latents)]

        return run

    for precision, dtype in DTYPES.items():
        make_this = partial(make, precision=precision)
        yield Work(f"{spec.encoder.name}, {precision}", IMAGES, "images", rae, make_this, dtype)
