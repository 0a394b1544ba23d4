"""Frozen lists of places for evaluations: which trajectory, which frame is now, which offsets, which noise.

A list is a JSON file beside the data, `index/<name>.json`, and carries the fingerprint of the data it was made from.
Rules of the published protocols are in `PROTOCOLS`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raev2.data import derived_seed
from raev2.errors import DataError, SpecError, did_you_mean
from raev2.files.hashes import file_sha256, json_sha256
from raev2.files.manifest import read_manifest
from raev2.files.replace import write_text
from raev2_tasks.nwm.data.safe_pickle import load_pickle
from raev2_tasks.nwm.data.trajectories import StoredTrajectory, read_trajectories

INDEX_VERSION = 1


@dataclass(frozen=True)
class Protocol:
    """Offsets in frames that a protocol looks at; the number of samples and the stride of candidates as published."""

    offsets: tuple[int, ...]
    num: int
    stride: int = 8


PROTOCOLS = {
    "time": Protocol((4, 8, 16, 32, 64), 500),  # one jump to each
    "rollout-1fps": Protocol(tuple(range(4, 65, 4)), 150),
    "rollout-4fps": Protocol(tuple(range(1, 65)), 150),
    "planning": Protocol((8,), 100),  # the goal
}


@dataclass(frozen=True)
class Place:
    """One sample: trajectory, the frame that is now, and the seed of its noise."""

    trajectory: str
    t: int
    noise_seed: int


@dataclass(frozen=True)
class EvalIndex:
    """A frozen list of places.

    offsets       frames from now that are predicted, the same for every place
    fingerprint   of the data
    made_by       how the places were chosen
    """

    name: str
    split: str
    offsets: tuple[int, ...]
    num_context: int
    rate_hz: float
    fingerprint: str
    made_by: dict[str, Any]
    places: tuple[Place, ...]

    @property
    def sha256(self) -> str:
        """Hash of everything in it, for result files."""
        return json_sha256(asdict(self))


def build_index(
    dir: str | Path,
    protocol: str,
    *,
    num: int | None = None,
    stride: int | None = None,
    offsets: Sequence[int] | None = None,
    split: str = "val",
    num_context: int = 4,
    seed: int = 0,
) -> EvalIndex:
    """Choose places for a protocol of `PROTOCOLS`; `num`, `stride` and `offsets` replace its own.

    Candidates are the frames num_context - 1 + stride * j of every trajectory that have all offsets. If there are more
    than `num`, that many are drawn with `seed`; if there are fewer, all are taken. DataError when there is none.
    """
    if protocol not in PROTOCOLS:
        raise SpecError(
            "--protocol", "unknown protocol", got=repr(protocol), expected=f"one of {', '.join(PROTOCOLS)}",
            hint=did_you_mean(protocol, PROTOCOLS),
        )  # fmt: skip
    rules = PROTOCOLS[protocol]
    num, stride = num or rules.num, stride or rules.stride
    offsets = tuple(offsets or rules.offsets)
    manifest, trajectories = read_manifest(dir), read_trajectories(dir, split)
    low, high = min(0, *offsets), max(0, *offsets)
    found = [
        (one.id, t)
        for one in trajectories
        for t in range(num_context - 1, len(one), stride)
        if t + low >= 0 and t + high < len(one)
    ]
    if not found:
        raise DataError(
            f"data {dir}", f"no trajectory of {split} is long enough for the protocol {protocol}",
            got=f"at most {max(map(len, trajectories))} frames", expected=f"at least {num_context + high}",
            hint="Choose shorter offsets.",
        )  # fmt: skip
    candidates = len(found)
    if candidates > num:
        chosen = np.random.default_rng(derived_seed("index", seed)).choice(candidates, num, replace=False)
        found = [found[number] for number in sorted(chosen)]
    made_by = {"stride": stride, "seed": seed, "candidates": candidates}
    return EvalIndex(
        protocol, split, offsets, num_context, manifest["rate_hz"], manifest["fingerprint"], made_by,
        _places(found, protocol, seed),
    )  # fmt: skip


def import_nwm_index(file: str | Path, dir: str | Path, *, split: str = "val", num_context: int = 4) -> EvalIndex:
    """The places of an index file of NWM: a pickled list of (trajectory, t, lowest offset, highest offset).

    `time.pkl`, `rollout.pkl` and `navigation_eval.pkl` give the offsets of the protocol of that name. Places whose
    trajectory is not in the split, or ends before the last offset, are an error.
    """
    file = Path(file)
    protocol = {"time": "time", "rollout": "rollout-1fps", "navigation_eval": "planning"}.get(file.stem)
    if protocol is None:
        raise DataError(f"data {file}", "not a known name", expected="time.pkl, rollout.pkl or navigation_eval.pkl")
    rows = load_pickle(file)
    if not isinstance(rows, list) or not all(isinstance(row, tuple | list) and len(row) == 4 for row in rows):
        raise DataError(f"data {file}", "not an index", expected="a list of (trajectory, t, min_offset, max_offset)")
    manifest = read_manifest(dir)
    index = EvalIndex(
        protocol, split, PROTOCOLS[protocol].offsets, num_context, manifest["rate_hz"], manifest["fingerprint"],
        {"file": file.name, "sha256": file_sha256(file)},
        _places([(str(row[0]), int(row[1])) for row in rows], protocol, 0),
    )  # fmt: skip
    check_index(index, read_trajectories(dir, split))
    return index


def check_index(index: EvalIndex, trajectories: Sequence[StoredTrajectory]) -> None:
    """Raise DataError unless every place of an index is in these trajectories, with its context and its offsets."""
    lengths = {one.id: len(one) for one in trajectories}
    for place in index.places:
        where = f"index {index.name}"
        if place.trajectory not in lengths:
            raise DataError(where, f"trajectory {place.trajectory} is not in the split {index.split}")
        first, last = place.t + min(0, *index.offsets), place.t + max(0, *index.offsets)
        if place.t < index.num_context - 1 or first < 0 or last >= lengths[place.trajectory]:
            raise DataError(
                where, f"a place of trajectory {place.trajectory} is out of reach",
                got=f"frame {place.t}, frames {first} to {last} are needed",
                expected=f"context of {index.num_context} and {lengths[place.trajectory]} frames",
            )  # fmt: skip


def write_index(index: EvalIndex, dir: str | Path, name: str | None = None) -> Path:
    """Save an index as `index/<name>.json` of a dataset folder; DataError where another one has that name."""
    file = Path(dir) / "index" / f"{name or index.name}.json"
    text = json.dumps({"format_version": INDEX_VERSION, **asdict(index)}, indent=1) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        hint = "Give this one a --name; evaluations may rest on the other."
        raise DataError(f"index {file}", "exists already, with other places", hint=hint)
    file.parent.mkdir(exist_ok=True)
    write_text(file, text)
    return file


def read_index(dir: str | Path, name: str) -> EvalIndex:
    """An index of a dataset folder; DataError when there is none, or it was made from other data."""
    file = Path(dir) / "index" / f"{name}.json"
    if not file.is_file():
        raise DataError(
            f"index {file}", "there is none", hint=f"Make it with `raev2 nwm index build {dir} --protocol {name}`."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        places = tuple(Place(**place) for place in values.pop("places"))
        index = EvalIndex(**{**values, "offsets": tuple(values["offsets"]), "places": places})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"index {file}", "damaged", got=repr(error), hint="Build it again.") from error
    if version != INDEX_VERSION:
        raise DataError(f"index {file}", "unknown format_version", got=version, expected=str(INDEX_VERSION))
    fingerprint = read_manifest(dir)["fingerprint"]
    if index.fingerprint != fingerprint:
        raise DataError(
            f"index {file}", "made from other data", got=index.fingerprint[:12], expected=fingerprint[:12],
            hint="Build it again.",
        )  # fmt: skip
    return index


def _places(found: Sequence[tuple[str, int]], protocol: str, seed: int) -> tuple[Place, ...]:
    return tuple(Place(name, t, derived_seed("noise", protocol, seed, name, t)) for name, t in found)
