"""LeRobot datasets, versions 2 and 3: Parquet tables with poses, frames in videos or in the tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from raev2.errors import DataError
from raev2_data_recipes.drives.pose_files import RawPoses, checked
from raev2_data_recipes.drives.readings import Reading, apply_reading, understand
from raev2_data_recipes.drives.sampling import resample
from raev2_data_recipes.drives.trajectory_recipe import files_below, require
from raev2_data_recipes.drives.video_poses import video_trajectories
from raev2_tasks.nwm.data.trajectories import Source, Trajectory
from raev2_tasks.nwm.data.video_frames import timeline

POSITIONS, YAWS = (
    ("observation.position", "observation.pose", "position"),
    ("observation.yaw", "observation.heading", "yaw"),
)
X, Y, YAW = (
    ("x", "pos_x", "position_x", "base_x"),
    ("y", "pos_y", "position_y", "base_y"),
    ("yaw", "theta", "heading", "base_yaw"),
)
last_timeline = lru_cache(maxsize=2)(timeline)  # one video may hold many episodes


@dataclass(frozen=True)
class Episode:
    """Where an episode lies: its table, and the part of a video."""

    number: int
    table: Path
    video: Path | None
    window_s: tuple[float, float]


@dataclass(frozen=True)
class LeRobot:
    """A dataset folder by its meta/info.json."""

    folder: Path
    info: dict[str, Any] = field(repr=False)
    camera: str
    poses: list[tuple[str, list[int]]]  # columns, and which of their values are x, y, yaw in turn


def lerobot_sources(folder: Path, options: Mapping[str, str]) -> Iterator[Source]:
    """One per episode."""
    data, episodes = _open(folder, options)
    reading = _reading(data, episodes, options)
    for episode in episodes:
        name = f"{folder.name}_{episode.number:06d}"
        yield Source(name, str(episode.table), partial(_read, data, episode, name, reading, options))


def lerobot_lines(folder: Path, options: Mapping[str, str]) -> list[str]:
    """For plans: the camera, the columns of the poses, and how they are read."""
    try:
        data, episodes = _open(folder, options)
        columns = ", ".join(name for name, _ in data.poses)
        return [f"{folder.name}: camera {data.camera}, poses from {columns}.", *_reading(data, episodes, options).lines]
    except DataError as error:
        return [f"Cannot be used: {error}"]


def lerobot_files(folder: Path, options: Mapping[str, str]) -> list[Path]:
    """Tables, videos of the camera that is chosen, and what describes them."""
    files = [file for file in files_below(folder) if file.relative_to(folder).parts[0] == "meta"]
    try:
        _, episodes = _open(folder, options)
    except DataError:
        return files
    return files + [file for one in episodes for file in (one.table, one.video) if file is not None]


def _open(folder: Path, options: Mapping[str, str]) -> tuple[LeRobot, list[Episode]]:
    """The dataset and its episodes."""
    require("pyarrow")
    try:
        data = _described(folder, options)
        return data, list(_episodes(data))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise DataError(f"data {folder}", "its meta folder is not that of a LeRobot dataset", got=got) from error


def _described(folder: Path, options: Mapping[str, str]) -> LeRobot:
    where = f"data {folder}"
    try:
        info = json.loads((folder / "meta" / "info.json").read_text(encoding="utf-8"))
        features = info["features"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(where, "meta/info.json cannot be read", got=type(error).__name__) from error
    cameras = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
    camera = options["camera"] or next(iter(cameras), "")
    if camera not in cameras:
        raise DataError(where, "no such camera", got=camera, expected=" or ".join(cameras))
    poses = _pose_columns(features, options["poses"])
    if not poses:
        listed = ", ".join(f"{name} {_names(feature)}" for name, feature in features.items() if name not in cameras)
        hint = "Choose columns with --set poses=COLUMN,COLUMN."
        raise DataError(where, "no columns of x, y and yaw", got=listed, hint=hint)
    return LeRobot(folder, info, camera, poses)


def _names(feature: Mapping[str, Any]) -> list[str]:
    """Names of the values of a column, flat."""
    names = feature.get("names") or []
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    return [str(name).lower() for name in names]


def _pose_columns(features: Mapping[str, Any], asked: str) -> list[tuple[str, list[int]]]:
    """Columns that together give x, y, yaw; empty where there are none."""
    if asked:
        columns = [name.strip() for name in asked.split(",")]
        if not set(columns) <= set(features):
            return []
        named = next(iter(_by_name(features, columns)), None)
        if named is not None:
            return [named]
        return [(columns[0], [0, 1, 2])] if len(columns) == 1 else [(columns[0], [0, 1]), (columns[1], [0])]
    position = next((name for name in POSITIONS if name in features), None)
    yaw = next((name for name in YAWS if name in features), None)
    if position and yaw:
        return [(position, [0, 1]), (yaw, [0])]
    return list(_by_name(features, list(features)))[:1]


def _by_name(features: Mapping[str, Any], columns: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Columns whose values are named x, y and yaw."""
    for column in columns:
        names = _names(features[column])
        found = [next((names.index(name) for name in known if name in names), None) for known in (X, Y, YAW)]
        if None not in found and not column.startswith("action"):
            yield column, [index for index in found if index is not None]


