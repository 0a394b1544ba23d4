"""1, 2 and 3 processes, replicated or sharded, train the same, in both stages.

In float64, where no rounding error can hide what depends on the number of processes: losses and norms agree to 1e-12.
In float32, as runs are, a step from the same weights has the same losses and norms to 1e-6; what rounding does to the
steps after it is in docs/how_to/scale.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raev2.spec import AdamWSpec, MuonSpec, ParallelSpec, RunSpec
from raev2.spec_io import save_spec

SCRIPT = """
import sys
import torch
from raev2 import pipeline
from raev2.spec_io import load_spec
from raev2.training import optim

pipeline._save_samples = lambda *_: None  # noise of samples is float32; and they take time
single = torch.Tensor.float, optim.fast_dtype
double = torch.Tensor.double, lambda device: torch.float64

for name in sys.argv[2:]:
    torch.set_default_dtype(torch.float32 if "float32" in name else torch.float64)
    torch.Tensor.float, optim.fast_dtype = single if "float32" in name else double
    pipeline.train(load_spec(f"{sys.argv[1]}/{name}.yaml"), f"{sys.argv[1]}/{name}")
"""
TOLERANCE = {"rel": 1e-12, "abs": 1e-15}
SINGLE = {False: ("float32",), True: ("float32-tokenizer", "float32-generator")}  # of one process; of several
NUMBERS = ("loss", "l1", "perceptual", "gan", "disc", "adaptive_weight", "full", "base", "grad_norm")


def launch(folder: Path, processes: int, *names: str) -> None:
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run(
        [*command, str(folder / "train.py"), str(folder), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["stage"], line["images"], *(line.get(name, 0.0) for name in NUMBERS))
        for line in lines if line["kind"] == "train"
    ]  # fmt: skip


def is_last_step(line: dict, stage: str) -> bool:
    return (line["kind"], line.get("stage"), line.get("images")) == ("train", stage, 36)


def copy_without_last_step(run: Path, copy: Path) -> None:
    """A finished run as it was before the last step of the stage that the copy's name ends with."""
    stage = copy.name.split("-")[1]
    shutil.copytree(run, copy)
    shutil.rmtree(copy / stage)
    shutil.rmtree(max((copy / "checkpoints" / stage).iterdir()))
    log = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in log if not is_last_step(json.loads(line), stage)))
    if stage == "tokenizer":
        (copy / "identity.json").unlink()  # or the other stage would miss the tokenizer that it began with


@pytest.fixture(scope="module")
def specs(tiny_spec: RunSpec) -> dict[str, RunSpec]:
    """Two optimizers; token noise, adversary, dropped conditions and parts of a batch are all in use.

    The adversary meets whole shares ('adamw') and parts of 4, of 4 and 2 and of a whole share of 12, 6 and 4 ('muon').
    """
    shared = {"batch_size": 12, "images": 36, "sample_every_images": 24, "save_every_images": 24}
    adamw = AdamWSpec()
    spec = tiny_spec.replace(
        tokenizer_training=tiny_spec.tokenizer_training.replace(**shared, optimizer=adamw),
        generator_training=tiny_spec.generator_training.replace(
            **shared, eval_every_images=120, cond_drop_prob=0.5, micro_batch_size=3, optimizer=adamw
        ),
        evaluation=tiny_spec.evaluation.replace(in_training=(), protocols=()),
    )  # fmt: skip
    muon = MuonSpec(routing="all_matrices", adamw=adamw)
    return {
        "adamw": spec,
        "muon": spec.replace(
            tokenizer_training=spec.tokenizer_training.replace(micro_batch_size=4, optimizer=muon),
            generator_training=spec.generator_training.replace(optimizer=muon),
        ),
    }


@pytest.fixture(scope="module")
def runs(specs, tmp_path_factory) -> dict[int, Path]:
    """Run folders by number of processes; the run of stage 2 of 'adamw-fsdp' begins from the tokenizer of 'adamw'."""
    found = {}
    for processes in (1, 2, 3):
        folder = found[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        for name, spec in specs.items():
            save_spec(spec, folder / f"{name}.yaml")
            sharded = spec.replace(
                tokenizer_from=str(folder / name / "tokenizer"), parallel=ParallelSpec(strategy="fsdp")
            )
            save_spec(sharded, folder / f"{name}-fsdp.yaml")
        for name in SINGLE[processes > 1]:
            save_spec(specs["adamw"], folder / f"{name}.yaml")
            if processes > 1:
                copy_without_last_step(found[1] / "float32", folder / name)
        launch(folder, processes, "adamw", "adamw-fsdp", "muon", "muon-fsdp", *SINGLE[processes > 1])
    return found


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_losses_and_norms_are_those_of_one_process(runs, processes, name):
    expected = losses(runs[1] / name)
    assert [line[:2] for line in expected] == [
        (stage, images) for stage in ("tokenizer", "generator") for images in (12, 24, 36)
    ]
    assert {line[5] != 0 for line in expected if line[0] == "tokenizer"} == {True, False}, "with and without adversary"
    for ours, theirs in zip(losses(runs[processes] / name), expected, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], **TOLERANCE)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_training_is_replicated_training(runs, processes, name):
    replicated = [line for line in losses(runs[processes] / name) if line[0] == "generator"]
    for ours, theirs in zip(losses(runs[processes] / f"{name}-fsdp"), replicated, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], **TOLERANCE)
    found, expected = (load_file(runs[processes] / n / "generator/model.safetensors") for n in (f"{name}-fsdp", name))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) < 1e-12, key


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_in_float32_a_step_from_the_same_weights_has_the_same_losses_and_norms(runs, processes, stage):
    """The third step, in stage 1 the one with the adversary."""
    ours, theirs = (
        [line for line in losses(run) if line[0] == stage]
        for run in (runs[processes] / f"float32-{stage}", runs[1] / "float32")
    )
    assert ours[:-1] == theirs[:-1], "the copy began where the run was"
    assert ours[-1][:2] == theirs[-1][:2] == (stage, 36)
    assert ours[-1][2:] == pytest.approx(theirs[-1][2:], rel=1e-6)


def test_a_run_goes_on_with_other_processes_and_shards(runs, specs, tmp_path):
    """12 images on two sharded processes, 24 on three replicated ones, the end on one: the same losses."""
    expected = [line for line in losses(runs[1] / "muon") if line[0] == "generator"]
    spec = specs["muon"].replace(tokenizer_from=str(runs[1] / "muon/tokenizer"))
    loop = spec.generator_training.replace(save_every_images=12)
    for processes, images, strategy in ((2, 12, "fsdp"), (3, 24, "ddp"), (1, 36, "ddp")):
        changed = spec.replace(generator_training=loop.replace(images=36), parallel=ParallelSpec(strategy=strategy))
        save_spec(changed, tmp_path / "run.yaml")
        launch(tmp_path, processes, "run")
        for checkpoint in sorted((tmp_path / "run/checkpoints/generator").iterdir()):
            if int(checkpoint.name) > images:
                shutil.rmtree(checkpoint)
        if images < 36:
            shutil.rmtree(tmp_path / "run/generator")
    for ours, theirs in zip(losses(tmp_path / "run"), expected, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], **TOLERANCE)
