"""What can be driven: a world shows a picture for every motion command. Read `World` first.

`ToyWorld` is exact and needs neither data nor training, so planner, metrics and the drive page are tested with it.
A trained model and a simulator are worlds too (drive/model_world.py); the drive page and the planner see no
difference between them.

Poses are (x, y, yaw) in a fixed frame and commands are (dx, dy, dyaw) in the frame of the robot at the start of the
command: metres and radians, x forward, y left, yaw counter-clockwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raev2_tasks.nwm.pose import compose, log

Frame = NDArray[np.uint8]  # (Hpx, Wpx, 3) RGB
Poses = NDArray[np.float64]  # (..., 3)
UNDO_STEPS = 20  # as many steps can be undone at least


@dataclass(frozen=True)
class MotionRange:
    """Motions that occur in the data of a world: lowest and highest forward speed and turn rate (left positive)."""

    speed_m_s: tuple[float, float]
    turn_rad_s: tuple[float, float]

    @classmethod
    def of(cls, velocities: Poses) -> MotionRange:
        """All but the outermost 0.5 % on either side of velocities (N, 3), see `pose.velocities`."""
        speed, turn = np.quantile(velocities[:, [0, 2]], [0.005, 0.995], axis=0).T.tolist()
        return cls(tuple(speed), tuple(turn))

    def complaint(self, command: Poses, seconds: float) -> str:
        """What about a command lies outside the range, in words with numbers; '' for a command inside."""
        found = []
        speed, _, turn = map(float, log(command) / seconds)
        if not _inside(speed, self.speed_m_s):
            low, high = self.speed_m_s
            found.append(f"speed {speed:.2f} m/s is outside the data ({low:.2f} to {high:.2f})")
        if not _inside(turn, self.turn_rad_s):
            low, high = map(math.degrees, self.turn_rad_s)
            found.append(f"turn rate {math.degrees(turn):.0f} °/s is outside the data ({low:.0f} to {high:.0f})")
        return "; ".join(found)


class World(Protocol):
    """A place to drive in.

    name           what it is, for people
    durations_s    how long a command may last; the first one is the default
    motion         motions inside its data, None: everything is
    sampler_steps  solver steps for a frame, may be set; None: nothing is sampled
    """

    name: str
    durations_s: tuple[float, ...]
    motion: MotionRange | None
    sampler_steps: int | None

    @property
    def pose(self) -> Poses:
        """Where the robot is, (3,)."""

    def reset(self, seed: int) -> Frame:
        """Start again, at the place and with the noise of `seed`, and show what is seen there."""

    def step(self, command: Poses, seconds: float) -> Frame:
        """Move by `command` (3,) within `seconds` and show what is seen then."""

    def undo(self) -> None:
        """Forget the last step, at least `UNDO_STEPS` times. Equal commands then give equal frames again."""


# The toy world

# Walls of a flat of 10 x 8 m: two rooms above, a corridor, a large room below. (x, y) to (x, y) in metres, colour.
TOY_WALLS: tuple[tuple[float, float, float, float, tuple[int, int, int]], ...] = (
    (0, 0, 10, 0, (214, 90, 74)),
    (10, 0, 10, 8, (226, 174, 66)),
    (10, 8, 0, 8, (86, 150, 92)),
    (0, 8, 0, 0, (70, 118, 184)),
    (0, 4.6, 1.6, 4.6, (150, 96, 170)),
    (2.9, 4.6, 6.6, 4.6, (84, 170, 172)),
    (7.9, 4.6, 10, 4.6, (196, 120, 150)),
    (5, 4.6, 5, 8, (160, 160, 96)),
    (3.2, 1.6, 4.4, 1.6, (120, 84, 60)),
    (4.4, 1.6, 4.4, 2.6, (190, 190, 198)),
    (4.4, 2.6, 3.2, 2.6, (120, 84, 60)),
    (3.2, 2.6, 3.2, 1.6, (190, 190, 198)),
)
RADIUS_M = 0.25  # the robot stops this far from a wall
WALL_HEIGHT_M, EYE_HEIGHT_M = 1.6, 0.7
STRIPE_M = 0.5
SKY, FLOOR = np.array([206, 220, 232.0]), np.array([112, 104, 96.0])


class ToyWorld:
    """A flat with coloured walls, drawn by exact ray casting. Everything is a function of pose and seed."""

    name = "toy world"
    durations_s: tuple[float, ...] = (0.5, 0.25, 1.0)
    motion: MotionRange | None = MotionRange(speed_m_s=(-0.5, 1.5), turn_rad_s=(-math.pi / 2, math.pi / 2))
    sampler_steps: int | None = None

    def __init__(self, size_px: int = 64, field_of_view_rad: float = math.pi / 2) -> None:
        self.size_px = size_px
        walls = np.array([wall[:4] for wall in TOY_WALLS], dtype=np.float64)
        self._start, self._along = walls[:, :2], walls[:, 2:] - walls[:, :2]  # (walls, 2)
        self._colours = np.array([wall[4] for wall in TOY_WALLS], dtype=np.float64)
        focal = 0.5 / math.tan(field_of_view_rad / 2)
        offsets = (0.5 - (np.arange(size_px) + 0.5) / size_px) / focal  # per unit of depth; left is positive
        self._column_rad, self._focal_px = np.arctan(offsets), focal * size_px
        self._poses: list[Poses] = []
        self.reset(0)

    @property
    def pose(self) -> Poses:
        """Where it is."""
        return self._poses[-1]

    def reset(self, seed: int) -> Frame:
        """Start again."""
        rng = np.random.default_rng(seed)
        directions = np.arange(16, dtype=np.float64) * (math.pi / 8)
        while True:  # a place with room around it; more than half of the flat is
            x, y, yaw = rng.uniform([0, 0, -math.pi], [10, 8, math.pi])
            place = np.array([x, y])
            if self._cast(np.tile(place, (16, 1)), directions)[0].min() > 3 * RADIUS_M:
                break
        self._poses = [np.array([x, y, yaw])]
        return self.render(self.pose[None])[0]

    def step(self, command: Poses, seconds: float) -> Frame:
        """Move, and show what is seen."""
        self._poses.append(self.move(self.pose[None], np.asarray(command, dtype=np.float64)[None])[0])
        return self.render(self.pose[None])[0]

    def undo(self) -> None:
        """Take the last step back."""
        if len(self._poses) > 1:
            self._poses.pop()

    def place(self, pose: Poses) -> Frame:
        """Start at a given pose."""
        self._poses = [np.asarray(pose, dtype=np.float64)]
        return self.render(self.pose[None])[0]

    def imagine(self, commands: Poses) -> Poses:
        """Poses (B, S, 3) after each of the commands (B, S, 3) of B candidates that all start here."""
        poses = [np.broadcast_to(self.pose, (len(commands), 3))]
        for step in range(commands.shape[1]):
            poses.append(self.move(poses[-1], commands[:, step]))
        return np.stack(poses[1:], axis=1)

    def move(self, poses: Poses, commands: Poses) -> Poses:
        """Poses (B, 3) after commands (B, 3); motion stops in front of walls, turning does not."""
        length = np.hypot(commands[:, 0], commands[:, 1])
        heading = poses[:, 2] + np.arctan2(commands[:, 1], commands[:, 0])
        distance, wall, _ = self._cast(poses[:, :2], heading)
        direction = np.stack([np.cos(heading), np.sin(heading)], axis=1)
        along = self._along[wall] / np.hypot(*self._along[wall].T)[:, None]
        steepness = np.maximum(np.abs(_cross(direction, along)), 1e-9)  # 1: straight at the wall
        free = np.maximum(distance - RADIUS_M / steepness, 0)
        share = np.minimum(1, free / np.maximum(length, 1e-9))
        return compose(poses, commands * np.stack([share, share, np.ones_like(share)], axis=1))

    def render(self, poses: Poses) -> NDArray[np.uint8]:
        """Pictures (B, size, size, 3) seen at poses (B, 3)."""
        batch, size = len(poses), self.size_px
        origins = np.repeat(poses[:, :2], size, axis=0)
        angles = (poses[:, 2:] + self._column_rad).reshape(-1)
        distance, wall, along_m = self._cast(origins, angles)
        depth = np.maximum(distance * np.tile(np.cos(self._column_rad), batch), 1e-3)

        # Colour of a column: the wall's, darker on every other stripe and with distance.
        light = np.where(np.floor(along_m / STRIPE_M) % 2 == 0, 1.0, 0.82) / (1 + 0.06 * distance)
        column = (self._colours[wall] * light[:, None]).reshape(batch, 1, size, 3)

        # Rows between the upper and the lower edge of the wall show it.
        rows = (np.arange(size) + 0.5 - size / 2)[None, :, None]
        depth = depth.reshape(batch, 1, size)
        is_wall = (rows > -(WALL_HEIGHT_M - EYE_HEIGHT_M) * self._focal_px / depth) & (
            rows < EYE_HEIGHT_M * self._focal_px / depth
        )
        fade = np.clip(np.abs(rows) / (size / 2), 0, 1)[..., None]  # sky and floor fade towards the horizon
        behind = np.where(rows[..., None] < 0, SKY * (0.8 + 0.2 * fade), FLOOR * (0.6 + 0.4 * fade))
        return np.rint(np.where(is_wall[..., None], column, behind)).astype(np.uint8)

    def _cast(self, origins: Poses, angles: Poses) -> tuple[Poses, NDArray[np.int64], Poses]:
        """Rays (R, 2) and (R,): distance to the nearest wall, which wall, and where along it in metres, each (R,)."""
        direction = np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None]  # (R, 1, 2)
        to_start = self._start - origins[:, None]  # (R, walls, 2)
        parallel = _cross(direction, self._along)
        parallel = np.where(np.abs(parallel) < 1e-12, 1e-12, parallel)
        distance = _cross(to_start, self._along) / parallel
        share = _cross(to_start, direction) / parallel
        distance = np.where((distance > 1e-9) & (share >= 0) & (share <= 1), distance, np.inf)
        wall = distance.argmin(axis=1)
        row = np.arange(len(wall))
        along_m = share[row, wall] * np.hypot(*self._along.T)[wall]
        return np.minimum(distance[row, wall], 100.0), wall, along_m


def _cross(a: Poses, b: Poses) -> Poses:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _inside(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] - 1e-6 <= value <= bounds[1] + 1e-6
