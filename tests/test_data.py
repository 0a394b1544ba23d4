from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raev2.data import (
    FolderDataset,
    ImageDataset,
    ordered_batches,
    to_float,
    to_uint8,
    train_batches,
)
from raev2.errors import DataError
from raev2.files.images import centre_crop
from raev2.files.manifest import read_manifest
from raev2.task import get_data_recipe

SIZE = (8, 8)

# On a machine with one CPU; the tests need two workers all the same.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """10 training and 4 validation pictures of 8 px."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    get_data_recipe("synthetic").build(out, {"num_train": "10", "num_val": "4", "size": "8"})
    return out


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "shapes"))


@pytest.fixture
def dataset(folder) -> ImageDataset:
    return FolderDataset(folder, "train", SIZE, ("label",))


def stream(dataset, num_batches=8, batch_size=6, **options):
    """The first batches as (keys, images), with the counts of skipped images."""
    options = {"seed": 0, **options}
    return list(islice(train_batches(dataset, batch_size=batch_size, **options), num_batches))


def keys(batches) -> list[int]:
    return [key for batch, _ in batches for key in batch.key.tolist()]


def assert_same(left, right) -> None:
    assert len(left) == len(right)
    for (a, skipped_a), (b, skipped_b) in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.key, b.key)
        assert torch.equal(a.cond["label"], b.cond["label"])
        assert skipped_a == skipped_b


# Samples.


def test_samples_are_8_bit_rgb_with_their_label(dataset, folder):
    sample = dataset[3]
    assert (sample["image"].dtype, tuple(sample["image"].shape)) == (torch.uint8, (3, 8, 8))
    pixels = np.array(Image.open(folder / "train/000003.png"))
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels)
    assert sample["cond"] == {"label": 3} and sample["key"] == 3
    assert "bicubic" in dataset.preparation and "centre crop" in dataset.preparation
    assert len(dataset) == 10 and dataset.classes == ["cross", "disc", "ring", "square"]


def test_the_cache_gives_the_same_images(folder, dataset):
    cached = FolderDataset(folder, "train", SIZE, ("label",), cache=True)
    for _ in range(2):
        for index in range(3):
            assert torch.equal(cached.image(index), dataset.image(index))


@pytest.mark.parametrize("source", [(20, 12), (12, 20), (5, 9), (16, 16)])
def test_pictures_of_any_size_are_cropped_in_the_centre(source):
    """The left half is black and the right half is white, and so it stays; no edge is stretched."""
    pixels = np.zeros((source[1], source[0], 3), np.uint8)
    pixels[:, source[0] // 2 :] = 255
    cropped = np.array(centre_crop(Image.fromarray(pixels), (8, 8)))
    assert cropped.shape == (8, 8, 3)
    assert cropped[:, :2].max() < 30 and cropped[:, -2:].min() > 225


def test_a_crop_keeps_a_picture_that_fits():
    image = Image.new("RGB", (6, 4))
    assert centre_crop(image, (4, 6)) is image


def test_8_bit_images_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(torch.tensor([-1.0, 0.4999 / 255, 0.5001 / 255, 2.0])).tolist() == [0, 0, 1, 255]


# Order.


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(dataset):
    numbers = keys(stream(dataset, num_batches=5))
    epochs = [numbers[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))


def test_the_order_is_a_function_of_the_seed(dataset):
    assert_same(stream(dataset, seed=3), stream(dataset, seed=3))
    assert keys(stream(dataset, seed=3)) != keys(stream(dataset, seed=4))


def test_the_order_does_not_depend_on_other_random_numbers(dataset):
    torch.manual_seed(1)
    before = stream(dataset)
    torch.manual_seed(2)
    assert_same(before, stream(dataset))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_stream_goes_on_from_any_batch(dataset, start, workers):
    whole = stream(dataset, num_batches=10, flip=True)
    rest = stream(dataset, num_batches=10 - start, start_images=6 * start, num_workers=workers, flip=True)
    assert_same(whole[start:], rest)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset, workers):
    assert_same(stream(dataset, flip=True), stream(dataset, flip=True, num_workers=workers))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("start_images", [0, 6, 24])
