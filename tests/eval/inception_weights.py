"""An Inception network with random weights, as a file that torch-fidelity and this project load."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_random_inception(file: Path) -> None:
    """Weights that keep the size of activations, so that features differ between pictures."""
    with mock.patch.object(torch, "load"), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(0)
    weights = network.state_dict()
    for value in weights.values():
        if value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    weights["fc.weight"].normal_(0, 1, generator=generator)
    torch.save(weights, file)
