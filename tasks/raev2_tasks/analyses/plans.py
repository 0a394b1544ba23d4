"""What is compared: variants of a recipe, which of them should be better, and where each stands in a plot.

insight-1       K layers and how they become one map: sum, mean, random projection
insight-2       latents of an encoder (RAE) against alignment with it (REPA) on pixels, both, neither
time-shift      dimension-dependent time shift against none
decoder-noise   noise on tokens while the decoder trains; every decoder gets the latents of one generator
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from raev2.errors import SpecError
from raev2.spec import EncoderSpec, NoGuidance, PixelSpec, RepaSpec, RunSpec, TokenizerSpec
from raev2.training.preflight import encoder_facts

STRENGTHS = (0.0, 0.4, 0.8, 1.2, 1.6)
JOINS = ("sum", "mean", "random_projection")


@dataclass(frozen=True)
class Plan:
    """Variants of a recipe by label.

    base            the recipe as it was asked for; tokenizers are trained with it, so analyses share them
    pairs           of labels: is the first one better?
    metrics         what the pairs are compared in, the most important one first
    one_generator   every decoder gets the latents of one generator
    baseline        its last score is the level that the others are timed to; empty: none
    lines           lines of a plot through labels; empty: scores over training
    x               place of a variant in that plot: the name of a score, or a place by label
    x_label         what that place is
    """

    title: str
    base: RunSpec
    variants: Mapping[str, RunSpec]
    pairs: Sequence[tuple[str, str]]
    metrics: Sequence[str] = ("fd_micro",)
    _: KW_ONLY
    one_generator: bool = False
    baseline: str = ""
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    x: str | Mapping[str, float] = ""
    x_label: str = "images seen"


def layers(spec: RunSpec, counts: Sequence[int] = ()) -> Plan:
    """Insight 1; with `counts`: these numbers of layers by sum alone, and a plot over them."""
    spec, tokenizer = unguided(spec), rae_of("insight-1", spec)
    depth = encoder_facts(tokenizer.encoder.name).depth
    if counts and not 0 < min(counts) <= max(counts) <= depth:
        raise SpecError("--layers", "no such numbers of last layers", got=[*counts], expected=f"1 to {depth}")

    def last(count: int, join: str = "sum") -> RunSpec:
        encoder = tokenizer.encoder.replace(layers=tuple(range(depth - count, depth)), aggregate=join)
        return spec.replace(tokenizer=tokenizer.replace(encoder=encoder))

    title, metrics = "Insight 1: the last K layers as one map", ("psnr", "rfd_micro", "fd_micro")
    if counts:
        x = {f"K = {count}": float(count) for count in sorted({*counts})}
        variants = {name: last(int(count)) for name, count in x.items()}
        first, *others = variants
        return Plan(
            title, spec, variants, [(other, first) for other in others], metrics,
            lines={"sum": [*variants]}, x=x, x_label="K",
        )  # fmt: skip
    counts = sorted({1, 2, depth // 2, depth})
    names = {join: f"K = {depth}, {join.replace('_', ' ')}" for join in JOINS}
    variants = {f"K = {count}": last(count) for count in counts[:-1]}
    variants |= {name: last(depth, join) for join, name in names.items()}
    best = names["sum"]
    lines = {"sum": [*variants][: len(counts)], **{join.replace("_", " "): [names[join]] for join in JOINS[1:]}}
    return Plan(
        title, spec, variants, [(best, "K = 1"), *((best, names[join]) for join in JOINS[1:])],
        metrics, lines=lines, x="psnr", x_label="psnr, dB",
    )  # fmt: skip


def latents_or_alignment(spec: RunSpec) -> Plan:
    """Insight 2."""
    spec, tokenizer = unguided(spec), rae_of("insight-2", spec)
    target = EncoderSpec(name=tokenizer.encoder.name)
    facts = encoder_facts(target.name)

    def rae(count: int) -> RunSpec:
        encoder = tokenizer.encoder.replace(layers=tuple(range(facts.depth - count, facts.depth)))
        return spec.replace(tokenizer=tokenizer.replace(encoder=encoder))

    def aligned(variant: RunSpec) -> RunSpec:
        network = variant.generator.replace(repa_depth=max(1, variant.generator.depth // 2), repa_dim=facts.width)
        training = variant.generator_training.replace(repa=RepaSpec(encoder=target))
        return variant.replace(generator=network, generator_training=training)

    every, pixels = f"RAE, K = {facts.depth}", spec.replace(
        tokenizer=PixelSpec(image_size=tokenizer.image_size),
        generator=spec.generator.replace(patch_size=tokenizer.decoder.patch_size),
    )  # fmt: skip
    variants = {
        every: rae(facts.depth), f"{every} + REPA": aligned(rae(facts.depth)), "RAE, K = 1": rae(1),
        "REPA on pixels": aligned(pixels), "pixels": pixels,
    }  # fmt: skip
    pairs = [(f"{every} + REPA", every), (f"{every} + REPA", "REPA on pixels"), (every, "pixels")]
    pairs += [("REPA on pixels", "pixels"), (every, "RAE, K = 1"), (every, "REPA on pixels")]
    return Plan("Insight 2: latents of an encoder, alignment with it, both", spec, variants, pairs, baseline="pixels")


def time_shift(spec: RunSpec) -> Plan:
    """The time shift by the latent's dimension, or none."""
    spec, by_dimension, none = unguided(spec), "sqrt(dimension / 4096)", "no shift"
    variants = {
        by_dimension: spec.replace(flow=spec.flow.replace(time_shift=None)),
        none: spec.replace(flow=spec.flow.replace(time_shift=1.0)),
    }
    return Plan("Time shift on and off", spec, variants, [(by_dimension, none)])


def decoder_noise(spec: RunSpec) -> Plan:
    """Strength of the noise, in standard deviations of the tokens."""
    tokenizer = rae_of("decoder-noise", spec)
    x = {f"tau {tau:g}": tau for tau in STRENGTHS}
    variants = {name: spec.replace(tokenizer=tokenizer.replace(noise_tau=tau)) for name, tau in x.items()}
    weakest, *others = variants
    return Plan(
        "Noise on tokens while the decoder trains, in their standard deviation",
        spec, variants, [(other, weakest) for other in others], ("fd_micro", "psnr"),
        one_generator=True, lines={"tau": [*variants]}, x=x, x_label="tau",
    )  # fmt: skip


PLANS: dict[str, Callable[..., Plan]] = {
    "insight-1": layers,
    "insight-2": latents_or_alignment,
    "time-shift": time_shift,
    "decoder-noise": decoder_noise,
}


def unguided(spec: RunSpec) -> RunSpec:
    """Without a base head and without guidance, so that nothing but the variant differs."""
    return spec.replace(
        generator=spec.generator.replace(base_head_depth=None), sampling=spec.sampling.replace(guidance=NoGuidance())
    )


def rae_of(name: str, spec: RunSpec) -> TokenizerSpec:
    """The tokenizer of a recipe that has an encoder; SpecError for another one."""
    if not isinstance(spec.tokenizer, TokenizerSpec):
        raise SpecError(f"raev2 analyse {name}", "needs a recipe with an RAE tokenizer", got=spec.tokenizer.kind)
    return spec.tokenizer
