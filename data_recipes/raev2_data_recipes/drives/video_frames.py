"""Single frames of a video file, by number in order of presentation.

decord reads them without decoding the rest, but it can hang for good on some files, so it runs in a child process with
a time limit. Where that fails, or decord is not installed, PyAV decodes the file from its beginning.

    python -m raev2_data_recipes.drives.video_frames VIDEO OUT NUMBER ...   what the child does
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError
from raev2_data_recipes.drives.trajectory_recipe import require

logger = logging.getLogger(__name__)
CHUNK = 128  # frames that are decoded at once
TIME_LIMIT_S = 120.0  # for a chunk


def frame_times(file: Path) -> NDArray[np.float64]:
    """When each frame is shown, seconds from the beginning, ascending. Reads the container, decodes nothing."""
    av = require("av")
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise DataError(f"video {file.name}", "has no pictures")
            stream = container.streams.video[0]
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            times = np.sort(np.array(stamps, np.float64)) * float(stream.time_base or 0)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"video {file.name}", "corrupt, cannot be opened", got=error) from error
    if not len(times):
        raise DataError(f"video {file.name}", "corrupt, it has no frames")
    return times - times[0]


def read_frames(file: Path, numbers: Sequence[int], time_limit_s: float = TIME_LIMIT_S) -> Iterator[NDArray[np.uint8]]:
    """Frames (H, W, 3) uint8 with ascending `numbers`; DataError for a file that cannot be decoded so far."""
    for first in range(0, len(numbers), CHUNK):
        chunk = list(numbers[first : first + CHUNK])
        frames = _with_decord(file, chunk, time_limit_s)
        yield from _with_av(file, chunk) if frames is None else frames


def _with_decord(file: Path, numbers: Sequence[int], time_limit_s: float) -> list[NDArray[np.uint8]] | None:
    """Frames from a child process; None when it fails or does not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "frames.npy"
        command = [sys.executable, "-m", __spec__.name, str(file.absolute()), str(out), *map(str, numbers)]
        try:
            done = subprocess.run(command, timeout=time_limit_s, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            logger.warning("%s: decord gave no answer in %g s, decoding with PyAV", file.name, time_limit_s)
            return None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            logger.info("%s: decord failed (%s), decoding with PyAV", file.name, reason)
            return None
        return list(np.load(out))


def _with_av(file: Path, numbers: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    av = require("av")
    wanted = iter(numbers)
    number = next(wanted, None)
    index = -1
    try:
        with av.open(str(file)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index == number:
                    yield frame.to_ndarray(format="rgb24")
                    number = next(wanted, None)
                if number is None:
                    return
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"video {file.name}", f"corrupt after frame {index}", got=error) from error
    raise DataError(
        f"video {file.name}", "corrupt, it ends early", got=f"{index + 1} frames", expected=f"frame {number}"
    )


def _child(argv: Sequence[str]) -> None:
    """Decode with decord and save as .npy."""
    import decord

    reader = decord.VideoReader(argv[0], ctx=decord.cpu(0), num_threads=1)
    np.save(argv[1], reader.get_batch([int(number) for number in argv[2:]]).asnumpy())


if __name__ == "__main__":
    _child(sys.argv[1:])
