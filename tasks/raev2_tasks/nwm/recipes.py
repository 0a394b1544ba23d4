"""Named runs. `quickstart` and `laptop` run on two CPU cores with a recorded simulator; the others are full scale.

A published recipe names its source; numbers of papers stand in docs/results.md, marked as quoted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from raev2.spec import (
    DataSpec,
    DDTSpec,
    DiTSpec,
    EncoderSpec,
    EvaluationSpec,
    FlowSpec,
    GeneratorTrainingSpec,
    MuonSpec,
    RunSpec,
    SamplingSpec,
    ScheduleSpec,
)
from raev2_tasks.nwm.spec import NavigationSpec
from raev2_tasks.recipe_parts import (
    EMBEDDED_TOKENIZER,
    NOT_RUN,
    SHORT_TOKENIZER_TRAINING,
    dinov3l_tokenizer,
    published_tokenizer,
    published_tokenizer_training,
    tiny_run,
    trunk_size,
)

RECON_TRAIN = 488_000  # frames of an epoch: about 80 % of the 610,907 frames of RECON
MIX_TRAIN = 1_000_000  # frames of an epoch of the mix, about


def quickstart() -> RunSpec:
    """ViZDoom mazes at 64 px: the whole pipeline in minutes on two CPU cores."""
    return RunSpec(
        recipe="quickstart",
        summary="simulated mazes at 64 px, embedded encoder: recording, both stages, rollouts and report in minutes",
        cost="2 CPU cores without AMX, 12.5 min: measured",
        task=NavigationSpec(
            num_context=2, max_offset_s=2.0, at_image=True, horizons_s=(0.5, 1.0, 2.0), num_rollouts=32
        ),
        data=DataSpec(dir="data/vizdoom", recipe="vizdoom", cache=True),
        tokenizer=EMBEDDED_TOKENIZER,
        tokenizer_training=SHORT_TOKENIZER_TRAINING,
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


def selftest() -> RunSpec:
    """A few short drives: the whole pipeline in seconds."""
    base = quickstart()
    data = DataSpec(
        dir="data/selftest-drives",
        recipe="vizdoom",
        options={"num_train": "3", "num_val": "1", "num_frames": "16"},
    )
    task = base.task.replace(num_context=2, horizons_s=(0.5,), max_offset_s=0.5, num_rollouts=2)
    return tiny_run(base.replace(task=task), data, ("rollout-4fps-micro",), "single-step-quick-micro")


def laptop() -> RunSpec:
    """The quickstart with larger networks and longer training: rooms that can be recognised."""
    base = quickstart()
    return base.replace(
        recipe="laptop",
        summary="simulated mazes at 64 px, longer training, within 75 minutes on 2 cores",
        cost="2 CPU cores without AMX, 65 min: measured",
        task=base.task.replace(num_rollouts=96),
        data=DataSpec(
            dir="data/vizdoom-laptop",
            recipe="vizdoom",
            options={"num_train": "480", "num_val": "24", "drives_per_maze": "2"},
            cache=True,
        ),
        tokenizer_training=base.tokenizer_training.replace(images=12_800, ema_decay=0.995, save_every_images=6_400),
        generator=DiTSpec(width=256, depth=8, num_heads=4, base_head_depth=4),
        generator_training=base.generator_training.replace(
            images=72_000,
            schedule=ScheduleSpec(lr=2e-3, final_lr=1e-4, decay="linear", decay_start_images=44_000),
            ema_decays=(0.998,),
            log_every_steps=50,
            sample_every_images=16_000,
            eval_every_images=44_000,
            save_every_images=8_000,
        ),
    )


# Full scale

PROTOCOLS = (
    "reconstruction-inception", "single-step-inception", "rollout-4fps-inception", "rollout-1fps-inception",
    "action-following",
)  # fmt: skip


def recon_data() -> DataSpec:
    """RECON: set `data.options.src` to the folder `recon_release` with its HDF5 files."""
    return DataSpec(dir="data/recon", recipe="recon-hdf5", num_workers=8)


def raev2_dinov3l(label: str, summary: str = "") -> RunSpec:
    """RAEv2 on DINOv3-L: context among the other tokens, one target a context, offsets of 1 to 8 frames."""
    return RunSpec(
        recipe=f"raev2-dinov3l-{label}",
        summary=summary,
        cost=NOT_RUN,
        task=NavigationSpec(
            max_offset_s=2.0, offset_distribution="uniform", targets_per_context=1, context_drop_prob=0.0, fit="crop",
            condition_form="in_context", frame_positions=False, action_drop_prob=0.0,
            horizons_s=(1.0, 2.0, 4.0, 8.0, 16.0), num_rollouts=150,
        ),
        data=recon_data(),
        tokenizer=dinov3l_tokenizer(label),
        tokenizer_training=published_tokenizer_training(RECON_TRAIN, 2 * RECON_TRAIN),
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
    base = raev2_dinov3l("k1")
    return base.replace(
        recipe="dinov2b",
        summary="RECON on DINOv2-B (ungated), cached context, offsets up to 16 s; our settings",
        task=NavigationSpec(max_offset_s=16.0, horizons_s=(1.0, 2.0, 4.0, 8.0, 16.0), num_rollouts=150),
        tokenizer=published_tokenizer(EncoderSpec(name="dinov2-b")),
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
        tokenizer_training=published_tokenizer_training(MIX_TRAIN, 2 * MIX_TRAIN),
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
    "selftest": selftest,
    "raev2-dinov3l-k1": partial(raev2_dinov3l, "k1", "RAEv2 on RECON, last layer only (arXiv 2605.18324)"),
    "raev2-dinov3l-k7": partial(raev2_dinov3l, "k7", "RAEv2 on RECON, 7 layers (arXiv 2605.18324)"),
    "raev2-dinov3l-k23": partial(raev2_dinov3l, "k23", "RAEv2 on RECON, 23 layers (arXiv 2605.18324)"),
    "dinov2b": dinov2b,
    "multi": multi,
}
