"""The task's own fields."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raev2.spec import TaskSpec


class ClassToImageSpec(TaskSpec):
    """Class-conditional (or unconditional) image generation."""

    name: Literal["imagenet"] = "imagenet"
    num_classes: int | None = Field(None, gt=0, description="null: counted from the dataset's class list")
    num_class_tokens: int = Field(8, ge=1, description="in-context tokens of a label (8 in RAEv2)")
    unconditional: bool = Field(False, description="train without labels; the only choice for unlabelled data")
    eval_labels: Literal["validation", "balanced", "uniform"] = Field(
        "validation",
        description="labels of samples that are asked for without a protocol; protocols name their own policy",
    )
