from __future__ import annotations

import pytest
import torch

from raev2.errors import CheckpointError, SpecError
from raev2.files.artefact import save_artefact
from raev2.flow import interpolate, training_loss
from raev2.model.condition import ConditionSpec, LabelCondition, NoCondition, TextCondition
from raev2.model.frames import FramesCondition
from raev2.model.generator import Generator, condition_spec
from raev2.nn import Rope2D, patchify, rotate, sincos_2d, swiglu_dim, unpatchify
from raev2.spec import DDTSpec, DiTSpec, FlowSpec
from raev2_tasks.listings.cost import generator_arithmetic

LATENT_SHAPE = (6, 4, 4)
CONDITIONS = {
    "none": NoCondition(),
    "label": LabelCondition(num_classes=5),
    "text": TextCondition(dim=10, max_tokens=7),
    "frames": FramesCondition(num_frames=2, max_time=4.0),
    "frames_in_context": FramesCondition(form="in_context", num_frames=2),
}


def small(kind="ddt", **changes):
    common = {"width": 24, "depth": 3, "num_heads": 2, "base_head_depth": 2, "repa_depth": 1, "repa_dim": 5}
    if kind == "ddt":
        common |= {"head_width": 32, "head_depth": 2, "head_num_heads": 2}
    return (DDTSpec if kind == "ddt" else DiTSpec)(**(common | changes))


def build(network=None, condition=None, latent_shape=LATENT_SHAPE, random_output=True):
    torch.manual_seed(0)
    generator = Generator(network or small(), condition or CONDITIONS["label"], FlowSpec(), latent_shape)
    if random_output:  # the published initialisation predicts zero
        for parameter in generator.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return generator.eval()


def example(generator, batch_size=3):
    torch.manual_seed(1)
    cond = generator.conditioner.example_cond(batch_size)
    for name, value in cond.items():
        if value.is_floating_point():
            cond[name] = torch.randn_like(value)
        elif value.dtype == torch.bool and value.ndim == 1 or name == "context_valid":
            continue
        elif value.dtype == torch.bool:
            cond[name] = torch.arange(value.shape[1]) < torch.arange(2, 2 + batch_size)[:, None]
        else:
            cond[name] = torch.arange(batch_size)
    return torch.randn(batch_size, *generator.latent_shape), torch.rand(batch_size), cond


# Networks


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("kind", ["ddt", "dit"])
@pytest.mark.parametrize("latent_shape", [(6, 4, 4), (6, 2, 6)])
def test_outputs_have_the_shapes_of_the_contract(kind, condition, latent_shape):
    generator = build(small(kind), CONDITIONS[condition], latent_shape)
    z_t, t, cond = example(generator)
    output = generator(z_t, t, cond)
    assert output.pred.shape == output.base_pred.shape == z_t.shape
    assert output.hidden.shape == (3, latent_shape[1] * latent_shape[2], 5)


@pytest.mark.parametrize("kind", ["ddt", "dit"])
@pytest.mark.parametrize("condition", ["none", "label"])
def test_adaln_trunk_depends_on_time_and_condition(kind, condition):
    generator = build(small(kind, conditioning="adaln", qk_norm=False, abs_pos_embed=True), CONDITIONS[condition])
    z_t, t, cond = example(generator)
    pred = generator(z_t, t, cond).pred
    assert not torch.allclose(pred, generator(z_t, 1 - t, cond).pred)
    if condition == "label":
        assert not torch.allclose(pred, generator(z_t, t, generator.null_cond(cond)).pred)


@pytest.mark.parametrize("condition", ["text", "frames"])
def test_conditions_of_many_tokens_need_an_in_context_trunk(condition):
    with pytest.raises(SpecError, match="expected in_context"):
        build(small(conditioning="adaln"), CONDITIONS[condition])


@pytest.mark.parametrize("condition", ["label", "text", "frames"])
def test_samples_of_a_batch_do_not_mix(condition):
    generator = build(condition=CONDITIONS[condition])
    z_t, t, cond = example(generator)
    alone = generator(z_t[1:2], t[1:2], {name: value[1:2] for name, value in cond.items()}).pred
    torch.testing.assert_close(generator(z_t, t, cond).pred[1:2], alone, rtol=0, atol=1e-5)


def test_first_prediction_is_exactly_zero():
    for network in (small(), small("dit"), small(conditioning="adaln"), small("dit", conditioning="adaln")):
        generator = build(network, random_output=False)
        output = generator(*example(generator))
        assert not output.pred.any() and not output.base_pred.any()


