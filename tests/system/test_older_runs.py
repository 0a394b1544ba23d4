"""A run folder and artefacts made by commit 9c3efb4 still open, continue and sample, to the same bits.

`older_run/run` was stopped at 16 of 32 images; `older_run/expected` is what that commit went on to make of it.
Another processor or torch rounds differently: then the numbers are close instead of equal.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from raev2 import RAE, Generator, pipeline, sample
from raev2.data import to_uint8
from raev2.spec import DDTSpec
from raev2.spec_io import fingerprint, load_spec
from raev2.task import get_data_recipe
from raev2.training.run import provenance

OLDER = Path(__file__).parent / "older_run"
EXPECTED = OLDER / "expected"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A copy of the run, where it was made: beside its dataset folder."""
    monkeypatch.chdir(tmp_path)
    get_data_recipe("synthetic").build(Path("data/synthetic"), {"num_train": "32", "num_val": "16"})
    return Path(shutil.copytree(OLDER / "run", "runs/imagenet"))


@pytest.fixture
def same(run):
    """Compares two tensors, bit for bit on a machine like the one that made the files."""
    made, here = json.loads((run / "provenance.json").read_text()), provenance(load_spec(run / "spec.yaml"), CPU)
    exact = all(made[name] == here[name] for name in ("device", "platform", "num_threads", "versions"))
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}

    def compare(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs, **tolerance)

    return compare


CPU = torch.device("cpu")


def test_its_spec_has_the_same_fingerprint(run):
    spec = load_spec(run / "spec.yaml")
    assert f"fingerprint: {fingerprint(spec)}\n" in (run / "spec.yaml").read_text()


def test_it_continues_to_the_same_weights(run, same):
    pipeline.train(load_spec(run / "spec.yaml"), run)
    ours, theirs = (load_file(folder / "generator/model.safetensors") for folder in (run, EXPECTED))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same(ours[name], value)
    config, known = (json.loads((folder / "generator/config.json").read_text()) for folder in (run, EXPECTED))
    network = {**DDTSpec.added, **known["network"]}  # fields that came later, with the value of older code
    extra = {name: config["extra"][name] for name in known["extra"]}
    assert {**config, "extra": extra} == {**known, "network": network}


def test_it_samples_the_same_pictures(run, same):
    shutil.copytree(EXPECTED / "generator", run / "generator")
    pipeline.sample_run(run, {"n": 8}, None, 3, out=Path("samples"))
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(Path("samples").glob("0*.png"))])
    expected = np.load(EXPECTED / "samples.npz")["images"]
    same(torch.from_numpy(images).float() / 255, torch.from_numpy(expected).float() / 255)


def test_its_artefacts_open_without_the_run(run, same):
    rae, generator = RAE.from_pretrained(run / "tokenizer"), Generator.from_pretrained(EXPECTED / "generator")
    spec = load_spec(run / "spec.yaml")
    cond = {"label": torch.arange(8) % 4}
    images = sample(generator, rae, cond, steps=spec.sampling.steps, guidance=spec.sampling.guidance, seed=3)
    expected = torch.from_numpy(np.load(EXPECTED / "samples.npz")["images"]).permute(0, 3, 1, 2)
    same(to_uint8(images).float() / 255, expected.float() / 255)
