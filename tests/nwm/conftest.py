"""A small world of pictures for the tests of this task, and a tiny run in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raev2.spec import DDTSpec, DecoderSpec, EvaluationSpec, RunSpec, SamplingSpec, ScheduleSpec
from raev2.task import get_recipe
from raev2_tasks.nwm import TASK
from raev2_tasks.nwm.data.trajectories import Source, Storage, Trajectory, write_trajectories
from raev2_tasks.nwm.pose import accumulate

RATE_HZ, SPACING_M = 4.0, 0.4


def panorama_frames(panorama: np.ndarray, poses: np.ndarray) -> list[np.ndarray]:
    """Views (48, 64, 3) uint8 of a cylinder (48, 256, 3): turning shifts the picture, going along x magnifies it."""
    frames, grid = [], np.linspace(-0.5, 0.5, 64)
    for x, _, yaw in poses:
        zoom = 1 + 0.5 * (1 + np.sin(0.3 * x))
        columns = (128 - yaw / (2 * np.pi) * 256 + grid * 64 / zoom).round().astype(int) % 256
        rows = (23.5 + np.linspace(-23.5, 23.5, 48) / zoom).round().astype(int)
        frames.append(panorama[rows][:, columns])
    return frames


def write_world(folder: Path, *, num: int = 5, length: int = 24, seed: int = 0) -> Path:
    """`num` recordings at 4 Hz, each in its own panorama; the recipe-independent part of a dataset folder."""
    generator = np.random.default_rng(seed)

    def source(number: int) -> Source:
        coarse = generator.integers(0, 255, (6, 16, 3)).astype(np.uint8)
        panorama = np.kron(coarse, np.ones((8, 16, 1), np.uint8))
        motions = np.stack([
            generator.uniform(0, 2 * SPACING_M, length), np.zeros(length), generator.normal(0, 0.3, length)
        ], 1)  # fmt: skip
        poses = accumulate(motions)
        trajectory = Trajectory(
            f"t{number}", np.arange(length) / RATE_HZ, poses[:, :2], poses[:, 2], panorama_frames(panorama, poses)
        )
        return Source(f"room{number}", f"room{number}", lambda: [trajectory])

    folder.mkdir(parents=True)
    head = {"name": "panoramas", "recipe": "panoramas", "options": {}, "licence": "CC0", "attribution": "none"}
    facts = {"rate_hz": RATE_HZ, "length_unit": "m", "camera": None}
    storage = Storage(size=(64, 64), suffix=".png", val_fraction=0.4)
    write_trajectories(folder, [source(number) for number in range(num)], storage, head, facts)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset folder: 3 training and 2 validation recordings of 24 frames. Read only."""
    return write_world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="session")
def tiny_nwm_spec(world: Path) -> RunSpec:
    """The quickstart with tiny networks: 3 steps of stage 1, 4 of stage 2."""
    base = get_recipe(TASK, "quickstart")
    schedule = ScheduleSpec(lr=1e-3, final_lr=1e-4)
    return base.replace(
        recipe="tiny",
        task=base.task.replace(num_context=4, horizons_s=(0.5, 1.0), max_offset_s=1.0, num_rollouts=4),
        data=base.data.replace(dir=str(world), recipe=None),
        tokenizer=base.tokenizer.replace(
            decoder=DecoderSpec(width=32, depth=1, num_heads=2, mlp_dim=64, patch_size=8)
        ),
        tokenizer_training=base.tokenizer_training.replace(
            images=24, batch_size=8, schedule=schedule, adversarial=None, sample_every_images=24, save_every_images=24
        ),
        generator=DDTSpec(
            width=32, depth=2, num_heads=2, head_width=64, head_depth=1, head_num_heads=2, base_head_depth=1
        ),
        generator_training=base.generator_training.replace(
            images=32, batch_size=8, schedule=schedule, sample_every_images=32, eval_every_images=32,
            save_every_images=32, log_every_steps=1,
        ),
        sampling=SamplingSpec(steps=2),
        evaluation=EvaluationSpec(protocols=("rollout-4fps-micro",), in_training=(), num_samples=6),
        precision="fp32",
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_nwm_run(tiny_nwm_spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny run, finished. Read only."""
    from raev2 import pipeline

    return pipeline.train(tiny_nwm_spec, tmp_path_factory.mktemp("runs") / "nwm" / "tiny")