def test_processes_share_the_same_global_batches(dataset, world_size, start_images):
    """Also after a stop: other processes go on where these ones stopped, without repeating or losing a sample."""
    alone = stream(dataset, start_images=start_images, flip=True)
    ranks = [
        stream(dataset, start_images=start_images, rank=rank, world_size=world_size, flip=True)
        for rank in range(world_size)
    ]
    for number, (batch, _) in enumerate(alone):
        images, key = torch.empty_like(batch.images), torch.empty_like(batch.key)
        for rank, own in enumerate(ranks):
            images[rank::world_size], key[rank::world_size] = own[number][0].images, own[number][0].key
        assert torch.equal(images, batch.images) and torch.equal(key, batch.key)


def test_a_batch_that_does_not_split_evenly_is_refused(dataset):
    with pytest.raises(DataError, match="must split evenly; got 8 over 3 processes; expected a multiple of 3"):
        stream(dataset, batch_size=8, world_size=3)


def test_flips_mirror_half_of_the_images(dataset):
    plain, flipped = stream(dataset, num_batches=20), stream(dataset, num_batches=20, flip=True)
    num_flipped = 0
    for (a, _), (b, _) in zip(plain, flipped, strict=True):
        for original, image in zip(a.images, b.images, strict=True):
            mirrored = original.flip(2)
            assert torch.equal(image, original) or torch.equal(image, mirrored)
            num_flipped += torch.equal(image, mirrored) and not torch.equal(original, mirrored)
    assert 30 < num_flipped < 80  # of 120, a few of them are symmetric


def test_ordered_batches_give_a_split_once(dataset):
    batches = list(ordered_batches(dataset, 4))
    assert [batch.key.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch.key.tolist() for batch in ordered_batches(dataset, 4, range(1, 10, 3))] == [[1, 4, 7]]


# Unreadable images.


def spoil(folder: Path, index: int, how: str) -> None:
    file = folder / f"train/{index:06d}.png"
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(data[: len(data) * 2 // 3])
    elif how == "not an image":
        file.write_text("<html>404</html>")
    else:  # a chunk with another name: Pillow raises SyntaxError
        file.write_bytes(data.replace(b"IDAT", b"\xa8\xa9\x8dC"))


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "not an image", "broken chunk"])
def test_an_unreadable_image_is_replaced_counted_and_named(copy, caplog, how):
    spoil(copy, 4, how)
    dataset = FolderDataset(copy, "train", SIZE, ("label",))
    with caplog.at_level(logging.WARNING, logger="raev2.data"):
        batches = stream(dataset, num_batches=5)
    numbers = keys(batches)
    assert 4 not in numbers and len(numbers) == 30, "every batch is full"
    assert sum(skipped for _, skipped in batches) == 3, "once an epoch"
    whole = keys(stream(FolderDataset(copy, "train", SIZE, ("label",)), num_batches=5))
    assert numbers == whole, "what comes in its place is fixed"
    assert len(caplog.messages) >= 3
    assert caplog.messages[0].startswith(f"skipped: data {copy}/train/000004.png: cannot be read as an image; got ")


