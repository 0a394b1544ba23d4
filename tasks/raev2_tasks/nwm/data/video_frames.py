"""Frames of a video file by the time at which they are shown, upright. Read `timeline` and `read_frames`.

PyAV is the reference: it decodes the file once, from beginning to end. decord reads single frames without decoding the
rest, but on many files (open GOPs, edit lists, transport streams) it gives other pictures than those asked for. So it
is used only when asked for, and only for a file on which pictures spread over it equal those of PyAV bit for bit. It
can also hang for good, so it runs in a child process with a time limit.

    python -m raev2_tasks.nwm.data.video_frames VIDEO OUT NUMBER ...   what the child does
"""

from __future__ import annotations

import hashlib
import logging
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raev2.errors import DataError
from raev2.files.damage import stop_if_machine
from raev2.files.images import is_picture

logger = logging.getLogger(__name__)
DECODERS = ("pyav", "decord")
CHUNK_BYTES = 256 * 2**20  # of pictures that decord hands over at once
NUM_PROBES = 16
TIME_LIMIT_S = 120.0  # for a chunk
LATE_S = 4.0  # what begins later is not decoded from the beginning
SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv",
    ".ogv", ".mxf",
)  # fmt: skip
CONTAINERS = {"mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf"}  # FFmpeg's words for them
UNTIMED = {"avi"}  # containers without presentation times
INDEXED = {"mov", "matroska"}  # containers that list their key frames
INVISIBLE = {"vp8"}  # codecs with packets that show nothing

Picture = NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class Timeline:
    """The frames that a video shows, in order.

    t      (T,) seconds from the first one, increasing
    pts    (T,) presentation time stamps by which frames are recognised; None: only their order tells them apart
    """

    t: NDArray[np.float64]
    pts: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.t)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError("av", "is not installed", hint="Install it with `pip install 'raev2[nwm]'`.") from error
    return av


def timeline(file: Path, decode: bool = False) -> Timeline:
    """When each frame is shown. Frames that an edit list cuts off are not there.

    The times of the packets serve where they can be trusted, so that nothing is decoded. Otherwise, or with `decode`,
    the file is decoded once for its times: containers without times (AVI), packets that show nothing (VP8), pictures
    before the first key frame, equal times.
    """
    av = _pyav()
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise DataError(f"video {file.name}", "has no pictures")
            stream = container.streams.video[0]
            base = float(stream.time_base or 0)
            pts = None if decode else _packet_times(container, stream)
        if pts is None:
            return _decoded_timeline(file, base)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"video {file.name}", "corrupt, cannot be opened", got=error) from error
    if not len(pts):
        raise DataError(f"video {file.name}", "corrupt, it has no frames")
    return Timeline((pts - pts[0]) * base, pts)


def is_video(file: Path) -> bool:
    """Whether a file claims to be a video, by its suffix or by its content. It may still be damaged."""
    if file.suffix.lower() in SUFFIXES:
        return True
    if is_picture(file):
        return False
    av = _pyav()
    try:
        with av.open(str(file)) as container:
            return bool(container.streams.video) and container.format.name.split(",")[0] in CONTAINERS
    except (av.error.FFmpegError, OSError) as error:
        stop_if_machine(error)
        return False


def frame_rate(file: Path) -> float:
    """Frames a second as the container states it; 0 where it does not, or cannot be read."""
    av = _pyav()
    try:
        with av.open(str(file)) as container:
            return float(container.streams.video[0].average_rate or 0) if container.streams.video else 0.0
    except (av.error.FFmpegError, OSError) as error:
        stop_if_machine(error)
        return 0.0


def duration_s(file: Path) -> float:
    """Seconds as the container states them; 0 where it does not, or cannot be read."""
    av = _pyav()
    try:
        with av.open(str(file)) as container:
            return (container.duration or 0) / av.time_base
    except (av.error.FFmpegError, OSError) as error:
        stop_if_machine(error)
        return 0.0


