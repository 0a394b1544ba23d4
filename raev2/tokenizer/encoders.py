"""Frozen vision encoders: images -> tokens, from one layer (RAE) or several (generalised RAE).

Read `FrozenEncoder` first. `build_encoder` makes one from an `EncoderSpec`; the known names are data in
encoder_table.py. Three kinds of local folder are accepted wherever a name is:

    ours           config.json {"format_version": 1, "architecture": "vit", "kwargs": {...}, "mean", "std"};
                   kwargs are those of timm's VisionTransformer
    timm           config.json {"architecture": a timm model name, "pretrained_cfg": {...}}
    transformers   config.json {"model_type": ...} and preprocessor_config.json with image_mean and image_std

each with model.safetensors.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from raev2.errors import CheckpointError, SpecError
from raev2.files.artefact import build_strict
from raev2.files.assets import Asset
from raev2.files.damage import damaged, read_json
from raev2.shapes import Images, Tokens
from raev2.spec import EncoderSpec
from raev2.tokenizer.encoder_table import ENCODERS, EncoderInfo, Norm, check_layers, encoder_asset, encoder_info

ASSETS = Path(__file__).parents[1] / "assets"
PROJECTION_SEED = 0
FINAL_NORM_NAMES = ("layernorm", "norm", "post_layernorm")  # of transformers models
PREFIXES = {"timm": "timm", "hf": "transformers"}  # of names that are not in the table -> who builds them


# The encoder


class FrozenEncoder(nn.Module):
    """Images in [0, 1] of any size -> patch tokens, never trained and always in eval mode.

    resize to grid * patch_size -> normalise -> blocks -> drop prefix tokens -> final norm per layer -> aggregate

    Resizing is bicubic, with antialiasing when an image gets smaller. (RAE and RAEv2 never antialias, so their features
    of larger images contain aliases of fine texture; `antialias=False` does the same, for weights from there.)

    The network is not a registered submodule: `parameters`, `state_dict`, `train` and `requires_grad_` of a parent
    never reach it. In RAEv2 they do, and DINOv3 then distorts its positions at random while the decoder trains.
    """

    trunk: Trunk
    mean: Tensor
    std: Tensor
    projection: Tensor | None

    def __init__(self, spec: EncoderSpec, info: EncoderInfo, trunk: Trunk, grid: tuple[int, int]) -> None:
        super().__init__()
        self.spec, self.info, self.grid = spec, info, grid
        self.width, self.depth, self.patch_size = trunk.width, trunk.depth, trunk.patch_size
        self.input_size = (grid[0] * trunk.patch_size, grid[1] * trunk.patch_size)
        self.layers = spec.layers or (self.depth - 1,)
        check_layers(info.name, self.depth, self.layers)
        self.norm: Norm = spec.norm or info.norm
        if self.norm != "none" and trunk.final_norm is None:
            raise SpecError(
                "encoder.norm", "this encoder has no final norm", got=self.norm, expected="none",
                hint=f"Leave encoder.norm of {info.name} empty.",
            )  # fmt: skip

        object.__setattr__(self, "trunk", trunk.eval().requires_grad_(False))
        self.weights_hash = hash_weights(trunk)
        self.register_buffer("mean", torch.tensor(info.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(info.std).view(1, 3, 1, 1), persistent=False)
        needs_projection = spec.aggregate == "random_projection"
        projection = projection_matrix(len(self.layers) * self.width, self.width) if needs_projection else None
        self.register_buffer("projection", projection, persistent=False)

    @torch.no_grad()
    def forward(self, images: Images) -> Tokens:
        """Tokens of the spec's layers, aggregated; not normalised by latent statistics."""
        return self.with_layers(images, ())[0]

    def with_layers(self, images: Images, layers: Sequence[int]) -> tuple[Tokens, list[Tokens]]:
        """`forward`, and `layers_tokens` from the same pass."""
        each, num = self.layers_tokens(images, (*self.layers, *layers)), len(self.layers)
        tokens = aggregate_layers(each[:num], self.spec.aggregate, self.spec.pooled_term, self.projection)
        return tokens, each[num:]

    def layers_tokens(self, images: Images, layers: Sequence[int], norm: Norm | None = None) -> list[Tokens]:
        """Patch tokens of single blocks in the order asked for; gradient flows to the images.

        layers   block indices from 0; the same index may appear twice
        norm     final norm on each; None: the spec's
        """
        check_layers(self.info.name, self.depth, layers)
        outputs = self.trunk.block_outputs(self.preprocess(images), sorted(set(layers)))
        return [self._finish(outputs[layer], norm or self.norm) for layer in layers]

    def preprocess(self, images: Images) -> Float[Tensor, "B 3 Hin Win"]:
        """Resize to the input size of the network and normalise the pixels."""
        size = (images.shape[2], images.shape[3])
        if size != self.input_size:
            smaller = self.input_size[0] < size[0] or self.input_size[1] < size[1]
            antialias = smaller and self.spec.antialias
            images = F.interpolate(images, self.input_size, mode="bicubic", align_corners=False, antialias=antialias)
        return (images - self.mean) / self.std

    def fingerprint(self) -> dict[str, Any]:
        """What the tokens depend on, as JSON. 'encoder' is for people; the weights are identified by their hash."""
        return {
            "encoder": self.info.name,
            "weights": self.weights_hash,
            "layers": list(self.layers),
            "aggregate": self.spec.aggregate,
            "pooled_term": self.spec.pooled_term,
            "norm": self.norm,
            "norm_eps": self._norm_eps if self.norm != "none" else None,
            "grid": list(self.grid),
            "mean": list(self.info.mean),
            "std": list(self.info.std),
            "resize": "bicubic, antialiased when shrinking" if self.spec.antialias else "bicubic",
        }

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Do nothing: the encoder stays in eval mode."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenEncoder:
        self.trunk._apply(fn, recurse)  # moves with .to(), although it is not a submodule
        return super()._apply(fn, recurse)

    @property
    def _norm_eps(self) -> float:
        assert self.trunk.final_norm is not None
        return self.trunk.final_norm.eps if self.info.norm_eps is None else self.info.norm_eps

    def _finish(self, output: Tensor, norm: Norm) -> Tensor:
        """Drop the prefix tokens of a block's output and apply the final norm."""
        num_tokens, num_prefix = self.grid[0] * self.grid[1], self.info.num_prefix_tokens
        if output.shape[1] != num_prefix + num_tokens:
            raise CheckpointError(
                f"encoder {self.info.name}", "unexpected token count", got=output.shape[1],
                expected=f"{num_prefix} prefix + {num_tokens} patch tokens",
            )  # fmt: skip
        tokens = output[:, num_prefix:]  # (B, N, D)
        if norm == "none":
            return tokens
        final_norm = self.trunk.final_norm
        assert final_norm is not None
        gain, bias = (final_norm.weight, final_norm.bias) if norm == "affine" else (None, None)
        return F.layer_norm(tokens, (self.width,), gain, bias, self._norm_eps)


