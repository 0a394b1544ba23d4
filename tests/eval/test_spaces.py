"""The six spaces, FDr^6 and MIND."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms import functional as pictures_of_torchvision

from raev2.batch import MetricResult
from raev2.command.cli import main
from raev2.errors import DataError
from raev2.eval.distances import Gaussian, Moments
from raev2.eval.features import FeatureExtractor
from raev2.eval.protocols import GenerationEvaluator
from raev2.eval.sets import Scale, SetFeatures
from raev2_tasks.imagenet import spaces
from raev2_tasks.imagenet.spaces import FD_VAL, SPACES, Space, TimmFeatures, distances_alone, fdr6, mind, mind6, mind_of

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Toy(FeatureExtractor):
    name, dim, preparation, fingerprint = "inception", 4, "none", "f" * 64

    def __init__(self, name="inception"):
        self.name = name

    def __call__(self, images_u8):
        raise NotImplementedError


# The networks.


@pytest.mark.parametrize("name", SPACES)
def test_timm_knows_the_networks_and_their_features_have_the_stated_length(name):
    space = SPACES[name]
    with torch.device("meta"):
        model = timm.create_model(space.model, num_classes=0)
    assert model.num_features == space.dim
    assert (getattr(model, "attn_pool", None) is not None) == (space.output == "pool")
    assert space.model.partition(".")[2] in timm.get_pretrained_cfg(space.model).tag


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def write(name, **options):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, **options)
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.05)
        save_file(model.state_dict(), tmp_path / "checkpoints" / f"{name}.safetensors")
        return model.eval()

    return write


@pytest.mark.parametrize(
    ("model", "output", "side"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "token", 224),
        ("vit_tiny_patch16_224.augreg_in21k", "token", 200),  # 12.5 patches: padded to 13
        ("convnext_atto.d2_in1k", "mean", 64),
        ("vit_medium_patch32_clip_224.tinyclip_laion400m", "token", 64),
    ],
)
def test_features_are_those_of_the_network_on_pictures_prepared_by_torchvision(weights, model, output, side):
    expected_model = weights(model)
    dim = expected_model.num_features
    features = TimmFeatures("toy", Space(model, output, side, dim, 1.0), CPU)
    images = torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    resized = pictures_of_torchvision.resize(images.float() / 255, [side, side], antialias=True, interpolation=3)
    config = expected_model.pretrained_cfg
    prepared = pictures_of_torchvision.normalize(resized, config["mean"], config["std"])
    if output == "token":
        padding = -side % expected_model.patch_embed.patch_size[0]
        prepared = torch.nn.functional.pad(prepared, (0, padding, 0, padding))
        expected_model.set_input_size(prepared.shape[2:])
    with torch.no_grad():
        tokens = expected_model.forward_features(prepared)
    expected = tokens[:, 0] if output == "token" else tokens.flatten(2).mean(2)
    torch.testing.assert_close(features(images), expected, rtol=1e-3, atol=1e-4)
    assert features(images).shape == (2, dim) and str(side) in features.preparation


def test_a_picture_of_the_right_size_is_not_resized(weights, monkeypatch):
    weights("convnext_atto.d2_in1k")
    features = TimmFeatures("toy", Space("convnext_atto.d2_in1k", "mean", 64, 320, 1.0), CPU)
    monkeypatch.setattr(spaces, "interpolate", None)
    features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_missing_weights_name_the_file_and_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = (
        r"checkpoints/vit_large_patch16_224.mae.safetensors: the weights of .*mae are missing; got .*Download https"
    )
    with pytest.raises(DataError, match=expected):
        spaces.build_space("mae", CPU)


def test_a_space_without_weights_is_told_before_and_the_others_come_out(caplog):
    def build(name, device):
        if name == "clip":
            raise DataError("weights clip.safetensors", "missing")
        return Toy(name)

    def evaluator(*names):
        return GenerationEvaluator("six", lambda *_: {}, names, label_policy="none", num_samples=1, build=build)

    assert [extractor.name for extractor in evaluator("mae", "clip", "siglip").open(CPU)] == ["mae", "siglip"]
    assert "goes on without this feature space: weights clip.safetensors: missing" in caplog.text
    with pytest.raises(DataError, match="weights clip.safetensors: missing"):
        evaluator("clip").open(CPU)


# FDr^6.


def gaussian(shift: int, count: int = 50_000) -> SetFeatures:
    """A set whose Fréchet distance to `gaussian(0)` is the square of the shift."""
    return SetFeatures("toy", Gaussian(torch.tensor([float(shift), 0, 0, 0]), torch.eye(4), count), None)


def results(shift: int, scale: Scale | None = None) -> list[MetricResult]:
    return [
        result
        for number, name in enumerate(FD_VAL)
        for result in distances_alone(Toy(name), gaussian(shift + number), gaussian(0), scale)
    ]


def test_fdr6_is_the_mean_of_distances_over_those_of_validation_pictures():
    found = {result.name: result for result in fdr6(results(2))}
    expected = [(2 + number) ** 2 / value for number, value in enumerate(FD_VAL.values())]
    assert [found[f"fdr_{name}"].value for name in FD_VAL] == pytest.approx(expected)
    assert found["fdr6"].value == pytest.approx(sum(expected) / 6)
    assert "as published for ImageNet" in found["fdr_mae"].note


def test_the_published_distances_give_the_published_ratio_of_real_pictures():
    real = [MetricResult("fid" if name == "inception" else f"fd_{name}", value, 50_000, better="lower", role="headline",
                         about="real") for name, value in FD_VAL.items()]  # fmt: skip
    assert list(fdr6(real))[-1].value == pytest.approx(1)


def test_with_validation_pictures_at_hand_they_are_the_denominator():
    scale = Scale(gaussian(0), gaussian(3), gaussian(9))
    found = {result.name: result for result in fdr6(results(2, scale))}
    expected = [(2 + number) ** 2 / 9 for number in range(6)]
    assert [found[f"fdr_{name}"].value for name in FD_VAL] == pytest.approx(expected)
    assert found["fdr6"].value == pytest.approx(sum(expected) / 6) and "measured here" in found["fdr_clip"].note


def test_fdr6_is_not_given_when_a_space_is_missing():
    some = [result for result in results(2) if result.name != "fd_clip"]
    assert [result.name for result in fdr6(some)] == [f"fdr_{name}" for name in FD_VAL if name != "clip"]


# MIND.


def test_mind_of_a_shift_is_three_times_its_squared_length():
    """Along a unit direction u a shift s moves every sorted projection by u . s, and E[(u . s)^2] = |s|^2 / D."""
    features = randn(50, 8)
    shift = torch.tensor([3.0, 4, 0, 0, 0, 0, 0, 0])
    assert mind(features + shift, features) == pytest.approx(3 * 25, rel=0.1)
    assert mind(features, features) == 0


def test_mind_is_the_mean_cost_of_matching_sorted_projections():
    """Brute force in one dimension, where sorting is the best matching: -1 and 1 are the only directions."""
    one, two = torch.tensor([[1.0], [5.0], [2.0]]), torch.tensor([[4.0], [0.0], [9.0]])
    assert mind(one, two) == pytest.approx(3 * (1 + 4 + 16) / 3)


def test_mind_of_two_gaussians_is_the_closed_form():
    """Standard deviations 1 and s in every direction: E[(u . x)^2] costs (s - 1)^2, times 3 D."""
    one, two = randn(3000, 5), 2 * randn(3000, 5, seed=1)
    assert mind(one, two) == pytest.approx(3 * 5, rel=0.1)


def test_mind_cuts_the_larger_set_to_a_random_subset():
    sorted_set = torch.arange(1000.0)[:, None]  # its first rows are small numbers
    assert mind(sorted_set, sorted_set[::10]) < 0.02 * mind(sorted_set[:100], sorted_set[::10])
    assert mind(sorted_set, sorted_set[::10]) == mind(sorted_set, sorted_set[::10])


def test_mind6_is_the_mean_over_six_spaces_with_a_scale_beside_each():
    sets = [SetFeatures.of(name, randn(60, 4, seed=seed) + seed) for seed, name in enumerate(("val", "train", "made"))]
    reference, train, made = sets
    found = [
        result for name in FD_VAL for result in mind_of(Toy(name), made, reference, Scale(train, train, made))
    ]  # fmt: skip
    assert [result.name for result in found[:3]] == [
        "mind_inception",
        "mind_inception_train",
        "mind_inception_shuffled",
    ]
    assert found[1].value < found[0].value and found[1].of == "mind_inception"
    assert [result.name for result in mind6(found)] == ["mind6"]
    assert next(mind6(found)).value == pytest.approx(found[0].value)
    assert list(mind6(found[:6])) == []
    with pytest.raises(
        DataError, match="MIND: needs features of reference pictures, not their statistics. Give a folder"
    ):
        list(mind_of(Toy(), made, SetFeatures("statistics", Moments.of(made.rows), None)))
    assert math.isfinite(found[0].value)


# Pictures of any origin, in six spaces of means of rows of pixels.


class Rows(FeatureExtractor):
    dim, preparation = 8, "means of eight rows"

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.fingerprint = name, name
        self.model = SPACES[name].model if name in SPACES else name

    def __call__(self, images_u8):
        rows = images_u8.float().mean((1, 3))
        return rows + rows.roll(1, 1) * list(FD_VAL).index(self.name)


@pytest.fixture
def score(tmp_path, monkeypatch):
    """The scores of 40 pictures by `raev2 eval --images`."""
    monkeypatch.setattr("raev2_tasks.imagenet.protocols.build_space", Rows)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)

    def run(protocol, reference, code=0):
        files = [
            "--images",
            str(tmp_path / "images.npz"),
            "--reference",
            str(reference),
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(["eval", *files, "--protocol", protocol, "--workers", "0"]) == code
        return code or {row["name"]: row["value"] for row in json.loads((tmp_path / "out").read_text())["results"]}

    return run, torch.from_numpy(images).permute(0, 3, 1, 2)


def test_fdr6_against_published_statistics_of_each_network(score, tmp_path, capsys):
    run, images = score
    folder, expected = tmp_path / "statistics", {}
    folder.mkdir()
    for name, value in FD_VAL.items():
        extractor = Rows(name, CPU)
        features = extractor(images).double()
        np.savez(
            folder / f"{extractor.model}_in256_t224_stats.npz", ref_mu=features.mean(0) + 1, ref_sigma=features.T.cov()
        )
        expected[name] = 8 / value  # the distance of a shift by one in eight features
    found = run("generation-fdr6", folder)
    assert {name: found[f"fdr_{name}"] for name in FD_VAL} == pytest.approx(expected, rel=1e-4)
    assert found["fdr6"] == pytest.approx(sum(expected.values()) / 6, rel=1e-4)
    assert not [name for name in found if "precision" in name]
    (folder / f"{SPACES['clip'].model}_in256_t224_stats.npz").unlink()
    run("generation-fdr6", folder, code=3)
    message = (
        "not one file of statistics for the space 'clip'; got .*stats.npz; expected a name with 'vit_large_patch14"
    )
    assert re.search(message, capsys.readouterr().err)


def test_mind6_against_an_array_of_validation_pictures(score, tmp_path):
    run, images = score
    reference = images.flip(3).roll(3, 0) // 2
    np.savez(tmp_path / "val.npz", arr_0=reference.permute(0, 2, 3, 1).numpy())
    found = run("generation-mind6", tmp_path / "val.npz")
    expected = [mind(Rows(name, CPU)(images), Rows(name, CPU)(reference)) for name in FD_VAL]
    assert [found[f"mind_{name}"] for name in FD_VAL] == pytest.approx(expected, rel=1e-5)
    assert found["mind6"] == pytest.approx(sum(expected) / 6, rel=1e-5)
