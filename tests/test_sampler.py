from __future__ import annotations

import pytest
import torch

from raev2.batch import ModelOutput
from raev2.errors import SpecError
from raev2.model.condition import LabelCondition, NoCondition
from raev2.model.generator import Generator
from raev2.sampler import map_rows, noise_for, sample, sample_latents, time_grid
from raev2.spec import CFG, DDTSpec, DiTSpec, FlowSpec, InternalGuidance, SamplingSpec
from raev2.testing import GaussianWorld

COND = {"label": torch.arange(8) % 4}


def build(condition=None):
    torch.manual_seed(0)
    spec = DDTSpec(width=48, depth=2, num_heads=2, head_width=64, head_depth=1, head_num_heads=2, base_head_depth=1)
    generator = Generator(spec, condition or LabelCondition(num_classes=4), FlowSpec(), (8, 4, 4))
    for parameter in generator.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return generator.eval()


class LinearDecoder:
    """Latents to images by one matrix."""

    weight = torch.linspace(-1, 1, 24).view(8, 3)

    def decode(self, latents):
        return torch.einsum("bchw,cd->bdhw", latents, self.weight).mul(0.1).add(0.5)


class Constant(torch.nn.Module):
    """Always the same clean latents."""

    def __init__(self, latents, flow):
        super().__init__()
        self.latents, self.flow, self.time_shift = latents, flow, flow.time_shift
        self.latent_shape, self.has_base_head, self.device = tuple(latents.shape[1:]), False, latents.device
        self.conditioner = NoCondition().build(DiTSpec(width=8, depth=1, num_heads=2), self.latent_shape)

    def forward(self, z_t, t, cond):
        return ModelOutput(self.latents)

    def prepare_cond(self, cond):
        return cond

    def check_cond(self, cond):
        pass


def test_time_grid_is_exact_at_both_ends():
    grid = time_grid(50, 6.928)
    assert len(grid) == 51 and grid[0] == 1.0 and grid[-1] == 0.0
    assert all(a > b for a, b in zip(grid, grid[1:], strict=False))
    for s, n in ((8.0, 50), (8.0, 100), (6.928, 50)):
        assert time_grid(n, s)[-2] == pytest.approx(s / (n + s - 1))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 50, 160, 400])
def test_a_perfect_constant_denoiser_is_returned_exactly(solver, steps):
    """Also where the last step starts below min_t, which the reference's clamp spoils (12.5)."""
    latents = torch.randn(1, 2, 3, 3)
    generator = Constant(latents, FlowSpec(time_shift=8.0))
    noise = noise_for(0, [0], (2, 3, 3))
    assert torch.equal(sample_latents(generator, {}, noise, SamplingSpec(steps=steps, solver=solver)), latents)


def test_reference_clamp_leaves_noise_with_many_steps():
    latents = torch.zeros(1, 2, 3, 3)
    generator = Constant(latents, FlowSpec(time_shift=8.0, reference_clamp=True))
    noise = noise_for(0, [0], (2, 3, 3))
    residuals = {
        steps: sample_latents(generator, {}, noise, SamplingSpec(steps=steps)).abs().max().item()
        for steps in (150, 400)
    }
    assert residuals[150] < 1e-6 < 1e-3 < residuals[400]


def test_noise_depends_on_seed_and_index_alone():
    noise = noise_for(3, [5, 900_000], (2, 4, 4))
    assert torch.equal(noise[1:], noise_for(3, [900_000], (2, 4, 4)))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, noise_for(4, [5, 900_000], (2, 4, 4)))
    many = noise_for(0, range(2000), (8, 4, 4))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert abs((many[1:] * many[:-1]).mean()) < 0.01


def test_samples_do_not_depend_on_batch_size_threads_or_companions():
    generator, decoder = build(), LinearDecoder()
    label = {"label": torch.arange(64) % 4}
    options = {"steps": 3, "guidance": CFG(scale=2.0), "seed": 1}
    expected = sample(generator, decoder, label, batch_size=64, **options)
    assert expected.std() > 0.01
    for batch_size in (1, 7):
        assert torch.equal(sample(generator, decoder, label, batch_size=batch_size, **options), expected)
    # Three processes with every third sample each, as many threads as they like.
    num_threads = torch.get_num_threads()
    for rank in range(3):
        torch.set_num_threads(rank + 1)
        mine = list(range(rank, 64, 3))
        images = sample(generator, decoder, {"label": label["label"][mine]}, indices=mine, **options)
        assert torch.equal(images, expected[mine])
    torch.set_num_threads(num_threads)
    for index in (0, 5, 63):
        one = sample(generator, decoder, {"label": label["label"][index : index + 1]}, indices=[index], **options)
        assert torch.equal(one, expected[index : index + 1])