def test_an_unreadable_image_is_counted_by_workers_too(copy):
    spoil(copy, 4, "empty")
    dataset = FolderDataset(copy, "train", SIZE, ("label",))
    assert_same(stream(dataset, num_batches=5), stream(dataset, num_batches=5, num_workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_without_a_readable_image_stops(copy, workers):
    for index in range(10):
        spoil(copy, index, "empty")
    with pytest.raises(DataError, match="10 unreadable images in a row"):
        stream(FolderDataset(copy, "train", SIZE), num_workers=workers)


def test_a_pass_over_a_split_stops_at_an_unreadable_image_unless_told_otherwise(copy, caplog):
    spoil(copy, 4, "truncated")
    dataset = FolderDataset(copy, "train", SIZE)
    with pytest.raises(DataError, match="000004.png: cannot be read as an image; got OSError. Run `raev2 data verify"):
        list(ordered_batches(dataset, 4))
    with caplog.at_level(logging.WARNING, logger="raev2.data"):
        batches = list(ordered_batches(dataset, 4, skip_unreadable=True))
    assert [batch.key.tolist() for batch in batches] == [[0, 1, 2, 3], [5, 6, 7], [8, 9]]
    assert "000004.png" in caplog.text


# Folders that do not fit.


def change_manifest(folder: Path, **changes) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_missing_folder_says_how_to_build_one(tmp_path):
    with pytest.raises(DataError, match="no dataset folder here; expected a folder with manifest.json. Build it with"):
        FolderDataset(tmp_path / "none", "train", SIZE)


def test_an_unknown_split_lists_the_splits(folder):
    with pytest.raises(DataError, match="unknown split; got test; expected one of train, val"):
        FolderDataset(folder, "test", SIZE)


def test_an_index_of_another_length_is_refused(copy):
    with (copy / "train.jsonl").open("a") as file:
        file.write('{"file": "train/000010.png"}\n')
    with pytest.raises(DataError, match=r"train.jsonl has 11 samples, manifest says 10. Run `raev2 data verify"):
        FolderDataset(copy, "train", SIZE)


def test_a_missing_or_damaged_index_is_refused(copy):
    lines = (copy / "val.jsonl").read_text().splitlines()
    (copy / "val.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]))
    dataset = FolderDataset(copy, "val", SIZE)
    assert dataset.image(0).shape == (3, *SIZE) and dataset.index[len(lines) - 1] == json.loads(lines[-1])
    message = "val.jsonl: damaged, line 2 is not a JSON object; got .*Build it again with `raev2 data build"
    with pytest.raises(DataError, match=message):
        dataset.image(1)
    with pytest.raises(DataError, match=message):
        dataset.subset(2)
    (copy / "val.jsonl").unlink()
    with pytest.raises(DataError, match="index val.jsonl is missing. Build it again with `raev2 data build synthetic"):
        FolderDataset(copy, "val", SIZE)


def test_a_pass_over_the_index_reads_what_is_read_by_number(dataset):
    numbers = range(len(dataset))
    assert list(dataset.index) == [dataset.index[number] for number in numbers]
    assert list(dataset.keys_and_groups()) == [(dataset.key(number), dataset.group(number)) for number in numbers]


OPEN = """
import sys, resource
from raev2.files.lines import Lines
from pathlib import Path
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = memory()
lines = Lines(Path(sys.argv[1]))
print(len(lines), lines[1_000_000]["label"], (memory() - before) / 1024)
"""


def test_an_index_of_the_size_of_imagenet_opens_in_60_mb(tmp_path):
    rest = f'"name": "n01440764", "sha256": "{"0" * 64}", "source": "train/n01440764/n01440764_10026.JPEG"}}'
    with (tmp_path / "train.jsonl").open("w") as file:
        file.writelines(f'{{"file": "train/{i:07d}.JPEG", "label": {i}, {rest}\n' for i in range(1_281_167))
    command = [sys.executable, "-c", OPEN, str(tmp_path / "train.jsonl")]
    num, label, mib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (int(num), int(label)) == (1_281_167, 1_000_000)
    assert float(mib) < 60


def test_an_empty_split_is_refused(tmp_path):
    get_data_recipe("synthetic").build(tmp_path / "no-val", {"num_train": "1", "num_val": "0", "size": "8"})
    with pytest.raises(DataError, match="split val is empty"):
        FolderDataset(tmp_path / "no-val", "val", SIZE)


def test_a_manifest_that_is_damaged_or_from_another_time_is_refused(copy):
    change_manifest(copy, format_version=99)
    with pytest.raises(DataError, match="unknown format_version; got 99; expected 1"):
        read_manifest(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json: damaged, not JSON"):
        read_manifest(copy)


def test_a_missing_condition_names_sample_and_field(folder):
    with pytest.raises(DataError, match=r"sample train/000000.png has no caption; expected fields \('caption',\)"):
        FolderDataset(folder, "train", SIZE, ("caption",))[0]
