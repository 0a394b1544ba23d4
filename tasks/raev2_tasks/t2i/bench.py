"""What cutting a batch to its longest caption saves: training steps and sampling, cut and padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from raev2.batch import Measurement
from raev2_tasks.bench.measure import timed

PADDED = 256  # tokens, the length that reference implementations always pad to
# Lengths in pieces of the first captions that a quickstart draws.
CAPTION_LENGTHS = (6, 8, 4, 7, 10, 12, 3, 6, 12, 3, 6, 11, 10, 9, 22, 17)
# Lengths as assumed for captions of several sentences: 80 on average, a long tail.
LONG_LENGTHS = (31, 44, 52, 57, 61, 65, 69, 73, 77, 82, 87, 93, 100, 109, 122, 158)


def bench_captions() -> list[Measurement]:
    """A training step and a sampling step of the quickstart's networks, captions cut to the longest and padded to 256.

    Frozen text encoder outputs of 1,024 channels (the width of Qwen3-0.6B) on the 8 x 8 latents of the recipe, and on
    16 x 16, the grid of the published systems, there also with captions as long as a captioner writes them.
    """
    found = []
    for grid, lengths in ((8, CAPTION_LENGTHS), (16, CAPTION_LENGTHS), (16, LONG_LENGTHS)):
        steps = {length: _steps(grid, lengths, length) for length in (max(lengths), PADDED)}
        for name in ("training step", "guided prediction"):
            seconds = timed({str(length): functions[name] for length, functions in steps.items()}, rounds=3)
            cut, padded = median(seconds[str(max(lengths))]), median(seconds[str(PADDED)])
            note = f"{len(lengths)} captions of {min(lengths)} to {max(lengths)} tokens, {grid} x {grid} latents"
            found += [
                Measurement(f"{name}, cut", 1000 * cut, "ms", note),
                Measurement(f"{name}, {PADDED} tokens", 1000 * padded, "ms", note),
                Measurement(f"{name}, gain", padded / cut, "x", note),
            ]
    return found


def _steps(grid: int, caption_lengths: Sequence[int], length: int) -> dict[str, Callable[[], object]]:
    """One training step, and one guided prediction, on captions padded to `length`."""
    import torch

    from raev2.batch import drop_cond
    from raev2.flow import interpolate, training_loss
    from raev2.guidance import build_guidance
    from raev2.model.condition import TextCondition
    from raev2.model.generator import Generator
    from raev2.spec import CFG
    from raev2.training.optim import build_optimizer
    from raev2_tasks.t2i.recipes import quickstart

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    spec = quickstart()
    shape = (192, grid, grid)
    generator = Generator(spec.generator, TextCondition(dim=1024), spec.flow, shape).to(device)
    optimizer = build_optimizer(generator, spec.generator_training.optimizer, 1e-3)
    lengths = torch.tensor(caption_lengths)
    mask = torch.arange(length) < lengths[:, None]
    cond = {"text_tokens": torch.randn(len(caption_lengths), length, 1024).to(device), "text_mask": mask.to(device)}
    latents, noise = torch.randn(2, len(caption_lengths), *shape, device=device).unbind()
    t = torch.rand(len(caption_lengths), device=device)
    drop = torch.arange(len(caption_lengths), device=device) % 10 == 0
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
