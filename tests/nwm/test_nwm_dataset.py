"""Samples of trajectories: what a context is, which offsets are drawn, how often, and that it can be resumed."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from trajectory_folders import frame, walk, write

from raev2.data import ordered_batches, train_batches
from raev2.errors import DataError, SpecError
from raev2_tasks.nwm.data.dataset import TrajectoryDataset, offset_weights
from raev2_tasks.nwm.data.trajectories import Storage
from raev2_tasks.nwm.pose import accumulate, relative

LENGTHS = {"a-0": 12, "b-0": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training trajectories that turn, and one for validation; grey level 40 + i is frame i."""
    rng = np.random.default_rng(0)
    walks = []
    for name, length in {**LENGTHS, "v-0": 10}.items():
        path = accumulate(np.column_stack([rng.uniform(0, 1, length), np.zeros(length), rng.normal(0, 0.4, length)]))
        t = np.cumsum(rng.uniform(0.2, 0.3, length))
        split = "val" if name == "v-0" else "train"
        walks.append(walk(name, length, t=t, position=path[:, :2], yaw=path[:, 2], split=split))
    folder = tmp_path_factory.mktemp("nwm") / "data"
    write(folder, walks, Storage(suffix=".png", split="given"))
    return folder


def make(folder: Path, **options) -> TrajectoryDataset:
    return TrajectoryDataset(folder, options.pop("split", "train"), (16, 16), **options)


def grey(images: torch.Tensor) -> list[int]:
    """Number of the frame that each image shows."""
    return [int(value) - 40 for value in images.flatten(-3).float().mean(-1).round()]


def test_items_are_frames(folder):
    dataset = make(folder, cache=True)
    assert len(dataset) == 32 and dataset.rate_hz == 4 and dataset.classes == []
    for index in (0, 11, 12, 31):
        sample = dataset[index]
        number, own = dataset.locate(index)
        assert sample["key"] == index == dataset.frame_index(number, own) and sample["cond"] == {}
        assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.uint8
        assert grey(sample["image"][None]) == [own]
        assert torch.equal(dataset.image(index), sample["image"])  # from memory
    assert [len(batch.key) for batch in ordered_batches(dataset, 20)] == [20, 12]


def test_a_sample_is_a_context_a_motion_and_a_target(folder):
    dataset = make(folder)
    stored = dataset.trajectories[1]
    sample = dataset.sample_at("b-0", 7, 5)
    cond = sample["cond"]
    assert grey(sample["image"][None]) == [12] and sample["key"] == 12 + 12
    assert grey(cond["context_images"]) == [4, 5, 6, 7]
    assert cond["context_keys"].tolist() == [16, 17, 18, 19] and cond["context_keys"].dtype == torch.int64
    np.testing.assert_allclose(cond["context_age"], stored.t[7] - stored.t[4:8], atol=1e-6)
    assert cond["context_valid"].tolist() == [True] * 4
    np.testing.assert_allclose(cond["action"], relative(stored.poses[7], stored.poses[12]), atol=1e-6)
    np.testing.assert_allclose(cond["rel_time"], [stored.t[12] - stored.t[7]], atol=1e-6)
    for name, dtype in (("action", torch.float32), ("rel_time", torch.float32), ("context_age", torch.float32)):
        assert cond[name].dtype == dtype


def test_frames_before_the_beginning_are_invalid(folder):
    cond = make(folder).sample_at("a-0", 1, 2)["cond"]
    assert cond["context_valid"].tolist() == [False, False, True, True]
    assert grey(cond["context_images"]) == [0, 0, 0, 1] and cond["context_keys"].tolist() == [0, 0, 0, 1]
    assert (cond["context_age"].diff() < 0).all() and cond["context_age"][-1] == 0
    assert make(folder).sample_at("a-0", 8, 2, num_valid=1)["cond"]["context_valid"].tolist() == [False] * 3 + [True]


def test_targets_may_lie_in_the_past(folder):
    sample = make(folder, min_offset=-8).sample_at("b-0", 9, -6)
    assert grey(sample["image"][None]) == [3] and sample["cond"]["rel_time"] < 0


