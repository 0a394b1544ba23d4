"""What the blocks of a trained generator hold: similarity of their tokens to clean encoder tokens.

CKA       linear centred kernel alignment between the tokens of a block and the clean latents, 0 to 1
spatial   correlation of the two token-by-token cosine maps within an image: whether the layout is the same

Sources: Kornblith et al. (arXiv 1905.00414) for CKA; spatial self-similarity as in iREPA (arXiv 2512.10794).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from raev2.flow import interpolate
from raev2.model.generator import Generator
from raev2.shapes import Latents
from raev2_tasks.analyses.table import Table, lines


@torch.no_grad()
def block_table(
    generator: Generator, latents: Latents, cond: Mapping[str, Tensor], times: Sequence[float], seed: int = 0
) -> Table:
    """CKA and spatial self-similarity of every trunk block, at several noise levels.

    latents   clean, normalised, (B, C, H, W), with their conditions; B of 64 or more for a stable CKA
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    target = F.unfold(latents, generator.network_spec.patch_size, stride=generator.network_spec.patch_size)
    target = target.transpose(1, 2)  # (B, N, patch)
    rows = []
    for t in times:
        point = interpolate(latents, noise, torch.full((len(latents),), t, device=latents.device))
        for block, tokens in enumerate(block_tokens(generator, point.z_t, point.t, cond), start=1):
            cka = linear_cka(tokens.flatten(0, 1), target.flatten(0, 1))
            rows.append({"t": t, "block": block, "CKA": cka, "spatial": spatial_similarity(tokens, target)})
    return Table(
        "blocks",
        "Similarity of the generator's blocks to clean latents",
        rows,
        f"{len(latents)} images. CKA over all tokens; spatial: correlation of the cosine maps within each image, "
        "averaged. t = 1 is noise.",
        lines(rows, "block", ("CKA", "spatial"), by="t"),
        x_label="block of the trunk",
        settings={"images": len(latents), "times": list(times), "seed": seed},
    )


def block_tokens(generator: Generator, z_t: Latents, t: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
    """Image tokens (B, N, D) after every trunk block."""
    found: list[Tensor] = []
    num_patches = z_t.shape[2] * z_t.shape[3] // generator.network_spec.patch_size**2

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        found.append(output[:, :num_patches].float())

    handles = [block.register_forward_hook(keep) for block in generator.network.trunk.blocks]
    try:
        generator(z_t, t, cond)
    finally:
        for handle in handles:
            handle.remove()
    return found


def linear_cka(x: Tensor, y: Tensor) -> float:
    """|y^T x|^2 / (|x^T x| |y^T y|) of centred rows (S, D), Frobenius norms; 1 for equal up to rotation and scale."""
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def spatial_similarity(x: Tensor, y: Tensor) -> float:
    """Mean over images of the correlation of the upper triangles of the cosine maps of two token sets (B, N, D)."""
    maps = []
    for tokens in (x, y):
        unit = F.normalize(tokens.double(), dim=-1)
        cosine = unit @ unit.transpose(1, 2)
        above = torch.triu(torch.ones(cosine.shape[1:], dtype=torch.bool, device=tokens.device), diagonal=1)
        values = cosine[:, above]
        maps.append(F.normalize(values - values.mean(1, keepdim=True), dim=1))
    return float((maps[0] * maps[1]).sum(1).mean())
