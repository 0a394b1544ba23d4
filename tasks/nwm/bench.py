"""What caching past frames is worth: `raev2 bench nwm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raev2.bench import Measurement, timed

LATENT_SHAPE = (192, 8, 8)
STEPS = 50
ROUNDS = 3


def bench_rollout_frame() -> list[Measurement]:
    """Seconds of one rollout frame (4 past frames, 50 Euler steps, one sample, float32) of the recipe `laptop`.

    cached      the newest frame is encoded, the keys and values of the other three are there
    recomputed  the same weights and the same result, all past frames encoded again at every step
    in_context  the other form of conditioning: past frames among the other tokens

    The decoder is not part of it.
    """
    import torch

    from raev2.batch import FrameCache
    from raev2.model.frames import FramesCondition
    from raev2.model.generator import Generator
    from raev2.sampler import noise_for, sample_latents
    from raev2.spec import FlowSpec, SamplingSpec
    from raev2_tasks.nwm.recipes import laptop

    def build(form: str) -> Generator:
        torch.manual_seed(0)
        condition = FramesCondition(form=form, spacing=0.25, max_time=4.0, at_image=True)
        generator = Generator(laptop().generator, condition, FlowSpec(), LATENT_SHAPE)
        for parameter in generator.parameters():  # output layers start at zero, and every prediction with them
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return generator.eval()

    generator, in_context = build("block_causal"), build("in_context")
    sampling = SamplingSpec(steps=STEPS)
    frames, noise = noise_for(1, range(4), LATENT_SHAPE), noise_for(0, [0], LATENT_SHAPE)
    motion = {"action": torch.tensor([[0.25, 0.0, 0.1]]), "rel_time": torch.tensor([[0.25]])}
    cond = {"context_latents": frames[None], **motion}
    with torch.no_grad():
        known = generator.encode_frames(frames[:3])

    @torch.no_grad()
    def cached() -> Any:
        cache = FrameCache.cat([known, generator.encode_frames(frames[3:])])
        prepared = generator.prepare_cond({"context_id": torch.arange(4)[None], **motion}, cache)
        return sample_latents(generator, prepared, noise, sampling)

    functions: dict[str, Callable[[], Any]] = {
        "cached": cached,
        "recomputed": lambda: sample_latents(_Recomputing(generator), cond, noise, sampling),
        "in_context": lambda: sample_latents(in_context, cond, noise, sampling),
    }
    difference = (functions["cached"]() - functions["recomputed"]()).abs().max().item()
    seconds = timed(functions, rounds=ROUNDS)
    rows = [
        Measurement(name, value, "s/frame", f"{value / seconds['cached']:.2f} of cached")
        for name, value in seconds.items()
    ]
    note = "largest, of latents with unit variance"
    return [*rows, Measurement("cached against recomputed", difference, "difference", note)]


class _Recomputing:
    """A generator whose forward encodes the past frames, all of them at once, at every step."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def __call__(self, z_t: Any, t: Any, cond: Any) -> Any:
        latents, index = self.conditioner.distinct_frames(cond)
        trunk = self.network.trunk
        frames = trunk.encode_frames(self.conditioner.embed_frames(latents))
        return self._generator(z_t, t, self._generator.prepare_cond({**cond, "context_id": index}, frames))

    def prepare_cond(self, cond: Any) -> Any:
        """Nothing ahead of the steps."""
        return self.conditioner.complete(cond)
