"""What caching past frames is worth: `raev2 bench nwm`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from raev2.batch import Measurement
from raev2_tasks.bench.measure import timed

if TYPE_CHECKING:
    from torch import Tensor

    from raev2.batch import Cond, Denoiser, ModelOutput
    from raev2.model.generator import Generator

LATENT_SHAPE = (192, 8, 8)
STEPS = 50
ROUNDS = 3
BATCH = 8


def bench_rollout_frame() -> list[Measurement]:
    """Seconds of one rollout frame (4 past frames, 50 Euler steps, float32) of the recipe `laptop`.

    cached      the newest frame is encoded, the keys and values of the other three are there
    recomputed  the same weights and the same result, all past frames encoded again at every step
    in_context  the other form of conditioning: past frames among the other tokens

    Once for one rollout, as when driving, whose small products leave cores idle; and once for `BATCH` side by side, as
    in evaluation and planning. The decoder is not part of it.
    """
    import torch

    from raev2.batch import FrameCache
    from raev2.model.frames import FramesCondition
    from raev2.model.generator import Generator
    from raev2.sampler import map_rows, noise_for, sample_latents
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
    frames = noise_for(1, range(BATCH * 4), LATENT_SHAPE).unflatten(0, (BATCH, 4))
    cond = {
        "context_latents": frames,
        "action": torch.tensor([[0.25, 0.0, 0.1]]).expand(BATCH, -1),
        "rel_time": torch.full((BATCH, 1), 0.25),
    }
    with torch.no_grad():
        known = generator.encode_frames(frames[:, :3].flatten(0, 1))

    def rollout(network: Denoiser, num: int, prepare: Callable[[Cond, list[int]], Cond]) -> torch.Tensor:
        noise = noise_for(0, range(num), LATENT_SHAPE)

        @torch.no_grad()
        def frame(rows: list[int]) -> torch.Tensor:
            part = prepare({name: value[rows] for name, value in cond.items()}, rows)
            return sample_latents(network, part, noise[rows], SamplingSpec(steps=STEPS))

        return frame([0]) if num == 1 else map_rows(frame, num, noise.device, num)

    def with_cache(part: Cond, rows: list[int]) -> Cond:
        newest = generator.encode_frames(part["context_latents"][:, 3])
        row, new = torch.tensor(rows)[:, None], torch.arange(len(rows))[:, None]
        index = torch.cat([3 * row + torch.arange(3), len(known) + new], dim=1)
        motion = {"action": part["action"], "rel_time": part["rel_time"]}
        return generator.prepare_cond({"context_id": index, **motion}, FrameCache.cat([known, newest]))

    def as_it_is(part: Cond, rows: list[int]) -> Cond:
        return part

    measured = []
    for num in (1, BATCH):
        functions: dict[str, Callable[[], Any]] = {
            "cached": partial(rollout, generator, num, with_cache),
            "recomputed": partial(rollout, _Recomputing(generator), num, as_it_is),
            "in_context": partial(rollout, in_context, num, as_it_is),
        }
        difference = (functions["cached"]() - functions["recomputed"]()).abs().max().item()
        seconds = {name: median(found) for name, found in timed(functions, rounds=ROUNDS).items()}
        measured += [
            Measurement(f"{name}, {num} at once", value / num, "s/frame", f"{value / seconds['cached']:.2f} of cached")
            for name, value in seconds.items()
        ]
        note = "largest of cached against recomputed, of latents with unit variance"
        measured.append(Measurement(f"difference, {num} at once", difference, "difference", note))
    return measured


class _Recomputing:
    """A generator whose forward encodes the past frames, all of them at once, at every step."""

    def __init__(self, generator: Generator) -> None:
        from raev2.model.frames import BlockCausalFrames

        assert isinstance(generator.conditioner, BlockCausalFrames)
        self._generator, self.conditioner = generator, generator.conditioner
        self.flow, self.latent_shape = generator.flow, generator.latent_shape
        self.time_shift, self.has_base_head = generator.time_shift, generator.has_base_head
        self.device, self.check_cond = generator.device, generator.check_cond

    def __call__(self, z_t: Tensor, t: Tensor, cond: Cond) -> ModelOutput:
        latents, index = self.conditioner.distinct_frames(cond)
        trunk = self._generator.network.trunk
        frames = trunk.encode_frames(self.conditioner.embed_frames(latents))
        return self._generator(z_t, t, self._generator.prepare_cond({**cond, "context_id": index}, frames))

    def prepare_cond(self, cond: Cond) -> Cond:
        """Nothing ahead of the steps."""
        return self.conditioner.complete(cond)
