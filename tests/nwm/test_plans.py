"""The page with one plan of each recipe: its commands are run on inputs that are made here, and print what it shows."""

from __future__ import annotations

import io
import pickle
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import Clip, write_clip
from PIL import Image
from test_bags import Messages, drive, write_ros2
from trajectory_folders import frame, walk, write

from raev2.command.cli import main
from raev2.task import installed_data_recipes

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "data_plans.md"
T = np.arange(48) / 4
PATH = np.column_stack([5 * np.sin(0.2 * T), 5 - 5 * np.cos(0.2 * T), 0.2 * T])  # an arc to the left, 1 m/s


def put(file: str, data: bytes | str = b"x") -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def picture(number: int, format: str = "JPEG", size: tuple[int, int] = (24, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame(number, size)).save(buffer, format)
    return buffer.getvalue()


def tar(file: str, keys: range, **more: str) -> None:
    with tarfile.open(put(file), "w") as archive:
        for key in keys:
            for suffix, data in {"jpg": picture(key, size=(280, 300)), "txt": b"a grey square", **more}.items():
                info = tarfile.TarInfo(f"{key:06d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data if isinstance(data, bytes) else data.encode()))


def poses(t: np.ndarray = T, factor: float = 1.0) -> str:
    path = np.column_stack([t * factor, 5 * np.sin(0.2 * t), 5 - 5 * np.cos(0.2 * t), np.rad2deg(0.2 * t)])
    return "\n".join(["t,x,y,yaw", *(",".join(f"{value:.4f}" for value in row) for row in path)])


def pictures() -> None:
    for name, count in {"train/cat": 6, "train/dog": 5, "test/cat": 2, "test/dog": 1}.items():
        for number in range(count):
            put(f"photos/{name}/{number}.jpg", picture(number + 10 * len(name)))
    for file in ("photos/Thumbs.db", "photos/train/.thumbnails/0.jpg", "photos/labels.csv"):
        put(file)
    for number in range(12):
        split = "test" if number < 2 else "train"
        put(f"captioned/{split}/{number}.jpg", picture(number))
        put(f"captioned/{split}/{number}.txt", "" if number == 5 else "a café")
    for file in ("captioned/train/3.txt", "captioned/train/4.txt"):
        Path(file).unlink()
    put("captioned/notes.md")
    rows = [f"{n}.jpg;a café, number {n};{'test' if n == 7 else ''};longer" for n in range(8)]
    put("table/pictures.csv", "\n".join(["image;caption;split;recaption", *rows]).encode("cp1252"))
    for number in range(7):
        put(f"table/{number}.jpg", picture(number, size=(70, 90)))


WRITING = '{"ocr_annotation": {"text": ["HI"], "bb_relative": [[[0, 0], [1, 0], [1, 0.1], [0, 0.1]]]}}'

REQUEST = '{"conversations": [{"from": "human", "value": "Can you generate an image of a grey square?"}]}'


def tars() -> None:
    tar("long-caption/00000.tar", range(30))
    tar("long-caption/00001.tar", range(30, 60))
    tar("long-caption/geneval-00000.tar", range(5))
    tar("rendered/00000.tar", range(20), json=WRITING)
    tar("scale-rae/00000.tar", range(20), json=REQUEST)
    tar("scale-rae/00001.tar", range(20, 25), jpg="no picture")
    for name, keys in {"train-0000": range(40), "train-0001": range(40, 47), "validation-0000": range(50, 62)}.items():
        tar(f"shards/cc3m-{name}.tar", keys)
    tar("shards/cc3m-test-0000.tar", range(70, 76))
    put("shards/README.md")


def drives() -> None:
    h5py = pytest.importorskip("h5py")
    for name in ("hall_0", "hall_1", "yard_0", "yard_1"):
        for number in range(48):
            put(f"walks/{name}/{number:04d}.jpg", picture(number))
            put(f"gnm/{name}/{number}.jpg", picture(number))
        put(f"walks/{name}/poses.csv", poses(factor=1000))
        put(f"gnm/{name}/traj_data.pkl", pickle.dumps({"position": PATH[:, :2], "yaw": PATH[:, 2]}))
        put(f"recon/{name}.hdf5").unlink()
        with h5py.File(f"recon/{name}.hdf5", "w") as file:
            file["images/rgb_left"] = np.array([picture(number) for number in range(48)], "S4000")
            file["jackal/position"], file["jackal/yaw"] = PATH[:, :2], PATH[:, 2]
    Path("walks/yard_0/poses.csv").unlink()
    Path("gnm/yard_0/7.jpg").unlink()
    clip = write_clip(Clip(".mp4", "libx264", options={"preset": "ultrafast"}), Path("clip.mp4"))
    for name in ("hall", "lab", "yard"):
        shutil.copy(clip, put(f"videos/{name}.mp4"))
    for name in ("hall", "lab"):
        put(f"videos/{name}.csv", poses(np.arange(0, 4.5, 0.05), factor=1000))
    for file in ("walks/notes.md", "videos/notes.md", "videos/Thumbs.db", "gnm/hall_0/cover.jpg"):
        put(file)
    for name in ("run_a", "run_b"):
        write_ros2(Path("bags") / name, drive(Messages()))
    put("bags/run_c/run_c.mcap")
    camera = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    turn = np.array([[[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]] for a in PATH[:, 2]])
    table = np.concatenate([camera.T @ turn @ camera, (np.column_stack([PATH[:, :2], 0 * T]) @ camera)[..., None]], 2)
    for name in ("00", "01", "11"):
        put(f"kitti/sequences/{name}/times.txt", "\n".join(map(str, T)))
        for number in range(48):
            put(f"kitti/sequences/{name}/image_2/{number:06d}.png", picture(number, "PNG"))
        if name != "11":
            put(f"kitti/poses/{name}.txt", "\n".join(" ".join(map(str, row)) for row in table.reshape(48, 12)))
        put(f"kitti/sequences/{name}/calib.txt")
    for name, num in (("scand", 24), ("recon", 40)):
        write(Path("data") / name, [walk("a-0", num), walk("b-0", num), walk("c-0", num)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pictures()
        tars()
        drives()
        yield root


def shown() -> dict[str, tuple[list[str], str]]:
    """Recipe -> the words of its command and what the page says that it prints."""
    blocks = re.findall(r"^```text\n\$ raev2 (data plan ([\w-]+)[^\n]*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return {recipe: (shlex.split(command), output) for command, recipe, output in blocks}


def test_the_page_has_every_recipe() -> None:
    ours = {name for name, point in installed_data_recipes().items() if point.value.startswith("raev2_data_recipes")}
    assert set(shown()) == ours


@pytest.mark.parametrize("recipe", list(shown()))
def test_a_plan_is_what_the_page_shows(recipe: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, output = shown()[recipe]
    assert main(command) == 0
    assert capsys.readouterr().out == output
