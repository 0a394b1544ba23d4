"""Our metrics and those of torch-fidelity, on one Inception network with random weights and the same pictures."""

from __future__ import annotations

import math

import pytest
import torch

from raev2.eval.distances import (
    FrechetTo,
    Moments,
    inception_score,
    kernel_distance,
    moments_distance,
    precision_recall,
)
from raev2.eval.features import InceptionFeatures
from raev2.eval.sets import SetFeatures, compare

torch_fidelity = pytest.importorskip("torch_fidelity")
from inception_weights import write_random_inception  # noqa: E402
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_isc import isc_features_to_metric, isc_featuresdict_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric, kid_featuresdict_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric, prc_featuresdict_to_metric  # noqa: E402
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id  # noqa: E402

NUM = 8


class Pictures(torch.utils.data.Dataset):
    """Noise on a random colour; the second set is smoother."""

    def __init__(self, seed: int, side: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise, colour = (torch.rand(NUM, 3, n, n, generator=generator) for n in (side, 1))
        images = (torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear") + colour) / 2
        self.images = (images * 255).to(torch.uint8)

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "random-inception.pth"
    write_random_inception(file)
    sets = Pictures(0, 16), Pictures(1, 6)
    options = {"cuda": False, "batch_size": NUM, "feature_extractor_weights_path": str(file), "verbose": False}
    network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **options)
    inputs = {"input1": sets[0], "input2": sets[1], "cache": False, **options}
    theirs = [extract_featuresdict_from_input_id(number, network, **inputs) for number in (1, 2)]
    extractor = InceptionFeatures(torch.device("cpu"), file)
    return theirs, extractor, [extractor.outputs(own.images) for own in sets], sets


def test_scores_of_pictures_are_those_of_torch_fidelity(measured):
    theirs, _, (one, two), _ = measured
    expected = isc_featuresdict_to_metric(theirs[0], "logits_unbiased", isc_splits=2, verbose=False)
    assert inception_score(one["logits"], num_splits=2) == pytest.approx(tuple(expected.values()), rel=1e-5, abs=1e-9)
    assert expected["inception_score_mean"] > 1.01, "the network tells the pictures apart"

    options = {"kid_subsets": 7, "kid_subset_size": NUM // 2, "verbose": False}
    double = [{"2048": own["2048"].double()} for own in theirs]  # in float32 it keeps five digits
    expected = kid_featuresdict_to_metric(*double, "2048", **options)
    found = kernel_distance(one[""], two[""], num_subsets=7, subset_size=NUM // 2)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-5)

    expected = prc_featuresdict_to_metric(*theirs, "2048", verbose=False)
    assert precision_recall(two[""], one[""]) == pytest.approx((expected["precision"], expected["recall"]))


def test_fid_of_pictures_is_that_of_torch_fidelity(measured):
    """In every 16th feature: torch-fidelity takes minutes for the eigenvalues of a 2048 x 2048 matrix."""
    theirs, _, outputs, _ = measured
    statistics = [fid_features_to_statistics(own["2048"][:, ::16].double()) for own in theirs]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = moments_distance(*(Moments.of(own[""][:, ::16]) for own in outputs))
    assert found == pytest.approx(expected, rel=1e-5)


def test_with_more_pictures_than_features_the_numbers_agree_to_nine_digits():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(700, 96, generator=generator).double().relu() * scale for scale in (1.0, 1.2))
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (one, two)), verbose=False)
    assert FrechetTo(Moments.of(two))(Moments.of(one)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    assert inception_score(one) == pytest.approx(tuple(isc_features_to_metric(one).values()), rel=1e-9)
    options = {"kid_subsets": 5, "kid_subset_size": 300, "verbose": False}
    expected = tuple(kid_features_to_metric(one, two, **options).values())
    assert kernel_distance(one, two, num_subsets=5, subset_size=300) == pytest.approx(expected, rel=1e-9)
    theirs = prc_features_to_metric(one, two, verbose=False)
    assert precision_recall(two, one) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_spatial_features_are_seven_channels_of_the_seventeenth_rows(measured):
    _, extractor, outputs, sets = measured
    network, block = extractor.network, {}
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda _, inputs, output: block.update(found=output))
    extractor(sets[0].images[:2])
    hook.remove()
    # TensorFlow's mixed_6/conv is the first branch of this block; its channels are last.
    expected = block["found"][:, :7].movedim(1, 3).reshape(2, 17 * 17 * 7)
    torch.testing.assert_close(outputs[0]["spatial"][:2], expected)


def test_every_metric_of_inception_comes_under_its_name(measured):
    _, extractor, outputs, _ = measured
    one, two = (
        SetFeatures.of(name, own[""], logits=own["logits"], spatial=own["spatial"])
        for name, own in zip(("pictures", "reference"), outputs, strict=True)
    )
    found = {result.name: result for result in compare(extractor, one, two)}
    assert list(found) == ["fid", "inception_score", "sfid", "kid", "precision_inception", "recall_inception"]
    assert found["sfid"].value == pytest.approx(
        moments_distance(Moments.of(outputs[0]["spatial"]), Moments.of(outputs[1]["spatial"]))
    )
    assert "only 8 pictures for 2,048 features: biased" in found["fid"].warning
    assert all(math.isfinite(result.value) and result.about for result in found.values())
    assert {result.better for result in found.values() if "fid" in result.name or result.name == "kid"} == {"lower"}
