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
from pydantic import ValidationError
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.interop.convert import Conversion, describe, linear_names, load, some, unwrap
from raev2.model.condition import ConditionSpec, LabelCondition, TextCondition
from raev2.model.dit import DDT
from raev2.model.frames import FramesCondition
from raev2.model.generator import Generator
from raev2.nn import Rope2D, swiglu_dim
from raev2.spec import DDTSpec, DiTSpec, FlowSpec

UNMAPPED = ("conditioner.null_tokens",)  # without a counterpart there; empty in what comes from there
_config_error = partial(CheckpointError, "reference config")
NETWORKS = ("DiTwDDTHead", "DiTwDDTHeadIG", "LightningDiT", "LightningDiTIG")


def import_generator(state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Generator:
    """Build a `Generator` from reference weights; raises `CheckpointError` unless every tensor finds its place.

    state_dict   plain, or a training checkpoint with the weights under "ema" or "model"
    config       "model", "input_size", "in_channels", "hidden_size", "depth", "num_heads", ... as in the reference;
                 what the weights determine may be missing

    Tensors that are only renamed are not copied: the generator shares them with `state_dict`.
    """
    generator, conversion = convert_generator(unwrap(state_dict), config)
    load(generator, conversion)
    return generator.eval()


def convert_generator(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[Generator, Conversion]:
    """A generator without values, and the conversion that gives them."""
    is_v1 = any(name.startswith("y_embedder.") for name in tensors)
    config = _complete(infer_config(tensors, (config or {}).get("input_size")), config or {})
    try:
        spec, condition = _network_spec(config, is_v1), _condition_spec(config, is_v1, tensors)
    except ValidationError as error:
        raise _config_error(str(error.errors()[0]["msg"]), got=f"{dict(config)}") from error
    latent_shape = (int(config["in_channels"]), int(config["input_size"]), int(config["input_size"]))
    prediction = config.get("prediction", "velocity" if is_v1 else "x")
    if prediction not in ("x", "velocity"):
        raise _config_error("unknown prediction", got=prediction, expected="x or velocity")
    flow = FlowSpec(prediction=prediction)
    with init_empty_weights(include_buffers=False):
        generator = Generator(spec, condition, flow, latent_shape)

    tensors = _check_rope(generator, tensors)
    names: dict[str, list[str]] = {name: [] for name in UNMAPPED}
    names |= _reference_names(generator)
    shapes = {name: value.shape for name, value in generator.state_dict().items()}

    def change(name: str, start: int, value: Tensor) -> Tensor:
        value = value[0] if name.endswith("pos_embed") else value
        return _reorder_heads(generator, name, start, value, to_ours=True)

    conversion = Conversion(tensors, {name: names[name] for name in shapes}, shapes, change)
    conversion.check("reference weights")
    return generator, conversion


def export_generator(generator: Generator) -> dict[str, Tensor]:
    """The weights in the reference's layout, rotary tables included: the inverse of `import_generator`.

    In-context generators become RAEv2 weights, adaLN generators RAE (v1) weights.
    """
    state = generator.state_dict()
    modules = dict(generator.named_modules())
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _reference_names(generator).items():
        value = _reorder_heads(generator, ours, 0, state[ours], to_ours=False)
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


def generator_config(generator: Generator) -> dict[str, Any]:
    """The reference's class name and constructor arguments of a generator: the `config` of `import_generator`."""
    spec, condition = generator.network_spec, generator.condition_spec
    channels, rows, cols = generator.latent_shape
    if rows != cols:
        raise _config_error("has no place for this grid", got=f"{rows} x {cols}", expected="square")
    if (prediction := generator.flow.prediction) not in ("x", "velocity"):
        raise _config_error("has no word for this prediction", got=prediction)
    is_v1, is_ddt = spec.conditioning == "adaln", isinstance(spec, DDTSpec)
    config: dict[str, Any] = {
        "model": ("DiTwDDTHead" if is_ddt else "LightningDiT") + ("IG" if spec.base_head_depth else ""),
        "input_size": rows,
        "in_channels": channels,
        "patch_size": [spec.patch_size] * 2 if is_ddt and not is_v1 else spec.patch_size,
        "hidden_size": spec.width,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        "mlp_ratio": spec.mlp_ratio,
        "prediction": prediction,
    }
    if isinstance(spec, DDTSpec):
        config |= {
            "hidden_size": [spec.width, spec.head_width],
            "depth": [spec.depth, spec.head_depth],
            "num_heads": [spec.num_heads, spec.head_num_heads],
        }
    if spec.base_head_depth:
        config |= {"base_model_depth": spec.base_head_depth}
    if spec.repa_depth:
        config |= {"enable_repa": True, "repa_layer_depth": spec.repa_depth, "z_dim": spec.repa_dim}
    num_tokens = generator.conditioner.num_tokens
    cond_arch = {"num_t_tokens": spec.num_time_tokens, "num_c_tokens": num_tokens}
    if isinstance(condition, LabelCondition):
        config |= {"condition_type": "label", "num_classes": condition.num_classes}
    elif isinstance(condition, TextCondition):
        config |= {"condition_type": "text", "context_dim": condition.dim}
    elif isinstance(condition, FramesCondition) and condition.form == "in_context":
        config |= {"condition_type": "nwm"}
        cond_arch |= {"n_action_tokens": condition.num_action_tokens}
    else:
        raise _config_error(
            "has no place for this condition", got=condition.kind,
            expected="label, text, or frames with form=in_context",
        )  # fmt: skip
    if is_v1:
        del config["condition_type"]
        return config | {"use_qknorm": spec.qk_norm, "use_pos_embed": spec.abs_pos_embed}
    return config | {"cond_arch": cond_arch}


def infer_config(tensors: Mapping[str, Tensor], input_size: int | None = None) -> dict[str, Any]:
    """What names and shapes of reference weights say about their config.

    input_size   if known: LightningDiT has one table of positions for patches and condition

    The depth of the base head and of the REPA projector, and what is predicted, cannot be seen. Raises CheckpointError
    where these are no generator weights.
    """
    is_ddt, is_v1 = "s_embedder.proj.weight" in tensors, "y_embedder.embedding_table.weight" in tensors
    needed = ("x_embedder.proj.weight", "t_embedder.W", "blocks.0.norm1.weight")
    if not all(name in tensors for name in needed):
        raise CheckpointError(
            "reference weights", "not a generator of RAE or RAEv2", got=describe(tensors),
            expected="DiT^DH or LightningDiT",
        )  # fmt: skip
    is_ig = "base_final_layer.linear.weight" in tensors
    config: dict[str, Any] = {"model": ("DiTwDDTHead" if is_ddt else "LightningDiT") + ("IG" if is_ig else "")}
    embed = tensors["s_embedder.proj.weight" if is_ddt else "x_embedder.proj.weight"]
    config |= {"in_channels": embed.shape[1], "patch_size": embed.shape[2]}

    # Trunk and head share one list of blocks.
    norms = takewhile(tensors.__contains__, (f"blocks.{i}.norm1.weight" for i in count()))
    widths = [len(tensors[name]) for name in norms]
    head = _head_blocks(tensors, widths, is_v1) if is_ddt else 0
    stacks = [widths] if not is_ddt else [] if head is None else [widths[: len(widths) - head], widths[-head:]]
    tables = ("enc_rope", "dec_rope") if is_ddt else ("rope",)
    if is_v1:
        tables = ("enc_feat_rope", "dec_feat_rope") if is_ddt else ("feat_rope",)
    if stacks:
        first = [0, len(stacks[0])][: len(stacks)]
        config |= {"hidden_size": [stack[0] for stack in stacks], "depth": [len(stack) for stack in stacks]}
        head_dims = [_head_dim(tensors, i, table) for i, table in zip(first, tables, strict=True)]
        if None not in head_dims:
            config["num_heads"] = [stack[0] // dim for stack, dim in zip(stacks, head_dims, strict=True) if dim]
        config["mlp_ratio"] = _mlp_ratio(tensors, widths)
        if not is_ddt:
            config |= {key: config[key][0] for key in ("hidden_size", "depth", "num_heads") if key in config}
    num_patches = None if input_size is None else (input_size // embed.shape[2]) ** 2
    config |= _infer_condition(tensors, tables, is_v1, embed.shape[2], num_patches)
    if is_v1:
        config |= {"use_qknorm": "blocks.0.attn.q_norm.weight" in tensors, "use_pos_embed": "pos_embed" in tensors}
    if "repa_projector.weight" in tensors:
        config |= {"enable_repa": True, "z_dim": tensors["repa_projector.weight"].shape[0]}
    return config


def _infer_condition(
    tensors: Mapping[str, Tensor], tables: tuple[str, ...], is_v1: bool, patch_size: int, num_patches: int | None
) -> dict[str, Any]:
    """The condition, and the input size, which only tables of positions tell."""
    config: dict[str, Any] = {}
    cond_arch: dict[str, int] = {}
    if is_v1:
        config["num_classes"] = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        if "pos_embed" in tensors:
            num_patches = tensors["pos_embed"].shape[1]
        elif f"{tables[0]}.freqs_cos" in tensors:
            num_patches = len(tensors[f"{tables[0]}.freqs_cos"])
    elif "t_embedder.learnable_tokens" in tensors:
        cond_arch["num_t_tokens"] = len(tensors["t_embedder.learnable_tokens"])
    table = tensors.get(f"{tables[0]}.freqs_cos")
    if len(tables) == 2 and f"{tables[1]}.freqs_cos" in tensors:
        num_patches = len(tensors[f"{tables[1]}.freqs_cos"])
    if "ctx_embedder.embedding_table.weight" in tensors:
        config |= {
            "condition_type": "label",
            "num_classes": tensors["ctx_embedder.embedding_table.weight"].shape[0] - 1,
        }
        if "ctx_embedder.learnable_tokens" in tensors:
            cond_arch["num_c_tokens"] = len(tensors["ctx_embedder.learnable_tokens"])
        if num_patches is None and table is not None:
            num_patches = len(table) - sum(cond_arch.values())
    elif "ctx_embedder.proj.weight" in tensors:
        config |= {"condition_type": "text", "context_dim": tensors["ctx_embedder.proj.weight"].shape[1]}
    elif "ctx_embedder.action_tokens" in tensors:
        config["condition_type"] = "nwm"
        cond_arch["n_action_tokens"] = len(tensors["ctx_embedder.action_tokens"])
    if "num_c_tokens" not in cond_arch and table is not None and num_patches is not None and not is_v1:
        cond_arch["num_c_tokens"] = len(table) - num_patches - cond_arch.get("num_t_tokens", 4)
    if num_patches is not None and num_patches > 0:
        config["input_size"] = math.isqrt(num_patches) * patch_size
    return config if is_v1 else config | {"cond_arch": cond_arch}


def _head_blocks(tensors: Mapping[str, Tensor], widths: list[int], is_v1: bool) -> int | None:
    """How many of the blocks are head blocks; None where that cannot be seen (RAE v1 with equal widths)."""
    if is_v1:
        count = sum(width != widths[0] for width in widths)
    else:
        count = sum(f"blocks.{i}.adaln_modulation.1.weight" in tensors for i in range(len(widths)))
    return count if 0 < count < len(widths) else None


def _head_dim(tensors: Mapping[str, Tensor], block: int, table: str) -> int | None:
    names = (f"blocks.{block}.attn.q_norm.weight", f"{table}.freqs_cos")
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
    needed = ["input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"]
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
    model = config["model"]
    unsupported = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False, "use_cfg_conds": False}
    for name, supported in unsupported.items():
        if config.get(name, supported) != supported:
            raise _config_error(f"{name}={config[name]} is not supported", expected=str(supported))
    patch_sizes = {config["patch_size"]} if isinstance(config["patch_size"], int) else set(config["patch_size"])
    if len(patch_sizes) > 1 or (is_v1 and patch_sizes != {1}):
        raise _config_error(
            "patch_size is not supported", got=config["patch_size"],
            expected="1" if is_v1 else "one size for trunk and head",
        )  # fmt: skip
    patch_size = patch_sizes.pop()
    if config["input_size"] % patch_size:
        raise _config_error(
            "input_size is not a multiple of patch_size", got=config["input_size"],
            expected=f"{' or '.join(map(str, nearest_multiples(config['input_size'], patch_size)))}",
        )  # fmt: skip
    trunk: dict[str, Any] = {
        "patch_size": patch_size,
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

    sizes = [config[name] for name in ("hidden_size", "depth", "num_heads")]
    try:
        if model.startswith("LightningDiT"):
            width, depth, num_heads = (size if isinstance(size, int) else size[0] for size in sizes)
            return DiTSpec(width=width, depth=depth, num_heads=num_heads, **trunk)
        (width, head_width), (depth, head_depth), (num_heads, head_num_heads) = sizes
        head = {"head_width": head_width, "head_depth": head_depth, "head_num_heads": head_num_heads}
        return DDTSpec(width=width, depth=depth, num_heads=num_heads, **head, **trunk)
    except TypeError as error:
        raise _config_error(
            f"{model} has a trunk and a head", got=f"hidden_size {sizes[0]}, depth {sizes[1]}",
            expected="two values each for hidden_size, depth and num_heads",
        ) from error  # fmt: skip


def nearest_multiples(size: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and above a size."""
    below = size // unit * unit
    return [value for value in (below, below + unit) if value]


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
        if "num_c_tokens" not in cond_arch:
            raise _config_error(
                "the weights do not determine cond_arch.num_c_tokens",
                hint="It is frames * patches + action tokens + 1.",
            )  # fmt: skip
        needed = ["ctx_embedder.context_patch_embed.weight", "ctx_embedder.action_proj.weight"]
        if missing := [name for name in needed if name not in tensors]:
            raise CheckpointError("reference weights", "do not fit the config", got=f"missing {some(missing)}")
        patch_size = tensors["ctx_embedder.context_patch_embed.weight"].shape[-1]
        num_patches = (config["input_size"] // patch_size) ** 2
        return FramesCondition(
            form="in_context",
            num_frames=(cond_arch["num_c_tokens"] - num_action_tokens - 1) // num_patches,
            patch_size=patch_size,
            action_dim=tensors["ctx_embedder.action_proj.weight"].shape[1],
            num_action_tokens=num_action_tokens,
            frame_positions=False,
        )
    raise _config_error("unknown condition_type", got=kind, expected="label, text or nwm")


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
        same = ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "attn.proj", "mlp.w3")
        linear |= {f"{block}.{layer}": [f"blocks.{i}.{layer}"] for layer in same}
        linear[f"{block}.attn.qkv"] = [f"blocks.{i}.attn.{part}" for part in (["qkv"] if is_v1 else "qkv")]
        linear[f"{block}.mlp.w12"] = [f"blocks.{i}.mlp.{part}" for part in (["w12"] if is_v1 else ["w1", "w2"])]

    names = linear_names(linear)
    names |= {ours: [theirs] for ours, theirs in single.items()}
    state = generator.state_dict()
    empty = {name for name in UNMAPPED if name in state and not state[name].numel()}
    unmapped = state.keys() - names.keys() - empty
    if unmapped:
        raise CheckpointError("interop", "the reference has no place for some weights", got=sorted(unmapped)[:4])
    return {ours: theirs for ours, theirs in names.items() if ours in state}


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
    order = order if to_ours else order.argsort()
    if "_norm." in name:
        return value[order]
    count = min(max(2 * width - start, 0), len(value))  # rows of queries and keys; those of values stay
    if not count:
        return value
    reordered = value[:count].unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
    return reordered if count == len(value) else torch.cat([reordered, value[count:]])


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
