"""Folders of trajectories: what data recipes write and `TrajectoryDataset` reads. Read `Trajectory` first.

    manifest.json                 as of every dataset; also rate_hz, length_unit, camera, spacing_m, actions, ...
    train.jsonl, val.jsonl        one line per trajectory: id, recording, num_frames, poses, sha256, suffix; spacing_m
                                  where folders with robots of several speeds were joined
    poses/<id>.npz                t (T,) s, position (T, 2) m, yaw (T,) rad, unwrapped; frame_sha256 (T, 32) uint8;
                                  command (T, c) where the recording has one
    frames/<id>/000000.jpg, ...   the frames
    index/<protocol>.json         frozen places of an evaluation (tasks/raev2_tasks/nwm/data/index.py)
    rejects.jsonl                 trajectories that were left out, each with its reason

A split is a partition of whole recordings, unless the manifest says otherwise. `num_samples` counts frames.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raev2.errors import DataError
from raev2.files.damage import stop_if_machine
from raev2.files.images import PictureFile, read_picture
from raev2.files.manifest import FORMAT_VERSION, checked_bytes, fingerprint, read_manifest
from raev2_tasks.nwm.data.frames import encode_frame, fit_image
from raev2_tasks.nwm.data.validate import BLACK, check_frames, check_trajectory, frame_warnings, warnings
from raev2_tasks.nwm.pose import Array, steps
from raev2_tasks.nwm.spec import Fit

logger = logging.getLogger(__name__)
Frame = bytes | NDArray[np.uint8]
SplitRule = Literal["by-recording", "nwm-legacy", "by-time", "given"]
SPLITS = ("train", "val")
REJECTS = "rejects.jsonl"
BAD_SOURCE = (DataError, OSError, ValueError)  # what a source that cannot be used raises
QUANTILES = (0.0, 0.005, 0.5, 0.995, 1.0)
FORMULAS = {
    "spacing_m": "mean over pairs of consecutive training frames of |p[i+1] - p[i]|",
    "actions": "quantiles 0, 0.5 %, 50 %, 99.5 %, 1 and mean, std over the same pairs of the motion per frame, "
    "R(yaw[i])^T (p[i+1] - p[i]) and wrap(yaw[i+1] - yaw[i])",
}


@dataclass(frozen=True)
class Trajectory:
    """A continuous piece of a recording, as a data recipe offers it.

    t         (T,) seconds, increasing
    position  (T, 2) metres in a fixed frame, x and y of a right-handed system seen from above
    yaw       (T,) radians, counter-clockwise, 0 = along x
    frames    T encoded image files, or RGB arrays (H, W, 3) uint8; read once. DataError from it rejects the trajectory
    command   (T, c) what the robot was told at each frame, or None
    split     'train' or 'val' for data that comes with a split
    spacing_m  metres between two frames of its robot, where others in the folder have another; None: that of the folder
    """

    id: str
    t: Array
    position: Array
    yaw: Array
    frames: Iterable[Frame]
    command: Array | None = None
    split: str | None = None
    spacing_m: float | None = None


@dataclass(frozen=True)
class Source:
    """One file or folder that may hold trajectories; `read` does the work.

    recording   parent of the trajectories; a split by recording keeps them together
    path        for people
    read        raises DataError or OSError for a source that cannot be used
    """

    recording: str
    path: str
    read: Callable[[], Iterable[Trajectory]]


@dataclass(frozen=True)
class Storage:
    """How frames are stored and split.

    size          height and width of the stored frames; None keeps the files as they are
    suffix        '.jpg' or '.png', for frames that are not kept as they are
    min_frames    shorter trajectories are left out
    """

    size: tuple[int, int] | None = None
    fit: Fit = "squeeze"
    suffix: str = ".jpg"
    split: SplitRule = "by-recording"
    val_fraction: float = 0.1
    min_frames: int = 5


@dataclass(frozen=True)
class StoredTrajectory:
    """A trajectory of a folder: poses (T, 3) x, y, yaw in memory, frames on disk; `spacing_m` as in `Trajectory`."""

    id: str
    recording: str
    t: Array
    poses: Array
    command: Array | None
    frames_dir: Path
    suffix: str
    frame_sha256: NDArray[np.uint8] = field(repr=False)
    spacing_m: float | None = None

    def __len__(self) -> int:
        return len(self.t)

    def frame_file(self, index: int) -> Path:
        """The file of frame `index`."""
        return self.frames_dir / f"{index:06d}{self.suffix}"


# Write


def write_trajectories(
    folder: Path, sources: Iterable[Source], storage: Storage, head: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a dataset into the existing `folder` and return its manifest.

    head     first fields of the manifest: name, recipe, options, licence, attribution
    facts    rate_hz (nominal frame rate), length_unit, camera

    A trajectory that cannot be used is left out and listed with its reason. DataError when none is left, or none for
    one of the splits.
    """
    for name in ("poses", "frames"):
        (folder / name).mkdir()
    entries: list[dict[str, Any]] = []
    rejects: list[dict[str, str]] = []
    given: dict[str, str] = {}
    black = 0
    for source in sources:
        try:
            for trajectory in source.read():
                try:
                    entry, num_black = _write_one(folder, trajectory, source.recording, storage, entries)
                except BAD_SOURCE as error:
                    stop_if_machine(error)
                    rejects.append({"path": source.path, "trajectory": trajectory.id, "reason": reason_of(error)})
                    continue
                entries.append(entry)
                black += num_black
                if trajectory.split is not None:
                    given[entry["id"]] = trajectory.split
        except BAD_SOURCE as error:
            stop_if_machine(error)
            rejects.append({"path": source.path, "reason": reason_of(error)})
    for reject in rejects:
        logger.warning("left out: %s", reject["reason"])
    if not entries:
        hint = f"First of them: {rejects[0]['reason']}" if rejects else ""
        raise DataError(f"data {head['recipe']}", f"no usable trajectory; {len(rejects)} rejected", hint=hint)

    split_of, notes = split_entries(entries, storage.split, storage.val_fraction, given)
    splits: dict[str, Any] = {}
    for split in SPLITS:
        lines = [entry for entry in entries if split_of[entry["id"]] == split]
        data = "".join(json.dumps(entry) + "\n" for entry in lines).encode()
        (folder / f"{split}.jsonl").write_bytes(data)
        splits[split] = {
            "num_samples": sum(entry["num_frames"] for entry in lines),
            "num_trajectories": len(lines),
            "index": f"{split}.jsonl",
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    if rejects:
        (folder / REJECTS).write_text("".join(json.dumps(reject) + "\n" for reject in rejects), encoding="utf-8")

    stored = {split: _read_index(folder, splits[split]["index"]) for split in SPLITS}
    statistics = action_statistics(stored["train"])
    every = [one for split in SPLITS for one in stored[split]]
    names = [split for split in SPLITS for _ in stored[split]]
    odd = notes + warnings(every, names, statistics["spacing_m"], facts["rate_hz"])
    odd += frame_warnings(num_frozen(every, statistics["spacing_m"]), black, sum(map(len, every)))
    sizes = sorted({tuple(entry["size_px"]) for entry in entries})
    if len(sizes) > 1:
        odd.append(f"frames of {len(sizes)} sizes: {', '.join(f'{width}x{height}' for width, height in sizes[:5])}")
    for line in odd:
        logger.warning("%s: %s", head["name"], line)
    manifest = {
        "format_version": FORMAT_VERSION,
        **head,
        "image_size_px": list(sizes[0]) if len(sizes) == 1 else None,
        "classes": [],
        "splits": splits,
        "fingerprint": fingerprint(splits, []),
        "rejected": len(rejects),
        "split_rule": storage.split,
        **facts,
        "stored_fit": None if storage.size is None else storage.fit,
        **statistics,
        "formulas": FORMULAS,
        "warnings": odd,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def reason_of(error: Exception) -> str:
    """Why a source is left out, in words."""
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def _write_one(
    folder: Path, trajectory: Trajectory, recording: str, storage: Storage, written: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], int]:
    """Write one trajectory; its line of the index, and how many of its frames are nearly black."""
    name, where = re.sub(r"[^A-Za-z0-9._-]+", "_", trajectory.id).strip("."), f"trajectory {trajectory.id}"
    if not name or any(entry["id"] == name for entry in written):
        raise DataError(where, "its name is empty or taken", got=name)
    t, position, yaw = (
        np.asarray(values, np.float64) for values in (trajectory.t, trajectory.position, trajectory.yaw)
    )
    check_trajectory(where, t, position, yaw, storage.min_frames)
    frames_dir = folder / "frames" / name
    frames_dir.mkdir()
    try:
        stored = [
            _write_frame(where, frames_dir, index, frame, storage) for index, frame in enumerate(trajectory.frames)
        ]
        check_frames(where, len(stored), len(t), [one.size for one in stored])
        if len({one.suffix for one in stored}) > 1:
            raise DataError(where, "frames are of several formats", got=sorted({one.suffix for one in stored}))
    except BaseException:
        shutil.rmtree(frames_dir)
        raise
    arrays: dict[str, Any] = {"t": t, "position": position, "yaw": np.unwrap(yaw)}
    if trajectory.command is not None:
        arrays["command"] = np.asarray(trajectory.command, np.float64)
        if len(arrays["command"]) != len(t):
            shutil.rmtree(frames_dir)
            raise DataError(where, "different numbers of commands and poses", got=len(arrays["command"]))
    buffer = io.BytesIO()
    np.savez(buffer, frame_sha256=np.stack([one.sha256 for one in stored]), **arrays)
    (folder / "poses" / f"{name}.npz").write_bytes(buffer.getvalue())
    entry = {
        "id": name,
        "recording": recording,
        "num_frames": len(t),
        "size_px": list(stored[0].size),
        "suffix": stored[0].suffix,
        "poses": f"poses/{name}.npz",
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    }
    if trajectory.spacing_m is not None:
        entry["spacing_m"] = trajectory.spacing_m
    return entry, sum(one.black for one in stored)


@dataclass(frozen=True)
class _StoredFrame:
    size: tuple[int, int]  # width, height
    suffix: str
    sha256: NDArray[np.uint8]
    black: bool


def _write_frame(where: str, frames_dir: Path, index: int, frame: Frame, storage: Storage) -> _StoredFrame:
    if isinstance(frame, bytes):
        picture = read_picture(frame, f"{where}, frame {index}")
    else:
        picture = PictureFile(Image.fromarray(frame), "", plain=True)
    image, suffix = picture.rgb, storage.suffix
    kept_suffix = {"JPEG": ".jpg", "PNG": ".png"}.get(picture.format)
    if storage.size is None and isinstance(frame, bytes) and kept_suffix:
        data, suffix = frame, kept_suffix  # as it is: whoever reads it makes it upright RGB
    else:
        image = image if storage.size is None else fit_image(image, storage.size, storage.fit)
        data = encode_frame(image, suffix)
    (frames_dir / f"{index:06d}{suffix}").write_bytes(data)
    digest = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
    return _StoredFrame(image.size, suffix, digest, is_black(image))


def is_black(image: Image.Image) -> bool:
    """Whether an image is nearly black: a mean level below 8 of 255."""
    return bool(np.asarray(image.convert("L").resize((16, 16))).mean() < BLACK)


def split_entries(
    entries: Sequence[Mapping[str, Any]], rule: SplitRule, val_fraction: float, given: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Split by trajectory id, and what is unusual about it.

    by-recording   whole recordings whose hash lies below the fraction, so that a new one moves no other
    nwm-legacy     the same with single trajectories, as published tables were made: pieces of one recording land on
                   both sides
    by-time        given: the end of each recording, after a gap
    given          the split that came with the data

    Where chance leaves a split empty, the one nearest to the fraction goes there, and a line says so. DataError when
    a split is empty nevertheless.
    """
    if rule in ("given", "by-time"):
        missing = [entry["id"] for entry in entries if entry["id"] not in given]
        if missing:
            raise DataError(
                "data", "trajectories without a given split", got=missing[0], hint="Use split=by-recording."
            )
        found, notes = dict(given), list[str]()
    else:
        unit = "recording" if rule == "by-recording" else "id"
        in_val, notes = validation_names(sorted({entry[unit] for entry in entries}), val_fraction)
        found = {entry["id"]: "val" if entry[unit] in in_val else "train" for entry in entries}
    for split in SPLITS:
        if split not in found.values():
            hint = "Use split=by-time to keep the end of each recording for validation." if rule != "by-time" else ""
            raise DataError("data", f"nothing for the split {split}", got=f"{len(entries)} trajectories", hint=hint)
    return found, notes


def validation_names(names: Sequence[str], fraction: float) -> tuple[set[str], list[str]]:
    """The names whose hash, as a number from 0 to 1, lies below `fraction`; with two names at least one, never all."""
    place = {name: int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13 for name in names}
    below = {name for name in names if place[name] < fraction}
    if len(names) < 2 or 0 < len(below) < len(names):
        return below, []
    nearest = min(place, key=place.__getitem__) if not below else max(place, key=place.__getitem__)
    split = "train" if below else "val"
    note = f"by its hash none of {len(names)} falls into {split}; {nearest} was put there, and may move when more come"
    return below ^ {nearest}, [note]


def action_statistics(trajectories: Sequence[StoredTrajectory]) -> dict[str, Any]:
    """`spacing_m` and `actions` of the manifest; what they are stands in `FORMULAS`."""
    motions = np.concatenate([steps(one.poses) for one in trajectories])
    names = ("forward_m", "left_m", "turn_rad")
    return {
        "spacing_m": float(np.hypot(motions[:, 0], motions[:, 1]).mean()),
        "actions": {
            name: {
                "quantiles": [round(float(value), 6) for value in np.quantile(values, QUANTILES)],
                "mean": round(float(values.mean()), 6),
                "std": round(float(values.std()), 6),
            }
            for name, values in zip(names, motions.T, strict=True)
        },
    }


def num_frozen(trajectories: Sequence[StoredTrajectory], spacing_m: float) -> int:
    """Frames whose bytes equal those of the frame before although the camera moved or turned."""
    count = 0
    for one in trajectories:
        same = (one.frame_sha256[1:] == one.frame_sha256[:-1]).all(1)
        motion = steps(one.poses)
        count += int((same & ((np.hypot(*motion[:, :2].T) > 0.2 * spacing_m) | (np.abs(motion[:, 2]) > 0.02))).sum())
    return count


# Read


def read_trajectories(dir: str | Path, split: str) -> list[StoredTrajectory]:
    """The trajectories of a split, with their poses; DataError for a folder that is none, or is damaged."""
    manifest = read_manifest(dir)
    check_kind(dir, manifest)
    if split not in manifest["splits"]:
        raise DataError(f"data {dir}", "unknown split", got=split, expected=f"one of {', '.join(manifest['splits'])}")
    entry = manifest["splits"][split]
    found = _read_index(Path(dir), entry["index"])
    count = sum(map(len, found))
    if count != entry["num_samples"]:
        raise DataError(
            f"data {dir}", f"{entry['index']} has {count:,} frames, manifest says {entry['num_samples']:,}",
            hint=f"Run `raev2 data verify {dir}`.",
        )  # fmt: skip
    if not found:
        raise DataError(f"data {dir}", f"split {split} is empty", hint="Build the dataset again.")
    return found


def check_kind(dir: str | Path, manifest: Mapping[str, Any]) -> None:
    """DataError unless the manifest is one of trajectories."""
    if "rate_hz" not in manifest:
        raise DataError(
            f"data {dir}", "no trajectories", got=f"data of the recipe {manifest.get('recipe')}",
            expected="a folder built by a recipe for trajectories", hint="`raev2 data list` shows the recipes.",
        )  # fmt: skip


def _read_index(folder: Path, index: str) -> list[StoredTrajectory]:
    try:
        lines = [json.loads(line) for line in (folder / index).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"data {folder / index}", "cannot be read", got=error, hint="Build the dataset again."
        ) from error
    return [_read_one(folder, line) for line in lines]


def _read_one(folder: Path, line: Mapping[str, Any]) -> StoredTrajectory:
    file = folder / line["poses"]
    try:
        with np.load(file, allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        hint = f"Run `raev2 data verify {folder}`."
        raise DataError(f"data {file}", "poses cannot be read", got=type(error).__name__, hint=hint) from error
    check_trajectory(f"data {file}", values["t"], values["position"], values["yaw"], 1)
    return StoredTrajectory(
        line["id"], line["recording"], values["t"], np.column_stack([values["position"], values["yaw"]]),
        values.get("command"), folder / "frames" / line["id"], line["suffix"], values["frame_sha256"],
        line.get("spacing_m"),
    )  # fmt: skip


def verify_trajectories(data_dir: str | Path) -> dict[str, Any]:
    """Check fingerprint, indices, poses and every frame of a folder by their SHA-256; return the manifest.

    Raises DataError with the name of the first file that differs.
    """
    folder = Path(data_dir)
    manifest = read_manifest(folder)
    check_kind(folder, manifest)
    rebuild = "Build the dataset again."
    got = fingerprint(manifest["splits"], manifest["classes"])
    if got != manifest["fingerprint"]:
        where = f"data {folder / 'manifest.json'}"
        raise DataError(where, "changed after it was written", got=got, expected=manifest["fingerprint"], hint=rebuild)
    names = set()
    for split, entry in manifest["splits"].items():
        data = checked_bytes(folder / entry["index"], entry["sha256"])
        num_frames = 0
        for line in map(json.loads, data.decode().splitlines()):
            checked_bytes(folder / line["poses"], line["sha256"])
            trajectory = _read_one(folder, line)
            for index, digest in enumerate(trajectory.frame_sha256):
                checked_bytes(trajectory.frame_file(index), digest.tobytes().hex())
            there = sum(1 for _ in trajectory.frames_dir.iterdir())
            if there != len(trajectory):
                where = f"data {trajectory.frames_dir}"
                raise DataError(where, "frames without a pose", got=there, expected=str(len(trajectory)), hint=rebuild)
            names.add(trajectory.id)
            num_frames += len(trajectory)
        if num_frames != entry["num_samples"]:
            where = f"data {folder / entry['index']}"
            raise DataError(where, f"wrong count of {split}", got=num_frames, expected=str(entry["num_samples"]))
    stray = sorted({file.name for file in (folder / "frames").iterdir()} - names)
    if stray:
        raise DataError(f"data {folder / 'frames' / stray[0]}", "a folder that no index lists", hint=rebuild)
    return manifest
