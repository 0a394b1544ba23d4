"""Our networks, loss and sampler against the official implementations, with the same weights and inputs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from raev2.errors import CheckpointError
from raev2.flow import flow_error, interpolate, training_loss
from raev2.interop import export_generator, import_decoder, import_generator
from raev2.sampler import sample_latents, time_grid
from raev2.spec import CFG, FlowSpec, InternalCFG, InternalGuidance, NoGuidance, SamplingSpec

FOLDER = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-6
GENERATORS = sorted(
    path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in ("decoder", "flow_loss", "sampling")
)
# The two files without a constructor of their own hold this network.
NETWORK_CONFIG = {
    "model": "DiTwDDTHeadIG", "input_size": 4, "in_channels": 12, "patch_size": [1, 1], "hidden_size": [24, 32],
    "depth": [2, 2], "num_heads": [2, 2], "mlp_ratio": 4.0, "num_classes": 10, "condition_type": "label",
    "base_model_depth": 1, "enable_repa": True, "repa_layer_depth": 1, "z_dim": 12,
    "cond_arch": {"num_t_tokens": 4, "num_c_tokens": 8},
}  # fmt: skip


def read(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        groups = {"weights": {}, "inputs": {}, "outputs": {}}
        for key in file.keys():  # noqa: SIM118
            group, _, rest = key.partition(".")
            groups[group][rest] = file.get_tensor(key)
    return config, groups["weights"], groups["inputs"], groups["outputs"]


def condition(inputs):
    if "y" in inputs:
        return {"label": inputs["y"]}
    if "text_mask" in inputs:
        return {"text_tokens": inputs["text_tokens"], "text_mask": inputs["text_mask"].bool()}
    return {name: inputs[name] for name in ("context_latents", "action", "rel_time")}


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", GENERATORS)
@torch.no_grad()
def test_generator_equals_the_reference(name):
    config, weights, inputs, outputs = read(name)
    output = import_generator(weights, config)(inputs["x"], inputs["t"], condition(inputs))
    assert distance(output.pred, outputs["full"]) < TOLERANCE
    assert (output.base_pred is not None) == ("base" in outputs)
    assert (output.hidden is not None) == ("repa" in outputs)
    if output.base_pred is not None:
        assert distance(output.base_pred, outputs["base"]) < TOLERANCE
    if output.hidden is not None:
        assert distance(output.hidden, outputs["repa"]) < TOLERANCE


@pytest.mark.parametrize("name", GENERATORS)
def test_export_is_the_inverse_of_import(name):
    config, weights, _, _ = read(name)
    exported = export_generator(import_generator(weights, config))
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        if "freqs_" in key:  # recomputed in float64
            assert distance(exported[key], value) < 1e-6
        else:
            assert torch.equal(exported[key], value), key


@torch.no_grad()
def test_decoder_equals_the_reference():
    config, weights, inputs, outputs = read("decoder")
    images = import_decoder(weights, config)(inputs["latent_tokens"])
    assert distance(images, outputs["image"]) < TOLERANCE


@torch.no_grad()
def test_decoder_of_v1_is_rescaled_to_pixels():
    config, weights, inputs, outputs = read("decoder")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = import_decoder(weights, config, pixel_mean=mean, pixel_std=std)(inputs["latent_tokens"])
    expected = outputs["image"] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert distance(images, expected) < 1e-5


@torch.no_grad()
def test_loss_equals_the_reference():
    config, weights, inputs, outputs = read("flow_loss")
    generator = import_generator(weights, NETWORK_CONFIG)
    point = interpolate(inputs["latents"], inputs["noise"], inputs["t"])
    output = generator(point.z_t, point.t, condition(inputs))

    flow = FlowSpec(min_t=config["t_eps"])
    losses = training_loss(output, point, inputs["latents"], flow, repa_target=inputs["repa_target"])
    error = sum(flow_error(pred, point, inputs["latents"], flow) for pred in (output.pred, output.base_pred))
    elementwise = outputs["x.loss_elementwise"]  # the reference's "loss" is full + base
    assert ((error - elementwise).abs() / elementwise.clamp(min=1)).max() < 1e-5
    close = functools.partial(torch.testing.assert_close, rtol=2e-6, atol=0)
    close((losses.full + losses.base).mean(), outputs["x.loss_mean"][0])
    close(losses.base.mean(), outputs["x.loss_base_mean"][0])
    close(config["repa_coeff"] * losses.repa.mean(), outputs["x.loss_repa"][0])
    close(losses.total, (outputs["x.loss_mean"] + outputs["x.loss_repa"])[0])

    velocity = FlowSpec(prediction="velocity", min_t=config["t_eps"], reference_clamp=True)
    losses = training_loss(output, point, inputs["latents"], velocity)
    close(losses.total, outputs["velocity.loss_mean"][0])
    close(losses.base.mean(), outputs["velocity.loss_base_mean"][0])


# The reference computes its time grid in float32; for this shift it starts at 1.0000001, outside of the closed interval
# [0.1, 1.0], so that internal guidance missed the first step. Ours starts at exactly 1. Hence 0.9999 here.
GUIDANCE = {
    "none": NoGuidance(),
    "cfg_2.5_interval_0.2_0.8": CFG(scale=2.5, interval=(0.2, 0.8)),
    "internal_1.78_interval_0.1_1.0": InternalGuidance(scale=1.78, interval=(0.1, 0.9999)),
    "internal_1.5_cfg_2.0": InternalCFG(
        internal_scale=1.5, internal_interval=(0.1, 0.9999), scale=2.0, interval=(0.0, 0.9)
    ),
}


@pytest.mark.parametrize("case", GUIDANCE)
@pytest.mark.parametrize("reference_clamp", [False, True])
def test_sampling_equals_the_reference(case, reference_clamp):
    config, weights, inputs, outputs = read("sampling")
    generator = import_generator(weights, NETWORK_CONFIG)
    generator.flow = FlowSpec(time_shift=config["shift"], min_t=config["t_eps"], reference_clamp=reference_clamp)
    sampling = SamplingSpec(steps=config["steps"], guidance=GUIDANCE[case])
    latents = sample_latents(generator, condition(inputs), inputs["noise"], sampling)
    scale = outputs[case].abs().max().item()
    assert distance(latents, outputs[case]) < 1e-5 * max(1, scale)


def test_time_grid_equals_the_reference():
    config, _, inputs, _ = read("sampling")
    assert distance(torch.tensor(time_grid(config["steps"], config["shift"])), inputs["time_grid"]) < 2e-7


def test_wrong_weights_are_named():
    config, weights, _, _ = read("ddt_ig_label")
    del weights["s_projector.bias"]
    weights["cfg_w_embedder.W"] = torch.zeros(2)
    message = r"missing 1 \(s_projector.bias\); unexpected 1 \(cfg_w_embedder.W\).*RAEv2 DiTwDDTHeadIG"
    with pytest.raises(CheckpointError, match=message):
        import_generator(weights, config)


def test_weights_of_another_kind_are_named():
    config, _, _, _ = read("ddt_ig_label")
    _, decoder, _, _ = read("decoder")
    with pytest.raises(CheckpointError, match="use import_decoder"):
        import_generator(decoder, config)


def test_another_rotary_table_is_an_error():
    config, weights, _, _ = read("lightning_label")
    weights["rope.freqs_cos"] = weights["rope.freqs_cos"] * 0.9
    with pytest.raises(CheckpointError, match="another rotary table"):
        import_generator(weights, config)


def test_training_checkpoints_are_unwrapped():
    config, weights, inputs, _ = read("lightning_label")
    wrapped = {"step": 3, "model": {}, "ema": {f"module._orig_mod.{name}": value for name, value in weights.items()}}
    assert torch.equal(
        import_generator(wrapped, config)(inputs["x"], inputs["t"], condition(inputs)).pred,
        import_generator(weights, config)(inputs["x"], inputs["t"], condition(inputs)).pred,
    )


def test_what_the_weights_do_not_determine_is_named():
    config, weights, _, _ = read("ddt_ig_label")
    with pytest.raises(CheckpointError, match="do not determine base_model_depth.*8 in all released"):
        import_generator(weights)
    with pytest.raises(CheckpointError, match="do not determine base_model_depth.*--set base_model_depth=VALUE"):
        import_generator(weights, {name: value for name, value in config.items() if name != "base_model_depth"})


@pytest.mark.parametrize("name", GENERATORS)
def test_a_config_is_needed_only_for_what_the_weights_do_not_determine(name):
    config, weights, _, _ = read(name)
    part = {key: config[key] for key in ("base_model_depth", "repa_layer_depth") if key in config}
    full, inferred = import_generator(weights, config), import_generator(weights, part)
    assert inferred.network_spec == full.network_spec and inferred.latent_shape == full.latent_shape
    assert inferred.condition_spec == full.condition_spec and inferred.flow == full.flow
