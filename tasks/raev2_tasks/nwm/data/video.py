"""Frames as mp4, GIF and contact sheet. Clips are 8-bit tensors (T, 3, Hpx, Wpx)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raev2.errors import DataError
from raev2.files.replace import new_file

GAP = 2
MIN_SIDE_PX = 192  # players and eyes want more than 64 pixels


def write_mp4(clip: Tensor, path: Path, fps: float) -> None:
    """H.264 video; small frames are enlarged by a whole factor so that every player shows them sharply."""
    try:
        import av
    except ImportError as error:
        raise DataError(str(path), "PyAV is not installed", hint="Run `pip install 'raev2[nwm]'`.") from error
    frames = [np.asarray(image) for image in _enlarged(clip)]
    height, width = (side - side % 2 for side in frames[0].shape[:2])  # 4:2:0 wants even sides
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "16"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels[:height, :width], format="rgb24")))
        container.mux(stream.encode())


def write_gif(clip: Tensor, path: Path, fps: float) -> None:
    """Endless GIF."""
    frames = [image.quantize(128) for image in _enlarged(clip)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        frames[0].save(
            partial, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0
        )


def side_by_side(*clips: Tensor) -> Tensor:
    """One clip with the given ones from left to right; the shortest one decides the length."""
    length = min(map(len, clips))
    gap = torch.full((length, 3, clips[0].shape[2], GAP), 255, dtype=torch.uint8)
    parts = [part for clip in clips for part in (clip[:length], gap)]
    return torch.cat(parts[:-1], dim=3)


def contact_sheet(
    rows: Sequence[tuple[str, Tensor]], columns: Sequence[str], path: Path | None = None, max_columns: int = 9
) -> Image.Image:
    """Clips as rows of one picture, with a name before each and a time over each column.

    rows      (name, clip (T, 3, Hpx, Wpx)); a shorter clip leaves its last places empty
    columns   T captions
    path      save it there as PNG

    At most `max_columns` evenly spread frames are shown, the last one always.
    """
    shown = _spread(len(columns), max_columns)
    height, width = rows[0][1].shape[2:]
    font = ImageFont.load_default(max(10, width // 6))
    line = int(font.getbbox("Ag")[3] * 1.4)
    margin = max(int(font.getlength(name)) for name, _ in rows) + 3 * GAP
    canvas = Image.new("RGB", (margin + len(shown) * (width + GAP), line + len(rows) * (height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for column, number in enumerate(shown):
        draw.text((margin + column * (width + GAP), 0), columns[number], fill="black", font=font)
    for row, (name, clip) in enumerate(rows):
        top = line + row * (height + GAP)
        draw.text((GAP, top + (height - line) // 2), name, fill="black", font=font)
        for column, number in enumerate(shown):
            if number < len(clip):
                canvas.paste(_image(clip[number]), (margin + column * (width + GAP), top))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            canvas.save(partial, format="PNG")
    return canvas


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of 0 .. count - 1, evenly spread, the last one always there."""
    if count <= limit:
        return list(range(count))
    return [round((number + 1) * count / limit) - 1 for number in range(limit)]


def _enlarged(clip: Tensor) -> list[Image.Image]:
    factor = max(1, round(MIN_SIDE_PX / clip.shape[2]))
    images = [_image(pixels) for pixels in clip]
    return [image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) for image in images]


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
