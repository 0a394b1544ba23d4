"""Weights of the reference implementations (RAE and RAEv2) in and out.

generator = import_generator(state_dict, config)    # DiTwDDTHead, DiTwDDTHeadIG, LightningDiT, LightningDiTIG
decoder = import_decoder(state_dict, config)        # GeneralDecoder: latent tokens (B, N, D) -> images (B, 3, H, W)
state_dict = export_generator(generator)            # back to the reference's names

`config` is a dict with the reference's class name in "model" and its constructor arguments. Their layouts differ from
ours in names, in fused matrices (theirs are cut apart, ours are one) and in the channel order of queries and keys
(they rotate neighbouring channels, we rotate halves); everything here is exact. Loading is strict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raev2.errors import CheckpointError
from raev2.model.condition import ConditionSpec, FramesCondition, LabelCondition, TextCondition
from raev2.model.ddt import DDT
from raev2.model.generator import Generator
from raev2.model.layers import Rope2D
from raev2.spec import DDTSpec, DecoderSpec, DiTSpec, FlowSpec
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoders import aggregate_layers

__all__ = ["aggregate_layers", "export_generator", "import_decoder", "import_generator"]


# ---------------------------------------------------------------------------------------------------------------------
# Generators


def import_generator(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> Generator:
    """Build a `Generator` from reference weights; raises `CheckpointError` unless every tensor finds its place.

    state_dict   plain, or a training checkpoint with the weights under "ema" or "model"
    config       "model", "input_size", "in_channels", "hidden_size", "depth", "num_heads", ... as in the reference
    """
    tensors = _unwrap(state_dict)
    is_v1 = any(name.startswith("y_embedder.") for name in tensors)
    try:
        spec, condition = _network_spec(config, is_v1), _condition_spec(config, is_v1, tensors)
        latent_shape = (int(config["in_channels"]), int(config["input_size"]), int(config["input_size"]))
    except KeyError as error:
        raise CheckpointError("reference config", f"lacks {error}", got=sorted(config)) from error
    flow = FlowSpec(prediction=config.get("prediction", "velocity" if is_v1 else "x"))
    generator = Generator(spec, condition, flow, latent_shape)

    tensors = _check_rope(generator, tensors)
    names = _reference_names(generator)
    _check_names(tensors, (theirs for group in names.values() for theirs in group))
    state = generator.state_dict()
    for ours, theirs in names.items():
        value = torch.cat([tensors[name] for name in theirs])
        if ours.endswith("pos_embed"):
            value = value[0]
        if value.shape != state[ours].shape:
            raise CheckpointError(
                "reference weights", f"{' + '.join(theirs)} has another shape than the config says",
                got=tuple(value.shape), expected=str(tuple(state[ours].shape)),
            )  # fmt: skip
        state[ours] = _reorder_heads(generator, ours, value, to_ours=True)
    generator.load_state_dict(state)
    return generator.eval()


def export_generator(generator: Generator) -> dict[str, Tensor]:
    """The weights in the reference's layout, rotary tables included: the inverse of `import_generator`.

    In-context generators become RAEv2 weights, adaLN generators RAE (v1) weights.
    """
    state = generator.state_dict()
    modules = dict(generator.named_modules())
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _reference_names(generator).items():
        value = _reorder_heads(generator, ours, state[ours], to_ours=False)
        if ours.endswith("pos_embed"):
            value = value[None]
        module: Any = modules[ours.rpartition(".")[0]]
        splits = [len(value)] if len(theirs) == 1 else list(module.splits)
        tensors.update(zip(theirs, (part.clone() for part in value.split(splits)), strict=True))
    for prefix, rope, length in _ropes(generator):
        cos, sin = rope(length)
        tensors[f"{prefix}.freqs_cos"] = cos.repeat_interleave(2, dim=1)
        tensors[f"{prefix}.freqs_sin"] = sin.repeat_interleave(2, dim=1)
    return tensors


def _network_spec(config: Mapping[str, Any], is_v1: bool) -> DDTSpec | DiTSpec:
    model = config["model"]
    unsupported = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False}
    for name, supported in unsupported.items():
        if config.get(name, supported) != supported:
            raise CheckpointError(
                "reference config", f"{name}={config[name]} is not supported", expected=str(supported)
            )
    patch_sizes = {config["patch_size"]} if isinstance(config["patch_size"], int) else set(config["patch_size"])
    if len(patch_sizes) > 1 or (is_v1 and patch_sizes != {1}):
        raise CheckpointError(
            "reference config", "patch_size is not supported", got=config["patch_size"],
            expected="1" if is_v1 else "one size for trunk and head",
        )  # fmt: skip
    trunk: dict[str, Any] = {
        "patch_size": patch_sizes.pop(),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "base_head_depth": config["base_model_depth"] if model.endswith("IG") else None,
    }
    if is_v1:
        trunk |= {
            "conditioning": "adaln",
            "qk_norm": config.get("use_qknorm", False),
            "abs_pos_embed": config.get("use_pos_embed", True),
        }
    else:
        trunk |= {"num_time_tokens": config.get("cond_arch", {}).get("num_t_tokens", 4)}
    if config.get("enable_repa"):
        trunk |= {"repa_depth": config["repa_layer_depth"], "repa_dim": config["z_dim"]}

    width, depth, num_heads = config["hidden_size"], config["depth"], config["num_heads"]
    if model in ("LightningDiT", "LightningDiTIG"):
        return DiTSpec(width=width, depth=depth, num_heads=num_heads, **trunk)
    if model in ("DiTwDDTHead", "DiTwDDTHeadIG"):
        head = {"head_width": width[1], "head_depth": depth[1], "head_num_heads": num_heads[1]}
        return DDTSpec(width=width[0], depth=depth[0], num_heads=num_heads[0], **head, **trunk)
    raise CheckpointError(
        "reference config", "unknown model", got=model, expected="DiTwDDTHead, LightningDiT, or one of them with IG"
    )


def _condition_spec(config: Mapping[str, Any], is_v1: bool, tensors: Mapping[str, Tensor]) -> ConditionSpec:
    cond_arch = config.get("cond_arch", {})
    kind = config.get("condition_type", "label")
    if kind == "label" and is_v1:
        return LabelCondition(num_classes=config["num_classes"])
    if kind == "label":
        return LabelCondition(num_classes=config["num_classes"], num_tokens=cond_arch.get("num_c_tokens", 8))
    if kind == "text":
        return TextCondition(dim=config["context_dim"], max_tokens=cond_arch.get("num_c_tokens", 256))
    if kind == "nwm":
        num_action_tokens = cond_arch.get("n_action_tokens", 4)
        patch_size = tensors["ctx_embedder.context_patch_embed.weight"].shape[-1]
        num_patches = (config["input_size"] // patch_size) ** 2
        return FramesCondition(
            num_frames=(cond_arch["num_c_tokens"] - num_action_tokens - 1) // num_patches,
            patch_size=patch_size,
            action_dim=tensors["ctx_embedder.action_proj.weight"].shape[1],
            num_action_tokens=num_action_tokens,
            frame_positions=False,
        )
    raise CheckpointError("reference config", "unknown condition_type", got=kind, expected="label, text or nwm")


def _reference_names(generator: Generator) -> dict[str, list[str]]:
    """Our parameter -> the reference tensors that make it up, joined along the first axis."""
    spec = generator.network_spec
    is_v1, is_ddt = spec.conditioning == "adaln", isinstance(spec, DDTSpec)
    norm_final = "norm" if is_ddt and not is_v1 else "norm_final"
    adaln = "adaLN_modulation.1" if is_v1 else "adaln_modulation.1"
    head_depth = spec.head_depth if isinstance(spec, DDTSpec) else 0
    trunk_adaln = [f"blocks.{i}.{adaln}" for i in range(spec.depth)] + ([] if is_ddt else [f"final_layer.{adaln}"])
    head_adaln = [f"blocks.{spec.depth + i}.{adaln}" for i in range(head_depth)] + [f"final_layer.{adaln}"]

    linear = {  # weight and bias
        "network.trunk.patch_embed.proj": ["s_embedder.proj" if is_ddt else "x_embedder.proj"],
        "network.trunk.time_embed.mlp.0": ["t_embedder.mlp.0"],
        "network.trunk.time_embed.mlp.2": ["t_embedder.mlp.2"],
        "network.trunk.modulation": trunk_adaln,
        "network.trunk.repa_proj": ["repa_projector"],
        "network.join": ["s_projector"],
        "network.head_embed.proj": ["x_embedder.proj"],
        "network.modulation": head_adaln,
        "network.final.linear": ["final_layer.linear"],
        "network.base_modulation": [f"base_final_layer.{adaln}"],
        "network.base_final.linear": ["base_final_layer.linear"],
        "conditioner.proj": ["ctx_embedder.proj"],
        "conditioner.context_embed.proj": ["ctx_embedder.context_patch_embed"],
        "conditioner.action_proj": ["ctx_embedder.action_proj"],
        "conditioner.time_embed.mlp.0": ["ctx_embedder.time_emb.mlp.0"],
        "conditioner.time_embed.mlp.2": ["ctx_embedder.time_emb.mlp.2"],
    }
    single = {
        "network.trunk.time_embed.frequencies": "t_embedder.W",
        "network.trunk.time_tokens": "t_embedder.learnable_tokens",
        "network.trunk.pos_embed": "pos_embed",
        "network.final.norm.weight": f"final_layer.{norm_final}.weight",
        "network.base_final.norm.weight": f"base_final_layer.{norm_final}.weight",
        "conditioner.table.weight": f"{'y_embedder' if is_v1 else 'ctx_embedder'}.embedding_table.weight",
        "conditioner.tokens": "ctx_embedder.learnable_tokens",
        "conditioner.norm.weight": "ctx_embedder.norm.weight",
        "conditioner.action_tokens": "ctx_embedder.action_tokens",
        "conditioner.time_embed.frequencies": "ctx_embedder.time_emb.W",
        "conditioner.time_token": "ctx_embedder.time_emb.learnable_tokens",
    }
    blocks = [f"network.trunk.blocks.{i}" for i in range(spec.depth)]
    blocks += [f"network.head_blocks.{i}" for i in range(head_depth)]
    for i, block in enumerate(blocks):
        theirs = f"blocks.{i}"
        linear[f"{block}.attn.qkv"] = [f"{theirs}.attn.{part}" for part in (["qkv"] if is_v1 else "qkv")]
        linear[f"{block}.attn.proj"] = [f"{theirs}.attn.proj"]
        linear[f"{block}.mlp.w12"] = [f"{theirs}.mlp.{part}" for part in (["w12"] if is_v1 else ["w1", "w2"])]
        linear[f"{block}.mlp.w3"] = [f"{theirs}.mlp.w3"]
        for norm in ("norm1", "norm2", "attn.q_norm", "attn.k_norm"):
            single[f"{block}.{norm}.weight"] = f"{theirs}.{norm}.weight"

    names = {f"{ours}.{part}": [f"{name}.{part}" for name in theirs]
             for ours, theirs in linear.items() for part in ("weight", "bias")}  # fmt: skip
    names |= {ours: [theirs] for ours, theirs in single.items()}
    state = generator.state_dict()
    unmapped = state.keys() - names.keys() - {"conditioner.null_tokens"}
    if unmapped:
        raise CheckpointError("interop", "the reference has no place for some weights", got=sorted(unmapped)[:4])
    return {ours: theirs for ours, theirs in names.items() if ours in state}


def _reorder_heads(generator: Generator, name: str, value: Tensor, *, to_ours: bool) -> Tensor:
    """Queries and keys: from channel pairs (2i, 2i + 1) per head to (i, i + head_dim / 2), or back."""
    if ".attn." not in name or ".attn.proj" in name:
        return value
    spec = generator.network_spec
    width, num_heads = spec.width, spec.num_heads
    if name.startswith("network.head_blocks.") and isinstance(spec, DDTSpec):
        width, num_heads = spec.head_width, spec.head_num_heads
    head_dim = width // num_heads
    order = torch.arange(head_dim).view(-1, 2).T.flatten()  # 0, 2, 4, ..., 1, 3, 5, ...
    order = order if to_ours else order.argsort()
    if "_norm." in name:
        return value[order]
    queries_keys, values = value[: 2 * width], value[2 * width :]
    return torch.cat([queries_keys.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1), values])


def _ropes(generator: Generator) -> list[tuple[str, Rope2D, int]]:
    """The reference's rotary tables: prefix, our table, number of tokens."""
    spec, network = generator.network_spec, generator.network
    is_v1 = spec.conditioning == "adaln"
    trunk = network.trunk.rope
    num_patches = len(trunk.cos)
    length = num_patches if is_v1 else num_patches + spec.num_time_tokens + generator.conditioner.num_tokens
    if isinstance(network, DDT):
        names = ("enc_feat_rope", "dec_feat_rope") if is_v1 else ("enc_rope", "dec_rope")
        return [(names[0], trunk, length), (names[1], network.head_rope, num_patches)]
    return [("feat_rope" if is_v1 else "rope", trunk, length)]


