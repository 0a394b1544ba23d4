"""Captions as people write them: encodings, delimiters, json forms; what cannot be read is named and counted."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from shard_examples import SIZE, file_of, picture, write_tar

from raev2.command.cli import main
from raev2.errors import DataError, SpecError
from raev2_data_recipes.captions.caption_tars import BLIP3O, TAR_SHARDS
from raev2_data_recipes.captions.captioned import FOLDER, TABLE
from raev2_data_recipes.captions.tables import open_table
from raev2_tasks.t2i.shards.index import HELD_OUT
from raev2_tasks.t2i.shards.reader import TextImageDataset
from raev2_tasks.t2i.text.captions import (
    KINDS,
    Caption,
    CaptionRule,
    caption_fields,
    clean,
    json_failure,
    parse_captions,
)
from raev2_tasks.t2i.text.encodings import decode_text

CAPTIONS = ["a cat; black, of course", 'a café called "Zoë"', "ein Mädchen\tmit Hut", "plain"]


@pytest.fixture
def pictures(tmp_path):
    for n in range(8):
        picture(n).save(tmp_path / f"{n}.png")
    return tmp_path


def built(recipe, src, out, **options) -> dict[str, dict[str, list[Caption]]]:
    """Captions by name of the picture by split."""
    manifest = recipe.build(out, {"src": str(src), **options})
    found: dict[str, dict[str, list[Caption]]] = {}
    for split, entry in manifest["splits"].items():
        if entry["num_samples"]:
            dataset = TextImageDataset(out, split, SIZE)
            found[split] = {dataset.fields(i)["source_id"]: dataset.captions(i) for i in range(len(dataset))}
    return found


def rejects(folder) -> list[str]:
    return [json.loads(line)["reason"] for line in (folder / "rejects.jsonl").read_text().splitlines()]


# Encodings.


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_is_read_in_its_encoding_and_with_its_delimiter(pictures, encoding, delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    writer.writerows([["Image", " Caption"], *([f"{n}.png", caption] for n, caption in enumerate(CAPTIONS))])
    (pictures / "t.csv").write_bytes(text.getvalue().encode(encoding))
    table = open_table(pictures / "t.csv", "data")
    assert table.columns == ["Image", "Caption"]
    assert [row["Caption"] for row in table.rows(())] == CAPTIONS
    plan = TABLE.plan(TABLE.resolve({"src": str(pictures / "t.csv")}))
    assert {"utf-8": "UTF-8", "utf-8-sig": "UTF-8 with mark"}.get(encoding, encoding) in plan[0]
    assert {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}[delimiter] in plan[0]
    assert 'A caption: a café called "Zoë"' in plan
    found = built(TABLE, pictures / "t.csv", pictures / "out", val_fraction="0")["train"]
    assert {name: [c.text for c in captions] for name, captions in found.items()} == {
        f"{n}.png": [" ".join(caption.split())] for n, caption in enumerate(CAPTIONS)
    }


def test_an_encoding_that_cannot_be_told_is_refused_and_can_be_named(pictures):
    table = pictures / "t.csv"
    table.write_bytes("image,caption\n0.png,caf\u00e9 \u4e2d\n".encode() + "1.png,caf\u00e9\n".encode("cp1252"))
    with pytest.raises(
        DataError, match="cannot be read as text; got partly UTF-8 and partly not; save it as UTF-8. Or name"
    ):
        open_table(table, "data")
    table.write_bytes("image,caption\n0.png,кошка\n".encode("koi8-r") + b"\x81")
    with pytest.raises(DataError, match="neither UTF-8, UTF-16 nor cp1252"):
        open_table(table, "data")
    with pytest.raises(DataError, match="cannot be read as text; got unknown encoding: utf-9"):
        open_table(table, "data", "utf-9")
    table.write_bytes("image,caption\n0.png,кошка\n".encode("koi8-r"))
    assert (
        built(TABLE, table, pictures / "out", encoding="koi8-r", val_fraction="0")["train"]["0.png"][0].text == "кошка"
    )
    assert decode_text("é".encode()) == ("é", "utf-8") and decode_text(b"") == ("", "utf-8")


def test_quotes_that_never_end_are_named_with_their_line(pictures):
    (pictures / "t.csv").write_text('image,caption\n0.png,"a cat\n1.png,a dog\n')
    with pytest.raises(DataError, match=r"t\.csv: line 3 cannot be read; got unexpected end of data. Quotation marks"):
        TABLE.plan(TABLE.resolve({"src": str(pictures / "t.csv")}))


def test_paths_of_other_systems_are_found_and_missing_pictures_are_told_before_a_build(pictures):
    nfc, nfd = (unicodedata.normalize(form, "Zo\u00eb.png") for form in ("NFC", "NFD"))
    (pictures / "my cats").mkdir()
    for name, number in ((nfc, 20), (f"my cats/{nfd}", 21), ("my cats/1.png", 22)):
        picture(number).save(pictures / name)
    rows = [nfd, f"my cats\\{nfc}", ".\\my cats\\1.png", str(pictures / "2.png"), "C:\\cats\\3.png", "gone.png"]
    (pictures / "t.csv").write_text("sep=;\nimage;caption\n" + "".join(f"{row};a cat\n" for row in rows))
    plan = TABLE.plan(TABLE.resolve({"src": str(pictures / "t.csv")}))
    assert "(CSV in UTF-8 with ';')" in plan[0]
    assert "Of the first 1,000 pictures 2 are not there, first C:\\cats\\3.png." in plan
    manifest = TABLE.build(pictures / "out", {"src": str(pictures / "t.csv"), "val_fraction": "0"})
    assert (manifest["splits"]["train"]["num_samples"], manifest["rejected_kinds"]) == (4, {"FileNotFoundError": 2})
    dataset = TextImageDataset(pictures / "out", "train", SIZE)
    found = {dataset.fields(i)["source_id"]: dataset.image(i).permute(1, 2, 0).numpy() for i in range(4)}
    for row, number in zip(rows, (20, 21, 22, 2), strict=False):
        assert (found[row] == np.asarray(picture(number))).all()
    for text in ("", "\ufeff", "\n\n"):
        (pictures / "t.csv").write_text(text)
        with pytest.raises(DataError, match="src: an empty table; got .*t.csv"):
            TABLE.plan(TABLE.resolve({"src": str(pictures / "t.csv")}))


# Forms of JSON.

JSON_TABLES = [
    [{"file_name": "0.png", "caption": ["a cat", "a black cat"]}, {"file_name": "1.png", "caption": "a dog"}],
    {"file_name": ["0.png", "1.png"], "caption": [["a cat", "a black cat"], "a dog"]},
    {
        "images": [{"id": 5, "file_name": "0.png"}, {"id": 6, "file_name": "1.png"}],
        "annotations": [{"image_id": 5, "caption": "a cat"}, {"image_id": 6, "caption": "a dog"},
                        {"image_id": 5, "caption": "a black cat"}],
    },
    {"images": [{"filename": "0.png", "sentences": [{"raw": "a cat"}, {"raw": "a black cat"}]},
                {"filename": "1.png", "sentences": [{"raw": "a dog"}]}]},
]  # fmt: skip


@pytest.mark.parametrize("table", JSON_TABLES, ids=["objects", "columns", "coco", "karpathy"])
def test_json_tables(pictures, table):
    (pictures / "t.json").write_text(json.dumps(table), encoding="utf-8-sig")
    found = built(TABLE, pictures / "t.json", pictures / "out", val_fraction="0")["train"]
    texts = {name: [caption.text for caption in captions] for name, captions in found.items()}
    assert texts == {"0.png": ["a cat", "a black cat"], "1.png": ["a dog"]}


def test_captions_by_file_are_a_table(pictures):
    (pictures / "t.json").write_text(json.dumps({"0.png": "a cat", "1.png": "a dog"}))
    assert built(TABLE, pictures / "t.json", pictures / "out", val_fraction="0")["train"].keys() == {"0.png", "1.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "entry 1 is no object; got 1; expected"),
        ("3", "unknown form of JSON table; got 3; expected a list of objects, columns, COCO"),
        ("{", "is not JSON"),
        ('{"a": [1], "b": []}', "its columns have different lengths; got a 1, b 0"),
        ('{"images": [], "annotations": [{"image_id": 3}]}', "captions of images that are not listed; got 1, first 3"),
    ],
)
def test_json_that_is_no_table_is_refused(pictures, content, message):
    (pictures / "t.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_table(pictures / "t.json", "data")


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ("a dog", ["a dog"]),
        (["a dog", "a brown dog"], ["a dog", "a brown dog"]),
        ([{"caption": "a dog"}, {"text": "a brown dog"}], ["a dog", "a brown dog"]),
        ({"caption": ["a dog", "a brown dog"]}, ["a dog", "a brown dog"]),
        ({"captions": ["a dog", "a brown dog"], "default": 1}, ["a brown dog", "a dog"]),
        ({"captions": {"blip": ["a dog"], "llava": ["a brown dog"]}}, ["a dog", "a brown dog"]),
        ({"captions": [{"caption": "a dog", "image_id": 3}, {"caption": "a brown dog"}]}, ["a dog", "a brown dog"]),
        ({"images": [{"id": 3}], "annotations": [{"image_id": 3, "caption": "a dog"}]}, ["a dog"]),
        ({"sentences": [{"raw": "a dog", "tokens": ["a", "dog"]}]}, ["a dog"]),
        ({"TEXT": "a dog", "url": "http://x"}, ["a dog"]),
        ({"title": 7, "llava_caption": "A dog."}, ["A dog."]),
    ],
)
def test_every_usual_form_of_json_member_is_read(data, texts):
    assert [caption.text for caption in parse_captions(None, json.dumps(data).encode())] == texts


def test_names_that_are_kinds_say_the_kind():
    data = json.dumps({"captions": {"short": ["a dog"], "long": "A dog runs."}}).encode()
    assert [(caption.text, caption.kind) for caption in parse_captions(None, data)] == [
        ("a dog", "short"),
        ("A dog runs.", "long"),
    ]
    assert {kind for kind in KINDS} >= {"short", "long"}


@pytest.mark.parametrize(
    "data", [b"{", b"\xff\xfe\xff", b"[1]", b"7", b'{"captions": [{"kind": "long"}]}', b'{"captions": [["a", 3]]}',
             b'{"captions": [{"text": "t", "kind": "poem"}]}', b'{"captions": [{"text": "t", "score": "high"}]}',
             b'{"caption": 5}', b'{"conversations": [{"from": "human"}]}', b"[" * 100_000]
)  # fmt: skip
def test_the_txt_serves_where_the_json_cannot(data):
    (caption,) = parse_captions(b"from the txt", data)
    assert (caption.text, caption.field) == ("from the txt", "txt")
    assert json_failure(data), "and it is said why"
    assert not json_failure(b'{"width": 3}') and not json_failure(None)


def test_characters_that_nobody_sees_are_removed():
    assert clean("\ufeffa\u200b cat\u2060 \u200d runs\ud800") == "a cat runs"
    family, farsi = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert clean(f"{family} {farsi}") == f"{family} {farsi}", "joiners mean something there"
    assert parse_captions("\ufeff\u200ba cat".encode(), None)[0].text == "a cat"
    assert parse_captions(None, '{"caption": "\u200ba cat\ufeff"}'.encode("utf-8-sig"))[0].text == "a cat"


# Fields with shares.


def test_fields_are_listed_in_order_and_drawn_by_share(tmp_path):
    members = []
    for n in range(8):
        fields = (
            {"caption": f"alt {n}", "recaption": f"Long {n}.", "llava_caption": f"LLaVA {n}."}
            if n
            else {"caption": "alt 0"}
        )
        members += [(f"{n}.json", json.dumps(fields).encode()), (f"{n}.png", file_of(picture(n))), (f"{n}.txt", b"txt")]
    write_tar(tmp_path / "src" / "0.tar", members)
    options = {"captions": "recaption:long,caption,llava_caption:long", "val_samples": "0"}
    for recipe, out in ((TAR_SHARDS, tmp_path / "index"), (BLIP3O, tmp_path / "new")):
        more = {"size": "16"} if recipe is BLIP3O else {}
        recipe.build(out, {"src": str(tmp_path / "src"), "kind": "alt", **options, **more})
        dataset = TextImageDataset(out, "train", SIZE)
        by_default = {dataset.caption(i): dataset.captions(i) for i in range(len(dataset))}
        assert by_default.keys() == {"alt 0", *(f"Long {n}." for n in range(1, 8))}
        assert [(c.text, c.kind) for c in by_default["Long 3."]] == [
            ("Long 3.", "long"),
            ("alt 3", "alt"),
            ("LLaVA 3.", "long"),
        ]
        shares = CaptionRule(fields={"llava_caption": 0.75, "caption": 0.25})
        drawn = TextImageDataset(out, "train", SIZE, caption_mix=shares, batch_size=8)
        counts = Counter(drawn.stream_sample(0, n)["cond"]["caption"].split()[0] for n in range(800))
        assert counts.keys() == {"LLaVA", "alt"} and 100 + 0.25 * 700 - 45 < counts["alt"] < 100 + 0.25 * 700 + 45
        assert drawn.caption(0).startswith(("LLaVA", "alt")), "the first listed field is the default"


def test_wrong_caption_fields_are_refused(tmp_path):
    assert caption_fields(" recaption:long , caption", "alt") == [("recaption", "long"), ("caption", "alt")]
    with pytest.raises(SpecError, match="captions: caption: unknown kind of caption; got poem; expected one of short"):
        caption_fields("caption:poem")
    with pytest.raises(SpecError, match="weights by kind and by field; expected one of them"):
        CaptionRule({"long": 1}, fields={"caption": 1})
    with pytest.raises(DataError, match="no caption of the fields and scores asked for; got fields txt"):
        CaptionRule(fields={"captoin": 1}).choose(parse_captions(b"x", None), (0, 0, 0, 0))


# Splits and counts.


def test_rows_are_divided_by_their_split_in_any_spelling(pictures, capsys):
    said = ["train", "TRAINING", "validation", "dev", "test", "Testing", "restval", ""]
    rows = [
        {"image": f"{n}.png", "caption": f"c {n}", "recaption": "x", "split": split} for n, split in enumerate(said)
    ]
    (pictures / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-16")
    assert main(["data", "plan", "caption-table", "--set", f"src={pictures / 't.jsonl'}"]) == 0
    plan = capsys.readouterr().out
    assert "(JSON lines in utf-16)" in plan and "Rows: train 4, val 2, test 2 (kept apart)." in plan
    assert "Rows whose split is 'restval' (1) are divided as those without a split." in plan
    assert "Not read: recaption; to use them too: --set captions=caption,recaption" in plan
    found = built(TABLE, pictures / "t.jsonl", pictures / "out")
    assert {split: set(rows) for split, rows in found.items()} == {
        "train": {"0.png", "1.png", "6.png", "7.png"}, "val": {"2.png", "3.png"}, "test": {"4.png", "5.png"}
    }  # fmt: skip


def test_rows_named_for_training_alone_give_some_for_validation(pictures):
    rows = [{"image": f"{n}.png", "caption": "c", "split": "train"} for n in range(8)]
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = built(TABLE, pictures / "t.jsonl", pictures / "out")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "val": 2}


def test_what_is_named_for_a_test_is_held_out_where_nothing_is_for_validation(pictures):
    rows = [{"image": f"{n}.png", "caption": "c", "split": "Testing" if n in (2, 5) else ""} for n in range(8)]
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = TABLE.plan(TABLE.resolve({"src": str(pictures / "t.jsonl")}))
    assert "Rows: train 6, val 2." in plan and HELD_OUT in plan
    found = built(TABLE, pictures / "t.jsonl", pictures / "out")
    assert set(found["train"]) == {f"{n}.png" for n in (0, 1, 3, 4, 6, 7)} and set(found["val"]) == {"2.png", "5.png"}
    folder = pictures / "captioned" / "Unpacked"
    folder.mkdir(parents=True)
    (pictures / "elsewhere").mkdir()
    (folder / "Testing").symlink_to(pictures / "elsewhere")
    for n in range(8):
        file = folder / ("Testing" if n in (2, 5) else "TRAIN") / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        (pictures / f"{n}.png").rename(file)
        file.with_suffix(".TXT").write_text("c")
    plan = FOLDER.plan(FOLDER.resolve({"src": str(folder.parent)}))
    assert plan[0] == f"Read {folder.parent}: train 6, val 2." and HELD_OUT in plan
    found = built(FOLDER, folder.parent, pictures / "captioned-out")
    assert set(found["val"]) == {"Unpacked/Testing/2", "Unpacked/Testing/5"} and len(found["train"]) == 6


def test_no_row_is_dropped_without_being_counted(pictures):
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    picture(3, (90, 30)).save(pictures / "long.png")
    rows = ["image,caption", "0.png,good", "1.png,too, many cells", "2.png,", "missing.png,x", ",x", "cut.png,x",
            "3.png", "long.png,x", "4.png,\u200b"]  # fmt: skip
    (pictures / "t.csv").write_text("\n".join(rows))
    manifest = TABLE.build(pictures / "out", {"src": str(pictures / "t.csv"), "val_fraction": "0"})
    assert (manifest["splits"]["train"]["num_samples"], manifest["rejected"]) == (1, 8)
    assert manifest["rejected_kinds"] == {
        "FileNotFoundError": 1, "bad_caption": 3, "bad_geometry": 1, "bad_image": 2, "bad_row": 1
    }  # fmt: skip
    assert any(
        "more cells than columns; got [' many cells']. Quote texts" in reason for reason in rejects(pictures / "out")
    )


def test_a_damaged_parquet_is_an_error_and_not_a_traceback(tmp_path):
    rows = [{"image": {"bytes": file_of(picture(0))}, "captions": ["a", "b"], "split": "test"}]
    rows += [{"image": {"bytes": file_of(picture(n))}, "captions": [f"c {n}"], "split": "train"} for n in range(1, 5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = built(TABLE, tmp_path / "t.parquet", tmp_path / "out", captions="captions:short")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 4, "val": 1}
    assert [caption.text for caption in found["val"]["t:1"]] == ["a", "b"]
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet"):
        TABLE.plan(TABLE.resolve({"src": str(tmp_path / "t.parquet")}))


def test_every_file_of_a_captioned_folder_is_in_one_count(tmp_path):
    """Samples, rejected pictures, files of captions, and what is passed over are together all files."""
    src, good = tmp_path / "src", file_of(picture(1))
    for n in range(8):
        (src / "x").mkdir(parents=True, exist_ok=True)
        picture(n).save(src / "x" / f"{n}.png")
        (src / "x" / f"{n}.txt").write_text(f"picture {n}")
    bad = {
        "empty": (good, ""),
        "blank": (good, " \n\u200b"),
        "binary": (good, b"\x81\x8d"),
        "none": (good, None),
        "cut": (good[:60], "x"),
        "page": (b"<html>", "x"),
        "zero": (b"", "x"),
        "long": (file_of(picture(1, (90, 30))), "x"),
    }
    for name, (data, text) in bad.items():
        (src / f"{name}.png").write_bytes(data)
        if text is not None:
            (src / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    (src / "@eaDir").mkdir()
    for name in ("@eaDir/0.png", "Thumbs.db", "._0.png", "orphan.txt", "table.csv"):
        (src / name).write_bytes(b"x")
    (src / "gone.png").symlink_to(tmp_path / "gone")
    manifest = FOLDER.build(tmp_path / "out", {"src": str(src)})
    num_samples = sum(entry["num_samples"] for entry in manifest["splits"].values())
    assert (num_samples, manifest["rejected"]) == (8, len(bad))
    assert manifest["rejected_kinds"] == {"bad_caption": 4, "bad_image": 3, "bad_geometry": 1}
    ignored = FOLDER._found(FOLDER.resolve({"src": str(src)})).ignored
    assert ignored == {
        "Thumbs.db": 1, "folder @eaDir": 1, "hidden file": 1, "broken link": 1, "no picture (.txt)": 1,
        "no picture (.csv)": 1,
    }  # fmt: skip
    num_texts = 8 + len(bad) - 1
    assert num_samples + manifest["rejected"] + num_texts + ignored.total() == sum(
        1 for f in src.rglob("*") if not f.is_dir()
    )


def test_a_captioned_folder_counts_what_it_leaves_out(pictures, capsys):
    for split, numbers in (("Training", range(5)), ("valid", (5,)), ("test", (6, 7))):
        (pictures / split).mkdir()
        for n in numbers:
            (pictures / f"{n}.png").rename(pictures / split / f"{n}.png")
            (pictures / split / f"{n}.txt").write_bytes(
                [b"one", b"", "caf\u00e9".encode("cp1252"), b"\x81"][min(n, 3) % 4]
            )
    for n in (4, 5, 6, 7):
        next(pictures.rglob(f"{n}.txt")).write_text(f"picture {n}")
    (pictures / "notes.md").write_text("x")
    (pictures / "Training" / "@eaDir").mkdir()
    for name in ("@eaDir/8.png", "@eaDir/8.txt", "Thumbs.db", "._0.png"):
        (pictures / "Training" / name).write_bytes(file_of(picture(8)))
    assert (
        main(["data", "build", "captioned-folder", "--set", f"src={pictures}", "--out", str(pictures.parent / "out")])
        == 0
    )
    plan = capsys.readouterr().out
    for line in (f"Read {pictures}: train 5, val 1, test 2 (kept apart).", "Leave out 1 pictures whose .txt is empty.",
                 "Leave out 1 pictures whose .txt is unreadable.", "Captions in cp1252 1, utf-8 5.",
                 "not read: Thumbs.db: 1, folder @eaDir: 2, hidden file: 1, no picture (.md): 1."):  # fmt: skip
        assert line in plan
    assert "train 3, val 1, test 2, 2 rejected" in plan
    picture(9).save(pictures / "stray.png")
    with pytest.raises(
        DataError, match="not all pictures are in such folders; got train, test, val and 1 pictures elsewhere"
    ):
        FOLDER.plan(FOLDER.resolve({"src": str(pictures)}))
