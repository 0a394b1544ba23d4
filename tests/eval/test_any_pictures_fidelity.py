"""`raev2 eval --images` on two folders and torch-fidelity on the same files, with one Inception of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from raev2.command.cli import main
from raev2.eval import features
from raev2.eval.pictures import open_pictures

torch_fidelity = pytest.importorskip("torch_fidelity")
from inception_weights import write_random_inception  # noqa: E402
from torch_fidelity.metric_isc import isc_featuresdict_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_featuresdict_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_featuresdict_to_metric  # noqa: E402
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id  # noqa: E402


class Files(torch.utils.data.Dataset):
    """Pictures of a folder in the order in which ours reads them: the splits of both are the same."""

    def __init__(self, folder: Path) -> None:
        self.pictures, _ = open_pictures(folder)

    def __len__(self):
        return len(self.pictures.places)

    def __getitem__(self, number):
        return self.pictures.read(self.pictures.places[number])


def test_two_folders_score_as_torch_fidelity_scores_them(synthetic_data, tmp_path, monkeypatch):
    file = tmp_path / "random-inception.pth"
    write_random_inception(file)
    monkeypatch.setattr(features, "INCEPTION_WEIGHTS", replace(features.INCEPTION_WEIGHTS, source=str(file)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, reference, out = tmp_path / "images", tmp_path / "reference", tmp_path / "out.json"
    for folder, split in ((images, "val"), (reference, "train")):
        folder.mkdir()
        for number in range(12):
            picture = Image.open(synthetic_data / split / f"{number:06d}.png")
            if split == "train" and number % 3:
                picture = ImageOps.invert(picture)
            picture.save(folder / f"{number}.png")
    paths = ["--images", str(images), "--reference", str(reference), "--out", str(out)]
    assert main(["eval", *paths, "--protocol", "generation-inception", "--workers", "0"]) == 0
    found = {row["name"]: row["value"] for row in json.loads(out.read_text())["results"]}

    options = {"cuda": False, "batch_size": 16, "feature_extractor_weights_path": str(file), "verbose": False}
    network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **options)
    inputs = {"input1": Files(images), "input2": Files(reference), "cache": False, **options}
    theirs = [extract_featuresdict_from_input_id(number, network, **inputs) for number in (1, 2)]
    score = isc_featuresdict_to_metric(theirs[0], "logits_unbiased", verbose=False)
    assert found["inception_score"] == pytest.approx(score["inception_score_mean"], rel=1e-5)
    double = [{"2048": own["2048"].double()} for own in theirs]  # its kernel is as precise as its input
    distance = kid_featuresdict_to_metric(*double, "2048", kid_subset_size=len(inputs["input1"]), verbose=False)
    assert found["kid"] == pytest.approx(distance["kernel_inception_distance_mean"], rel=1e-5)
    shares = prc_featuresdict_to_metric(*theirs, "2048", verbose=False)
    assert found["precision_inception"] == pytest.approx(shares["precision"], rel=1e-5)
    assert found["recall_inception"] == pytest.approx(shares["recall"], rel=1e-5)

    # FID of torch-fidelity takes minutes for the eigenvalues of a 2048 x 2048 matrix; those that are not 0 are these:
    rows = [own["2048"].double() for own in theirs]
    centred = [(own - own.mean(0)) / (len(own) - 1) ** 0.5 for own in rows]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (rows[0].mean(0) - rows[1].mean(0)).square().sum() + sum(own.square().sum() for own in centred)
    assert found["fid"] == pytest.approx(float(expected - 2 * cross), rel=1e-5)