def _check_rope(generator: Generator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compare the stored rotary tables with ours and drop them."""
    for prefix, rope, length in _ropes(generator):
        for kind, table in zip(("cos", "sin"), rope(length), strict=True):
            name = f"{prefix}.freqs_{kind}"
            expected = table.repeat_interleave(2, dim=1)
            if name in tensors and (
                tensors[name].shape != expected.shape or (tensors[name].float() - expected).abs().max() > 1e-4
            ):
                raise CheckpointError(
                    "reference weights", f"{name} is another rotary table", got=tuple(tensors[name].shape),
                    expected=f"2-D rotary positions, {tuple(expected.shape)}",
                )  # fmt: skip
    return {name: value for name, value in tensors.items() if not name.endswith((".freqs_cos", ".freqs_sin"))}


# ---------------------------------------------------------------------------------------------------------------------
# Decoders


def import_decoder(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    pixel_mean: tuple[float, float, float] | None = None,
    pixel_std: tuple[float, float, float] | None = None,
) -> nn.Module:
    """Build a `ViTDecoder` from the reference's GeneralDecoder.

    config                  "latent_dim", "width", "depth", "heads", "mlp_width", "patch_size", "num_patches"
    pixel_mean, pixel_std   for decoders of RAE v1, which predict (pixel - mean) / std; folded into the last layer, so
                            that the output is in [0, 1] like that of RAEv2's
    """
    tensors = _unwrap(state_dict)
    if any(name.startswith("decoder.") for name in tensors):  # a whole autoencoder
        tensors = {
            name.removeprefix("decoder."): value for name, value in tensors.items() if name.startswith("decoder.")
        }
    try:
        spec = DecoderSpec(
            width=config["width"], depth=config["depth"], num_heads=config["heads"],
            mlp_dim=config["mlp_width"], patch_size=config["patch_size"],
        )  # fmt: skip
        side = math.isqrt(config["num_patches"])
        decoder = ViTDecoder(config["latent_dim"], spec, (side, side))
    except KeyError as error:
        raise CheckpointError("reference config", f"lacks {error}", got=sorted(config)) from error

    names = {"cls_token": ["trainable_cls_token"], "pos_embed": ["decoder_pos_embed"]}
    linear = {"embed": ["decoder_embed"], "norm": ["decoder_norm"], "pred": ["decoder_pred"]}
    for i in range(spec.depth):
        theirs = f"decoder_layers.{i}"
        linear |= {
            f"blocks.{i}.norm1": [f"{theirs}.layernorm_before"],
            f"blocks.{i}.qkv": [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")],
            f"blocks.{i}.proj": [f"{theirs}.attention.output.dense"],
            f"blocks.{i}.norm2": [f"{theirs}.layernorm_after"],
            f"blocks.{i}.fc1": [f"{theirs}.intermediate.dense"],
            f"blocks.{i}.fc2": [f"{theirs}.output.dense"],
        }
    names |= {f"{ours}.{part}": [f"{name}.{part}" for name in theirs]
              for ours, theirs in linear.items() for part in ("weight", "bias")}  # fmt: skip
    _check_names(tensors, (theirs for group in names.values() for theirs in group))
    state = {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names.items()}
    if pixel_mean is not None and pixel_std is not None:
        mean, std = torch.tensor(pixel_mean), torch.tensor(pixel_std)
        rows = spec.patch_size**2  # the channel is the fastest axis of the output
        state["pred.weight"] = state["pred.weight"] * std.repeat(rows)[:, None]
        state["pred.bias"] = state["pred.bias"] * std.repeat(rows) + mean.repeat(rows)
    decoder.load_state_dict(state)
    return decoder.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Both


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The plain weights of a training checkpoint, without the prefixes of wrappers; averaged weights first."""
    for key in ("ema", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state_dict.items()}


def _check_names(tensors: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    expected = set(expected)
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise CheckpointError(
            "reference weights",
            "do not fit the config",
            got=f"missing {_some(missing)}; unexpected {_some(unexpected)}",
            expected=f"{len(expected)} tensors",
            hint=f"The names look like {_guess_format(tensors)}.",
        )


def _guess_format(names: Iterable[str]) -> str:
    parts = {part for name in names for part in name.split(".")[:2]}
    if "decoder_layers" in parts:
        return "a decoder (GeneralDecoder); use import_decoder"
    if {"network", "conditioner"} <= parts:
        return "a generator of this package; use Generator.from_pretrained"
    if not parts & {"ctx_embedder", "y_embedder"}:
        return "neither a generator nor a decoder of RAE or RAEv2"
    version = "RAE (v1)" if "y_embedder" in parts else "RAEv2"
    network = "DiTwDDTHead" if "s_embedder" in parts else "LightningDiT"
    return f"{version} {network}{'IG' if 'base_final_layer' in parts else ''}"


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"
