"""Pixel decoders of RAE and RAEv2 (GeneralDecoder) in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.interop.convert import Conversion, describe, linear_names, load, unwrap
from raev2.spec import DECODER_SIZES, DecoderSpec
from raev2.tokenizer.decoder import ViTDecoder

HEADS = "decoder_num_attention_heads"  # in the reference's JSON files, whose other entries the weights know better


def import_decoder(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> ViTDecoder:
    """Build a `ViTDecoder` from the reference's GeneralDecoder: latent tokens (B, N, D) -> images (B, 3, H, W).

    state_dict              a decoder, or a whole autoencoder, of which only "decoder." is read
    config                  "latent_dim", "width", "depth", "heads", "mlp_width", "patch_size", "num_patches" or "grid",
                            or a JSON file of the reference; what the weights determine may be missing
    pixel_mean, pixel_std   for decoders of RAE v1, which predict (pixel - mean) / std; folded into the last layer, so
                            that the output is in [0, 1] like that of RAEv2's

    Tensors that are only renamed are not copied: the decoder shares them with `state_dict`. Raises CheckpointError
    unless every tensor finds its place.
    """
    tensors = decoder_tensors(unwrap(state_dict))
    spec, latent_dim, grid = decoder_spec(tensors, config or {})
    with init_empty_weights(include_buffers=False):
        decoder = ViTDecoder(latent_dim, spec, grid)

    def change(name: str, start: int, value: Tensor) -> Tensor:
        if pixel_mean is None or pixel_std is None or not name.startswith("pred."):
            return value
        return rescale_pixels(name, value, pixel_mean, pixel_std)

    shapes = {name: value.shape for name, value in decoder.state_dict().items()}
    conversion = Conversion(tensors, _reference_names(spec.depth), shapes, change)
    conversion.check("decoder weights")
    load(decoder, conversion)
    return decoder.eval()


def export_decoder(
    decoder: ViTDecoder, pixel_mean: Sequence[float] | None = None, pixel_std: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weights in the reference's layout: the inverse of `import_decoder`.

    With pixel_mean and pixel_std as RAE v1 reads it. Taking them out of the last layer again is exact to the last bit
    but one; everything else is exact.
    """
    state = decoder.state_dict()
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _reference_names(decoder.spec.depth).items():
        value = state[ours]
        if pixel_mean is not None and pixel_std is not None and ours.startswith("pred."):
            value = rescale_pixels(ours, value, pixel_mean, pixel_std, inverse=True)
        tensors.update(zip(theirs, (part.clone() for part in value.chunk(len(theirs))), strict=True))
    return tensors


def decoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder alone, of a decoder or of a whole autoencoder, whose frozen encoder is left out."""
    if "decoder.decoder_embed.weight" not in tensors:
        return dict(tensors)
    return {name.removeprefix("decoder."): value for name, value in tensors.items() if name.startswith("decoder.")}


def decoder_spec(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[DecoderSpec, int, tuple[int, int]]:
    """Spec, latent width and grid, from the tensors and, for what they do not determine, the config."""
    if "decoder_embed.weight" not in tensors or "decoder_pos_embed" not in tensors:
        raise CheckpointError(
            "decoder weights", "not a decoder of RAE or RAEv2", got=describe(tensors), expected="a GeneralDecoder"
        )
    depth = 0
    while f"decoder_layers.{depth}.layernorm_before.weight" in tensors:
        depth += 1
    width, latent_dim = tensors["decoder_embed.weight"].shape
    inferred: dict[str, Any] = {
        "latent_dim": latent_dim,
        "width": width,
        "depth": depth,
        "num_patches": tensors["decoder_pos_embed"].shape[1] - 1,
    }
    if "decoder_layers.0.intermediate.dense.weight" in tensors:
        inferred["mlp_width"] = tensors["decoder_layers.0.intermediate.dense.weight"].shape[0]
    if "decoder_pred.weight" in tensors:
        inferred["patch_size"] = math.isqrt(tensors["decoder_pred.weight"].shape[0] // 3)
    for sizes in DECODER_SIZES.values():
        if sizes[:2] == (width, depth) and sizes[3] == inferred.get("mlp_width"):
            inferred["heads"] = sizes[2]
    full = {**inferred, **({"heads": config[HEADS]} if HEADS in config else config)}
    missing = [name for name in ("heads", "mlp_width", "patch_size") if name not in full]
    if missing:
        reason = f"width {width}, depth {depth}, which is no published size"
        raise CheckpointError(
            "decoder config", f"the weights do not determine {', '.join(missing)}",
            got=reason if missing == ["heads"] else f"only {len(tensors)} tensors",
            hint=f"Give it in the config; on the command line with --config FILE or --set {missing[0]}=VALUE.",
        )  # fmt: skip
    try:
        spec = DecoderSpec(
            width=full["width"], depth=full["depth"], num_heads=full["heads"],
            mlp_dim=full["mlp_width"], patch_size=full["patch_size"],
        )  # fmt: skip
    except ValidationError as error:
        raise CheckpointError("decoder config", str(error.errors()[0]["msg"])) from error
    return spec, full["latent_dim"], _grid(full)


def _grid(config: Mapping[str, Any]) -> tuple[int, int]:
    count = config["num_patches"]
    side = math.isqrt(count)
    rows, cols = config.get("grid") or (side, side)
    if rows * cols != count:
        raise CheckpointError(
            "decoder config", "the grid does not fit the positions of the decoder", got=f"{rows} x {cols}",
            expected=f"{count} tokens", hint="Give rows and columns as 'grid' (--set grid=[ROWS,COLUMNS]).",
        )  # fmt: skip
    return rows, cols


def rescale_pixels(
    name: str, value: Tensor, mean: Sequence[float], std: Sequence[float], *, inverse: bool = False
) -> Tensor:
    """Last layer of a decoder of normalised pixels -> of pixels in [0, 1]; the channel is the fastest axis."""
    rows = len(value) // 3
    scale = torch.tensor(std, dtype=torch.float64, device=value.device).repeat(rows)
    shift = torch.tensor(mean, dtype=torch.float64, device=value.device).repeat(rows)
    exact = value.double()
    if name.endswith("weight"):
        exact = exact / scale[:, None] if inverse else exact * scale[:, None]
    else:
        exact = (exact - shift) / scale if inverse else exact * scale + shift
    return exact.to(value.dtype)


def _reference_names(depth: int) -> dict[str, list[str]]:
    """Our parameter -> the reference tensors that make it up, joined along the first axis."""
    linear = {"embed": ["decoder_embed"], "norm": ["decoder_norm"], "pred": ["decoder_pred"]}
    for i in range(depth):
        theirs = f"decoder_layers.{i}"
        linear |= {
            f"blocks.{i}.norm1": [f"{theirs}.layernorm_before"],
            f"blocks.{i}.qkv": [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")],
            f"blocks.{i}.proj": [f"{theirs}.attention.output.dense"],
            f"blocks.{i}.norm2": [f"{theirs}.layernorm_after"],
            f"blocks.{i}.fc1": [f"{theirs}.intermediate.dense"],
            f"blocks.{i}.fc2": [f"{theirs}.output.dense"],
        }
    return {"cls_token": ["trainable_cls_token"], "pos_embed": ["decoder_pos_embed"]} | linear_names(linear)
