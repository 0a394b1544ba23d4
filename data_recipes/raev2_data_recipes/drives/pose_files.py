"""Files of poses as their numbers stand there: CSV, TUM, KITTI. What the numbers mean is decided in `readings.py`."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError
from raev2_tasks.nwm.pose import Array

TIME, FRAME = ("t", "time", "timestamp", "stamp"), ("frame", "frame_index")
POSITION = (("x", "tx", "px", "pos_x", "position_x", "p_rs_r_x"), ("y", "ty", "py", "pos_y", "position_y", "p_rs_r_y"))
HEIGHT = ("z", "tz", "pz", "pos_z", "position_z", "p_rs_r_z")
YAW = ("yaw", "theta", "heading")
QUATERNION = tuple((f"q{axis}", f"q_{axis}", f"q_rs_{axis}", f"orientation_{axis}") for axis in "xyzw")
UNIT_WORDS = {"deg": "degrees", "ms": "ms", "us": "us", "ns": "ns", "mm": "millimetres", "cm": "centimetres"}
PLAIN_UNITS = ("s", "sec", "m", "rad")


@dataclass(frozen=True)
class RawPoses:
    """The numbers of a file of poses, unconverted.

    position     (T, 3); z is 0 where the file is planar
    yaw          (T,), or None for poses in space
    quaternion   (T, 4) in the order of the file, or None
    rotation     (T, 3, 3) of the moving frame in the world, or None
    t            (T,) times, or None where poses belong to frames
    frame        (T,) numbers of frames, or None
    words        what the file itself says about its units and order, words of `readings.py`
    """

    where: str
    position: Array
    yaw: Array | None = None
    quaternion: Array | None = None
    rotation: Array | None = None
    t: Array | None = None
    frame: NDArray[np.int64] | None = None
    words: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.position)


def read_raw_poses(path: Path) -> RawPoses:
    """Read a file of poses; what it is, is decided by its header and the number of its columns.

    CSV      a header with x, y, and yaw or a quaternion, and t or frame; units may follow names: yaw_deg, t [ns]
    TUM      `timestamp tx ty tz qx qy qz qw` a line
    KITTI    twelve numbers a line, the first three rows of a pose matrix; line i belongs to frame i
    """
    where = f"poses {path}"
    if not path.is_file():
        raise DataError(where, "pose file is missing")
    try:
        every = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(where, "is not text in UTF-8", got=f"byte {error.start}") from error
    comments = [line.lstrip("# ") for line in every if line.startswith("#")]
    lines = [line for line in every if not line.startswith("#")]
    if not lines:
        raise DataError(where, "empty")
    if _is_header(lines[0]):
        return checked(_read_table(where, _cells(lines[0]), lines[1:]))
    named = next((names for names in map(_cells, comments) if len(names) == len(_cells(lines[0]))), None)
    if named is not None and _column(named, TIME)[0] is not None:
        return checked(_read_table(where, named, lines))
    return checked(_read_numbers(where, lines))


def checked(raw: RawPoses) -> RawPoses:
    """`raw` itself; DataError for a number that is not finite, or a quaternion of length zero."""
    for name in ("t", "position", "yaw", "quaternion", "rotation"):
        values = getattr(raw, name)
        if values is None:
            continue
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(raw), -1)).all(1))
        if len(bad):
            raise DataError(
                raw.where, f"{name} is not finite in {len(bad)} of {len(raw)} poses", got=f"pose {bad[0] + 1}",
                hint="Leave such lines out: the recording is cut there.",
            )  # fmt: skip
    if raw.quaternion is not None and (np.linalg.norm(raw.quaternion, axis=1) < 1e-6).any():
        raise DataError(raw.where, "a quaternion is zero")
    return raw


def _is_header(line: str) -> bool:
    return any(letter.isalpha() for letter in re.sub(r"(?i)[\d.][eE][+-]?\d|\bnan\b|\binf\b", "", line))


def _cells(line: str) -> list[str]:
    """Cells of a line, parted by semicolons, tabs, commas, or else blanks."""
    for mark in (";", "\t", ","):
        if mark in line:
            return [cell.strip() for cell in next(csv.reader([line], delimiter=mark))]
    return line.split()


def _read_numbers(where: str, lines: list[str]) -> RawPoses:
    try:
        rows = np.array([[float(value) for value in _cells(line)] for line in lines])
    except ValueError as error:
        raise DataError(where, "cannot be read", got=error, expected="equal numbers of values in every line") from error
    if rows.shape[1] == 8:
        return RawPoses(where, rows[:, 1:4], quaternion=rows[:, 4:], t=rows[:, 0])
    if rows.shape[1] == 12:
        matrices = rows.reshape(-1, 3, 4)
        return RawPoses(where, matrices[:, :, 3], rotation=matrices[:, :, :3], frame=np.arange(len(rows)))
    raise DataError(
        where, "unknown form", got=f"{rows.shape[1]} values a line", expected="a CSV header, 8 (TUM) or 12 (KITTI)"
    )


def _read_table(where: str, names: list[str], lines: list[str]) -> RawPoses:
    columns = {name: _column(names, known) for name, known in (("t", TIME), ("frame", FRAME), ("yaw", YAW))}
    columns |= {name: _column(names, known) for name, known in zip("xyz", (*POSITION, HEIGHT), strict=True)}
    columns |= {f"q{axis}": _column(names, known) for axis, known in zip("xyzw", QUATERNION, strict=True)}
    there = {name: index for name, (index, _) in columns.items() if index is not None}
    turns = {"qx", "qy", "qz", "qw"} <= set(there)
    if not {"x", "y"} <= set(there) or not ("yaw" in there or turns) or not ("t" in there or "frame" in there):
        expected = "x, y, yaw or yaw_deg, t or frame"
        raise DataError(where, "a column is missing", got=", ".join(names), expected=expected)
    rows = [_cells(line) for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(
                where, f"pose {number} has another number of values than the header", got=len(row),
                expected=str(len(names)),
            )  # fmt: skip
    try:
        value = {name: np.array([float(row[index]) for row in rows]) for name, index in there.items()}
    except ValueError as error:
        raise DataError(where, "a value is not a number", got=error) from error
    quaternion = np.column_stack([value[f"q{axis}"] for axis in "xyzw"]) if turns and "yaw" not in there else None
    timed = "t" in there
    return RawPoses(
        where,
        np.column_stack([value["x"], value["y"], value.get("z", np.zeros(len(rows)))]),
        yaw=value.get("yaw"),
        quaternion=quaternion,
        t=value["t"] if timed else None,
        frame=None if timed else _whole(where, value["frame"]),
        words=frozenset(word for name, (_, word) in columns.items() if word and name in there),
    )


def _column(names: list[str], known: tuple[str, ...]) -> tuple[int | None, str]:
    """Number of the first column with one of the known names, and the word for the unit that follows the name."""
    for index, name in enumerate(names):
        bare, _, unit = re.sub(r"\s*[\[(]\s*(\w*)\s*[\])]", r"/\1", name.lower()).partition("/")
        if bare in known:
            return index, UNIT_WORDS.get(unit, "")
        bare, _, unit = bare.rpartition("_")
        if bare in known and unit in (*UNIT_WORDS, *PLAIN_UNITS):
            return index, UNIT_WORDS.get(unit, "")
    return None, ""


def _whole(where: str, frames: Array) -> NDArray[np.int64]:
    bad = np.flatnonzero(frames != np.round(frames))
    if len(bad):
        raise DataError(where, "a frame number is not whole", got=f"{frames[bad[0]]:g}")
    return frames.astype(np.int64)
