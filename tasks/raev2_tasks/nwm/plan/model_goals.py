"""Planning problems of a trained run, and the score that its world model gives to commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from raev2.data import to_float
from raev2_tasks.nwm.drive.model_world import TrainedModel, as_frame
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.plan.planning import Array, Goal, Motion, PlanSpec, cost_between
from raev2_tasks.nwm.rollout import RolloutSession


class ModelGoals:
    """Planning problems of a trained run: frames of the validation split some seconds ahead."""

    def __init__(self, run: str | None) -> None:
        self.model = TrainedModel.open(run)
        self.run_dir, self.name = self.model.run.dir, str(self.model.run.dir)
        self.motion = Motion.of(self.model.velocities)
        self.spacing_m = float(self.model.context.dataset("train").manifest["spacing_m"])

    def goals(self, num: int, seconds: float, spec: PlanSpec) -> Iterable[Goal]:
        """See `GoalSource.goals`."""
        places, predictor = self.model.places(num, seconds)
        times = [(step + 1) * spec.step_s for step in range(spec.num_steps(seconds))]
        for place in range(len(places)):
            start, goal = places.images([place], 0.0), places.images([place], seconds)
            true_path = np.stack([np.asarray(places.motions([place], 0.0, time))[0] for time in times])
            target = (predictor.encode(goal) if spec.cost == "latent" else to_float(goal))[0]
            score = model_score(self.model, predictor, predictor.session([place]), target, spec, place)
            yield Goal(f"place {place}", true_path, as_frame(start), as_frame(goal), score)


def model_score(
    model: TrainedModel, predictor: Predictor, start: RolloutSession, goal: Tensor, spec: PlanSpec, number: int
) -> Callable[[Array, float], Array]:
    """Score of commands by rollouts from `start`; all candidates see the same noise.

    goal     latents (C, H, W), or image (3, Hpx, Wpx) in [0, 1] for the pixel cost
    number   of the goal; selects the noise
    """

    def score(commands: Array, seconds: float) -> Array:
        costs = np.zeros(len(commands))
        for repeat in range(spec.repeats):
            session = start.branch([0] * len(commands), ids=[number * spec.repeats + repeat] * len(commands))
            session.sampling = session.sampling.replace(steps=spec.sampler_steps or session.sampling.steps)
            for step in range(commands.shape[1]):
                latents = model.step(session, commands[:, step], seconds)
            seen = latents if spec.cost == "latent" else to_float(predictor.decode(latents))
            costs += cost_between(spec.cost, seen, goal.to(seen.device)) / spec.repeats
        return costs

    return score
