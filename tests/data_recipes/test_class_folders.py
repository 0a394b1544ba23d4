"""What a folder of pictures is taken for: splits, classes, what is left out, what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raev2.command.cli import main
from raev2.errors import DataError, SpecError
from raev2.files.manifest import read_manifest
from raev2_data_recipes.base import verify_dataset
from raev2_data_recipes.pictures.class_folders import Choice, read_layout
from raev2_data_recipes.pictures.image_folder import RECIPE
from raev2_data_recipes.pictures.layout import MAX_HASHED, count_duplicates

made = iter(range(10**9))


def picture() -> bytes:
    """The file of a picture that no other is equal to."""
    pixels = np.random.default_rng(next(made)).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make(root: Path, *names: str) -> Path:
    """Write a picture at each path below `root`; 'cat/*3' are three of them."""
    for name in names:
        stem, _, number = name.partition("*")
        for path in [root / f"{stem}{i}.png" for i in range(int(number))] if number else [root / name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture())
    return root


def layout(src: Path, fraction: float = 0.0, **choice: int | bool):
    return read_layout(src, fraction, Choice(**choice))


def counts(src: Path, **choice: int | bool) -> dict[str, dict[str, int]]:
    """split -> class -> number of pictures."""
    found: dict[str, dict[str, int]] = {}
    for file in layout(src, **choice).files:
        found.setdefault(file.split, Counter())[file.class_name] += 1
    return {split: dict(names) for split, names in found.items()}


def said(src: Path, **options: str) -> str:
    return "\n".join(RECIPE.plan({"src": str(src), **options}))


# Splits


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("val", ["val", "VAL", "valid", "Validation", "dev"])
def test_every_spelling_of_train_and_val_is_a_split(tmp_path: Path, train: str, val: str) -> None:
    make(tmp_path, f"{train}/cat/*3", f"{train}/dog/*2", f"{val}/cat/*1", f"{val}/dog/*1")
    assert counts(tmp_path) == {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}}
    assert f"train: 5 pictures, from {train}/." in said(tmp_path) and f"val: 2 pictures, from {val}/." in said(tmp_path)


@pytest.mark.parametrize("test", ["test", "Test", "testing", "TESTING"])
def test_a_test_folder_is_held_out_and_named_where_there_is_no_val(tmp_path: Path, test: str) -> None:
    make(tmp_path, "train/cat/*3", "train/dog/*2", f"{test}/cat/*1", f"{test}/dog/*1")
    assert counts(tmp_path) == {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}}
    assert f"{test}/ is the held-out split, as there is no folder for val; it is never trained on." in said(tmp_path)


def test_a_test_folder_beside_val_takes_no_part_and_is_counted(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/*3", "train/dog/*2", "val/cat/*1", "val/dog/*1", "test/cat/*4")
    assert counts(tmp_path) == {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}}
    assert layout(tmp_path).left_out == {"picture in test/, not needed beside the folder for val": 4}


def test_a_test_folder_without_classes_takes_no_part_and_val_is_a_share(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/*4", "train/dog/*4", "test/*5")
    found = layout(tmp_path, 0.25)
    assert Counter(file.split for file in found.files) == {"train": 6, "val": 2}
    assert found.left_out == {"picture in test/, which has no class folders": 5}
    assert "val: 2 pictures, a share of every class." in found.lines()


def test_a_lone_train_folder_is_split_by_share(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/*10", "train/dog/*10")
    assert Counter((file.split, file.class_name) for file in layout(tmp_path, 0.2).files) == {
        ("train", "cat"): 8, ("train", "dog"): 8, ("val", "cat"): 2, ("val", "dog"): 2,
    }  # fmt: skip


def test_an_empty_val_folder_counts_as_none(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/*3", "train/dog/*3", "test/cat/*1", "test/dog/*1")
    (tmp_path / "val").mkdir()
    assert counts(tmp_path)["val"] == {"cat": 1, "dog": 1}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make(tmp_path, "train/*3", "car/*3", "boat/*3")
    assert counts(tmp_path) == {"train": {"boat": 3, "car": 3, "train": 3}}
    assert "train/ is read as a class; if it is a split: --set splits=yes." in said(tmp_path)


def test_two_folders_for_a_split_and_a_missing_train_folder_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", "train/cat/*1", "dev/cat/*1", "val/cat/*1")
    with pytest.raises(DataError, match="src: two folders for val; got dev/, val/. Move one away."):
        layout(tmp_path / "a")
    make(tmp_path / "b", "test/cat/*1", "test/dog/*1")
    with pytest.raises(
        DataError, match="no folder for train; got test/. To train on it: --set src=.*/b/test. If it is"
    ):
        layout(tmp_path / "b")


# Classes


@pytest.mark.parametrize("wrapper", ["MyPhotos", "a/b/c", "dataset v2"])
@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_folder_around_everything_is_looked_through_and_named(tmp_path: Path, wrapper: str, inside: str) -> None:
    make(tmp_path, f"{wrapper}/{inside}cat/*2", f"{wrapper}/{inside}dog/*2", f"{wrapper}/{inside}owl/*2")
    assert counts(tmp_path) == {"train": {"cat": 2, "dog": 2, "owl": 2}}
    note = f"{wrapper}/ is around everything and was looked through"
    assert note + ("." if inside else "; if it is the one class: --set class_level=1.") in said(tmp_path)
    assert "3 classes, first cat, last owl; each with 1 for training." in said(tmp_path)
    if not inside:
        assert counts(tmp_path, class_level=1) == {"train": {wrapper.partition("/")[0]: 6}}


def test_a_wrapper_with_splits_in_it(tmp_path: Path) -> None:
    make(tmp_path, "Data/Train/cat/*2", "Data/Train/dog/*2", "Data/Test/cat/*1", "Data/Test/dog/*1")
    assert counts(tmp_path) == {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}}
    assert "val: 2 pictures, from Data/Test/." in said(tmp_path)


def test_pictures_beside_a_wrapper_or_splits_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "cover.png", "Data/cover.png", "Data/x/train/cat/*2", "Data/x/train/dog/*2", "Data/x/train.png")
    assert counts(tmp_path) == {"train": {"cat": 2, "dog": 2}}
    assert layout(tmp_path).left_out == {"picture beside the splits": 3}


def test_a_level_without_pictures_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "cat/*2", "dog/*2")
    with pytest.raises(DataError, match="src: no pictures for training at this level of folders; got class_level=2"):
        layout(tmp_path, class_level=2)


def test_links_to_class_folders_and_to_the_source_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "else", "cat/*2", "dog/*3")
    make(tmp_path / "src", "owl/*1")
    for name in ("cat", "dog"):
        (tmp_path / "src" / name).symlink_to(tmp_path / "else" / name)
    (tmp_path / "linked").symlink_to(tmp_path / "src")
    for src in (tmp_path / "src", tmp_path / "linked"):
        assert counts(src) == {"train": {"cat": 2, "dog": 3, "owl": 1}}
    (tmp_path / "src" / "owl" / "again.png").symlink_to(tmp_path / "src" / "owl" / "0.png")
    assert counts(tmp_path / "src")["train"]["owl"] == 2


def test_unicode_forms_of_one_name_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    make(tmp_path, f"train/{composed}/*2", "train/tea/*2", f"val/{decomposed}/*1", "val/tea/*1")
    assert counts(tmp_path) == {"train": {composed: 2, "tea": 2}, "val": {composed: 1, "tea": 1}}
    make(tmp_path, f"train/{decomposed}/*3")
    assert counts(tmp_path)["train"] == {composed: 5, "tea": 2}
    assert f"Several folders are one class, as their names are the same text: {composed}." in said(tmp_path)


def test_names_that_are_no_utf8_are_read_and_written(tmp_path: Path) -> None:
    src = os.fsencode(tmp_path / "src")
    for name in (b"caf\xe9", b"tea", b".\xe9", b"x"):
        os.makedirs(src + b"/" + name)
        with open(src + b"/" + name + b"/l\xe4nge\xe2\x80\xa8.png", "wb") as file:
            file.write(picture())
    open(src + b"/x.\xe9", "w", encoding="utf-8").close()
    assert "folder .\ufffd: 1, no picture (.\ufffd): 1." in said(tmp_path / "src")
    RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src"), "val_fraction": "0"})
    manifest = verify_dataset(tmp_path / "out")
    assert manifest["classes"] == ["caf\ufffd", "tea", "x"] and manifest["splits"]["train"]["num_samples"] == 3


@pytest.mark.parametrize(
    ("tree", "num_val"), [("*10", 2), ("*4", 2), ("*3", 1), ("*60", 3), ("cat/*10", 2), ("cat/*10 dog/*2 owl/*1", 2)]
)
def test_two_pictures_are_held_out_where_there_are_four(tree: str, num_val: int, tmp_path: Path) -> None:
    """A Fréchet distance needs two. Of several classes each gives one, where it has two."""
    make(tmp_path, *tree.split())
    assert sum(file.split == "val" for file in layout(tmp_path, 0.05).files) == num_val


def test_one_class_is_one_class_and_a_flat_folder_has_none(tmp_path: Path) -> None:
    make(tmp_path / "one", "cat/*3")
    assert counts(tmp_path / "one") == {"train": {"cat": 3}}
    assert "1 class: cat; for pictures without labels: --set class_level=0." in said(tmp_path / "one", val_fraction="0")
    make(tmp_path / "flat", "*3")
    assert counts(tmp_path / "flat") == {"train": {"": 3}} and "flat: no labels." in said(tmp_path / "flat")


def test_pictures_deeper_in_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    make(tmp_path, "cat/2019/*2", "cat/2020/may/*1", "dog/*2")
    assert counts(tmp_path) == {"train": {"cat": 3, "dog": 2}}
    assert counts(tmp_path, class_level=2) == {"train": {"2019": 2, "2020": 1}}


def test_classes_of_one_split_and_empty_class_folders_are_named(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/*3", "train/dog/*1", "val/cat/*1", "val/owl/*1")
    (tmp_path / "train" / "owl").mkdir()
    (tmp_path / "train" / "yak").mkdir()
    text = said(tmp_path)
    assert layout(tmp_path).classes == ["cat", "dog", "owl"]
    assert "Only in train: dog." in text and "Only in val (never trained): owl." in text
    assert "Class folders without pictures: train/owl, train/yak." in text


def test_a_plan_tells_number_first_last_smallest_and_largest_class(tmp_path: Path) -> None:
    make(tmp_path, "ant/*2", "bee/*7", "cow/*1", "dog/*3")
    text = said(tmp_path, val_fraction="0")
    assert (
        "4 classes, first ant, last dog; smallest cow (1 for training), largest bee (7).\nNo file is left out." in text
    )
    assert "train: 13 pictures.\nval: 0 pictures.\n" in text


# Left out


def test_no_file_is_dropped_without_being_counted(tmp_path: Path) -> None:
    src = make(tmp_path / "src", "train/cat/*3", "train/dog/*3", "val/cat/*1", "val/dog/*1")
    files = {
        "train/cat/.DS_Store": ".DS_Store", "train/cat/Thumbs.db": "Thumbs.db", "train/desktop.ini": "desktop.ini",
        "train/cat/._0.png": "hidden file", "train/dog/.hidden.png": "hidden file",
        ".ipynb_checkpoints/0-checkpoint.png": "folder .ipynb_checkpoints",
        "train/.thumbnails/a.png": "folder .thumbnails", "train/@eaDir/cat/0.png": "folder @eaDir",
        "__MACOSX/train/cat/._0.png": "folder __MACOSX", ".git/objects/aa/bb": "folder .git",
        "labels.csv": "no picture (.csv)", "train/cat/notes.TXT": "no picture (.txt)", "train/LICENSE":
        "no picture (no suffix)", "train/cat/clip.mp4": "no picture (.mp4)", "train/dog/scan.pdf": "no picture (.pdf)",
        "stray.png": "picture beside the splits", "train/stray.png": "picture outside the class folders",
        "test/cat/0.png": "picture in test/, not needed beside the folder for val",
    }  # fmt: skip
    for name in files:
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(picture() if name.endswith(".png") else b"no picture")
    (src / "train" / "cat" / "gone.png").symlink_to(src / "nowhere")
    (src / "train" / "cat" / "up").symlink_to(src)
    os.mkfifo(src / "train" / "cat" / "pipe.png")
    more = {"broken link": 1, "link to a folder around it": 1, "neither file nor folder": 1}
    bad = {"bad.jpg": b"text", "empty.png": b"", "cut.png": picture()[:100], "bomb.bmp": bomb()}
    for name, data in bad.items():
        (src / "train" / "cat" / name).write_bytes(data)
    expected = Counter(files.values()) + Counter(more)
    text = said(src)
    assert "Left out: " + ", ".join(f"{kind}: {number}" for kind, number in sorted(expected.items())) + "." in text
    assert "Outside the class folders: train/stray.png." in text

    manifest = RECIPE.build(tmp_path / "out", {"src": str(src)})
    assert manifest["left_out"] == dict(sorted(expected.items())) and manifest["rejected"] == len(bad)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name for line in rejects} == set(bad)
    assert any("picture too large; got 9000 x 9000 px" in line["reason"] for line in rejects)
    on_disk = sum(len(names) for _, _, names in os.walk(src)) + 1  # the link to a folder is in no list of files
    used = sum(entry["num_samples"] for entry in manifest["splits"].values())
    assert used == 8 and used + manifest["rejected"] + sum(manifest["left_out"].values()) == on_disk


def bomb() -> bytes:
    """A BMP header that claims 9000 x 9000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = (9000).to_bytes(4, "little") * 2
    return bytes(data)


