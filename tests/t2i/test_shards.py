"""Shards: what is written, determinism, interrupted builds, foreign tars, what verification and the check find."""

from __future__ import annotations

import gc
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_examples import examples, file_of, pair, picture, write_source, write_tar, write_two_sources

from raev2.command.cli import main
from raev2.errors import DataError, SpecError
from raev2.files.images import to_rgb
from raev2.files.manifest import read_manifest
from raev2_data_recipes.base import verify_dataset
from raev2_tasks.t2i.shards import files as shards
from raev2_tasks.t2i.shards.check import caption_lengths, check_shards
from raev2_tasks.t2i.shards.commands import COMMANDS
from raev2_tasks.t2i.shards.files import (
    Caption,
    Deferred,
    Example,
    read_index,
    rewrite_shards,
    verify_shards,
    write_shards,
)
from raev2_tasks.t2i.shards.index import index_shards
from raev2_tasks.t2i.shards.tar_scan import INDEX_ROW, ScanRule, ShapeRule, scan_shard

TEXTS = {"licence": "CC0-1.0", "attribution": "Tests.", "recipe": "tar-shards", "options": {}}


@pytest.fixture
def source(tmp_path):
    write_source(tmp_path / "src", "src", 17)
    return tmp_path / "src"


# Writing.


def test_a_shard_is_an_ordinary_tar_of_sorted_members(source):
    with tarfile.open(source / "src-train-000001.tar") as tar:
        names, infos = tar.getnames(), tar.getmembers()
        fields = json.load(tar.extractfile("src_train_000001_00000.json"))
        text = tar.extractfile("src_train_000001_00000.txt").read().decode()
    assert len(names) == 21 and names == sorted(names)
    assert {name.partition(".")[2] for name in names} == {"png", "txt", "json"}
    assert {(info.mtime, info.uid, info.uname) for info in infos} == {(0, 0, "")}
    assert fields["v"] == 1 and fields["key"] == "src_train_000001_00000" and fields["source"] == "src"
    assert (fields["width"], fields["height"], fields["default"]) == (16, 16, 0)
    assert [caption["kind"] for caption in fields["captions"]] == ["short", "long"]
    assert fields["captions"][1] == {
        "text": f"{text} at length. It has noise.", "kind": "long", "model": "test", "n_words": 7, "score": 0.5,
    }  # fmt: skip
    assert fields["source_id"] == f"src-{fields['scene']['number']}" and fields["license"] == "CC0-1.0"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves closing to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_our_shards(source):
    found = list(webdataset.WebDataset(str(source / "src-train-{000000..000002}.tar"), shardshuffle=False))
    gc.collect()
    assert len(found) == 17 and {"png", "txt", "json"} <= set(found[0])
    assert sorted(sample["txt"].decode() for sample in found) == sorted(f"src {n}" for n in range(17))


def test_manifest_and_index_describe_the_shards(source):
    manifest = read_manifest(source)
    assert manifest["splits"]["train"]["num_samples"] == 17 and manifest["splits"]["val"]["num_samples"] == 4
    assert [shard["num_samples"] for shard in manifest["splits"]["train"]["shards"]] == [7, 7, 3]
    assert manifest["classes"] == [] and manifest["image_size_px"] == [16, 16] and manifest["rejected"] == 0
    assert manifest["caption_kinds"] == {"long": 21, "short": 21}
    assert INDEX_ROW.itemsize == 47
    shard = manifest["splits"]["train"]["shards"][2]
    rows = read_index(source, shard)
    data = (source / shard["file"]).read_bytes()
    for row in rows:
        text = data[int(row["text_offset"]) :][: int(row["text_bytes"])].decode()
        image = data[int(row["image_offset"]) :][: int(row["image_bytes"])]
        assert image == file_of(picture(int(text.split()[1])))
        assert (row["width_px"], row["height_px"], row["num_captions"], row["num_words"]) == (16, 16, 2, 2)
        assert row["flags"] & 1


