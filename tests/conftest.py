"""Shared fixtures: a tiny dataset and a tiny run that goes through every part of the pipeline in seconds."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network

import torch  # noqa: E402
from built_wheel import build_wheel  # noqa: E402
from loopback_hub import TOKEN, LoopbackHub  # noqa: E402

from raev2.files import plugins  # noqa: E402
from raev2.spec import (  # noqa: E402
    AdversarialSpec,
    DDTSpec,
    DecoderSpec,
    EvaluationSpec,
    FeatureLoss,
    RunSpec,
    SamplingSpec,
    ScheduleSpec,
)
from raev2.task import get_data_recipe, get_recipe, get_task  # noqa: E402

torch.set_num_threads(1)  # also for what a session builds
signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-device", default="cuda", help="device of tests/gpu; cpu to try them without one")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def deterministic():
    """One thread and one seed for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def synthetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset folder of the recipe `synthetic`: 32 training and 16 validation pictures, 64 px, 4 classes. Read only."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    get_data_recipe("synthetic").build(folder, {"num_train": "32", "num_val": "16"})
    return folder


@pytest.fixture(scope="session")
def tiny_spec(synthetic_data: Path) -> RunSpec:
    """The quickstart with tiny networks: 6 steps of stage 1, 8 of stage 2, every loss and every part in use, fp32."""
    base = get_recipe(get_task("imagenet"), "quickstart")
    schedule = ScheduleSpec(lr=1e-3, final_lr=1e-4, warmup_images=16)
    return base.replace(
        recipe="tiny",
        data=base.data.replace(dir=str(synthetic_data), recipe="synthetic", horizontal_flip=False, cache=True),
        tokenizer=base.tokenizer.replace(
            decoder=DecoderSpec(width=32, depth=2, num_heads=2, mlp_dim=64, patch_size=8),
        ),
        tokenizer_training=base.tokenizer_training.replace(
            images=48, batch_size=8, schedule=schedule, ema_decay=0.5, log_every_steps=1, sample_every_images=24,
            save_every_images=16, perceptual=FeatureLoss(layers=(0, 5)),
            adversarial=AdversarialSpec(layers=(1, 5), kernel_size=3, disc_start=0.0, gan_start=0.5),
        ),
        generator=DDTSpec(
            width=32, depth=2, num_heads=2, head_width=64, head_depth=1, head_num_heads=2, base_head_depth=1
        ),
        generator_training=base.generator_training.replace(
            images=64, batch_size=8, schedule=schedule, ema_decays=(0.5, 0.9), log_every_steps=1,
            sample_every_images=32, eval_every_images=32, save_every_images=16, keep_checkpoints=3, latent_cache=False,
        ),
        sampling=SamplingSpec(steps=2, guidance=base.sampling.guidance, batch_size=16),
        evaluation=EvaluationSpec(
            protocols=("reconstruction-micro", "generation-micro"), in_training=("generation-micro",), num_samples=16
        ),
        precision="fp32",
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained_run(tiny_spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny run, finished. Read only: copy it to change it."""
    from raev2 import pipeline

    return pipeline.train(tiny_spec, tmp_path_factory.mktemp("runs") / "imagenet" / "tiny")


@pytest.fixture
def tiny_recipe(tiny_spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """The tiny run under the name `tiny`, for the command line."""
    monkeypatch.setitem(get_task("imagenet").recipes(), "tiny", lambda: tiny_spec)
    return tiny_spec


@pytest.fixture
def install(monkeypatch):
    """Registers entry points beside the installed ones: install(group, name, 'module:attribute')."""
    added: list[EntryPoint] = []
    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [*real(group=group), *(p for p in added if p.group == group)]
    )
    return lambda group, name, value: added.append(EntryPoint(name, value, group))


# The product as users get it, and a hub to share models on.


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as pip would; it comes before everything else on the path."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """The hub of this process, with a login and an empty cache."""
    from huggingface_hub import constants

    with LoopbackHub() as running:
        for name, value in {"ENDPOINT": running.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"),
                            "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}",
                            "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_DISABLE_XET": True}.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def elsewhere(hub: LoopbackHub, installed: Path, tmp_path: Path) -> Callable[[str], str]:
    """Runs code in a new process, in the empty folder `there`, with the wheel and this hub; returns what it prints."""
    there = tmp_path / "there"
    there.mkdir()
    env = {**os.environ, "PYTHONPATH": str(installed), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
           "HF_HOME": str(there / "hf"), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    head = "from raev2 import Pipeline\nfrom raev2.command.cli import main\n"

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", head + code], cwd=there, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
