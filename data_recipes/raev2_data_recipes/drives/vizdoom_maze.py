"""Drives through mazes of our own, recorded in the ViZDoom engine. Read ``Driver`` for how the robot moves.

The engine comes with the extra `nwm` and is not part of this project. Mazes and all textures are ours, so the frames
carry no game data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe
from raev2_tasks.nwm.data.trajectories import Source, Storage, Trajectory
from raev2_tasks.nwm.pose import wrap
from raev2_tasks.nwm.worlds.engine import CAMERA, TICS_PER_S, Engine, require_vizdoom
from raev2_tasks.nwm.worlds.maze import UNITS_PER_M, Maze, make_maze

TICS = (9, 9, 9, 8)  # a frame each: 35 tics in 4 frames, so 4 Hz on average
RATE_HZ = 4.0
MODES = {"explore": 0.6, "wander": 0.15, "rotate": 0.1, "stop": 0.05, "reverse": 0.1}  # probabilities
CRUISE = 3.5  # forward button; steady speed is 1/3 map unit a tic for each, so 10 units or 0.33 m a frame
MAX_TURN = 1.7  # degrees a tic: 60 a second, so that a second leaves part of the view in sight
STUCK = 2.0  # map units a frame: who moves less for three frames, at a wall or in a sharp turn, backs out
FIRST_VAL_SEED = 1_000_000  # seeds of validation mazes start here


class Driver:
    """Chooses buttons from the pose. It changes between five modes, each for a few frames.

    explore   to the centre of a neighbouring cell, preferably one it has not come from, slower in turns
    wander    correlated random speed and turn rate
    rotate    turn on the spot
    stop      stand
    reverse   back out slowly
    """

    def __init__(self, maze: Maze, rng: np.random.Generator) -> None:
        self.maze, self.rng = maze, rng
        self.mode, self.left = "explore", 0
        self.target: tuple[int, int] | None = None
        self.came_from: tuple[int, int] | None = None
        self.turn = 0.0
        self.speed = CRUISE
        self.num_stuck = 0

    def buttons(self, pose: NDArray[np.float64], moved: float) -> tuple[float, float]:
        """(forward button, degrees a tic to the left) for the next frame.

        pose    x, y in map units, yaw in radians
        moved   map units since the last frame
        """
        ahead = self.mode in ("explore", "wander") and self.speed > 0.4 * CRUISE
        self.num_stuck = self.num_stuck + 1 if ahead and moved < STUCK else 0
        if self.num_stuck >= 3:
            self.mode, self.left, self.num_stuck, self.target = "reverse", 3, 0, None
            self.turn = float(self.rng.normal(0, 1))
        if self.left <= 0:
            self._change_mode()
        self.left -= 1
        if self.mode == "explore":
            return self._explore(pose)
        if self.mode == "wander":
            self.turn = float(np.clip(0.8 * self.turn + self.rng.normal(0, 0.6), -MAX_TURN, MAX_TURN))
            self.speed = float(np.clip(self.speed + self.rng.normal(0, 1), 1, 1.6 * CRUISE))
            return self.speed, self.turn
        if self.mode == "rotate":
            return 0.0, self.turn
        if self.mode == "stop":
            return 0.0, 0.0
        return -0.6 * CRUISE, self.turn

    def _change_mode(self) -> None:
        self.mode = str(self.rng.choice(list(MODES), p=list(MODES.values())))
        shortest, longest = {"explore": (12, 30), "wander": (6, 14), "rotate": (4, 12)}.get(self.mode, (2, 6))
        self.left = int(self.rng.integers(shortest, longest + 1))
        self.speed = float(self.rng.uniform(0.7, 1.3)) * CRUISE
        self.target = None
        side = -1.0 if self.rng.random() < 0.5 else 1.0
        self.turn = {
            "rotate": side * float(self.rng.uniform(0.4, MAX_TURN)),
            "reverse": float(self.rng.normal(0, 0.4)),
        }.get(self.mode, 0.0)

    def _explore(self, pose: NDArray[np.float64]) -> tuple[float, float]:
        cell = self.maze.cell_at(pose[:2])
        if self.target is None or math.dist(self.maze.centre(self.target), pose[:2]) < 24:
            options = [other for other in self.maze.neighbours(cell) if other != self.came_from]
            options = options or self.maze.neighbours(cell)
            self.came_from, self.target = cell, options[self.rng.integers(len(options))]
        goal = self.maze.centre(self.target)
        error = float(wrap(math.atan2(goal[1] - pose[1], goal[0] - pose[0]) - pose[2]))
        turn = float(np.clip(math.degrees(error) / TICS[0], -MAX_TURN, MAX_TURN)) + float(self.rng.normal(0, 0.15))
        return self.speed * max(0.0, math.cos(error)) ** 2, turn


def record(engine: Engine, number: int, seed: tuple[int, int], num_frames: int) -> Trajectory:
    """Drive through maze `number` of the engine for `num_frames` frames, from a place drawn from `seed`.

    The first seed is that of the maze, the second counts its drives. `command` of the trajectory holds the buttons
    (forward, degrees a tic to the left) that lead to the next frame.
    """
    maze, rng = engine.open_map(number), np.random.default_rng([*seed, 2])
    driver = Driver(maze, rng)
    start = maze.centre((int(rng.integers(maze.num_cells)), int(rng.integers(maze.num_cells))))
    engine.rest()  # from the last drive
    engine.place((*(start + rng.uniform(-30, 30, 2)), rng.uniform(-math.pi, math.pi)))
    frames, poses, commands, tics = [engine.frame], [engine.pose], [], [0]
    moved = math.inf
    for index in range(num_frames):
        commands.append(driver.buttons(poses[-1], moved))
        if index == num_frames - 1:
            break
        forward, turn = commands[-1]
        engine.act(forward, turn, TICS[index % len(TICS)])
        tics.append(tics[-1] + TICS[index % len(TICS)])
        frames.append(engine.frame)
        poses.append(engine.pose)
        moved = math.dist(poses[-1][:2], poses[-2][:2])
    path = np.stack(poses)
    return Trajectory(
        id=f"maze-{seed[0]}-{seed[1]}",
        t=np.array(tics) / TICS_PER_S,
        position=path[:, :2] / UNITS_PER_M,
        yaw=path[:, 2],
        frames=frames,
        command=np.array(commands),
        split="val" if seed[0] >= FIRST_VAL_SEED else "train",
    )


class VizdoomMaze(TrajectoryRecipe):
    """One maze a recording; validation drives through mazes that training never sees."""

    name = "vizdoom"
    packages = ("vizdoom",)
    summary = "drives through generated mazes in a simulator (extra nwm), with exact poses"
    licence = "CC0-1.0"
    attribution = (
        "Made by the raev2 data recipe `vizdoom`: mazes and textures by raev2, rendered with ViZDoom "
        "(https://github.com/Farama-Foundation/ViZDoom), which is not included."
    )
    size = "8,640 frames in 72 drives, 64 px, 29 MB"
    options = {
        "num_train": Option("60", "training drives"),
        "num_val": Option("12", "validation drives"),
        "drives_per_maze": Option("4", "drives through each maze"),
        "num_frames": Option("120", "frames of a drive, at 4 a second"),
        "cells": Option("5", "cells along the side of a maze, 2 to 12"),
        "seed": Option("0", "number of the first maze"),
        "size": Option("64", "square frames of this many pixels, from 160 x 120; empty = 160 x 120"),
        "fit": TrajectoryRecipe.STORAGE["fit"],
        "format": TrajectoryRecipe.STORAGE["format"],
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do."""
        resolved = self.resolve(options)
        mazes = {split: len(seeds) for split, seeds in self._mazes(resolved).items()}
        return [
            f"Generate {mazes['train']} training and {mazes['val']} validation mazes, {resolved['cells']} x "
            f"{resolved['cells']} cells.",
            f"Record {resolved['num_train']} and {resolved['num_val']} drives of {resolved['num_frames']} frames.",
            f"Store frames of {resolved['size'] or '160 x 120'} px as {resolved['format']}.",
        ]

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """4 Hz; 32 map units are called a metre."""
        return {"rate_hz": RATE_HZ, "length_unit": "metre, nominally 32 map units", "camera": CAMERA}

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One source per maze; all run in one engine."""
        num_frames, per_maze = self._whole(options, "num_frames", 5), self._whole(options, "drives_per_maze", 1)
        plans = [
            (seed, min(per_maze, total - index * per_maze))
            for split, total in self._totals(options).items()
            for index, seed in enumerate(self._mazes(options)[split])
        ]
        cells = int(self.number(options, "cells", 2, 12, whole=True))
        self.storage({**options, "split": "given"})
        require_vizdoom()
        with Engine([make_maze(seed, cells) for seed, _ in plans]) as engine:
            for number, (seed, count) in enumerate(plans):
                yield Source(f"maze-{seed}", f"maze {seed}", partial(_drives, engine, number, seed, count, num_frames))

    def storage(self, options: Mapping[str, str]) -> Storage:
        """The split is given: by maze."""
        return super().storage({**options, "split": "given"})

    def _totals(self, options: Mapping[str, str]) -> dict[str, int]:
        return {"train": self._whole(options, "num_train", 1), "val": self._whole(options, "num_val", 1)}

    def _mazes(self, options: Mapping[str, str]) -> dict[str, list[int]]:
        """Seeds of the mazes by split."""
        per_maze = self._whole(options, "drives_per_maze", 1)
        num = {split: math.ceil(total / per_maze) for split, total in self._totals(options).items()}
        # A training maze beyond would be one of validation.
        first = int(self.number(options, "seed", 0, FIRST_VAL_SEED - num["train"], whole=True))
        return {
            split: [first + number + offset for number in range(num[split])]
            for split, offset in (("train", 0), ("val", FIRST_VAL_SEED))
        }

    def _whole(self, options: Mapping[str, str], name: str, least: int) -> int:
        return int(self.number(options, name, least, whole=True))


def _drives(engine: Engine, number: int, seed: int, count: int, num_frames: int) -> Iterator[Trajectory]:
    for drive in range(count):
        yield record(engine, number, (seed, drive), num_frames)


RECIPE = VizdoomMaze()
