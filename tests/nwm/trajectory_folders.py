"""Small folders of trajectories for tests: every frame shows its own number, paths are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raev2_tasks.nwm.data.trajectories import Source, Storage, Trajectory, write_trajectories

HEAD = {"name": "test", "recipe": "test", "options": {}, "licence": "CC0-1.0", "attribution": "test"}
FACTS = {"rate_hz": 4.0, "length_unit": "metre", "camera": None}


def frame(number: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """(H, W, 3) of one grey level that tells the number, up to 120."""
    return np.full((*size, 3), 40 + number, np.uint8)


def walk(name: str, length: int, **changes: Any) -> Trajectory:
    """Straight ahead along x with half a metre a frame, then what `changes` replace."""
    values = {
        "t": np.arange(length) / 4,
        "position": np.column_stack([np.arange(length) / 2, np.zeros(length)]),
        "yaw": np.zeros(length),
        "frames": [frame(number) for number in range(length)],
    }
    return Trajectory(name, **(values | changes))


def write(folder: Path, trajectories: Sequence[Trajectory], storage: Storage | None = None, **facts: Any) -> dict:
    """A dataset folder; the recording of a trajectory is what stands before the dash of its name."""
    folder.mkdir(parents=True)
    sources = [Source(one.id.split("-")[0], one.id, lambda one=one: [one]) for one in trajectories]
    return write_trajectories(folder, sources, storage or Storage(suffix=".png"), HEAD, FACTS | facts)
