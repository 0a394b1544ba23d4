"""`decoder_from`: a trained decoder goes on learning on other pictures, the latents stay what they were."""

from __future__ import annotations

import pytest
import torch

from raev2 import RAE
from raev2.command.cli import main
from raev2.errors import SpecError
from raev2.files.artefact import load_artefact
from raev2.model.opened import find_source, open_trained
from raev2.pipeline import train


@pytest.fixture(scope="module")
def tuned(tiny_spec, trained_run, tmp_path_factory):
    """Two steps on top of the tiny run's decoder, with another unit of noise."""
    loop = tiny_spec.tokenizer_training.replace(images=16, save_every_images=16, adversarial=None)
    spec = tiny_spec.replace(
        decoder_from=str(trained_run / "tokenizer"), tokenizer_training=loop,
        tokenizer=tiny_spec.tokenizer.replace(noise_tau=0.25, decoder=tiny_spec.tokenizer.decoder.replace(depth=1)),
    )  # fmt: skip
    return train(spec, tmp_path_factory.mktemp("runs") / "tuned", stage="tokenizer")


def test_statistics_and_size_stay_and_the_decoder_goes_on(trained_run, tuned, synthetic_data):
    (_, before, _), (config, after, _) = (
        load_artefact(run / "tokenizer", kind="tokenizer") for run in (trained_run, tuned)
    )
    assert before.keys() == after.keys(), "also the depth"
    changed = {name for name in before if not before[name].equal(after[name])}
    assert "decoder.blocks.1.fc1.weight" in changed and not changed & {"stats.mean", "stats.var"}
    moved = sum((after[name] - before[name]).norm() for name in changed) / sum(before[name].norm() for name in changed)
    assert moved < 0.1, "two steps from there, not from anywhere"
    assert config["tokenizer"]["noise_tau"] == 0.25, "of this training"
    assert config["extra"]["data"]["name"] == config["extra"]["begun_with"]["data"]["name"] == "synthetic"
    text = (tuned / "tokenizer" / "README.md").read_text(encoding="utf-8")
    assert text.count("trained on the data synthetic**: ") == 2, "the terms of both trainings"


def test_generators_of_these_latents_stay_usable(trained_run, tuned):
    pair = {"generator": str(trained_run / "generator"), "task": "imagenet", "recipe": "quickstart"}
    opened = open_trained(find_source(**pair, tokenizer=str(tuned / "tokenizer")))
    images = torch.rand(2, 3, 64, 64)
    assert opened.rae.encode(images).equal(RAE.from_pretrained(trained_run / "tokenizer").encode(images))


def test_a_tokenizer_is_either_used_or_trained_on(tiny_spec, tiny_recipe, capsys):
    line = ["train", "--task", "imagenet", "--recipe", "tiny", "--set", "decoder_from=a", "--set", "tokenizer_from=b"]
    assert main(line) == SpecError.exit_code
    message = "decoder_from trains a tokenizer, tokenizer_from uses one; got both. Set one of them"
    assert message in capsys.readouterr().err


def test_a_decoder_that_is_nowhere_is_found_at_the_start(tiny_recipe, tmp_path, capsys):
    line = ["train", "--task", "imagenet", "--recipe", "tiny", "--run", str(tmp_path), "--set", "decoder_from=nowhere"]
    assert main([*line, "--dry-run"]) == 4
    assert "decoder_from: the weights are missing; got not a path on this machine" in capsys.readouterr().err
