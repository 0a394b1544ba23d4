"""The ViZDoom engine as a place to drive in: `Engine` is the thin wrapper, `MazeWorld` moves exactly.

The engine is optional (`pip install 'raev2[nwm]'`) and is never part of what we give away. It runs without window and
sound, and writes its files into a temporary folder. Poses leave this module in metres and radians.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from raev2.errors import DataError
from raev2_tasks.nwm.data.frames import fit_image
from raev2_tasks.nwm.pose import Array, compose, exp, log, wrap
from raev2_tasks.nwm.spec import Fit
from raev2_tasks.nwm.worlds.maze import UNITS_PER_M, Maze, make_maze, map_name, write_pwad

TICS_PER_S = 35
CAMERA = {
    "model": "pinhole", "width": 160, "height": 120, "fx": 80.0, "fy": 96.0, "cx": 80.0, "cy": 60.0, "hfov_deg": 90.0,
}  # fmt: skip
SUBSTEP = 4.0  # map units: an exact motion is checked against the walls this often


def require_vizdoom() -> Any:
    """The module vizdoom; DataError that says how to install it."""
    try:
        import vizdoom
    except ImportError as error:
        raise DataError(
            "vizdoom", "the simulator is not installed", hint="Install it with `pip install 'raev2[nwm]'`."
        ) from error
    return vizdoom


class Engine:
    """Several mazes in one engine. Positions in map units, angles in radians.

    `close` stops it, as does the end of a `with` block or of the program.
    """

    def __init__(self, mazes: Sequence[Maze], seed: int = 0) -> None:
        vizdoom = require_vizdoom()
        self.mazes = list(mazes)
        folder = tempfile.TemporaryDirectory(prefix="raev2-vizdoom-")
        wad = Path(folder.name) / "mazes.wad"
        wad.write_bytes(write_pwad(self.mazes))
        button, variable = vizdoom.Button, vizdoom.GameVariable
        game = vizdoom.DoomGame()
        game.set_doom_scenario_path(str(wad))
        game.set_doom_map(map_name(0))
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for part in ("hud", "weapon", "crosshair", "messages", "decals", "particles"):
            getattr(game, f"set_render_{part}")(False)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.add_game_args("-nomonsters")
        game.set_episode_timeout(0)
        game.set_seed(seed)
        game.set_available_buttons([button.MOVE_FORWARD_BACKWARD_DELTA, button.TURN_LEFT_RIGHT_DELTA])
        game.set_available_game_variables([variable.POSITION_X, variable.POSITION_Y, variable.ANGLE])
        before = os.getcwd()
        os.chdir(folder.name)  # the engine writes its settings into the current folder when it starts
        try:
            game.init()
        except vizdoom.ViZDoomErrorException as error:
            raise DataError("vizdoom", "the simulator does not start", got=error) from error
        finally:
            os.chdir(before)
        self._game, self._map = game, 0
        self.close = weakref.finalize(self, _stop, game, folder)
        self.rest()

    def open_map(self, number: int) -> Maze:
        """Go to maze `number`."""
        if number != self._map:
            self._game.set_doom_map(map_name(number))
            self._game.new_episode()
            self._map = number
            self.rest()
        return self.mazes[number]

    def rest(self) -> None:
        """Do nothing until motion has died away. A new map ignores the buttons for half a second."""
        self.act(0.0, 0.0, 2 * TICS_PER_S)

    @property
    def pose(self) -> Array:
        """x, y in map units, yaw in radians."""
        x, y, degrees = self._game.get_state().game_variables
        return np.array([x, y, math.radians(degrees)])

    @property
    def frame(self) -> NDArray[np.uint8]:
        """What is seen, (120, 160, 3)."""
        return np.array(self._game.get_state().screen_buffer)

    def act(self, forward: float, turn_deg: float, tics: int) -> None:
        """Hold the delta buttons: forward (steady speed is 1/3 map unit a tic), degrees a tic to the left."""
        self._game.make_action([forward, -turn_deg], tics)

    def place(self, pose: ArrayLike) -> None:
        """Stand still at a pose in map units. The engine rounds x and y to whole units and yaw to 0.006 degrees.

        It needs two tics: the body arrives with its eyes on the floor.
        """
        x, y, yaw = np.asarray(pose, np.float64)
        turn = math.degrees(yaw - self.pose[2]) % 360
        self._game.send_game_command(f"warp {round(x)} {round(y)}")
        self.act(0.0, turn - 360 if turn > 180 else turn, 1)
        self.act(0.0, 0.0, 1)
        got = self.pose
        if np.hypot(*(got[:2] - np.round([x, y]))) > 0.5 or abs(wrap(got[2] - yaw)) > 1e-3:
            raise DataError(
                "vizdoom", "the simulator did not take a pose", got=got.tolist(), expected=f"{x}, {y}, {yaw}"
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(game: Any, folder: tempfile.TemporaryDirectory[str]) -> None:
    game.close()  # writes into the folder
    folder.cleanup()


class MazeWorld:
    """A maze to drive in with exact motions: every command is carried out as it stands, up to the walls.

    A body that meets a wall slides along it. The picture is drawn at the pose rounded to 1/32 m; `pose` is not
    rounded. Poses in metres and radians, commands as of `raev2_tasks.nwm.pose`.

    seed   of the maze; that of a recorded one stands in the name of its recording (`maze-<seed>`)
    size   height and width of the frames
    """

    name = "ViZDoom maze"
    durations_s = (0.5, 0.25, 1.0)
    motion = None
    sampler_steps: int | None = None

    def __init__(
        self, seed: int = 0, *, size: tuple[int, int] = (64, 64), fit: Fit = "squeeze", num_cells: int = 5
    ) -> None:
        self.maze, self.size, self.fit = make_maze(seed, num_cells), size, fit
        self._engine = Engine([self.maze])
        self._pose = np.zeros(3)
        self._before: list[Array] = []
        self.reset(0)

    @property
    def pose(self) -> Array:
        """Where the robot is: x, y in metres, yaw in radians, (3,)."""
        return self._pose.copy()

    def reset(self, seed: int) -> NDArray[np.uint8]:
        """Stand in a cell, facing a way out, both drawn from `seed`; (H, W, 3) uint8."""
        rng = np.random.default_rng(seed)
        cell = (int(rng.integers(self.maze.num_cells)), int(rng.integers(self.maze.num_cells)))
        exits = self.maze.neighbours(cell)
        ahead = exits[rng.integers(len(exits))]
        yaw = math.atan2(ahead[1] - cell[1], ahead[0] - cell[0])
        return self.place([*self.maze.centre(cell) / UNITS_PER_M, yaw])

    def place(self, pose: ArrayLike) -> NDArray[np.uint8]:
        """Start at a pose in metres and radians; (H, W, 3) uint8. DataError inside a wall."""
        picture = self.look(pose)
        self._pose, self._before = np.array(pose, np.float64), []
        return picture

    def step(self, command: ArrayLike, seconds: float = 0.25) -> NDArray[np.uint8]:
        """Move by `command` (dx, dy, dyaw) and look; how long it takes makes no difference."""
        self._before.append(self.pose)
        self._pose = self._moved(np.asarray(command, np.float64))
        return self.look(self._pose)

    def undo(self) -> None:
        """Forget the last step."""
        if self._before:
            self._pose = self._before.pop()

    def look(self, pose: ArrayLike) -> NDArray[np.uint8]:
        """What is seen from a pose in metres and radians, (H, W, 3) uint8. Does not move the robot."""
        x, y, yaw = np.asarray(pose, np.float64)
        if not self.maze.is_free((x * UNITS_PER_M, y * UNITS_PER_M)):
            raise DataError("pose", "inside a wall, or outside the maze", got=f"({x:.2f}, {y:.2f}) m")
        self._engine.place((x * UNITS_PER_M, y * UNITS_PER_M, yaw))
        image = Image.fromarray(self._engine.frame)
        return np.asarray(fit_image(image, self.size, self.fit))

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _moved(self, command: Array) -> Array:
        """The pose after a motion at constant velocity, in small steps that may slide along walls."""
        velocity = log(command)
        count = max(1, math.ceil(float(np.hypot(*velocity[:2])) * UNITS_PER_M / SUBSTEP))
        pose = self._pose
        for _ in range(count):
            goal = compose(pose, exp(velocity / count))
            for x, y in ((goal[0], goal[1]), (goal[0], pose[1]), (pose[0], goal[1]), (pose[0], pose[1])):
                if self.maze.is_free((x * UNITS_PER_M, y * UNITS_PER_M)):
                    pose = np.array([x, y, goal[2]])
                    break
        return pose
