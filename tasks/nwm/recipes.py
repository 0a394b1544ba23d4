"""Named runs. `quickstart` and `laptop` run on two CPU cores with a recorded simulator; the others are full scale.

A published recipe names its source; numbers of papers stand in docs/results.md, marked as quoted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from raev2.spec import (
    AdversarialSpec,
    DataSpec,
    DDTSpec,
    DiTSpec,
    EncoderSpec,
    EvaluationSpec,
    FeatureLoss,
    FlowSpec,
    GeneratorTrainingSpec,
    LPIPSLoss,
    MuonSpec,
    RunSpec,
    SamplingSpec,
    ScheduleSpec,
    TokenizerSpec,
    TokenizerTrainingSpec,
    decoder_size,
)
from raev2_tasks.nwm.spec import NavigationSpec

RECON_TRAIN = 488_000  # frames of an epoch: about 80 % of the 610,907 frames of RECON
MIX_TRAIN = 1_000_000  # frames of an epoch of the mix, about


def quickstart() -> RunSpec:
    """ViZDoom mazes at 64 px: the whole pipeline in minutes on two CPU cores."""
    return RunSpec(
        recipe="quickstart",
        summary="simulated mazes at 64 px, embedded encoder: recording, both stages, rollouts and report in minutes",
        task=NavigationSpec(
            num_context=2, max_offset_s=2.0, at_image=True, horizons_s=(0.5, 1.0, 2.0), num_rollouts=32
        ),
        data=DataSpec(dir="data/vizdoom", recipe="vizdoom", cache=True),
        tokenizer=TokenizerSpec(
            encoder=EncoderSpec(name="micro", layers=(0, 1, 2, 3, 4, 5)),
            decoder=decoder_size("micro", patch_size=8),
            grid=(8, 8),
        ),
        tokenizer_training=TokenizerTrainingSpec(
            images=9_600,
            batch_size=32,
            optimizer=MuonSpec(),  # published: AdamW; in so short a training Muon halves the error
            schedule=ScheduleSpec(lr=2e-3, final_lr=1e-4, warmup_images=960),
            perceptual=FeatureLoss(weight=0.5),
            # Published: weight 0.75 from epoch 8 of 16. In so short a training a strong adversary only adds grain.
            adversarial=AdversarialSpec(weight=0.2, disc_start=0.6, gan_start=0.7),
            ema_decay=0.99,
            sample_every_images=3_200,
            save_every_images=9_600,
        ),
        # Wider than a latent token (192), or it could not fit one picture. No wide head: what the newest frame shows
        # then reaches the output on the residual stream alone, and is learned sooner.
        generator=DiTSpec(width=256, depth=6, num_heads=4, base_head_depth=3),
        # The rule gives 1.7. Context and motion tell most where the target is nearly noise, so train mostly there.
        flow=FlowSpec(time_shift=6.0),
        generator_training=GeneratorTrainingSpec(
            images=12_000,
            batch_size=16,
            optimizer=MuonSpec(),
            schedule=ScheduleSpec(lr=2e-3, final_lr=2e-4, decay="linear", decay_start_images=6_000),
            ema_decays=(0.99,),
            sample_every_images=4_000,
            eval_every_images=12_000,
            save_every_images=6_000,
            latent_cache=True,
        ),
        sampling=SamplingSpec(steps=10),
        evaluation=EvaluationSpec(
            protocols=(
                "reconstruction-micro", "single-step-micro", "rollout-4fps-micro", "rollout-1fps-micro",
                "action-following",
            ),
            in_training=("single-step-quick-micro",),
            num_samples=128,
        ),
    )  # fmt: skip


def laptop() -> RunSpec:
    """The quickstart with larger networks and longer training: rooms that can be recognised."""
    base = quickstart()
    return base.replace(
        recipe="laptop",
        summary="simulated mazes at 64 px, longer training, within 75 minutes on 2 cores",
        task=base.task.replace(num_rollouts=64),
        data=DataSpec(
            dir="data/vizdoom-laptop",
            recipe="vizdoom",
            options={"num_train": "240", "num_val": "24", "drives_per_maze": "2"},
            cache=True,
        ),
        tokenizer_training=base.tokenizer_training.replace(images=12_800, ema_decay=0.995, save_every_images=6_400),
        generator=DiTSpec(width=256, depth=8, num_heads=4, base_head_depth=4),
        generator_training=base.generator_training.replace(
            images=88_000,
            schedule=ScheduleSpec(lr=2e-3, final_lr=1e-4, decay="linear", decay_start_images=44_000),
            ema_decays=(0.998,),
            log_every_steps=50,
            sample_every_images=16_000,
            eval_every_images=44_000,
            save_every_images=8_000,
        ),
        sampling=SamplingSpec(steps=20),
        evaluation=base.evaluation.replace(num_samples=256),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Full scale

TRUNK_SIZES = {"b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
PROTOCOLS = (
    "reconstruction-inception", "single-step-inception", "rollout-4fps-inception", "rollout-1fps-inception",
    "action-following",
)  # fmt: skip


def trunk_size(size: str) -> dict[str, int]:
    """Width, depth and heads of a published trunk."""
    width, depth, num_heads = TRUNK_SIZES[size]
    return {"width": width, "depth": depth, "num_heads": num_heads}


def recon_data() -> DataSpec:
    """RECON: set `data.options.src` to the folder `recon_release` with its HDF5 files."""
    return DataSpec(dir="data/recon", recipe="recon-hdf5", num_workers=8)


def tokenizer_training(epoch: int) -> TokenizerTrainingSpec:
    """Stage 1 of RAE: 16 epochs, batch 512, discriminator from epoch 6, its loss from epoch 8."""
    return TokenizerTrainingSpec(
        images=16 * epoch,
        batch_size=512,
        schedule=ScheduleSpec(lr=2e-4, final_lr=2e-5, warmup_images=epoch),
        clip_grad_norm=None,
        perceptual=LPIPSLoss(),
        adversarial=AdversarialSpec(encoder="dino-s8", layers=(2, 5, 8, 11), input_size=224),
        ema_decay=0.9978,
        log_every_steps=100,
        sample_every_images=2 * epoch,
        save_every_images=epoch,
    )


def raev2_dinov3l(layers: tuple[int, ...], label: str, summary: str) -> RunSpec:
    """RAEv2 on DINOv3-L: context among the other tokens, one target a context, offsets of 1 to 8 frames."""
    return RunSpec(
        recipe=f"raev2-dinov3l-{label}",
        summary=summary,
        task=NavigationSpec(
            max_offset_s=2.0, offset_distribution="uniform", targets_per_context=1, context_drop_prob=0.0, fit="crop",
            condition_form="in_context", frame_positions=False, action_drop_prob=0.0,
            horizons_s=(1.0, 2.0, 4.0, 8.0, 16.0), num_rollouts=150,
        ),
        data=recon_data(),
        tokenizer=TokenizerSpec(
            encoder=EncoderSpec(name="dinov3-l16", layers=layers, aggregate="mean", pooled_term=bool(layers)),
            decoder=decoder_size("XL"),
        ),
        tokenizer_training=tokenizer_training(RECON_TRAIN),
        generator=DDTSpec(**trunk_size("xl"), base_head_depth=8),
        generator_training=GeneratorTrainingSpec(
            images=80 * RECON_TRAIN,
            batch_size=256,
            optimizer=MuonSpec(routing="all_matrices"),
            schedule=ScheduleSpec(lr=2e-4, final_lr=2e-5, decay="linear", decay_start_images=40 * RECON_TRAIN),
            ema_decays=(0.9995,),
            log_every_steps=100,
            sample_every_images=5 * RECON_TRAIN,
            eval_every_images=10 * RECON_TRAIN,
            save_every_images=RECON_TRAIN,
        ),
        sampling=SamplingSpec(steps=50),
        evaluation=EvaluationSpec(
            protocols=PROTOCOLS, in_training=("single-step-quick-inception",), num_samples=500
        ),
    )  # fmt: skip


def dinov2b() -> RunSpec:
    """Ungated: DINOv2-B latents and our own condition, whose context is computed once."""
    base = raev2_dinov3l((), "k1", "")
    return base.replace(
        recipe="dinov2b",
        summary="RECON on DINOv2-B (ungated), cached context, offsets up to 16 s; our settings",
        task=NavigationSpec(max_offset_s=16.0, horizons_s=(1.0, 2.0, 4.0, 8.0, 16.0), num_rollouts=150),
        tokenizer=TokenizerSpec(encoder=EncoderSpec(name="dinov2-b"), decoder=decoder_size("XL")),
        generator=DDTSpec(**trunk_size("b"), base_head_depth=4),
        generator_training=base.generator_training.replace(batch_size=1024, optimizer=MuonSpec()),
    )


def multi() -> RunSpec:
    """Several robots in one model, as NWM trains: batches of 1,024 contexts with 4 targets each, past and future.

    Prepare the datasets one by one; `data.options.src` names their folders.
    """
    base = dinov2b()
    return base.replace(
        recipe="multi",
        summary="RECON + SCAND + TartanDrive + HuRoN on DINOv2-B, past and future targets up to 16 s (data as NWM)",
        task=base.task.replace(past_targets=True),
        data=DataSpec(
            dir="data/nwm-mix", recipe="trajectory-mix", num_workers=8,
            options={"src": "data/recon,data/scand,data/tartan-drive,data/huron"},
        ),
        tokenizer_training=tokenizer_training(MIX_TRAIN),
        generator=DDTSpec(**trunk_size("xl"), base_head_depth=8),
        generator_training=base.generator_training.replace(
            images=100_000 * 4096,
            batch_size=4096,
            micro_batch_size=64,
            schedule=ScheduleSpec(lr=2e-4, final_lr=2e-5, decay="linear", decay_start_images=50_000 * 4096),
            sample_every_images=5_000 * 4096,
            eval_every_images=10_000 * 4096,
            save_every_images=1_000 * 4096,
        ),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], RunSpec]] = {
    "quickstart": quickstart,
    "laptop": laptop,
    "raev2-dinov3l-k1": partial(raev2_dinov3l, (), "k1", "RAEv2 on RECON, last layer only (arXiv 2605.18324)"),
    "raev2-dinov3l-k7": partial(
        raev2_dinov3l, (11, 13, 15, 17, 19, 21, 23), "k7", "RAEv2 on RECON, 7 layers (arXiv 2605.18324)"
    ),
    "raev2-dinov3l-k23": partial(
        raev2_dinov3l, tuple(range(1, 24)), "k23", "RAEv2 on RECON, 23 layers (arXiv 2605.18324)"
    ),
    "dinov2b": dinov2b,
    "multi": multi,
}
