"""What the numbers of pose files mean: units, order and axes. Tested against the motion. Read `understand` first.

A reading is a set of words. The plain one, no word at all: metres, seconds, radians counter-clockwise from x, y to the
left of x, quaternions as x, y, z, w, a moving frame that looks along its x. Where the plain reading makes a robot drive
otherwise than it looks, or impossibly fast, the other readings are tried. The one that explains the motion is used if
it is the only one; if there are several that lead to different motions, the user must say which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError, SpecError
from raev2_data_recipes.drives.pose_files import RawPoses
from raev2_tasks.nwm.pose import Array, steps, wrap

AXES = {
    sign + name: factor * np.eye(3)[number]
    for number, name in enumerate("xyz")
    for sign, factor in (("", 1.0), ("-", -1.0))
}
TIMES = {"ms": 1e-3, "us": 1e-6, "ns": 1e-9}
LENGTHS = {"millimetres": 1e-3, "centimetres": 1e-2}
OFFSETS = {"yaw+90": np.pi / 2, "yaw-90": -np.pi / 2, "yaw+180": np.pi}
BODIES = {"camera": ("z", "-y"), "opengl": ("-z", "y")}  # what looks ahead, what points up
MEANING = {
    "degrees": "yaw in degrees",
    "clockwise": "yaw runs clockwise",
    "compass": "yaw runs clockwise from the y axis, as a compass does",
    "y-right": "y points to the right of x",
    "yaw+90": "90 degrees must be added to the yaw",
    "yaw-90": "90 degrees must be taken from the yaw",
    "yaw+180": "the camera looks back, or the robot drives backwards",
    "millimetres": "lengths in millimetres",
    "centimetres": "lengths in centimetres",
    "ms": "times in milliseconds",
    "us": "times in microseconds",
    "ns": "times in nanoseconds",
    "wxyz": "quaternions as w, x, y, z",
    "inverse": "poses lead from the world to the moving frame",
    "camera": "camera frame: x right, y down, z ahead",
    "opengl": "camera frame: x right, y up, z back",
}
PLANAR, SPATIAL = ("degrees", "clockwise", "compass", "y-right", *OFFSETS), ("wxyz", "inverse", "camera", "opengl")
ASKED_ONLY = {"clockwise", "y-right", *OFFSETS}  # the motion cannot tell these from a robot that really moves so
EXCLUSIVE = [{"clockwise", "compass", "y-right"}, {"compass", *OFFSETS}, {"camera", "opengl"}, set(TIMES), set(LENGTHS)]

# Degrees between heading and motion: nothing else is tried up to the first; what explains it fits within the second,
# fits that differ by less than the third are equally good; the last one stops a build.
EXPLAINED, EXPLAINING, SAME_FIT, CONTRADICTION = 8.0, 15.0, 3.0, 60.0
MIN_CHORDS, MAX_CHORDS = 8, 400
STEADY = 45.0  # degrees from one way to the next of a robot that moves
MAX_SPEED, MIN_SPEED = 50.0, 0.005  # metres a second
PERIODS = (0.0005, 3.0)  # seconds between poses
EPOCH = (9e8, 4e9)  # seconds since 1970 of the years 1998 to 2096


@dataclass(frozen=True)
class PoseFile:
    """Poses (T, 3) x, y, yaw with either times (T,) in seconds or frame numbers (T,)."""

    poses: Array
    t: Array | None
    frame: NDArray[np.int64] | None


@dataclass(frozen=True)
class Reading:
    """How pose files are read. `up` and `optical` are axes, or empty: what the words say.

    lines    what was found out, for people
    error    median angle in degrees between heading and motion; None where too little moves
    """

    words: frozenset[str] = frozenset()
    up: str = ""
    optical: str = ""
    lines: list[str] = field(default_factory=list, compare=False)
    error: float | None = field(default=None, compare=False)


def parse_words(where: str, text: str) -> frozenset[str] | None:
    """The words of an option; None for `auto`. SpecError for an unknown word, or words that exclude each other."""
    if text == "auto":
        return None
    words = frozenset(word.strip() for word in text.split(",") if word.strip()) - {"plain"}
    unknown = sorted(words - set(MEANING))
    if unknown:
        expected = f"auto, plain, or some of {', '.join(MEANING)}"
        raise SpecError(where, "unknown word", got=unknown[0], expected=expected)
    for group in EXCLUSIVE:
        if len(words & group) > 1:
            raise SpecError(where, "words exclude each other", got=", ".join(sorted(words & group)))
    return words


# Applying a reading


def apply_reading(raw: RawPoses, reading: Reading) -> PoseFile:
    """Poses in metres, seconds and radians, seen from above."""
    words = reading.words | raw.words
    scale = next((factor for word, factor in LENGTHS.items() if word in words), 1.0)
    if raw.yaw is not None:
        poses = _planar(raw, words)
    else:
        position, rotation = _spatial(raw, words)
        ahead, up = _axes(rotation, reading, words)
        poses = _plane(position, rotation @ ahead, up)
    poses[:, :2] *= scale
    t = None if raw.t is None else raw.t * next((factor for word, factor in TIMES.items() if word in words), 1.0)
    return PoseFile(poses, t, raw.frame)


def _planar(raw: RawPoses, words: frozenset[str]) -> Array:
    assert raw.yaw is not None
    yaw = np.deg2rad(raw.yaw) if "degrees" in words else raw.yaw.copy()
    if "compass" in words:
        yaw = np.pi / 2 - yaw
    if "clockwise" in words:
        yaw = -yaw
    yaw = yaw + sum(angle for word, angle in OFFSETS.items() if word in words)
    left = -raw.position[:, 1] if "y-right" in words else raw.position[:, 1]
    return np.column_stack([raw.position[:, 0], left, yaw])


def _spatial(raw: RawPoses, words: frozenset[str]) -> tuple[Array, Array]:
    """Positions (T, 3) and rotations (T, 3, 3) of the moving frame in the world."""
    if raw.rotation is not None:
        rotation = raw.rotation
    else:
        assert raw.quaternion is not None
        rotation = matrices(np.roll(raw.quaternion, -1, axis=1) if "wxyz" in words else raw.quaternion)
    if "inverse" not in words:
        return raw.position, rotation
    back = rotation.transpose(0, 2, 1)
    return -(back @ raw.position[..., None])[..., 0], back


def _axes(rotation: Array, reading: Reading, words: frozenset[str]) -> tuple[Array, Array]:
    """What looks ahead in the moving frame, and which axis of the world points up."""
    ahead, top = next((axes for word, axes in BODIES.items() if word in words), ("x", "z"))
    ahead = reading.optical or ahead
    if reading.up or (ahead == "x" and not words & {"wxyz", "inverse"}):
        return AXES[ahead], AXES[reading.up or "z"]
    if top.strip("-") == ahead.strip("-"):
        top = "-y"  # of a camera whose optical axis was given
    return AXES[ahead], AXES[_nearest_axis((rotation @ AXES[top]).mean(0))]


def _nearest_axis(vector: Array) -> str:
    return max(AXES, key=lambda name: float(AXES[name] @ vector))


def _plane(position: Array, ahead: Array, up: Array) -> Array:
    """Project to the ground: heading is the projection of what looks ahead, seen from above."""
    first = np.eye(3)[(int(np.abs(up).argmax()) + 1) % 3]
    second = np.cross(up, first)  # right-handed seen from above
    return np.column_stack([position @ first, position @ second, np.arctan2(ahead @ second, ahead @ first)])


def matrices(quaternions: Array) -> Array:
    """Rotation matrices (T, 3, 3) of quaternions (T, 4) in the order x, y, z, w."""
    x, y, z, w = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


# Testing a reading against the motion


def heading_errors(position: Array, ahead: Array) -> Array:
    """Degrees, 0 to 180, between what looks ahead (T, d) and the motion (T, d).

    A motion leads over so many poses that the one before and the one after point most nearly in the same direction.
    Where even then they do not, nothing moves: a robot stands, and its poses tremble. Then there is no error.
    """
    steadiest, errors = STEADY, np.zeros(0)
    lag = 1
    while 2 * lag < len(position):
        start = np.unique(np.linspace(0, len(position) - 1 - 2 * lag, MAX_CHORDS).round().astype(int))
        first, second = position[start + lag] - position[start], position[start + 2 * lag] - position[start + lag]
        moving = _is_long(first) & _is_long(second)
        change = float(_angles(first[moving], second[moving]).mean()) if moving.any() else np.inf
        if change <= steadiest and (not len(errors) or moving.sum() >= MIN_CHORDS):
            steadiest, errors = change, _angles(first[moving], (ahead[start] + ahead[start + lag])[moving])
        lag *= 2
    return errors


def _is_long(chords: Array) -> NDArray[np.bool_]:
    length = np.linalg.norm(chords, axis=1)
    return (length > 0.5 * length.mean()) & (length > 0)


def _angles(first: Array, second: Array) -> Array:
    """Degrees between vectors; 90 where one is zero."""
    size = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.rad2deg(np.arccos(np.clip((first * second).sum(1) / np.maximum(size, 1e-12), -1, 1)))


def _errors(raw: RawPoses, reading: Reading) -> Array:
    """In space where the poses are, so that a wrong vertical axis does not hide a wrong heading."""
    words = reading.words | raw.words
    if raw.yaw is not None:
        poses = _planar(raw, words)
        return heading_errors(poses[:, :2], np.column_stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])]))
    position, rotation = _spatial(raw, words)
    ahead, up = _axes(rotation, reading, words)
    errors = heading_errors(position, rotation @ ahead)
    body_up = "z" if not words & set(BODIES) and not reading.optical else ""
    upright = not body_up or _nearest_axis((rotation @ AXES[body_up]).mean(0)) == _nearest_axis(up)
    return errors if upright or reading.up else np.full(len(errors), 180.0)


def median_error(raws: Iterable[RawPoses], reading: Reading) -> float | None:
    """Over all files; None where too little moves to tell."""
    errors = np.concatenate([_errors(raw, reading) for raw in raws] or [np.zeros(0)])
    return float(np.median(errors)) if len(errors) >= MIN_CHORDS else None


def understand(
    where: str,
    raws: Sequence[RawPoses],
    *,
    words: frozenset[str] | None = None,
    up: str = "",
    optical: str = "",
    keep: bool = False,
    metric: bool = True,
    period_s: float | None = None,
) -> Reading:
    """How the files of a source are read, the same way for all of them.

    words      what the user says, None: found out
    keep       the user says that the heading need not fit the motion
    metric     whether lengths should be metres
    period_s   seconds between poses that have no times

    DataError when nothing, or more than one reading, explains a contradiction.
    """
    stated = Reading(words or frozenset(), up, optical)
    if not raws:
        return stated
    if words is None:
        stated = _with(stated, _time_words(where, raws, metric, period_s), raws)
        if metric:
            stated = _with(stated, _length_words(where, raws, stated, period_s), raws)
    error = median_error(raws, stated)
    if error is None:
        return _told(stated, [*stated.lines, "Heading: too little motion to test it."], None)
    if words is None and error > EXPLAINED:
        stated = _explained(stated, raws, error)
        error = error if stated.error is None else stated.error
    if error > CONTRADICTION and not keep:
        raise contradiction(where, raws, stated, error)
    fits = f"Heading: {error:.0f} degrees from the motion (median of {len(raws)} files)."
    return _told(stated, [*stated.lines, fits], error)


def check_files(where: str, raws: Sequence[RawPoses], reading: Reading, keep: bool) -> None:
    """DataError when the reading that fits the files together contradicts one of them by more than 60 degrees."""
    if keep:
        return
    for raw in raws:
        error = median_error([raw], reading)
        if error is not None and error > CONTRADICTION:
            raise contradiction(raw.where, [raw], reading, error)


def _told(reading: Reading, lines: list[str], error: float | None) -> Reading:
    return Reading(reading.words, reading.up, reading.optical, lines, error)


def _with(reading: Reading, found: tuple[frozenset[str], str], raws: Sequence[RawPoses]) -> Reading:
    words, line = found
    lines = [*reading.lines, line] if line else reading.lines
    return _told(Reading(reading.words | words, reading.up, reading.optical), lines, None)


def _explained(stated: Reading, raws: Sequence[RawPoses], error: float) -> Reading:
    """With the words that explain the motion, where no others do and no robot would really move so."""
    found = explanations(raws, stated, error)
    if not found or any((one.words - stated.words) & ASKED_ONLY for one in found):
        return stated
    best = found[0]
    if not all(_same_motion(raws, best, other) for other in found[1:]):
        return stated
    line = f"Poses: {_meaning(best.words - stated.words)}: the heading is then {best.error:.0f} degrees from the motion"
    return _told(best, [*stated.lines, f"{line}, not {error:.0f} (reading={_text(best.words)})."], best.error)


def explanations(raws: Sequence[RawPoses], stated: Reading, error: float) -> list[Reading]:
    """Readings of one or two more words by which the robot drives where it looks: of those that fit nearly as well as
    the best one the ones of fewest words, the best of them first.
    """
    planar = [raw.yaw is not None for raw in raws]
    known = PLANAR * any(planar) + SPATIAL * (not all(planar))
    found: list[tuple[float, Reading]] = []
    for reading in (one for number in (1, 2) for one in _candidates(stated, known, number)):
        fit = median_error(raws, reading)
        if fit is not None and fit <= min(EXPLAINING, error / 2):
            found.append((fit, _told(reading, stated.lines, fit)))
    limit = max(SAME_FIT, 2 * min((fit for fit, _ in found), default=0.0))
    fitting = sorted((item for item in found if item[0] <= limit), key=lambda item: item[0])
    fewest = min((len(reading.words) for _, reading in fitting), default=0)
    return [reading for _, reading in fitting if len(reading.words) == fewest]


def _candidates(stated: Reading, known: Sequence[str], number: int) -> list[Reading]:
    found = []
    for more in combinations([word for word in known if word not in stated.words], number):
        words = stated.words | set(more)
        if any(len(words & group) > 1 for group in EXCLUSIVE) or (stated.optical and set(more) & set(BODIES)):
            continue
        found.append(Reading(words, stated.up, stated.optical, stated.lines))
    return found


def _same_motion(raws: Sequence[RawPoses], first: Reading, second: Reading) -> bool:
    """Whether two readings lead to the same motions, but for a hundredth of the mean step and two degrees."""
    for raw in raws:
        one, other = (steps(apply_reading(raw, reading).poses) for reading in (first, second))
        scale = np.hypot(one[:, 0], one[:, 1]).mean() if len(one) else 0.0
        if np.abs(one - other)[:, :2].max(initial=0) > max(0.01 * scale, 1e-9):
            return False
        if np.abs(wrap(one[:, 2] - other[:, 2])).max(initial=0) > np.deg2rad(2):
            return False
    return True


def contradiction(where: str, raws: Sequence[RawPoses], stated: Reading, error: float, option: str = "") -> DataError:
    """The error that stops a build, and what would explain it; `option` says how to state that where not `reading`."""
    found = [one.words - stated.words for one in explanations(raws, stated, error)]
    ways = [f"{_meaning(words)} ({option or f'--set reading={_text(stated.words | words)}'})" for words in found]
    hint = "Explained by: " + "; or ".join(ways) + ". " if ways else ""
    return DataError(
        where, "the heading contradicts the motion", got=f"{error:.0f} degrees between them (median)",
        expected=f"at most {CONTRADICTION:.0f}", hint=f"{hint}If the data are meant so: --set heading=keep.",
    )  # fmt: skip


def _meaning(words: frozenset[str]) -> str:
    return ", ".join(MEANING[word] for word in sorted(words)) or "as stated"


def _text(words: frozenset[str]) -> str:
    return ",".join(sorted(words)) or "plain"


# Units of time and length


def _time_words(
    where: str, raws: Sequence[RawPoses], metric: bool, period_s: float | None
) -> tuple[frozenset[str], str]:
    """The unit of time that makes period and speed possible, where seconds do not."""
    timed = [raw for raw in raws if raw.t is not None and len(raw) > 1 and not raw.words & set(TIMES)]
    if not timed:
        return frozenset(), ""
    period = float(np.median([np.median(np.diff(raw.t)) for raw in timed if raw.t is not None]))
    start = float(np.median([raw.t[0] for raw in timed if raw.t is not None]))

    def possible(factor: float) -> bool:
        speed = _speed(timed, frozenset(), period_s) / factor
        dated = start < 1e8 or EPOCH[0] <= start * factor <= EPOCH[1]  # beyond 1e8 it counts from 1970
        return PERIODS[0] <= period * factor <= PERIODS[1] and (not metric or speed <= MAX_SPEED) and dated

    if possible(1.0) or period <= PERIODS[1]:
        return frozenset(), ""
    found = [word for word, factor in TIMES.items() if possible(factor)]
    if len(found) > 1:
        raise _ambiguous(where, f"{period:g} between times of poses, as seconds", found)
    if not found:
        return frozenset(), ""
    line = f"Poses: {MEANING[found[0]]}: they are {period * TIMES[found[0]]:g} s apart, not {period:g} s."
    return frozenset(found), f"{line} (reading={found[0]})"


def _length_words(
    where: str, raws: Sequence[RawPoses], reading: Reading, period_s: float | None
) -> tuple[frozenset[str], str]:
    """The unit of length that makes the speed possible, where metres do not."""
    speed = _speed([raw for raw in raws if not raw.words & set(LENGTHS)], reading.words, period_s)
    if speed <= MAX_SPEED:
        return frozenset(), ""
    found = [word for word, factor in LENGTHS.items() if MIN_SPEED <= speed * factor <= MAX_SPEED]
    if len(found) != 1:
        raise _ambiguous(where, f"a speed of {speed:.3g} metres a second", found)
    line = f"Poses: {MEANING[found[0]]}: the speed is {speed * LENGTHS[found[0]]:.3g} m/s, not {speed:.3g}."
    return frozenset(found), f"{line} (reading={found[0]})"


def _speed(raws: Sequence[RawPoses], words: frozenset[str], period_s: float | None) -> float:
    """Median over files of the mean speed while moving, in units of the files a second."""
    speeds = []
    for raw in raws:
        factor = next((factor for word, factor in TIMES.items() if word in words | raw.words), 1.0)
        if raw.t is not None:
            t = np.asarray(raw.t * factor, np.float64)
        elif raw.frame is not None and period_s is not None:
            t = np.asarray(raw.frame * period_s, np.float64)
        else:
            continue
        length = np.linalg.norm(np.diff(raw.position, axis=0), axis=1)
        moving = length > 0.5 * length.mean() if len(length) else np.zeros(0, bool)
        if moving.any() and np.diff(t)[moving].sum() > 0:
            speeds.append(float(length[moving].sum() / np.diff(t)[moving].sum()))
    return float(np.median(speeds)) if speeds else 0.0


def _ambiguous(where: str, got: str, found: Sequence[str]) -> DataError:
    options = "; or ".join(f"{MEANING[word]} (--set reading={word})" for word in found)
    hint = f"Explained by: {options}. " if found else ""
    return DataError(where, "not possible", got=got, hint=f"{hint}If it is right: --set reading=plain.")
