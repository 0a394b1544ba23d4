"""Your own picture or clip as the place that a rollout, a ride or a plan starts from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raev2.batch import Cond
from raev2.errors import DataError, SpecError
from raev2.files.hashes import file_sha256
from raev2.files.images import read_rgb
from raev2_tasks.nwm.data.dataset import TrajectoryDataset
from raev2_tasks.nwm.data.frames import fit_image
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.data.video_frames import read_frames, timeline


@dataclass(frozen=True)
class OwnFile:
    """Where the own frames come from; what a record of a rollout keeps.

    kind      'image' or 'video'
    start_s   of a video: now, in seconds from its first frame; None: its last frame
    """

    file: str
    kind: str
    start_s: float | None = None

    def record(self) -> dict[str, Any]:
        """For JSON, with the hash of the file."""
        return {**asdict(self), "file": str(Path(self.file).absolute()), "sha256": file_sha256(Path(self.file))}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> OwnFile:
        """DataError when the file is another one by now."""
        own = cls(record["file"], record["kind"], record["start_s"])
        if not Path(own.file).is_file() or file_sha256(Path(own.file)) != record["sha256"]:
            raise DataError(own.file, "is not the file that the record was made with")
        return own


def add_own_options(parser: argparse.ArgumentParser) -> None:
    """`--image FILE` and `--video FILE`."""
    own = parser.add_mutually_exclusive_group()
    own.add_argument("--image", metavar="FILE", help="start from your own picture")
    own.add_argument("--video", metavar="FILE", help="start where your own clip ends")


def own_file(options: argparse.Namespace) -> OwnFile | None:
    """What the options name; None without them."""
    start = getattr(options, "start", None)
    if options.image is not None:
        if start is not None:
            raise SpecError("--start", "has no effect with --image")
        return OwnFile(options.image, "image")
    return None if options.video is None else OwnFile(options.video, "video", start)


class OwnStart(Places):
    """One place to start from, of no trajectory. The frames are fitted as those of the data.

    A picture is a context of one frame. Of a clip the frames at the rate of the data are taken, as many as a context
    holds; what lies before its beginning is marked invalid.
    """

    def __init__(self, dataset: TrajectoryDataset, own: OwnFile) -> None:
        self.dataset, self.own, self.period_s = dataset, own, 1 / dataset.rate_hz
        self.moments, self.ids = [], [0]
        frames = self._clip() if own.kind == "video" else [_picture(Path(own.file))]
        fitted = [_fitted(frame, dataset) for frame in frames]
        missing = dataset.num_context - len(fitted)
        self._frames = torch.stack([fitted[0]] * missing + fitted)
        self._valid = torch.arange(dataset.num_context) >= missing

    def __len__(self) -> int:
        return 1

    def images(self, indices: Sequence[int], seconds: float) -> Tensor:
        """The frame now, 8-bit (B, 3, Hpx, Wpx); nothing is known of later ones."""
        if seconds:
            raise SpecError("seconds", "nothing is known after an own picture or clip", got=f"{seconds:g}")
        return self._frames[-1:].repeat(len(indices), 1, 1, 1)

    def context(self, indices: Sequence[int]) -> Cond:
        """Raw conditions without motion and time, as `TrajectoryDataset.context_at`."""
        number = self.dataset.num_context
        one = {
            "context_images": self._frames,
            "context_keys": torch.arange(number),
            "context_age": torch.arange(number - 1, -1, -1) * self.period_s,
            "context_valid": self._valid,
        }
        return self.dataset.collate_cond([one] * len(indices))

    def _pose(self, index: int, later: int) -> np.ndarray:
        raise SpecError(self.own.file, "an own picture or clip has no recorded path")

    def _clip(self) -> list[Image.Image]:
        """The newest frames up to the start, a period of the data apart, the oldest first."""
        file = Path(self.own.file)
        if not file.is_file():
            raise DataError(f"video {file}", "no such file")
        shown = timeline(file)
        now = shown.t[-1] if self.own.start_s is None else self.own.start_s
        if not 0 <= now <= shown.t[-1] + self.period_s / 2:
            raise SpecError("--start", "not in the clip", got=f"{now:g}", expected=f"0 to {shown.t[-1]:g} s")
        wanted = now - self.period_s * np.arange(self.dataset.num_context)[::-1]
        nearest = np.abs(shown.t[None] - wanted[:, None]).argmin(1)
        missing = np.flatnonzero(np.abs(shown.t[nearest] - wanted) > self.period_s / 2)
        numbers = nearest[missing.max(initial=-1) + 1 :].tolist()  # without a gap
        if not numbers:
            raise DataError(f"video {file}", "has no frame at the start", got=f"{now:g} s")
        return [Image.fromarray(pixels) for _, pixels in read_frames(file, shown, numbers)]


def _picture(file: Path) -> Image.Image:
    """Upright."""
    if not file.is_file():
        raise DataError(f"image {file}", "no such file")
    return read_rgb(file, f"image {file}")


def own_goal(file: Path, dataset: TrajectoryDataset) -> Tensor:
    """A picture as the frame to reach, 8-bit (1, 3, Hpx, Wpx)."""
    return _fitted(_picture(file), dataset)[None]


def _fitted(image: Image.Image, dataset: TrajectoryDataset) -> Tensor:
    """As a camera frame of the data; one that has the model's size already is taken as it is."""
    height, width = dataset.image_size
    if image.size != (width, height):
        image = fit_image(image, dataset.image_size, dataset.fit)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
