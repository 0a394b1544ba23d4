"""Conditions: a spec (`ConditionSpec`, saved with the model) builds a trained module (`Conditioner`).

Read `Conditioner` first. A condition is always a mapping of named tensors with the batch as leading axis; the module
turns it into tokens for the trunk, or into one vector per sample for an adaLN trunk. A new kind of condition is a
subclass of each; nothing else in the core has to know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, ValidationError
from torch import Tensor, nn

from raev2.batch import Cond, CondTokens
from raev2.errors import SpecError
from raev2.model.embed import FourierEmbed, PatchEmbed, patchify
from raev2.model.layers import RMSNorm
from raev2.positions import sincos_2d
from raev2.spec import Spec

LatentShape = tuple[int, int, int]  # C, H, W
Conditioning = Literal["in_context", "adaln"]


@dataclass(frozen=True)
class CondField:
    """Shape without the batch axis (None: any length) and dtype of one tensor of a condition."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32


class Conditioner(nn.Module, ABC):
    """Raw condition -> what the trunk sees. Trained and saved with the generator.

    fields      the tensors of the condition by name
    num_tokens  number of condition tokens, for a condition of free length the largest one
    """

    def __init__(self, fields: Mapping[str, CondField], num_tokens: int) -> None:
        super().__init__()
        self.fields = dict(fields)
        self.num_tokens = num_tokens

    @abstractmethod
    def forward(self, cond: Cond) -> CondTokens | None:
        """Tokens for an in-context trunk; None when there are none."""

    @abstractmethod
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """The unconditional condition in the shapes, dtypes and on the device of `cond`."""

    def vector(self, cond: Cond) -> Float[Tensor, "B D"] | None:
        """One vector per sample for an adaLN trunk; None when there is nothing to add."""
        raise SpecError(
            "generator.conditioning", f"{type(self).__name__} has no vector form", got="adaln", expected="in_context"
        )

    def check(self, cond: Cond) -> None:
        """Raise `SpecError` unless `cond` has the right names, shapes and values. Reads values: not for inner loops."""
        if cond.keys() != self.fields.keys():
            raise SpecError("cond", "wrong names", got=sorted(cond), expected=str(sorted(self.fields)))
        batch_sizes = {name: value.shape[0] for name, value in cond.items() if value.ndim}
        if len(set(batch_sizes.values())) > 1:
            raise SpecError("cond", "tensors disagree in the batch axis", got=batch_sizes)
        for name, field in self.fields.items():
            shape = tuple(cond[name].shape)
            fits = len(shape) == len(field.shape) + 1 and all(
                want in (None, have) for want, have in zip(field.shape, shape[1:], strict=True)
            )
            if not fits:
                expected = ("B", *("any" if size is None else size for size in field.shape))
                raise SpecError(f"cond.{name}", "wrong shape", got=shape, expected=f"({', '.join(map(str, expected))})")

    def example_cond(self, batch_size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """A condition of zeros with the right shapes, for counting, compiling and tests."""
        return {
            name: torch.zeros(
                batch_size,
                *(self.num_tokens if size is None else size for size in field.shape),
                dtype=field.dtype,
                device=device,
            )
            for name, field in self.fields.items()
        }


class ConditionSpec(Spec, ABC):
    """Base of the condition specs; `kind` names the class in a saved model."""

    kind: str

    @abstractmethod
    def build(self, width: int, latent_shape: LatentShape, conditioning: Conditioning) -> Conditioner:
        """The module for a trunk of this width and kind of conditioning."""


def _tokens_parameter(count: int, width: int) -> nn.Parameter:
    """Learned tokens, N(0, 1/sqrt(width))."""
    return nn.Parameter(nn.init.normal_(torch.empty(count, width), std=width**-0.5))


# ---------------------------------------------------------------------------------------------------------------------
# No condition


class NoCondition(ConditionSpec):
    """An unconditional generator; its condition is an empty mapping."""

    kind: Literal["none"] = "none"

    def build(self, width: int, latent_shape: LatentShape, conditioning: Conditioning) -> Conditioner:
        """See `ConditionSpec.build`."""
        return NoConditioner({}, num_tokens=0)


class NoConditioner(Conditioner):
    """Adds nothing."""

    def forward(self, cond: Cond) -> None:
        """See `Conditioner.forward`."""
        return None

    def vector(self, cond: Cond) -> None:
        """See `Conditioner.vector`."""
        return None

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """See `Conditioner.null_cond`."""
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Class label


class LabelCondition(ConditionSpec):
    """{"label": (B,) int}; the label `num_classes` means unconditional."""

    kind: Literal["label"] = "label"
    num_classes: int = Field(gt=0)
    num_tokens: int = Field(8, ge=1, description="condition tokens of an in-context trunk")

    def build(self, width: int, latent_shape: LatentShape, conditioning: Conditioning) -> Conditioner:
        """See `ConditionSpec.build`."""
        return LabelConditioner(self, width, conditioning)


class LabelConditioner(Conditioner):
    """Token j is table[label] + tokens[j]; the vector is table[label]. Table N(0, 0.02), tokens N(0, 1/sqrt(width))."""

    def __init__(self, spec: LabelCondition, width: int, conditioning: Conditioning) -> None:
        super().__init__({"label": CondField((), torch.int64)}, spec.num_tokens)
        self.num_classes = spec.num_classes
        self.table = nn.Embedding(spec.num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.tokens = _tokens_parameter(spec.num_tokens, width) if conditioning == "in_context" else None

    def forward(self, cond: Cond) -> CondTokens:
        """See `Conditioner.forward`."""
        assert self.tokens is not None
        return CondTokens(self.table(cond["label"])[:, None] + self.tokens)

    def vector(self, cond: Cond) -> Float[Tensor, "B D"]:
        """See `Conditioner.vector`."""
        return self.table(cond["label"])

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """See `Conditioner.null_cond`."""
        return {"label": torch.full_like(cond["label"], self.num_classes)}

    def check(self, cond: Cond) -> None:
        """See `Conditioner.check`."""
        super().check(cond)
        label = cond["label"]
        bad = label[(label < 0) | (label > self.num_classes)]
        if len(bad):
            raise SpecError(
                "cond.label", "label out of range", got=bad[:5].tolist(), expected=f"0 to {self.num_classes - 1}",
                hint=f"The label {self.num_classes} is the unconditional one.",
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Text


def visible(mask: Bool[Tensor, "B M"]) -> Bool[Tensor, "B M"] | None:
    """The mask, or None where every token is attended, so that fused attention kernels can be used.

    It reads the values; the mask stays where there are none to read (meta device, compilation).
    """
    if mask.is_meta or torch.compiler.is_compiling():
        return mask
    return None if bool(mask.all()) else mask


class TextCondition(ConditionSpec):
    """{"text_tokens": (B, M, dim), "text_mask": (B, M) bool, True = attend}, outputs of a frozen text encoder.

    M may differ from batch to batch. `num_null_tokens` 0: the unconditional prompt is no visible token at all.
    Otherwise the module holds that many encoder outputs of the empty prompt, given once as `null_tokens`
    (num_null_tokens, dim) and saved with the weights.
    """

    kind: Literal["text"] = "text"
    dim: int = Field(gt=0, description="width of the text encoder")
    max_tokens: int = Field(256, gt=0, description="longest caption; used for estimates")
    num_null_tokens: int = Field(0, ge=0, description="visible tokens of the empty prompt")
    adapter: Literal["none", "mlp"] = Field("none", description="mlp: two layers with GELU in place of one")
    null_tokens: Any = Field(None, exclude=True, repr=False)

    def build(self, width: int, latent_shape: LatentShape, conditioning: Conditioning) -> Conditioner:
        """See `ConditionSpec.build`."""
        if conditioning != "in_context":
            raise SpecError("generator.conditioning", "text needs tokens", got=conditioning, expected="in_context")
        return TextConditioner(self, width)


class TextConditioner(Conditioner):
    """proj(RMSNorm(text_tokens)), one token per text token; proj is a linear layer or an MLP, weights as PyTorch.

    No positions are added: the text encoder has put the order into its outputs.
    """

    null_tokens: Tensor

    def __init__(self, spec: TextCondition, width: int) -> None:
        fields = {"text_tokens": CondField((None, spec.dim)), "text_mask": CondField((None,), torch.bool)}
        super().__init__(fields, spec.max_tokens)
        self.norm = RMSNorm(spec.dim)
        self.proj: nn.Module = nn.Linear(spec.dim, width)
        if spec.adapter == "mlp":
            self.proj = nn.Sequential(nn.Linear(spec.dim, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.register_buffer("null_tokens", torch.zeros(spec.num_null_tokens, spec.dim))
        if spec.null_tokens is not None:
            self.null_tokens.copy_(spec.null_tokens)

    def forward(self, cond: Cond) -> CondTokens:
        """See `Conditioner.forward`. What stands in padding has no influence, not even NaN."""
        present = cond["text_mask"].bool()
        tokens = cond["text_tokens"].masked_fill(~present[..., None], 0)
        return CondTokens(self.proj(self.norm(tokens)), visible(present))

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """See `Conditioner.null_cond`."""
        tokens, mask = torch.zeros_like(cond["text_tokens"]), torch.zeros_like(cond["text_mask"])
        count = len(self.null_tokens)
        if count > tokens.shape[1]:
            raise SpecError(
                "cond.text_tokens", "shorter than the empty prompt", got=tokens.shape[1], expected=f"at least {count}",
                hint="Pad the captions.",
            )  # fmt: skip
        tokens[:, :count] = self.null_tokens.to(tokens.dtype)
        mask[:, :count] = 1
        return {"text_tokens": tokens, "text_mask": mask}


# ---------------------------------------------------------------------------------------------------------------------
# Past frames and motion


class FramesCondition(ConditionSpec):
    """{"context_latents": (B, K, C, H, W), "action": (B, action_dim), "rel_time": (B, 1)}; unconditional: zeros.

    `frame_positions` adds a learned embedding per frame and fixed 2-D positions to the context tokens. The RAEv2 code
    has neither, so its trunk sees the context as an unordered set of patches; turn it off for weights from there.
    """

    kind: Literal["frames"] = "frames"
    num_frames: int = Field(4, ge=1)
    patch_size: int = Field(1, ge=1)
    action_dim: int = Field(3, ge=1)
    num_action_tokens: int = Field(4, ge=1)
    frame_positions: bool = True

    def build(self, width: int, latent_shape: LatentShape, conditioning: Conditioning) -> Conditioner:
        """See `ConditionSpec.build`."""
        if conditioning != "in_context":
            raise SpecError("generator.conditioning", "frames need tokens", got=conditioning, expected="in_context")
        return FramesConditioner(self, width, latent_shape)


class FramesConditioner(Conditioner):
    """Context patches, then action tokens, then one time token.

    context  PatchEmbed(latents of frame k) + frames[k] + positions     K * N tokens, weights as PyTorch
    action   action_tokens[j] + Linear(action)                          tokens N(0, 1/sqrt(width))
    time     time_token + FourierEmbed(rel_time)                        the same
    """

    positions: Tensor

    def __init__(self, spec: FramesCondition, width: int, latent_shape: LatentShape) -> None:
        channels, height, cols = latent_shape
        num_patches = (height // spec.patch_size) * (cols // spec.patch_size)
        fields = {
            "context_latents": CondField((spec.num_frames, *latent_shape)),
            "action": CondField((spec.action_dim,)),
            "rel_time": CondField((1,)),
        }
        super().__init__(fields, spec.num_frames * num_patches + spec.num_action_tokens + 1)
        self.patch_size = spec.patch_size
        self.context_embed = PatchEmbed(channels, width, spec.patch_size)
        self.action_proj = nn.Linear(spec.action_dim, width)
        self.action_tokens = _tokens_parameter(spec.num_action_tokens, width)
        self.time_embed = FourierEmbed(width)
        self.time_embed.init_weights()
        self.time_token = _tokens_parameter(1, width)
        self.frames = _tokens_parameter(spec.num_frames, width) if spec.frame_positions else None
        positions = sincos_2d(width, height // spec.patch_size, cols // spec.patch_size)
        self.register_buffer("positions", positions if spec.frame_positions else None, persistent=False)

    def forward(self, cond: Cond) -> CondTokens:
        """See `Conditioner.forward`."""
        frames = cond["context_latents"]
        context = self.context_embed(patchify(frames.flatten(0, 1), self.patch_size))  # (B * K, N, D)
        context = context.unflatten(0, frames.shape[:2])
        if self.frames is not None:
            context = context + self.frames[:, None] + self.positions
        action = self.action_proj(cond["action"])[:, None] + self.action_tokens
        time = self.time_embed(cond["rel_time"][:, 0])[:, None] + self.time_token
        return CondTokens(torch.cat([context.flatten(1, 2), action, time], dim=1))

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """See `Conditioner.null_cond`."""
        return {name: torch.zeros_like(value) for name, value in cond.items()}


# ---------------------------------------------------------------------------------------------------------------------
# From a saved configuration

CONDITION_TYPES: tuple[type[ConditionSpec], ...] = (NoCondition, LabelCondition, TextCondition, FramesCondition)


def condition_spec(data: Mapping[str, Any], extra_types: Sequence[type[ConditionSpec]] = ()) -> ConditionSpec:
    """The condition spec that a saved configuration describes; `extra_types` are kinds from outside the core."""
    types = {type_.model_fields["kind"].default: type_ for type_ in (*CONDITION_TYPES, *extra_types)}
    kind = data.get("kind")
    if kind not in types:
        raise SpecError(
            "condition.kind", "unknown condition", got=kind, expected=f"one of {', '.join(sorted(types))}",
            hint="Install the plugin that defines it and pass its class in `condition_types`.",
        )  # fmt: skip
    try:
        return types[kind].model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"condition.{'.'.join(map(str, first['loc']))}", first["msg"], got=first["input"]) from error
