"""Parts of the tokenizers of RAE and RAEv2 in and out: pixel decoders, latent statistics, discriminator heads.

Statistics (stat.pt of RAE, stats.pt of RAEv2) are a mapping with "mean" and "var". Discriminator heads keep spectral
normalisation as `weight_orig`, `weight_u`, `weight_v` (hooks), we as a parametrisation; the frozen trunk is in neither.
The released discriminators have five heads, of which the first reads the last block a second time:
`AdversarialSpec(layers=(11, 2, 5, 8, 11))`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from raev2.errors import CheckpointError
from raev2.interop.convert import Change, Conversion, Names, describe, export, place, rename, sizes, unchanged, unwrap
from raev2.spec import DecoderSpec
from raev2.spec_io import validated
from raev2.tokenizer.base import part
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.decoder_table import DECODER_SIZES
from raev2.tokenizer.discriminator import Discriminator
from raev2.tokenizer.latent_stats import LatentStats

HEADS = "decoder_num_attention_heads"  # in the reference's JSON files, whose other entries the weights know better
SPECTRAL = {
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}
Pixels = Sequence[float] | None


# Decoders (GeneralDecoder)


def import_decoder(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    pixel_mean: Pixels = None,
    pixel_std: Pixels = None,
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
    names = _decoder_names(decoder.state_dict(), spec.depth)
    conversion = Conversion(decoder, tensors, names, _rescale(pixel_mean, pixel_std))
    conversion.check("decoder weights")
    conversion.load()
    return decoder.eval()


def export_decoder(decoder: ViTDecoder, pixel_mean: Pixels = None, pixel_std: Pixels = None) -> dict[str, Tensor]:
    """The weights in the reference's layout: the inverse of `import_decoder`.

    With pixel_mean and pixel_std as RAE v1 reads it. Taking them out of the last layer again is exact to the last bit
    but one; everything else is exact. Raises CheckpointError for patches that overlap.
    """
    if decoder.spec.overlap:
        raise _no_place("patches that overlap", "tokenizer.decoder.overlap")
    names = _decoder_names(decoder.state_dict(), decoder.spec.depth)
    return export(decoder, names, _rescale(pixel_mean, pixel_std, inverse=True))


def decoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder alone, of a decoder or of a whole autoencoder, whose frozen encoder is left out."""
    return part(tensors, "decoder." if "decoder.decoder_embed.weight" in tensors else "")