def test_tool_folders_do_not_become_classes(tmp_path: Path) -> None:
    make(tmp_path, "cat/*2", "coffee/*2", "stray_top.png", ".thumbnails/*2", "@eaDir/*1", "__MACOSX/cat/*1")
    assert counts(tmp_path) == {"train": {"cat": 2, "coffee": 2}}
    assert "Outside the class folders: stray_top.png." in said(tmp_path)


def test_pictures_in_both_splits_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/*4", "train/dog/*4", "test/cat/*2", "test/dog/*2")
    (tmp_path / "test" / "cat" / "0.png").write_bytes((tmp_path / "train" / "cat" / "3.png").read_bytes())
    (tmp_path / "test" / "dog" / "copy.png").write_bytes((tmp_path / "train" / "cat" / "3.png").read_bytes())
    assert "In val and in train, byte for byte: 2 pictures." in said(tmp_path)
    assert RECIPE.build(tmp_path / "out", {"src": str(tmp_path)})["duplicates"] == 2


def test_a_plan_compares_no_more_than_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "cat/*3")
    files = layout(tmp_path).files
    assert count_duplicates(files) == 0 and count_duplicates(files * (MAX_HASHED // 3 + 1)) is None
    monkeypatch.setattr("raev2_data_recipes.pictures.layout.MAX_HASHED", 2)
    assert "`build` counts those that are in both splits." in said(tmp_path)


# Doubtful


@pytest.mark.parametrize(
    ("names", "message", "readings"),
    [
        (
            ["train/*3", "test/*2"], "pictures directly in test/, train/. Say which: splits of pictures without labels",
            {"class_level=0": {"train": {"": 3}, "val": {"": 2}}, "splits=no": {"train": {"test": 2, "train": 3}}},
        ),
        (
            ["train/*3"], "pictures directly in train/.",
            {"class_level=0": {"train": {"": 3}}, "splits=no": {"train": {"train": 3}}},
        ),
        (
            ["cat/*2", "cat/old/*2"], "cat/ is alone and has folders in it. Say which: cat is the one class",
            {"class_level=1": {"train": {"cat": 4}}, "class_level=2": {"train": {"old": 2}}},
        ),
        (
            ["a/b/*3"], "a/ is alone and has folders in it.",
            {"class_level=1": {"train": {"a": 3}}, "class_level=2": {"train": {"b": 3}}},
        ),
        (
            ["train/cat/a/*2", "train/cat/b/*2", "val/cat/a/*1"], "cat/ is alone and has folders in it.",
            {
                "class_level=1": {"train": {"cat": 4}, "val": {"cat": 1}},
                "class_level=2": {"train": {"a": 2, "b": 2}, "val": {"a": 1}},
            },
        ),
        (
            ["*5", "cat/*1", "dog/*1"], "5 pictures beside cat/, dog/. Say which: no classes, and all the pictures are",
            {"class_level=0": {"train": {"": 7}}, "class_level=1": {"train": {"cat": 1, "dog": 1}}},
        ),
        (
            ["*1", "old/*4"], "1 picture beside old/.",
            {"class_level=0": {"train": {"": 5}}, "class_level=1": {"train": {"old": 4}}},
        ),
        (
            ["train/cat/*2", "val/cat/*2", "extra/cat/*2"], "train/, val/ beside extra/. Say which: splits, and the",
            {
                "splits=yes": {"train": {"cat": 2}, "val": {"cat": 2}},
                "splits=no": {"train": {"train": 2, "val": 2, "extra": 2}},
            },
        ),
        (
            ["test/*2", "cat/*2"], "test/ beside cat/.",
            {"splits=no": {"train": {"test": 2, "cat": 2}}},
        ),
        (
            ["train2017/*3", "val2017/*2"], "train2017/, val2017/. Say which: splits",
            {
                "splits=yes": {"train": {"": 3}, "val": {"": 2}},
                "splits=no": {"train": {"train2017": 3, "val2017": 2}},
            },
        ),
        (
            ["W/my_train/cat/*3", "W/my_train/dog/*1", "W/my_test/cat/*2"], "my_test/, my_train/. Say which: splits",
            {"splits=yes": {"train": {"cat": 3, "dog": 1}, "val": {"cat": 2}}},
        ),
    ],
)  # fmt: skip
def test_a_layout_with_two_readings_is_refused_with_the_option_for_each(
    tmp_path: Path, names: list[str], message: str, readings: dict[str, dict[str, dict[str, int]]]
) -> None:
    make(tmp_path, *names)
    with pytest.raises(DataError, match="^data image-folder: src: can be read in two ways; got " + re.escape(message)):
        layout(tmp_path)
    with pytest.raises(DataError) as refused:
        layout(tmp_path)
    for option, expected in readings.items():
        assert f"(--set {option})" in str(refused.value)
        name, _, value = option.partition("=")
        assert (
            counts(tmp_path, **{name: {"yes": True, "no": False}[value] if name == "splits" else int(value)})
            == expected
        )


def test_folders_for_splits_inside_the_class_folders_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "cat/Train/*3", "cat/test/*1", "dog/Train/*3", "dog/test/*1")
    with pytest.raises(
        DataError,
        match="folders for splits inside the class folders; got cat/Train/, cat/test/, dog/Train/, dog/test/. Put the "
        "class folders into train/ and test/ instead; or, if all the pictures are for training: --set class_level=1",
    ):
        layout(tmp_path)
    assert counts(tmp_path, class_level=1) == {"train": {"cat": 4, "dog": 4}}
    assert set(counts(make(tmp_path / "b", "test_tube/*2", "dev_board/*2"))["train"]) == {"test_tube", "dev_board"}


def test_a_doubt_below_a_wrapper_counts_the_wrapper(tmp_path: Path) -> None:
    make(tmp_path, "Photos/train/cat/*1", "Photos/train/dog/*1")
    with pytest.raises(
        DataError, match="train is the one class .--set class_level=2.; or .* classes .--set class_level=3"
    ):
        layout(tmp_path, splits=False)
    assert counts(tmp_path, splits=False, class_level=2) == {"train": {"train": 2}}
    assert counts(tmp_path, splits=False, class_level=3) == {"train": {"cat": 1, "dog": 1}}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("class_level", "x", "class_level: not usable; got x; expected a number, or empty"),
        ("splits", "maybe", "splits: not usable; got maybe; expected yes, no, or empty"),
    ],
)
def test_options_of_another_kind_are_refused(tmp_path: Path, option: str, value: str, message: str) -> None:
    make(tmp_path, "cat/*1")
    with pytest.raises(SpecError, match=message):
        RECIPE.plan({"src": str(tmp_path), option: value})
    with pytest.raises(DataError, match="no folder for train; got cat/"):
        layout(tmp_path, splits=True)


# What is written


def test_every_index_line_names_the_source(tmp_path: Path) -> None:
    make(tmp_path / "src", "Photos/train/cat/*2", "Photos/train/dog/a b/*1", "Photos/test/cat/*1")
    RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src")})
    for split in ("train", "val"):
        for line in map(json.loads, (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()):
            assert (tmp_path / "src" / line["source"]).read_bytes() == (tmp_path / "out" / line["file"]).read_bytes()
            assert line["source"].startswith(f"Photos/{'train' if split == 'train' else 'test'}/{line['name']}/")


def test_files_are_named_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("png.jpg", "nothing", "tiff.tif", "jpeg.JPEG"):
        format = {"png.jpg": "PNG", "nothing": "GIF", "tiff.tif": "TIFF", "jpeg.JPEG": "JPEG"}[name]
        Image.new("RGB", (9, 9)).save(tmp_path / "src" / name, format)
    RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src"), "val_fraction": "0"})
    lines = map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())
    assert {line["source"]: Path(line["file"]).suffix for line in lines} == {
        "png.jpg": ".png", "nothing": ".gif", "tiff.tif": ".tiff", "jpeg.JPEG": ".jpg",
    }  # fmt: skip


def test_plan_and_build_print_what_was_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "src", "Photos/train/cat/*2", "Photos/train/dog/*1", "Photos/test/cat/*1")
    same = (tmp_path / "src/Photos/train/dog/0.png").read_bytes()
    (tmp_path / "src/Photos/test/cat/0.png").write_bytes(same)
    (tmp_path / "src/Photos/readme.md").write_text("hello")
    assert main(["data", "plan", "image-folder", "--set", f"src={tmp_path / 'src'}"]) == 0
    planned = capsys.readouterr().out
    assert main(["data", "build", "image-folder", "--set", f"src={tmp_path / 'src'}", "--out", f"{tmp_path}/out"]) == 0
    built = capsys.readouterr().out
    assert built.startswith(planned) and planned.splitlines() == [
        f"Read {tmp_path}/src: folders Photos/train/ and Photos/test/ with class folders.",
        "train: 3 pictures, from Photos/train/.",
        "val: 1 picture, from Photos/test/.",
        "2 classes, first cat, last dog; smallest dog (1 for training), largest cat (2).",
        "Only in train: dog.",
        "Photos/ is around everything and was looked through.",
        "test/ is the held-out split, as there is no folder for val; it is never trained on.",
        "Left out: no picture (.md): 1.",
        "In val and in train, byte for byte: 1 picture.",
        "Copy the files as they are.",
    ]
    assert built.splitlines()[-2:] == [
        f"{tmp_path}/out: train 3, val 1, 2 classes, 0 rejected", "in val and in train: 1"
    ]  # fmt: skip
    assert read_manifest(tmp_path / "out")["understood"] == planned.splitlines()[:8]


def test_the_manual_shows_a_real_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = make(tmp_path / "photos", "train/cat/*6", "train/dog/*5", "train/owl/*3", "test/cat/*2", "test/dog/*1")
    make(src, "train/loose.jpg", "train/.thumbnails/*2")
    (src / "train/cat/Thumbs.db").write_bytes(b"")
    (src / "labels.csv").write_text("")
    (src / "test/dog/0.png").write_bytes((src / "train/dog/0.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "own_data.md").read_text()
    plan, refusal = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    assert main(["data", "plan", "image-folder", "--set", "src=photos"]) == 0
    assert capsys.readouterr().out == plan
    make(tmp_path / "flat", "train/*3", "test/*2")
    assert main(["data", "plan", "image-folder", "--set", "src=flat"]) == 3
    assert capsys.readouterr().err == refusal