def _episodes(data: LeRobot) -> Iterator[Episode]:
    """Of version 3 by its tables of episodes, of version 2 by number."""
    info, key = data.info, data.camera
    is_video = info["features"][key]["dtype"] == "video"
    tables = sorted((data.folder / "meta" / "episodes").rglob("*.parquet"))
    if tables:
        for row in (row for table in tables for row in _rows(table)):
            place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
            video, window = None, (-np.inf, np.inf)
            if is_video:
                where = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
                video = data.folder / info["video_path"].format(video_key=key, **where)
                window = (row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"])
            yield Episode(row["episode_index"], data.folder / info["data_path"].format(**place), video, window)
        return
    for number in range(info["total_episodes"]):
        place = {"episode_index": number, "episode_chunk": number // info.get("chunks_size", 1000)}
        video = data.folder / info["video_path"].format(video_key=key, **place) if is_video else None
        yield Episode(number, data.folder / info["data_path"].format(**place), video, (-np.inf, np.inf))


def _rows(table: Path, columns: list[str] | None = None, episode: int | None = None) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    chosen = None if episode is None else [("episode_index", "==", episode)]
    try:
        return list(pyarrow.parquet.read_table(table, columns=columns, filters=chosen).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"data {table}", "cannot be read", got=error) from error


def _poses(data: LeRobot, episode: Episode, columns: Sequence[str] = ()) -> tuple[RawPoses, list[dict[str, Any]]]:
    """The numbers of an episode, and its rows."""
    wanted = ["timestamp", "episode_index", *(name for name, _ in data.poses), *columns]
    where, rows = f"data {episode.table}", _rows(episode.table, wanted, episode.number)
    if not rows:
        raise DataError(where, f"has no rows of episode {episode.number}")
    try:
        picked = [[np.ravel(row[name])[i] for name, places in data.poses for i in places] for row in rows]
        values, t = np.array(picked, np.float64), np.array([row["timestamp"] for row in rows], np.float64)
    except (IndexError, TypeError, ValueError) as error:
        raise DataError(where, f"poses of episode {episode.number} are not numbers", got=error) from error
    position = np.column_stack([values[:, :2], np.zeros(len(values))])
    return checked(RawPoses(f"episode {episode.number}", position, values[:, 2], t=t)), rows


def _reading(data: LeRobot, episodes: Sequence[Episode], options: Mapping[str, str]) -> Reading:
    """As the motion of the first episodes tells."""
    raws = []
    for episode in episodes[:20]:
        try:
            raws.append(_poses(data, episode)[0])
        except DataError:
            continue  # left out later, with this reason
    return understand(f"data {data.folder}", raws, keep=options["heading"] == "keep")


def _read(
    data: LeRobot, episode: Episode, name: str, reading: Reading, options: Mapping[str, str]
) -> Iterator[Trajectory]:
    if episode.video is not None:
        found = apply_reading(_poses(data, episode)[0], reading)
        assert found.t is not None
        shown = last_timeline(episode.video)
        start = episode.window_s[0] if np.isfinite(episode.window_s[0]) else 0.0
        visible = int(np.diff(np.searchsorted(shown.t, np.array(episode.window_s) - 1e-6))[0])
        if abs(visible - len(found.poses)) > 1:  # the window of an episode may be rounded
            raise DataError(
                f"video {name}",
                "different numbers of visible frames and poses",
                got=f"{visible} and {len(found.poses)}",
            )
        yield from video_trajectories(
            name, episode.video, shown, found.t + start, found.poses, {"decoder": "pyav", **options}, episode.window_s
        )
        return
    raw, rows = _poses(data, episode, [data.camera])
    found = apply_reading(raw, reading)
    assert found.t is not None
    pieces = resample(f"episode {name}", found.t, found.t, found.poses, float(options["rate_hz"]))
    for number, piece in enumerate(pieces):
        frames = (_picture(data.folder, rows[index][data.camera]) for index in piece.frames.tolist())
        part = name if len(pieces) == 1 else f"{name}_{number}"
        yield Trajectory(part, piece.t, piece.poses[:, :2], piece.poses[:, 2], frames)


def _picture(folder: Path, stored: Mapping[str, Any]) -> bytes:
    """The file of a picture, in the table or beside it."""
    return stored.get("bytes") or (folder / stored["path"]).read_bytes()
