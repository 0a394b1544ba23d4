"""What recipes of several tasks are made of: the embedded tokenizer, sizes and settings of published systems.

Sources: RAE (arXiv 2510.11690), RAEv2 (arXiv 2605.18324).
"""

from __future__ import annotations

from typing import Any

from raev2.spec import (
    AdversarialSpec,
    DataSpec,
    DDTSpec,
    DecoderSpec,
    EncoderSpec,
    EvaluationSpec,
    FeatureLoss,
    LPIPSLoss,
    MuonSpec,
    RunSpec,
    SamplingSpec,
    ScheduleSpec,
    TokenizerSpec,
    TokenizerTrainingSpec,
)
from raev2.tokenizer.decoder_table import decoder_size

# Embedded: two CPU cores, minutes.

EMBEDDED_TOKENIZER = TokenizerSpec(
    encoder=EncoderSpec(name="micro", layers=(0, 1, 2, 3, 4, 5)),
    # Published: patches side by side. After minutes of training those show as a grid, see docs/decisions/0010.
    decoder=decoder_size("micro", patch_size=8).replace(overlap=True),
    grid=(8, 8),
)

SHORT_TOKENIZER_TRAINING = TokenizerTrainingSpec(
    images=8_000,
    batch_size=32,
    optimizer=MuonSpec(),  # published: AdamW; in so short a training Muon halves the error
    schedule=ScheduleSpec(lr=2e-3, final_lr=1e-4, warmup_images=960),
    perceptual=FeatureLoss(weight=0.5),
    # Published: weight 0.75 from epoch 8 of 16. In so short a training a strong adversary only adds grain.
    adversarial=AdversarialSpec(weight=0.2, disc_start=0.6, gan_start=0.7),
    ema_decay=0.99,
    sample_every_images=3_200,
    save_every_images=8_000,
)

SMALL_DDT = DDTSpec(  # the head must be at least as wide as a latent token (192), or it cannot fit one picture
    width=192, depth=6, num_heads=3, head_width=256, head_depth=2, head_num_heads=4, base_head_depth=3
)

# Published.

DINOV3L_LAYERS: dict[str, tuple[int, ...]] = {  # by label; k1 is the plain encoder
    "k1": (),
    "k7": (11, 13, 15, 17, 19, 21, 23),
    "k23": tuple(range(1, 24)),
}
NOT_RUN = "GPUs; not run here"  # cost of the published systems
TRUNK_SIZES = {
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
    "xl1440": (1440, 28, 20),
}


def trunk_size(size: str) -> dict[str, int]:
    """Width, depth and heads of a published trunk."""
    width, depth, num_heads = TRUNK_SIZES[size]
    return {"width": width, "depth": depth, "num_heads": num_heads}


def dinov3l_tokenizer(label: str) -> TokenizerSpec:
    """The tokenizer of RAEv2 with the layers of `DINOV3L_LAYERS`.

    The papers say "sum of the last K layers"; the released DINOv3 models take the mean of these blocks and add the
    token mean of the last one.
    """
    layers = DINOV3L_LAYERS[label]
    return published_tokenizer(
        EncoderSpec(name="dinov3-l16", layers=layers, aggregate="mean", pooled_term=bool(layers))
    )


def published_tokenizer(encoder: EncoderSpec, grid: tuple[int, int] = (16, 16)) -> TokenizerSpec:
    """An encoder with the decoder of the papers, trained with the absolute noise of the released code."""
    return TokenizerSpec(encoder=encoder, decoder=decoder_size("XL"), grid=grid, noise_unit="tokens")


def published_tokenizer_training(epoch: int, sample_every_images: int = 2_500 * 512) -> TokenizerTrainingSpec:
    """Stage 1 of RAE and RAEv2: 16 epochs, batch 512, discriminator from epoch 6, its loss from epoch 8.

    epoch   images of an epoch
    """
    return TokenizerTrainingSpec(
        images=16 * epoch,
        batch_size=512,
        schedule=ScheduleSpec(lr=2e-4, final_lr=2e-5, warmup_images=epoch),
        clip_grad_norm=None,
        perceptual=LPIPSLoss(),
        adversarial=AdversarialSpec(encoder="dino-s8", layers=(2, 5, 8, 11), input_size=224),
        ema_decay=0.9978,
        log_every_steps=100,
        sample_every_images=sample_every_images,
        save_every_images=epoch,
    )


# For `raev2 selftest`: seconds.


def tiny_run(spec: RunSpec, data: DataSpec, protocols: tuple[str, ...], in_training: str) -> RunSpec:
    """A recipe with tiny networks and a few steps, every loss in use, in float32: what `raev2 selftest` breaks."""
    often: dict[str, Any] = {
        "batch_size": 2, "schedule": ScheduleSpec(lr=1e-3, final_lr=1e-4), "log_every_steps": 1,
        "save_every_images": 4, "sample_every_images": 4, "keep_checkpoints": 2,
    }  # fmt: skip
    return spec.replace(
        recipe="selftest",
        summary="tiny networks, a few steps: what `raev2 selftest` kills, damages and starves; seconds",
        cost="seconds on a CPU",
        data=data,
        tokenizer=spec.tokenizer.replace(
            decoder=DecoderSpec(width=64, depth=2, num_heads=2, mlp_dim=128, patch_size=8)
        ),
        tokenizer_training=SHORT_TOKENIZER_TRAINING.replace(
            images=12, ema_decay=0.5, perceptual=FeatureLoss(layers=(0, 5)),
            adversarial=AdversarialSpec(layers=(1, 5), kernel_size=3, disc_start=0.0, gan_start=0.5), **often,
        ),
        generator=DDTSpec(
            width=32, depth=2, num_heads=2, head_width=64, head_depth=1, head_num_heads=2, base_head_depth=1
        ),
        generator_training=spec.generator_training.replace(
            images=12, ema_decays=(0.5, 0.9), eval_every_images=8, latent_cache=False, **often
        ),
        sampling=SamplingSpec(steps=2, batch_size=16),
        evaluation=EvaluationSpec(protocols=protocols, in_training=(in_training,), num_samples=8),
        precision="fp32",
    )  # fmt: skip
