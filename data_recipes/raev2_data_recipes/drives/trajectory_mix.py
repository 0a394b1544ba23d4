"""Several folders of trajectories as one, to train one model on several robots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from raev2.errors import DataError
from raev2.files.manifest import read_manifest
from raev2_data_recipes.base import Option
from raev2_data_recipes.drives.trajectory_recipe import TrajectoryRecipe
from raev2_tasks.nwm.data.trajectories import SPLITS, Source, Storage, StoredTrajectory, Trajectory, read_trajectories


class TrajectoryMix(TrajectoryRecipe):
    """Copies the trajectories of prepared folders, which keep their splits and the spacing of their robot.

    Every frame weighs the same in training.
    """

    checks_heading = False  # it was checked when the folders were built
    name = "trajectory-mix"
    summary = "several prepared folders of trajectories as one"
    licence = "those of the folders, see their manifests"
    attribution = "The folders named in `options`."
    size = "the sum of the folders"
    options = {
        "src": Option(None, "prepared folders, separated by commas"),
        **{name: option for name, option in TrajectoryRecipe.STORAGE.items() if name in ("size", "fit", "format")},
    }

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the manifests."""
        resolved = self.resolve(options)
        self.facts(resolved)
        copies = [f"Copy {folder}: {_told(manifest)}." for folder, manifest in self._manifests(resolved)]
        return [*copies, self.frames_line(resolved)]

    def facts(self, options: Mapping[str, str]) -> dict[str, Any]:
        """Those of the folders, which must agree in their rate."""
        manifests = self._manifests(options)
        rates = {str(folder): manifest["rate_hz"] for folder, manifest in manifests}
        if len(set(rates.values())) > 1:
            raise DataError(
                f"data {self.name}: src", "the folders differ in their rate", got=rates,
                expected="one rate", hint="Build them again at one rate.",
            )  # fmt: skip
        units = {str(folder): manifest["length_unit"] for folder, manifest in manifests}
        if len({unit.split(",")[0] for unit in units.values()}) > 1:
            raise DataError(
                f"data {self.name}: src", "the folders differ in their unit of length", got=units,
                expected="one unit", hint="Build them again with a metric scale, or train on each alone.",
            )  # fmt: skip
        return {
            "rate_hz": next(iter(rates.values())),
            "length_unit": "; ".join(sorted(set(units.values()))),
            "camera": None,
            "parts": {
                folder.name: {name: manifest[name] for name in ("spacing_m", "fingerprint", "length_unit")}
                for folder, manifest in manifests
            },
        }

    def storage(self, options: Mapping[str, str]) -> Storage:
        """The splits are those of the folders."""
        return super().storage({**options, "split": "given"})

    def sources(self, options: Mapping[str, str]) -> Iterator[Source]:
        """One per trajectory; names begin with the name of the folder."""
        for folder, manifest in self._manifests(options):
            for split in SPLITS:
                for one in read_trajectories(folder, split):
                    read = partial(_read, one, f"{folder.name}-{one.id}", split, one.spacing_m or manifest["spacing_m"])
                    yield Source(f"{folder.name}/{one.recording}", str(one.frames_dir), read)

    def _manifests(self, options: Mapping[str, str]) -> list[tuple[Path, dict[str, Any]]]:
        folders = [Path(part.strip()).expanduser() for part in options["src"].split(",") if part.strip()]
        if len({folder.name for folder in folders}) < max(2, len(folders)):
            raise DataError(
                f"data {self.name}: src",
                "not a mix",
                got=options["src"],
                expected="two or more folders of different names",
            )
        return [(folder, read_manifest(folder)) for folder in folders]


def _told(manifest: Mapping[str, Any]) -> str:
    """Frames by split, and how far apart they are."""
    counts = ", ".join(f"{split} {entry['num_samples']:,}" for split, entry in manifest["splits"].items())
    return f"{counts} frames, {manifest['spacing_m']:.3g} {manifest['length_unit']} apart, the unit of its motions"


def _read(one: StoredTrajectory, name: str, split: str, spacing_m: float) -> Iterator[Trajectory]:
    frames = (one.frame_file(index).read_bytes() for index in range(len(one)))
    yield Trajectory(name, one.t, one.poses[:, :2], one.poses[:, 2], frames, one.command, split, spacing_m)


RECIPE = TrajectoryMix()
