"""What a frozen encoder knows: linear probing (LP) and local distance similarity (LDS) of its tokens.

LP    top-1 accuracy of a linear classifier on the mean token of an image
LDS   mean cosine of neighbouring tokens minus mean cosine of distant ones: how much the token map has of a map

Sources: LDS is defined in iREPA (arXiv 2512.10794) with distances of at least 6 on a 16 x 16 grid; the distance is
scaled with the grid here. The probing protocol of the RAEv2 paper is not published; the one here is `linear_probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from raev2.data import FolderDataset, ordered_batches, to_float
from raev2.errors import DataError
from raev2.spec import EncoderSpec
from raev2.tokenizer.encoders import FrozenEncoder, build_encoder
from raev2_tasks.analyses.table import Table, lines

BATCH = 64
LDS_IMAGES = 512
FAR_OF_16 = 6  # Manhattan distance on a 16 x 16 grid


def probe_encoders(
    data_dir: Path, encoders: Sequence[str], grid: tuple[int, int], counts: Sequence[int], device: torch.device
) -> Table:
    """LP and LDS of the sum of the last K layers, for each encoder and each K.

    data_dir   dataset folder with labels; trained on 'train', measured on 'val'
    counts     values of K; those above an encoder's depth are left out
    """
    rows: list[dict[str, Any]] = []
    for name in encoders:
        depth = build_encoder(EncoderSpec(name=name), grid).trunk.depth
        for count in [count for count in counts if count <= depth]:
            spec = EncoderSpec(name=name, layers=tuple(range(depth - count, depth)))
            encoder = build_encoder(spec, grid).to(device)
            size = (grid[0] * encoder.patch_size, grid[1] * encoder.patch_size)
            train, val = (FolderDataset(data_dir, split, size, ("label",)) for split in ("train", "val"))
            if not train.classes:
                raise DataError(f"data {data_dir}", "linear probing needs labels", hint="Build it from class folders.")
            (x_train, y_train, _), (x_val, y_val, lds) = (pooled(encoder, split, device) for split in (train, val))
            accuracy, balanced = linear_probe(x_train, y_train, x_val, y_val, len(train.classes))
            rows.append({"encoder": name, "K": count, "LP": accuracy, "LP balanced": balanced, "LDS": lds})
    return Table(
        "probe",
        "Linear probing and local distance similarity by number of layers",
        rows,
        f"LP: multinomial logistic regression on the mean token, standardised, L2 1e-3, trained on 'train' and "
        f"measured on 'val' of {data_dir}; balanced: mean over classes. LDS: 4-neighbours against Manhattan distance "
        f"of at least {far_distance(grid)} on the {grid[0]} x {grid[1]} grid, first {LDS_IMAGES} images of 'val'.",
        lines(rows, "K", ("LP", "LDS"), by="encoder"),
        x_label="K, number of last layers summed",
        settings={"data": str(data_dir), "grid": list(grid)},
    )


@torch.no_grad()
def pooled(encoder: FrozenEncoder, dataset: FolderDataset, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Mean tokens (S, D) and labels (S,) of a split, and the LDS of its first images."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    similarities: list[Tensor] = []
    for batch in ordered_batches(dataset, BATCH, skip_unreadable=True):
        tokens = encoder(to_float(batch.images.to(device))).float()
        features.append(tokens.mean(1).cpu())
        labels.append(batch.cond["label"])
        if sum(len(part) for part in similarities) < LDS_IMAGES:
            similarities.append(local_similarity(tokens, encoder.grid).cpu())
    return torch.cat(features), torch.cat(labels), float(torch.cat(similarities)[:LDS_IMAGES].mean())


def linear_probe(
    x_train: Tensor, y_train: Tensor, x_val: Tensor, y_val: Tensor, num_classes: int, l2: float = 1e-3
) -> tuple[float, float]:
    """Top-1 accuracy and its mean over classes of a logistic regression, fitted by L-BFGS from zero."""
    mean, std = x_train.mean(0), x_train.std(0).clamp(min=1e-6)
    x_train, x_val = (x_train - mean) / std, (x_val - mean) / std
    weight = torch.zeros(x_train.shape[1] + 1, num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x_train @ weight[:-1] + weight[-1], y_train) + l2 / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    correct = ((x_val @ weight[:-1] + weight[-1]).argmax(1) == y_val).float()
    by_class = [correct[y_val == label].mean() for label in y_val.unique()]
    return float(correct.mean()), float(torch.stack(by_class).mean())


def local_similarity(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """LDS of every image, (B,), from tokens (B, N, D) of a rows x columns grid."""
    unit = F.normalize(tokens, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([rows.flatten(), cols.flatten()], 1)
    distance = (place[:, None] - place[None]).abs().sum(-1).to(tokens.device)
    near, far = distance == 1, distance >= far_distance(grid)
    return cosine[:, near].mean(1) - cosine[:, far].mean(1)


def far_distance(grid: tuple[int, int]) -> int:
    """Manhattan distance from which tokens count as distant: 6 on a 16 x 16 grid, in proportion on others."""
    return max(2, round(FAR_OF_16 * max(grid) / 16))
