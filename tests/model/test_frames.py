"""Block-causal conditioning on past frames: what it sees, what it computes once, what may be absent."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raev2.batch import FrameCache
from raev2.errors import SpecError
from raev2.guidance import build_guidance
from raev2.model.condition import LabelCondition
from raev2.model.frames import BlockCausalFrames, FramesCondition
from raev2.model.generator import Generator
from raev2.nn import AgeRope, Rope2D, rotate
from raev2.sampler import sample, sample_latents
from raev2.spec import CFG, AutoGuidance, DDTSpec, DiTSpec, FlowSpec, InternalCFG, NoGuidance, SamplingSpec

SHAPE = (6, 3, 4)
SPEC = FramesCondition(num_frames=3, spacing=0.5, max_time=4.0, action_drop_prob=0.2)


def network(kind="ddt", **changes):
    common = {"width": 48, "depth": 3, "num_heads": 2, "base_head_depth": 2} | changes
    if kind == "dit":
        return DiTSpec(**common)
    return DDTSpec(head_width=32, head_depth=1, head_num_heads=2, **common)


def build(condition=SPEC, kind="ddt", seed=0):
    torch.manual_seed(seed)
    generator = Generator(network(kind), condition, FlowSpec(), SHAPE)
    for parameter in generator.parameters():  # output layers start at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return generator.eval()


def raw_cond(batch_size=4, num_frames=3, seed=1):
    torch.manual_seed(seed)
    return {
        "context_latents": torch.randn(batch_size, num_frames, *SHAPE),
        "action": torch.randn(batch_size, 3),
        "rel_time": torch.linspace(-1, 2, batch_size)[:, None],
    }


def point(batch_size=4, seed=2):
    torch.manual_seed(seed)
    return torch.randn(batch_size, *SHAPE), torch.rand(batch_size)


GENERATOR, COND, POINT = build(), raw_cond(), point()


@torch.no_grad()
def predict(cond, generator=GENERATOR, at=POINT):
    return generator(*at, cond).pred


def change(cond, **values):
    """Largest change of the prediction when some tensors of the condition are replaced."""
    return (predict(cond) - predict(cond | values)).abs().max().item()


def assert_same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# What the trunk sees


def test_order_of_frames_and_place_of_patches_matter():
    latents = COND["context_latents"]
    assert change(COND, context_latents=latents.flip(1)) > 1e-2
    for axis in (3, 4):  # patches change places within every frame
        assert change(COND, context_latents=latents.roll(1, axis)) > 1e-2
    assert change(COND, context_latents=latents.roll(1, 0)) > 1e-2


def test_every_part_of_the_condition_matters():
    assert change(COND, action=COND["action"] + 0.1) > 1e-3
    assert change(COND, rel_time=COND["rel_time"] + 0.25) > 1e-3
    ages = torch.tensor([0.5, 0.25, 0.0]).expand(4, 3)
    assert change(COND, context_age=ages) < 1e-6, "these are the default ages"
    assert change(COND, context_age=2 * ages) > 1e-3


def test_order_of_slots_does_not_matter_when_ages_move_along():
    ages = torch.tensor([0.75, 0.25, 0.0]).expand(4, 3)
    flipped = {"context_latents": COND["context_latents"].flip(1), "context_age": ages.flip(1)}
    assert_same(predict(COND | {"context_age": ages}), predict(COND | flipped))


@pytest.mark.parametrize("kind", ["ddt", "dit"])
def test_samples_of_a_batch_do_not_mix(kind):
    generator = build(kind=kind)
    alone = [
        predict({name: value[i : i + 1] for name, value in COND.items()}, generator, [x[i : i + 1] for x in POINT])
        for i in range(4)
    ]
    assert_same(predict(COND, generator), torch.cat(alone))


def test_invalid_frames_have_no_effect():
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[0, 0] = valid[1, :2] = valid[2] = False
    latents = COND["context_latents"].clone()
    latents[~valid] = 100.0
    cond = COND | {"context_valid": valid}
    assert change(cond, context_latents=latents) == 0
    assert change(cond, context_latents=latents, context_id=torch.full((4, 3), -1)) < 1e-6
    fewer = {"context_latents": COND["context_latents"][:, 1:], "context_valid": valid[:, 1:]}
    assert_same(predict(cond)[:1], predict(COND | fewer)[:1])


def test_only_relative_ages_matter_so_cached_frames_may_grow_older():
    """Query and key products depend on the difference of ages; the tables of rows and columns stay as they were."""
    rope, age_rope = Rope2D(24, 3, 4), AgeRope(24)
    q, k = torch.randn(1, 12, 2, 24), torch.randn(1, 12, 2, 24)

    def products(q_age, k_age):
        turned_q, turned_k = (
            rotate(rotate(x, rope(12)), age_rope(torch.full((12,), age))) for x, age in ((q, q_age), (k, k_age))
        )
        return torch.einsum("bnhd,bmhd->bhnm", turned_q, turned_k)

    assert_same(products(-1.0, 2.0), products(3.0, 6.0), atol=1e-4)
    assert (products(-1.0, 2.0) - products(-1.0, 3.0)).abs().max() > 0.1
    frequencies = AgeRope(64).frequencies
    used = frequencies[frequencies > 0]
    assert len(used) == 16 and len(used.unique()) == 16
    assert used.max().item() == pytest.approx(math.pi) and used.min().item() == pytest.approx(math.pi / 128)
    turn_per_column = Rope2D(64, 1, 2).sin[1, 16:][frequencies[16:] > 0]
    assert turn_per_column.max() <= 0.0101, "age turns channels that hardly know the column"


# Motion


def test_no_motion_is_exactly_zero():
    conditioner = GENERATOR.conditioner
    rel_time = torch.tensor([[0.0], [0.25], [-0.75], [4.0]])
    still = conditioner.normalised({"action": torch.zeros(4, 3), "rel_time": rel_time})
    assert still.shape == (4, 7) and (still == 0).all()


def test_motion_is_normalised_to_order_one():
    """2 m in 4 periods at 0.5 m per frame is one step per frame, a quarter of the 16 frames; yaw by its circle."""
    cond = {"action": torch.tensor([[2.0, -0.5, math.pi]]), "rel_time": torch.tensor([[1.0]])}
    expected = [4 / 16, -1 / 16, 1.0, -0.25, 0.0, -2.0, math.pi / 4]
    assert_same(GENERATOR.conditioner.normalised(cond), torch.tensor([expected]), atol=1e-6)
    backwards = GENERATOR.conditioner.normalised(cond | {"rel_time": torch.tensor([[-1.0]])})
    assert_same(backwards, torch.tensor([expected]), atol=1e-6)


def test_neighbouring_motions_and_times_are_told_apart():
    conditioner = GENERATOR.conditioner
    table, seconds = conditioner.action_embed.frequencies, conditioner.time_embed.frequencies
    one_step = 1 / 16
    assert (table[0, 0] * one_step).item() == pytest.approx(math.pi), "the shortest wave is two steps long"
    assert seconds[0, 0].item() == pytest.approx(math.pi / 0.25) and seconds[0, -1].item() == pytest.approx(math.pi / 8)
    tokens = [
        conditioner(GENERATOR.prepare_cond(COND | {"rel_time": COND["rel_time"] * sign})).tokens for sign in (1, -1)
    ]
    assert (tokens[0] - tokens[1])[3].abs().max() > 1e-2, "time has a sign"


# Computed once


@pytest.mark.parametrize("kind", ["ddt", "dit"])
def test_a_prepared_condition_gives_the_same_output(kind):
    generator = build(kind=kind)
    with torch.no_grad():
        prepared = generator.prepare_cond(COND)
    assert "context_latents" not in prepared
    assert all(len(value) == 4 for value in prepared.values()), "the batch is the leading axis"
    output, expected = (generator(*POINT, cond) for cond in (prepared, COND))
    assert_same(output.pred, expected.pred)
    assert_same(output.base_pred, expected.base_pred)
    rows = [2, 0]
    picked = {name: value[rows] for name, value in prepared.items()}
    assert_same(predict(picked, generator, [x[rows] for x in POINT]), expected.pred[rows])
    assert generator.prepare_cond(prepared).keys() == prepared.keys()


@torch.no_grad()
def test_at_image_adds_the_newest_frame_place_by_place_and_the_motion_everywhere():
    generator = build(SPEC.replace(at_image=True))

    def at_image(cond):
        return generator.conditioner(generator.prepare_cond(cond)).at_image

    before = at_image(COND)
    assert before.shape == (4, SHAPE[1] * SHAPE[2], 48)
    latents = COND["context_latents"].clone()
    latents[:, :-1] += 1  # older frames
    assert torch.equal(at_image(COND | {"context_latents": latents}), before)
    latents[:, -1, :, 0, 1] += 1  # one place of the newest
    moved = (at_image(COND | {"context_latents": latents}) - before).abs().amax(2) > 1e-4
    assert moved.sum(1).tolist() == [1] * 4 and moved[:, 1].all()
    turned = at_image(COND | {"action": -COND["action"]}) - before
    assert turned.abs().amax() > 1e-3
    torch.testing.assert_close(turned, turned[:, :1].expand_as(turned))
    assert_same(predict(generator.prepare_cond(COND), generator), predict(COND, generator))
    blind = generator.conditioner.without(COND, ("action",))
    assert_same(predict(blind, generator), predict(blind | {"action": COND["action"] * 2}, generator))


@torch.no_grad()
def test_keys_of_the_past_depend_on_the_past_alone():
    prepared = GENERATOR.prepare_cond(COND)
    other = GENERATOR.prepare_cond(COND | {"action": COND["action"] + 1, "rel_time": -COND["rel_time"]})
    for name in ("context_keys", "context_values"):
        assert torch.equal(prepared[name], other[name])
    changed = {"action": COND["action"] + 1, "rel_time": -COND["rel_time"], "has_action": torch.zeros(4) > 0}
    assert_same(predict(prepared | changed), predict(COND | changed))


def test_prepared_once_for_a_whole_sampling(monkeypatch):
    calls = []
    encode = BlockCausalFrames.encode_frames
    monkeypatch.setattr(
        BlockCausalFrames, "encode_frames", lambda self, x, trunk: calls.append(len(x)) or encode(self, x, trunk)
    )
    noise = torch.randn(4, *SHAPE)
    for guidance in (NoGuidance(), CFG(scale=2.0), InternalCFG(scale=2.0, interval=(0.2, 0.8))):
        calls.clear()
        sample_latents(GENERATOR, COND, noise, SamplingSpec(steps=4, guidance=guidance))
        assert calls == [12], f"{guidance.kind}: frames are computed once, and none for the null branch"


@pytest.mark.parametrize("guidance", [NoGuidance(), CFG(scale=2.0), CFG(scale=2.0, drop=("action",))])
@torch.no_grad()
def test_sampling_with_cached_frames_equals_sampling_without(guidance, monkeypatch):
    noise, sampling = torch.randn(4, *SHAPE), SamplingSpec(steps=10, guidance=guidance)
    latents = sample_latents(GENERATOR, COND, noise, sampling)
    monkeypatch.setattr(Generator, "prepare_cond", lambda self, cond: self.conditioner.complete(cond))
    assert_same(latents, sample_latents(GENERATOR, COND, noise, sampling))


@torch.no_grad()
def test_a_rollout_encodes_each_frame_once():
    """The window slides over cached frames; every frame keeps its keys and only grows older."""
    frames = torch.randn(5, *SHAPE)
    cache = GENERATOR.encode_frames(frames[:3])
    for start in range(3):
        window = {"action": COND["action"][:1], "rel_time": COND["rel_time"][-1:]}
        expected = predict(window | {"context_latents": frames[None, start : start + 3]}, at=[x[:1] for x in POINT])
        prepared = GENERATOR.prepare_cond(window | {"context_id": torch.arange(3)[None]}, cache)
        assert_same(predict(prepared, at=[x[:1] for x in POINT]), expected)
        cache = FrameCache.cat([cache[1:], GENERATOR.encode_frames(frames[start + 3 : start + 4])])
        assert len(cache) == 3 - (start == 2)


@torch.no_grad()
def test_bits_of_a_cached_frame_do_not_depend_on_the_others():
    frames = torch.randn(5, *SHAPE)
    together, alone = GENERATOR.encode_frames(frames), GENERATOR.encode_frames(frames[3:4])
    assert torch.equal(together.keys[3], alone.keys[0]) and torch.equal(together.values[3], alone.values[0])


def test_frames_with_one_id_are_computed_once_and_get_all_gradients():
    """Targets 0, 1 share their history, 2 shares two frames of it, 3 has frames of its own."""
    ids = torch.tensor([[7, 8, 9], [7, 8, 9], [8, 9, 5], [-1, -1, -1]])
    rows = {7: 0, 8: 1, 9: 2, 5: 3}
    frames = torch.randn(7, *SHAPE)
    own = torch.tensor([[4, 5, 6]])
    named = torch.tensor([[rows.get(int(id), 0) for id in row] for row in ids[:3]])
    plain = COND | {"context_latents": frames[torch.cat([named, own])]}
    shared = plain | {"context_id": ids}
    latents, index = GENERATOR.conditioner.distinct_frames(GENERATOR.conditioner.complete(shared))
    assert len(latents) == 7
    assert torch.equal(latents[index], plain["context_latents"])

    gradients = []
    for cond in (plain, shared):
        GENERATOR.zero_grad()
        output = GENERATOR(*POINT, cond)
        output.pred.square().sum().backward()
        gradients.append({name: p.grad for name, p in GENERATOR.named_parameters() if p.grad is not None})
        gradients[-1]["pred"] = output.pred.detach()
    GENERATOR.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]["conditioner.context_embed.proj.weight"].abs().max() > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_invalid_frames_are_not_computed():
    conditioner = GENERATOR.conditioner
    valid = torch.tensor([[False, True, True], [False, False, True]] * 2)
    ids = torch.tensor([[3, 1, 2], [-1, 3, 2]] * 2)
    latents = COND["context_latents"]
    cond = {"context_latents": latents, "context_id": ids, "context_valid": valid}
    distinct, index = conditioner.distinct_frames(cond)
    assert len(distinct) == 2, "the valid frames 1 and 2"
    assert torch.equal(distinct[index[valid]], latents[[0, 0, 0, 0, 0, 0], [1, 2, 2, 1, 2, 2]])
    distinct, index = conditioner.distinct_frames(cond | {"context_valid": torch.zeros_like(valid)})
    assert len(distinct) == 1 and not index.any()


@pytest.mark.parametrize("training", [True, False])
def test_bf16_autocast_is_close_to_float32(training):
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        low = GENERATOR(*POINT, COND).pred
        mixed = GENERATOR(*POINT, {k: v.float() if v.is_floating_point() else v
                                   for k, v in GENERATOR.prepare_cond(COND).items()}).pred  # fmt: skip
    assert_same(low.float(), predict(COND), atol=0.1)
    assert_same(mixed.float(), predict(COND), atol=0.1)


def test_samples_do_not_depend_on_the_batch_size():
    class Decoder:
        def decode(self, latents):
            return latents[:, :3]

    own = raw_cond(6)
    shared = {"context_latents": own["context_latents"][:1].expand(6, -1, -1, -1, -1)}
    shared |= {"context_id": torch.arange(3).expand(6, 3)}
    for cond in (own, own | shared):
        images = [sample(GENERATOR, Decoder(), cond, steps=2, batch_size=size) for size in (1, 6)]
        assert torch.equal(*images)
        reverse = {name: value.flip(0) for name, value in cond.items()}
        again = sample(GENERATOR, Decoder(), reverse, steps=2, indices=range(5, -1, -1))
        assert torch.equal(images[0], again.flip(0)), "also not on the company of other samples"


def test_the_cost_of_a_step_is_that_of_its_own_tokens():
    """28 blocks of width 1152, 16 x 16 tokens, K = 4: q own tokens and L keys in all cost 28 (24 q d^2 + 4 q L d)."""
    with torch.device("meta"):
        spec = DiTSpec(width=1152, depth=28, num_heads=16)
        generator = Generator(spec, FramesCondition(), FlowSpec(), (1024, 16, 16)).eval()
        cond = generator.conditioner.example_cond(1, "meta")
        with torch.no_grad(), FlopCounterMode(display=False) as once:
            prepared = generator.prepare_cond(cond)
        with torch.no_grad(), FlopCounterMode(display=False) as step:
            generator(torch.zeros(1, 1024, 16, 16), torch.zeros(1), prepared)
    n, q, width, blocks = 256, 256 + 4 + 5, 1152, 28
    frame = 24 * n * width**2 + 4 * n**2 * width
    last_block = 24 * n * width**2 - 6 * n * width**2 + 4 * n**2 * width  # there only keys and values are needed
    assert once.get_total_flops() == pytest.approx(4 * (blocks * frame - last_block), rel=0.02)
    own = blocks * (24 * q * width**2 + 4 * q * (q + 4 * n) * width)
    assert step.get_total_flops() == pytest.approx(own, rel=0.02)
    assert own / 1e9 == pytest.approx(280, rel=0.02)


# Absent parts


def test_each_part_can_be_absent_alone():
    conditioner = GENERATOR.conditioner
    full = predict(COND)
    preds = {part: predict(conditioner.without(COND, (part,))) for part in conditioner.parts}
    preds["all"] = predict(GENERATOR.null_cond(COND))
    assert all((full - pred).abs().max() > 1e-3 for pred in preds.values())
    others = raw_cond(seed=9)
    for part, names in {"context": ["context_latents"], "action": ["action"], "all": list(COND)}.items():
        parts = conditioner.parts if part == "all" else (part,)
        changed = conditioner.without(COND | {name: others[name] for name in names}, parts)
        assert_same(predict(changed), preds[part], atol=1e-6)
    late = conditioner.without(COND | {"rel_time": COND["rel_time"] + 1, "action": 0 * COND["action"]}, ("time",))
    soon = conditioner.without(COND | {"action": 0 * COND["action"]}, ("time",))
    assert_same(predict(late), predict(soon), atol=1e-6)


def test_absent_is_not_zero():
    zeros = {name: torch.zeros_like(value) for name, value in COND.items()}
    for part in GENERATOR.conditioner.parts:
        assert (predict(zeros) - predict(GENERATOR.conditioner.without(zeros, (part,)))).abs().max() > 1e-3


def test_absent_parts_of_prepared_conditions():
    conditioner = GENERATOR.conditioner
    prepared = GENERATOR.prepare_cond(COND)
    for parts in ((), ("action",), ("context",), ("time",)):
        assert_same(predict(conditioner.without(prepared, parts)), predict(conditioner.without(COND, parts)))


def test_null_vectors_are_trained():
    GENERATOR.zero_grad()
    GENERATOR(*POINT, GENERATOR.null_cond(COND)).pred.square().sum().backward()
    names = ("null_action", "null_time", "null_context")
    assert all(getattr(GENERATOR.conditioner, name).grad.abs().max() > 1e-4 for name in names)
    assert not GENERATOR.conditioner.action_embed.mlp[0].weight.grad.any()
    GENERATOR.zero_grad()


def test_training_drops_everything_or_the_motion_alone():
    uniform = torch.tensor([0.05, 0.15, 0.29, 0.31])
    dropped = GENERATOR.conditioner.drop(COND, uniform, 0.1)
    assert dropped["has_action"].tolist() == [False, False, False, True]
    assert dropped["context_valid"].any(1).tolist() == [False, True, True, True]
    assert dropped["has_time"].tolist() == [False, True, True, True]
    label = build(LabelCondition(num_classes=3)).conditioner
    assert label.drop({"label": torch.tensor([0, 1, 2])}, uniform[:3], 0.2)["label"].tolist() == [3, 3, 2]


@torch.no_grad()
def test_guidance_by_the_motion_keeps_the_past():
    z_t, _ = POINT
    t = torch.full((4,), 0.5)
    blind = GENERATOR(z_t, t, GENERATOR.conditioner.without(COND, ("action",))).pred
    full = GENERATOR(z_t, t, COND).pred
    guided = build_guidance(CFG(scale=3.0, drop=("action",)), GENERATOR)(z_t, 0.5, COND)
    assert_same(guided, blind + 3.0 * (full - blind))
    null = GENERATOR(z_t, t, GENERATOR.null_cond(COND)).pred
    assert_same(build_guidance(CFG(scale=3.0), GENERATOR)(z_t, 0.5, COND), null + 3.0 * (full - null))
    with pytest.raises(SpecError, match=r"no part of this condition; got \['pose'\]; expected some of context, action"):
        build_guidance(CFG(scale=3.0, drop=("pose",)), GENERATOR)
    with pytest.raises(SpecError, match="it has no parts"):
        build_guidance(CFG(scale=3.0, drop=("action",)), build(LabelCondition(num_classes=3)))


@torch.no_grad()
def test_a_weak_generator_prepares_the_past_itself():
    weak, (z_t, _) = build(seed=5), POINT
    t = torch.full((4,), 0.5)
    predictor = build_guidance(AutoGuidance(scale=2.0, weak="-"), GENERATOR, weak)
    assert_same(predictor(z_t, 0.5, COND), 2 * GENERATOR(z_t, t, COND).pred - weak(z_t, t, COND).pred)
    with pytest.raises(SpecError, match="already prepared for the other generator"):
        predictor(z_t, 0.5, GENERATOR.prepare_cond(COND))


# Errors, artefact


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rel_time": torch.full((4, 1), -4.5)}, r"outside the range of times.*got 4.5 s; expected at most 4 s"),
        ({"context_valid": torch.ones(4, 2, dtype=torch.bool)}, "disagree in the number of context frames"),
        ({"context_latents": torch.zeros(4, 3, 6, 4, 4)}, r"expected \(B, any, 6, 3, 4\)"),
        ({"speed": torch.zeros(4)}, r"wrong names.*perhaps \['context_age', 'context_id', 'context_valid'"),
        ({"has_action": torch.ones(4, 1)}, r"cond.has_action: wrong shape"),
    ],
)
def test_wrong_conditions_are_named(values, message):
    GENERATOR.check_cond(COND)
    with pytest.raises(SpecError, match=message):
        GENERATOR.check_cond(COND | values)


def test_networks_that_cannot_place_frames_are_named():
    with pytest.raises(SpecError, match="frames and noisy latents need the same patches; got 2; expected 1"):
        Generator(network(), SPEC.replace(patch_size=2), FlowSpec(), (6, 4, 4))
    with pytest.raises(SpecError, match="too few channels per head.*got 4 channels; expected at least 8"):
        Generator(network(num_heads=12), SPEC, FlowSpec(), SHAPE)
    with pytest.raises(SpecError, match="a condition of frames needs tokens; got adaln; expected in_context"):
        Generator(network(conditioning="adaln"), SPEC, FlowSpec(), SHAPE)
    with pytest.raises(ValueError, match="3 numbers; got action_dim=4"):
        FramesCondition(action_dim=4)
    with pytest.raises(ValueError, match="max_time is below frame_period"):
        FramesCondition(max_time=0.1)
    with pytest.raises(SpecError, match="no frames that can be cached; got InContextFrames"):
        build(FramesCondition(form="in_context")).encode_frames(torch.zeros(1, *SHAPE))


def test_saved_generator_is_the_same(tmp_path):
    GENERATOR.save_pretrained(tmp_path / "g")
    assert torch.equal(predict(COND), predict(COND, Generator.from_pretrained(tmp_path / "g")))
