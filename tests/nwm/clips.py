"""Video clips whose frames carry their own number as a bar code, in many codecs and containers. Made with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

BITS, FPS, NUM_FRAMES = 8, 30, 121
SIZE = (64, 128)  # height, width
TICKS = 600  # of the encoder's clock, a second


@dataclass(frozen=True)
class Clip:
    """How a clip is made. `gops` and `options` go to the encoder; `trim_s` is cut off by an edit list."""

    suffix: str
    codec: str
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    trim_s: float = 0.0
    variable_rate: bool = False

    def times(self) -> np.ndarray:
        """When frame number i is shown, seconds; below 0 where the edit list cuts it off."""
        steps = np.ones(NUM_FRAMES)
        if self.variable_rate:
            steps = 1 + 0.4 * np.sin(np.arange(NUM_FRAMES))
        ticks = np.round(np.concatenate([[0], np.cumsum(steps)[:-1]]) / FPS * TICKS)
        return ticks / TICKS - self.trim_s


X264 = "scenecut=0:b-adapt=0"
H264 = {"preset": "ultrafast", "g": "30", "bf": "2", "x264-params": f"{X264}:bframes=2"}
OPEN_GOP = {"preset": "ultrafast", "x264-params": f"{X264}:bframes=3:open-gop=1:keyint=24"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=30:open-gop=1:bframes=3:b-adapt=0"}
LAG = {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "30", "deadline": "good", "cpu-used": "8"}
AV1 = {"preset": "8", "crf": "10", "g": "30", "svtav1-params": "lp=1"}
CLIPS = {
    "h264 with B-frames, mp4": Clip(".mp4", "libx264", options=H264),
    "h264 trimmed by an edit list, mp4": Clip(".mp4", "libx264", options=H264, trim_s=0.5),
    "h264 of variable rate, mp4": Clip(".mp4", "libx264", options=H264, variable_rate=True),
    "h264 with one key frame, mp4": Clip(".mp4", "libx264", options={"preset": "ultrafast", "g": "250"}),
    "h264 of 10 bits, mp4": Clip(".mp4", "libx264", "yuv420p10le", options=H264),
    "h264 with open GOPs, mkv": Clip(".mkv", "libx264", options=OPEN_GOP),
    "h264 of 4:4:4 with open GOPs, mov": Clip(".mov", "libx264", "yuv444p", options=OPEN_GOP),
    "h264 with B-frames, avi": Clip(".avi", "libx264", options=H264),
    "mpeg4 with B-frames, avi": Clip(".avi", "mpeg4", options={"bf": "2", "g": "30", "b": "2M"}),
    "mpeg4 with B-frames, mp4": Clip(".mp4", "mpeg4", options={"bf": "2", "g": "12", "b": "2M"}),
    "hevc with open GOPs, mp4": Clip(".mp4", "libx265", options=X265),
    "hevc of 10 bits, mkv": Clip(".mkv", "libx265", "yuv420p10le", options=X265),
    "vp8, webm": Clip(".webm", "libvpx", options=LAG),
    "vp9, webm": Clip(".webm", "libvpx-vp9", options=LAG),
    "av1, mkv": Clip(".mkv", "libsvtav1", options=AV1),
    "av1, mp4": Clip(".mp4", "libsvtav1", options=AV1),
    "mjpeg, avi": Clip(".avi", "mjpeg", "yuvj420p"),
    "prores, mov": Clip(".mov", "prores_ks", "yuv422p10le"),
    "ffv1, mkv": Clip(".mkv", "ffv1"),
    "mpeg1 with B-frames, mpg": Clip(".mpg", "mpeg1video", options={"bf": "2", "g": "15", "b": "2M"}),
    "mpeg2 with B-frames, mxf": Clip(".mxf", "mpeg2video", options={"bf": "2", "g": "15", "b": "4M"}),
    "wmv2, wmv": Clip(".wmv", "wmv2", options={"b": "2M"}),
    "h264 with B-frames, flv": Clip(".flv", "libx264", options=H264),
    "mpeg2 with B-frames, ts": Clip(".ts", "mpeg2video", options={"bf": "2", "g": "15", "b": "2M"}),
}


def picture(number: int) -> np.ndarray:
    """(H, W, 3): the bits of `number` as white and black bars in the middle half of the height, bit 0 left."""
    pixels = np.empty((*SIZE, 3), np.uint8)
    pixels[: SIZE[0] // 2], pixels[SIZE[0] // 2 :] = (200, 40, 40), (40, 40, 200)
    width = SIZE[1] // BITS
    for bit in range(BITS):
        pixels[SIZE[0] // 4 : 3 * SIZE[0] // 4, bit * width : (bit + 1) * width] = 235 if number >> bit & 1 else 20
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that a picture carries."""
    grey = np.asarray(pixels, float).mean(2)
    middle = grey[grey.shape[0] * 3 // 8 : grey.shape[0] * 5 // 8]
    bars = np.array_split(middle, BITS, axis=1)
    return sum(1 << bit for bit, bar in enumerate(bars) if bar[:, bar.shape[1] // 4 : -bar.shape[1] // 4].mean() > 128)


def is_upright(pixels: np.ndarray) -> bool:
    """Red above, blue below."""
    top, bottom = np.asarray(pixels, float)[4], np.asarray(pixels, float)[-5]
    return bool(top[:, 0].mean() > 120 > top[:, 2].mean() and bottom[:, 2].mean() > 120 > bottom[:, 0].mean())


def write_clip(clip: Clip, path: Path) -> Path:
    """Encode the clip; frame number i is shown at `clip.times()[i]`."""
    import av

    times = clip.times() + clip.trim_s
    with av.open(str(path), "w", options={"use_editlist": "1"} if clip.trim_s else {}) as container:
        stream = container.add_stream(clip.codec, rate=FPS, options=dict(clip.options))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], clip.pix_fmt
        base = Fraction(1, TICKS if clip.variable_rate else FPS)
        stream.codec_context.time_base = base

        def mux(packets: Sequence[Any]) -> None:
            for packet in packets:
                if clip.trim_s:
                    shift = round(clip.trim_s / packet.time_base)
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                container.mux(packet)

        for number, time in enumerate(times):
            image = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            image.pts, image.time_base = round(time / base), base
            mux(stream.encode(image))
        mux(stream.encode())
    return path


def turn(path: Path, matrix: Sequence[float]) -> None:
    """Write the four upper left numbers of the display matrix of the first track of an mp4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    offset = start + 4 + (20 if data[start] == 0 else 32) + 16
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[offset : offset + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