def test_recorded_commands_compose_to_every_later_pose(folder):
    dataset = make(folder)
    poses = dataset.poses("b-0")
    for stride in (1, 4):
        commands = dataset.commands("b-0", 3, 16 // stride, stride)
        there = accumulate(commands, poses[3])
        np.testing.assert_allclose(there[:, :2], poses[3 + stride : 20 : stride, :2], atol=1e-9)
    with pytest.raises(DataError, match="trajectory b-0: no such frame; got 20; expected 0 to 19"):
        dataset.commands("b-0", 3, 17)
    with pytest.raises(DataError, match="no trajectory of this name in train; got nobody"):
        dataset.poses("nobody")


def test_an_epoch_shows_every_place_equally_often(folder):
    dataset = make(folder, max_offset=4, targets_per_context=3)
    assert dataset.num_contexts == sum(length - 1 for length in LENGTHS.values())
    seen = Counter()
    for number in range(dataset.num_contexts * 3):
        cond = dataset.stream_sample(0, number)["cond"]
        seen[int(cond["context_keys"][-1])] += 1
    assert set(seen.values()) == {3} and len(seen) == dataset.num_contexts


def test_samples_of_a_row_share_their_context_but_not_their_target(folder):
    dataset = make(folder, max_offset=8, targets_per_context=4, context_drop_prob=0.5)
    rows = [[dataset.stream_sample(3, 4 * context + own) for own in range(4)] for context in range(10)]
    for row in rows:
        for name in ("context_images", "context_keys", "context_valid", "context_age"):
            assert all(torch.equal(sample["cond"][name], row[0]["cond"][name]) for sample in row)
    assert any(len({sample["key"] for sample in row}) > 1 for row in rows)


def test_offsets_stay_in_their_range_and_are_never_zero(folder):
    dataset = make(folder, min_offset=-3, max_offset=5, cache=True)
    offsets = Counter()
    for number in range(400):
        sample = dataset.stream_sample(0, number)
        now = int(sample["cond"]["context_keys"][-1])
        assert dataset.locate(now)[0] == dataset.locate(sample["key"])[0]
        offsets[sample["key"] - now] += 1
    assert set(offsets) == {-3, -2, -1, 1, 2, 3, 4, 5}


def test_distributions_of_offsets():
    offsets = np.array([-2, -1, 1, 2, 4])
    np.testing.assert_allclose(offset_weights(offsets, "uniform"), [0.2] * 5)
    np.testing.assert_allclose(offset_weights(offsets, "log-uniform"), np.array([2, 4, 4, 2, 1]) / 13)
    far = np.arange(1, 33)
    mixture = offset_weights(far, "mixture")
    assert mixture.sum() == pytest.approx(1) and mixture[:8].sum() == pytest.approx(0.5 + 0.5 * 8 / 32)


def test_the_share_of_dropped_contexts(folder):
    dataset = make(folder, context_drop_prob=0.5, targets_per_context=1, max_offset=1, cache=True)
    full = [t for t in range(600) if dataset.stream_sample(0, t)["cond"]["context_keys"][0] % 12 != 0]
    valid = Counter(int(dataset.stream_sample(0, number)["cond"]["context_valid"].sum()) for number in full)
    assert set(valid) == {1, 2, 3, 4}
    assert valid[4] / len(full) == pytest.approx(0.5, abs=0.08)
    always = make(folder, context_drop_prob=1.0, targets_per_context=1)
    assert all(not always.stream_sample(0, t)["cond"]["context_valid"].all() for t in range(50))


def test_the_stream_can_be_resumed_and_is_that_of_its_seed(folder):
    def keys(start: int, seed: int = 5) -> list:
        batches = train_batches(make(folder, cache=True), batch_size=8, seed=seed, start_images=start)
        return [(batch.key.tolist(), batch.cond["rel_time"].tolist()) for batch, _ in islice(batches, 6)]

    assert keys(0)[3:] == keys(24)[:3]
    assert keys(0) != keys(0, seed=6)


def test_an_unreadable_frame_is_passed_over(tmp_path):
    write(tmp_path / "data", [walk("a-0", 8, split="train"), walk("v-0", 8, split="val")], Storage(split="given"))
    (tmp_path / "data" / "frames" / "a-0" / "000007.jpg").write_bytes(b"")
    dataset = make(tmp_path / "data", targets_per_context=1)
    with pytest.raises(DataError, match=r"000007\.jpg: cannot be read as an image.*Run `raev2 data verify"):
        dataset.image(7)
    counts = [skipped for _, skipped in islice(train_batches(dataset, batch_size=7, seed=0), 3)]
    assert sum(counts) > 0


def test_frames_keep_the_fit_they_were_stored_with(tmp_path):
    walks = [walk(name, 8, split=split) for name, split in (("a-0", "train"), ("v-0", "val"))]
    write(tmp_path / "data", walks, Storage(size=(32, 32), fit="crop", split="given"))
    with pytest.raises(DataError, match="stored with another fit; got crop; expected squeeze. Set task.fit=crop"):
        make(tmp_path / "data")
    stored = make(tmp_path / "data", fit="crop")
    assert stored.image(0).shape == (3, 16, 16)
    assert stored.preparation.startswith("fit crop: ") and stored.preparation.endswith("from the stored size")


def test_impossible_settings_are_refused(folder):
    with pytest.raises(SpecError, match="offsets: empty range; got 3 to 2"):
        make(folder, min_offset=3, max_offset=2)
    with pytest.raises(
        DataError, match="no trajectory of val is long enough; got at most 10 frames; expected targets 10 t"
    ):
        make(folder, split="val", min_offset=10, max_offset=20)


def test_frames_of_the_camera_are_fitted_when_read(tmp_path):
    wide = np.zeros((24, 32, 3), np.uint8)
    wide[:, :2] = 255  # lost by a crop, kept by a squeeze
    walks = [
        walk(name, 6, frames=[wide] + [frame(i) for i in range(5)], split=split)
        for name, split in (("a-0", "train"), ("v-0", "val"))
    ]
    write(tmp_path / "data", walks, Storage(suffix=".png", split="given"))
    found = {fit: make(tmp_path / "data", fit=fit) for fit in ("squeeze", "crop", "letterbox")}
    assert found["squeeze"].image(0).max() > 200 and "4:3" in found["squeeze"].preparation
    assert found["crop"].image(0).max() < 30 and "centre crop" in found["crop"].preparation
    assert found["letterbox"].image(1)[:, 0].max() == 0 and "black around" in found["letterbox"].preparation
    assert "crop" not in found["letterbox"].preparation, "a result file must not claim one"
