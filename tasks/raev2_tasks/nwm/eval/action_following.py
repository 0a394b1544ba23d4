"""Does the model obey? The motion that generated frames show, against the motion that was commanded.

A network trained on pairs of real training frames (inverse_dynamics.py) reads the motion from the last context frame
and the generated frame. Its own error on real validation pairs stands beside every number. Commands are the true ones,
and for `swapped` those of another place: what past and time suggest is then of no help.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raev2.batch import MetricResult
from raev2.data import ImageDataset, to_float
from raev2.eval.features import load_encoder
from raev2.eval.generate import collect
from raev2.files.replace import new_file
from raev2.task import EvalContext, Evaluator
from raev2.training import dist
from raev2_tasks.nwm.data.dataset import as_trajectories
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.eval.inverse_dynamics import InverseDynamics, fit, pair_inputs
from raev2_tasks.nwm.eval.metrics import correlation, mean
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.rollout import RolloutSession
from raev2_tasks.nwm.spec import NavigationSpec, task_spec

logger = logging.getLogger(__name__)
CHUNK_SIZE = 16
OFFSETS_S = (0.5, 1.0)  # between frames so far apart motion is read
NUM_PAIRS = 4_000  # real pairs that the judge is trained on
JUDGE = "micro"  # its encoder
PARTS = ("forward", "left", "turn")
KINDS = {
    "": "true commands",
    "swapped": "commands of another place",
    "no_action": "without the command",  # the same model: what past and time alone tell
    "real": "true frames, how well motion can be read",
}


class ActionFollowing(Evaluator):
    """Correlation and error between commanded and shown motion, with intervals.

    `turn_corr@0.5s` is the correlation of turns at jumps of 0.5 s, `turn_error_deg@0.5s` the mean absolute difference;
    the same for `forward` (metres). `..._real` is the judge on true frames and thereby the scale.
    """

    protocol = "action-following"
    needs_generator = True

    def __init__(self, task: NavigationSpec, *, num_places: int, blind: bool) -> None:
        """blind: whether the model can be asked without a command."""
        self.offsets_s = tuple(s for s in OFFSETS_S if s <= task.max_offset_s) or (task.max_offset_s,)
        self.num_places = num_places
        self.kinds = [kind for kind in KINDS if kind != "no_action" or blind]
        self.description = f"motion shown by frames generated from {num_places:,} places of 'val', read by a network"

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """What the numbers depend on, for the result file."""
        places = self._places(context)
        return {
            "label_policy": "; ".join(f"{kind or 'unnamed'}: {KINDS[kind]}" for kind in self.kinds),
            "places": places.identity,
            "coverage": places.coverage,
            "judge": self._judge_identity(context.dataset("train")),
        }

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """For each offset and part of the motion: correlation and error of every kind."""
        places, judge = self._places(context), self._judge(context)
        predictor = Predictor(context, places)

        def shown(start: RolloutSession, motions: np.ndarray, time: float) -> Tensor:
            return context.decode(predictor.jump(start, motions, time))

        def rows(indices: Sequence[int]) -> dict[str, Tensor]:
            others = [(index + len(places) // 2) % len(places) for index in indices]
            now, values = places.images(indices, 0.0), {}
            start = predictor.session(indices)
            blind = predictor.session(indices, use_action=False) if "no_action" in self.kinds else None
            for time in self.offsets_s:
                own, other = (places.motions(rows, 0.0, time) for rows in (indices, others))
                commands = {"": own, "swapped": other, "real": own, "no_action": own}
                frames = {
                    "": shown(start, own, time),
                    "swapped": shown(start, other, time),
                    "real": places.images(indices, time),
                }
                if blind is not None:
                    frames["no_action"] = shown(blind, own, time)
                for kind in self.kinds:
                    values[f"command/{kind}/{time:g}"] = torch.as_tensor(commands[kind])
                    values[f"shown/{kind}/{time:g}"] = judge(now, frames[kind], torch.full((len(indices),), time))
            return values

        found = collect(len(places), CHUNK_SIZE, rows, "places")
        for time in self.offsets_s:
            yield from self._results(found, f"{time:g}")

    def _results(self, found: Mapping[str, Tensor], time: str) -> Iterator[MetricResult]:
        for part, unit, factor in (("turn", "deg", 180 / math.pi), ("forward", "m", 1.0)):
            names = f"{part}_corr@{time}s", f"{part}_error_{unit}@{time}s"
            column = PARTS.index(part)
            for kind in self.kinds:
                command, shown = (found[f"{name}/{kind}/{time}"][:, column].double() for name in ("command", "shown"))
                difference = shown - command
                if part == "turn":
                    difference = (difference + math.pi) % (2 * math.pi) - math.pi
                suffix, scale = f"_{kind}" if kind else "", kind in ("no_action", "real")
                what = f"of the commanded motion ({part}) and the one read from the frame: {KINDS[kind]}."
                yield MetricResult(
                    *correlation(names[0] + suffix, command, shown), better="higher", about=f"Correlation {what}",
                    role="scale" if scale else "detail" if kind else "headline", of=names[0] if scale else None,
                    point=f"{time}s",
                )  # fmt: skip
                yield MetricResult(
                    *mean(names[1] + suffix, difference.abs() * factor), better="lower",
                    about=f"Mean absolute difference ({unit}) {what}", role="scale" if scale else "detail",
                    of=names[1] if scale else None, point=f"{time}s",
                )  # fmt: skip

    def _places(self, context: EvalContext) -> Places:
        val, index = as_trajectories(context.dataset("val")), task_spec(context.spec).index
        return Places(val, self.num_places, max(self.offsets_s), index)

    def _judge_identity(self, train: ImageDataset) -> dict[str, Any]:
        return {
            "encoder": JUDGE, "trained_on": train.fingerprint, "pairs": NUM_PAIRS, "offsets_s": list(self.offsets_s),
            "image_size": list(train.image_size), "preparation": train.preparation,
        }  # fmt: skip

    def _judge(self, context: EvalContext) -> InverseDynamics:
        """The judge, kept in `context.cache_dir`: it depends on data and encoder alone."""
        encoder, train = load_encoder(JUDGE, context.device), context.dataset("train")
        height, width = (
            encoder.input_size[0] // encoder.info.patch_size,
            encoder.input_size[1] // encoder.info.patch_size,
        )

        @torch.no_grad()
        def tokens(images_u8: Tensor) -> Tensor:
            with context.autocast("fp32"):
                return encoder(to_float(images_u8.to(context.device))).unflatten(1, (height, width)).cpu()

        identity = json.dumps({**self._judge_identity(train), "weights": encoder.fingerprint()}, sort_keys=True)
        file = context.cache_dir / f"inverse-dynamics-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        if not file.is_file() and dist.is_main():
            logger.info("training the inverse dynamics of %s on %d real pairs", self.protocol, NUM_PAIRS)
            inputs, motions = _real_pairs(train, tokens, self.offsets_s)
            context.cache_dir.mkdir(parents=True, exist_ok=True)
            with new_file(file, shared=True) as partial:
                save_file(fit(inputs, motions), partial, metadata={"identity": identity})
        dist.barrier()
        return InverseDynamics(tokens, load_file(file))


def _real_pairs(train: ImageDataset, tokens: Any, offsets_s: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Inputs and motions of pairs of training frames, at all offsets."""
    inputs, motions = [], []
    for time in offsets_s:
        places = Places(as_trajectories(train), NUM_PAIRS // len(offsets_s), time)
        for begin in range(0, len(places), 256):
            indices = range(begin, min(begin + 256, len(places)))
            times = torch.full((len(indices),), time)
            inputs.append(pair_inputs(tokens, places.images(indices, 0.0), places.images(indices, time), times))
            motions.append(torch.as_tensor(places.motions(indices, 0.0, time)))
    return torch.cat(inputs), torch.cat(motions)