def test_loss_at_initialisation_equals_its_expectation():
    """Prediction 0 and unit-variance latents: E[1/t^2] = 1 + 2 sqrt(e) / s + e^2 / s^2, for each head (12.4)."""
    for shift, expected in ((8.0, 1.5276), (48**0.5, 1.630)):
        torch.manual_seed(0)
        u = torch.sigmoid(torch.randn(400_000, dtype=torch.float64))
        t = shift * u / (1 + (shift - 1) * u)
        assert (1 / t.clamp(min=0.05).square()).mean().item() == pytest.approx(expected, rel=5e-3)
    generator = build(random_output=False)
    z_t, t, cond = example(generator)
    point = interpolate(z_t, torch.randn_like(z_t), t)
    losses = training_loss(generator(point.z_t, t, cond), point, z_t, FlowSpec())
    expected = (z_t / t.clamp(min=0.05).view(-1, 1, 1, 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.full, expected)
    torch.testing.assert_close(losses.total, 2 * expected.mean())


def test_every_parameter_gets_a_gradient():
    for network in (small(), small("dit"), small(conditioning="adaln"), small("dit", conditioning="adaln")):
        generator = build(network)
        output = generator(*example(generator))
        (output.pred.square().sum() + output.base_pred.square().sum() + output.hidden.sum()).backward()
        assert [name for name, parameter in generator.named_parameters() if parameter.grad is None] in (
            [],
            ["conditioner.tokens"],
        )


def test_base_loss_reaches_only_the_blocks_below_the_base_head():
    generator = build()
    generator(*example(generator)).base_pred.sum().backward()
    blocks = generator.network.trunk.blocks
    assert blocks[1].attn.qkv.weight.grad is not None and blocks[2].attn.qkv.weight.grad is None


@pytest.mark.parametrize("condition", ["label", "text"])
@pytest.mark.parametrize("training", [True, False])
def test_bf16_autocast_is_close_to_float32(condition, training):
    """Training and inference take different attention kernels on a CPU."""
    generator = build(condition=CONDITIONS[condition])
    inputs = example(generator)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        low = generator(*inputs).pred
    torch.testing.assert_close(low.float(), generator(*inputs).pred, rtol=0, atol=0.1)


def test_patch_size_must_divide_the_grid():
    with pytest.raises(SpecError, match="patch_size.*a divisor of 4 and 4"):
        build(small(patch_size=3))


# Layers


def test_rotary_positions():
    """Only relative positions matter, extra tokens are not rotated, tables agree with the formula (12.1)."""
    rope = Rope2D(72, 16, 16)
    cos, sin = rope(268)
    assert cos.shape == (268, 36)
    assert (cos[256:] == 1).all() and (sin[256:] == 0).all()
    row, col, k = 3, 5, 2
    frequency = 10_000 ** (-2 * k / 36)
    assert cos[row * 16 + col, k].item() == pytest.approx(torch.tensor(row * frequency).cos().item(), abs=1e-6)
    assert sin[row * 16 + col, 18 + k].item() == pytest.approx(torch.tensor(col * frequency).sin().item(), abs=1e-6)

    q, k = torch.randn(72), torch.randn(72)
    rotated_q = rotate(q.expand(1, 256, 1, 72), rope(256))[0, :, 0]
    rotated_k = rotate(k.expand(1, 256, 1, 72), rope(256))[0, :, 0]
    first = rotated_q[2 * 16 + 7] @ rotated_k[5 * 16 + 1]
    shifted = rotated_q[6 * 16 + 8] @ rotated_k[9 * 16 + 2]
    torch.testing.assert_close(first, shifted, rtol=1e-4, atol=1e-4)


def test_swiglu_widths():
    widths = {384: 1024, 768: 2048, 1024: 2730, 1152: 3072, 1440: 3840, 2048: 5461}
    assert {dim: swiglu_dim(dim, 4.0) for dim in widths} == widths


def test_patches_go_back_to_their_place():
    latents = torch.randn(2, 3, 4, 6)
    patches = patchify(latents, 2)
    channels_last = patches.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)  # (c, row, col) -> (row, col, c)
    assert torch.equal(unpatchify(channels_last, 2, 2, 3), latents)


def test_fixed_positions_encode_the_column_first():
    table = sincos_2d(8, 2, 3)
    assert torch.equal(table[0, :4], table[3, :4])  # same column, other row
    assert torch.equal(table[0, 4:], table[1, 4:])  # same row, other column
    assert not torch.equal(table[0, :4], table[1, :4])


# Conditions


def test_null_conditions():
    for name, condition in CONDITIONS.items():
        generator = build(condition=condition)
        _, _, cond = example(generator)
        null_cond = generator.null_cond(cond)
        assert null_cond.keys() == cond.keys()
        assert all(null_cond[key].shape == value.shape and null_cond[key].dtype == value.dtype
                   for key, value in cond.items())  # fmt: skip
        if name == "label":
            assert (null_cond["label"] == 5).all()
        if name == "text":
            assert not null_cond["text_mask"].any()


