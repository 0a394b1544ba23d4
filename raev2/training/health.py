"""What goes wrong in a training although every number is finite: rules on the numbers of its logged steps.

Thresholds are far from what good trainings show, so that an alarm means something. None of them stops a training.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from raev2.training.parallel import local

logger = logging.getLogger(__name__)
Numbers = Mapping[str, float]
WINDOW, FEW = 20, 10  # logged steps that rules see, and how many they need at least


def exploded(steps: Sequence[Numbers]) -> bool:
    """The loss is more than 10 times the median of the steps before."""
    before = [step["loss"] for step in steps[:-1]]
    return len(before) >= FEW and steps[-1]["loss"] > 10 * median(before)


def dead(steps: Sequence[Numbers]) -> bool:
    """The loss is the same number, to a millionth, in all steps: nothing reaches the weights."""
    losses = [step["loss"] for step in steps]
    return len(losses) >= FEW and max(losses) - min(losses) <= 1e-6 * abs(max(losses))


def latents_off(steps: Sequence[Numbers]) -> bool:
    """Latents should have mean 0 and deviation 1; so far from it, the statistics belong to other data or weights."""
    mean, std = (median(step.get(name, default) for step in steps) for name, default in (("mean", 0.0), ("std", 1.0)))
    return len(steps) >= FEW and (abs(mean) > 1 or not 1 / 3 < std < 3)


def collapsed(steps: Sequence[Numbers]) -> bool:
    """Outputs of different inputs differ by less than a hundredth of what their targets differ by, in all steps."""
    return len(steps) == WINDOW and all(step.get("spread", 1.0) < 0.01 for step in steps)


def average_far(steps: Sequence[Numbers]) -> bool:
    """Averaged weights are farther from the weights than these are from zero."""
    return steps[-1].get("average_distance", 0.0) > 1


def discriminator_not_finite(steps: Sequence[Numbers]) -> bool:
    """The loss of the discriminator is nan or infinite; its steps are skipped, and it learns nothing."""
    return not math.isfinite(steps[-1].get("disc", 0.0))


RULES: tuple[Callable[[Sequence[Numbers]], bool], ...] = (
    exploded, dead, latents_off, collapsed, average_far, discriminator_not_finite,
)  # fmt: skip


class Health:
    """Applies the rules at logged steps; a rule that begins to hold is one event, and one line."""

    def __init__(self, log: Callable[..., None], stage: str) -> None:
        self.log, self.stage, self.holding = log, stage, set[str]()
        self.steps: deque[Numbers] = deque(maxlen=WINDOW)

    def check(self, images: int, step: int, numbers: Numbers) -> None:
        """Look at one more step."""
        self.steps.append(numbers)
        holding = {rule.__name__: str(rule.__doc__) for rule in RULES if rule(list(self.steps))}
        for name in holding.keys() - self.holding:
            logger.warning("%s step %d: %s. %s", self.stage, step, name.replace("_", " "), holding[name])
            self.log(stage=self.stage, kind="event", event=name, images=images, step=step, finding=holding[name])
        self.holding = set(holding)


@torch.no_grad()
def spread(output: Tensor, target: Tensor) -> float:
    """How much outputs of a batch differ from each other, as a share of how much their targets do; 1 for one sample."""
    if len(output) < 2:
        return 1.0
    output_std, target_std = (value.float().std(0).mean() for value in (output, target))
    return float(output_std / target_std.clamp_min(1e-9))


@torch.no_grad()
def distance(averages: Mapping[str, Tensor], model: torch.nn.Module) -> float:
    """Norm of (averages - weights) over the norm of the weights, of the part that this process has."""
    weights = dict(model.named_parameters())
    pairs = [(local(average), local(weights[name])) for name, average in averages.items()]
    apart = torch.stack([(average - weight).square().sum() for average, weight in pairs]).sum()
    whole = torch.stack([weight.square().sum() for _, weight in pairs]).sum()
    return float((apart / whole.clamp_min(1e-30)).sqrt())
