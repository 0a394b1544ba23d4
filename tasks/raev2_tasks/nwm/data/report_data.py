"""A dataset folder of trajectories in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raev2.files.images import read_rgb
from raev2.files.manifest import read_manifest
from raev2_tasks.nwm.data.index import PROTOCOLS
from raev2_tasks.nwm.data.trajectories import SPLITS, check_kind, is_black, num_frozen, read_trajectories
from raev2_tasks.nwm.data.validate import frame_warnings, heading_error, warnings

CONTEXT = 4  # frames, for the protocols


def describe(dir: str | Path, open_frames: bool = True) -> list[str]:
    """Lines for people: counts, motion, heading, what each protocol can use, and every warning.

    open_frames   also read every frame; one that cannot be read is a DataError
    """
    manifest = read_manifest(dir)
    check_kind(dir, manifest)
    trajectories = {split: read_trajectories(dir, split) for split in SPLITS}
    every = [one for split in SPLITS for one in trajectories[split]]
    lines = []
    for split in SPLITS:
        found = trajectories[split]
        recordings = len({one.recording for one in found})
        lines.append(f"{split}: {len(found)} trajectories of {recordings} recordings, {sum(map(len, found)):,} frames")
    rate, spacing = manifest["rate_hz"], manifest["spacing_m"]
    lines.append(f"{manifest['rejected']} rejected" + ("; reasons in rejects.jsonl" if manifest["rejected"] else ""))
    lines.append(
        f"{rate:g} frames a second, {spacing:.3f} {manifest['length_unit']} a frame, split {manifest['split_rule']}"
    )
    lines += _parts(manifest.get("parts", {}), own_units=all(one.spacing_m is not None for one in every))
    error, count = heading_error(every, spacing)
    if count:
        lines.append(f"heading: motion points {np.rad2deg(error):+.1f} degrees from the yaw (median of {count} steps)")
    total = sum(map(len, every))
    for name, protocol in PROTOCOLS.items():
        least = CONTEXT + max(protocol.offsets)
        usable = [len(one) for one in every if len(one) >= least]
        if len(usable) < len(every):
            lines.append(
                f"protocol {name} needs {least} frames: {len(usable)} of {len(every)} trajectories have them "
                f"({sum(usable) / total:.0%} of the frames)"
            )
    black = sum(_is_black(one.frame_file(index)) for one in every for index in range(len(one))) if open_frames else 0
    splits = [split for split in SPLITS for _ in trajectories[split]]
    odd = warnings(every, splits, spacing, rate) + frame_warnings(num_frozen(every, spacing), black, total)
    return lines + [f"warning: {line}" for line in odd]


def _parts(parts: Mapping[str, Any], own_units: bool) -> list[str]:
    """The folders that a mix was joined from, and what a model takes as the unit of their motions."""
    lines = [f"{name}: {part['spacing_m']:.3f} {part['length_unit']} a frame" for name, part in parts.items()]
    if lines and own_units:
        lines.append("unit of motions for a model: a frame of the folder that they come from")
    elif lines:
        lines.append(
            "unit of motions for a model: the mean frame of all folders; build the mix again to have each its own"
        )
    return lines


def _is_black(file: Path) -> bool:
    return is_black(read_rgb(file, f"data {file}"))
