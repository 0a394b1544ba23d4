"""Reading shards: the order for any number of processes, exact mixing, coverage, resume, and bad samples."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from shard_examples import (
    SIZE,
    file_of,
    no_more_files,
    pair,
    picture,
    stream,
    texts,
    tokenize,
    write_source,
    write_tar,
    write_two_sources,
)  # noqa: E501

from raev2.data import ordered_batches, train_batches
from raev2.errors import DataError, FileError, SpecError
from raev2_tasks.t2i.shards import reader
from raev2_tasks.t2i.shards.index import index_shards
from raev2_tasks.t2i.shards.reader import Mix, TextImageDataset, permutation, uniforms
from raev2_tasks.t2i.shards.tar_scan import ScanRule
from raev2_tasks.t2i.text.captions import CaptionRule

B = 8


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Sources a (50 samples in 8 shards) and b (23 in 5), mixed 1 : 3."""
    return write_two_sources(tmp_path_factory.mktemp("shards") / "both")


def open_both(both, split="train", **options):
    options = {"weights": {"a": 1, "b": 3}, "caption_mix": {"short": 1, "long": 1}, "batch_size": B, **options}
    return TextImageDataset(both, split, SIZE, tokenize=tokenize, **options)


def merged(dataset, num_batches, world_size, workers, start=0):
    """The global stream, put together from the batches of all processes."""
    parts = [
        stream(
            dataset, num_batches, batch_size=B, rank=r, world_size=world_size, num_workers=workers, start_images=start
        )
        for r in range(world_size)
    ]
    per_rank = B // world_size
    return [
        parts[slot % world_size][step * per_rank + slot // world_size]
        for step in range(num_batches) for slot in range(B)
    ]  # fmt: skip


# Samples.


def test_a_sample_is_its_picture_with_its_caption(both):
    dataset = open_both(both)
    assert len(dataset) == 73
    for index in (0, 6, 7, 49, 50, 72):
        number = dataset.scene(index)["number"]
        assert dataset.source_name(index) == ("a" if index < 50 else "b")
        assert dataset.caption(index) == f"{dataset.source_name(index)} {number}"
        assert np.array_equal(dataset.image(index).permute(1, 2, 0).numpy(), np.array(picture(number)))
        assert dataset.fields(index)["key"] == dataset.key_name(index)
    assert dataset.key_name(50) == "b_train_000000_00000"
    assert "transparency on white" in dataset.preparation and "centre crop" in dataset.preparation
    assert dataset[3]["cond"] == {"caption": dataset.caption(3)} and dataset[3]["key"] == 3
    with pytest.raises(IndexError):
        dataset.image(73)


def test_captions_of_a_batch_are_padded_to_the_longest(both):
    batch, _ = next(train_batches(open_both(both), batch_size=B, seed=0))
    assert batch.images.shape == (B, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.cond["token_ids"].shape == batch.cond["token_mask"].shape
    assert batch.cond["token_mask"].sum(1).max() == batch.cond["token_ids"].shape[1]
    assert next(train_batches(TextImageDataset(both, "train", SIZE), batch_size=B, seed=0))[0].cond == {}


def test_the_cache_gives_the_same_pictures(both):
    plain, cached = open_both(both), open_both(both, cache=True)
    assert torch.equal(cached.image(4), plain.image(4)) and cached.image(4) is cached.image(4)


# Order.


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 3), (4, 1)])
def test_the_order_does_not_depend_on_processes_and_workers(both, world_size, workers):
    dataset = open_both(both)
    assert merged(dataset, 12, world_size, workers) == merged(dataset, 12, 1, 0)


def test_a_run_resumes_at_any_step_with_another_number_of_processes(both):
    whole = merged(open_both(both), 20, 1, 0)
    step = int(np.random.default_rng().integers(1, 19))
    assert merged(open_both(both), 20 - step, 2, 0, start=step * B) == whole[step * B :], f"step {step}"