def decoder_spec(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[DecoderSpec, int, tuple[int, int]]:
    """Spec, latent width and grid, from the tensors and, for what they do not determine, the config."""
    if "decoder_embed.weight" not in tensors or "decoder_pos_embed" not in tensors:
        raise CheckpointError(
            "decoder weights", "not a decoder of RAE or RAEv2", got=describe(tensors)[1], expected="a GeneralDecoder"
        )
    axes = {
        "latent_dim": ("decoder_embed.weight", 1),
        "width": ("decoder_embed.weight", 0),
        "mlp_width": ("decoder_layers.0.intermediate.dense.weight", 0),
        "num_patches": ("decoder_pos_embed", 1),
        "patch_size": ("decoder_pred.weight", 0),
    }
    found: dict[str, Any] = sizes(tensors, axes)
    found["depth"] = sum(name.endswith(".layernorm_before.weight") for name in tensors)
    found["num_patches"] -= 1  # the class token
    if "patch_size" in found:
        found["patch_size"] = math.isqrt(found["patch_size"] // 3)
    for width, depth, heads, mlp_width in DECODER_SIZES.values():
        if (width, depth, mlp_width) == (found["width"], found["depth"], found.get("mlp_width")):
            found["heads"] = heads
    found |= {"heads": config[HEADS]} if HEADS in config else config
    missing = [name for name in ("heads", "mlp_width", "patch_size") if name not in found]
    if missing:
        reason = f"width {found['width']}, depth {found['depth']}, which is no published size"
        raise CheckpointError(
            "decoder config", f"the weights do not determine {', '.join(missing)}",
            got=reason if missing == ["heads"] else f"only {len(tensors)} tensors",
            hint=f"Give it in the config; on the command line with --config FILE or --set {missing[0]}=VALUE.",
        )  # fmt: skip
    fields = {"num_heads": found["heads"], "mlp_dim": found["mlp_width"]}
    fields |= {name: found[name] for name in ("width", "depth", "patch_size")}
    spec = validated(DecoderSpec, fields, "decoder config ", CheckpointError)
    return spec, found["latent_dim"], _grid(found)


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


def _rescale(mean: Pixels, std: Pixels, *, inverse: bool = False) -> Change:
    """Last layer of a decoder of normalised pixels -> of pixels in [0, 1]; the channel is the fastest axis."""
    if mean is None or std is None:
        return unchanged

    def change(name: str, start: int, value: Tensor) -> Tensor:
        if not name.startswith("pred."):
            return value
        scale, shift = (
            value.new_tensor(numbers, dtype=torch.float64).repeat(len(value) // 3) for numbers in (std, mean)
        )
        if value.ndim == 2:  # the weight, which shifts nothing
            scale, shift = scale[:, None], torch.zeros_like(shift)[:, None]
        exact = (value.double() - shift) / scale if inverse else value.double() * scale + shift
        return exact.to(value.dtype)

    return change


def _decoder_names(ours: Iterable[str], depth: int) -> Names:
    """Our tensor -> the reference tensors that make it up."""
    layers: dict[str, str | list[str]] = {
        "embed": "decoder_embed", "norm": "decoder_norm", "pred": "decoder_pred",
        "cls_token": "trainable_cls_token", "pos_embed": "decoder_pos_embed",
    }  # fmt: skip
    for i in range(depth):
        theirs = f"decoder_layers.{i}"
        layers |= {
            f"blocks.{i}.norm1": f"{theirs}.layernorm_before",
            f"blocks.{i}.qkv": [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")],
            f"blocks.{i}.proj": f"{theirs}.attention.output.dense",
            f"blocks.{i}.norm2": f"{theirs}.layernorm_after",
            f"blocks.{i}.fc1": f"{theirs}.intermediate.dense",
            f"blocks.{i}.fc2": f"{theirs}.output.dense",
        }
    return place(ours, layers)


# Latent statistics


def import_stats(
    values: Mapping[str, Any], latent_shape: tuple[int, int, int], *, encoder: Mapping[str, Any], data: str = ""
) -> LatentStats:
    """Statistics per channel and position, (C, H, W).

    values    "mean" and "var" of shape (C, H, W), (C, 1, 1) or (C,), also with a leading 1; one value for several is
              spread. A missing mean means 0 and a missing variance 1, as the reference reads it
    encoder   fingerprint of the encoder that they belong to
    data      what they were computed from

    Raises CheckpointError for another shape, and for values that are no mean or variance.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors or set(values) - {"mean", "var"}:
        raise CheckpointError(
            "latent statistics", "not a statistics file", got=describe(tensors)[1] if tensors else sorted(values)[:4],
            expected="'mean' and 'var'",
        )  # fmt: skip
    mean = spread(tensors.get("mean", torch.zeros(())), "mean", latent_shape)
    var = spread(tensors.get("var", torch.ones(())), "var", latent_shape)
    if not mean.isfinite().all() or not var.isfinite().all() or (var < 0).any():
        raise CheckpointError(
            "latent statistics", "not finite, or a negative variance", got=f"smallest variance {var.min().item():g}"
        )
    return LatentStats(mean, var, num_images=0, encoder=encoder, data=data)


def export_stats(stats: LatentStats) -> dict[str, Tensor]:
    """The statistics as the reference stores them. Raises CheckpointError for whitened latents."""
    if stats.cov is not None:
        raise _no_place("whitened latents", "tokenizer.whiten")
    return {"mean": stats.mean.clone(), "var": stats.var.clone()}


def _no_place(what: str, option: str) -> CheckpointError:
    hint = "Export it with --format pipeline."
    return CheckpointError("--format reference", f"the reference has no {what}", got=f"{option} is set", hint=hint)


def spread(value: Tensor, name: str, latent_shape: tuple[int, int, int]) -> Tensor:
    """One of the statistics as (C, H, W), float32."""
    shape = tuple(value.shape)
    if value.ndim == 4 and shape[0] == 1:
        value = value[0]
    if value.ndim == 1:
        value = value[:, None, None]
    fits = value.ndim in (0, 3) and all(
        have in (1, want) for have, want in zip(value.shape, latent_shape[-value.ndim :], strict=False)
    )
    if not fits:
        raise CheckpointError(
            "latent statistics", f"{name} has the wrong shape", got=shape,
            expected=f"{latent_shape}, or {(latent_shape[0],)}",
            hint="They belong to another encoder or another image size.",
        )  # fmt: skip
    return value.float().expand(latent_shape).clone()


# Discriminator heads


def import_discriminator(state_dict: Mapping[str, Any], discriminator: Discriminator) -> Discriminator:
    """Load reference heads into a discriminator; raises CheckpointError unless every tensor finds its place.

    state_dict   heads, or a stage-1 training checkpoint with them under "disc"
    """
    inner = state_dict.get("disc", state_dict)
    if not isinstance(inner, Mapping):
        raise CheckpointError("discriminator", "no heads under 'disc'", got=type(inner).__name__)
    conversion = Conversion(discriminator.heads, unwrap(inner), _head_names(discriminator))
    conversion.check("discriminator weights")
    conversion.load()
    return discriminator


def export_discriminator(discriminator: Discriminator) -> dict[str, Tensor]:
    """The heads in the reference's layout: the inverse of `import_discriminator`."""
    return export(discriminator.heads, _head_names(discriminator))


def _head_names(discriminator: Discriminator) -> Names:
    return {ours: [f"heads.{rename(ours, SPECTRAL)}"] for ours in discriminator.heads.state_dict()}
