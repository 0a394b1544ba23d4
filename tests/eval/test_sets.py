"""Subsets, sets of pictures and their comparison, with data that is sorted by class as most data is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as multiprocessing

from raev2.data import ImageDataset, random_subset
from raev2.errors import DataError
from raev2.eval import sets
from raev2.eval.distances import FrechetTo, Moments, inception_score, moments_distance, precision_recall
from raev2.eval.features import FeatureExtractor
from raev2.eval.protocols import GenerationEvaluator
from raev2.eval.sets import SetFeatures, compare, coverage, of_groups, set_features, split_pictures
from raev2.task import EvalContext, get_recipe, get_task
from raev2.training import dist

CLASSES, SIDE = 20, 4
CPU = torch.device("cpu")


class Sorted(ImageDataset):
    """Small noisy pictures, sorted by class; a third of what differs is noise, the rest is the class."""

    group_kind = "classes"
    image_size = (SIDE, SIDE)
    preparation = "none"

    def __init__(self, split: str, num: int, order: torch.Tensor | None = None) -> None:
        self.split, self.dir = split, None
        self.manifest = {"fingerprint": split, "classes": [str(label) for label in range(CLASSES)]}
        self.order = torch.arange(num) if order is None else order
        means = torch.rand(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 200 + 28
        labels = torch.arange(num) * CLASSES // num
        noise = torch.randn(num, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(len(split))) * 40
        self.labels, self.pictures = labels.tolist(), (means[labels] + noise).clamp(0, 255).to(torch.uint8)

    def __len__(self):
        return len(self.order)

    def image(self, index):
        return self.pictures[self.order[index]]

    def cond(self, index):
        return {"label": self.group(index)}

    def key(self, index):
        return f"picture {self.order[index]}"

    def group(self, index):
        return self.labels[self.order[index]]


class Means(FeatureExtractor):
    """Mean colours of the quarters."""

    name, dim, preparation, fingerprint = "means", 12, "none", "0" * 64

    def __call__(self, images_u8):
        return torch.nn.functional.avg_pool2d(images_u8.float(), SIDE // 2).flatten(1) / 25


def keys(dataset, indices):
    return [dataset.key(index) for index in indices]


def features(dataset, indices):
    return Means()(torch.stack([dataset.image(index) for index in indices]))


# The subset rule.


@pytest.mark.parametrize("num", [7, 100, 600])
def test_a_dataset_in_another_order_gives_the_same_subset_in_the_same_order(num):
    shuffled = Sorted("train", 600, torch.randperm(600, generator=torch.Generator().manual_seed(3)))
    found = keys(shuffled, shuffled.subset(num))
    assert found == keys(Sorted("train", 600), Sorted("train", 600).subset(num))
    assert len(set(found)) == num


def test_a_subset_spreads_over_groups_of_any_size_in_proportion():
    sizes = {"a": 500, "b": 300, "c": 150, "d": 50}
    groups = [group for group, size in sizes.items() for _ in range(size)]
    for num in (20, 101, 333):
        chosen = Counter(groups[item] for item in random_subset(zip(map(str, range(1000)), groups, strict=True), num))
        assert all(abs(chosen[group] - size * num / 1000) < 1 + 1e-9 for group, size in sizes.items())


def test_subsets_are_those_of_results_that_are_out():
    """Counted once with the first, slow version: results quote subsets by number and seed alone."""
    items = [(f"n{number}", "few" if number < 3 else "many") for number in range(12)]
    assert random_subset(items, 5) == [5, 11, 3, 2, 8]
    assert random_subset(items, 12, seed=7) == [10, 2, 6, 7, 5, 11, 8, 0, 1, 4, 9, 3]


def test_every_member_of_a_group_is_chosen_equally_often():
    """Over seeds: 20 of 100 items in two groups; a count of 400 seeds has standard deviation 8."""
    items = [(str(number), "few" if number < 10 else "many") for number in range(100)]
    counts = Counter(item for seed in range(400) for item in random_subset(items, 20, seed))
    assert len(counts) == 100 and all(abs(count - 80) < 5 * 8 for count in counts.values())


def test_the_order_of_what_was_chosen_is_random():
    """The first half has about half of every class, and classes do not come in turn."""
    dataset = Sorted("train", 2000)
    labels = [dataset.group(index) for index in dataset.subset(1000)]
    halves = [Counter(labels[:500]), Counter(labels[500:])]
    differences = [halves[0][label] - halves[1][label] for label in range(CLASSES)]
    assert 0 < math.fsum(d * d for d in differences) / CLASSES < 2.5 * 50, "as 50 coins a class"
    repeats = sum(a == b for a, b in zip(labels, labels[1:], strict=False))
    assert 25 < repeats < 80, "50 of 1000 neighbours have the same class by chance, 950 in sorted data"


def test_samples_ask_for_a_subset_and_then_for_the_same_again():
    dataset = Sorted("val", 40)
    assert dataset.asked(100, range(100)) == (dataset.subset() * 3)[:100]
    assert dataset.asked(10, [3, 13]) == [dataset.subset(10)[3]] * 2


# What a subset is for: numbers of class-sorted data are those of a random part.


def test_recall_error_and_inception_score_of_one_distribution_against_itself_are_those_of_a_random_part():
    train, val = Sorted("train", 4000), Sorted("val", 2000)
    reference = features(train, train.subset(1000))
    moments = Moments.of(features(train, range(4000)))
    own, first = features(val, val.subset(500)), features(val, range(500))
    drawn = [features(val, torch.randperm(2000)[:500]) for _ in range(8)]

    recalls = torch.tensor([precision_recall(reference, rows)[1] for rows in drawn])
    assert precision_recall(reference, own)[1] == pytest.approx(float(recalls.mean()), abs=0.05)
    assert precision_recall(reference, first)[1] < 0.5 * recalls.mean(), "what the first pictures gave"

    errors = torch.tensor([FrechetTo(moments).stderr(rows) for rows in drawn])
    assert FrechetTo(moments).stderr(own) == pytest.approx(float(errors.mean()), rel=0.5)
    distances = torch.tensor([moments_distance(Moments.of(rows), moments) for rows in drawn])
    assert moments_distance(Moments.of(own), moments) < distances.max()
    assert moments_distance(Moments.of(first), moments) > 10 * distances.max()

    logits = torch.nn.functional.one_hot(torch.tensor(val.labels)).float() * 9
    score = inception_score(logits[val.subset(500)])[0]
    assert score == pytest.approx(inception_score(logits[torch.randperm(2000)[:500]])[0], rel=0.1)
    assert inception_score(logits[:500])[0] < 0.5 * score


def test_the_error_of_a_distance_is_no_less_than_its_spread_over_subsets():
    """It is that of random draws, in which also the share of each class varies."""
    moments, val = Moments.of(features(Sorted("train", 4000), range(4000))), Sorted("val", 4000)
    subsets = [features(val, val.subset(400, seed)) for seed in range(12)]
    spread = torch.tensor([moments_distance(Moments.of(rows), moments) for rows in subsets]).std()
    errors = torch.tensor([FrechetTo(moments).stderr(rows) for rows in subsets])
    assert spread < errors.mean() < 10 * spread


def test_the_error_of_a_whole_set_is_its_spread_in_any_order():
    """The error of the distance of all 1,000 held-out pictures, against the spread over draws of as many."""
    moments = Moments.of(features(Sorted("train", 4000), range(4000)))
    val = Sorted("val", 1000)
    whole = features(val, val.subset())
    spread = torch.tensor(
        [moments_distance(Moments.of(whole[torch.randint(1000, (1000,))]), moments) for _ in range(30)]
    )
    error = FrechetTo(moments).stderr(whole)
    assert 0.5 * spread.std() < error < 2 * spread.std()
    assert FrechetTo(moments).stderr(features(val, range(1000))) == pytest.approx(error, rel=1e-6), "sorted by class"


# Sets of pictures.


def test_features_of_a_set_are_in_its_random_order_and_kept(tmp_path):
    dataset = Sorted("train", 150)
    found = set_features(split_pictures(dataset), Means(), tmp_path)
    assert torch.equal(found.rows, features(dataset, dataset.subset()))
    again = set_features(split_pictures(dataset), Means(), tmp_path)
    assert torch.equal(again.rows, found.rows) and len(list(tmp_path.iterdir())) == 1
    few = set_features(split_pictures(dataset), Means(), tmp_path, max_rows=9)
    assert torch.equal(few.rows, found.rows[:9]) and few.moments.count == 150


def test_workers_read_the_same_pictures(monkeypatch):
    monkeypatch.setattr(sets, "CHUNK_SIZE", 16)
    alone, shared = ([*split_pictures(Sorted("val", 50)).chunks(workers)] for workers in (0, 2))
    assert [numbers for numbers, _ in alone] == [numbers for numbers, _ in shared]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, shared, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_told_as_it_is_also_by_a_worker(workers):
    class Broken(Sorted):
        def image(self, index):
            raise DataError("data x.png", "damaged")

    with pytest.raises(DataError, match=r"^data x.png: damaged"):
        list(split_pictures(Broken("val", 3)).chunks(workers))


def test_the_floor_has_as_many_pictures_of_every_class_as_were_asked_for():
    train = Sorted("train", 100)
    asked = [0] * 7 + [3] * 2 + ["unknown"]
    chosen = of_groups(train, asked)
    assert [train.group(index) for index in chosen[:9]] == asked[:9]
    assert len(set(chosen[:5])) == 5 and chosen[5:7] == chosen[:2], "five of a class, then again"
    assert chosen[9] in range(100)


def test_coverage_counts_the_groups_that_were_asked_for():
    assert coverage(Sorted("train", 100), [0, 0, 3]) == {"what": "classes", "asked": 2, "of": CLASSES}


def test_data_without_groups_has_no_coverage(monkeypatch):
    monkeypatch.setattr(Sorted, "group", lambda self, index: None)
    assert coverage(Sorted("val", 9), [None]) == {}


# Comparison.


def context(tmp_path, generate):
    splits = {"train": Sorted("train", 400), "val": Sorted("val", 200)}
    spec = get_recipe(get_task("imagenet"), "quickstart")
    return EvalContext(spec, None, splits.__getitem__, CPU, tmp_path / "cache", generate)


def generation(num_samples):
    return GenerationEvaluator(
        "generation", lambda spec, dataset, numbers: {"index": torch.tensor(dataset.asked(num_samples, numbers))},
        ["means"], label_policy="", num_samples=num_samples, build=lambda name, device: Means(),
    )  # fmt: skip


def real_pictures(cond, numbers):
    """A perfect generator: held-out pictures."""
    return torch.stack([Sorted("val", 200).image(index) for index in cond["index"].tolist()])


def by_name(results):
    return {result.name: result for result in results}


def test_the_scale_has_as_many_pictures_as_were_generated(tmp_path):
    found = by_name(generation(100).run(context(tmp_path, real_pictures)))
    assert {found[name].num_samples for name in found if name.startswith("fd")} == {100}
    assert found["fd_means_floor"].value < found["fd_means_val"].value < found["fd_means_shuffled"].value
    assert found["fd_ratio_means"].value == pytest.approx(1, rel=1e-9), "the same pictures"
    assert found["fd_means"].warning == "" and found["fd_means_floor"].of == "fd_means"


def test_a_ratio_compares_equal_numbers_and_the_scale_says_what_is_smaller(tmp_path):
    found = by_name(generation(300).run(context(tmp_path, real_pictures)))
    assert found["fd_ratio_means"].num_samples == found["fd_means_val"].num_samples == 200
    assert found["fd_means"].num_samples == found["fd_means_floor"].num_samples == 300
    assert found["fd_ratio_means"].value == pytest.approx(1, rel=1e-9), "the first 200 are the held-out pictures"
    same = f"{found['fd_means_val'].value:.4g}"
    assert found["fd_means_val"].note == f"as many generated pictures have {same}"


def test_a_distance_below_its_floor_is_no_good_number():
    reference, nearer = torch.randn(400, 4), torch.randn(100, 4)
    floor = sets.Scale(*(SetFeatures.of("val", torch.randn(100, 4) + shift) for shift in (0.5, 1, 2)))
    bad = by_name(
        compare(Means(), SetFeatures.of("generated pictures", nearer), SetFeatures.of("train", reference), floor)
    )
    value = f"{bad['fd_means_floor'].value:.4g}"
    expected = f"no headroom at this size: as many real pictures of 'train' have {value}"
    assert bad["fd_means"].warning == bad["fd_ratio_means"].warning == expected


def test_pictures_without_rows_or_scale_have_a_distance_alone():
    rows = torch.randn(50, 4)
    stored = SetFeatures("train", Moments.of(torch.randn(60, 4)), None)
    found = by_name(compare(Means(), SetFeatures.of("pictures", rows), stored))
    assert list(found) == ["fd_means"] and found["fd_means"].stderr is not None
    assert found["fd_means"].note == "against 60 pictures; ± by leaving out one image at a time"
    few = by_name(compare(Means(), SetFeatures.of("pictures", rows[:39]), stored))["fd_means"]
    assert few.stderr is None and few.note == "against 60 pictures"


def test_three_held_out_pictures_have_no_manifold(caplog):
    """Four have one; the rest of the scale is there for three too."""
    reference, pictures = torch.randn(60, 4), SetFeatures.of("generated pictures", torch.randn(50, 4))
    for num, named in ((3, False), (4, True)):
        scale = sets.Scale(*(SetFeatures.of("val", torch.randn(num, 4)) for _ in range(3)))
        found = by_name(compare(Means(), pictures, SetFeatures.of("train", reference), scale))
        assert ("precision_means_val" in found) == ("recall_means_val" in found) == named
        assert {"precision_means", "fd_means_val", "fd_ratio_means"} <= found.keys()
    assert caplog.messages == ["no precision and recall of real pictures of 'val': 3 are too few"]


def worker(rank: int, folder: str) -> None:
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls = []
    for name in ("eigh", "eigvalsh", "svdvals"):
        real = getattr(torch.linalg, name)
        setattr(torch.linalg, name, lambda *args, real=real: calls.append(rank) or real(*args))
    results = list(generation(150).run(context(Path(folder), real_pictures)))
    error = ""
    try:
        dist.on_main(lambda: 1 / 0 if rank == 0 else "never called")
    except ZeroDivisionError as caught:
        error = str(caught)
    torch.save(([vars(result) for result in results], calls, error), f"{folder}/{rank}.pt")
    torch_dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one_and_only_the_first_decomposes(tmp_path):
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    expected = [vars(result) for result in generation(150).run(context(tmp_path / "alone", real_pictures))]
    for rank in range(2):
        results, calls, error = torch.load(tmp_path / f"{rank}.pt")
        assert set(calls) == ({0} if rank == 0 else set()) and error == "division by zero"
        for found, alone in zip(results, expected, strict=True):
            assert found.pop("value") == pytest.approx(alone["value"], rel=1e-9)
            stderr = found.pop("stderr")
            assert stderr == alone["stderr"] or stderr == pytest.approx(alone["stderr"], rel=1e-6)
            assert found == {name: value for name, value in alone.items() if name not in ("value", "stderr")}
