"""Tars of other origin: which split they are, what is left out and counted, and that all commands agree about it."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_examples import SIZE, file_of, pair, picture, stream, tokenize, write_tar

from raev2.command.cli import main
from raev2.errors import DataError
from raev2_data_recipes.captions.caption_tars import BLIP3O, RENDERED_TEXT, SCALE_RAE, TAR_SHARDS
from raev2_tasks.splits import split_in_name, split_word
from raev2_tasks.t2i.shards.check import check_shards
from raev2_tasks.t2i.shards.files import read_index, rewrite_shards, verify_shards
from raev2_tasks.t2i.shards.index import HELD_OUT, in_processes, index_shards, survey
from raev2_tasks.t2i.shards.reader import TextImageDataset
from raev2_tasks.t2i.shards.tar_scan import ScanRule, ShapeRule, scan_shard


def tar_of(file: Path, numbers: range) -> Path:
    return write_tar(file, [m for n in numbers for m in pair(f"{n:06d}", n)])


def counts(manifest) -> dict[str, int]:
    return {split: entry["num_samples"] for split, entry in manifest["splits"].items()}


def rejected(folder: Path) -> Counter[str]:
    """Kinds of the reasons in rejects.jsonl."""
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["reason"].partition(":")[0] for line in lines)


# Splits.


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("cc3m-train-0000.tar", "train"), ("cc3m-validation-0000.tar", "val"), ("x_VAL_3.tar", "val"),
        ("Valid/0.tar", "val"), ("dev/0.tar", "val"), ("coco-val2014-3.tar", "val"), ("Training/0.tar", "train"),
        ("test/0.tar", "test"), ("laion-TESTING.tar", "test"), ("cc3mTest-00.tar", "test"),
        ("test/x-train-0.tar", "train"), ("00000.tar", None), ("trainer/evaluation-0.tar", None),
        ("latest/devil-0.tar", None), ("trainval-0.tar", None),
    ],
)  # fmt: skip
def test_words_of_a_path_name_its_split(path, split):
    assert split_in_name(Path(path).parts, "data") == split


def test_a_name_with_two_splits_is_refused():
    assert split_word(" Validation ") == "val" and split_word("devil") is None
    with pytest.raises(
        DataError, match=r"words of two splits; got train-val-0.tar \(train and val\); expected one. Rena"
    ):
        split_in_name(["a", "train-val-0.tar"], "data x")


def test_a_tar_named_validation_is_not_trained_on(tmp_path, capsys):
    tar_of(tmp_path / "src" / "cc3m-train-0000.tar", range(32))
    tar_of(tmp_path / "src" / "cc3m-validation-0000.tar", range(100, 112))
    tar_of(tmp_path / "src" / "Testing" / "0.tar", range(200, 205))
    (tmp_path / "src" / "README.md").write_text("about")
    (tmp_path / "src" / "gone.tar").symlink_to(tmp_path / "gone")
    (tmp_path / "src" / "._README.md").write_bytes(b"x")
    (tmp_path / "src" / "__MACOSX").mkdir()
    (tmp_path / "src" / "__MACOSX" / "._0.tar").write_bytes(b"x")
    options = ["--set", f"src={tmp_path / 'src'}"]
    assert main(["data", "plan", "tar-shards", *options]) == 0
    plan = capsys.readouterr().out
    for line in (
        "  Testing/0.tar: test 5", "  cc3m-train-0000.tar: train 32", "  cc3m-validation-0000.tar: val 12",
        "Samples: train 32, val 12, test 5.", "The split test is kept apart; nothing is trained on it.",
        "Other files, not read: .md: 1, broken link: 1, folder __MACOSX: 1, hidden file: 1.",
    ):  # fmt: skip
        assert line in plan.splitlines()
    for recipe in ("tar-shards", "blip3o"):
        out = tmp_path / recipe
        assert main(["data", "build", recipe, *options, *(["--set", "size=16"] if recipe == "blip3o" else []),
                     "--out", str(out)]) == 0  # fmt: skip
        assert "  cc3m-train-0000.tar: train 32\n" in capsys.readouterr().out
        for split, numbers in (("train", range(32)), ("val", range(100, 112)), ("test", range(200, 205))):
            dataset = TextImageDataset(out, split, SIZE)
            assert {dataset.caption(i) for i in range(len(dataset))} == {f"picture {n}" for n in numbers}
        assert main(["data", "verify", str(out)]) == 0


def test_tars_named_for_a_test_are_held_out_where_none_is_for_validation(tmp_path):
    tar_of(tmp_path / "src" / "train-0.tar", range(32))
    tar_of(tmp_path / "src" / "test-0.tar", range(100, 112))
    lines = survey(tmp_path / "src").lines()
    assert lines == ["  test-0.tar: val 12", "  train-0.tar: train 32", "Samples: train 32, val 12.", HELD_OUT]
    assert counts(index_shards(tmp_path / "src", tmp_path / "out")) == {"train": 32, "val": 12}
    dataset = TextImageDataset(tmp_path / "out", "val", SIZE)
    assert {dataset.caption(i) for i in range(len(dataset))} == {f"picture {n}" for n in range(100, 112)}


def test_validation_samples_are_drawn_from_all_tars(tmp_path):
    first = 0
    for number, size in enumerate((1, 2, 3, 50, 7)):
        tar_of(tmp_path / "src" / f"{number:05d}.tar", range(first, first + size))
        first += size
    found = survey(tmp_path / "src")
    assert found.counts() == {"train": 55, "val": 8}
    assert "No tar is named for validation: its samples are drawn from all training tars." in found.lines()
    manifest = index_shards(tmp_path / "src", tmp_path / "out")
    assert counts(manifest) == {"train": 55, "val": 8} and verify_shards(tmp_path / "out") == manifest
    built = BLIP3O.build(tmp_path / "blip", {"src": str(tmp_path / "src"), "size": "16"})
    assert counts(built) == counts(manifest)
    captions = {}
    for split in ("train", "val"):
        sets = [TextImageDataset(tmp_path / folder, split, SIZE) for folder in ("out", "blip")]
        captions[split], same = [{data.caption(i) for i in range(len(data))} for data in sets]
        assert captions[split] == same
    assert not captions["train"] & captions["val"] and len(captions["train"] | captions["val"]) == 63


def test_a_new_tar_moves_few_samples_between_the_splits(tmp_path):
    for number in range(4):
        tar_of(tmp_path / f"{number}.tar", range(25))
    before = survey(tmp_path)
    tar_of(tmp_path / "4.tar", range(25))
    after = survey(tmp_path)
    moved = sum(
        before.split(tar, int(place)) != after.split(tar, int(place)) for tar in before.tars for place in tar.places
    )
    assert before.counts()["val"] == after.counts()["val"] - 2 == 10 and moved <= 4


def test_tars_of_which_none_is_for_training_are_refused(tmp_path):
    tar_of(tmp_path / "test" / "0.tar", range(4))
    with pytest.raises(
        DataError, match=r"no tar is left for training; got 1 tars: test/0.tar \(test\); .*Give the folder"
    ):
        survey(tmp_path)
    assert survey(tmp_path / "test").counts() == {"train": 3, "val": 1}
    with pytest.raises(DataError, match="no tar files here; expected uncompressed .tar shards"):
        survey(tmp_path, skip="test/*")


# Tars that cannot be read at a position.


@pytest.mark.parametrize(("name", "command"), [("1.tar.gz", "`gzip -dc 1.tar.gz > 1.tar`"), ("1.tar", "> plain-1.tar`"),
                                               ("1.tgz", "`gzip -dc 1.tgz > 1.tar`")])  # fmt: skip
def test_a_compressed_tar_is_named_with_the_way_out(tmp_path, name, command):
    plain = tar_of(tmp_path / "0.tar", range(4))
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(DataError) as error:
        survey(tmp_path)
    assert f"compressed tars cannot be read at a position; got 1 of 2, first {name} (gzip); expected plain" in str(
        error.value
    )
    assert command in str(error.value) and "or leave them out with the option skip" in str(error.value)
    assert survey(tmp_path, skip=name).counts() == {"train": 3, "val": 1}


def test_a_plain_tar_under_a_gz_name_is_read(tmp_path):
    tar_of(tmp_path / "0.tar.gz", range(4))
    assert counts(index_shards(tmp_path)) == {"train": 3, "val": 1}


def test_folders_behind_links_are_read_once(tmp_path):
    tar_of(tmp_path / "real" / "0.tar", range(4))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a").symlink_to(tmp_path / "real")
    (tmp_path / "src" / "b").symlink_to(tmp_path / "src")
    assert [tar.name for tar in survey(tmp_path / "src").tars] == ["a/0.tar"]


# What is left out.


def test_files_of_a_sample_that_lie_apart_are_named_as_such(tmp_path):
    pictures = [(f"{n}.png", file_of(picture(n))) for n in range(3)]
    texts = [(f"{n}.txt", b"x") for n in range(3)]
    scan = scan_shard(write_tar(tmp_path / "0.tar", [*pictures, *texts, *pair("9", 9)]))
    assert scan.keys == ["9"] and Counter(p.kind for p in scan.problems) == {"not_adjacent": 3}
    assert scan.problems[0].text == (
        "the files of the sample are not adjacent: txt after files of other samples. "
        "Write the tar with its members sorted by name."
    )


def bad_members() -> list[tuple[str, bytes]]:
    """One sample of every kind that cannot be used, and 30 that can."""
    good = file_of(picture(0))
    return [
        *[m for n in range(30) for m in pair(f"a{n:02d}", n)],
        ("b_no_caption.png", good),
        ("c_empty.png", good), ("c_empty.txt", b" \n"),
        ("d_no_picture.txt", b"x"),
        ("e_not_a_picture.jpg", b"<html>"), ("e_not_a_picture.txt", b"x"),
        ("f_two.jpg", good), ("f_two.png", good), ("f_two.txt", b"x"),
        ("g.dot.png", good), ("g.dot.txt", b"x"),
        ("h_long.png", file_of(picture(1, (90, 30)))), ("h_long.txt", b"x"),
        ("i_small.png", file_of(picture(1, (30, 10)))), ("i_small.txt", b"x"),
        ("j_binary.png", good), ("j_binary.txt", b"\x81\x8d"),
        ("k_json.json", b"{"), ("k_json.png", good),
        ("l_twice.png", good), ("l_twice.png", good), ("l_twice.txt", b"x"),
        *pair("a00", 77),
        ("m_apart.png", good), *pair("n", 78), ("m_apart.txt", b"x"),
        (".hidden", b"x"),
    ]  # fmt: skip


def test_nothing_is_dropped_without_being_counted(tmp_path, caplog):
    bad = {"bad_caption": 4, "bad_image": 3, "dotted_key": 1, "bad_geometry": 2, "duplicate_key": 1}
    bad |= {"duplicate_member": 1, "not_adjacent": 1}
    write_tar(tmp_path / "src" / "0.tar", bad_members())
    rule = ScanRule(shape=ShapeRule.of(SIZE))
    with caplog.at_level(logging.INFO):
        manifest = index_shards(tmp_path / "src", tmp_path / "out", val_samples=5, rule=rule)
    assert sum(counts(manifest).values()) == 31 and manifest["rejected"] == sum(bad.values())
    assert rejected(tmp_path / "out") == bad
    assert "0.tar: 31 usable samples, named train; left out " in caplog.text and "noted ignored 1" in caplog.text
    assert "bad_caption 4" in caplog.text and "not_adjacent 1" in caplog.text

    options = {"src": str(tmp_path / "src"), "size": "16", "val_samples": "5"}
    for recipe, more in ((BLIP3O, {}), (SCALE_RAE, {}), (RENDERED_TEXT, {"min_text_px": "0"})):
        built = recipe.build(tmp_path / recipe.name, options | more)
        assert sum(counts(built).values()) == 31 and rejected(tmp_path / recipe.name) == bad

    found = check_shards(tmp_path / "src", ShapeRule.of(SIZE))
    assert Counter(p.kind for problems in found.values() for p in problems if p.fatal) == bad
    training = TextImageDataset(tmp_path / "out", "train", SIZE, tokenize=tokenize)
    stream(training, 10, batch_size=4)
    assert not training.bad.counts, "the index has left out what training would leave out"


@pytest.mark.parametrize("recipe", [TAR_SHARDS, SCALE_RAE], ids=lambda recipe: recipe.name)
def test_damaged_tars_are_counted_and_cost_no_other(recipe, tmp_path):
    whole = tar_of(tmp_path / "src" / "good.tar", range(12)).read_bytes()
    for name, data in {
        "empty": b"", "page": b"<html>not found</html>" * 50, "cut": whole[: len(whole) // 3],
        "hole": whole[: 5 * 512] + bytes([255]) * 1024 + whole[7 * 512 :],
    }.items():  # fmt: skip
        (tmp_path / "src" / f"{name}.tar").write_bytes(data)
    options = {"src": str(tmp_path / "src"), "val_samples": "0"} | ({"size": "16"} if recipe is SCALE_RAE else {})
    plan = recipe.plan(recipe.resolve(options))
    assert sum("(bad_tar 1)" in line for line in plan) == 4
    recipe.build(tmp_path / "out", options)
    lines = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    reasons = {line["path"].partition(":")[0]: line["reason"] for line in lines if "bad_tar" in line["reason"]}
    assert set(reasons) == {"empty.tar", "page.tar", "cut.tar", "hole.tar"}
    assert "empty file" in reasons["empty.tar"] and "bytes are left" in reasons["hole.tar"]
    dataset = TextImageDataset(tmp_path / "out", "train", SIZE)
    assert {f"picture {n}" for n in range(12)} <= {dataset.caption(i) for i in range(len(dataset))}


def test_check_rewrite_and_training_agree_about_shapes(tmp_path, caplog):
    sizes = [(16, 16), (14, 20), (15, 37), (15, 38), (40, 16), (41, 16)]  # of 16 px at least 14.4, aspect at most 2.5
    good = {0, 2, 4}
    members = []
    for n, size in enumerate(sizes):
        members += [(f"{n}.png", file_of(picture(n, size))), (f"{n}.txt", f"{n}".encode())]
    write_tar(tmp_path / "d" / "0.tar", members)
    index_shards(tmp_path / "d", val_samples=0)
    shape = ShapeRule.of(SIZE)
    dataset = TextImageDataset(tmp_path / "d", "train", SIZE)
    usable = set()
    for index in range(len(dataset)):
        try:
            dataset.image(index)
            usable.add(int(dataset.caption(index)))
        except DataError as error:
            assert "image too small" in str(error) or "image too long" in str(error)
    assert usable == good
    (problems,) = check_shards(tmp_path / "d", shape).values()
    assert {p.key for p in problems if p.kind == "bad_geometry"} == {"1", "3", "5"}
    rewritten = rewrite_shards(tmp_path / "d", tmp_path / "new", shape=shape)
    assert (counts(rewritten)["train"], rewritten["rejected"]) == (3, 3)
    indexed = index_shards(tmp_path / "d", tmp_path / "out", val_samples=0, rule=ScanRule(shape=shape))
    assert (counts(indexed)["train"], indexed["rejected"]) == (3, 3)
    with caplog.at_level(logging.WARNING):
        verify_shards(tmp_path / "d")
    assert "training leaves out 2 samples with an aspect above 2.5" in caplog.text


def test_shape_rules_are_options_of_the_recipe_and_fields_of_the_run(tmp_path):
    write_tar(tmp_path / "src" / "0.tar", [*pair("0", 0), ("1.png", file_of(picture(1, (48, 16)))), ("1.txt", b"x")])
    options = {"src": str(tmp_path / "src"), "val_samples": "0"}
    assert counts(TAR_SHARDS.build(tmp_path / "a", options))["train"] == 1
    assert counts(TAR_SHARDS.build(tmp_path / "b", {**options, "max_aspect": "3"}))["train"] == 2
    with pytest.raises(DataError, match="no usable training samples; 2 rejected"):
        TAR_SHARDS.build(tmp_path / "c", {**options, "min_side": "17"})
    assert TextImageDataset(tmp_path / "b", "train", SIZE, max_aspect=3).image(1).shape == (3, 16, 16)


def test_an_index_with_mostly_bad_samples_stops(tmp_path):
    members = [*pair("0", 0), ("1.png", b"x"), ("1.txt", b"x"), ("2.png", b"x"), ("2.txt", b"x")]
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(
        DataError, match=r"too many unusable samples; got 2 of 3 \(bad_image 2\); expected at most a share"
    ):
        index_shards(tmp_path, val_samples=0)
    assert counts(index_shards(tmp_path, val_samples=0, max_bad_share=1))["train"] == 1


def test_names_of_any_bytes_are_read_and_reported(tmp_path):
    members = [*pair("caf\udce9", 0), *pair("b", 1), ("bad\udce9.png", b"x"), ("bad\udce9.txt", b"x")]
    write_tar(tmp_path / "src" / "0.tar", members)
    assert counts(index_shards(tmp_path / "src", tmp_path / "out", val_samples=0))["train"] == 2
    BLIP3O.build(tmp_path / "new", {"src": str(tmp_path / "src"), "size": "16", "val_samples": "0"})
    assert rejected(tmp_path / "out") == rejected(tmp_path / "new") == {"bad_image": 1}
    dataset = TextImageDataset(tmp_path / "new", "train", SIZE)
    assert {dataset.fields(i)["source_id"] for i in range(2)} == {"0.tar: caf?", "0.tar: b"}


# Several processes.


def test_several_processes_write_the_same_index(tmp_path):
    for number in range(3):
        tar_of(tmp_path / "src" / f"{number}.tar", range(10))
    alone = index_shards(tmp_path / "src", tmp_path / "one")
    several = index_shards(tmp_path / "src", tmp_path / "two", num_workers=2)
    assert several == alone
    shard = several["splits"]["train"]["shards"][2]
    assert np.array_equal(read_index(tmp_path / "one", shard), read_index(tmp_path / "two", shard))
    assert list(in_processes(abs, [-1, 2, -3], 2)) == [1, 2, 3]


def test_a_picture_in_a_tar_is_told_by_its_content_where_its_suffix_is_unknown(tmp_path, caplog):
    red, blue = (file_of(Image.new("RGB", SIZE, colour)) for colour in ("red", "blue"))
    members = [
        ("a.img", red), ("a.npy", b"\x93NUMPY"), ("a.txt", b"red"), ("b", red), ("b.txt", b"red"),
        ("c.jpg", red), ("c.mask", blue), ("c.txt", b"red"), ("d.x", red), ("d.y", blue), ("d.txt", b"two"),
    ]  # fmt: skip
    with caplog.at_level(logging.INFO):
        manifest = index_shards(write_tar(tmp_path / "0.tar", members).parent, val_samples=0)
    assert counts(manifest)["train"] == 3 and rejected(tmp_path) == {"bad_image": 1}
    dataset = TextImageDataset(tmp_path, "train", SIZE)
    assert [dataset.image(index)[:, 8, 8].tolist() for index in range(3)] == [[255, 0, 0]] * 3
    (problem,) = [one for one in scan_shard(tmp_path / "0.tar").problems if not one.fatal]
    assert problem.text == "members that are not read: 1 .mask, 1 .npy"


def test_every_picture_format_in_a_tar_is_read(tmp_path):
    members = []
    for suffix, format in (("gif", "GIF"), ("bmp", "BMP"), ("tiff", "TIFF"), ("webp", "WEBP"), ("jfif", "JPEG")):
        members += [(f"{suffix}.{suffix}", file_of(Image.new("RGB", SIZE, "red"), format)), (f"{suffix}.txt", b"red")]
    write_tar(tmp_path / "0.tar", members)
    index_shards(tmp_path, val_samples=0)
    dataset = TextImageDataset(tmp_path, "train", SIZE)
    assert len(dataset) == 5
    for index in range(5):
        pixel = dataset.image(index)[:, 8, 8].tolist()
        assert all(abs(value - wanted) <= 3 for value, wanted in zip(pixel, (255, 0, 0), strict=True))