def test_unconditional_text_does_not_depend_on_the_caption_length():
    generator = build(condition=CONDITIONS["text"])
    z_t, t, cond = example(generator)
    short = {name: value[:, :4] for name, value in cond.items()}
    long, short = (generator(z_t, t, generator.null_cond(c)).pred for c in (cond, short))
    torch.testing.assert_close(long, short, rtol=0, atol=1e-5)


def test_masked_text_is_not_seen():
    generator = build(condition=CONDITIONS["text"])
    z_t, t, cond = example(generator)
    changed = cond["text_tokens"].clone()
    changed[~cond["text_mask"]] = 100.0
    torch.testing.assert_close(
        generator(z_t, t, cond).pred, generator(z_t, t, {**cond, "text_tokens": changed}).pred, rtol=0, atol=1e-5
    )


def test_visible_tokens_of_the_empty_prompt():
    generator = build(condition=TextCondition(dim=10, num_null_tokens=1))
    generator.conditioner.null_tokens.fill_(3.0)
    _, _, cond = example(build(condition=CONDITIONS["text"]))
    null_cond = generator.null_cond(cond)
    assert null_cond["text_mask"].sum(1).tolist() == [1, 1, 1] and (null_cond["text_tokens"][:, 0] == 3).all()
    with pytest.raises(SpecError, match="Pad the captions"):
        generator.null_cond({name: value[:, :0] for name, value in cond.items()})


@pytest.mark.parametrize("frame_positions", [True, False])
def test_order_of_context_frames_matters_only_with_frame_positions(frame_positions):
    condition = FramesCondition(form="in_context", num_frames=2, frame_positions=frame_positions)
    generator = build(condition=condition)
    z_t, t, cond = example(generator)
    swapped = {**cond, "context_latents": cond["context_latents"].flip(1)}
    change = (generator(z_t, t, cond).pred - generator(z_t, t, swapped).pred).abs().max()
    assert (change > 1e-4) == frame_positions


@pytest.mark.parametrize(
    ("condition", "cond", "message"),
    [
        ("label", {"label": torch.tensor([0, 9])}, r"label out of range; got \[9\]; expected 0 to 4"),
        ("label", {"label": torch.tensor([-1])}, "label out of range"),
        ("label", {"class": torch.tensor([1])}, r"wrong names; got \['class'\]; expected \['label'\]"),
        ("label", {"label": torch.zeros(2, 1, dtype=torch.int64)}, r"wrong shape; got \(2, 1\); expected \(B\)"),
        ("text", {"text_tokens": torch.zeros(2, 3, 9), "text_mask": torch.zeros(2, 3)}, r"expected \(B, any, 10\)"),
        ("text", {"text_tokens": torch.zeros(2, 3, 10), "text_mask": torch.zeros(1, 3)}, "disagree in the batch axis"),
    ],
)
def test_wrong_conditions_are_named(condition, cond, message):
    with pytest.raises(SpecError, match=message):
        build(condition=CONDITIONS[condition]).check_cond(cond)


def test_good_conditions_pass():
    for condition in CONDITIONS.values():
        generator = build(condition=condition)
        generator.check_cond(example(generator)[2])


# Artefact


class PairCondition(LabelCondition):
    kind: str = "pair"


@pytest.mark.parametrize("condition", CONDITIONS)
def test_saved_generator_is_the_same(condition, tmp_path):
    generator = build(condition=CONDITIONS[condition])
    generator.extra = {"note": "x"}
    generator.save_pretrained(tmp_path / "g")
    loaded = Generator.from_pretrained(tmp_path / "g")
    inputs = example(generator)
    assert torch.equal(generator(*inputs).pred, loaded(*inputs).pred)
    assert (loaded.network_spec, loaded.condition_spec, loaded.flow, loaded.latent_shape, loaded.extra) == (
        generator.network_spec, generator.condition_spec, generator.flow, generator.latent_shape, {"note": "x"},
    )  # fmt: skip


def test_condition_kinds_from_plugins(tmp_path):
    build(condition=PairCondition(num_classes=5)).save_pretrained(tmp_path / "g")
    with pytest.raises(SpecError, match="unknown condition; got pair; expected one of frames, label, none, text"):
        Generator.from_pretrained(tmp_path / "g")
    loaded = Generator.from_pretrained(tmp_path / "g", condition_types=[PairCondition])
    assert isinstance(loaded.condition_spec, PairCondition) and isinstance(loaded.condition_spec, ConditionSpec)


