"""Past frames and motion as a condition, in two forms: cached past frames, and frames among the other tokens.

Read raev2/model/condition.py first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from raev2.batch import Cond, CondTokens, FrameCache, PastFrames, drop_cond
from raev2.errors import SpecError
from raev2.model.condition import CondField, Conditioner, ConditionSpec, need_tokens, tokens_parameter
from raev2.model.dit import Trunk
from raev2.nn import FourierEmbed, PatchEmbed, WaveEmbed, patchify, sincos_2d, waves
from raev2.shapes import LatentShape
from raev2.spec import TrunkSpec

_FRAME_FIELDS = ("context_latents", "context_age", "context_valid", "context_id")


class FramesCondition(ConditionSpec):
    """Past frames, a motion and a time: {"context_latents", "action", "rel_time"}.

    context_latents  (B, K, C, H, W)   normalised latents of past frames, the oldest first
    action           (B, 3)            pose of the target seen from the newest frame: forward and left in metres, yaw
                                       counter-clockwise in radians
    rel_time         (B, 1)            seconds from the newest frame to the target; negative: the past

    Optional, with what their absence means:

    context_age      (B, K)            seconds before the newest frame ((K - 1 - k) * frame_period)
    context_valid    (B, K) bool       whether a frame is there (all are)
    context_id       (B, K) int64      equal ids >= 0 in a batch are the same frame, which is then computed once
    has_action       (B,) bool         whether the motion is known (it is)
    has_time         (B,) bool         whether the time is known (it is)

    form="block_causal": the tokens of a frame attend within that frame alone, so that a frame is computed once and
    serves every step, target and motion (`Generator.prepare_cond`). Frames are placed by row, column and age. K may
    differ from batch to batch.

    form="in_context": the RAEv2 code. Frames are condition tokens like others, computed again at every step, and take
    no optional tensors; action (any `action_dim` numbers) and time are used as they come, zeros are unconditional.
    `frame_positions` adds a learned embedding per frame and fixed 2-D positions; the RAEv2 code has neither, so its
    trunk sees an unordered set of patches.
    """

    kind: Literal["frames"] = "frames"
    form: Literal["block_causal", "in_context"] = "block_causal"
    num_frames: int = Field(4, ge=1)
    patch_size: int = Field(1, ge=1)
    action_dim: int = Field(3, ge=1)
    num_action_tokens: int = Field(4, ge=1)
    spacing: float = Field(1.0, gt=0, description="block_causal: typical metres between two frames")
    frame_period: float = Field(0.25, gt=0, description="block_causal: seconds between two frames")
    max_time: float = Field(16.0, gt=0, description="block_causal: largest |rel_time| in seconds; more is an error")
    action_drop_prob: float = Field(
        0.0, ge=0, le=1, description="block_causal: share of training samples that lose their motion alone"
    )
    at_image: bool = Field(
        False,
        description="block_causal: also add the newest frame, place by place, and motion and time to the image tokens; "
        "a small network then need not learn first where to look",
    )
    frame_positions: bool = Field(True, description="in_context: positions of the context tokens")

    @model_validator(mode="after")
    def _form(self) -> FramesCondition:
        if self.form == "block_causal" and self.action_dim != 3:
            raise ValueError(f"a motion in the plane has 3 numbers; got action_dim={self.action_dim}")
        if self.max_time < self.frame_period:
            raise ValueError(f"max_time is below frame_period; got {self.max_time} and {self.frame_period}")
        return self

    @override
    def build(self, network: TrunkSpec, latent_shape: LatentShape) -> Conditioner:
        need_tokens(network, "a condition of frames")
        if self.form == "in_context":
            return InContextFrames(self, network.width, latent_shape)
        if self.patch_size != network.patch_size:  # frames share the trunk's positions
            raise SpecError(
                "condition.patch_size", "frames and noisy latents need the same patches", got=self.patch_size,
                expected=str(network.patch_size),
            )  # fmt: skip
        if network.width // network.num_heads < 8:  # their age needs some of its rotary angles
            raise SpecError(
                "generator.num_heads", "too few channels per head for rows, columns and the age of frames",
                got=f"{network.width // network.num_heads} channels", expected="at least 8",
            )  # fmt: skip
        return BlockCausalFrames(self, network.width, latent_shape)


class BlockCausalFrames(Conditioner):
    """Action tokens and a time token; past frames come as keys and values (`prepare` makes them).

    action   action_tokens[j] + MLP_j(normalised motion), or null_action
    time     time_token + MLP(rel_time), or null_time;  + null_context where no frame is there
    frames   PatchEmbed(latents), for `Trunk.encode_frames`;  at_image: Linear(newest frame) + Linear(SiLU(sum of
             the tokens of motion and time)) at the image tokens
    Tokens and nulls N(0, 1/sqrt(width)), weights as PyTorch.

    A prepared condition has `context_keys`, `context_values` (and `context_newest`) in the place of `context_latents`,
    `context_age` and `context_id`.
    """

    parts = ("context", "action", "time")

    def __init__(self, spec: FramesCondition, width: int, latent_shape: LatentShape) -> None:
        fields = {
            "context_latents": CondField((None, *latent_shape)), "action": CondField((3,)), "rel_time": CondField((1,))
        }  # fmt: skip
        super().__init__(fields, spec.num_action_tokens + 1)
        self.optional_fields = {
            "context_age": CondField((None,)),
            "context_valid": CondField((None,), torch.bool),
            "context_id": CondField((None,), torch.int64),
            "has_action": CondField((), torch.bool),
            "has_time": CondField((), torch.bool),
        }
        self.free_size = spec.num_frames
        self.spec = spec
        self.tokens_per_frame = latent_shape[1] * latent_shape[2] // spec.patch_size**2
        self.context_embed = PatchEmbed(latent_shape[0], width, spec.patch_size)
        max_frames = spec.max_time / spec.frame_period
        displacement, other = waves(2 / max_frames, 4.0), waves(0.5, 8.0)
        motion_waves = torch.stack([displacement] * 2 + [other] * 5)
        self.action_embed = WaveEmbed(motion_waves, width, spec.num_action_tokens * width)
        self.action_tokens = tokens_parameter(spec.num_action_tokens, width)
        self.time_embed = WaveEmbed(waves(2 * spec.frame_period, 4 * spec.max_time)[None], width, width)
        self.time_token = tokens_parameter(1, width)
        self.null_action = tokens_parameter(spec.num_action_tokens, width)
        self.null_time = tokens_parameter(1, width)
        self.null_context = tokens_parameter(1, width)
        self.newest_proj = nn.Linear(width, width) if spec.at_image else None
        self.motion_proj = nn.Linear(width, width) if spec.at_image else None

    def forward(self, cond: Cond) -> CondTokens:
        """Tokens of a prepared condition."""
        valid, has_time = cond["context_valid"], cond["has_time"][:, None]
        action = self.action_embed(self.normalised(cond)).unflatten(1, self.action_tokens.shape) + self.action_tokens
        action = torch.where(cond["has_action"][:, None, None], action, self.null_action.to(action.dtype))
        time = self.time_embed(cond["rel_time"])
        time = torch.where(has_time, time + self.time_token, self.null_time)
        time = time + self.null_context * ~valid.any(dim=1, keepdim=True)
        past = PastFrames(
            cond["context_keys"],
            cond["context_values"],
            mask=valid.repeat_interleave(self.tokens_per_frame, dim=1),
            age=-self.in_frames(cond["rel_time"].where(has_time, 0))[:, 0],
        )
        tokens, at_image = torch.cat([action, time[:, None].to(action.dtype)], dim=1), None
        if self.newest_proj is not None and self.motion_proj is not None:
            newest = self.newest_proj(cond["context_newest"]) * valid[:, -1, None, None]
            at_image = newest + self.motion_proj(F.silu(tokens.sum(dim=1)))[:, None]
        return CondTokens(tokens, past=past, at_image=at_image)

    def normalised(self, cond: Cond) -> Float[Tensor, "B 7"]:
        """The motion as numbers of order one; no motion is exactly 0 at every `rel_time`.

        d / spacing / most frames (2), d / spacing / frames (2), sin yaw, cos yaw - 1, yaw / frames
        """
        move, yaw = cond["action"].float().split([2, 1], dim=1)
        num_frames = self.in_frames(cond["rel_time"]).abs().clamp(min=1)
        steps = move / self.spec.spacing
        max_frames = self.spec.max_time / self.spec.frame_period
        return torch.cat([steps / max_frames, steps / num_frames, yaw.sin(), yaw.cos() - 1, yaw / num_frames], dim=1)

    def in_frames(self, seconds: Tensor) -> Tensor:
        """Seconds in frame periods, float32."""
        return seconds.float() / self.spec.frame_period

    def embed_frames(self, latents: Float[Tensor, "U C H W"]) -> Float[Tensor, "U N D"]:
        """Tokens of frames."""
        return self.context_embed(patchify(latents, self.spec.patch_size))

    @override
    def prepare(self, cond: Cond, trunk: Trunk, frames: FrameCache | None = None) -> dict[str, Tensor]:
        """Past frames become keys and values; with `frames`, "context_id" are its rows."""
        cond = self.complete(cond)
        if self.is_prepared(cond):
            return cond
        if frames is None:
            latents, index = self.distinct_frames(cond)
            frames = self.encode_frames(latents, trunk)
        else:
            index = cond["context_id"]
        keys, values = trunk.place_frames(frames, index, self.in_frames(cond["context_age"]))
        raw = ("context_latents", "context_age", "context_id")
        kept = {name: value for name, value in cond.items() if name not in raw}
        kept |= {"context_keys": keys, "context_values": values}
        return kept | ({"context_newest": frames.tokens[index[:, -1]]} if self.spec.at_image else {})

    @override
    def encode_frames(self, latents: Float[Tensor, "U C H W"], trunk: Trunk) -> FrameCache:
        alone = latents.device.type == "cpu" and not torch.is_grad_enabled()
        parts = latents.split(1) if alone else [latents]
        return FrameCache.cat([trunk.encode_frames(self.embed_frames(part)) for part in parts])

    def distinct_frames(self, cond: Cond) -> tuple[Float[Tensor, "U C H W"], Int[Tensor, "B K"]]:
        """The frames to compute, and which of them each context frame is. Without ids every frame is its own.

        Invalid frames are not computed; they point to any other frame, since nothing attends to them.
        """
        latents = cond["context_latents"]
        number = torch.arange(latents.shape[0] * latents.shape[1], device=latents.device)
        if "context_id" not in cond:
            return latents.flatten(0, 1), number.view(latents.shape[:2])
        ids, valid = cond["context_id"].flatten(), cond["context_valid"].flatten()
        names = ids.where(ids >= 0, -1 - number)
        names = names.where(valid, names[valid.int().argmax()])
        distinct, index = names.unique(return_inverse=True)
        order = number + len(number) * ~valid  # valid frames first
        first = order.new_full((len(distinct),), 2 * len(number)).scatter_reduce(0, index, order, "amin")
        return latents.flatten(0, 1)[first % len(number)], index.view(latents.shape[:2])

    @override
    def complete(self, cond: Cond) -> dict[str, Tensor]:
        """`context_id` has no default."""
        cond, action = dict(cond), cond["action"]
        for name in ("has_action", "has_time"):
            cond.setdefault(name, action.new_ones(len(action), dtype=torch.bool))
        frames = cond.get("context_id", cond.get("context_latents"))
        if frames is not None and not self.is_prepared(cond):
            batch_size, num_frames = frames.shape[:2]
            age = torch.arange(num_frames - 1, -1, -1, device=action.device) * self.spec.frame_period
            cond.setdefault("context_age", age.float().expand(batch_size, -1))
            cond.setdefault("context_valid", action.new_ones(batch_size, num_frames, dtype=torch.bool))
        return cond

    @override
    def is_prepared(self, cond: Cond) -> bool:
        return "context_keys" in cond

    @override
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return self.without(cond)

    @override
    def without(self, cond: Cond, parts: Sequence[str] = ()) -> dict[str, Tensor]:
        """What is flagged as absent is not looked at."""
        self.check_parts(parts)
        cond = self.complete(cond)
        flags = {"context": "context_valid", "action": "has_action", "time": "has_time"}
        return cond | {flags[part]: torch.zeros_like(cond[flags[part]]) for part in parts or self.parts}

    @override
    def check(self, cond: Cond) -> None:
        super().check(cond)
        num_frames = {name: value.shape[1] for name, value in cond.items() if name in _FRAME_FIELDS}
        if len(set(num_frames.values())) > 1:
            raise SpecError("cond", "tensors disagree in the number of context frames", got=num_frames)
        longest = cond["rel_time"].abs().max().item() if len(cond["rel_time"]) else 0
        if longest > self.spec.max_time * (1 + 1e-5):
            raise SpecError(
                "cond.rel_time", "outside the range of times that the generator was made for", got=f"{longest:g} s",
                expected=f"at most {self.spec.max_time:g} s", hint="Go there in several steps.",
            )  # fmt: skip

    @override
    def drop(self, cond: Cond, uniform: Float[Tensor, " B"], prob: float) -> dict[str, Tensor]:
        """A further share `action_drop_prob` of the samples loses its motion alone."""
        cond = super().drop(cond, uniform, prob)
        action_only = (uniform >= prob) & (uniform < prob + self.spec.action_drop_prob)
        return drop_cond(cond, self.without(cond, ("action",)), action_only)


class InContextFrames(Conditioner):
    """Context patches, then action tokens, then one time token; action and time enter as they are given.

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
        self.action_tokens = tokens_parameter(spec.num_action_tokens, width)
        self.time_embed = FourierEmbed(width)
        self.time_embed.init_weights()
        self.time_token = tokens_parameter(1, width)
        self.frames = tokens_parameter(spec.num_frames, width) if spec.frame_positions else None
        positions = sincos_2d(width, height // spec.patch_size, cols // spec.patch_size)
        self.register_buffer("positions", positions if spec.frame_positions else None, persistent=False)

    @override
    def forward(self, cond: Cond) -> CondTokens:
        frames = cond["context_latents"]
        context = self.context_embed(patchify(frames.flatten(0, 1), self.patch_size))  # (B * K, N, D)
        context = context.unflatten(0, frames.shape[:2])
        if self.frames is not None:
            context = context + self.frames[:, None] + self.positions
        action = self.action_proj(cond["action"])[:, None] + self.action_tokens
        time = self.time_embed(cond["rel_time"][:, 0])[:, None] + self.time_token
        return CondTokens(torch.cat([context.flatten(1, 2), action, time], dim=1))

    @override
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in cond.items()}
