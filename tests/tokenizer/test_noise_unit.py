"""Noise on tokens is told in their standard deviation; what older files and published recipes mean stays absolute."""

from __future__ import annotations

import pytest
import torch
import yaml

from raev2 import RAE, pipeline
from raev2.data import FolderDataset, to_float
from raev2.spec_io import fingerprint, load_spec, save_spec
from raev2.train_tokenizer import measure_stats, token_std

CPU = torch.device("cpu")


def test_the_unit_is_the_standard_deviation_of_the_aggregate(tiny_spec, synthetic_data):
    """Oracle: the tokens themselves. The sum of 6 layers has 6 times the mean's."""
    dataset = FolderDataset(synthetic_data, "train", (64, 64))
    unit = {}
    for aggregate in ("sum", "mean"):
        spec = tiny_spec.tokenizer.replace(encoder=tiny_spec.tokenizer.encoder.replace(aggregate=aggregate))
        rae = RAE.from_spec(spec)
        tokens = rae.tokens(to_float(torch.stack([dataset.image(i) for i in range(len(dataset))])))
        unit[aggregate] = token_std(rae, dataset, CPU)
        assert unit[aggregate] == pytest.approx(tokens.var(0, unbiased=False).mean().sqrt().item(), rel=1e-5)
    assert unit["sum"] == pytest.approx(6 * unit["mean"], rel=1e-5)


def test_training_multiplies_the_noise_by_the_unit(tiny_spec, synthetic_data, tmp_path):
    """The same strength in the other unit is the same training."""
    short = tiny_spec.replace(tokenizer_training=tiny_spec.tokenizer_training.replace(images=8))
    relative = short.tokenizer
    std = token_std(RAE.from_spec(relative), FolderDataset(synthetic_data, "train", (64, 64)), CPU)
    absolute = relative.replace(noise_unit="tokens", noise_tau=std * relative.noise_tau)
    plain = relative.replace(noise_unit="tokens")
    weights = []
    for number, tokenizer in enumerate((relative, absolute, plain)):
        run = pipeline.train(short.replace(tokenizer=tokenizer), tmp_path / str(number), stage="tokenizer")
        weights.append(RAE.from_pretrained(run / "tokenizer").decoder.last_layer)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
    assert not torch.allclose(weights[0], weights[2], rtol=0, atol=1e-4)


def test_a_file_without_the_unit_means_tokens(tiny_spec, tmp_path):
    """As the code before the field did, with the fingerprint of that time."""
    old = tiny_spec.replace(tokenizer=tiny_spec.tokenizer.replace(noise_unit="tokens"))
    save_spec(old, tmp_path / "spec.yaml")
    values = yaml.safe_load((tmp_path / "spec.yaml").read_text())
    del values["tokenizer"]["noise_unit"]
    (tmp_path / "older.yaml").write_text(yaml.safe_dump(values))
    loaded = load_spec(tmp_path / "older.yaml")
    assert loaded == old and fingerprint(loaded) == fingerprint(old) != fingerprint(tiny_spec)


def test_statistics_of_some_pictures_are_of_all_classes(tiny_spec, synthetic_data):
    """Not of those that come first: data are often in the order of their classes."""

    class Asked(FolderDataset):
        def image(self, index: int) -> torch.Tensor:
            asked.add(self.group(index))
            return super().image(index)

    asked: set[object] = set()
    dataset = Asked(synthetic_data, "train", (64, 64))
    classes = {dataset.group(index) for index in range(len(dataset))}
    measure_stats(RAE.from_spec(tiny_spec.tokenizer), dataset, CPU, len(classes))
    assert asked == classes