def test_seeds_passes_and_sources_have_orders_of_their_own(both):
    dataset = open_both(both)
    indices = [[dataset.stream_index(seed, n) for n in range(64)] for seed in (0, 1)]
    assert indices[0] != indices[1]
    source = dataset.sources[0]
    passes = [[source.visit(0, 50 * p + n) for n in range(50)] for p in range(3)]
    assert [sorted(visited) for visited in passes] == [list(range(50))] * 3
    assert len({tuple(visited) for visited in passes}) == 3


def test_a_pass_covers_every_sample_once_with_many_groups_of_shards(both, monkeypatch):
    monkeypatch.setattr(reader, "SHARDS_PER_GROUP", 3)  # 8 shards: groups of 3, 3 and 2
    source = open_both(both).sources[0]
    visited = [source.visit(5, n) for n in range(100)]
    assert sorted(visited[:50]) == sorted(visited[50:]) == list(range(50))
    shards = [source.shard_of(position) for position in visited]
    assert len({*shards[:15]}) <= 3 and len({*shards[:50]}) == 8  # one group after the other
    back = [source.visit(5, n) for n in reversed(range(100))]
    assert back[::-1] == visited


def test_one_shard_is_enough_for_any_number_of_readers(tmp_path):
    write_source(tmp_path / "s", "s", 12, per_shard=100)
    dataset = TextImageDataset(tmp_path / "s", "train", SIZE, tokenize=tokenize, batch_size=B)
    assert merged(dataset, 3, 4, 2) == merged(dataset, 3, 1, 0)


def test_permutations_and_draws_are_the_same_for_ever():
    assert permutation(8, "x", 1).tolist() == [2, 7, 6, 5, 3, 4, 1, 0]
    assert uniforms(2, "y", 2) == pytest.approx([0.529061, 0.67907], abs=1e-6)


def test_a_dataset_travels_to_another_process_without_its_open_files(both):
    dataset = open_both(both)
    before = dataset.image(7)
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).image(7), before)


