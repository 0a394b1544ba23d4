"""Whole tokenizers of diffusers (`AutoencoderRAE`) in and out.

They differ from ours in four ways, all of them exact: the encoder lies in the same file, the decoder predicts
normalised pixels (folded into our last layer), latents are divided by std + 1e-5 instead of sqrt(var + 1e-5), and
attention has other names. diffusers builds three kinds of encoder, without the gain and bias of the last norm, and
computes the positions of the decoder anew, for a grid of 16 x 16 whatever the grid is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from raev2.errors import CheckpointError, SpecError
from raev2.files.artefact import load_strict
from raev2.interop.convert import rename, some
from raev2.interop.generators import nearest_multiples
from raev2.interop.tokenizers import decoder_spec, export_decoder, import_decoder, spread
from raev2.nn import sincos_2d
from raev2.spec import EncoderSpec, TokenizerSpec
from raev2.tokenizer.base import part
from raev2.tokenizer.encoder_table import RGB_MEAN, RGB_STD
from raev2.tokenizer.encoders import TransformersTrunk, build_encoder
from raev2.tokenizer.latent_stats import EPS, LatentStats
from raev2.tokenizer.rae import RAE

HEAD_DIM = 64  # of every encoder there
STD_EPS = 1e-5
DECODER_NAMES = {
    ".attention.to_q.": ".attention.attention.query.",
    ".attention.to_k.": ".attention.attention.key.",
    ".attention.to_v.": ".attention.attention.value.",
    ".attention.to_out.0.": ".attention.output.dense.",
}
# Kind -> model type of transformers, pixels that the positions are made for, last norm.
ENCODER_KINDS = {
    "dinov2": ("dinov2_with_registers", 518, "layernorm"),
    "siglip2": ("siglip_vision_model", 256, "post_layernorm"),
    "mae": ("vit_mae", 224, "layernorm"),
}
# (kind, width, blocks, patch) -> the hub repository that such an encoder is from.
KNOWN_ENCODERS = {
    ("dinov2", 384, 12, 14): "facebook/dinov2-with-registers-small",
    ("dinov2", 768, 12, 14): "facebook/dinov2-with-registers-base",
    ("dinov2", 1024, 24, 14): "facebook/dinov2-with-registers-large",
    ("siglip2", 768, 12, 16): "google/siglip2-base-patch16-256",
    ("mae", 768, 12, 16): "facebook/vit-mae-base",
}
BUFFERS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
DEFAULTS: dict[str, Any] = {  # of diffusers
    "encoder_type": "dinov2", "encoder_hidden_size": 768, "encoder_patch_size": 14, "encoder_num_hidden_layers": 12,
    "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048, "patch_size": 16, "encoder_input_size": 224, "num_channels": 3,
    "encoder_norm_mean": None, "encoder_norm_std": None, "latents_mean": None, "latents_std": None, "noise_tau": 0.0,
    "scaling_factor": 1.0,
}  # fmt: skip


# In


def import_autoencoder(tensors: Mapping[str, Tensor], config: Mapping[str, Any], encoder_dir: Path) -> RAE:
    """A tokenizer from the state dict and config.json of an AutoencoderRAE.

    encoder_dir   new folder for the encoder, in the format of transformers; artefacts of the tokenizer contain it

    Raises CheckpointError for a partial or inconsistent folder.
    """
    config = {**DEFAULTS, **config}
    kind, size, patch = config["encoder_type"], config["encoder_input_size"], config["encoder_patch_size"]
    if kind not in ENCODER_KINDS or config["num_channels"] != 3:
        raise CheckpointError(
            "AutoencoderRAE", "not supported", got=f"{kind}, {config['num_channels']} channels",
            expected=f"encoder_type {', '.join(ENCODER_KINDS)}, 3 channels",
        )  # fmt: skip
    if size % patch:
        raise CheckpointError(
            "AutoencoderRAE", "encoder_input_size is not a multiple of the encoder's patch size", got=size,
            expected=nearest_multiples(size, patch),
        )  # fmt: skip
    side = size // patch
    encoder_weights, decoder_weights = part(tensors, "encoder."), part(tensors, "decoder.")
    others = sorted(name for name in tensors if not name.startswith(("encoder.", "decoder.")) and name not in BUFFERS)
    if not encoder_weights or not decoder_weights or others:
        raise CheckpointError(
            "AutoencoderRAE", "the weights are not those of a whole autoencoder",
            got=f"{len(encoder_weights)} of the encoder, {len(decoder_weights)} of the decoder, unexpected "
            f"{some(others)}",
        )  # fmt: skip

    mean = _pixel_values(tensors.get("encoder_mean"), config["encoder_norm_mean"] or RGB_MEAN)
    std = _pixel_values(tensors.get("encoder_std"), config["encoder_norm_std"] or RGB_STD)
    _write_encoder(encoder_dir, config, encoder_weights, mean, std)
    decoder_weights = {rename(name, DECODER_NAMES): value for name, value in decoder_weights.items()}
    decoder_weights.setdefault("decoder_pos_embed", positions(config["decoder_hidden_size"], side))
    decoder_config = {"heads": config["decoder_num_attention_heads"], "grid": (side, side)}
    decoder, _, grid = decoder_spec(decoder_weights, decoder_config)

    known = KNOWN_ENCODERS.get((kind, config["encoder_hidden_size"], config["encoder_num_hidden_layers"], patch), kind)
    encoder = EncoderSpec(name=f"hf:{known}", norm="plain", antialias=False)
    spec = TokenizerSpec(
        encoder=encoder, decoder=decoder, grid=grid, noise_tau=config["noise_tau"], noise_unit="tokens"
    )
    trained = import_decoder(decoder_weights, decoder_config, mean, std)
    rae = RAE(spec, build_encoder(encoder, grid, source=encoder_dir), decoder=trained)
    rae.encoder_dir = encoder_dir
    rae.set_stats(_import_stats(tensors, config, rae))
    return rae.eval()


def positions(width: int, side: int) -> Tensor:
    """The decoder positions (1, 1 + side * side, width) that diffusers computes."""
    return torch.cat([torch.zeros(1, width), sincos_2d(width, side, side, scale=16 / side)])[None]


def _write_encoder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], mean: list[float], std: list[float]
) -> None:
    """The encoder as a folder of transformers. The last norm has no gain and bias there; ours ignores them."""
    import transformers

    model_type, image_size, norm = ENCODER_KINDS[config["encoder_type"]]
    width = config["encoder_hidden_size"]
    settings: dict[str, Any] = {"mask_ratio": 0.0} if model_type == "vit_mae" else {}
    if model_type == "siglip_vision_model":  # a pooling head, which no latent goes through
        settings = {"vision_use_head": any("head." in name for name in tensors)}
    encoder_config = transformers.AutoConfig.for_model(
        model_type, hidden_size=width, patch_size=config["encoder_patch_size"], image_size=image_size,
        num_attention_heads=width // HEAD_DIM, num_hidden_layers=config["encoder_num_hidden_layers"], **settings,
    )  # fmt: skip
    norm = f"vision_model.{norm}" if any(name.startswith("vision_model.") for name in tensors) else norm
    folder.mkdir(parents=True)
    encoder_config.save_pretrained(folder)
    values = {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    save_file(values | {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": mean, "image_std": std}, indent=2), encoding="utf-8"
    )

    # Loading fills what is missing with random values, and says so only in its report.
    _, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        raise CheckpointError(
            "AutoencoderRAE", "the encoder weights do not fit the config",
            got=f"missing {some(missing)}; unexpected {some(unexpected)}", expected=f"{model_type} of transformers",
        )  # fmt: skip


def _import_stats(tensors: Mapping[str, Tensor], config: Mapping[str, Any], rae: RAE) -> LatentStats:
    """(z - mean) / (std + 1e-5) * scale as (z - mean) / sqrt(var + 1e-5)."""
    mean = spread(tensors.get("_latents_mean", torch.zeros(())), "mean", rae.latent_shape)
    std = spread(tensors.get("_latents_std", torch.ones(())), "std", rae.latent_shape)
    var = (((std.double() + STD_EPS) / config["scaling_factor"]).square() - EPS).float()
    if not mean.isfinite().all() or not var.isfinite().all() or (var < 0).any():
        raise CheckpointError(
            "latent statistics", "not finite, or standard deviations too small for (x - mean) / sqrt(var + 1e-5)",
            got=f"smallest {std.min().item():g}", expected="at least 0.0032",
        )  # fmt: skip
    return LatentStats(mean, var, 0, rae.encoder.fingerprint(), "imported from diffusers")


def _pixel_values(stored: Tensor | None, configured: Any) -> list[float]:
    """Three numbers; those of the config where they are those of the weights up to rounding."""
    values = [float(value) for value in configured]
    if stored is None or torch.allclose(
        stored.flatten().double(), torch.tensor(values, dtype=torch.float64), atol=1e-6
    ):
        return values
    return stored.flatten().tolist()


# Out


def export_autoencoder(rae: RAE) -> Any:
    """The tokenizer as an `AutoencoderRAE`; its `save_pretrained` writes the folder of diffusers.

    The outputs are the same up to rounding, for images of the encoder's input size; other images are resized there,
    without antialiasing. Raises CheckpointError for a tokenizer that diffusers cannot express.
    """
    try:
        from diffusers import AutoencoderRAE
    except ImportError as error:
        raise SpecError(
            "--format diffusers", "needs diffusers", got="not installed", hint="Run pip install 'raev2[diffusers]'."
        ) from error
    kind, model = _encoder_kind(rae)
    if rae.spec.whiten is not None:
        raise _not_possible(
            "its latents are whitened (tokenizer.whiten)", "one mean and variance per element", "pipeline"
        )
    if rae.spec.decoder.overlap:
        raise _not_possible("its patches overlap (tokenizer.decoder.overlap)", "patches side by side", "pipeline")
    side = rae.spec.grid[0]
    decoder, stats, info = rae.spec.decoder, rae.latent_stats, rae.encoder.info
    difference = (rae.decoder.pos_embed - positions(decoder.width, side).to(rae.decoder.pos_embed)).abs().max().item()
    if difference > 1e-5:
        raise _not_possible(
            f"its decoder has other positions than diffusers computes (largest difference {difference:.2g})",
            "fixed sine-cosine positions of a 16 x 16 grid",
        )
    config: dict[str, Any] = {
        "encoder_type": kind, "encoder_hidden_size": rae.encoder.width, "encoder_patch_size": rae.encoder.patch_size,
        "encoder_num_hidden_layers": rae.encoder.depth, "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth, "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": decoder.mlp_dim, "patch_size": decoder.patch_size,
        "encoder_input_size": rae.encoder.input_size[0], "encoder_norm_mean": list(info.mean),
        "encoder_norm_std": list(info.std),
    }  # fmt: skip
    if stats is not None:
        std = (stats.var.double() + EPS).sqrt() - STD_EPS
        config |= {"latents_mean": stats.mean.cpu(), "latents_std": std.float().cpu()}
    try:
        autoencoder: Any = AutoencoderRAE(**config)
    except Exception as error:  # what diffusers raises where it does not fit the installed transformers
        import diffusers
        import transformers

        raise CheckpointError(
            "--format diffusers", f"diffusers {diffusers.__version__} cannot build this with transformers "
            f"{transformers.__version__}", got=f"{type(error).__name__}: {error}",
        ) from error  # fmt: skip

    names = {new: old for old, new in DECODER_NAMES.items()}
    weights = export_decoder(rae.decoder, info.mean, info.std)
    tensors = {f"decoder.{rename(name, names)}": value for name, value in weights.items()}
    del tensors["decoder.decoder_pos_embed"]
    tensors |= {
        f"encoder.{name}": value
        for name, value in model.state_dict().items()
        if not name.removeprefix("vision_model.").startswith(ENCODER_KINDS[kind][2])  # has no values there
    }
    own = {name: value for name, value in autoencoder.state_dict().items() if name in BUFFERS}
    load_strict(autoencoder, tensors | own, "--format diffusers")
    return autoencoder.eval()


def _encoder_kind(rae: RAE) -> tuple[str, Any]:
    """Kind and network of an encoder that diffusers can build; CheckpointError for any other."""
    encoder, spec = rae.encoder, rae.spec
    if not isinstance(encoder.trunk, TransformersTrunk):
        raise _not_possible(
            f"its encoder {encoder.info.name} is built by {encoder.info.route}",
            "an encoder built by transformers: 'hf:ID' or a folder of it",
        )
    model: Any = encoder.trunk.model
    model_type = model.config.model_type
    kinds = {type_: kind for kind, (type_, _, _) in ENCODER_KINDS.items()}
    if model_type not in kinds:
        raise _not_possible(f"its encoder is a {model_type}", f"one of {', '.join(kinds)}")
    if encoder.layers != (encoder.depth - 1,) or spec.encoder.pooled_term or encoder.norm != "plain":
        raise _not_possible(
            f"its latents are layers {list(encoder.layers)} with norm {encoder.norm}", "the last layer, norm plain"
        )
    if spec.grid[0] != spec.grid[1]:
        raise _not_possible(f"its grid is {spec.grid[0]} x {spec.grid[1]}", "a square grid")
    return kinds[model_type], model


def _not_possible(reason: str, expected: str, formats: str = "pipeline or reference") -> CheckpointError:
    return CheckpointError(
        "--format diffusers", "AutoencoderRAE cannot express this tokenizer", got=reason, expected=expected,
        hint=f"Export it with --format {formats}.",
    )  # fmt: skip
