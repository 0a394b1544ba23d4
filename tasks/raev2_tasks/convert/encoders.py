"""How RAE and RAEv2 name encoders, as our `EncoderSpec`.

    RAEv2   'dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]'       family, 'vit', configuration with flags
    RAE v1  encoder_cls 'Dinov2withNorm', encoder_config_path 'facebook/dinov2-with-registers-base'

Both resize without antialiasing, so `antialias` is off in what comes from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raev2.errors import SpecError, did_you_mean
from raev2.spec import EncoderSpec
from raev2.spec_io import validated
from raev2.tokenizer.encoder_table import ENCODERS

PATTERN = re.compile(r"(?P<family>[a-z0-9]+)-vit-(?P<config>[A-Za-z0-9_]+)(\[(?P<flags>[^\]]*)\])?")
# Several layers: how each family joins them, and whether it adds the token mean of the last one.
SEVERAL_LAYERS: dict[str, tuple[str, bool]] = {
    "dinov3mls": ("mean", True),
    "siglip2mls": ("mean", True),
    "dinov2mls": ("mean", False),
    "eupemls": ("sum", False),
}
DEFAULT_LAYERS = {
    "dinov2mls": {"l": (5, 11, 17, 23)},
    "dinov3mls": {"l16": (5, 11, 17, 23), "h16plus": (8, 16, 24, 31)},
    "siglip2mls": {"so400m": (5, 12, 19, 26), "g": (10, 20, 30, 39)},
}
FEW_LAYERS = (2, 5, 8, 11)
FLAGS = {"norm": {"norm": "affine"}, "woreg": {}}
V1_CLASSES = ("Dinov2withNorm", "SigLIP2wNorm", "MAEwNorm")


def is_reference_name(name: str) -> bool:
    """Whether a name is in RAEv2's grammar."""
    return PATTERN.fullmatch(name) is not None


def reference_encoder(name: str) -> EncoderSpec:
    """The encoder that RAEv2 means by a string; raises SpecError for one that is unknown."""
    match = PATTERN.fullmatch(name)
    if match is None:
        raise SpecError(
            "encoder", "not in the grammar of RAEv2", got=repr(name), expected="FAMILY-vit-CONFIG[layers=A.B.C]"
        )
    family, config, flags = match["family"], match["config"], [f for f in (match["flags"] or "").split(",") if f]
    layers: tuple[int, ...] = ()
    fields: dict[str, Any] = {"antialias": False}
    base = family.removesuffix("mls")
    if base in ("dinov2", "dinov3", "pe", "spatialpe", "langpe"):  # 'bnorm' is 'b[norm]'
        while suffix := next((flag for flag in FLAGS if config.endswith(flag) and config != flag), None):
            config, flags = config.removesuffix(suffix), [*flags, suffix]
    for flag in flags:
        key, _, value = flag.partition("=")
        if key == "layers":
            layers = tuple(int(layer) for layer in value.split("."))
        elif flag in FLAGS:
            fields |= FLAGS[flag]
        else:
            raise SpecError("encoder", "unknown flag", got=repr(flag), expected="layers=A.B.C, norm or woreg")
    if family in SEVERAL_LAYERS:
        aggregate, pooled_term = SEVERAL_LAYERS[family]
        layers = layers or DEFAULT_LAYERS.get(family, {}).get(config, FEW_LAYERS)
        fields |= {"aggregate": aggregate, "pooled_term": pooled_term}
    ours = _our_name(base, config, "woreg" in flags)
    if ours not in ENCODERS:
        raise SpecError("encoder", "unknown encoder of RAEv2", got=repr(name), hint=did_you_mean(ours, ENCODERS))
    return validated(EncoderSpec, {"name": ours, "layers": layers, **fields}, "encoder ")


def _our_name(family: str, config: str, without_registers: bool) -> str:
    if family == "webssl":  # dino300m_full2b_224
        return f"webssl-{config.removeprefix('dino').partition('_')[0]}"
    family = "ijepa" if family == "jepa" else family
    return f"{family}-{config.lower()}" + ("-woreg" if without_registers else "")


def v1_encoder(config: Mapping[str, Any]) -> EncoderSpec:
    """The encoder of a RAE v1 configuration ('encoder_cls', 'encoder_config_path'): built by transformers, as there."""
    kind, path = str(config["encoder_cls"]), config.get("encoder_config_path")
    if kind not in V1_CLASSES or not path:
        raise SpecError(
            "reference config", "unknown encoder of RAE v1", got=f"{kind}, {path}",
            expected=f"encoder_cls {', '.join(V1_CLASSES)} with encoder_config_path",
        )  # fmt: skip
    return EncoderSpec(name=f"hf:{path}", norm="plain", antialias=False)
