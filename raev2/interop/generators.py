"""Generators of the reference implementations (RAE and RAEv2) in and out.

Their layouts differ from ours in names, in fused matrices (theirs are cut apart, ours are one) and in the channel order
of queries and keys (they rotate neighbouring channels, we rotate halves); everything here is exact. Loading is strict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.interop.convert import Conversion, Names, describe, export, place, sizes, some, unwrap
from raev2.model.condition import ConditionSpec, LabelCondition, TextCondition
from raev2.model.dit import DDT
from raev2.model.frames import FramesCondition
from raev2.model.generator import Generator
from raev2.nn import swiglu_dim
from raev2.spec import DDTSpec, DiTSpec, FlowSpec
from raev2.spec_io import validated

UNMAPPED = "conditioner.null_tokens"  # without a counterpart there; empty in what comes from there
_config_error = partial(CheckpointError, "reference config")
NETWORKS = ("DiTwDDTHead", "DiTwDDTHeadIG", "LightningDiT", "LightningDiTIG")
PREDICTIONS = ("x", "velocity")
SUPPORTED = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False, "use_cfg_conds": False}

# Entry of their config -> field of ours. A network with a head has two values for each of PAIRS.
PAIRS = {"hidden_size": "width", "depth": "depth", "num_heads": "num_heads"}
FIELDS = {
    "mlp_ratio": "mlp_ratio", "base_model_depth": "base_head_depth", "repa_layer_depth": "repa_depth",
    "z_dim": "repa_dim",
}  # fmt: skip
V1_FIELDS = {"use_qknorm": "qk_norm", "use_pos_embed": "abs_pos_embed"}

# Entry of their config -> the tensor and axis, or the tensor, that tells it.
SHAPES = {
    "in_channels": ("x_embedder.proj.weight", 1),
    "patch_size": ("x_embedder.proj.weight", 2),
    "context_dim": ("ctx_embedder.proj.weight", 1),
    "z_dim": ("repa_projector.weight", 0),
}
TOKENS = {
    "num_t_tokens": ("t_embedder.learnable_tokens", 0),
    "num_c_tokens": ("ctx_embedder.learnable_tokens", 0),
    "n_action_tokens": ("ctx_embedder.action_tokens", 0),
}
FRAMES = {
    "patch_size": ("ctx_embedder.context_patch_embed.weight", 3),
    "action_dim": ("ctx_embedder.action_proj.weight", 1),
}
V1_TENSORS = {"use_qknorm": "blocks.0.attn.q_norm.weight", "use_pos_embed": "pos_embed"}
CONDITIONS = {"num_classes": "label", "context_dim": "text", "n_action_tokens": "nwm"}


# Weights


def import_generator(state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Generator:
    """Build a `Generator` from reference weights; raises `CheckpointError` unless every tensor finds its place.

    state_dict   plain, or a training checkpoint with the weights under "ema" or "model"
    config       "model", "input_size", "in_channels", "hidden_size", "depth", "num_heads", ... as in the reference;
                 what the weights determine may be missing

    Tensors that are only renamed are not copied: the generator shares them with `state_dict`.
    """
    generator, conversion = convert_generator(unwrap(state_dict), config)
    conversion.load()
    return generator.eval()


def convert_generator(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[Generator, Conversion]:
    """A generator without values, and the conversion that gives them."""
    config = _complete(infer_config(tensors, (config or {}).get("input_size")), config or {})
    is_v1 = _is_v1(tensors)
    spec, condition = _network_spec(config, is_v1), _condition_spec(config, tensors)
    latent_shape = (int(config["in_channels"]), int(config["input_size"]), int(config["input_size"]))
    prediction = config.get("prediction", "velocity" if is_v1 else "x")
    if prediction not in PREDICTIONS:
        raise _config_error("unknown prediction", got=prediction, expected=" or ".join(PREDICTIONS))
    with init_empty_weights(include_buffers=False):
        generator = Generator(spec, condition, FlowSpec(prediction=prediction), latent_shape)

    def change(name: str, start: int, value: Tensor) -> Tensor:
        value = value[0] if name.endswith("pos_embed") else value
        return _reorder_heads(generator, name, start, value, to_ours=True)

    conversion = Conversion(generator, _without_ropes(generator, tensors), _reference_names(generator), change)
    conversion.check("reference weights")
    return generator, conversion


def export_generator(generator: Generator) -> dict[str, Tensor]:
    """The weights in the reference's layout, rotary tables included: the inverse of `import_generator`.

    In-context generators become RAEv2 weights, adaLN generators RAE (v1) weights.
    """

    def change(name: str, start: int, value: Tensor) -> Tensor:
        value = _reorder_heads(generator, name, start, value, to_ours=False)
        return value[None] if name.endswith("pos_embed") else value

    return export(generator, _reference_names(generator), change) | _rotary_tables(generator)


def _reference_names(generator: Generator) -> Names:
    """Our tensor -> the reference tensors that make it up."""
    spec = generator.network_spec
    is_v1, is_ddt = spec.conditioning == "adaln", isinstance(spec, DDTSpec)
    head_depth = spec.head_depth if isinstance(spec, DDTSpec) else 0
    adaln = "adaLN_modulation.1" if is_v1 else "adaln_modulation.1"
    final_norm = "norm" if is_ddt and not is_v1 else "norm_final"
    blocks = [f"network.trunk.blocks.{i}" for i in range(spec.depth)]
    blocks += [f"network.head_blocks.{i}" for i in range(head_depth)]
    modulations = [f"blocks.{i}.{adaln}" for i in range(len(blocks))] + [f"final_layer.{adaln}"]

    layers: dict[str, str | list[str]] = {
        "network.trunk.patch_embed.proj": "s_embedder.proj" if is_ddt else "x_embedder.proj",
        "network.trunk.time_embed.frequencies": "t_embedder.W",
        "network.trunk.time_embed.mlp.0": "t_embedder.mlp.0",
        "network.trunk.time_embed.mlp.2": "t_embedder.mlp.2",
        "network.trunk.time_tokens": "t_embedder.learnable_tokens",
        "network.trunk.pos_embed": "pos_embed",
        "network.trunk.modulation": modulations[: spec.depth] if is_ddt else modulations,
        "network.trunk.repa_proj": "repa_projector",
        "network.join": "s_projector",
        "network.head_embed.proj": "x_embedder.proj",
        "network.modulation": modulations[spec.depth :],
        "network.final.norm": f"final_layer.{final_norm}",
        "network.final.linear": "final_layer.linear",
        "network.base_modulation": f"base_final_layer.{adaln}",
        "network.base_final.norm": f"base_final_layer.{final_norm}",
        "network.base_final.linear": "base_final_layer.linear",
        "conditioner.table": f"{'y' if is_v1 else 'ctx'}_embedder.embedding_table",
        "conditioner.tokens": "ctx_embedder.learnable_tokens",
        "conditioner.norm": "ctx_embedder.norm",
        "conditioner.proj": "ctx_embedder.proj",
        "conditioner.context_embed.proj": "ctx_embedder.context_patch_embed",
        "conditioner.action_proj": "ctx_embedder.action_proj",
        "conditioner.action_tokens": "ctx_embedder.action_tokens",
        "conditioner.time_embed.frequencies": "ctx_embedder.time_emb.W",
        "conditioner.time_embed.mlp.0": "ctx_embedder.time_emb.mlp.0",
        "conditioner.time_embed.mlp.2": "ctx_embedder.time_emb.mlp.2",
        "conditioner.time_token": "ctx_embedder.time_emb.learnable_tokens",
    }
    for i, block in enumerate(blocks):
        for layer in ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "attn.proj", "mlp.w3"):
            layers[f"{block}.{layer}"] = f"blocks.{i}.{layer}"
        layers[f"{block}.attn.qkv"] = [f"blocks.{i}.attn.{part}" for part in (["qkv"] if is_v1 else "qkv")]
        layers[f"{block}.mlp.w12"] = [f"blocks.{i}.mlp.{part}" for part in (["w12"] if is_v1 else ["w1", "w2"])]
    return place((name for name, value in generator.state_dict().items() if name != UNMAPPED or len(value)), layers)


def _reorder_heads(generator: Generator, name: str, start: int, value: Tensor, *, to_ours: bool) -> Tensor:
    """Queries and keys: from channel pairs (2i, 2i + 1) per head to (i, i + head_dim / 2), or back.

    start   the row of the whole matrix that `value` begins at
    """
    if ".attn." not in name or ".attn.proj" in name:
        return value
    spec = generator.network_spec
    width, num_heads = spec.width, spec.num_heads
    if name.startswith("network.head_blocks.") and isinstance(spec, DDTSpec):
        width, num_heads = spec.head_width, spec.head_num_heads
    head_dim = width // num_heads
    order = torch.arange(head_dim, device=value.device).view(-1, 2).T.flatten()  # 0, 2, 4, ..., 1, 3, 5, ...
    rows = torch.arange(len(value), device=value.device).view(-1, head_dim)
    heads = rows[: max(2 * num_heads - start // head_dim, 0)]  # of queries and keys; those of values stay
    heads.copy_(heads[:, order if to_ours else order.argsort()])
    return value[rows.flatten()]


def _rotary_tables(generator: Generator) -> dict[str, Tensor]:
    """The reference's rotary tables (tokens, head_dim), made from ours."""
    spec, network = generator.network_spec, generator.network
    feat = "feat_" if spec.conditioning == "adaln" else ""
    num_patches = len(network.trunk.rope.cos)
    length = num_patches if feat else num_patches + spec.num_time_tokens + generator.conditioner.num_tokens
    tables = {f"{feat}rope": network.trunk.rope(length)}
    if isinstance(network, DDT):
        tables = {f"enc_{feat}rope": network.trunk.rope(length), f"dec_{feat}rope": network.head_rope(num_patches)}
    return {
        f"{name}.freqs_{kind}": table.repeat_interleave(2, dim=1)
        for name, rope in tables.items()
        for kind, table in zip(("cos", "sin"), rope, strict=True)
    }


