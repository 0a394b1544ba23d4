"""Conversion of weights: any size of the reference's classes, what the weights tell, and what does not fit."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from raev2.errors import CheckpointError
from raev2.files.artefact import load_artefact
from raev2.interop import (
    export_decoder,
    export_discriminator,
    export_generator,
    export_stats,
    generator_config,
    import_decoder,
    import_discriminator,
    import_generator,
    import_stats,
)
from raev2.interop.generators import convert_generator, infer_config
from raev2.model.condition import LabelCondition, NoCondition, TextCondition
from raev2.model.frames import FramesCondition
from raev2.model.generator import Generator
from raev2.spec import AdversarialSpec, DDTSpec, DecoderSpec, DiTSpec, FlowSpec
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.discriminator import build_discriminator
from raev2.tokenizer.latent_stats import denormalise, normalise

V1 = {"conditioning": "adaln", "qk_norm": False}


def random_generator(seed: int) -> Generator:
    """A small generator of any kind that the reference has, with random weights everywhere."""
    draw = random.Random(seed)
    in_context = draw.random() < 0.7
    head_dims = draw.choice([8, 12, 16]), draw.choice([8, 16])
    heads = draw.choice([1, 2, 3])
    patch = draw.choice([1, 2]) if in_context else 1
    side = patch * draw.choice([2, 3, 5])
    trunk = {"width": heads * head_dims[0], "num_heads": heads, "depth": draw.choice([1, 2, 4]), "patch_size": patch,
             "mlp_ratio": draw.choice([4.0, 4.0, 3.0])}  # fmt: skip
    if in_context:
        trunk |= {"num_time_tokens": draw.choice([1, 4])}
        if draw.random() < 0.5:
            trunk |= {"base_head_depth": draw.randint(1, trunk["depth"])}
        if draw.random() < 0.3:
            trunk |= {"repa_depth": draw.randint(1, trunk["depth"]), "repa_dim": draw.choice([5, 16])}
    else:
        trunk |= {**V1, "abs_pos_embed": draw.random() < 0.8}
    if draw.random() < 0.7:
        head_heads = draw.choice([2, 4])
        spec = DDTSpec(
            **trunk, head_width=head_heads * head_dims[1], head_num_heads=head_heads, head_depth=draw.choice([1, 2])
        )
        if not in_context and spec.head_width == spec.width:  # cannot be told apart in files of v1
            spec = spec.replace(head_width=2 * spec.head_width)
    else:
        spec = DiTSpec(**trunk)
    conditions = [LabelCondition(num_classes=draw.choice([1, 7]), num_tokens=draw.choice([1, 8]) if in_context else 8)]
    if in_context:
        conditions.append(TextCondition(dim=draw.choice([6, 10]), max_tokens=draw.choice([3, 9])))
        conditions.append(
            FramesCondition(
                form="in_context", frame_positions=False, num_frames=draw.choice([1, 3]), patch_size=patch,
                action_dim=draw.choice([2, 3]), num_action_tokens=draw.choice([1, 4]),
            )
        )  # fmt: skip
    prediction = draw.choice(["x", "velocity"])
    generator = Generator(
        spec, draw.choice(conditions), FlowSpec(prediction=prediction), (draw.choice([3, 8]), side, side)
    ).eval()
    fixed = {"network.trunk.pos_embed"}
    for name, value in generator.state_dict().items():
        if name not in fixed:
            torch.nn.init.normal_(value, std=0.3)
    return generator


def outputs(generator: Generator):
    cond = generator.conditioner.example_cond(2)
    for name, value in cond.items():
        cond[name] = torch.ones_like(value) if value.dtype in (torch.bool, torch.int64) else torch.randn(value.shape)
    output = generator(torch.randn(2, *generator.latent_shape), torch.rand(2), cond)
    return [value for value in (output.pred, output.base_pred, output.hidden) if value is not None]


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_every_size_goes_out_and_comes_back(seed):
    generator = random_generator(seed)
    weights, config = export_generator(generator), generator_config(generator)
    again = import_generator(weights, config)
    assert (again.network_spec, again.flow, again.latent_shape) == (
        generator.network_spec, generator.flow, generator.latent_shape
    )  # fmt: skip
    state = again.state_dict()
    for name, value in generator.state_dict().items():
        assert torch.equal(state[name], value), name
    torch.manual_seed(1)
    first = outputs(generator)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, outputs(again), strict=True))

    # What can be seen in the weights agrees with the config.
    inferred = infer_config(weights)
    for key in inferred.keys() & config.keys() - {"patch_size", "cond_arch", "mlp_ratio"}:
        assert inferred[key] == config[key], key
    hidden = {"base_model_depth", "repa_layer_depth", "prediction"}
    if config["model"].startswith("LightningDiT") and config.get("condition_type") in ("text", "nwm"):
        hidden.add("input_size")  # one table of positions for patches and condition: their border cannot be seen
    part = {key: value for key, value in config.items() if key in hidden}
    lone = import_generator(weights, part)
    assert (lone.latent_shape, lone.network_spec.depth) == (generator.latent_shape, generator.network_spec.depth)
    assert all(torch.equal(value, state[name]) for name, value in lone.state_dict().items())


def test_tables_of_positions_are_not_needed():
    generator = random_generator(3)
    weights, config = export_generator(generator), generator_config(generator)
    without = {name: value for name, value in weights.items() if ".freqs_" not in name}
    assert import_generator(without, config).latent_shape == generator.latent_shape


def test_a_condition_that_the_reference_does_not_have_is_not_exported():
    spec = DiTSpec(width=16, depth=1, num_heads=2)
    for condition in (NoCondition(), FramesCondition(form="in_context", num_frames=1)):
        generator = Generator(spec, condition, FlowSpec(), (3, 2, 2))
        with pytest.raises(CheckpointError, match="no place for"):
            generator_config(generator), export_generator(generator)


def test_a_repa_projector_that_the_reference_does_not_have_is_not_exported():
    spec = DiTSpec(width=16, depth=1, num_heads=2, repa_depth=1, repa_dim=5, repa_hidden=7)
    generator = Generator(spec, LabelCondition(num_classes=2), FlowSpec(), (3, 4, 4))
    with pytest.raises(CheckpointError, match="no place for a REPA projector of three layers; got repa_hidden=7"):
        generator_config(generator)


def test_a_grid_that_the_reference_does_not_have_is_not_exported():
    generator = Generator(DiTSpec(width=16, depth=1, num_heads=2), LabelCondition(num_classes=2), FlowSpec(), (3, 2, 4))
    with pytest.raises(CheckpointError, match="no place for this grid; got 2 x 4"):
        generator_config(generator)


def test_streamed_weights_are_those_of_the_module(tmp_path):
    generator = random_generator(5)
    empty, conversion = convert_generator(export_generator(generator), generator_config(generator))
    assert all(value.is_meta for value in empty.parameters())
    (tmp_path / "a").mkdir()
    conversion.write(tmp_path / "a/model.safetensors")
    generator.save_pretrained(tmp_path / "b")
    (tmp_path / "a/config.json").write_text((tmp_path / "b/config.json").read_text())
    written, expected = (load_artefact(tmp_path / name, kind="generator")[1] for name in "ab")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_tensors_that_are_only_renamed_are_not_copied():
    generator = random_generator(0)
    weights = export_generator(generator)
    again = import_generator(weights, generator_config(generator))
    assert again.network.final.linear.weight.data_ptr() == weights["final_layer.linear.weight"].data_ptr()


@pytest.mark.parametrize("seed", [0, 2, 9])
def test_every_tensor_that_is_missing_is_named(seed):
    generator = random_generator(seed)
    weights, config = export_generator(generator), generator_config(generator)
    identifying = {"x_embedder.proj.weight", "s_embedder.proj.weight", "t_embedder.W", "blocks.0.norm1.weight",
                   "y_embedder.embedding_table.weight"}  # fmt: skip
    for name in weights.keys() - identifying:
        if ".freqs_" not in name:
            part = {other: value for other, value in weights.items() if other != name}
            with pytest.raises(CheckpointError, match=rf"missing .*\({name}|another shape|has no|no place"):
                import_generator(part, config)
            with pytest.raises(CheckpointError):
                import_generator(part)
    for name in identifying & weights.keys():
        with pytest.raises(CheckpointError):
            import_generator({other: value for other, value in weights.items() if other != name}, config)


def test_a_config_that_does_not_fit_names_the_tensor():
    generator = Generator(DiTSpec(width=16, depth=2, num_heads=2), LabelCondition(num_classes=2), FlowSpec(), (3, 2, 2))
    weights = export_generator(generator)
    with pytest.raises(
        CheckpointError, match=r"embedding_table.weight has another shape.*got \(3, 16\); expected \(6,"
    ):
        import_generator(weights, {"num_classes": 5})
    with pytest.raises(CheckpointError, match=r"unexpected \d+ \(blocks.1.*look like RAEv2 LightningDiT"):
        import_generator(weights, {"depth": 1})
    with pytest.raises(CheckpointError, match="DiTwDDTHead has a trunk and a head; got hidden_size 16"):
        import_generator(weights, {"model": "DiTwDDTHead"})
    with pytest.raises(CheckpointError, match="unknown model; got UNet; expected one of DiTwDDTHead"):
        import_generator(weights, {"model": "UNet"})
    with pytest.raises(CheckpointError, match="unknown prediction; got eps; expected x or velocity"):
        import_generator(weights, {"prediction": "eps"})
    with pytest.raises(CheckpointError, match="use_rope=False is not supported"):
        import_generator(weights, {"use_rope": False})
    with pytest.raises(CheckpointError, match="not a multiple of patch_size; got 7; expected 6 or 8"):
        import_generator(weights, {"input_size": 7, "patch_size": 2})
    with pytest.raises(CheckpointError, match="divisible by num_heads"):
        import_generator(weights, {"num_heads": 3})


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            ["x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.mlp.fc1.weight"],
            "a DiT, SiT or LightningDiT",
        ),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE"),
        (["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "a vision encoder"),
        (["mean", "var"], "latent statistics"),
        (["heads.0.0.0.weight_orig"], "a discriminator"),
        (["network.join.weight", "conditioner.tokens"], "a generator of this package"),
        (["whatever"], "neither a generator nor a decoder"),
    ],
)
def test_weights_of_something_else_are_named(names, what):
    tensors = {name: torch.zeros(2, 2) for name in names}
    for load in (import_generator, import_decoder):
        with pytest.raises(CheckpointError, match=f"not a (generator|decoder) of RAE or RAEv2; got {what}"):
            load(tensors)


def test_things_that_are_no_tensors_are_named():
    with pytest.raises(CheckpointError, match=r"entries that are no tensors: 2 \(epoch, lr\)"):
        import_generator({"epoch": 3, "lr": 0.1, "w": torch.zeros(1)})


# Decoders.


@pytest.mark.parametrize(("grid", "patch"), list(itertools.product([(2, 2), (3, 3), (2, 4)], [1, 4])))
@torch.no_grad()
def test_decoders_go_out_and_come_back(grid, patch):
    spec = DecoderSpec(width=24, depth=2, num_heads=2, mlp_dim=40, patch_size=patch)
    decoder = ViTDecoder(6, spec, grid).eval()
    for value in decoder.state_dict().values():
        torch.nn.init.normal_(value, std=0.3)
    again = import_decoder(export_decoder(decoder), {"heads": 2, "grid": grid})
    assert again.spec == spec and again.grid == grid
    assert all(torch.equal(value, decoder.state_dict()[name]) for name, value in again.state_dict().items())
    tokens = torch.randn(2, grid[0] * grid[1], 6)
    assert torch.equal(again(tokens), decoder(tokens))
    assert export_decoder(again).keys() == export_decoder(decoder).keys()


@torch.no_grad()
def test_decoders_of_v1_come_back_to_the_last_bit_but_one():
    decoder = ViTDecoder(6, DecoderSpec(width=24, depth=1, num_heads=2, mlp_dim=40, patch_size=4), (2, 2))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = export_decoder(decoder)
    ours = import_decoder(theirs, {"heads": 2}, mean, std)
    tokens = torch.randn(2, 4, 6)
    v1_pixels = decoder(tokens) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    torch.testing.assert_close(ours(tokens), v1_pixels, atol=1e-6, rtol=0)
    back = export_decoder(ours, mean, std)
    for name, value in theirs.items():
        if name.startswith("decoder_pred"):
            torch.testing.assert_close(back[name], value, rtol=1.2e-7, atol=2e-7)
        else:
            assert torch.equal(back[name], value)


def test_heads_of_published_sizes_are_known_and_others_asked_for():
    weights = export_decoder(
        ViTDecoder(6, DecoderSpec(width=24, depth=1, num_heads=2, mlp_dim=40, patch_size=4), (2, 2))
    )
    with pytest.raises(
        CheckpointError, match="do not determine heads; got width 24, depth 1, which is no published size"
    ):
        import_decoder(weights)
    micro = ViTDecoder(6, DecoderSpec(width=256, depth=6, num_heads=4, mlp_dim=1024, patch_size=4), (2, 2))
    assert import_decoder(export_decoder(micro)).spec.num_heads == 4
    official = {"decoder_num_attention_heads": 3, "num_attention_heads": 12, "hidden_size": 768, "patch_size": 14}
    assert import_decoder(weights, official).spec.num_heads == 3


def test_a_decoder_with_overlap_does_not_go_out():
    spec = DecoderSpec(width=24, depth=1, num_heads=2, mlp_dim=40, patch_size=4, overlap=True)
    with pytest.raises(
        CheckpointError, match=r"has no patches that overlap; got tokenizer.decoder.overlap is set\. Exp"
    ):
        export_decoder(ViTDecoder(6, spec, (2, 2)))


def test_a_partial_decoder_names_what_is_missing():
    weights = export_decoder(
        ViTDecoder(6, DecoderSpec(width=24, depth=2, num_heads=2, mlp_dim=40, patch_size=4), (2, 2))
    )
    del weights["decoder_norm.bias"]
    with pytest.raises(CheckpointError, match=r"missing 1 \(decoder_norm.bias\); unexpected none"):
        import_decoder(weights, {"heads": 2})


def test_positions_that_are_no_square_need_a_grid():
    weights = export_decoder(
        ViTDecoder(6, DecoderSpec(width=24, depth=1, num_heads=2, mlp_dim=40, patch_size=4), (2, 3))
    )
    with pytest.raises(CheckpointError, match="the grid does not fit.*got 2 x 2; expected 6 tokens.*--set grid="):
        import_decoder(weights, {"heads": 2})


def test_a_generator_is_no_decoder():
    with pytest.raises(
        CheckpointError, match="not a decoder of RAE or RAEv2; got RAE.* LightningDiT.*; expected a GeneralDecoder"
    ):
        import_decoder(export_generator(random_generator(0)))


# Statistics.

SHAPE = (4, 2, 3)
ENCODER = {"weights": "a"}


@pytest.mark.parametrize("shape", [(4, 2, 3), (1, 4, 2, 3), (4, 1, 1), (1, 4, 1, 1), (4,), ()])
def test_statistics_of_every_published_shape(shape):
    values = {"mean": torch.randn(shape), "var": torch.rand(shape)}
    stats = import_stats(values, SHAPE, encoder=ENCODER)
    flat = values["mean"].flatten() if len(shape) else values["mean"]
    expected = values["mean"].reshape(SHAPE) if flat.numel() == 24 else flat.reshape(-1, 1, 1).expand(SHAPE)
    assert torch.equal(stats.mean, expected) and stats.var.shape == SHAPE
    latents = torch.randn(2, *SHAPE)
    torch.testing.assert_close(denormalise(normalise(latents, stats.mean, stats.var), stats.mean, stats.var), latents)
    exported = export_stats(stats)
    assert torch.equal(exported["mean"], stats.mean) and torch.equal(exported["var"], stats.var)


def test_missing_statistics_are_zero_and_one():
    stats = import_stats({"var": torch.full(SHAPE, 2.0)}, SHAPE, encoder=ENCODER)
    assert not stats.mean.any() and (stats.var == 2).all()
    assert (import_stats({"mean": torch.ones(SHAPE)}, SHAPE, encoder=ENCODER).var == 1).all()


@pytest.mark.parametrize("shape", [(5, 2, 3), (4, 3, 2), (4, 2), (2, 4, 2, 3)])
def test_statistics_of_another_shape(shape):
    with pytest.raises(CheckpointError, match="mean has the wrong shape.*They belong to another encoder"):
        import_stats({"mean": torch.zeros(shape), "var": torch.ones(SHAPE)}, SHAPE, encoder=ENCODER)


def test_statistics_that_are_none():
    with pytest.raises(CheckpointError, match="negative variance; got smallest variance -1"):
        import_stats({"var": -torch.ones(SHAPE)}, SHAPE, encoder=ENCODER)
    with pytest.raises(CheckpointError, match="not a statistics file; got RAE"):
        import_stats(export_generator(random_generator(0)), SHAPE, encoder=ENCODER)


# Discriminators.


@torch.no_grad()
def test_discriminators_go_out_and_come_back():
    """The reference keeps spectral norm with hooks: the same network, built here with torch's hooks, is loaded."""
    spec = AdversarialSpec(layers=(5, 1, 5), kernel_size=3)
    discriminator = build_discriminator(spec).train()
    theirs = {}
    for i in range(len(spec.layers)):
        for name in ("0.0", "1.fn.0", "2"):
            shape = {"0.0": (192, 192, 1), "1.fn.0": (192, 192, 3), "2": (1, 192, 1)}[name]
            conv = torch.nn.utils.spectral_norm(torch.nn.Conv1d(shape[1], shape[0], shape[2]), eps=1e-12)
            theirs |= {f"heads.{i}.{name}.{key}": value for key, value in conv.state_dict().items()}
        for name in ("0.1", "1.fn.1"):
            theirs |= {f"heads.{i}.{name}.weight": torch.randn(192), f"heads.{i}.{name}.bias": torch.randn(192)}
    import_discriminator({"step": 1, "disc": theirs}, discriminator)
    back = export_discriminator(discriminator)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], value) for name, value in theirs.items())

    weight, u, v = (theirs[f"heads.0.2.weight_{kind}"] for kind in ("orig", "u", "v"))
    sigma = u @ weight.flatten(1) @ v
    torch.testing.assert_close(discriminator.eval().heads[0][2].weight, weight / sigma)

    del theirs["heads.0.0.1.bias"]
    with pytest.raises(CheckpointError, match=r"discriminator weights: .*missing 1 \(heads.0.0.1.bias\)"):
        import_discriminator(theirs, discriminator)
