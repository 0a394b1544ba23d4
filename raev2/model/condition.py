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
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from raev2.batch import Cond, CondTokens, FrameCache, drop_cond
from raev2.errors import SpecError
from raev2.model.dit import Trunk
from raev2.nn import RMSNorm
from raev2.shapes import LatentShape, Vectors
from raev2.spec import Spec, TrunkSpec


@dataclass(frozen=True)
class CondField:
    """Shape without the batch axis (None: any length) and dtype of one tensor of a condition."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32


class Conditioner(nn.Module, ABC):
    """Raw condition -> what the trunk sees. Trained and saved with the generator.

    fields           the tensors of the condition by name
    optional_fields  tensors that may be absent
    num_tokens       number of condition tokens, for a condition of free length the largest one
    free_size        what stands for a free length in `example_cond`
    parts            names of the parts that can be absent alone; none: a condition is there or is not
    """

    parts: tuple[str, ...] = ()

    def __init__(self, fields: Mapping[str, CondField], num_tokens: int) -> None:
        super().__init__()
        self.fields = dict(fields)
        self.optional_fields: dict[str, CondField] = {}
        self.num_tokens = self.free_size = num_tokens

    @abstractmethod
    def forward(self, cond: Cond) -> CondTokens | None:
        """Tokens for an in-context trunk; None when there are none."""

    @abstractmethod
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """The unconditional condition in the shapes, dtypes and on the device of `cond`."""

    @property
    def reads_trunk(self) -> bool:
        """Whether `prepare` computes with weights of the trunk's blocks, outside of their forward."""
        return type(self).prepare is not Conditioner.prepare

    def vector(self, cond: Cond) -> Vectors | None:
        """One vector per sample for an adaLN trunk; None when there is nothing to add."""
        raise SpecError(
            "generator.conditioning", f"{type(self).__name__} has no vector form", got="adaln", expected="in_context"
        )

    def complete(self, cond: Cond) -> dict[str, Tensor]:
        """`cond` with the defaults of absent optional tensors."""
        return dict(cond)

    def prepare(self, cond: Cond, trunk: Trunk, frames: FrameCache | None = None) -> dict[str, Tensor]:
        """`complete(cond)` with all that depends on it and on the trunk alone: `Generator.prepare_cond`."""
        return self.complete(cond)

    def is_prepared(self, cond: Cond) -> bool:
        """Whether `prepare` has already computed its part of `cond`."""
        return False

    def encode_frames(self, latents: Float[Tensor, "U C H W"], trunk: Trunk) -> FrameCache:
        """Past frames as every block of the trunk sees them, for `prepare`: `Generator.encode_frames`."""
        raise SpecError(
            "encode_frames", "this condition has no frames that can be cached", got=type(self).__name__,
            expected="FramesCondition(form='block_causal')",
        )  # fmt: skip

    def without(self, cond: Cond, parts: Sequence[str] = ()) -> dict[str, Tensor]:
        """`complete(cond)` without some of its `parts`; by default without all: `null_cond`."""
        self.check_parts(parts)
        return self.null_cond(cond)

    def drop(self, cond: Cond, uniform: Float[Tensor, " B"], prob: float) -> dict[str, Tensor]:
        """What training does to a condition: samples whose number in [0, 1) is below `prob` lose theirs."""
        cond = self.complete(cond)
        return drop_cond(cond, self.null_cond(cond), uniform < prob)

    def check_parts(self, parts: Sequence[str]) -> None:
        """Raise `SpecError` unless these are parts of the condition."""
        unknown = [part for part in parts if part not in self.parts]
        if unknown:
            raise SpecError(
                "guidance.drop", "no part of this condition", got=unknown,
                expected=f"some of {', '.join(self.parts)}" if self.parts else "nothing: it has no parts",
            )  # fmt: skip

    def check(self, cond: Cond) -> None:
        """Raise `SpecError` unless a raw condition has the right names, shapes and values.

        Reads values: not for inner loops.
        """
        fields = self.fields | self.optional_fields
        if not self.fields.keys() <= cond.keys() <= fields.keys():
            optional = f" and perhaps {sorted(self.optional_fields)}" if self.optional_fields else ""
            raise SpecError("cond", "wrong names", got=sorted(cond), expected=f"{sorted(self.fields)}{optional}")
        batch_sizes = {name: value.shape[0] for name, value in cond.items() if value.ndim}
        if len(set(batch_sizes.values())) > 1:
            raise SpecError("cond", "tensors disagree in the batch axis", got=batch_sizes)
        for name, value in cond.items():
            shape, expected = tuple(value.shape), ("B", *fields[name].shape)
            if len(shape) != len(expected) or any(
                want not in ("B", None, have) for want, have in zip(expected, shape, strict=True)
            ):
                text = ", ".join("any" if size is None else str(size) for size in expected)
                raise SpecError(f"cond.{name}", "wrong shape", got=shape, expected=f"({text})")

    def example_cond(self, batch_size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """A condition of zeros with the right shapes, for counting, compiling and tests."""
        cond = {}
        for name, field in self.fields.items():
            shape = [self.free_size if size is None else size for size in field.shape]
            cond[name] = torch.zeros(batch_size, *shape, dtype=field.dtype, device=device)
        return self.complete(cond)


class ConditionSpec(Spec, ABC):
    """Base of the condition specs; `kind` names the class in a saved model."""

    kind: str

    @abstractmethod
    def build(self, network: TrunkSpec, latent_shape: LatentShape) -> Conditioner:
        """The module for this network; raises `SpecError` when they do not fit."""


def need_tokens(network: TrunkSpec, what: str) -> None:
    """Raise `SpecError` for a network that takes its condition as a vector."""
    if network.conditioning != "in_context":
        raise SpecError(
            "generator.conditioning", f"{what} needs tokens", got=network.conditioning, expected="in_context"
        )


def tokens_parameter(count: int, width: int) -> nn.Parameter:
    """Learned tokens, N(0, 1/sqrt(width))."""
    return nn.Parameter(nn.init.normal_(torch.empty(count, width), std=width**-0.5))


# No condition


class NoCondition(ConditionSpec):
    """An unconditional generator; its condition is an empty mapping."""

    kind: Literal["none"] = "none"

    @override
    def build(self, network: TrunkSpec, latent_shape: LatentShape) -> Conditioner:
        return NoConditioner({}, num_tokens=0)


class NoConditioner(Conditioner):
    """Adds nothing."""

    @override
    def forward(self, cond: Cond) -> None:
        return None

    vector = forward

    @override
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {}


# Class label


class LabelCondition(ConditionSpec):
    """{"label": (B,) int}; the label `num_classes` means unconditional."""

    kind: Literal["label"] = "label"
    num_classes: int = Field(gt=0)
    num_tokens: int = Field(8, ge=1, description="condition tokens of an in-context trunk")

    @override
    def build(self, network: TrunkSpec, latent_shape: LatentShape) -> Conditioner:
        return LabelConditioner(self, network)


class LabelConditioner(Conditioner):
    """Token j is table[label] + tokens[j]; the vector is table[label]. Table N(0, 0.02), tokens N(0, 1/sqrt(width))."""

    def __init__(self, spec: LabelCondition, network: TrunkSpec) -> None:
        super().__init__({"label": CondField((), torch.int64)}, spec.num_tokens)
        self.num_classes = spec.num_classes
        self.table = nn.Embedding(spec.num_classes + 1, network.width)
        nn.init.normal_(self.table.weight, std=0.02)
        in_context = network.conditioning == "in_context"
        self.tokens = tokens_parameter(spec.num_tokens, network.width) if in_context else None

    @override
    def forward(self, cond: Cond) -> CondTokens:
        assert self.tokens is not None
        return CondTokens(self.table(cond["label"])[:, None] + self.tokens)

    @override
    def vector(self, cond: Cond) -> Vectors:
        return self.table(cond["label"])

    @override
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {"label": torch.full_like(cond["label"], self.num_classes)}

    @override
    def check(self, cond: Cond) -> None:
        super().check(cond)
        label = cond["label"]
        bad = label[(label < 0) | (label > self.num_classes)]
        if len(bad):
            raise SpecError(
                "cond.label", "label out of range", got=bad[:5].tolist(), expected=f"0 to {self.num_classes - 1}",
                hint=f"The label {self.num_classes} is the unconditional one.",
            )  # fmt: skip


# Text


def visible(mask: Bool[Tensor, "B M"]) -> Bool[Tensor, "B M"] | None:
    """The mask, or None where every token is attended, so that fused attention kernels can be used.

    It reads the values; the mask stays where there are none to read (meta device, tensors without values, compilation).
    """
    if mask.is_meta or type(mask) is not Tensor or torch.compiler.is_compiling():
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

    @override
    def build(self, network: TrunkSpec, latent_shape: LatentShape) -> Conditioner:
        need_tokens(network, "text")
        return TextConditioner(self, network.width)


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

    @override
    def forward(self, cond: Cond) -> CondTokens:
        """What stands in padding has no influence, not even NaN."""
        present = cond["text_mask"].bool()
        tokens = cond["text_tokens"].masked_fill(~present[..., None], 0)
        return CondTokens(self.proj(self.norm(tokens)), visible(present))

    @override
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
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
