"""Two processes, and one batch in parts: the same training, the same numbers."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raev2 import RAE, pipeline, train_generator, train_tokenizer
from raev2.data import FolderDataset
from raev2.spec import RunSpec
from raev2.spec_io import apply_overrides


def history(run: Path, **match) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if all(line[name] == value for name, value in match.items())]


@pytest.fixture(scope="module")
def spec(tiny_spec, tmp_path_factory) -> RunSpec:
    """Data that is not there yet, more samples than one process evaluates at once, no noise on tokens."""
    return apply_overrides(
        tiny_spec,
        [f"data.dir={tmp_path_factory.mktemp('data') / 'shapes'}", "data.options={num_train: 32, num_val: 16}",
         "tokenizer.noise_tau=0", "tokenizer_training.micro_batch_size=2", "generator_training.micro_batch_size=3",
         "tokenizer_training.images=32", "generator_training.images=32", "evaluation.num_samples=80",
         "evaluation.in_training=[]"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory) -> Path:
    """The run of two processes, finished; started as the docs say."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [f"{name}={json.dumps(value)}" for name, value in spec.model_dump(mode="json").items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "--", "raev2", "train"]
    options = ["--task", "imagenet", "--run", str(folder / "run"), *(f"--set={setting}" for setting in settings)]
    result = subprocess.run(
        [*command, *options], env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    return folder / "run"


def test_two_processes_finish_a_run(run, spec):
    for file in ("tokenizer/config.json", "generator/config.json", "eval/generation-micro.json", "report.html"):
        assert (run / file).is_file(), file
    assert json.loads((run / "provenance.json").read_text())["processes"] == 2
    assert json.loads((Path(spec.data.dir) / "manifest.json").read_text())["splits"]["train"]["num_samples"] == 32
    assert list(Path(spec.data.dir).parent.iterdir()) == [Path(spec.data.dir)], "built once, nothing left over"


def test_everything_is_logged_once(run):
    for stage in ("tokenizer", "generator"):
        lines = history(run, stage=stage, kind="train")
        assert [line["images"] for line in lines] == [8, 16, 24, 32]
        assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert [line["protocol"] for line in history(run, kind="eval")] == ["reconstruction-micro", "generation-micro"]


def test_one_process_evaluates_to_the_same_numbers(run, tmp_path):
    """Every sample once, whoever makes it: bit-identical samples and features, and sums to the last digits."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    expected = {file.stem: json.loads(file.read_text()) for file in (copy / "eval").glob("*.json")}
    shutil.rmtree(copy / "eval")
    results = pipeline.evaluate_run(copy)
    assert results.keys() == expected.keys()
    for protocol, found in results.items():
        stored = expected[protocol]["results"]
        assert [(r.name, r.num_samples) for r in found] == [(r["name"], r["num_samples"]) for r in stored]
        assert [r.value for r in found] == pytest.approx([r["value"] for r in stored], rel=1e-9)
        assert expected[protocol]["processes"] == 2
    assert {r.num_samples for r in results["generation-micro"] if r.name == "fd_micro"} == {80}


def test_latent_statistics_are_those_of_one_process(run, spec):
    rae, dataset = RAE.from_pretrained(run / "tokenizer"), FolderDataset(spec.data.dir, "train", (64, 64))
    stats = train_tokenizer.measure_stats(rae, dataset, torch.device("cpu"))
    assert stats.num_images == rae.latent_stats.num_images == 32
    assert torch.allclose(stats.mean, rae.latent_stats.mean, atol=1e-6)
    assert torch.allclose(stats.var, rae.latent_stats.var, rtol=1e-5)


def test_the_gradient_of_two_processes_is_that_of_one(run, spec, tmp_path):
    """The first step of stage 1 has no random numbers here: two processes with two parts each against one batch."""
    alone = apply_overrides(
        spec, ["tokenizer_training.micro_batch_size=null", "tokenizer_training.adversarial=null",
               "tokenizer_training.images=8", "tokenizer_training.save_every_images=8", "evaluation.protocols=[]"],
    )  # fmt: skip
    pipeline.train(alone, tmp_path / "alone", stage="tokenizer")
    expected, found = (history(folder, stage="tokenizer", kind="train")[0] for folder in (tmp_path / "alone", run))
    for name in ("loss", "l1", "perceptual", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_another_number_of_processes_continues_a_run(run, spec, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "generator")
    shutil.rmtree(copy / "checkpoints/generator/000000032")
    pipeline.train(spec, copy)
    assert [line["images"] for line in history(copy, stage="generator", kind="train")] == [8, 16, 24, 32]


# One batch in parts.


class FirstStep(Exception):
    """Stops a training at its first update."""


def first_gradients(monkeypatch, module, spec: RunSpec, run: Path, stage: str) -> tuple[list[torch.Tensor], float]:
    """Gradients and loss of the first step."""
    caught: list = []

    def update(optimizer, parameters, loss, clip):
        caught.extend(parameter.grad.clone() for parameter in parameters if parameter.grad is not None)
        caught.append(float(loss))
        raise FirstStep

    monkeypatch.setattr(module, "update", update)
    with pytest.raises(FirstStep):
        pipeline.train(spec, run, stage=stage)
    monkeypatch.undo()
    return caught[:-1], caught[-1]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_a_batch_in_parts_has_the_gradient_of_the_batch(tiny_spec, trained_run, tmp_path, monkeypatch, stage, size):
    module = {"tokenizer": train_tokenizer, "generator": train_generator}[stage]
    settings = ["evaluation.in_training=[]", "generator_training.cond_drop_prob=0.5"]
    if stage == "tokenizer":
        settings += ["tokenizer.noise_tau=0", "tokenizer_training.adversarial=null"]
    else:
        settings.append(f"tokenizer_from={trained_run / 'tokenizer'}")
    spec = apply_overrides(tiny_spec, settings)
    parts = apply_overrides(spec, [f"{stage}_training.micro_batch_size={size}"])
    expected, expected_loss = first_gradients(monkeypatch, module, spec, tmp_path / "whole", stage)
    found, loss = first_gradients(monkeypatch, module, parts, tmp_path / "parts", stage)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert len(found) == len(expected) > 10
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * scale


def test_stage_1_says_that_it_is_not_sharded(tiny_spec, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    spec = apply_overrides(tiny_spec, ["parallel.strategy=fsdp", "tokenizer_training.adversarial=null"])
    first_gradients(monkeypatch, train_tokenizer, spec, tmp_path, "tokenizer")
    assert "tokenizer: spec.parallel is for the generator; this stage is replicated, and runs as" in caplog.text


@pytest.mark.parametrize("option", ["--npz", "--out"])
def test_two_processes_sample_what_one_samples(run, tmp_path, option):
    """Three chunks of 16 for two processes."""
    names = [tmp_path / f"{who}{'.npz' if option == '--npz' else ''}" for who in ("two", "one")]
    for processes, name in zip(("2", "1"), names, strict=True):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        sample = ["-m", "--", "raev2", "sample", "--run", str(run), "--n", "40", option, str(name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        result = subprocess.run([*command, *sample], env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-5000:]
    contents = [
        {file.name: file.read_bytes() for file in name.iterdir()} if name.is_dir() else name.read_bytes()
        for name in names
    ]
    assert contents[0] == contents[1]
