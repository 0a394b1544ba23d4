"""Named runs. `quickstart` and `laptop` run on two CPU cores with embedded data; the others are the published systems.

A published recipe names its source; numbers of papers stand in docs/results.md, marked as quoted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from raev2.spec import (
    CFG,
    AdamWSpec,
    AutoGuidance,
    DataSpec,
    DDTSpec,
    DiTSpec,
    EncoderSpec,
    EvaluationSpec,
    ExpectedSpec,
    FlowSpec,
    GeneratorTrainingSpec,
    InternalGuidance,
    MuonSpec,
    NoGuidance,
    PixelSpec,
    RepaSpec,
    RunSpec,
    SamplingSpec,
    ScheduleSpec,
    VAESpec,
)
from raev2.tokenizer.decoder_table import decoder_size
from raev2_tasks.imagenet.spec import ClassToImageSpec
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

IMAGENET_TRAIN = 1_281_167  # images of an epoch


def expected(guided: str, **values: float) -> tuple[ExpectedSpec, ...]:
    """Printed numbers after 80 epochs: `fid` of the generator, the others of the tokenizer, on validation pictures."""
    source = "RAEv2, arXiv 2605.18324, and its project page"
    return tuple(
        ExpectedSpec(
            protocol="generation-inception" if metric == "fid" else "reconstruction-inception",
            metric=metric, value=value, tolerance=TOLERANCE[metric],
            source=f"{source}: {guided}" if metric == "fid" else source,
        )
        for metric, value in values.items()
    )  # fmt: skip


# How far an evaluation may be from a printed number. Our choice: the papers give no spread, other people's evaluations
# of released checkpoints are 0.03 to 0.13 away in gFID, and the reference set alone is worth up to 0.1.
TOLERANCE = {"fid": 0.1, "rfid": 0.05, "psnr": 0.3}
EXPECTED = {
    "k7": expected("internal guidance 1.78 on [0.1, 1], 100 steps", fid=1.06, psnr=22.57),
    "k23": expected("internal guidance, its scale is not published", fid=1.25, psnr=27.03, rfid=0.18),
}


def quickstart() -> RunSpec:
    """Emoji pictures at 64 px: the whole pipeline in minutes on two CPU cores."""
    return RunSpec(
        recipe="quickstart",
        summary="emoji at 64 px, embedded encoder, all 6 layers: both stages, samples, metrics and report in minutes",
        cost="2 CPU cores without AMX, 9 min: measured",
        task=ClassToImageSpec(),
        data=DataSpec(dir="data/emoji", recipe="emoji", cache=True),
        tokenizer=EMBEDDED_TOKENIZER,
        tokenizer_training=SHORT_TOKENIZER_TRAINING,
        generator=SMALL_DDT,
        flow=FlowSpec(time_shift=4.0),  # 1.7 by the rule; measured, see docs/log.md
        generator_training=GeneratorTrainingSpec(
            images=17_600,
            batch_size=32,
            optimizer=MuonSpec(),
            schedule=ScheduleSpec(lr=2e-3, final_lr=2e-4, decay="linear", decay_start_images=8_800),
            ema_decays=(0.99,),
            sample_every_images=4_400,
            eval_every_images=17_600,
            save_every_images=8_800,
            latent_cache=True,
        ),
        sampling=SamplingSpec(steps=20, guidance=InternalGuidance(scale=1.5)),
        evaluation=EvaluationSpec(
            protocols=("reconstruction-micro", "generation-micro"),
            in_training=("generation-micro",),
            num_samples=354,  # the whole validation split: all 70 classes
            compare_guidance=(NoGuidance(),),
        ),
    )


def selftest() -> RunSpec:
    """Coloured shapes: the whole pipeline in seconds."""
    data = DataSpec(dir="data/selftest", recipe="synthetic", options={"num_train": "16", "num_val": "8"})
    return tiny_run(quickstart(), data, ("reconstruction-micro", "generation-micro"), "generation-micro")


def laptop() -> RunSpec:
    """The quickstart with larger networks and longer training: recognisable emoji."""
    base = quickstart()
    return base.replace(
        recipe="laptop",
        summary="emoji at 64 px, longer training, within 90 minutes on 2 cores",
        cost="2 CPU cores without AMX, 56 min: measured",
        tokenizer_training=base.tokenizer_training.replace(
            images=25_600,
            ema_decay=0.998,
            sample_every_images=6_400,
            save_every_images=6_400,
        ),
        generator=DDTSpec(
            width=192, depth=8, num_heads=3, head_width=384, head_depth=2, head_num_heads=6, base_head_depth=4
        ),
        generator_training=base.generator_training.replace(
            images=102_400,
            batch_size=64,
            schedule=ScheduleSpec(lr=2e-3, final_lr=1e-4, decay="linear", decay_start_images=51_200),
            ema_decays=(0.998,),
            log_every_steps=20,
            sample_every_images=12_800,
            eval_every_images=25_600,
            save_every_images=12_800,
        ),
        evaluation=base.evaluation.replace(compare_guidance=(NoGuidance(), CFG(scale=2.0))),
    )


# Your own photographs: one recipe for each size of machine, lengths for some thousands of pictures.
# `raev2 imagenet own-photos` adapts the lengths to a dataset.


def photos(size: int) -> DataSpec:
    """`data/photos`; set `data.options.src` to your folder, or give another dataset folder with --data."""
    return DataSpec(dir="data/photos", recipe="image-folder", options={"size": str(size)})


def own_photos_cpu() -> RunSpec:
    """The quickstart on your own pictures."""
    base = quickstart()
    return base.replace(
        recipe="own-photos-cpu",
        summary="your own pictures at 64 px with the embedded encoder, which knows emoji alone",
        cost="2 CPU cores without AMX, 9 min measured on the emoji, and one evaluation more",
        data=photos(64).replace(cache=True),
        generator_training=base.generator_training.replace(eval_every_images=8_800),
        evaluation=base.evaluation.replace(num_samples=512),
    )


OWN_PHOTOS = {  # GPU memory in GB: encoder, decoder, trunk; images at once in stage 1 and in stage 2
    12: ("dinov2-s", "B", "s", 16, 32),
    24: ("dinov2-b", "L", "b", 16, 64),
    80: ("dinov2-b", "XL", "l", 64, 128),
}


def own_photos(memory: int) -> RunSpec:
    """Your own photographs at 256 px on one GPU with so many GB: DINOv2, DiT^DH with the choices of RAEv2."""
    encoder, decoder, trunk, *at_once = OWN_PHOTOS[memory]
    base, images = raev2_dinov3l("k1"), (1_024_000, 4_096_000)
    tokenizer, generator = base.tokenizer_training, base.generator_training
    every = [{"sample_every_images": total // 10, "save_every_images": total // 10} for total in images]
    return base.replace(
        recipe=f"own-photos-{memory}gb",
        summary=f"your own photographs at 256 px on one GPU with {memory} GB",
        cost=NOT_RUN,
        task=ClassToImageSpec(),
        data=photos(256).replace(horizontal_flip=True, num_workers=8),
        tokenizer=published_tokenizer(EncoderSpec(name=encoder)).replace(decoder=decoder_size(decoder)),
        tokenizer_training=tokenizer.replace(
            images=images[0], batch_size=256, micro_batch_size=at_once[0],
            schedule=tokenizer.schedule.replace(warmup_images=images[0] // 16), **every[0],
        ),
        generator=DDTSpec(**trunk_size(trunk), base_head_depth=4),
        generator_training=generator.replace(
            images=images[1], batch_size=256, micro_batch_size=at_once[1], eval_every_images=images[1] // 4,
            schedule=ScheduleSpec(lr=2e-4, final_lr=2e-5, decay="linear", decay_start_images=images[1] // 2),
            **every[1],
        ),
        sampling=SamplingSpec(steps=50, guidance=InternalGuidance(scale=1.5)),
        evaluation=base.evaluation.replace(num_samples=5_000),
    )  # fmt: skip


# Published systems


def imagenet_data(size: int) -> DataSpec:
    """ImageNet-1k, centre-cropped once; set `data.options.src` to a folder with train/ and val/ class folders."""
    return DataSpec(dir=f"data/imagenet-{size}", recipe="image-folder", options={"size": str(size)}, num_workers=8)


def raev2_dinov3l(label: str, summary: str = "") -> RunSpec:
    """RAEv2 on DINOv3-L: in-context DiT^DH with x-prediction, base head and Muon (released configuration)."""
    return RunSpec(
        recipe=f"raev2-dinov3l-{label}",
        summary=summary,
        cost=NOT_RUN,
        task=ClassToImageSpec(num_classes=1000),
        data=imagenet_data(256),
        tokenizer=dinov3l_tokenizer(label),
        tokenizer_training=published_tokenizer_training(IMAGENET_TRAIN),
        generator=DDTSpec(**trunk_size("xl1440"), base_head_depth=8),
        generator_training=GeneratorTrainingSpec(
            images=80 * IMAGENET_TRAIN,
            batch_size=1024,
            optimizer=MuonSpec(routing="all_matrices"),
            schedule=ScheduleSpec(
                lr=2e-4, final_lr=2e-5, decay="linear",
                decay_start_images=25 * IMAGENET_TRAIN, decay_end_images=50 * IMAGENET_TRAIN,
            ),
            ema_decays=(0.9995,),
            log_every_steps=100,
            sample_every_images=10 * IMAGENET_TRAIN,
            eval_every_images=20 * IMAGENET_TRAIN,
            save_every_images=IMAGENET_TRAIN,
        ),
        sampling=SamplingSpec(steps=100, guidance=InternalGuidance(scale=1.78, interval=(0.1, 1.0))),
        evaluation=EvaluationSpec(
            protocols=("reconstruction-inception", "generation-inception"),
            in_training=("generation-inception",),
            expected=EXPECTED.get(label, ()),
        ),
    )  # fmt: skip


def rae_ditdh(size: str, resolution: int) -> RunSpec:
    """RAE (v1) on DINOv2-B: adaLN DiT^DH, velocity prediction, AdamW."""
    grid = resolution // 16
    base = raev2_dinov3l("k1")
    return base.replace(
        recipe=f"rae-ditdh-{size}" + ("" if resolution == 256 else f"-{resolution}"),
        summary=f"RAE v1: DiT^DH-{size.upper()} on DINOv2-B, {resolution} px (arXiv 2510.11690)",
        data=imagenet_data(resolution).replace(horizontal_flip=True),
        tokenizer=published_tokenizer(EncoderSpec(name="dinov2-b"), (grid, grid)),
        generator=DDTSpec(
            **trunk_size(size), conditioning="adaln", qk_norm=False, abs_pos_embed=True, num_time_tokens=1
        ),
        flow=FlowSpec(prediction="velocity"),
        generator_training=base.generator_training.replace(
            images=1400 * IMAGENET_TRAIN,
            optimizer=AdamWSpec(),
            schedule=ScheduleSpec(
                lr=2e-4, final_lr=2e-5, decay="linear",
                decay_start_images=40 * IMAGENET_TRAIN, decay_end_images=800 * IMAGENET_TRAIN,
            ),
        ),
        sampling=SamplingSpec(steps=50),
    )  # fmt: skip


def lightningdit(size: str) -> RunSpec:
    """The trunk alone instead of DiT^DH, on the RAEv2 system: what the wide head is worth."""
    base = raev2_dinov3l("k1")
    return base.replace(
        recipe=f"raev2-lightningdit-{size}",
        summary=f"baseline: LightningDiT-{size.upper()} without a wide head, in-context, DINOv3-L last layer",
        generator=DiTSpec(**trunk_size(size), base_head_depth=8),
    )


def rae_lightningdit(size: str) -> RunSpec:
    """RAE (v1) with its adaLN LightningDiT."""
    base = rae_ditdh("b", 256)
    return base.replace(
        recipe=f"rae-lightningdit-{size}",
        summary=f"RAE v1 baseline: LightningDiT-{size.upper()} on DINOv2-B (arXiv 2510.11690)",
        generator=DiTSpec(
            **trunk_size(size), conditioning="adaln", qk_norm=False, abs_pos_embed=True, num_time_tokens=1
        ),
    )


# What the paper of RAE (v1) states; the recipes above are the released configurations.

WEAK = {256: 14, 512: 20}  # epochs of the DiT^DH-S that guides, by resolution
PAPER = {256: (800, 1.42), 512: (400, 1.5)}  # epochs of the DiT^DH-XL, scale of its guidance


def rae_weak(resolution: int) -> RunSpec:
    """The small generator, trained for a few epochs, that guides DiT^DH-XL."""
    base, epochs = rae_ditdh("s", resolution), WEAK[resolution]
    schedule = base.generator_training.schedule  # it decays later than this training ends
    constant = schedule.replace(final_lr=schedule.lr, decay_start_images=0, decay_end_images=None)
    return base.replace(
        recipe=f"{base.recipe}-{epochs}ep",
        summary=f"RAE v1: the weak generator of AutoGuidance, DiT^DH-S after {epochs} epochs, {resolution} px",
        generator_training=base.generator_training.replace(images=epochs * IMAGENET_TRAIN, schedule=constant),
    )


def expecting(evaluation: EvaluationSpec, fid: float, setting: str) -> EvaluationSpec:
    """With the gFID that the paper states, of labels equally often."""
    protocol, source = "generation-inception-balanced", "RAE, arXiv 2510.11690, table of ImageNet generation"
    expected = ExpectedSpec(
        protocol=protocol, metric="fid", value=fid, tolerance=TOLERANCE["fid"], source=f"{source}: {setting}"
    )
    return evaluation.replace(protocols=(*evaluation.protocols, protocol), expected=(expected,))


def rae_paper(resolution: int) -> RunSpec:
    """DiT^DH-XL as the paper reports it, guided by `rae_weak`, which is trained first on the same tokenizer."""
    base, weak, (epochs, scale) = rae_ditdh("xl", resolution), rae_weak(resolution), PAPER[resolution]
    return base.replace(
        recipe=f"{base.recipe}-{epochs}ep",
        summary=f"RAE v1 as its paper reports it: {epochs} epochs, {resolution} px, AutoGuidance by {weak.recipe}",
        tokenizer_from=f"runs/imagenet/{weak.recipe}/tokenizer",
        generator_training=base.generator_training.replace(images=epochs * IMAGENET_TRAIN),
        sampling=SamplingSpec(
            steps=50, guidance=AutoGuidance(scale=scale, weak=f"runs/imagenet/{weak.recipe}/generator")
        ),
        evaluation=expecting(base.evaluation, 1.13, f"AutoGuidance {scale}, labels equally often"),
    )  # fmt: skip


def rae_lightningdit_paper(size: str) -> RunSpec:
    """LightningDiT as the paper trains it: a constant rate, averages over 10,000 steps, DINOv2-S."""
    base = rae_lightningdit(size)
    return base.replace(
        recipe=f"rae-lightningdit-{size}-800ep",
        summary=f"RAE v1 as its paper reports it: LightningDiT-{size.upper()} on DINOv2-S, 800 epochs, constant rate",
        tokenizer=published_tokenizer(EncoderSpec(name="dinov2-s")),
        generator_training=base.generator_training.replace(
            images=800 * IMAGENET_TRAIN, schedule=ScheduleSpec(lr=2e-4, final_lr=2e-4),
            ema_decays=(0.9999,),
        ),
        evaluation=expecting(base.evaluation, 1.87, "DiT-XL on DINOv2-S, no guidance"),
    )  # fmt: skip


def decoder_upsampling(size: str) -> RunSpec:
    """RAE (v1) at 512 px from 256 tokens: the decoder draws patches of 32 pixels."""
    base = rae_ditdh(size, 256)
    return base.replace(
        recipe=f"rae-ditdh-{size}-512-up",
        summary=f"RAE v1: DiT^DH-{size.upper()}, 512 px from 256 tokens by a decoder of patch 32 (arXiv 2510.11690)",
        data=imagenet_data(512).replace(horizontal_flip=True),
        tokenizer=base.tokenizer.replace(decoder=decoder_size("XL", patch_size=32)),
    )


def vae_baseline(name: str, downsample: int, repa: bool = False) -> RunSpec:
    """The RAEv2 network on VAE latents with 256 tokens; `repa` aligns block 8 with DINOv2-B."""
    base = raev2_dinov3l("k1")
    network: dict[str, object] = {"patch_size": 16 // downsample}
    training = base.generator_training
    if repa:
        network |= {"repa_depth": 8, "repa_dim": 768}
        training = training.replace(repa=RepaSpec(encoder=EncoderSpec(name="dinov2-b"), weight=0.5))
    return base.replace(
        recipe=f"vae-{name}" + ("-repa" if repa else ""),
        summary=f"baseline: the RAEv2 network on latents of the VAE {name}" + (", with REPA" if repa else ""),
        tokenizer=VAESpec(name=name),
        generator=DDTSpec(**trunk_size("xl1440"), base_head_depth=8, **network),
        generator_training=training,
    )


def repa_paper() -> RunSpec:
    """REPA as its paper states it (arXiv 2410.06940), on the network that is here.

    Theirs: SD-VAE latents in patches of 2, velocity, 8th block through three layers to DINOv2-B by cosine, AdamW at a
    constant rate, 800 epochs, CFG 1.8 up to t = 0.7. Ours: LightningDiT-XL where they have SiT-XL, times drawn
    logit-normal and not uniform, Euler steps of the ODE and not of an SDE.
    """
    base = rae_lightningdit("xl")
    constant = ScheduleSpec(lr=1e-4, final_lr=1e-4)
    return base.replace(
        recipe="repa-sdvae-ema",
        summary="baseline: REPA with its own projector and loss, LightningDiT-XL/2 on latents of the VAE sdvae-ema",
        tokenizer=VAESpec(name="sdvae-ema"),
        generator=base.generator.replace(patch_size=2, repa_depth=8, repa_dim=768, repa_hidden=2048),
        flow=base.flow.replace(time_shift=1.0),
        generator_training=base.generator_training.replace(
            images=800 * IMAGENET_TRAIN, batch_size=256, schedule=constant, ema_decays=(0.9999,),
            optimizer=AdamWSpec(betas=(0.9, 0.999)),
            repa=RepaSpec(encoder=EncoderSpec(name="dinov2-b-woreg", norm="affine"), weight=0.5, loss="cosine"),
        ),
        sampling=SamplingSpec(steps=250, guidance=CFG(scale=1.8, interval=(0.0, 0.7))),
    )  # fmt: skip


def pixel_baseline() -> RunSpec:
    """The RAEv2 network on pixels in patches of 16, without a tokenizer."""
    base = raev2_dinov3l("k1")
    return base.replace(
        recipe="pixels",
        summary="baseline: the RAEv2 network on pixels, patches of 16, no tokenizer",
        tokenizer=PixelSpec(),
        generator=DDTSpec(**trunk_size("xl1440"), base_head_depth=8, patch_size=16),
    )


def unconditional() -> RunSpec:
    """RAEv2, K = 7, without labels."""
    base = raev2_dinov3l("k7")
    return base.replace(
        recipe="raev2-dinov3l-k7-unconditional",
        summary="RAEv2, 7 layers, without labels",
        task=ClassToImageSpec(unconditional=True),
        evaluation=base.evaluation.replace(expected=()),
    )


VAE_DOWNSAMPLE = {
    "sdvae-ema": 8,
    "sdxl": 8,
    "sd3.5": 8,
    "flux": 8,
    "flux2": 16,
    "qwen-image": 8,
    "vavae": 16,
    "e2e-vavae": 16,
}

RECIPES: dict[str, Callable[[], RunSpec]] = {
    "quickstart": quickstart,
    "laptop": laptop,
    "selftest": selftest,
    "own-photos-cpu": own_photos_cpu,
    **{f"own-photos-{memory}gb": partial(own_photos, memory) for memory in OWN_PHOTOS},
    "raev2-dinov3l-k1": partial(raev2_dinov3l, "k1", "RAEv2, last layer only (arXiv 2605.18324)"),
    "raev2-dinov3l-k7": partial(raev2_dinov3l, "k7", "RAEv2, 7 layers, the headline system (arXiv 2605.18324)"),
    "raev2-dinov3l-k23": partial(raev2_dinov3l, "k23", "RAEv2, 23 layers, best reconstruction (arXiv 2605.18324)"),
    **{
        f"rae-ditdh-{size}" + ("" if resolution == 256 else "-512"): partial(rae_ditdh, size, resolution)
        for resolution in (256, 512)
        for size in ("s", "b", "l", "xl")
    },
    "rae-ditdh-xl-512-up": partial(decoder_upsampling, "xl"),
    "rae-ditdh-s-14ep": partial(rae_weak, 256),
    "rae-ditdh-s-512-20ep": partial(rae_weak, 512),
    "rae-ditdh-xl-800ep": partial(rae_paper, 256),
    "rae-ditdh-xl-512-400ep": partial(rae_paper, 512),
    "rae-lightningdit-xl": partial(rae_lightningdit, "xl"),
    "rae-lightningdit-xl-800ep": partial(rae_lightningdit_paper, "xl"),
    "raev2-lightningdit-xl": partial(lightningdit, "xl"),
    "raev2-dinov3l-k7-unconditional": unconditional,
    **{f"vae-{name}": partial(vae_baseline, name, factor) for name, factor in VAE_DOWNSAMPLE.items()},
    "vae-sdvae-ema-repa": partial(vae_baseline, "sdvae-ema", 8, True),
    "repa-sdvae-ema": repa_paper,
    "pixels": pixel_baseline,
}