def test_damaged_artefacts_are_named(tmp_path):
    config = {
        "network": small().model_dump(),
        "condition": {"kind": "none"},
        "flow": {},
        "latent_shape": [6, 4, 4],
    }
    save_artefact(tmp_path / "a", kind="generator", config=config, tensors={}, card="")
    with pytest.raises(CheckpointError, match="the weights do not fit the configuration; got missing"):
        Generator.from_pretrained(tmp_path / "a")
    save_artefact(tmp_path / "b", kind="generator", config={**config, "flow": {"speed": 3}}, tensors={}, card="")
    with pytest.raises(CheckpointError, match="config.json: damaged, or of another kind"):
        Generator.from_pretrained(tmp_path / "b")
    with pytest.raises(SpecError, match="condition.num_classes"):
        condition_spec({"kind": "label", "num_classes": 0})


def test_time_shift_follows_the_latent_size():
    shifts = {(384, 16, 16): 4.899, (768, 16, 16): 6.928, (1024, 16, 16): 8.0, (768, 32, 32): 13.856}
    for latent_shape, expected in shifts.items():
        with torch.device("meta"):
            generator = Generator(small(), NoCondition(), FlowSpec(), latent_shape)
        assert generator.time_shift == pytest.approx(expected, abs=1e-3)


# Published sizes

TRUNKS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16), "XL1440": (1440, 28, 20)}
V1 = {"conditioning": "adaln", "qk_norm": False, "abs_pos_embed": True}
IG = {"base_head_depth": 8}
LABEL, TEXT = LabelCondition(num_classes=1000), TextCondition(dim=1024)
FRAMES = FramesCondition(form="in_context", frame_positions=False)


@pytest.mark.parametrize(
    ("kind", "size", "options", "condition", "channels", "parameters_m", "macs_g"),
    [
        ("ddt", "S", V1, LABEL, 768, 196.5, 48.5),
        ("ddt", "B", V1, LABEL, 768, 294.3, 65.7),
        ("ddt", "L", V1, LABEL, 768, 621.7, 123.6),
        ("ddt", "XL", V1, LABEL, 768, 838.68, 161.6),
        ("ddt", "S", {}, LABEL, 1024, 186.9, 49.2),
        ("ddt", "B", {}, LABEL, 768, 251.6, None),
        ("ddt", "B", IG, LABEL, 1024, 254.8, 67.6),
        ("ddt", "L", IG, LABEL, 1024, 474.8, 128.5),
        ("ddt", "XL", IG, LABEL, 768, 618.8, None),
        ("ddt", "XL", IG, LABEL, 1024, 620.4, 168.4),
        ("ddt", "XL1440", IG, LABEL, 1024, 875.22, 237.5),
        ("ddt", "XL1440", IG, TEXT, 1024, 875.24, 426),
        ("ddt", "XL", IG, FRAMES, 1024, 622.38, 726),
        ("dit", "S", V1, LABEL, 768, 33.6, None),
        ("dit", "XL", V1, LABEL, 768, 677.2, None),
        ("dit", "B", {}, LABEL, 1024, 88.4, None),
        ("dit", "XL", {}, LABEL, 1024, 451.8, None),
    ],
)
def test_published_parameter_counts_and_macs(kind, size, options, condition, channels, parameters_m, macs_g):
    width, depth, num_heads = TRUNKS[size]
    network = (DDTSpec if kind == "ddt" else DiTSpec)(width=width, depth=depth, num_heads=num_heads, **options)
    with torch.device("meta"):
        generator = Generator(network, condition, FlowSpec(), (channels, 16, 16))
    assert sum(value.numel() for value in generator.parameters()) / 1e6 == pytest.approx(parameters_m, abs=0.1)
    if macs_g is not None:
        assert generator_arithmetic(generator).macs / 1e9 == pytest.approx(macs_g, rel=0.01)


def test_the_adaln_lightningdit_starts_as_rae_v1_does():
    """Xavier uniform, bias 0 in its blocks; the in-context one, and DiT^DH, start as PyTorch does."""
    width, hidden = 64, swiglu_dim(64, 4.0)
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.w12": (2 * hidden, width)}
    for kind, options in ((DiTSpec, V1), (DiTSpec, {}), (DDTSpec, V1)):
        spec = kind(width=width, depth=1, num_heads=4, **options)
        generator = Generator(spec, CONDITIONS["label"], FlowSpec(), LATENT_SHAPE)
        state = generator.state_dict()
        for name, (rows, cols) in shapes.items():
            weight, bias = (state[f"network.trunk.blocks.0.{name}.{part}"] for part in ("weight", "bias"))
            xavier, default = (6 / (rows + cols)) ** 0.5, cols**-0.5
            expected = xavier if kind is DiTSpec and options else default
            assert weight.abs().max().item() == pytest.approx(expected, rel=0.01)
            assert bias.any() == (expected == default)
        assert not state["network.final.linear.weight"].any(), "the first prediction is still zero"
