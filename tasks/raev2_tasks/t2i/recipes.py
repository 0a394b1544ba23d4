"""Named runs. `quickstart` and `laptop` run on two CPU cores with embedded data; the others are the published systems.

A published recipe names its source; numbers of papers stand in docs/results.md, marked as quoted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from raev2.spec import (
    CFG,
    AdamWSpec,
    DataSpec,
    DDTSpec,
    EncoderSpec,
    EvaluationSpec,
    FlowSpec,
    GeneratorTrainingSpec,
    MuonSpec,
    RunSpec,
    SamplingSpec,
    ScheduleSpec,
)
from raev2_tasks.recipe_parts import (
    EMBEDDED_TOKENIZER,
    NOT_RUN,
    SHORT_TOKENIZER_TRAINING,
    SMALL_DDT,
    dinov3l_tokenizer,
    published_tokenizer,
    published_tokenizer_training,
    tiny_run,
    trunk_size,
)
from raev2_tasks.t2i.spec import CaptionSpec, ScratchEncoderSpec, TextEncoderSpec, TextToImageSpec

QWEN, T5_XL, GEMMA = "Qwen/Qwen3-0.6B", "google/t5-v1_1-xl", "google/gemma-2-2b"
VIRTUAL_EPOCH = 10_000 * 1024  # images: 10,000 steps of 1,024
EMBEDDED_MIX = {"template": 0.7, "short": 0.2, "long": 0.1, "alt": 0.2}
EMBEDDED_WEIGHTS = {"s12": 0.5, "g60": 0.3, "emo": 0.1, "txt": 0.1}


def quickstart() -> RunSpec:
    """Shapes, emoji scenes, words and emoji names at 64 px: the whole pipeline in minutes on two CPU cores."""
    return RunSpec(
        recipe="quickstart",
        summary="captioned scenes at 64 px, embedded encoder, small text encoder of its own: everything in minutes",
        cost="2 CPU cores without AMX, 14 min: measured",
        task=TextToImageSpec(
            text_encoder=TextEncoderSpec(max_tokens=64),
            captions=CaptionSpec(mix=EMBEDDED_MIX),
            weights=EMBEDDED_WEIGHTS,
        ),
        data=DataSpec(
            dir="data/t2i-quickstart",
            recipe="t2i-embedded",
            options={"num_s12": "4000", "num_g60": "4000", "num_txt": "1000", "per_emoji": "1", "num_val": "250"},
            cache=True,
        ),
        tokenizer=EMBEDDED_TOKENIZER,
        tokenizer_training=SHORT_TOKENIZER_TRAINING,
        generator=SMALL_DDT,
        # The rule gives 1.7. In scenes of flat colours neighbours repeat each other, so that what is where shows
        # through more noise than in photographs; it is decided above t = 0.8.
        flow=FlowSpec(time_shift=6.0),
        generator_training=GeneratorTrainingSpec(
            images=13_600,
            batch_size=16,
            optimizer=MuonSpec(),
            schedule=ScheduleSpec(lr=2e-3, final_lr=2e-4, decay="linear", decay_start_images=6_800),
            ema_decays=(0.99,),
            sample_every_images=3_400,
            save_every_images=6_800,
            latent_cache=True,
        ),
        sampling=SamplingSpec(steps=20, guidance=CFG(scale=3.0)),
        evaluation=EvaluationSpec(
            protocols=("reconstruction-micro", "generation-micro", "retrieval-micro", "compositional-s12"),
            num_samples=128,
        ),
    )


def selftest() -> RunSpec:
    """A few captioned shapes and a tiny text encoder: the whole pipeline in seconds."""
    base = quickstart()
    data = DataSpec(
        dir="data/selftest-scenes",
        recipe="t2i-embedded",
        options={"num_s12": "16", "num_g60": "0", "num_txt": "0", "per_emoji": "0", "num_val": "8"},
    )
    encoder = TextEncoderSpec(max_tokens=64, scratch=ScratchEncoderSpec(width=32, depth=1, num_heads=2))
    task = base.task.replace(text_encoder=encoder, weights={})
    return tiny_run(base.replace(task=task), data, ("reconstruction-micro", "generation-micro"), "generation-micro")


def laptop() -> RunSpec:
    """A larger generator, trained longer, on coloured shapes alone: the one source that 90 minutes can learn."""
    base = quickstart()
    return base.replace(
        recipe="laptop",
        summary="captioned scenes of coloured shapes at 64 px, longer training, within 90 minutes on 2 cores",
        cost="2 CPU cores without AMX, 86 min: measured in two parts",
        task=base.task.replace(weights={}),
        data=DataSpec(
            dir="data/t2i-laptop",
            recipe="t2i-embedded",
            options={"num_s12": "32000", "num_g60": "0", "num_txt": "0", "per_emoji": "0"},
            cache=True,
        ),
        # With 0.8 fewer shapes are recognised after the tokenizer, and generation is no better: docs/log.md.
        tokenizer=base.tokenizer.replace(noise_tau=0.2),
        tokenizer_training=base.tokenizer_training.replace(
            images=12_800,
            ema_decay=0.995,
            save_every_images=6_400,
        ),
        generator=SMALL_DDT.replace(depth=8, base_head_depth=4),
        generator_training=base.generator_training.replace(
            images=128_000,
            schedule=ScheduleSpec(lr=2e-3, final_lr=1e-4, decay="linear", decay_start_images=32_000),
            ema_decays=(0.998,),
            log_every_steps=50,
            sample_every_images=16_000,
            save_every_images=8_000,
        ),
        # From 3 to 9 as many pictures are right; with 4 they are nearer to real ones than with 9: docs/log.md.
        sampling=base.sampling.replace(guidance=CFG(scale=4.0)),
        evaluation=base.evaluation.replace(num_samples=768),  # s12: every prompt four times
    )


def own_data() -> RunSpec:
    """The quickstart's networks for your own captioned pictures: every source and every caption as it comes."""
    base = quickstart()
    return base.replace(
        recipe="own-data",
        summary="quickstart sizes for your own captioned pictures in data/captioned, 64 px",
        cost="",
        task=base.task.replace(captions=CaptionSpec(), weights={}),
        data=DataSpec(dir="data/captioned"),
        generator_training=base.generator_training.replace(latent_cache=False),
        evaluation=base.evaluation.replace(protocols=("reconstruction-micro", "generation-micro", "retrieval-micro")),
    )


