"""The values that travel between the parts; nothing else crosses a border."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from raev2.spec import FlowSpec

Better = Literal["lower", "higher"]
Role = Literal["headline", "scale", "detail"]
Cond = Mapping[str, Tensor]
"""Raw conditions of a task by name; every tensor has the batch as its leading axis."""


@dataclass(frozen=True)
class Batch:
    """Training or evaluation samples as the dataset gives them.

    images   8-bit RGB
    cond     raw conditions, before a task's frozen condition encoder
    key      index of each sample in its split
    """

    images: Tensor  # (B, 3, Hpx, Wpx) uint8
    cond: Cond
    key: Tensor  # (B,) int64


@dataclass(frozen=True)
class FrameCache:
    """Past frames as every block of a trunk sees them: a function of the frame and the weights alone.

    Keys are rotated by row and column, not by age, so that a cached frame can grow older; `tokens` are the embedded
    patches. Rows are frames; an index with one axis selects some (`cache[1:]`).
    """

    keys: Float[Tensor, "U L heads N d"]
    values: Float[Tensor, "U L heads N d"]
    tokens: Float[Tensor, "U N D"]

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> FrameCache:
        return FrameCache(self.keys[rows], self.values[rows], self.tokens[rows])

    def __len__(self) -> int:
        return len(self.keys)

    @staticmethod
    def cat(caches: Sequence[FrameCache]) -> FrameCache:
        """The frames of all caches, one after the other."""
        keys, values, tokens = zip(*((cache.keys, cache.values, cache.tokens) for cache in caches), strict=True)
        return FrameCache(torch.cat(keys), torch.cat(values), torch.cat(tokens))


@dataclass(frozen=True)
class PastFrames:
    """Keys and values of past frames, which the trunk attends to besides its own sequence.

    keys, values   rotated by row, column and age
    mask           True = attend
    age            of the trunk's own tokens, in frame periods: negative when they lie in the future
    """

    keys: Float[Tensor, "B L heads M d"]
    values: Float[Tensor, "B L heads M d"]
    mask: Bool[Tensor, "B M"]
    age: Float[Tensor, " B"]


@dataclass(frozen=True)
class CondTokens:
    """A condition as the trunk sees it. `mask` None means that every token is attended.

    at_image   added to the image tokens, place by place
    """

    tokens: Float[Tensor, "B M D"]
    mask: Bool[Tensor, "B M"] | None = None
    past: PastFrames | None = None
    at_image: Float[Tensor, "B N D"] | None = None


@dataclass(frozen=True)
class PathPoint:
    """A point on the path from data (t = 0) to noise (t = 1) with its regression target."""

    z_t: Float[Tensor, "B C H W"]
    t: Float[Tensor, " B"]
    velocity: Float[Tensor, "B C H W"]


@dataclass(frozen=True)
class ModelOutput:
    """Prediction of a generator (clean latents or velocity, by its flow spec).

    base_pred   the same prediction from the shallow base head, where the network has one
    hidden      tokens of the REPA projector (B, N, D_target), where the network has one
    """

    pred: Float[Tensor, "B C H W"]
    base_pred: Float[Tensor, "B C H W"] | None = None
    hidden: Float[Tensor, "B N D"] | None = None


@runtime_checkable
class CondRules(Protocol):
    """What guidance asks of a condition module: part of `Conditioner`."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The tensors of the condition by name; none: unconditional."""

    def check_parts(self, parts: Sequence[str]) -> None:
        """Raise `SpecError` unless these are parts of the condition."""

    def without(self, cond: Cond, parts: Sequence[str] = ()) -> Cond:
        """The condition without these parts, by default without all."""

    def is_prepared(self, cond: Cond) -> bool:
        """Whether `cond` comes from `prepare_cond`."""


@runtime_checkable
class Denoiser(Protocol):
    """What can be sampled: a `Generator` or a double of it."""

    flow: FlowSpec
    latent_shape: tuple[int, int, int]

    @property
    def conditioner(self) -> CondRules:
        """The condition module."""

    @property
    def time_shift(self) -> float:
        """s of t = s u / (1 + (s - 1) u)."""

    @property
    def has_base_head(self) -> bool:
        """Whether outputs have `base_pred`."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def __call__(self, z_t: Tensor, t: Tensor, cond: Cond) -> ModelOutput:
        """Prediction at noisy latents, times (B,) and a raw or prepared condition."""

    def prepare_cond(self, cond: Cond) -> Cond:
        """The condition with everything computed that depends on it alone."""

    def check_cond(self, cond: Cond) -> None:
        """Raise `SpecError` unless the condition has the right names, shapes and values."""


@dataclass(frozen=True)
class MetricResult:
    """One number of an evaluation, and what it means: the report knows nothing else about it.

    stderr   None: not estimated
    note     what this number depends on, such as an interval or a count
    warning  what forbids to read this number as it stands; terminal and report say it
    better   which values are better
    role     a headline gets a tile and a curve, a scale row is a known case that its metric is read against
    about    one sentence for the reader of a report, in plain words
    of       the metric that a scale row belongs to, by name
    point    what follows @ in the name, such as a horizon: the report makes a table with a column for each
    levels   values for which the report says how much training reached them (EP_<metric>@k)
    """

    name: str
    value: float
    num_samples: int
    stderr: float | None = None
    note: str = ""
    _: KW_ONLY
    warning: str = ""
    better: Better
    role: Role
    about: str
    of: str | None = None
    point: str | None = None
    levels: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One number of a benchmark; `note` says what it depends on."""

    name: str
    value: float
    unit: str
    note: str = ""


def cond_map(cond: Cond, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Apply `function` to every tensor of a condition."""
    return {name: function(value) for name, value in cond.items()}


def drop_cond(cond: Cond, null_cond: Cond, drop: Bool[Tensor, " B"]) -> dict[str, Tensor]:
    """Replace the condition by the null condition where `drop` is True, jointly over all of its tensors."""
    return {name: null_cond[name].where(drop.view(-1, *[1] * (value.ndim - 1)), value) for name, value in cond.items()}
