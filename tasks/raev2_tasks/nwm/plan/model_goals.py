"""Planning problems of a trained run, and the score that its world model gives to commands."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from raev2.data import to_float
from raev2.model.opened import Source
from raev2_tasks.nwm.data.own_start import OwnFile, own_goal
from raev2_tasks.nwm.drive.model_world import as_frame, open_run, own_place, places_ahead, recorded_velocities
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.plan.planning import Array, Goal, Motion, OwnGoal, PlanSpec, Score, cost_between
from raev2_tasks.nwm.rollout import RolloutSession


class ModelGoals:
    """Planning problems of a trained run: frames of the validation split some seconds ahead."""

    def __init__(self, run: Source | str | None) -> None:
        trained = open_run(run)
        self.run_dir, self.name, self.context = trained.run.dir, str(trained.run.dir), trained.context()
        self.motion = Motion.of(recorded_velocities(self.context))

    def goals(self, num: int, seconds: float, spec: PlanSpec) -> Iterable[Goal]:
        """Planning problems, one after the other."""
        places, predictor = places_ahead(self.context, num, seconds)
        times = [(step + 1) * spec.step_s for step in range(spec.num_steps(seconds))]
        for place in range(len(places)):
            start, goal = places.images([place], 0.0), places.images([place], seconds)
            true_path = np.stack([np.asarray(places.motions([place], 0.0, time))[0] for time in times])
            score = self._score(predictor, place, goal, spec)
            yield Goal(f"place {place}", true_path, places.spacing_m(place), as_frame(start), as_frame(goal), score)

    def own_goal(self, own: OwnFile, goal: Path, spec: PlanSpec) -> OwnGoal:
        """From your own picture or clip to your own picture; nothing is known of the true path."""
        start, predictor = own_place(self.context, own)
        wanted = own_goal(goal, start.dataset)
        score = self._score(predictor, 0, wanted, spec)
        return OwnGoal(as_frame(start.images([0], 0.0)), as_frame(wanted), score)

    def _score(self, predictor: Predictor, place: int, goal: Tensor, spec: PlanSpec) -> Score:
        """Of commands from a place to a frame (1, 3, Hpx, Wpx)."""
        target = (self.context.encode(goal) if spec.cost == "latent" else to_float(goal))[0]
        return model_score(predictor, predictor.session([place]), target, spec, place)


def model_score(predictor: Predictor, start: RolloutSession, goal: Tensor, spec: PlanSpec, number: int) -> Score:
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
                latents = predictor.step(session, commands[:, step], seconds)
            seen = latents if spec.cost == "latent" else to_float(predictor.context.decode(latents))
            costs += cost_between(spec.cost, seen, goal.to(seen.device)) / spec.repeats
        return costs

    return score
