"""What cutting a batch to its longest caption saves: training steps and sampling, cut and padded."""

from __future__ import annotations

from collections.abc import Callable

from raev2.bench import Measurement, timed

PADDED = 256  # tokens, the length that reference implementations always pad to
BATCH_SIZE = 32
# Lengths in pieces of the first captions that a quickstart draws: one batch.
CAPTION_LENGTHS = (
    6, 8, 4, 7, 10, 12, 3, 6, 12, 3, 6, 11, 10, 9, 22, 17, 13, 10, 6, 6, 6, 3, 7, 7, 7, 4, 13, 14, 25, 6, 7, 6
)  # fmt: skip


def bench_captions() -> list[Measurement]:
    """A training step and a sampling step of the quickstart's networks, captions cut to the longest and padded to 256.

    Frozen text encoder outputs of 1,024 channels (the width of Qwen3-0.6B) on the 8 x 8 latents of the recipe; then on
    16 x 16, the grid of the published systems.
    """
    found = []
    for grid in (8, 16):
        steps = {length: _steps(grid, length) for length in (max(CAPTION_LENGTHS), PADDED)}
        for name in ("training step", "guided prediction"):
            seconds = timed({str(length): functions[name] for length, functions in steps.items()})
            cut, padded = seconds[str(max(CAPTION_LENGTHS))], seconds[str(PADDED)]
            note = f"{BATCH_SIZE} captions of {min(CAPTION_LENGTHS)} to {max(CAPTION_LENGTHS)} tokens, {grid} x {grid}"
            found += [
                Measurement(f"{name}, cut", 1000 * cut, "ms", note),
                Measurement(f"{name}, {PADDED} tokens", 1000 * padded, "ms", note),
                Measurement(f"{name}, gain", padded / cut, "x", note),
            ]
    return found


def _steps(grid: int, length: int) -> dict[str, Callable[[], object]]:
    """One training step, and one guided prediction, on captions padded to `length`."""
    import torch

    from raev2.batch import drop_cond
    from raev2.flow import interpolate, training_loss
    from raev2.guidance import build_guidance
    from raev2.model.condition import TextCondition
    from raev2.model.generator import Generator
    from raev2.optim import build_optimizer
    from raev2.spec import CFG
    from raev2_tasks.t2i.recipes import quickstart

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    spec = quickstart()
    shape = (192, grid, grid)
    generator = Generator(spec.generator, TextCondition(dim=1024), spec.flow, shape).to(device)
    optimizer = build_optimizer(generator, spec.generator_training.optimizer, 1e-3)
    lengths = torch.tensor(CAPTION_LENGTHS)
    mask = torch.arange(length) < lengths[:, None]
    cond = {"text_tokens": torch.randn(BATCH_SIZE, length, 1024).to(device), "text_mask": mask.to(device)}
    latents, noise = torch.randn(2, BATCH_SIZE, *shape, device=device).unbind()
    t = torch.rand(BATCH_SIZE, device=device)
    drop = torch.arange(BATCH_SIZE, device=device) % 10 == 0
    point = interpolate(latents, noise, t)
    predict = build_guidance(CFG(scale=3.0), generator)

    def train() -> None:
        output = generator(point.z_t, point.t, drop_cond(cond, generator.null_cond(cond), drop))
        training_loss(output, point, latents, spec.flow, base_weight=1.0).total.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample() -> None:
        with torch.no_grad():
            predict(noise, 0.5, cond)

    return {"training step": train, "guided prediction": sample}


BENCHMARKS = {"t2i": bench_captions}
