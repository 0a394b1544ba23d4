"""How wide a transformer must be for a latent: over-fit one image with networks of several widths.

The last layer of a network of width d maps to the n channels of a token, so its prediction of the velocity
w = noise - token lies in a d-dimensional subspace (plus a bias). No such network can do better than leaving out the
n - d smallest eigenvalues of the covariance of w:

    loss >= (1 / n) * sum of the n - d smallest eigenvalues of cov(w),      cov(w) = I + cov(tokens)

which is zero for d >= n. This is Theorem 1 of RAE (arXiv 2510.11690), for the tokens of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raev2.batch import PathPoint
from raev2.flow import interpolate, sample_t
from raev2.model.condition import NoCondition
from raev2.model.generator import Generator
from raev2.spec import DiTSpec, FlowSpec
from raev2_tasks.analyses.seeds import Estimate, whiskers
from raev2_tasks.analyses.table import Table, lines


def width_bound(latents: Tensor, width: int) -> float:
    """The smallest mean squared error of the velocity for one image's latents (C, H, W), by the eigenvalues."""
    tokens = latents.flatten(1).double()  # (C, N)
    covariance = torch.eye(len(tokens), dtype=torch.float64) + torch.cov(tokens, correction=0)
    eigenvalues = torch.linalg.eigvalsh(covariance)  # ascending
    return float(eigenvalues[: max(0, len(tokens) - width)].sum() / len(tokens))


def width_table(
    latents: Tensor, widths: Sequence[int], seeds: int, *, steps: int, depth: int, batch_size: int, lr: float
) -> Table:
    """Final loss of LightningDiT of each width on one image over seeds, beside the bound.

    latents   normalised latents of one image (C, H, W)
    """
    channels, rows = latents.shape[0], list[dict[str, Any]]()
    for width in widths:
        losses = {
            seed: overfit(latents, width, steps=steps, depth=depth, batch_size=batch_size, lr=lr, seed=seed)
            for seed in range(seeds)
        }
        bound = width_bound(latents, width)
        row = {"width": width, "seeds": seeds, "loss": Estimate(losses), "bound": bound}
        rows.append({**row, "seeds below the bound": sum(loss < bound for loss in losses.values())})
    return Table(
        "width",
        "Over-fitting one image: final loss by width",
        rows,
        f"Latent tokens of {channels} channels. loss: mean squared error of the velocity over the last tenth of "
        f"{steps} steps (LightningDiT, depth {depth}, batch {batch_size} noises of one image, velocity prediction); in "
        f"brackets 95 % intervals over the seeds, of weights and noises. bound: Theorem 1, zero from a width of "
        f"{channels} on. The loss also holds what {steps} steps did not learn.",
        [*whiskers({"loss": [(row["width"], row["loss"]) for row in rows]}), *lines(rows, "width", ("bound",))],
        x_label="width of the network",
        settings={"steps": steps, "depth": depth, "batch_size": batch_size, "lr": lr, "seeds": seeds},
    )


def overfit(latents: Tensor, width: int, *, steps: int, depth: int, batch_size: int, lr: float, seed: int) -> float:
    """Mean loss over the last tenth of the steps of a LightningDiT that sees one image only."""
    torch.manual_seed(seed)
    flow = FlowSpec(prediction="velocity")
    shape: Any = tuple(latents.shape)
    spec = DiTSpec(width=width, depth=depth, num_heads=max(1, width // 48))
    generator = Generator(spec, NoCondition(), flow, shape).to(latents.device)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng = torch.Generator(latents.device).manual_seed(seed)
    batch, losses = latents.expand(batch_size, *latents.shape), []
    for _ in range(steps):
        t = sample_t(batch_size, flow, generator.time_shift, rng, latents.device)
        noise = torch.randn(batch.shape, generator=rng, device=latents.device)
        point: PathPoint = interpolate(batch, noise, t)
        with torch.autocast(latents.device.type, torch.bfloat16):
            prediction = generator(point.z_t, point.t, {}).pred
        loss = (prediction.float() - point.velocity).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())