def _packet_times(container: Any, stream: Any) -> NDArray[np.int64] | None:
    """Sorted presentation times of the packets that are shown; None where they cannot be trusted."""
    if container.format.name in UNTIMED or stream.codec_context.name in INVISIBLE:
        return None
    packets = [(packet.pts, packet.is_keyframe, packet.is_discard) for packet in container.demux(stream) if packet.size]
    if any(pts is None for pts, _, _ in packets):
        return None
    shown = np.sort(np.array([pts for pts, _, discarded in packets if not discarded], np.int64))
    first_key = next((pts for pts, is_key, _ in packets if is_key), None)
    trusted = first_key is not None and (shown >= first_key).all() and (np.diff(shown) > 0).all()
    return shown if trusted else None


def _decoded_timeline(file: Path, base: float) -> Timeline:
    """By decoding. Where times are missing or run backwards, frames are a steady frame period apart."""
    found: list[int | None] = []
    rate = 0.0
    for frame, stream in _decoded(file):
        found.append(frame.pts)
        rate = float(stream.average_rate or 0)
    if not found:
        raise DataError(f"video {file.name}", "corrupt, it has no frames")
    stamps = [stamp for stamp in found if stamp is not None]
    if len(stamps) == len(found) and all(first < second for first, second in pairwise(stamps)):
        t = (np.array(stamps, np.float64) - stamps[0]) * base
    elif rate:
        logger.info("%s: has no presentation times; taken as a steady %g frames a second", file.name, rate)
        t = np.arange(len(found)) / rate
    else:
        raise DataError(f"video {file.name}", "has neither presentation times nor a frame rate")
    return Timeline(t, None)


def _decoded(file: Path, seek_pts: int | None = None) -> Iterator[tuple[Any, Any]]:
    """(frame, stream), in the order in which they are shown. DataError says after which frame decoding failed.

    seek_pts   begin at the key frame before this time, where the container has an index of them
    """
    av, index = _pyav(), -1
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if seek_pts is not None and container.format.name.split(",")[0] in INDEXED:
                container.seek(seek_pts, stream=stream, backward=True)
            for index, frame in enumerate(container.decode(stream)):  # noqa: B007
                yield frame, stream
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"video {file.name}", f"corrupt after frame {index}", got=error) from error


def read_frames(
    file: Path,
    shown: Timeline,
    numbers: Sequence[int],
    decoder: str = "pyav",
    time_limit_s: float = TIME_LIMIT_S,
) -> Iterator[tuple[int, Picture]]:
    """(number, picture) for ascending numbers of frames in `shown`, in one pass that holds one picture at a time.

    DataError for a file that cannot be decoded so far, or that lacks a frame which its container lists.
    """
    left = list(numbers)
    if decoder == "decord" and left and _is_verified(file, shown, left, time_limit_s):
        for number, picture in _with_decord(file, numbers, time_limit_s):
            yield number, picture
            left.pop(0)
    if left:
        yield from _with_av(file, shown, left)


def _with_av(file: Path, shown: Timeline, numbers: Sequence[int]) -> Iterator[tuple[int, Picture]]:
    wanted = iter(numbers)
    number, index = next(wanted), -1
    for index, (frame, _) in enumerate(_decoded(file, _seek_pts(shown, number))):
        if _is_before(shown, number, frame, index):
            continue
        if shown.pts is not None and frame.pts != shown.pts[number]:
            raise DataError(
                f"video {file.name}", f"its container lists a frame at {shown.t[number]:.3f} s that is not shown",
                hint="Set times=decoded.",
            )  # fmt: skip
        yield number, upright(frame)
        following = next(wanted, None)
        if following is None:
            return
        number = following
    raise DataError(
        f"video {file.name}", "corrupt, it ends early", got=f"{index + 1} frames", expected=f"frame {number}"
    )


def _seek_pts(shown: Timeline, number: int) -> int | None:
    """Where a pass may begin whose first frame is `number`: well before it, so that all it refers to is decoded."""
    if shown.pts is None or shown.t[number] < LATE_S:
        return None
    return int(shown.pts[np.searchsorted(shown.t, shown.t[number] - LATE_S / 2)])