def test_a_list_is_shuffled_over_all_shards_and_a_stream_is_not(tmp_path, source):
    def order(folder):
        manifest = read_manifest(folder)
        keys = []
        for shard in manifest["splits"]["train"]["shards"]:
            with tarfile.open(folder / shard["file"]) as tar:
                keys += [int(tar.extractfile(m).read().split()[1]) for m in tar if m.name.endswith(".txt")]
        return keys

    write_shards(tmp_path / "stream", "s", {"train": iter(examples("s", 9))}, per_shard=4, **TEXTS)
    assert order(tmp_path / "stream") == list(range(9))
    assert sorted(order(source)) == list(range(17)) and order(source) != list(range(17))
    assert set(order(source)[:7]) != set(range(7))


def test_the_same_input_gives_the_same_bytes(tmp_path, source):
    write_source(tmp_path / "again", "src", 17)
    for file in sorted(source.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    other = write_source(tmp_path / "other", "src", 17, shuffle_seed=1)
    assert other["fingerprint"] != read_manifest(source)["fingerprint"]


def test_what_cannot_be_used_is_rejected_with_the_reason(tmp_path):
    def broken():
        raise OSError("disk on fire")

    good = examples("s", 3)
    items = [
        *good,
        Example("no caption", picture(1), []),
        Example("blank", picture(1), [Caption("  \n ", "alt")]),
        Example("half a file", file_of(picture(1))[:400], [Caption("half", "alt")]),
        Example("reserved", picture(1), [Caption("r", "alt")], {"key": "mine"}),
        Deferred("unreadable", broken),
        Deferred("late", lambda: good[0]),
    ]
    manifest = write_shards(tmp_path / "s", "s", {"train": items}, **TEXTS)
    assert manifest["splits"]["train"]["num_samples"] == 4 and manifest["rejected"] == 5
    rejects = {
        line["path"]: line["reason"]
        for line in map(json.loads, (tmp_path / "s" / "rejects.jsonl").read_text().splitlines())
    }
    assert rejects["no caption"] == "bad_caption: sample no caption: the default caption is missing or empty"
    assert "bad_caption" in rejects["blank"] and "OSError" in rejects["half a file"]
    assert "reserved name; got key" in rejects["reserved"] and rejects["unreadable"] == "OSError: disk on fire"
    with pytest.raises(DataError, match=r"no training samples; 1 rejected\. First of them: .*disk on fire"):
        write_shards(tmp_path / "none", "s", {"train": [Deferred("x", broken)]}, **TEXTS)


def test_images_are_stored_as_upright_rgb(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # rotate by 90 degrees to show
    jpeg = tmp_path / "turned.jpg"
    picture(0, (24, 16)).save(jpeg, exif=turned)
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    deep = Image.fromarray(np.full((16, 16), 65535 // 2, dtype=np.uint16))
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert to_rgb(transparent).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(deep).getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(cmyk).getpixel((0, 0)) == (255, 0, 0) and to_rgb(palette).getpixel((0, 0)) == (0, 0, 255)
    caption = [Caption("c", "alt")]
    items = [Example("turned", jpeg.read_bytes(), caption), Example("clear", file_of(transparent), caption)]
    write_shards(tmp_path / "s", "s", {"train": iter(items)}, image_format="jpg", **TEXTS)
    with tarfile.open(tmp_path / "s" / "s-train-000000.tar") as tar:
        upright = Image.open(tar.extractfile("s_train_000000_00000.jpg"))
        upright.load()
    assert upright.size == (16, 24) and upright.getexif().get(0x0112) is None


def test_an_interrupted_build_goes_on_with_the_shards_it_has(tmp_path, monkeypatch):
    whole = write_source(tmp_path / "whole", "src", 20)
    written = []

    def stop_at_third(file, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        return original(file, *rest)

    original = shards._write_tar
    monkeypatch.setattr(shards, "_write_tar", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_source(tmp_path / "part", "src", 20)
    monkeypatch.setattr(shards, "_write_tar", lambda file, *rest: (written.append(file.name), original(file, *rest))[1])
    with pytest.raises(DataError, match="an unfinished build with other options. Delete the folder"):
        write_source(tmp_path / "part", "src", 20, per_shard=8)
    part = write_source(tmp_path / "part", "src", 20)
    assert written == ["src-train-000000.tar", "src-train-000001.tar", "src-train-000002.tar", "src-val-000000.tar"]
    assert part == whole and not (tmp_path / "part" / "progress.jsonl").exists()


def test_a_folder_with_shards_is_not_written_twice_and_names_are_checked(source):
    with pytest.raises(DataError, match="has shards already"):
        write_source(source, "src", 3)
    with pytest.raises(DataError, match=r"not a usable source name; got 'a\.b'"):
        write_source(source.parent / "x", "a.b", 3)


# Verification.


def test_verify_finds_a_flipped_byte_a_missing_file_and_an_edited_manifest(source):
    assert verify_shards(source)["name"] == "src"
    assert main(["data", "verify", str(source)]) == 0
    tar = source / "src-train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"src-train-000000\.tar: SHA-256 differs; got .* Build the dataset again"):
        verify_shards(source)
    assert main(["data", "verify", str(source)]) == DataError.exit_code
    tar.unlink()
    with pytest.raises(DataError, match=r"src-train-000000\.tar: file is missing"):
        verify_shards(source)
    manifest = source / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_samples": 7', '"num_samples": 6', 1))
    with pytest.raises(DataError, match="changed after it was written"):
        verify_shards(source)


def test_verify_covers_every_source_of_a_collection(tmp_path):
    data = write_two_sources(tmp_path / "both")
    manifest = verify_shards(data)
    assert manifest["splits"]["train"] == {"num_samples": 73, "sources": {"a": 50, "b": 23}}
    assert manifest["licence"] == "CC0-1.0" and manifest["image_size_px"] == [16, 16]
    index = data / "b" / "b-train-000000.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"b-train-000000\.idx: SHA-256 differs"):
        verify_shards(data)


def test_a_folder_of_an_uninstalled_recipe_is_not_taken_for_pictures(source, capsys):
    with pytest.raises(
        DataError, match="not a folder of pictures. Install the package with the data recipe tar-shards"
    ):
        verify_dataset(source)


# Tars of other origin.


def damaged_members() -> list[tuple[str, bytes]]:
    json_bytes = json.dumps({"captions": [{"text": "listed", "kind": "long"}]}).encode()
    return [
        *pair("00_good", 0),
        *pair("01_again", 1),
        ("02_no_txt.png", file_of(picture(2))),
        ("03_empty_txt.png", file_of(picture(3))), ("03_empty_txt.txt", b" \n"),
        ("04_bad_json.png", file_of(picture(4))), ("04_bad_json.json", b"{not json"), ("04_bad_json.txt", b"x"),
        ("05_only_txt.txt", b"nothing to see"),
        ("06.dotted.png", file_of(picture(6))), ("06.dotted.txt", b"dotted"),
        ("07_no_image.jpg", b"not an image"), ("07_no_image.txt", b"x"),
        ("08_latin.png", file_of(picture(8))), ("08_latin.txt", "caf\u00e9".encode("latin-1")),
        ("09_two.jpg", file_of(picture(9), "JPEG")), ("09_two.png", file_of(picture(9))), ("09_two.txt", b"x"),
        *pair("01_again", 1),
        ("10_listed.json", json_bytes), ("10_listed.png", file_of(picture(10))),
        *pair("11_good", 11, suffix="JPEG"),
    ]  # fmt: skip


def test_scan_names_every_problem(tmp_path):
    scan = scan_shard(write_tar(tmp_path / "t.tar", damaged_members()))
    assert scan.keys == ["00_good", "01_again", "04_bad_json", "08_latin", "10_listed", "11_good"]
    assert {(problem.key, problem.kind) for problem in scan.problems} == {
        ("02_no_txt", "bad_caption"), ("03_empty_txt", "bad_caption"), ("04_bad_json", "json_unused"),
        ("05_only_txt", "bad_image"), ("06", "dotted_key"), ("07_no_image", "bad_image"), ("08_latin", "encoding"),
        ("09_two", "bad_image"), ("01_again", "duplicate_key"),
    }  # fmt: skip
    assert scan.caption_kinds == {"alt": 5, "long": 1}


def test_scan_stops_where_a_tar_is_cut_and_takes_one_without_an_end_mark(tmp_path):
    file = write_tar(tmp_path / "t.tar", [m for n in range(4) for m in pair(f"{n}", n)])
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    file.write_bytes(whole[: last.offset_data + 3])
    scan = scan_shard(file)
    assert scan.keys == ["0", "1", "2"] and [p.kind for p in scan.problems] == ["bad_tar"]
    file.write_bytes(whole[: last.offset_data + 512])
    scan = scan_shard(file)
    assert scan.keys == ["0", "1", "2", "3"]
    assert [(p.key, p.kind, p.fatal) for p in scan.problems] == [("3", "bad_tar", False)]
    assert "no end mark" in scan.problems[0].text
    file.write_bytes(b"\x1f\x8b" + bytes(600))
    assert [p.kind for p in scan_shard(file).problems] == ["bad_tar"]


def test_index_makes_foreign_shards_readable_without_touching_them(tmp_path):
    tars = [
        write_tar(tmp_path / "far" / folder / f"{n}.tar", [m for i in range(20) for m in pair(f"{i:03d}", 100 * n + i)])
        for n, folder in enumerate(("", "remaining1"))
    ]
    before = [tar.read_bytes() for tar in tars]
    manifest = index_shards(tmp_path / "far", tmp_path / "near", source="foreign", licence="MIT")
    assert [tar.read_bytes() for tar in tars] == before
    assert sorted(p.name for p in (tmp_path / "far").rglob("*") if p.is_file()) == ["0.tar", "1.tar"]
    counts = {split: entry["num_samples"] for split, entry in manifest["splits"].items()}
    assert counts == {"train": 32, "val": 8}
    assert verify_shards(tmp_path / "near") == manifest
    assert manifest["licence"] == "MIT" and manifest["caption_kinds"] == {"alt": 40}
    inside = index_shards(tmp_path / "far")
    assert (tmp_path / "far" / "remaining1" / "1.idx").is_file()
    assert inside["fingerprint"] == manifest["fingerprint"]


def test_index_takes_tars_named_val_for_validation(tmp_path):
    write_tar(tmp_path / "t" / "x-train-0.tar", [m for i in range(6) for m in pair(f"{i}", i)])
    write_tar(tmp_path / "t" / "x-val-0.tar", pair("9", 9))
    splits = index_shards(tmp_path / "t")["splits"]
    assert (splits["train"]["num_samples"], splits["val"]["num_samples"]) == (6, 1)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no tar files here"):
        index_shards(tmp_path / "nothing")
    with pytest.raises(SpecError, match="unknown kind of caption; got poem; expected one of short, long"):
        index_shards(tmp_path / "t", rule=ScanRule("poem"))


# The commands.


def test_check_lists_problems_and_rewrite_leaves_them_out(tmp_path, capsys):
    cut = file_of(picture(1, (40, 40)))[:-900]
    wide = file_of(picture(3, (64, 16)))
    members = [*pair("0", 0), ("1_cut.png", cut), ("1_cut.txt", b"cut"), *pair("2", 0)]
    members += [("3.png", wide), ("3.txt", b"wide")]
    write_tar(tmp_path / "t" / "0.tar", members)
    index_shards(tmp_path / "t", val_samples=0)
    found = check_shards(tmp_path / "t", ShapeRule.of((18, 18)))
    kinds = Counter(problem.kind for problems in found.values() for problem in problems)
    assert kinds == {"bad_image": 1, "bad_geometry": 3}
    with pytest.raises(DataError, match=r"unusable samples; got 2\. `raev2 t2i shards rewrite"):
        COMMANDS["shards"](["check", str(tmp_path / "t")])
    assert "1_cut: bad_image" in capsys.readouterr().out
    manifest = rewrite_shards(tmp_path / "t", tmp_path / "new")
    assert (manifest["splits"]["train"]["num_samples"], manifest["rejected"]) == (2, 2)
    assert all(not p.fatal for problems in check_shards(tmp_path / "new").values() for p in problems)
    COMMANDS["shards"](["check", str(tmp_path / "new")])


def test_stats_and_collect(tmp_path, capsys):
    for name in ("a", "b"):
        write_source(tmp_path / "both" / name, name, 9)
    COMMANDS["shards"](["collect", str(tmp_path / "both"), "a", "b"])
    COMMANDS["shards"](["stats", str(tmp_path / "both")])
    out = capsys.readouterr().out
    assert "both: train 18, val 8, 0 rejected" in out
    assert "train b: 9 samples, 2.0 captions each, shortest side 16 px; words of the default caption: 2 (50 %)" in out
    assert "kinds in a: long 13, short 13" in out
    assert caption_lengths(tmp_path / "both", "train")["a"].num_words == {50: 2, 90: 2, 99: 2, 100: 2}
    assert main(["data", "verify", str(tmp_path / "both")]) == 0
