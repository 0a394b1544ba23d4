"""Mazes of our own for the ViZDoom engine: a plan from a seed, its textures, and the map file. No engine in here.

Everything that a frame shows is drawn by this module, so frames carry nothing of anybody's game data. Lengths are map
units; a metre is 32 of them, nominally. x and y are those of the engine, yaw is counter-clockwise.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from raev2_tasks.nwm.data.frames import encode_frame

UNITS_PER_M = 32.0
CELL, WALL, HEIGHT = 128, 32, 128
RADIUS = 16.0  # of the body, in the engine too
OPENNESS = 0.3  # share of the remaining walls that are taken away, so that there are loops and rooms
PLAIN_HUES = (
    (200, 60, 50),
    (60, 160, 70),
    (60, 90, 210),
    (220, 180, 50),
    (160, 70, 180),
    (170, 120, 80),
    (220, 120, 40),
)
PATTERNS = ("plain", "panel", "band")
FLOORS = ((92, 92, 96), (120, 92, 64), (70, 100, 74), (96, 76, 104))
CEILINGS = ((60, 60, 66), (104, 104, 110))
SIGNS = ("disc", "cross", "triangle", "frame", "diagonal")


@dataclass(frozen=True)
class Maze:
    """A plan of cells with thin walls.

    seed      what it was made from
    solid     (2 n + 1, 2 n + 1) bool by [row, column] of the tiles; odd rows and columns are cells
    """

    seed: int
    solid: NDArray[np.bool_]

    @property
    def num_cells(self) -> int:
        """Cells along one side."""
        return len(self.solid) // 2

    @property
    def edges(self) -> NDArray[np.float64]:
        """Where the tiles begin and end along either axis, map units, (2 n + 2,)."""
        widths = [CELL if tile % 2 else WALL for tile in range(len(self.solid))]
        return np.cumsum([0.0, *widths])

    def centre(self, cell: tuple[int, int]) -> NDArray[np.float64]:
        """Centre (x, y) of the cell (column, row), map units."""
        edges = self.edges
        return np.array([(edges[2 * number + 1] + edges[2 * number + 2]) / 2 for number in cell])

    def cell_at(self, point: Sequence[float] | NDArray[np.float64]) -> tuple[int, int]:
        """The cell (column, row) that a point is in, or nearest to."""
        column, row = (
            min(self.num_cells - 1, max(0, int((value - WALL / 2) // (CELL + WALL)))) for value in map(float, point)
        )
        return column, row

    def neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        """Cells that can be reached from a cell without another between."""
        column, row = cell
        found = []
        for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            if not self.solid[2 * row + 1 + dy, 2 * column + 1 + dx]:
                found.append((column + dx, row + dy))
        return found

    def is_free(self, point: Sequence[float], margin: float = RADIUS) -> bool:
        """Whether a square body of half width `margin` stands clear of every wall."""
        x, y = point
        edges = self.edges
        first = np.searchsorted(edges, (x - margin, y - margin), side="right") - 1
        last = np.searchsorted(edges, (x + margin, y + margin), side="left")
        if first.min() < 0 or last.max() > len(self.solid):
            return False
        return not self.solid[first[1] : last[1], first[0] : last[0]].any()


def make_maze(seed: int, num_cells: int = 5) -> Maze:
    """A connected maze of num_cells x num_cells cells: a random spanning tree, then more openings."""
    rng = np.random.default_rng(seed)
    solid = np.ones((2 * num_cells + 1, 2 * num_cells + 1), bool)
    solid[1::2, 1::2] = False
    stack, seen = [(0, 0)], {(0, 0)}
    while stack:
        column, row = stack[-1]
        options = [
            (column + dx, row + dy)
            for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1))
            if 0 <= column + dx < num_cells and 0 <= row + dy < num_cells and (column + dx, row + dy) not in seen
        ]
        if not options:
            stack.pop()
            continue
        chosen = options[rng.integers(len(options))]
        solid[row + chosen[1] + 1, column + chosen[0] + 1] = False
        seen.add(chosen)
        stack.append(chosen)
    inner = [(r, c) for r in range(1, 2 * num_cells) for c in range(1, 2 * num_cells) if (r + c) % 2]
    for r, c in inner:
        if solid[r, c] and rng.random() < OPENNESS:
            solid[r, c] = False
    for r in range(2, 2 * num_cells, 2):  # a post with nothing around it is taken away too
        for c in range(2, 2 * num_cells, 2):
            if not (solid[r - 1, c] or solid[r + 1, c] or solid[r, c - 1] or solid[r, c + 1]):
                solid[r, c] = False
    return Maze(seed, solid)


# Textures


def wall_names() -> list[str]:
    """Names of the wall textures: every hue in every pattern."""
    return [f"RVW{hue}{pattern}" for hue in range(len(PLAIN_HUES)) for pattern in range(len(PATTERNS))]


def sign_names() -> list[str]:
    """Names of the textures with a sign: rare, so that they mark a place."""
    return [f"RVS{hue}{sign}" for hue in range(len(PLAIN_HUES)) for sign in range(len(SIGNS))]


@lru_cache(maxsize=1)
def textures() -> dict[str, bytes]:
    """PNG files by texture name, 128 x 128."""
    found = {}
    for hue, colour in enumerate(PLAIN_HUES):
        for number, pattern in enumerate(PATTERNS):
            found[f"RVW{hue}{number}"] = encode_frame(_wall(colour, pattern), ".png")
        for number, sign in enumerate(SIGNS):
            other = PLAIN_HUES[(hue + 3) % len(PLAIN_HUES)]
            found[f"RVS{hue}{number}"] = encode_frame(_sign(colour, other, sign), ".png")
    for number, colour in enumerate(FLOORS):
        found[f"RVF{number}"] = encode_frame(_plain(colour), ".png")
    for number, colour in enumerate(CEILINGS):
        found[f"RVC{number}"] = encode_frame(_plain(colour), ".png")
    return found


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue


def _wall(colour: tuple[int, int, int], pattern: str) -> Image.Image:
    image = Image.new("RGB", (128, 128), colour)
    draw, dark, light = ImageDraw.Draw(image), _shade(colour, 0.6), _shade(colour, 1.25)
    if pattern == "panel":
        draw.rectangle((0, 64, 127, 127), dark)
    elif pattern == "band":
        draw.rectangle((0, 32, 127, 63), light)
    draw.rectangle((0, 112, 127, 127), _shade(colour, 0.45))  # skirting: where a wall meets the floor
    return image


def _sign(colour: tuple[int, int, int], other: tuple[int, int, int], sign: str) -> Image.Image:
    image = _wall(colour, "plain")
    draw = ImageDraw.Draw(image)
    draw.rectangle((24, 16, 103, 95), (235, 235, 230))
    if sign == "disc":
        draw.ellipse((36, 28, 91, 83), other)
    elif sign == "cross":
        draw.rectangle((56, 24, 71, 87), other)
        draw.rectangle((32, 48, 95, 63), other)
    elif sign == "triangle":
        draw.polygon([(64, 26), (94, 86), (33, 86)], other)
    elif sign == "frame":
        draw.rectangle((34, 26, 93, 85), other)
        draw.rectangle((50, 42, 77, 69), (235, 235, 230))
    else:
        draw.polygon([(24, 16), (103, 16), (24, 95)], other)
    return image


def _plain(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (128, 128), colour)


# The map file


def map_name(number: int) -> str:
    """Name of map `number` in a file of several."""
    return f"M{number:04d}"


def write_pwad(mazes: Sequence[Maze]) -> bytes:
    """A PWAD file with one UDMF map per maze and the textures. The engine builds the nodes when it loads a map."""
    lumps: list[tuple[str, bytes]] = []
    for number, maze in enumerate(mazes):
        lumps += [(map_name(number), b""), ("TEXTMAP", _textmap(maze).encode()), ("ENDMAP", b"")]
    lumps += [("TX_START", b""), *textures().items(), ("TX_END", b"")]
    body, directory, offset = b"", b"", 12
    for name, data in lumps:
        directory += struct.pack("<ii8s", offset, len(data), name.encode())
        body += data
        offset += len(data)
    return b"PWAD" + struct.pack("<ii", len(lumps), offset) + body + directory


def _textmap(maze: Maze) -> str:
    """The map as UDMF text: one sector per cell with the tiles to its right and above, one-sided lines for walls.

    Regions of 2 x 2 cells share floor, ceiling, light and the usual wall; one face in five carries a sign.
    """
    rng = np.random.default_rng([maze.seed, 1])
    num_regions = (maze.num_cells + 1) // 2
    size = len(maze.solid)
    walls = (
        rng.permutation(len(wall_names()))[: num_regions**2]
        if num_regions**2 <= len(wall_names())
        else (rng.integers(len(wall_names()), size=num_regions**2))
    )
    floors = rng.integers(len(FLOORS), size=num_regions**2)
    ceilings = rng.integers(len(CEILINGS), size=num_regions**2)
    lights = rng.integers(176, 240, size=num_regions**2)

    def region(row: int, column: int) -> int:
        row, column = (min(num_regions - 1, max(0, (tile - 1) // 4)) for tile in (row, column))
        return row * num_regions + column

    vertices: dict[tuple[int, int], int] = {}
    sides: list[str] = []
    lines: list[str] = []

    def vertex(x: int, y: int) -> int:
        return vertices.setdefault((x, y), len(vertices))

    # Faces of a tile: the neighbour's step, and the two corners such that the tile lies to the right of the line.
    faces = (((0, -1), (1, 0), (0, 0)), ((1, 0), (1, 1), (1, 0)), ((0, 1), (0, 1), (1, 1)), ((-1, 0), (0, 0), (0, 1)))
    for row in range(size):
        for column in range(size):
            if maze.solid[row, column]:
                continue
            own = region(row, column)
            for (dx, dy), start, end in faces:
                other_row, other_column = row + dy, column + dx
                first = vertex(column + start[0], row + start[1])
                second = vertex(column + end[0], row + end[1])
                if maze.solid[other_row, other_column]:
                    texture = wall_names()[walls[own]]
                    if rng.random() < 0.2 and (row % 2 and column % 2):
                        texture = sign_names()[rng.integers(len(sign_names()))]
                    elif rng.random() < 0.15:
                        texture = wall_names()[rng.integers(len(wall_names()))]
                    lines.append(f"linedef{{v1={first};v2={second};sidefront={len(sides)};blocking=true;}}")
                    sides.append(f'sidedef{{sector={own};texturemiddle="{texture}";}}')
                elif region(other_row, other_column) != own and (dx > 0 or dy > 0):
                    other, front = region(other_row, other_column), len(sides)
                    lines.append(
                        f"linedef{{v1={first};v2={second};sidefront={front};sideback={front + 1};twosided=true;}}"
                    )
                    sides += [f"sidedef{{sector={own};}}", f"sidedef{{sector={other};}}"]
    edges = maze.edges
    points = [f"vertex{{x={edges[x]:.1f};y={edges[y]:.1f};}}" for x, y in vertices]
    sectors = [
        f'sector{{heightfloor=0;heightceiling={HEIGHT};texturefloor="RVF{floor}";textureceiling="RVC{ceiling}";'
        f"lightlevel={light};}}"
        for floor, ceiling, light in zip(floors, ceilings, lights, strict=True)
    ]
    x, y = maze.centre((0, 0))
    skills = "".join(f"skill{number}=true;" for number in range(1, 6))
    player = f"thing{{x={x:.1f};y={y:.1f};angle=0;type=1;single=true;{skills}}}"
    return "\n".join(['namespace="zdoom";', *points, *sectors, *sides, *lines, player])
