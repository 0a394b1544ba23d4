"""Listing a folder of pictures: what is one, links, loops, and what is passed over by kind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from raev2.errors import DataError
from raev2.files.picture_folder import image_files, scan_folder, told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a/c.jpg", "a/d/e.gif", "a/.hidden/f.png", "@eaDir/g.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "a" / "d" / "e.gif").rename(tmp_path / "a" / "d" / "e")  # told by its content
    (tmp_path / "a" / "THUMBS.DB").write_bytes(b"")
    (tmp_path / "notes").write_text("x")
    return tmp_path


def test_pictures_are_found_at_any_depth_in_path_order(folder: Path) -> None:
    found = scan_folder(folder)
    assert [str(path.relative_to(folder)) for path in found.all_pictures()] == ["a/c.jpg", "a/d/e", "b.png"]
    assert [str(path.relative_to(folder)) for path in image_files([folder])] == ["a/c.jpg", "a/d/e", "b.png"]
    assert [inside.path.name for inside in found.filled()] == ["a"]


def test_what_is_passed_over_is_counted_by_kind(folder: Path) -> None:
    left_out = scan_folder(folder).all_ignored()
    assert left_out == {"folder .hidden": 1, "folder @eaDir": 1, "THUMBS.DB": 1, "no picture (no suffix)": 1}
    assert told(left_out) == "THUMBS.DB: 1, folder .hidden: 1, folder @eaDir: 1, no picture (no suffix): 1"
    assert told(Counter()) == ""


def test_links_are_followed_once_around(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to(folder)
    found = scan_folder(folder)
    assert [str(path.relative_to(folder)) for path in found.all_pictures()] == [
        "a/c.jpg", "a/d/e", "b.png", "link/c.jpg", "link/d/e",
    ]  # fmt: skip
    assert found.all_ignored()["link to a folder around it"] == 2


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data .*/absent: cannot be listed; got No such file or directory"):
        scan_folder(tmp_path / "absent")