class Counting(GaussianWorld):
    """Notes how many rows it is given, and rounds otherwise for another number of them, by `off`."""

    def __init__(self, off: float) -> None:
        super().__init__(dtype=torch.float32)
        self.off, self.rows = off, []

    def forward(self, z_t, t, cond):
        self.rows.append(len(z_t))
        return ModelOutput(super().forward(z_t, t, cond).pred + self.off * len(z_t))


class FirstChannel:
    def decode(self, latents):
        return latents[:, :1].expand(-1, 3, -1, -1) / 4 + 0.5


@pytest.mark.parametrize(
    ("off", "guidance", "steps", "trials", "rows"),
    [
        (0.0, None, 3, 2, [8, 2, 2, 2, 2]),
        (1e-3, None, 3, 2, [8, 2, 8, 8, 8]),
        (0.0, None, 1, 0, [8]),  # a trial would cost more than it saves
        (0.0, CFG(scale=2.0, interval=(0.0, 0.4)), 3, 0, [8, 8, 16]),
        (0.0, CFG(scale=2.0, interval=(0.0, 0.4)), 4, 4, [8, 2, 16, 4, 2, 2, 2, 4]),
    ],
)
def test_pictures_that_fill_no_chunk_are_computed_without_others_where_that_changes_no_bit(
    off, guidance, steps, trials, rows
):  # fmt: skip
    """One trial with guidance and one without says so; where it does, a picture costs no more than itself."""
    world, options = Counting(off), {"steps": steps, "guidance": guidance}
    ten = sample(Counting(off), FirstChannel(), {"label": torch.zeros(10, dtype=torch.int64)}, **options)
    two = sample(world, FirstChannel(), {"label": torch.zeros(2, dtype=torch.int64)}, indices=[8, 9], **options)
    assert torch.equal(two, ten[8:]) and len(two) == 2
    assert world.rows == rows
    world.rows.clear()
    two = sample(world, FirstChannel(), {"label": torch.zeros(2, dtype=torch.int64)}, indices=[8, 9], **options)
    assert torch.equal(two, ten[8:]) and world.rows == rows[trials:], "what was tried is remembered"


def test_time_is_embedded_with_even_rows():
    """A CPU has kernels of its own for rows beside fours; with gradients nothing is added."""
    embed = build().network.trunk.time_embed
    first, seen = embed.mlp[0], []
    first.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    t = torch.linspace(0, 1, 8)
    with torch.no_grad():
        many = embed(t)
        for num in (1, 2, 3, 5):
            assert torch.equal(embed(t[:num]), many[:num])
        embed(t.repeat(2))
    assert embed(t[:1]).requires_grad and seen == [8, 4, 4, 4, 8, 16, 1]


def test_sampling_keeps_the_number_of_threads():
    before = torch.get_num_threads()
    map_rows(lambda rows: torch.tensor(rows), 5, torch.device("cpu"), 2)
    assert torch.get_num_threads() == before


def test_rows_come_back_in_order():
    for device in ("cpu", "meta"):  # any device but the CPU uses the batch size
        rows = map_rows(lambda rows: torch.tensor(rows), 11, torch.device(device), 3)
        assert rows.tolist() == list(range(11))


def test_autocast_of_the_caller_is_kept():
    with torch.autocast("cpu", torch.bfloat16):
        product = map_rows(lambda rows: torch.ones(len(rows), 2) @ torch.ones(2, 2), 3, torch.device("cpu"), 1)
    assert product.dtype == torch.bfloat16


def test_images_are_in_range_and_follow_the_seed():
    generator = build()
    images = sample(generator, LinearDecoder(), COND, steps=2)
    assert images.shape == (8, 3, 4, 4) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, sample(generator, LinearDecoder(), COND, steps=2))
    assert not torch.equal(images, sample(generator, LinearDecoder(), COND, steps=2, seed=1))


def test_unconditional_generators_need_ids():
    generator = build(NoCondition())
    assert sample(generator, LinearDecoder(), {}, steps=2, indices=[0, 1]).shape[0] == 2
    with pytest.raises(SpecError, match="needed when there is no condition"):
        sample(generator, LinearDecoder(), {}, steps=2)


def test_wrong_conditions_and_guidance_are_reported_before_any_work():
    with pytest.raises(SpecError, match="label out of range"):
        sample(build(), LinearDecoder(), {"label": torch.tensor([7])}, steps=10**9)
    with pytest.raises(SpecError, match="needs a base head"):
        sample(GaussianWorld(), LinearDecoder(), {"label": torch.tensor([0])}, 10**9, InternalGuidance())