def test_few_files_stay_open(both, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    dataset = open_both(both)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(len(dataset)):
        dataset.image(index)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * len(dataset.sources)


# Evaluation.


def test_two_processes_with_two_workers_see_every_sample_once(both):
    """Training order over uneven shards: a whole pass of one source, dealt to 2 processes x 2 workers."""
    dataset = open_both(both, weights={"a": 1, "b": 0})
    assert len(dataset) == 50
    keys = [key for key, _ in merged(dataset, 25, 2, 2)]
    assert Counter(keys) == dict.fromkeys(range(50), 4)  # 200 samples are four passes
    shares = [list(range(len(dataset)))[rank::2] for rank in range(2)]
    assert [len(share) for share in shares] == [25, 25]
    assert sorted(shares[0] + shares[1]) == list(range(50))


def test_evaluation_reads_every_sample_once_in_order(both):
    dataset = open_both(both, split="val", weights=None)
    halves = [range(0, 8, 2), range(1, 8, 2)]
    keys = [b.key.tolist() for half in halves for b in ordered_batches(dataset, 3, half)]
    assert sorted(sum(keys, [])) == list(range(8))
    assert [len(k) for k in keys] == [3, 1, 3, 1]
    captions = texts(next(ordered_batches(dataset, 8)).cond)
    assert captions == [dataset.caption(i) for i in range(8)] and "at length" not in " ".join(captions)


# Mixing.


def test_shares_are_exact_in_every_batch_and_at_every_step():
    for weights in ({"a": 1, "b": 3}, {"a": 0.21, "b": 0.33, "c": 0.46}, {"a": 5, "b": 1, "c": 1, "d": 1}):
        mix = Mix(weights, B)
        total = sum(map(Fraction, weights.values()))
        before = [0] * len(weights)
        for step in range(1000):
            after = mix.given(step + 1)
            counts = [b - a for a, b in zip(before, after, strict=True)]
            assert sum(counts) == B and min(counts) >= 0
            for count, weight in zip(after, weights.values(), strict=True):
                assert abs(count - Fraction(weight) / total * B * (step + 1)) <= 1
            before = after


def test_the_stream_keeps_the_shares_and_spreads_sources_over_the_slots(both):
    dataset = open_both(both, weights={"a": 0.3, "b": 0.7})
    slots = np.zeros(B)
    for step in range(1000):
        sources = [dataset.stream_index(0, step * B + slot) < 50 for slot in range(B)]
        expected = [b - a for a, b in zip(dataset.mix.given(step), dataset.mix.given(step + 1), strict=True)]
        assert sum(sources) == expected[0]
        slots += sources
    assert slots.sum() == round(0.3 * B * 1000)
    chi_square = ((slots - 300) ** 2 / 300 + (slots - 300) ** 2 / 700).sum()
    assert chi_square < 26  # 8 slots: 0.999 quantile of 8 degrees of freedom


def test_weights_follow_the_sizes_unless_given_and_are_checked(both):
    assert open_both(both, weights=None).mix.shares == {"a": Fraction(50, 73), "b": Fraction(23, 73)}
    only_b = open_both(both, weights={"a": 0, "b": 1})
    assert len(only_b) == 23 and only_b.fingerprint != open_both(both).fingerprint
    with pytest.raises(SpecError, match=r"no weight for source; got b; expected a weight for each of a, b"):
        open_both(both, weights={"a": 1})
    with pytest.raises(SpecError, match=r"weight for an unknown source; got c"):
        open_both(both, weights={"a": 1, "b": 1, "c": 1})
    with pytest.raises(SpecError, match="weights must be >= 0 and not all 0"):
        open_both(both, weights={"a": 0, "b": 0})
    with pytest.raises(SpecError, match=r"source a gets less than one sample a batch; got 0\.1 of 8"):
        open_both(both, weights={"a": 1, "b": 9})
    assert len(open_both(both, split="val", weights={"a": 1, "b": 9})) == 8


def test_the_stream_of_another_split_keeps_the_shares_too(both):
    """There numbers alternate between the sources, and the stream must not mistake a number for a place."""
    dataset = open_both(both, split="val", weights={"a": 1, "b": 3})
    sources = [dataset.source_name(dataset.stream_index(0, n)) for n in range(3 * B)]
    assert Counter(sources) == {"a": 6, "b": 18}


def test_unknown_splits_and_other_folders_are_named(both, synthetic_data):
    with pytest.raises(DataError, match=r"unknown split; got test; expected one of train, val"):
        TextImageDataset(both, "test", SIZE)
    with pytest.raises(DataError, match="not image-text shards; got a folder of the data recipe synthetic"):
        TextImageDataset(synthetic_data, "train", SIZE)


# Captions.


def test_the_drawn_caption_is_a_function_of_seed_and_number(both):
    captions = [dict(enumerate(c for _, c in merged(open_both(both, seed=s), 20, 1, 0))) for s in (0, 0, 1)]
    assert captions[0] == captions[1] != captions[2]
    share = np.mean(["at length" in caption for caption in captions[0].values()])
    assert 0.35 < share < 0.65
    kinds = open_both(both, caption_mix=CaptionRule({"long": 1}, shorten_prob=1.0))
    lengths = Counter(caption.count(".") for _, caption in merged(kinds, 10, 1, 0))
    assert set(lengths) == {1, 2}


def test_a_kind_that_no_image_has_ends_in_an_error(both):
    dataset = open_both(both, caption_mix={"ocr": 1})
    with pytest.raises(DataError, match="no caption of the kinds and scores asked for; got kinds long, short"):
        next(train_batches(dataset, batch_size=B, seed=0))


# Bad samples.


@pytest.fixture
def damaged(tmp_path):
    """40 good samples and one of each kind of damage that an index does not see, or that appeared after it."""
    cut = file_of(picture(1, (40, 40)))[:-900]
    red = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    first = [m for n in range(40) for m in pair(f"a{n:02d}", n)]
    first += [("b_cut.png", cut), ("b_cut.txt", b"cut"), ("c_empty.png", file_of(picture(2))), ("c_empty.txt", b" ")]
    first += [("d_small.png", file_of(picture(3, (8, 8)))), ("d_small.txt", b"small")]
    first += [("e_wide.png", file_of(picture(4, (64, 16)))), ("e_wide.txt", b"wide")]
    first += [("f_cmyk.jpg", file_of(Image.new("CMYK", (16, 16)), "JPEG")), ("f_cmyk.txt", b"cmyk")]
    first += [("g_deep.png", file_of(Image.fromarray(np.full((16, 16), 30000, np.uint16)))), ("g_deep.txt", b"deep")]
    first += [("h_clear.png", file_of(red)), ("h_clear.txt", b"clear"), ("i_json.png", file_of(picture(5)))]
    first += [("i_json.json", b"{"), ("i_json.txt", b"json"), ("j.dot.png", file_of(picture(6))), ("j.dot.txt", b"dot")]
    write_tar(tmp_path / "d" / "0.tar", first)
    tail = write_tar(tmp_path / "d" / "1.tar", [m for n in range(4) for m in pair(f"t{n}", 50 + n)])
    index_shards(tmp_path / "d", val_samples=0)
    # The copy of the last shard stopped early.
    os.truncate(
        tail,
        [row for row in np.fromfile(tmp_path / "d" / "1.idx", reader.read_index.__globals__["INDEX_ROW"])][3][
            "image_offset"
        ],
    )  # noqa: E501
    return tmp_path / "d"


def test_bad_samples_are_replaced_counted_and_named(damaged, caplog):
    dataset = TextImageDataset(damaged, "train", SIZE, tokenize=tokenize, batch_size=51)
    assert len(dataset) == 40 + 7 + 4 and dataset.manifest["rejected"] == 2  # c_empty and j.dot; i_json has a txt
    with caplog.at_level(logging.WARNING):
        batch, num_skipped = next(train_batches(dataset, batch_size=51, seed=0))
    assert dataset.bad.counts == {"bad_tar": 1, "bad_image": 1, "bad_geometry": 2, "converted": 3}
    keys = Counter(batch.key.tolist())
    names = {dataset.key_name(index) for index in keys}
    assert not names & {"b_cut", "d_small", "e_wide", "t3"} and num_skipped == 4
    assert len(names) == 47 and keys.total() == 51  # every good sample, and a substitute for each bad one
    assert "" not in texts(batch.cond)
    named = [record.message for record in caplog.records if "skipped (" in record.message]
    assert {name.split("(")[1].split(")")[0].split(",")[0] for name in named} == {
        "bad_tar",
        "bad_image",
        "bad_geometry",
    }
    assert any("b_cut" in line or "0.tar: sample 40" in line for line in named)


def test_counters_of_workers_arrive_in_the_main_process(damaged):
    alone, shared = (TextImageDataset(damaged, "train", SIZE, tokenize=tokenize, batch_size=10) for _ in range(2))
    stream(alone, 5, batch_size=10)
    stream(shared, 5, batch_size=10, num_workers=2)  # workers read ahead
    assert alone.bad.counts and all(shared.bad.counts[kind] >= n for kind, n in alone.bad.counts.items())


def test_substitutes_are_the_same_for_any_number_of_workers(damaged):
    dataset = TextImageDataset(damaged, "train", SIZE, tokenize=tokenize, batch_size=B)
    assert merged(dataset, 7, 2, 2) == merged(dataset, 7, 1, 0)


def test_converted_pictures_are_what_they_show(damaged):
    dataset = TextImageDataset(damaged, "train", SIZE)
    by_name = {dataset.key_name(i): i for i in range(len(dataset))}
    assert dataset.image(by_name["g_deep"]).unique().tolist() == [117]  # 30000 / 65535 of 255
    assert dataset.image(by_name["h_clear"])[:, 0, 0].tolist() == [255, 127, 127]
    with pytest.raises(DataError, match=r"0\.tar: sample 40: cannot be read as an image; got OSError"):
        dataset.image(by_name["b_cut"])


def test_an_evaluation_does_not_skip(damaged):
    with pytest.raises(DataError, match="cannot be read as an image"):
        list(ordered_batches(TextImageDataset(damaged, "train", SIZE), 8))


def test_too_many_bad_samples_end_the_training(tmp_path, monkeypatch):
    cut = file_of(picture(1, (40, 40)))[:-900]
    members = [m for n in range(30) for m in pair(f"a{n:02d}", n)] + [("b.png", cut), ("b.txt", b"b")]
    write_tar(tmp_path / "d" / "0.tar", members)
    index_shards(tmp_path / "d", val_samples=0)
    monkeypatch.setattr(reader, "MIN_WINDOW", 100)
    dataset = TextImageDataset(tmp_path / "d", "train", SIZE, tokenize=tokenize)
    with pytest.raises(DataError, match=r"too many unusable samples; got \d of the last \d+ samples \(bad_image \d\)"):
        stream(dataset, 100, batch_size=4, num_workers=1)
    tolerant = TextImageDataset(tmp_path / "d", "train", SIZE, tokenize=tokenize, max_bad_share=0.1)
    assert len(stream(tolerant, 100, batch_size=4)) == 400


def test_a_shard_that_is_mostly_bad_ends_the_training(tmp_path):
    for name in "ab":
        write_tar(tmp_path / "d" / f"{name}.tar", [m for n in range(8) for m in pair(f"{n}", n)])
    index_shards(tmp_path / "d", val_samples=0)
    os.truncate(tmp_path / "d" / "b.tar", 4000)
    dataset = TextImageDataset(tmp_path / "d", "train", SIZE, tokenize=tokenize)
    with pytest.raises(DataError, match=r"too many unusable samples; got \d of the 8 samples of .*b\.tar \(bad_tar"):
        stream(dataset, 20, batch_size=4)


def test_an_io_error_is_tried_again(both, monkeypatch):
    pauses, failures = [], [OSError(5, "Input/output error")] * 2
    original = os.pread

    def flaky(*args):
        if failures:
            raise failures.pop()
        return original(*args)

    monkeypatch.setattr(reader.time, "sleep", pauses.append)
    monkeypatch.setattr(reader.os, "pread", flaky)
    dataset = open_both(both)
    dataset.image(0)
    assert pauses == [0.5, 2.0]
    failures += [OSError(5, "Input/output error")] * 4
    with pytest.raises(DataError, match="cannot be read; got Input/output error"):
        dataset.image(1)


def test_too_many_open_files_end_the_training_and_spoil_no_sample(both, monkeypatch):
    monkeypatch.setattr(reader.time, "sleep", lambda pause: None)
    dataset = open_both(both)
    first, second = (train_batches(dataset, batch_size=B, seed=0) for _ in range(2))
    with no_more_files(), pytest.raises(OSError, match=r"Too many open files: .*\.idx"):
        next(first)
    for source in dataset.sources:
        for position in range(len(source)):
            source.row(position)
    with no_more_files(), pytest.raises(FileError, match=r"\.tar: cannot be read or written; got Too many open files"):
        next(second)
    assert dataset.bad.counts == {}


def test_an_index_of_other_shards_is_refused(tmp_path):
    write_source(tmp_path / "s", "s", 9)
    index = tmp_path / "s" / "s-train-000000.idx"
    index.write_bytes(index.read_bytes()[:-47])
    with pytest.raises(DataError, match="the index is missing or not the one of the manifest. Run `raev2 data verify"):
        TextImageDataset(tmp_path / "s", "train", SIZE).image(0)


def test_foreign_captions_get_their_kind_from_the_manifest(tmp_path):
    talk = json.dumps({"conversations": [{"from": "human", "value": "Can you generate an image of a red fox?"}]})
    write_tar(tmp_path / "d" / "0.tar", [("s0.json", talk.encode()), ("s0.png", file_of(picture(0))), *pair("s1", 1)])
    index_shards(tmp_path / "d", val_samples=0, rule=ScanRule("long"))
    dataset = TextImageDataset(tmp_path / "d", "train", SIZE)
    assert [(c.text, c.kind) for c in dataset.captions(0)] == [
        ("a red fox", "long"), ("Can you generate an image of a red fox?", "prompt"),
    ]  # fmt: skip
    assert [(c.text, c.kind) for c in dataset.captions(1)] == [("picture 1", "long")]