def aggregate_layers(
    layer_tokens: Sequence[Tokens],
    aggregate: Literal["sum", "mean", "random_projection"] = "sum",
    pooled_term: bool = False,
    projection: Float[Tensor, "KD D"] | None = None,
) -> Tokens:
    """One token map from the final-normed tokens f_l of several layers, in ascending order of layer.

    sum: sum_l f_l     mean: sum_l f_l / K     random_projection: concat_l(f_l) @ projection
    pooled_term: + mean over the tokens of the last f_l, the same for every token

    The released multi-layer DINOv3 tokenizers are mean + pooled term, although the paper says sum. A mean and a sum
    are the same after latent normalisation; the pooled term is not absorbed.
    """
    if aggregate == "random_projection":
        stacked = torch.cat(list(layer_tokens), dim=2)  # (B, N, K * D)
        if projection is None:
            projection = projection_matrix(stacked.shape[2], layer_tokens[0].shape[2]).to(stacked)
        tokens = stacked @ projection
    else:
        tokens = torch.stack(list(layer_tokens)).sum(0)
        if aggregate == "mean":
            tokens = tokens / len(layer_tokens)
    return tokens + layer_tokens[-1].mean(dim=1, keepdim=True) if pooled_term else tokens


def projection_matrix(in_dim: int, out_dim: int, seed: int = PROJECTION_SEED) -> Float[Tensor, "KD D"]:
    """Gaussian projection with variance 1 / in_dim: nearly orthogonal columns, keeps unit variance.

    A function of the seed alone (drawn on the CPU), so it is not stored.
    """
    return torch.randn(in_dim, out_dim, generator=torch.Generator().manual_seed(seed)) / math.sqrt(in_dim)


