"""Frames of trajectories with their context: what a navigation world model is trained and evaluated on.

Item i of a split is frame i, counted over all of its trajectories, so latents can be kept by frame. A training sample
is a target frame with a condition: the context frames, the motion and the time that lead from now to the target.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raev2.data import ImageDataset, derived_seed
from raev2.errors import DataError, SpecError
from raev2.files.images import read_rgb
from raev2.files.manifest import read_manifest
from raev2_tasks.nwm.data.frames import FITS, fit_image
from raev2_tasks.nwm.data.trajectories import StoredTrajectory, read_trajectories
from raev2_tasks.nwm.pose import Array, relative, steps
from raev2_tasks.nwm.spec import Fit

OffsetDistribution = Literal["uniform", "log-uniform", "mixture"]
NEAR_FRAMES = 8  # `mixture`: half of the draws are within so many frames


class TrajectoryDataset(ImageDataset):
    """One split of a folder of trajectories.

    num_context           frames of a context; the last one is now. Frames before the beginning of a trajectory are
                          marked invalid, and hold its first frame
    min_offset, max_offset  targets lie so many frames from now; negative ones in the past, 0 is never drawn
    offset_distribution   `uniform`; `log-uniform`, weight 1 / |offset|; `mixture`, half near (8 frames), half uniform
    targets_per_context   consecutive training samples that share their context
    context_drop_prob     share of training contexts of which a random number of the oldest frames is marked invalid
    fit                   how a stored frame becomes an image of `image_size` (raev2_tasks.nwm.data.frames)
    cache                 keep decoded frames in memory

    Every place (trajectory, now) that has a target occurs once per epoch, so each frame has equal weight.
    """

    group_kind = "trajectories"

    def __init__(
        self,
        dir: str | Path,
        split: str,
        image_size: tuple[int, int],
        *,
        num_context: int = 4,
        min_offset: int = 1,
        max_offset: int = 8,
        offset_distribution: OffsetDistribution = "uniform",
        targets_per_context: int = 4,
        context_drop_prob: float = 0.0,
        fit: Fit = "squeeze",
        cache: bool = False,
    ) -> None:
        if min_offset > max_offset or min_offset == max_offset == 0:
            raise SpecError("offsets", "empty range", got=f"{min_offset} to {max_offset}", expected="frames from now")
        self.dir, self.split, self.image_size, self.fit = Path(dir), split, image_size, fit
        self.num_context, self.min_offset, self.max_offset = num_context, min_offset, max_offset
        self.offset_distribution, self.targets_per_context = offset_distribution, targets_per_context
        self.context_drop_prob = context_drop_prob
        self.manifest = read_manifest(self.dir)
        self.trajectories = read_trajectories(self.dir, split)
        stored_fit = self.manifest["stored_fit"]
        if stored_fit not in (None, fit):
            raise DataError(
                f"data {self.dir}", "its frames are stored with another fit", got=stored_fit, expected=fit,
                hint=f"Set task.fit={stored_fit}, or build the data again.",
            )  # fmt: skip

        self._starts = np.cumsum([0, *map(len, self.trajectories)])
        self._numbers = {one.id: number for number, one in enumerate(self.trajectories)}
        self._contexts = self._find_contexts()
        self._context_order: tuple[tuple[int, int], Tensor] | None = None
        self._cache: dict[int, Tensor] | None = {} if cache else None

    # Frames.

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def rate_hz(self) -> float:
        """Nominal frames a second."""
        return self.manifest["rate_hz"]

    @property
    def spacing_m(self) -> float:
        """Mean distance between consecutive training frames, of all robots."""
        return self.manifest["spacing_m"]

    @property
    def preparation(self) -> str:
        """The fit, and whether it was done when the frames were stored."""
        stored = self.manifest["stored_fit"]
        return f"fit {self.fit}: {FITS[self.fit]}" + (f"; then {FITS['none']} from the stored size" if stored else "")

    def image(self, index: int) -> Tensor:
        """Frame `index` as uint8 (3, H_px, W_px)."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        number, frame = self.locate(index)
        file = self.trajectories[number].frame_file(frame)
        rgb = read_rgb(file, f"data {file}", f"Run `raev2 data verify {self.dir}`.")
        pixels = torch.from_numpy(np.array(self._fitted(rgb))).permute(2, 0, 1).contiguous()
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def cond(self, index: int) -> dict[str, Any]:
        """Nothing: a frame alone has no condition. See `sample_at`."""
        return {}

    def key(self, index: int) -> str:
        """Trajectory and frame."""
        number, frame = self.locate(index)
        return f"{self.trajectories[number].id}/{frame}"

    def group(self, index: int) -> Hashable:
        """The trajectory."""
        return self.trajectories[self.locate(index)[0]].id

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the trajectory, frame in it) of frame `index` of the split."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, int(index - self._starts[number])

    def frame_index(self, trajectory: int | str, frame: int) -> int:
        """Index in the split of a frame of a trajectory; DataError for one that is not there."""
        number = self.trajectory_number(trajectory)
        if not 0 <= frame < len(self.trajectories[number]):
            raise DataError(
                f"trajectory {self.trajectories[number].id}", "no such frame", got=frame,
                expected=f"0 to {len(self.trajectories[number]) - 1}",
            )  # fmt: skip
        return int(self._starts[number] + frame)

    def trajectory_number(self, trajectory: int | str) -> int:
        """Number of a trajectory, by number or id; DataError when there is none."""
        if isinstance(trajectory, str):
            if trajectory not in self._numbers:
                raise DataError(f"data {self.dir}", f"no trajectory of this name in {self.split}", got=trajectory)
            return self._numbers[trajectory]
        return trajectory

    # Samples.

    @property
    def num_contexts(self) -> int:
        """Places (trajectory, now) with at least one target."""
        return len(self._contexts)

    def stream_sample(self, seed: int, number: int, skip: int = 0) -> dict[str, Any]:
        """Training sample `number`: context number // targets_per_context of the epoch, with its own target.

        Contexts come in a permutation drawn from (seed, epoch); which frames of a context are dropped is drawn from
        (seed, number of the context), the offset of the target from (seed, number).
        """
        context_number = number // self.targets_per_context
        epoch, position = divmod(context_number, len(self._contexts))
        if self._context_order is None or self._context_order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(derived_seed("context order", seed, epoch))
            self._context_order = (seed, epoch), torch.randperm(len(self._contexts), generator=generator)
        place = self._context_order[1][(position + skip) % len(self._contexts)]
        trajectory, t = map(int, self._contexts[place])
        offset = self._draw_offset(trajectory, t, _uniform("offset", seed, number))
        num_valid = self.num_context
        drop = _uniform("context", seed, context_number)
        if drop < self.context_drop_prob:
            num_valid = 1 + int(drop / self.context_drop_prob * (self.num_context - 1))  # 1 to num_context - 1
        return self.sample_at(trajectory, t, offset, num_valid)

    def sample_at(self, trajectory: int | str, t: int, offset: int, num_valid: int | None = None) -> dict[str, Any]:
        """The sample with the context that ends at frame `t` and the target `offset` frames later.

        num_valid   how many of the newest context frames are shown; default: all that exist

        Returns {"image": uint8 (3, H_px, W_px) the target, "key": its index in the split, "cond": `context_at` with
        "action" float32 (3,), the motion from now to the target in metres and radians, and "rel_time" float32 (1,),
        the seconds in between}.
        """
        number = self.trajectory_number(trajectory)
        key, now = self.frame_index(number, t + offset), self.trajectories[number]
        action = relative(now.poses[t], now.poses[t + offset])
        cond = self.context_at(number, t, num_valid)
        cond["action"] = torch.from_numpy(action).float()
        cond["rel_time"] = torch.tensor([now.t[t + offset] - now.t[t]], dtype=torch.float32)
        return {"image": self.image(key), "cond": cond, "key": key}

    def context_at(self, trajectory: int | str, t: int, num_valid: int | None = None) -> dict[str, Tensor]:
        """The context that ends at frame `t`, oldest frame first.

        Returns context_images uint8 (K, 3, H_px, W_px), context_keys int64 (K,), indices in the split, context_age
        float32 (K,), seconds before now, and context_valid bool (K,); of a folder with several robots also spacing_m
        float32 (1,), metres between two frames of this one.
        """
        number = self.trajectory_number(trajectory)
        self.frame_index(number, t)
        frames = np.arange(t - self.num_context + 1, t + 1)
        there = np.maximum(frames, 0)
        valid = frames >= 0
        if num_valid is not None:
            valid &= frames > t - num_valid
        times = self.trajectories[number].t
        age = np.where(frames >= 0, times[t] - times[there], (t - frames) / self.rate_hz)
        keys = self._starts[number] + there
        spacing_m = self.trajectories[number].spacing_m
        return {
            "context_images": torch.stack([self.image(int(key)) for key in keys]),
            "context_keys": torch.from_numpy(keys.astype(np.int64)),
            "context_age": torch.from_numpy(age.astype(np.float32)),
            "context_valid": torch.from_numpy(valid),
            **({} if spacing_m is None else {"spacing_m": torch.tensor([spacing_m])}),
        }

    def commands(self, trajectory: int | str, t: int, num_steps: int, stride: int = 1) -> Array:
        """Recorded motions (num_steps, 3) from frame `t` on, `stride` frames each, each seen from its own start."""
        number = self.trajectory_number(trajectory)
        self.frame_index(number, t)
        self.frame_index(number, t + num_steps * stride)
        return steps(self.trajectories[number].poses[t : t + num_steps * stride + 1 : stride])

    def poses(self, trajectory: int | str) -> Array:
        """Poses (T, 3) of a trajectory: x, y in metres, yaw in radians, unwrapped."""
        return self.trajectories[self.trajectory_number(trajectory)].poses

    # Parts.

    def _fitted(self, image: Image.Image) -> Image.Image:
        """RGB at the model's size; frames that were fitted when they were stored are only resized."""
        height, width = self.image_size
        if self.manifest["stored_fit"] is None:
            return fit_image(image, self.image_size, self.fit)
        return image if image.size == (width, height) else fit_image(image, self.image_size, "none")

    def _offsets(self, length: int, t: int) -> NDArray[np.int64]:
        """Offsets of the targets that exist for the place `t` of a trajectory of `length` frames."""
        offsets = np.arange(max(self.min_offset, -t), min(self.max_offset, length - 1 - t) + 1)
        return offsets[offsets != 0]

    def _find_contexts(self) -> NDArray[np.int64]:
        """(trajectory, t) of every place that has a target, (n, 2)."""
        found = [
            (number, t)
            for number, one in enumerate(self.trajectories)
            for t in range(len(one))
            if len(self._offsets(len(one), t))
        ]
        if not found:
            raise DataError(
                f"data {self.dir}", f"no trajectory of {self.split} is long enough", got=_longest(self.trajectories),
                expected=f"targets {self.min_offset} to {self.max_offset} frames from now",
            )  # fmt: skip
        return np.array(found, np.int64)

    def _draw_offset(self, trajectory: int, t: int, u: float) -> int:
        """The offset at position `u` in [0, 1) of the cumulative distribution over those that exist."""
        offsets = self._offsets(len(self.trajectories[trajectory]), t)
        cumulative = np.cumsum(offset_weights(offsets, self.offset_distribution))
        return int(offsets[min(int(np.searchsorted(cumulative, u, side="right")), len(offsets) - 1)])


def as_trajectories(dataset: ImageDataset) -> TrajectoryDataset:
    """A split of a run of this task, as what it is."""
    assert isinstance(dataset, TrajectoryDataset)
    return dataset


def offset_weights(offsets: NDArray[np.int64], distribution: OffsetDistribution) -> Array:
    """Probability of each offset, see `TrajectoryDataset`."""
    uniform = np.full(len(offsets), 1 / len(offsets))
    if distribution == "uniform":
        return uniform
    if distribution == "log-uniform":
        weights = 1 / np.abs(offsets)
        return weights / weights.sum()
    near = np.abs(offsets) <= NEAR_FRAMES
    return (near / near.sum() + uniform) / 2 if near.any() else uniform


def _uniform(*parts: object) -> float:
    """A number in [0, 1) that is a function of `parts`."""
    return derived_seed(*parts) / 2**63


def _longest(trajectories: Sequence[StoredTrajectory]) -> str:
    return f"at most {max(map(len, trajectories))} frames"
