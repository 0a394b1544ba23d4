"""Data recipes of captioned images: folder, table, published tars; all through the command line's door."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from shard_examples import file_of, pair, picture, write_tar

from raev2.command.cli import main
from raev2.errors import DataError, SpecError
from raev2_data_recipes import base
from raev2_data_recipes.captions.caption_tars import BLIP3O, RENDERED_TEXT, SCALE_RAE, TAR_SHARDS
from raev2_data_recipes.captions.captioned import FOLDER, TABLE
from raev2_data_recipes.captions.shard_recipe import prepared
from raev2_tasks.t2i.shards import files as shards
from raev2_tasks.t2i.shards.index import least_val, place_of, val_below
from raev2_tasks.t2i.shards.reader import TextImageDataset
from raev2_tasks.t2i.text.captions import BadSample

RECIPES = [FOLDER, TABLE, BLIP3O, RENDERED_TEXT, SCALE_RAE, TAR_SHARDS]


def captions(folder, split="train", size=(16, 16)) -> dict[str, list[tuple[str, str]]]:
    """Captions with their kinds by the name that a sample had."""
    dataset = TextImageDataset(folder, split, size)
    return {
        dataset.fields(i).get("source_id", dataset.key_name(i)): [(c.text, c.kind) for c in dataset.captions(i)]
        for i in range(len(dataset))
    }


def rejects(folder) -> dict[str, str]:
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return {line["path"].rsplit("/", 1)[-1]: line["reason"] for line in map(json.loads, lines)}


@pytest.fixture
def photos(tmp_path):
    """12 pictures of 30 x 20 px in two folders; the one numbered 3 has no caption, 4 an empty one, 5 is cut."""
    src = tmp_path / "photos"
    for n in range(12):
        file = src / f"part{n % 2}" / f"{n:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(n, (30, 20)).save(file)
        if n != 3:
            file.with_suffix(".txt").write_text("" if n == 4 else f"picture {n}\n")
        if n == 5:
            file.write_bytes(file.read_bytes()[:300])
    return src


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_describes_itself(recipe: base.DatasetRecipe):
    assert all([recipe.name, recipe.summary, recipe.licence, recipe.attribution, recipe.size])
    assert all(option.meaning for option in recipe.options.values())
    with pytest.raises(SpecError, match="option src is missing"):
        recipe.resolve({})


# Folder.


def test_a_captioned_folder_becomes_shards_through_the_command_line(photos, tmp_path, capsys):
    out = tmp_path / "out"
    options = [
        "--set",
        f"src={photos}",
        "--set",
        "size=16",
        "--set",
        "kind=short",
        "--set",
        "val_fraction=0.25",
        "--out",
        str(out),
    ]
    assert main(["data", "build", "captioned-folder", *options]) == 0
    text = capsys.readouterr().out
    assert "Leave out 1 pictures without a .txt" in text and "Resize and crop to 16 px, save as jpg." in text
    assert "3 rejected" in text and "classes" not in text
    assert main(["data", "verify", str(out)]) == 0
    assert "intact (train " in capsys.readouterr().out
    found = captions(out) | captions(out, "val")
    assert found == {f"part{n % 2}/{n:02d}": [(f"picture {n}", "short")] for n in (0, 1, 2, 6, 7, 8, 9, 10, 11)}
    assert captions(out, "val")
    reasons = rejects(out)
    assert "bad_caption" in reasons["03.png"] and "no 03.txt beside it" in reasons["03.png"]
    assert "bad_caption" in reasons["04.png"] and "OSError" in reasons["05.png"]


def test_pictures_that_need_no_change_are_kept_byte_for_byte(photos, tmp_path):
    FOLDER.build(tmp_path / "out", {"src": str(photos), "val_fraction": "0"})
    dataset = TextImageDataset(tmp_path / "out", "train", (20, 30))
    index = [dataset.fields(i)["source_id"] for i in range(len(dataset))].index("part0/06")
    stored = dataset.sources[0].read(index, "image")
    assert stored == (photos / "part0" / "06.png").read_bytes()
    with pytest.raises(DataError, match="split val is empty"):
        TextImageDataset(tmp_path / "out", "val", (20, 30))


def test_folders_train_and_val_are_the_splits(photos, tmp_path):
    (photos / "part0").rename(photos / "train")
    (photos / "part1").rename(photos / "val")
    FOLDER.build(tmp_path / "out", {"src": str(photos)})
    assert set(captions(tmp_path / "out", "val")) == {f"val/{n:02d}" for n in (1, 7, 9, 11)}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train2017", "val2017"),
        ("My photos/TRAIN", "My photos/dev"),
        ("a/train", "a/valid"),
        ("x_train", "x_validation"),
    ],
)
def test_pictures_are_of_the_split_that_a_folder_around_them_names(photos, first, second):
    for name, new in (("part0", first), ("part1", second)):
        (photos / new).parent.mkdir(exist_ok=True)
        (photos / name).rename(photos / new)
    found = FOLDER._found({"src": str(photos), "val_fraction": "0.25"}).files
    assert {split: {path.stem for path in paths} for split, paths in found.items()} == {
        "train": {f"{n:02d}" for n in range(0, 12, 2)}, "val": {f"{n:02d}" for n in range(1, 12, 2)}
    }  # fmt: skip


def test_a_word_for_a_split_that_only_some_names_have_names_none(photos):
    (photos / "part0").rename(photos / "test tubes")
    assert set(FOLDER._found({"src": str(photos), "val_fraction": "0"}).files) == {"train", "val"}


def test_a_new_picture_moves_no_other_between_the_splits(photos, tmp_path):
    names = [photos / f"{n}.png" for n in range(40)]
    before = set(FOLDER._found({"src": str(photos), "val_fraction": "0.25"}).files["val"])
    for name in names[:1]:
        picture(0).save(name)
    after = set(FOLDER._found({"src": str(photos), "val_fraction": "0.25"}).files["val"])
    assert len(before) == len(after) == 3 and len(before - after) <= 1


def test_a_few_samples_validate_however_few_there_are():
    assert [least_val(n) for n in (1, 3, 4, 20, 32, 10**6)] == [0, 0, 1, 5, 8, 8]
    places = np.array([place_of("a.tar", f"{n}") for n in range(10_000)], dtype=np.uint64)

    def num_val(num: int, wanted: int) -> int:
        return int((places[:num] < val_below(places[:num], wanted)).sum())

    assert [num_val(n, 1000) for n in (3, 20, 64, 10_000)] == [0, 5, 8, 1000]
    assert num_val(64, 2) == 2 and num_val(10_000, 600) == 600


def test_what_cannot_be_built_is_said(photos, tmp_path):
    build = FOLDER.build
    with pytest.raises(DataError, match="no such folder; got .*nothing. Give it with --set src=PATH"):
        build(tmp_path / "o", {"src": str(tmp_path / "nothing")})
    with pytest.raises(SpecError, match="unknown kind of caption; got poem; expected one of short, long"):
        build(tmp_path / "o", {"src": str(photos), "kind": "poem"})
    with pytest.raises(SpecError, match="format: not usable; got gif; expected jpg or png"):
        build(tmp_path / "o", {"src": str(photos), "format": "gif"})
    with pytest.raises(SpecError, match="size: not usable; got 4; expected a number >= 8"):
        build(tmp_path / "o", {"src": str(photos), "size": "4"})
    with pytest.raises(
        DataError, match=r"no training samples; 12 rejected\. First of them: .*too small; got 30 x 20 px"
    ):
        build(tmp_path / "o", {"src": str(photos), "size": "64", "val_fraction": "0"})
    assert not (tmp_path / "o.partial").exists()


def test_an_interrupted_build_goes_on_and_other_options_begin_anew(photos, tmp_path, monkeypatch):
    options = {"src": str(photos), "per_shard": "2"}
    whole = FOLDER.build(tmp_path / "whole" / "out", options)
    original, files = shards._write_tar, []

    def write(file, *rest):
        files.append(file.name)
        if len(files) == 3:
            raise KeyboardInterrupt
        return original(file, *rest)

    monkeypatch.setattr(shards, "_write_tar", write)
    with pytest.raises(KeyboardInterrupt):
        FOLDER.build(tmp_path / "out", options)
    assert (tmp_path / "out.partial" / "progress.jsonl").is_file()
    assert FOLDER.build(tmp_path / "out", options) == whole
    assert files[2] == files[3] == "out-train-000002.tar" and not (tmp_path / "out.partial").exists()
    files.clear()
    with pytest.raises(KeyboardInterrupt):
        FOLDER.build(tmp_path / "two", options)
    FOLDER.build(tmp_path / "two", {**options, "kind": "long"})
    assert {kind for found in captions(tmp_path / "two", size=(20, 30)).values() for _, kind in found} == {"long"}


def test_a_stored_picture_is_resized_once_and_never_enlarged():
    small = file_of(picture(0, (16, 16)))
    assert prepared(small, 16, "jpg") == small and prepared(small, None, "jpg") == small
    with Image.open(io.BytesIO(prepared(file_of(picture(0, (64, 32))), 16, "jpg"))) as image:
        assert (image.size, image.format, image.mode) == ((16, 16), "JPEG", "RGB")
    with pytest.raises(BadSample, match="image too small; got 16 x 16 px. At least 28.8 x 28.8 px are wanted"):
        prepared(small, 32, "jpg")


# Table.


def write_rows(file, rows):
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_of_paths(photos, tmp_path, suffix):
    rows = [
        {"path": f"part{n % 2}/{n:02d}.png", "long": f"A long text, with a comma, about {n}.",
         "title": f"t{n}" if n else "", "split": "val" if n == 8 else "train", "license": "MIT"}
        for n in (0, 1, 2, 8)
    ] + [{"path": "missing.png", "long": "gone", "title": "", "split": "train", "license": "MIT"},
         {"path": "part0/06.png", "long": "", "title": "", "split": "train", "license": "MIT"}]  # fmt: skip
    table = photos / f"table{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_rows(table, rows)
    out = tmp_path / "out"
    manifest = TABLE.build(out, {"src": str(table), "captions": "long:long,title:short", "size": "16"})
    assert manifest["splits"]["train"]["num_samples"] == 3 and manifest["rejected"] == 2
    assert manifest["rejected_kinds"] == {"FileNotFoundError": 1, "bad_caption": 1}
    assert captions(out, "val") == {"part0/08.png": [("A long text, with a comma, about 8.", "long"), ("t8", "short")]}
    assert captions(out)["part0/00.png"] == [("A long text, with a comma, about 0.", "long")]
    assert TextImageDataset(out, "train", (16, 16)).fields(0)["license"] == "MIT"
    reasons = rejects(out)
    assert any("No such file" in reason for reason in reasons.values())
    assert any("no caption in column long, title" in reason for reason in reasons.values())


def test_a_parquet_folder_with_pictures_inside(tmp_path):
    for part in range(2):
        rows = [
            {"image": {"bytes": file_of(picture(n)), "path": None}, "text": f"picture {n}"}
            for n in range(10 * part, 10 * part + 10)
        ]
        (tmp_path / "hf").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hf" / f"{part}.parquet")
    out = tmp_path / "out"
    manifest = TABLE.build(out, {"src": str(tmp_path / "hf"), "val_fraction": "0.2"})
    counts = {split: entry["num_samples"] for split, entry in manifest["splits"].items()}
    assert counts["train"] + counts["val"] == 20 and counts["val"] >= 1
    dataset = TextImageDataset(out, "train", (16, 16))
    for index in range(len(dataset)):
        expected = np.array(picture(int(dataset.caption(index).split()[1])))
        assert np.array_equal(dataset.image(index).permute(1, 2, 0).numpy(), expected)


def test_table_columns_are_checked(photos, tmp_path):
    write_rows(photos / "t.csv", [{"path": "part0/00.png", "caption": "x"}])
    plan = TABLE.plan(TABLE.resolve({"src": str(photos / "t.csv")}))
    assert "pictures from column path, captions from caption (alt)" in plan[0]
    with pytest.raises(
        SpecError, match=r"no such column; got captoin; expected one of path, caption\. Did you mean 'caption'"
    ):
        TABLE.plan(TABLE.resolve({"src": str(photos / "t.csv"), "captions": "captoin"}))
    with pytest.raises(DataError, match=r"unknown kind of table; got 00\.png"):
        TABLE.plan(TABLE.resolve({"src": str(photos / "part0" / "00.png")}))
    (photos / "t.jsonl").write_text('{"path": "a.png", "caption": "x"}\n{oops\n')
    with pytest.raises(DataError, match=r"t\.jsonl: line 2 is not JSON"):
        TABLE.build(tmp_path / "o", {"src": str(photos / "t.jsonl")})


# Published tars.


def test_blip3o_leaves_out_geneval_prompts_or_says_so(tmp_path):
    src = tmp_path / "src"
    write_tar(src / "00.tar", [m for n in range(8) for m in pair(f"{n}", n)])
    write_tar(src / "geneval_train.tar", pair("g", 20, "a photo of two clocks"))
    options = {"src": str(src), "size": "16", "val_samples": "2"}
    clean = BLIP3O.build(tmp_path / "clean", options)
    assert {s: e["num_samples"] for s, e in clean["splits"].items()} == {"train": 6, "val": 2}
    assert not set(captions(tmp_path / "clean")) & set(captions(tmp_path / "clean", "val"))
    assert captions(tmp_path / "clean", "val").keys() <= {f"00.tar: {n}" for n in range(8)}
    assert all(found[0][1] == "long" for found in captions(tmp_path / "clean").values())
    assert "GenEval" not in clean["attribution"]
    full = BLIP3O.build(tmp_path / "full", {**options, "skip": ""})
    assert full["splits"]["train"]["num_samples"] == 7
    assert full["attribution"].endswith(
        "GenEval-style data used (geneval_train.tar): say so beside any GenEval number."
    )
    assert BLIP3O.plan(BLIP3O.resolve({**options, "skip": ""}))[-1].startswith("GenEval-style data used")


def test_scale_rae_captions_are_the_requests_without_their_wrapper(tmp_path):
    turns = [{"from": "human", "value": "Can you create an image of a blue boat?"}, {"from": "gpt", "value": "<image>"}]
    fields = {"conversations": turns, "metadata": {"prompt": "boat"}, "image_filename": "sample_0.png"}
    data = json.dumps(fields).encode()
    members = []
    for n in range(4):
        members += [(f"sample_{n}.json", data), (f"sample_{n}.png", file_of(picture(n)))]
    write_tar(tmp_path / "src" / "0.tar", members)
    SCALE_RAE.build(tmp_path / "out", {"src": str(tmp_path / "src"), "size": "16", "val_samples": "1"})
    found = captions(tmp_path / "out")
    assert len(found) == 3
    for texts in found.values():
        assert texts == [("a blue boat", "long"), ("Can you create an image of a blue boat?", "prompt")]


def test_rendered_text_keeps_what_can_still_be_read(tmp_path):
    def annotation(height):
        return {"text": ["Hello", "there"], "bb_relative": [[[0, 0.1], [1, 0.1], [1, 0.1 + height], [0, 0.1 + height]]]}

    heights = {"0_large": 0.05, "1_large": 0.05, "2_small": 0.01, "3_none": None}
    members = []
    for key, height in heights.items():
        fields = {"caption": "A sign says hello", "ocr_annotation": annotation(height) if height else {}}
        members += [(f"{key}.json", json.dumps(fields).encode()), (f"{key}.png", file_of(picture(0)))]
    write_tar(tmp_path / "src" / "remaining1" / "0.tar", members)
    options = {"src": str(tmp_path / "src"), "size": "16", "val_samples": "0"}
    manifest = RENDERED_TEXT.build(tmp_path / "out", options)
    assert manifest["licence"] == "unstated" and manifest["rejected"] == 2
    found = captions(tmp_path / "out")
    assert set(found) == {"remaining1/0.tar: 0_large", "remaining1/0.tar: 1_large"}
    assert found["remaining1/0.tar: 0_large"] == [("A sign says hello", "long"), ("Hello there", "ocr")]
    reasons = rejects(tmp_path / "out")
    assert any("writing too small: 10 px at 1024 px" in reason for reason in reasons.values())
    assert any("--set min_text_px=0" in reason for reason in reasons.values())
    RENDERED_TEXT.build(tmp_path / "all", {**options, "min_text_px": "0"})
    assert len(captions(tmp_path / "all")) == 4


def test_a_cut_tar_gives_what_it_has_and_is_named(tmp_path):
    tar = write_tar(tmp_path / "src" / "0.tar", [m for n in range(8) for m in pair(f"{n}", n)])
    tar.write_bytes(tar.read_bytes()[: 5 * 2560 + 700])
    manifest = BLIP3O.build(tmp_path / "out", {"src": str(tmp_path / "src"), "size": "16", "val_samples": "0"})
    assert (manifest["splits"]["train"]["num_samples"], manifest["rejected"]) == (5, 1)
    assert "bad_tar" in rejects(tmp_path / "out")["0.tar: 5"]


def test_tar_shards_copies_nothing_and_is_verified(tmp_path):
    write_tar(tmp_path / "src" / "0.tar", [m for n in range(8) for m in pair(f"{n}", n)])
    options = ["--set", f"src={tmp_path / 'src'}", "--set", "kind=prompt", "--set", "val_samples=0"]
    assert main(["data", "build", "tar-shards", *options, "--out", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0.idx", "manifest.json"]
    assert main(["data", "verify", str(tmp_path / "out")]) == 0
    assert captions(tmp_path / "out")["3"] == [("picture 3", "prompt")]
    with pytest.raises(DataError, match="written by another recipe; got tar-shards; expected blip3o"):
        BLIP3O.verify(tmp_path / "out")