def _is_before(shown: Timeline, number: int, frame: Any, index: int) -> bool:
    """Whether a decoded frame comes before frame `number` of the timeline."""
    if shown.pts is None:
        return index < number
    return frame.pts is None or bool(frame.pts < shown.pts[number])


def upright(frame: Any) -> Picture:
    """A decoded frame as RGB, turned and mirrored as its display matrix asks."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])  # x' = a x + c y, y' = b x + d y
    turned = abs(b) > abs(a)
    if turned:
        pixels = pixels.transpose(1, 0, 2)
    if (c if turned else a) < 0:
        pixels = pixels[:, ::-1]
    if (b if turned else d) < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# decord


def _is_verified(file: Path, shown: Timeline, numbers: Sequence[int], time_limit_s: float) -> bool:
    """Whether decord's pictures equal PyAV's at up to 16 of the frames, spread over them. Says so in the log."""
    if shown.pts is None:
        logger.info("%s: frames have no times to ask decord for, decoding with PyAV", file.name)
        return False
    spread = np.linspace(0, len(numbers) - 1, min(NUM_PROBES, len(numbers))).round().astype(int)
    probes = [numbers[index] for index in spread]
    num_same = 0
    for number, picture in _with_decord(file, probes, time_limit_s):
        reference = _single_frame(file, int(shown.pts[number]))
        if reference is None or _digest(picture) != _digest(reference):
            logger.info(
                "%s: decord shows another picture at %.3f s, decoding with PyAV", file.name, shown.t[number]
            )  # fmt: skip
            return False
        num_same += 1
    if num_same == len(probes):
        logger.info("%s: decord shows the same %d pictures as PyAV and is used", file.name, num_same)
    return num_same == len(probes)


def _digest(picture: Picture) -> tuple[tuple[int, ...], str]:
    return picture.shape, hashlib.sha256(picture.tobytes()).hexdigest()


def _single_frame(file: Path, pts: int) -> Picture | None:
    """The frame shown at `pts`, by PyAV from the key frame before it; None where that does not lead to it."""
    av = _pyav()
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            container.seek(pts, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts >= pts:
                    return upright(frame) if frame.pts == pts else None
    except (av.error.FFmpegError, OSError):
        return None
    return None


def _with_decord(file: Path, numbers: Sequence[int], time_limit_s: float) -> Iterator[tuple[int, Picture]]:
    """Frames from a child process; ends early when it fails or gives no answer in time."""
    size = 1
    with tempfile.TemporaryDirectory() as folder:
        done = 0
        while done < len(numbers):
            chunk, out = numbers[done : done + size], Path(folder) / "frames.npy"
            command = [sys.executable, "-m", __spec__.name, str(file.absolute()), str(out), *map(str, chunk)]
            try:
                ended = subprocess.run(
                    command, timeout=time_limit_s, capture_output=True, encoding="utf-8", errors="replace", check=False
                )
            except subprocess.TimeoutExpired:
                logger.warning("%s: decord gave no answer in %g s, decoding with PyAV", file.name, time_limit_s)
                return
            if ended.returncode:
                reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
                logger.info("%s: decord failed (%s), decoding with PyAV", file.name, reason)
                return
            pictures = np.load(out, mmap_mode="r")
            yield from ((number, np.array(picture)) for number, picture in zip(chunk, pictures, strict=True))
            done += len(chunk)
            size = max(1, CHUNK_BYTES // pictures[0].nbytes)


def _child(argv: Sequence[str]) -> None:
    """Decode with decord and save as .npy."""
    import decord

    reader = decord.VideoReader(argv[0], ctx=decord.cpu(0), num_threads=1)
    np.save(argv[1], reader.get_batch([int(number) for number in argv[2:]]).asnumpy())


if __name__ == "__main__":
    _child(sys.argv[1:])
