"""One picture gives the same pixels whichever way it goes: built, trained on, reconstructed, in shards, as a frame."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raev2.data import FolderDataset
from raev2.files.images import centre_crop
from raev2.files.picture_folder import image_files
from raev2_data_recipes.captions.shard_recipe import prepared
from raev2_data_recipes.pictures import image_folder
from raev2_tasks.nwm.data.dataset import TrajectoryDataset
from raev2_tasks.nwm.data.trajectories import Source, Storage, Trajectory, write_trajectories
from raev2_tasks.reconstruct.pictures import read_image
from raev2_tasks.t2i.shards.files import Example, write_shards
from raev2_tasks.t2i.shards.reader import TextImageDataset
from raev2_tasks.t2i.text.captions import Caption

SIZE = (24, 16)  # height, width
UPRIGHT = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
GREY = np.repeat(UPRIGHT[..., :1], 3, 2)
CLEAR = np.where(UPRIGHT[..., :1] < 128, UPRIGHT, 255).astype(np.uint8)  # where the first channel is high: white


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def lying(format: str, **options: Any) -> bytes:
    """On its side, with EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(Image.fromarray(np.rot90(UPRIGHT).copy()), format, exif=exif, **options)


def transparent() -> Image.Image:
    alpha = np.where(UPRIGHT[..., :1] < 128, 255, 0).astype(np.uint8)
    return Image.fromarray(np.concatenate([UPRIGHT, alpha], 2))


def still_and_moving() -> bytes:
    frames = [Image.fromarray(UPRIGHT), Image.new("RGB", SIZE[::-1])]
    return file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


FILES: dict[str, tuple[bytes, np.ndarray]] = {  # name -> the file and what it shows
    "plain.png": (file_of(Image.fromarray(UPRIGHT), "PNG"), UPRIGHT),
    "really_png.jpg": (file_of(Image.fromarray(UPRIGHT), "PNG"), UPRIGHT),
    "no_suffix": (file_of(Image.fromarray(UPRIGHT), "BMP"), UPRIGHT),
    "lying.png": (lying("PNG"), UPRIGHT),
    "lying.webp": (lying("WEBP", lossless=True), UPRIGHT),
    "lying.tiff": (lying("TIFF"), UPRIGHT),
    "clear.png": (file_of(transparent(), "PNG"), CLEAR),
    "grey.tif": (file_of(Image.fromarray(UPRIGHT[..., 0]), "TIFF"), GREY),
    "deep.png": (file_of(Image.fromarray(UPRIGHT[..., 0].astype(np.uint16) * 257), "PNG"), GREY),
    "float.tiff": (file_of(Image.fromarray(UPRIGHT[..., 0].astype(np.float32) / 255), "TIFF"), GREY),
    "moving.webp": (still_and_moving(), UPRIGHT),
}


def built(file: Path, out: Path, size_px: str) -> Path:
    image_folder.RECIPE.build(out, {"src": str(file.parent), "val_fraction": "0", "size": size_px})
    return out


def trained_on(file: Path, out: Path) -> np.ndarray:
    return FolderDataset(built(file, out, ""), "train", SIZE).image(0).permute(1, 2, 0).numpy()


def reconstructed(file: Path, out: Path) -> np.ndarray:
    (found,) = image_files([file.parent])
    return read_image(found, SIZE).permute(1, 2, 0).numpy()


def in_shards(file: Path, out: Path) -> np.ndarray:
    examples = [Example("a", file.read_bytes(), [Caption("c", "alt")])]
    write_shards(out, "s", {"train": examples}, licence="", attribution="", recipe="", options={})
    return TextImageDataset(out, "train", SIZE).image(0).permute(1, 2, 0).numpy()


def prepared_for_shards(file: Path, out: Path) -> np.ndarray:
    with Image.open(io.BytesIO(prepared(file.read_bytes(), None, "png"))) as image:  # Pillow alone must do now
        return np.asarray(image.convert("RGB"))


def as_frame(size: tuple[int, int] | None) -> Callable[[Path, Path], np.ndarray]:
    """A way through frames of two drives; `size`: fitted when they are stored."""

    def drive(name: str, frame: bytes) -> Trajectory:
        t = np.arange(8.0)
        return Trajectory(name, t, np.stack([t, 0 * t], 1), 0 * t, [frame] * 8)

    def read(file: Path, out: Path) -> np.ndarray:
        out.mkdir()
        sources = [Source(name, name, lambda name=name: [drive(name, file.read_bytes())]) for name in ("a", "b")]
        storage = Storage(size=size, fit="none", suffix=".png", val_fraction=0.5)
        head = {"name": "d", "recipe": "test", "options": {}, "licence": "", "attribution": ""}
        write_trajectories(out, sources, storage, head, {"rate_hz": 1.0, "length_unit": "m", "camera": {}})
        return TrajectoryDataset(out, "train", SIZE, fit="none").image(0).permute(1, 2, 0).numpy()

    return read


WAYS = {
    "train": trained_on, "reconstruct": reconstructed, "shards": in_shards, "prepared": prepared_for_shards,
    "kept frames": as_frame(None), "fitted frames": as_frame(SIZE),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_every_way_gives_the_pixels_that_the_file_shows(tmp_path: Path, name: str, way: str) -> None:
    data, expected = FILES[name]
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / name
    file.write_bytes(data)
    np.testing.assert_array_equal(WAYS[way](file, tmp_path / "out"), expected)


@pytest.mark.parametrize("name", FILES)
def test_a_build_with_a_size_resizes_what_the_file_shows(tmp_path: Path, name: str) -> None:
    data, expected = FILES[name]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / name).write_bytes(data)
    folder = built(tmp_path / "src" / name, tmp_path / "out", "16")
    read = FolderDataset(folder, "train", (16, 16)).image(0).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read, np.asarray(centre_crop(Image.fromarray(expected), (16, 16))))


def test_nothing_else_opens_picture_files() -> None:
    root = Path(__file__).parents[2]
    sources = [file for top in ("raev2", "tasks", "data_recipes") for file in (root / top).rglob("*.py")]
    openers = {file.name for file in sources if "Image.open(" in file.read_text(encoding="utf-8")}
    assert openers == {"images.py", "sprites.py", "micro_encoder.py"}  # the last two need the transparency of emoji