def hash_weights(module: nn.Module) -> str:
    """Short hash of up to 64 evenly spaced values of every parameter; quick also for billions of parameters.

    Position tables are left out: they are resampled to the grid, and the grid is in the fingerprint itself.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.named_parameters()):
        if "pos_embed" in name or "position_embedding" in name:
            continue
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64]
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# Trunks: the two libraries behind one method


class Trunk(nn.Module):
    """A vision transformer of a library, seen as a stack of blocks."""

    model: nn.Module
    width: int
    depth: int
    patch_size: int
    num_prefix_tokens: int
    final_norm: nn.LayerNorm | None

    def block_outputs(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Outputs of these blocks before the final norm, prefix tokens included: {layer: (B, P + N, D)}."""
        raise NotImplementedError


class TimmTrunk(Trunk):
    """ViT or EVA class of timm."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width, self.depth = model.embed_dim, len(model.blocks)
        self.patch_size = model.patch_embed.patch_size[0]
        self.num_prefix_tokens = model.num_prefix_tokens
        self.final_norm = model.norm if isinstance(model.norm, nn.LayerNorm) else None

    @override
    def block_outputs(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        outputs = self.model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=list(layers), return_prefix_tokens=self.num_prefix_tokens > 0, norm=False,
            stop_early=True, output_fmt="NLC", intermediates_only=True,
        )  # fmt: skip
        if self.num_prefix_tokens:
            outputs = [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]
        return dict(zip(layers, outputs, strict=True))


class TransformersTrunk(Trunk):
    """Vision tower of transformers.

    Blocks are read by hooks and not through `output_hidden_states`: depending on model and version, the last entry
    there is the raw block output or the final-normed one, which is how RAEv2 norms the last SigLIP2 layer twice.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        model = getattr(model, "vision_model", model)
        config = getattr(model.config, "vision_config", model.config)
        self.model = model
        self.width, self.depth, self.patch_size = config.hidden_size, config.num_hidden_layers, config.patch_size
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.depth]
        norms = {name.removeprefix("vision_model."): m for name, m in model.named_modules()}
        final_norms = [norms[name] for name in FINAL_NORM_NAMES if name in norms]
        if not stacks or not final_norms:
            raise SpecError("encoder.name", f"{type(model).__name__} has no stack of blocks with a final norm")
        self.stack = [stacks[0]]  # in a list: already registered by the model
        self.final_norm = final_norms[0] if isinstance(final_norms[0], nn.LayerNorm) else None
        class_tokens = [name for name, _ in model.named_parameters() if "cls_token" in name or "class_embed" in name]
        # I-JEPA declares a class token in the ViT embeddings it inherits only when it uses one.
        self.num_prefix_tokens = (1 if class_tokens else 0) + getattr(config, "num_register_tokens", 0)
        self.arguments = set(inspect.signature(model.forward).parameters)

    @override
    def block_outputs(self, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        outputs: dict[int, Tensor] = {}

        def keep(layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        kwargs: dict[str, Any] = {}
        if "interpolate_pos_encoding" in self.arguments:
            kwargs["interpolate_pos_encoding"] = True
        if "noise" in self.arguments:  # ViT-MAE sorts patches by this noise: keep their order
            num_tokens = (pixels.shape[2] // self.patch_size) * (pixels.shape[3] // self.patch_size)
            order = torch.arange(num_tokens, device=pixels.device, dtype=torch.float32)
            kwargs["noise"] = order.expand(pixels.shape[0], -1)
        handles = [self.stack[0][layer].register_forward_hook(partial(keep, layer)) for layer in layers]
        try:
            self.model(pixel_values=pixels, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


# Building


def build_encoder(
    spec: EncoderSpec, grid: tuple[int, int], *, pretrained: bool = True, source: str | Path | None = None
) -> FrozenEncoder:
    """Make the encoder of a spec for a token grid.

    grid         token rows and columns; the network is built for grid * patch_size pixels
    pretrained   False: random weights (tests, parameter counts)
    source       local folder to take the weights of `spec.name` from

    Raises SpecError for an unknown name, CheckpointError where weights cannot be had.
    """
    name, (prefix, _, model_id) = spec.name, spec.name.partition(":")
    known = ENCODERS.get(name)
    if source is not None:
        route, model_id = "local", str(source)
    elif known is None and prefix in PREFIXES:
        route = PREFIXES[prefix]
    elif known is None and Path(name).is_dir():
        route, model_id, name = "local", name, Path(name).resolve().name
    else:
        known = encoder_info(name)
        route, model_id = known.route, str(ASSETS / known.model_id) if known.route == "local" else known.model_id
    trunk, info = ROUTES[route](name, model_id, known, grid, pretrained)
    return FrozenEncoder(spec, info, trunk, grid)


def build_encoder_for_pixels(name: str, size: tuple[int, int], *, pretrained: bool = True) -> FrozenEncoder:
    """The encoder whose input is closest to a height and width in pixels."""
    known = ENCODERS.get(name)
    patch_size = known.patch_size if known else build_encoder(EncoderSpec(name=name), (1, 1)).patch_size
    grid = (max(1, round(size[0] / patch_size)), max(1, round(size[1] / patch_size)))
    return build_encoder(EncoderSpec(name=name), grid, pretrained=pretrained)


def _from_timm(
    name: str,
    model_id: str,
    info: EncoderInfo | None,
    grid: tuple[int, int],
    pretrained: bool,
    file: Path | None = None,
    pixel_stats: dict[str, Any] | None = None,
) -> tuple[Trunk, EncoderInfo]:
    """`file`: weights to load in place of the hub's. `pixel_stats`: {"mean", "std"} in place of timm's."""
    import timm

    def create(pretrained: bool, img_size: tuple[int, int] | None) -> Any:
        # A fixed img_size makes timm resample the positions once, when the weights are loaded.
        options: dict[str, Any] = {} if img_size is None else {"img_size": img_size, "dynamic_img_size": False}
        if file is not None:
            options["pretrained_cfg_overlay"] = {"file": str(file)}
        elif pretrained and (commit := Asset(name, f"timm/{model_id}").commit):  # the one that a run records
            options["pretrained_cfg_overlay"] = {"hf_hub_id": f"timm/{model_id}@{commit}"}
        return timm.create_model(model_id, pretrained=pretrained, num_classes=0, **options)

    if not timm.is_model(model_id.split(".")[0]):
        raise SpecError("encoder.name", f"timm {timm.__version__} does not know this model", got=repr(model_id))
    with torch.device("meta"):  # no memory, only to learn the patch size
        probe = create(False, None)
    if not hasattr(probe, "blocks") or not hasattr(probe, "patch_embed"):
        raise SpecError("encoder.name", "not a vision transformer with a stack of blocks", got=repr(model_id))
    patch_size = probe.patch_embed.patch_size[0]
    try:
        model = create(pretrained, (grid[0] * patch_size, grid[1] * patch_size))
    except Exception as error:  # network, access and file errors of several libraries
        raise encoder_asset(name).error(error) from error
    trunk = TimmTrunk(model)
    if info is None:
        stats = pixel_stats or model.pretrained_cfg
        licence = model.pretrained_cfg.get("license") or "see the model card"
        info = _info_of_model(name, "timm", model_id, trunk, stats["mean"], stats["std"], licence)
    return trunk, info


def _from_transformers(
    name: str, model_id: str, info: EncoderInfo | None, grid: tuple[int, int], pretrained: bool
) -> tuple[Trunk, EncoderInfo]:
    import transformers

    revision = Asset(name, model_id).commit or "main"  # the one that a run records
    try:
        config = transformers.AutoConfig.from_pretrained(model_id, revision=revision, trust_remote_code=False)
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # ViT-MAE: the encoder sees every patch
        if pretrained:
            model = transformers.AutoModel.from_pretrained(
                model_id, config=config, dtype=torch.float32, revision=revision, trust_remote_code=False
            )
        else:
            model = transformers.AutoModel.from_config(config)
    except Exception as error:  # network, access and file errors of several libraries
        raise encoder_asset(name).error(error) from error
    trunk = TransformersTrunk(model)
    if info is None:
        mean, std = _pixel_stats_of_transformers(name, model_id)
        info = _info_of_model(name, "transformers", model_id, trunk, mean, std, "see the model card")
    return trunk, info


def _from_folder(
    name: str, model_id: str, info: EncoderInfo | None, grid: tuple[int, int], pretrained: bool
) -> tuple[Trunk, EncoderInfo]:
    folder = Path(model_id)
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    if not config_file.is_file():
        note = f"{info.name}: {info.note}" if info is not None and info.note else ""
        raise CheckpointError(
            str(folder), "not an encoder folder, config.json is missing",
            expected="config.json and model.safetensors, see docs/how_to/new_encoder.md", hint=note,
        )  # fmt: skip
    config, asset = read_json(config_file), Asset(f"encoder {name}", model_id)
    if not config.keys() & {"model_type", "architecture"}:
        raise CheckpointError(
            str(config_file), "cannot tell the format", got=f"keys {sorted(config)[:6]}",
            expected="'model_type' (transformers) or 'architecture' (timm, or 'vit')",
        )  # fmt: skip
    if pretrained and asset.fault():
        raise asset.error()
    if "model_type" in config:
        return _from_transformers(name, model_id, info, grid, pretrained)
    if config.get("architecture") == "vit":
        with damaged(config_file):
            trunk = _packaged_vit(config, weights_file, grid, pretrained)
            return trunk, info or _info_of_model(
                name, "local", model_id, trunk, config["mean"], config["std"], config.get("licence", "unknown")
            )
    stats = config.get("pretrained_cfg") or None
    return _from_timm(name, config["architecture"], info, grid, pretrained, weights_file, stats)


ROUTES = {"timm": _from_timm, "transformers": _from_transformers, "local": _from_folder}


def _packaged_vit(config: dict[str, Any], weights_file: Path, grid: tuple[int, int], pretrained: bool) -> Trunk:
    """Our own folder format: kwargs of timm's VisionTransformer and its state dict (fp16 is fine)."""
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    kwargs = dict(config["kwargs"])
    patch_size = kwargs["patch_size"]
    stored_size = kwargs.pop("img_size")
    stored_h, stored_w = (stored_size, stored_size) if isinstance(stored_size, int) else stored_size
    build = partial(VisionTransformer, img_size=(grid[0] * patch_size, grid[1] * patch_size), **kwargs)
    if not pretrained:
        return TimmTrunk(build())
    state = {key: value.float() for key, value in load_file(weights_file).items()}
    if kwargs.get("depth", 0) > len(state):
        raise ValueError(f"{kwargs['depth']} blocks and {len(state)} tensors")
    stored = [stored_h // patch_size, stored_w // patch_size]
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_size=list(grid), old_size=stored,
        num_prefix_tokens=state["pos_embed"].shape[1] - math.prod(stored),
    )  # fmt: skip
    return TimmTrunk(build_strict(build, state, str(weights_file)))


def _pixel_stats_of_transformers(name: str, model_id: str) -> tuple[Any, Any]:
    from transformers.utils import cached_file

    try:
        config = json.loads(Path(cached_file(model_id, "preprocessor_config.json") or "").read_text(encoding="utf-8"))
        return config["image_mean"], config["image_std"]
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"encoder {name}", "the pixel normalisation is unknown", got=f"{type(error).__name__}: {error}",
            expected="preprocessor_config.json with image_mean and image_std",
        ) from error  # fmt: skip


def _info_of_model(
    name: str, route: Any, model_id: str, trunk: Trunk, mean: Sequence[float], std: Sequence[float], licence: str
) -> EncoderInfo:
    """Facts about an encoder that is not in the table; an exact timm id of the table keeps its norm."""
    norm: tuple[Norm, float | None] = ("plain" if trunk.final_norm is not None else "none", None)
    known = [(other.norm, other.norm_eps) for other in ENCODERS.values() if other.model_id == model_id]
    (mean_r, mean_g, mean_b), (std_r, std_g, std_b) = map(float, mean), map(float, std)
    return EncoderInfo(
        name, model_id, trunk.width, trunk.depth, trunk.patch_size, trunk.num_prefix_tokens, *(known or [norm])[0],
        route=route, mean=(mean_r, mean_g, mean_b), std=(std_r, std_g, std_b), licence=licence,
    )  # fmt: skip