# Published systems


def frozen(name: str) -> TextToImageSpec:
    """A frozen text encoder with 256 tokens. Qwen3 has no token for the empty prompt, so nothing is visible then."""
    return TextToImageSpec(text_encoder=TextEncoderSpec(name=name, max_tokens=256))


def raev2_dinov3l(label: str, summary: str = "") -> RunSpec:
    """RAEv2 on DINOv3-L with Qwen3-0.6B: the released text-to-image configuration (arXiv 2605.18324)."""
    return RunSpec(
        recipe=f"raev2-dinov3l-{label}",
        summary=summary,
        cost=NOT_RUN,
        task=frozen(QWEN),
        data=DataSpec(dir="data/blip3o-256", num_workers=8),
        tokenizer=dinov3l_tokenizer(label),
        # Published: decoder and latent statistics of the ImageNet run, although a decoder for a wider domain exists.
        tokenizer_from=f"runs/imagenet/raev2-dinov3l-{label}/tokenizer",
        tokenizer_training=published_tokenizer_training(1_280_000),
        generator=DDTSpec(**trunk_size("xl1440"), base_head_depth=8),
        generator_training=GeneratorTrainingSpec(
            images=20 * VIRTUAL_EPOCH,
            batch_size=1024,
            optimizer=MuonSpec(routing="all_matrices"),
            schedule=ScheduleSpec(
                lr=2e-4, final_lr=2e-5, decay="linear",
                decay_start_images=5 * VIRTUAL_EPOCH, decay_end_images=15 * VIRTUAL_EPOCH,
            ),
            ema_decays=(0.9995,),
            log_every_steps=100,
            sample_every_images=VIRTUAL_EPOCH // 4,
            save_every_images=VIRTUAL_EPOCH // 4,
        ),
        sampling=SamplingSpec(steps=50, guidance=CFG(scale=6.0)),
        evaluation=EvaluationSpec(protocols=("reconstruction-inception", "generation-inception"), num_samples=30_000),
    )  # fmt: skip


def raev2_siglip2b(text_encoder: str = QWEN, suffix: str = "") -> RunSpec:
    """SigLIP-2 B latents (768 x 16 x 16): the twin of diffusion-bench's text-to-image run (arXiv 2606.24888)."""
    base = raev2_dinov3l("k1")
    return base.replace(
        recipe=f"raev2-siglip2b{suffix}",
        summary=f"SigLIP-2 B latents, {text_encoder.rpartition('/')[2]}, sizes of diffusion-bench (arXiv 2606.24888)",
        task=frozen(text_encoder),
        tokenizer=published_tokenizer(EncoderSpec(name="siglip2-b", norm="plain")),
        tokenizer_from=None,
        generator=DDTSpec(**trunk_size("xl")),
        flow=FlowSpec(prediction="velocity"),
        generator_training=base.generator_training.replace(
            images=10 * VIRTUAL_EPOCH,
            optimizer=AdamWSpec(),
            schedule=ScheduleSpec(lr=2e-4, final_lr=2e-4),  # published: a decay so long that the rate stays at 1.9e-4
        ),
    )


def raev2_siglip2b_finetune() -> RunSpec:
    """Second stage on a small set of better pictures: the weights of `raev2-siglip2b`, a tenth of its learning rate."""
    base = raev2_siglip2b()
    return base.replace(
        recipe="raev2-siglip2b-finetune",
        summary="raev2-siglip2b continued on BLIP3o-60k; our settings, the published ones are not known",
        data=DataSpec(dir="data/blip3o-60k-256", num_workers=8),
        tokenizer_from="runs/t2i/raev2-siglip2b/tokenizer",
        generator_from="runs/t2i/raev2-siglip2b/generator",
        generator_training=base.generator_training.replace(
            images=64 * 57_553,
            batch_size=256,
            schedule=ScheduleSpec(lr=2e-5, final_lr=2e-6, warmup_images=25_600),
            sample_every_images=4 * 57_553,
            save_every_images=4 * 57_553,
        ),
    )


RECIPES: dict[str, Callable[[], RunSpec]] = {
    "quickstart": quickstart,
    "laptop": laptop,
    "selftest": selftest,
    "own-data": own_data,
    "raev2-siglip2b": raev2_siglip2b,
    "raev2-siglip2b-t5xl": partial(raev2_siglip2b, T5_XL, "-t5xl"),
    "raev2-siglip2b-gemma2": partial(raev2_siglip2b, GEMMA, "-gemma2"),
    "raev2-siglip2b-finetune": raev2_siglip2b_finetune,
    "raev2-dinov3l-k1": partial(raev2_dinov3l, "k1", "RAEv2, last layer, Qwen3-0.6B (arXiv 2605.18324)"),
    "raev2-dinov3l-k7": partial(raev2_dinov3l, "k7", "RAEv2, 7 layers, Qwen3-0.6B (arXiv 2605.18324)"),
    "raev2-dinov3l-k23": partial(raev2_dinov3l, "k23", "RAEv2, 23 layers, Qwen3-0.6B (arXiv 2605.18324)"),
}
