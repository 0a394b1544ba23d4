"""Large folders of pictures: they may stay where they are, and an interrupted build goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from raev2.data import FolderDataset
from raev2.errors import DataError, SpecError
from raev2_data_recipes.base import verify_dataset
from raev2_data_recipes.pictures import image_folder
from raev2_data_recipes.pictures.image_folder import RECIPE


@pytest.fixture
def src(synthetic_data: Path, tmp_path: Path) -> Path:
    """Ten pictures in two class folders, one of them damaged."""
    for number in range(10):
        folder = tmp_path / "src" / "train" / ("cat" if number < 6 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(synthetic_data / f"train/{number:06d}.png", folder / f"{number}.png")
    (tmp_path / "src" / "train" / "cat" / "2.png").write_bytes(b"x")
    return tmp_path / "src"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_pictures_may_stay_where_they_are(src: Path, tmp_path: Path) -> None:
    options = {"src": str(src), "val_fraction": "0.25"}
    copied = RECIPE.build(tmp_path / "copied", options)
    manifest = RECIPE.build(tmp_path / "listed", {**options, "in_place": "yes"})
    assert not list((tmp_path / "listed").rglob("*.png")), "no picture was copied"
    for name in ("classes", "rejected", "image_size_px"):
        assert manifest[name] == copied[name]
    assert "The pictures stay where they are." in RECIPE.plan({**options, "in_place": "yes"})
    for split in ("train", "val"):
        ours, theirs = (FolderDataset(tmp_path / name, split, (32, 32), ("label",)) for name in ("listed", "copied"))
        assert len(ours) == len(theirs) > 0
        for number in range(len(ours)):
            assert torch.equal(ours.image(number), theirs.image(number)) and ours.cond(number) == theirs.cond(number)
    verify_dataset(tmp_path / "listed")
    (src / "train" / "dog" / "9.png").unlink()
    with pytest.raises(DataError, match=r"dog/9.png: file is missing"):
        verify_dataset(tmp_path / "listed")


def test_a_build_that_was_killed_goes_on_where_it_was(src: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"src": str(src), "val_fraction": "0.25"}
    RECIPE.build(tmp_path / "data", options)
    expected = contents(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    real, read = image_folder._read, []

    def killed(path, *rest):
        if len(read) == 6:
            raise KeyboardInterrupt
        read.append(path)
        return real(path, *rest)

    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one thread reads, so the pictures come one after the other
    monkeypatch.setattr(image_folder, "_read", killed)
    with pytest.raises(KeyboardInterrupt):
        RECIPE.build(tmp_path / "data", options)
    progress = tmp_path / "data.partial" / "progress.jsonl"
    assert len(progress.read_text().splitlines()) == 6 and not (tmp_path / "data").exists()
    with progress.open("a") as file:
        file.write('{"source": "cut sh')
    monkeypatch.setattr(image_folder, "_read", lambda path, *rest: read.append(path) or real(path, *rest))
    RECIPE.build(tmp_path / "data", options)
    assert len(read) == len(set(read)) == 10, "each picture was read once"
    assert contents(tmp_path / "data") == expected


def test_a_build_does_not_go_on_with_other_pictures(src: Path, tmp_path: Path, monkeypatch) -> None:
    def killed(path, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.cpu_count", lambda: 1)
    real = image_folder._read
    monkeypatch.setattr(
        image_folder, "_read", lambda path, *rest: (killed if path.name == "7.png" else real)(path, *rest)
    )
    with pytest.raises(KeyboardInterrupt):
        RECIPE.build(tmp_path / "data", {"src": str(src), "val_fraction": "0"})
    (src / "train" / "cat" / "0.png").rename(src / "train" / "cat" / "00.png")
    with pytest.raises(DataError, match=r"the source has changed since; got .*00.png; expected .*0.png"):
        RECIPE.build(tmp_path / "data", {"src": str(src), "val_fraction": "0"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_place": "ja"}, "in_place: not usable; got ja; expected yes or no"),
        (
            {"in_place": "yes", "size": "64"},
            "in_place: pictures that stay are not resized; got size=64; expected no size",
        ),
    ],
)
def test_an_option_in_place_that_cannot_be(src: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RECIPE.build(tmp_path / "data", {"src": str(src), **options})
