"""The task's own fields."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from raev2.spec import RunSpec, TaskSpec

Fit = Literal["squeeze", "crop", "letterbox", "none"]  # see data/frames.py


class NavigationSpec(TaskSpec):
    """A navigation world model: from past frames, a motion and a time to the frame seen there and then."""

    name: Literal["nwm"] = "nwm"

    # What the model sees.
    num_context: int = Field(4, ge=1, description="past frames, the last one is now")
    max_offset_s: float = Field(
        4.0, gt=0, description="targets lie up to so many seconds from now; nothing further is sampled or evaluated"
    )
    offset_distribution: Literal["uniform", "log-uniform", "mixture"] = Field(
        "mixture", description="of targets in time; mixture: half within 8 frames, half anywhere in the range"
    )
    past_targets: bool = Field(False, description="train on targets before now too")
    targets_per_context: int = Field(4, ge=1, description="targets in a row of the batch that share their context")
    context_drop_prob: float = Field(
        0.1, ge=0, le=1, description="share of training contexts that lose their oldest frames"
    )
    fit: Fit = Field("squeeze", description="how a camera frame becomes an image of the model's size")

    # How it is told.
    condition_form: Literal["block_causal", "in_context"] = Field(
        "block_causal", description="past frames computed once and cached, or as in RAEv2 among the other tokens"
    )
    frame_positions: bool = Field(True, description="in_context: positions of past frames; false in RAEv2")
    at_image: bool = Field(
        False, description="block_causal: the newest frame (place by place), motion and time go to the image tokens too"
    )
    num_action_tokens: int = Field(4, ge=1, description="tokens that carry the motion")
    action_drop_prob: float = Field(
        0.1, ge=0, le=1, description="block_causal: share of samples trained without their motion alone"
    )

    # What the protocols measure.
    horizons_s: tuple[PositiveFloat, ...] = Field(
        (1.0, 2.0, 4.0), min_length=1, description="times at which single jumps and rollouts are scored"
    )
    index: str | None = Field(
        None, description="frozen places, `index/<name>.json` of the data (`raev2 nwm index`); null: spread evenly"
    )
    num_rollouts: int = Field(64, gt=1, description="rollouts of the rollout protocols")

    @model_validator(mode="after")
    def _horizons(self) -> NavigationSpec:
        if list(self.horizons_s) != sorted(set(self.horizons_s)):
            raise ValueError(f"horizons_s must ascend without repeats; got {list(self.horizons_s)}")
        if self.horizons_s[0] > self.max_offset_s:
            raise ValueError(
                f"no horizon is within one jump; got horizons_s={list(self.horizons_s)} and "
                f"max_offset_s={self.max_offset_s:g}"
            )
        return self

    @property
    def jump_horizons_s(self) -> tuple[float, ...]:
        """The horizons that one jump may reach; longer ones are for rollouts alone."""
        return tuple(horizon for horizon in self.horizons_s if horizon <= self.max_offset_s)


def task_spec(spec: RunSpec) -> NavigationSpec:
    """The task's own part of a run spec."""
    assert isinstance(spec.task, NavigationSpec)
    return spec.task