def _without_ropes(generator: Generator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without rotary tables, which must be ours."""
    for name, expected in _rotary_tables(generator).items():
        found = tensors.get(name, expected)
        if found.shape != expected.shape or (found.float() - expected).abs().max() > 1e-4:
            raise CheckpointError(
                "reference weights", f"{name} is another rotary table", got=tuple(found.shape),
                expected=f"2-D rotary positions, {tuple(expected.shape)}",
            )  # fmt: skip
    return {name: value for name, value in tensors.items() if not name.endswith((".freqs_cos", ".freqs_sin"))}


# Configurations


def generator_config(generator: Generator) -> dict[str, Any]:
    """The reference's class name and constructor arguments of a generator: the `config` of `import_generator`."""
    spec, condition = generator.network_spec, generator.condition_spec
    channels, rows, cols = generator.latent_shape
    if rows != cols:
        raise _config_error("has no place for this grid", got=f"{rows} x {cols}", expected="square")
    if (prediction := generator.flow.prediction) not in PREDICTIONS:
        raise _config_error("has no word for this prediction", got=prediction)
    if spec.repa_hidden is not None:
        raise _config_error("has no place for a REPA projector of three layers", got=f"repa_hidden={spec.repa_hidden}")
    is_v1, is_ddt = spec.conditioning == "adaln", isinstance(spec, DDTSpec)
    config: dict[str, Any] = {
        "model": ("DiTwDDTHead" if is_ddt else "LightningDiT") + ("IG" if spec.base_head_depth else ""),
        "input_size": rows,
        "in_channels": channels,
        "patch_size": [spec.patch_size] * 2 if is_ddt and not is_v1 else spec.patch_size,
        "prediction": prediction,
    }
    for theirs, ours in PAIRS.items():
        size = getattr(spec, ours)
        config[theirs] = [size, getattr(spec, f"head_{ours}")] if is_ddt else size
    for theirs, ours in (FIELDS | V1_FIELDS if is_v1 else FIELDS).items():
        if (value := getattr(spec, ours)) is not None:
            config[theirs] = value
    if spec.repa_depth:
        config["enable_repa"] = True
    cond_arch = {"num_t_tokens": spec.num_time_tokens, "num_c_tokens": generator.conditioner.num_tokens}
    if isinstance(condition, LabelCondition):
        found: dict[str, Any] = {"condition_type": "label", "num_classes": condition.num_classes}
    elif isinstance(condition, TextCondition):
        found = {"condition_type": "text", "context_dim": condition.dim}
    elif isinstance(condition, FramesCondition) and condition.form == "in_context":
        found = {"condition_type": "nwm"}
        cond_arch |= {"n_action_tokens": condition.num_action_tokens}
    else:
        raise _config_error(
            "has no place for this condition", got=condition.kind,
            expected="label, text, or frames with form=in_context",
        )  # fmt: skip
    if is_v1:
        return config | {"num_classes": found["num_classes"]}
    return config | found | {"cond_arch": cond_arch}


def infer_config(tensors: Mapping[str, Tensor], input_size: int | None = None) -> dict[str, Any]:
    """What names and shapes of reference weights say about their config.

    input_size   if known: LightningDiT has one table of positions for patches and condition

    The depth of the base head and of the REPA projector, and what is predicted, cannot be seen. Raises CheckpointError
    where these are no generator weights.
    """
    is_ddt, is_v1 = "s_embedder.proj.weight" in tensors, _is_v1(tensors)
    if not all(name in tensors for name in ("x_embedder.proj.weight", "t_embedder.W", "blocks.0.norm1.weight")):
        raise CheckpointError(
            "reference weights", "not a generator of RAE or RAEv2", got=describe(tensors)[1],
            expected="DiT^DH or LightningDiT",
        )  # fmt: skip
    is_ig = "base_final_layer.linear.weight" in tensors
    config: dict[str, Any] = {"model": ("DiTwDDTHead" if is_ddt else "LightningDiT") + ("IG" if is_ig else "")}
    config |= sizes(tensors, SHAPES)
    cond_arch = sizes(tensors, TOKENS)
    for name in ("y_embedder.embedding_table.weight", "ctx_embedder.embedding_table.weight"):
        if name in tensors:
            config["num_classes"] = len(tensors[name]) - 1  # the last label is the unconditional one
    if "z_dim" in config:
        config["enable_repa"] = True

    # Trunk and head share one list of blocks.
    feat = "feat_" if is_v1 else ""
    tables = [f"{stack}{feat}rope.freqs_cos" for stack in (("enc_", "dec_") if is_ddt else ("",))]
    norms = takewhile(tensors.__contains__, (f"blocks.{i}.norm1.weight" for i in count()))
    widths = [len(tensors[name]) for name in norms]
    config["mlp_ratio"] = _mlp_ratio(tensors, widths)
    border = _border(tensors, widths, is_v1) if is_ddt else len(widths)
    if border is not None:
        found = {"hidden_size": [widths[0], widths[-1]], "depth": [border, len(widths) - border]}
        dims = [_head_dim(tensors, block, table) for block, table in zip((0, border), tables, strict=False)]
        if None not in dims:
            found["num_heads"] = [width // dim for width, dim in zip(found["hidden_size"], dims, strict=False) if dim]
        config |= {name: pair if is_ddt else pair[0] for name, pair in found.items()}

    # Tables of positions tell the number of patches, or of condition tokens.
    length = len(tensors[tables[0]]) if tables[0] in tensors else None
    num_patches = None if input_size is None else (input_size // config["patch_size"]) ** 2
    if "pos_embed" in tensors:
        num_patches = tensors["pos_embed"].shape[1]
    elif (is_v1 or is_ddt) and tables[-1] in tensors:
        num_patches = len(tensors[tables[-1]])
    elif num_patches is None and length is not None and "num_c_tokens" in cond_arch:
        num_patches = length - sum(cond_arch.values())
    if length is not None and num_patches is not None:
        cond_arch.setdefault("num_c_tokens", length - num_patches - cond_arch.get("num_t_tokens", 4))
    if num_patches is not None and num_patches > 0:
        config["input_size"] = math.isqrt(num_patches) * config["patch_size"]
    if is_v1:
        return config | {theirs: name in tensors for theirs, name in V1_TENSORS.items()}
    for name in CONDITIONS.keys() & (config | cond_arch).keys():
        config["condition_type"] = CONDITIONS[name]
    return config | {"cond_arch": cond_arch}


def _is_v1(tensors: Mapping[str, Tensor]) -> bool:
    return "y_embedder.embedding_table.weight" in tensors


def _border(tensors: Mapping[str, Tensor], widths: list[int], is_v1: bool) -> int | None:
    """The first block of the head; None where that cannot be seen (RAE v1 with equal widths)."""
    if is_v1:
        border = sum(width == widths[0] for width in widths)
    else:
        border = sum(f"blocks.{i}.adaln_modulation.1.weight" not in tensors for i in range(len(widths)))
    return border if 0 < border < len(widths) else None


def _head_dim(tensors: Mapping[str, Tensor], block: int, table: str) -> int | None:
    names = (f"blocks.{block}.attn.q_norm.weight", table)
    return next((tensors[name].shape[-1] for name in names if name in tensors), None)


def _mlp_ratio(tensors: Mapping[str, Tensor], widths: list[int]) -> float:
    """The shortest decimal that gives the hidden units of every block; 4 where none does, which is then named."""
    weights = [(width, tensors.get(f"blocks.{i}.mlp.w3.weight")) for i, width in enumerate(widths)]
    hidden = {(width, weight.shape[1]) for width, weight in weights if weight is not None}
    middle = sum((units + 0.5) * 1.5 / width for width, units in hidden) / max(1, len(hidden))
    candidates = [4.0, *(round(middle, digits) for digits in range(6))]
    return next((r for r in candidates if all(swiglu_dim(width, r) == units for width, units in hidden)), 4.0)


def _complete(inferred: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and what was inferred where nothing is; CheckpointError if that is not enough."""
    config = {**inferred, **given}
    if "cond_arch" in inferred:
        config["cond_arch"] = {**inferred["cond_arch"], **(given.get("cond_arch") or {})}
    if config["model"] not in NETWORKS:
        raise _config_error("unknown model", got=config["model"], expected=f"one of {', '.join(NETWORKS)}")
    needed = ["input_size", "in_channels", "patch_size", *PAIRS]
    if config["model"].endswith("IG"):
        needed.append("base_model_depth")
    if config.get("enable_repa"):
        needed += ["repa_layer_depth", "z_dim"]
    needed += {"text": ["context_dim"], "nwm": []}.get(config.get("condition_type", "label"), ["num_classes"])
    missing = [name for name in needed if name not in config]
    if missing:
        released = " (8 in all released RAEv2 configurations)" if "base_model_depth" in missing else ""
        raise _config_error(
            f"the weights do not determine {', '.join(missing)}", got=f"entries {sorted(given)}",
            hint=f"Give them in the config{released}; on the command line with --config FILE or "
            f"--set {missing[0]}=VALUE.",
        )  # fmt: skip
    return config


def _network_spec(config: Mapping[str, Any], is_v1: bool) -> DDTSpec | DiTSpec:
    model, is_ddt = config["model"], config["model"].startswith("DiT")
    for name, supported in SUPPORTED.items():
        if config.get(name, supported) != supported:
            raise _config_error(f"{name}={config[name]} is not supported", expected=str(supported))
    patch_sizes = set(_pair(config["patch_size"]))
    if len(patch_sizes) > 1 or (is_v1 and patch_sizes != {1}):
        raise _config_error(
            "patch_size is not supported", got=config["patch_size"],
            expected="1" if is_v1 else "one size for trunk and head",
        )  # fmt: skip
    patch_size = patch_sizes.pop()
    if config["input_size"] % patch_size:
        raise _config_error(
            "input_size is not a multiple of patch_size", got=config["input_size"],
            expected=nearest_multiples(config["input_size"], patch_size),
        )  # fmt: skip
    fields: dict[str, Any] = {"patch_size": patch_size}
    absent = set() if model.endswith("IG") else {"base_model_depth"}
    absent |= set() if config.get("enable_repa") else {"repa_layer_depth", "z_dim"}
    names = FIELDS | V1_FIELDS if is_v1 else FIELDS
    fields |= {ours: config[theirs] for theirs, ours in names.items() if theirs in config.keys() - absent}
    if is_v1:
        fields["conditioning"] = "adaln"
    else:
        fields["num_time_tokens"] = config.get("cond_arch", {}).get("num_t_tokens", 4)
    for theirs, ours in PAIRS.items():
        values = _pair(config[theirs])
        if is_ddt and len(values) < 2:
            raise _config_error(
                f"{model} has a trunk and a head", got=f"{theirs} {config[theirs]}",
                expected=f"two values each for {', '.join(PAIRS)}",
            )  # fmt: skip
        fields |= {ours: values[0], f"head_{ours}": values[-1]} if is_ddt else {ours: values[0]}
    where = "reference config "
    if is_ddt:
        return validated(DDTSpec, fields, where, CheckpointError)
    return validated(DiTSpec, fields, where, CheckpointError)


def _pair(value: Any) -> list[Any]:
    """Values of trunk and head as a list; one where they are equal or there is no head."""
    return [value] if isinstance(value, int) else list(value)


def nearest_multiples(size: int, unit: int) -> str:
    """The multiples of `unit` just below and above a size, as text."""
    below = size // unit * unit
    return " or ".join(str(value) for value in (below, below + unit) if value)


def _condition_spec(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionSpec:
    cond_arch, kind = config.get("cond_arch", {}), config.get("condition_type", "label")
    model: type[ConditionSpec]
    if kind == "label":
        model = LabelCondition
        fields = {"num_classes": config["num_classes"], "num_tokens": cond_arch.get("num_c_tokens", 8)}
    elif kind == "text":
        model, fields = TextCondition, {"dim": config["context_dim"], "max_tokens": cond_arch.get("num_c_tokens", 256)}
    elif kind == "nwm":
        model, fields = FramesCondition, _frames_fields(config, cond_arch, tensors)
    else:
        raise _config_error("unknown condition_type", got=kind, expected="label, text or nwm")
    return validated(model, fields, "reference config ", CheckpointError)


def _frames_fields(
    config: Mapping[str, Any], cond_arch: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    if "num_c_tokens" not in cond_arch:
        raise _config_error(
            "the weights do not determine cond_arch.num_c_tokens", hint="It is frames * patches + action tokens + 1."
        )
    found = sizes(tensors, FRAMES)
    if missing := [name for key, (name, _) in FRAMES.items() if key not in found]:
        raise CheckpointError("reference weights", "do not fit the config", got=f"missing {some(missing)}")
    num_action_tokens = cond_arch.get("n_action_tokens", 4)
    num_patches = (config["input_size"] // found["patch_size"]) ** 2
    num_frames = (cond_arch["num_c_tokens"] - num_action_tokens - 1) // num_patches
    own = {"form": "in_context", "frame_positions": False}
    return own | found | {"num_frames": num_frames, "num_action_tokens": num_action_tokens}
