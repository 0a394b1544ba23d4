"""Navigation world model: past frames, a motion and a time as condition; protocols for jumps, rollouts, obedience."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raev2.files.manifest import read_manifest
from raev2.spec import RunSpec
from raev2.task import EncodeImages, Evaluator, Task
from raev2_tasks.nwm.recipes import RECIPES
from raev2_tasks.nwm.spec import NavigationSpec, task_spec

if TYPE_CHECKING:
    import torch

    from raev2.batch import Cond, Measurement
    from raev2.data import ImageDataset
    from raev2.model.condition import ConditionSpec
    from raev2.model.frames import FramesCondition
    from raev2_tasks.nwm.data.dataset import TrajectoryDataset

ASSUMED_MOTION = {"spacing_m": 0.25, "rate_hz": 4.0}  # for estimates before there is data: RECON
COLUMNS = 8  # of the picture grids: one context a row, its frames at growing times


class NavigationWorldModel(Task):
    """The frame that is seen after a motion, from frames before it."""

    name = "nwm"
    summary = "past frames + motion + time -> next frame (simulated mazes, RECON, any video with poses)"
    spec_type = NavigationSpec

    def dataset(self, spec: RunSpec, split: str) -> TrajectoryDataset:
        """Frames of trajectories; a training sample is a context with one target of it."""
        from raev2_tasks.nwm.data.dataset import TrajectoryDataset

        task, rate_hz = task_spec(spec), read_manifest(spec.data.dir).get("rate_hz", 1.0)
        max_offset = max(1, round(task.max_offset_s * rate_hz))
        return TrajectoryDataset(
            spec.data.dir,
            split,
            spec.tokenizer.image_size,
            num_context=task.num_context,
            min_offset=-max_offset if task.past_targets else 1,
            max_offset=max_offset,
            offset_distribution=task.offset_distribution,
            targets_per_context=task.targets_per_context,
            context_drop_prob=task.context_drop_prob,
            fit=task.fit,
            cache=spec.data.cache,
        )

    def condition(self, spec: RunSpec, dataset: ImageDataset | None) -> ConditionSpec:
        """Past frames with motion and time; spacing and frame period are those of the data."""
        return _condition(spec, ASSUMED_MOTION if dataset is None else dataset.manifest)

    def cond_encoder(self, spec: RunSpec, encode: EncodeImages, device: torch.device) -> Callable[[Cond], Cond]:
        """Past frames as latents, each distinct one encoded once, in the units of the generator."""
        from raev2_tasks.nwm.cond import encode_context, model_cond

        condition = _condition(spec, read_manifest(spec.data.dir))
        return lambda raw: model_cond(condition, encode_context(raw, encode))

    def eval_cond(self, spec: RunSpec, dataset: ImageDataset, indices: Sequence[int]) -> Cond:
        """True motions from places of the validation split, to the middle horizon."""
        from raev2_tasks.nwm.data.dataset import as_trajectories
        from raev2_tasks.nwm.data.places import Places

        task = task_spec(spec)
        time = task.jump_horizons_s[len(task.jump_horizons_s) // 2]
        return Places(as_trajectories(dataset), spec.evaluation.num_samples, time).cond(indices, time)

    def sample_cond(
        self, spec: RunSpec, dataset: ImageDataset, options: Mapping[str, object]
    ) -> tuple[Cond, list[str]]:
        """Places of the validation split with their true motions: a place a row, at times up to the longest jump."""
        import torch

        from raev2_tasks.nwm.data.places import Places

        num, longest = int(str(options["n"])), task_spec(spec).max_offset_s
        val = self.dataset(spec, "val")
        places = Places(val, max(1, num // COLUMNS), longest)
        frames = places.frames(longest)
        times = [max(1, round((i + 1) * frames / COLUMNS)) * places.period_s for i in range(COLUMNS)]
        conds, captions = [], []
        for number in range(num):
            place, time = number // COLUMNS % len(places), times[number % COLUMNS]
            conds.append(places.cond([place], time))
            captions.append(f"+{time:g} s")
        return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}, captions

    def evaluators(self, spec: RunSpec) -> list[Evaluator]:
        """Protocols; the names say which features measure."""
        from raev2_tasks.nwm.eval.protocols import protocols

        return protocols(spec)

    def recipes(self) -> dict[str, Callable[[], RunSpec]]:
        """quickstart, laptop, the published systems, an ungated one, and one for several robots."""
        return RECIPES

    def commands(self) -> dict[str, Callable[[Sequence[str]], None]]:
        """rollout, plan, drive, validate, index."""
        from raev2_tasks.nwm.data import commands as data_commands
        from raev2_tasks.nwm.drive import page as drive
        from raev2_tasks.nwm.drive import rollout_command
        from raev2_tasks.nwm.plan import command as plan_command

        modules = (rollout_command, plan_command, drive, data_commands)
        return {name: command for module in modules for name, command in module.COMMANDS.items()}

    def benchmarks(self) -> dict[str, Callable[[], list[Measurement]]]:
        """A rollout frame with past frames cached, computed again at every step, and among the other tokens."""
        from raev2_tasks.nwm.bench import bench_rollout_frame

        return {"nwm": bench_rollout_frame}


def _condition(spec: RunSpec, manifest: Mapping[str, Any]) -> FramesCondition:
    from raev2.model.frames import FramesCondition

    task, frame_period = task_spec(spec), 1 / manifest["rate_hz"]
    return FramesCondition(
        form=task.condition_form,
        num_frames=task.num_context,
        patch_size=spec.generator.patch_size,
        num_action_tokens=task.num_action_tokens,
        spacing=manifest["spacing_m"],
        frame_period=frame_period,
        max_time=task.max_offset_s + frame_period / 2,  # recorded times jitter
        at_image=task.at_image and task.condition_form == "block_causal",
        action_drop_prob=task.action_drop_prob if task.condition_form == "block_causal" else 0.0,
        frame_positions=task.frame_positions,
    )
