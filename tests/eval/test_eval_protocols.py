from __future__ import annotations

import dataclasses
import html
import json
import logging
import platform
import re
from pathlib import Path

import pytest
import torch

from raev2.batch import MetricResult
from raev2.data import FolderDataset
from raev2.errors import DataError, TaskError
from raev2.eval.features import FeatureExtractor, frechet_name
from raev2.eval.image_pairs import FeatureDistance
from raev2.eval.protocols import (
    GenerationEvaluator,
    ReconstructionEvaluator,
    ep_fid,
    run_protocol,
)
from raev2.eval.sets import block_shuffle, set_features, split_pictures
from raev2.spec import (
    DataSpec,
    DDTSpec,
    DecoderSpec,
    EncoderSpec,
    GeneratorTrainingSpec,
    RunSpec,
    TaskSpec,
    TokenizerSpec,
    TokenizerTrainingSpec,
)
from raev2.task import EvalContext, Evaluator
from raev2.training.run import package_versions
from raev2_data_recipes.pictures import synthetic
from raev2_tasks.report.page import write_report

CPU = torch.device("cpu")
SIZE = 16


class PooledPixels(FeatureExtractor):
    """Real features of a toy network: 4 x 4 mean colours and their local contrast."""

    name, dim, preparation, fingerprint = "pixels", 96, "none", "f" * 64

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images_u8):
        self.calls += 1
        images = images_u8.float() / 255
        pooled = torch.nn.functional.avg_pool2d(images, SIZE // 4)
        squares = torch.nn.functional.avg_pool2d(images.square(), SIZE // 4)
        return torch.cat([pooled, (squares - pooled.square()).clamp(min=0).sqrt()], 1).flatten(1)


class Reconstruction:
    """Stands in for a tokenizer: rounds colours to `levels` steps."""

    def __init__(self, levels: int = 255) -> None:
        self.levels = levels

    def reconstruct(self, images):
        return (images * self.levels).round() / self.levels


def run_spec() -> RunSpec:
    return RunSpec(
        recipe="toy",
        task=TaskSpec(name="toy"),
        data=DataSpec(dir="toy"),
        tokenizer=TokenizerSpec(
            encoder=EncoderSpec(name="micro"),
            decoder=DecoderSpec(width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=8),
            grid=(2, 2),
        ),
        tokenizer_training=TokenizerTrainingSpec(images=8, batch_size=4, sample_every_images=8, save_every_images=8),
        generator=DDTSpec(width=8, depth=1, num_heads=2, head_width=8, head_depth=1, head_num_heads=2),
        generator_training=GeneratorTrainingSpec(images=8, batch_size=4, sample_every_images=8, save_every_images=8),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    synthetic.RECIPE.build(out, {"num_train": "90", "num_val": "40", "size": str(SIZE)})
    return out


@pytest.fixture
def context(data_dir, tmp_path) -> EvalContext:
    def dataset(split):
        return FolderDataset(data_dir, split, (SIZE, SIZE), fields=("label",))

    def generate(cond, indices):
        """A perfect memory: the validation picture of each index, with some noise of that index."""
        val = dataset("val")
        images = torch.stack([val.image(index) for index in val.asked(40, indices)]).int()
        noise = [torch.randint(-9, 10, images.shape[1:], generator=torch.Generator().manual_seed(i)) for i in indices]
        return (images + torch.stack(noise)).clamp(0, 255).to(torch.uint8)

    return EvalContext(run_spec(), Reconstruction(), dataset, CPU, tmp_path / "cache", generate)


def cond(spec, dataset, indices):
    asked = dataset.asked(spec.evaluation.num_samples, indices)
    return {"label": torch.tensor([dataset.cond(index)["label"] for index in asked])}


def pairs(name, device):
    return FeatureDistance(name.removeprefix("feature_distance_"), lambda images: [images.flatten(2)], device)


def reconstruction(**options) -> ReconstructionEvaluator:
    return ReconstructionEvaluator(
        "reconstruction", ["pixels"], build=lambda name, device: PooledPixels(), build_pairs=pairs,
        perceptual=("feature_distance_pixels",), **options,
    )  # fmt: skip


def generation(num_samples=60, extractor=None, **options) -> GenerationEvaluator:
    return GenerationEvaluator(
        "generation", cond, ["pixels"], label_policy="labels of 'val' in order", num_samples=num_samples,
        build=lambda name, device: extractor or PooledPixels(), **options,
    )  # fmt: skip


def values(results) -> dict[str, float]:
    return {result.name: result.value for result in results}


# Reconstruction.


def test_a_perfect_reconstruction_scores_perfectly(context):
    found = run_protocol(reconstruction(), context)
    assert values(found) == pytest.approx(
        {"psnr": 100, "ssim": 1, "feature_distance_pixels": 0, "rfd_pixels": 0}, abs=1e-5
    )
    assert {result.num_samples for result in found} == {40}


def test_a_coarser_reconstruction_scores_worse_in_every_number(context):
    fine, coarse = (
        values(run_protocol(reconstruction(), dataclasses.replace(context, rae=Reconstruction(levels))))
        for levels in (16, 3)
    )
    assert fine["psnr"] > coarse["psnr"] and fine["ssim"] > coarse["ssim"]
    assert fine["rfd_pixels"] < coarse["rfd_pixels"]
    assert fine["feature_distance_pixels"] < coarse["feature_distance_pixels"]


def test_the_reference_of_a_reconstruction_is_its_own_original(context):
    evaluator = reconstruction(max_images=12)
    described = evaluator.describe(context)["reference"]
    assert described["num_images"] == 12 and described["split"] == "val"
    assert described["what"] == "originals of the same images"
    assert {result.num_samples for result in run_protocol(evaluator, context)} == {12}


def test_reconstructions_of_another_size_are_an_error(context):
    class Smaller(Reconstruction):
        def reconstruct(self, images):
            return images[:, :, ::2, ::2]

    with pytest.raises(DataError, match=r"differ in size; got \(8, 8\); expected \(16, 16\)"):
        run_protocol(reconstruction(), dataclasses.replace(context, rae=Smaller()))


def test_the_perceptual_distance_falls_back_only_under_its_own_name(monkeypatch):
    evaluator = ReconstructionEvaluator("reconstruction")
    for available, expected in ((True, "lpips_vgg"), (False, "feature_distance_micro")):
        monkeypatch.setattr("raev2.eval.protocols.lpips_available", lambda backbone, found=available: found)
        assert evaluator.available() == expected
    assert frechet_name("inception") == "fid" and frechet_name("micro") == "fd_micro"


# Generation.


def test_generation_yields_the_numbers_and_their_scale(context):
    found = values(run_protocol(generation(), context))
    assert list(found) == [
        "fd_pixels", "fd_ratio_pixels", "fd_pixels_floor", "fd_pixels_val", "fd_pixels_shuffled",
        "precision_pixels", "recall_pixels", "precision_pixels_val", "recall_pixels_val",
    ]  # fmt: skip
    assert found["fd_pixels_floor"] < found["fd_pixels_val"] < found["fd_pixels"] < found["fd_pixels_shuffled"]
    assert found["fd_ratio_pixels"] > 1


def test_real_pictures_have_ratio_one(context, data_dir):
    val = FolderDataset(data_dir, "val", (SIZE, SIZE))
    real = dataclasses.replace(
        context, generate=lambda cond, indices: torch.stack([val.image(i) for i in val.asked(40, indices)])
    )
    found = values(run_protocol(generation(num_samples=40), real))
    assert found["fd_ratio_pixels"] == pytest.approx(1, abs=1e-9)
    assert found["fd_pixels"] == pytest.approx(found["fd_pixels_val"])
    assert found["precision_pixels"] == found["precision_pixels_val"]


@pytest.mark.parametrize("chunk", [1, 7])
def test_numbers_do_not_depend_on_the_chunk_size(context, monkeypatch, tmp_path, chunk):
    expected = values(run_protocol(generation(), context))
    for module in ("sets", "protocols"):
        monkeypatch.setattr(f"raev2.eval.{module}.CHUNK_SIZE", chunk)
    again = dataclasses.replace(context, cache_dir=tmp_path / "other")
    assert values(run_protocol(generation(), again)) == pytest.approx(expected, rel=1e-6)


def test_every_condition_goes_with_its_index(context):
    seen = {}

    def generate(cond, indices):
        seen.update(zip(indices, cond["label"].tolist(), strict=True))
        return context.generate(cond, indices)

    run_protocol(generation(num_samples=70), dataclasses.replace(context, generate=generate))
    val = context.dataset("val")
    assert seen == {number: val.cond(val.subset()[number % 40])["label"] for number in range(70)}


def test_reference_features_are_computed_once_and_found_by_fingerprint(context, data_dir, tmp_path):
    extractor = PooledPixels()
    first = values(run_protocol(generation(extractor=extractor), context))
    calls = extractor.calls
    assert values(run_protocol(generation(extractor=extractor), context)) == first
    assert extractor.calls - calls == 1  # the generated images alone
    dataset = context.dataset("train")
    before = len(list(context.cache_dir.iterdir()))
    extractor.fingerprint = "0" * 64  # other weights
    set_features(split_pictures(dataset), extractor, context.cache_dir)
    set_features(split_pictures(dataset, dataset.subset(89)), extractor, context.cache_dir)
    assert len(list(context.cache_dir.iterdir())) == before + 2


def test_block_shuffling_moves_blocks_and_nothing_else():
    images = torch.arange(2 * 3 * 64).reshape(2, 3, 8, 8).to(torch.uint8)
    shuffled = block_shuffle(images, 4, [5, 6])
    assert not torch.equal(shuffled, images)
    assert torch.equal(shuffled.flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(block_shuffle(images[1:], 4, [6]), shuffled[1:]), "the order is the index's, not the batch's"
    blocks = {tuple(block.flatten().tolist()) for block in images[0].unfold(1, 2, 2).unfold(2, 2, 2)[0].flatten(0, 1)}
    assert {
        tuple(block.flatten().tolist()) for block in shuffled[0].unfold(1, 2, 2).unfold(2, 2, 2)[0].flatten(0, 1)
    } == blocks


# Running and writing.


def test_the_result_file_says_what_the_numbers_depend_on(context, tmp_path):
    results = run_protocol(
        generation(), context, tmp_path / "eval", {"images_seen": 12_800, "ema_decay": 0.999, "checkpoint": "12800"}
    )
    written = json.loads((tmp_path / "eval/generation.json").read_text())
    entries = [{**entry, "levels": tuple(entry["levels"])} for entry in written["results"]]
    assert [MetricResult(**entry) for entry in entries] == results
    assert written["protocol"] == "generation" and written["num_samples"] == 90
    assert written["label_policy"] == "labels of 'val' in order"
    assert len(written["reference"]["fingerprint"]) == 64 and written["reference"]["split"] == "train"
    assert written["preparation"] == written["reference"]["preparation"] == context.dataset("val").preparation
    assert "bicubic" in written["preparation"] and written["image_size"] == [SIZE, SIZE]
    assert written["sampling"]["steps"] == 50 and written["sampling"]["guidance"] == {"kind": "none"}
    assert (written["images_seen"], written["ema_decay"], written["checkpoint"]) == (12_800, 0.999, "12800")
    assert written["seed"] == 0 and "global number" in written["seed_scheme"]
    assert written["precision"]["features"] == "fp32" and "torch" in written["versions"]
    installed = {name: version for name, version in package_versions().items() if version is not None}
    assert written["versions"] == {"python": platform.python_version(), **installed}, "the list of provenance.json"
    assert written["spec"]["tokenizer"]["grid"] == [2, 2] and written["date"]


def test_what_forbids_to_read_a_number_stands_in_file_log_and_report(context, data_dir, tmp_path, caplog):
    """A generator that shows every training picture once, in the name of a single class."""
    train = FolderDataset(data_dir, "train", (SIZE, SIZE))
    memory = dataclasses.replace(context, generate=lambda cond, indices: torch.stack([train.image(i) for i in indices]))
    evaluator = generation(num_samples=90, groups=lambda spec, dataset, numbers: [0] * len(numbers))
    with caplog.at_level(logging.WARNING):
        found = {result.name: result for result in run_protocol(evaluator, memory, tmp_path / "eval")}
    assert found["fd_pixels"].value < 1e-6 < found["fd_pixels_floor"].value
    written = json.loads((tmp_path / "eval/generation.json").read_text())
    classes = len(train.classes)
    assert written["coverage"] == {"what": "classes", "asked": 1, "of": classes}
    headroom = f"no headroom at this size: as many real pictures of 'train' have {found['fd_pixels_floor'].value:.4g}"
    expected = [f"fd_pixels: {headroom}", f"fd_ratio_pixels: {headroom}"]
    expected += [f"asks for 1 of {classes} classes of the data, and says nothing about the others"]
    assert written["warnings"] == caplog.messages == expected
    page = html.unescape(write_report(tmp_path).read_text())
    assert all(f"generation: {text}." in page for text in expected)
    assert f"n = 90; {headroom}" in page and "n = 90; lower is better" not in page


def test_the_same_protocol_twice_gives_the_same_numbers(context, tmp_path):
    in_training = run_protocol(generation(), context, tmp_path / "a")
    later = run_protocol(generation(), context, tmp_path / "b")
    assert in_training == later


def test_a_generation_protocol_refuses_a_run_without_generator(context):
    with pytest.raises(TaskError, match="protocol generation: needs a generator.*Choose a reconstruction protocol"):
        run_protocol(generation(), dataclasses.replace(context, generate=None))


def test_a_generator_that_returns_floats_is_an_error(context):
    broken = dataclasses.replace(context, generate=lambda cond, indices: torch.zeros(len(indices), 3, 16, 16))
    with pytest.raises(TaskError, match="got torch.float32.*expected uint8 images"):
        run_protocol(generation(), broken)


def metric(name, value, **meaning) -> MetricResult:
    result = MetricResult(name, value, 1, better="lower", role="detail", about="A number.")
    for field, text in meaning.items():
        object.__setattr__(result, field, text)  # past the type checker that runs in tests alone
    return result


class Broken(Evaluator):
    protocol, description, needs_generator = "broken", "yields nonsense", False

    def __init__(self, *results: MetricResult) -> None:
        self.results = results

    def run(self, context):
        yield from self.results


def test_results_that_are_not_finite_or_named_twice_are_never_written(context, tmp_path):
    with pytest.raises(TaskError, match="a is not finite; got nan"):
        run_protocol(Broken(metric("a", float("nan"))), context, tmp_path)
    with pytest.raises(TaskError, match="yields a name twice; got a, a"):
        run_protocol(Broken(metric("a", 1.0), metric("a", 2.0)), context, tmp_path)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("meaning", "message"),
    [
        ({"better": "more"}, "a does not say what it means; got better='more'; expected lower or higher"),
        ({"role": "star"}, "a does not say what it means; got role='star'; expected headline, scale, detail"),
        ({"about": " "}, "a does not say what it means; got about=' '; expected a sentence for the reader of a report"),
        ({"about": None}, "a does not say what it means; got about=None"),
        ({"role": "scale"}, "a does not say what it means; got of=None; expected for a scale row one of b"),
        ({"role": "scale", "of": "c"}, "a does not say what it means; got of='c'; expected for a scale row one of b"),
        ({"role": "scale", "of": "a"}, "a does not say what it means; got of='a'; expected for a scale row one of b"),
        ({"of": "b"}, "a does not say what it means; got of='b'; expected .*, for others nothing"),
        ({"point": "1s"}, "a does not say what it means; got point='1s'; expected what follows @ in the name"),
    ],
)
def test_a_metric_without_meaning_is_an_error_that_names_its_owner(context, tmp_path, meaning, message):
    results = metric("a", 1.0, **meaning), metric("b", 1.0)
    owner = re.escape(f"protocol broken ({__name__}.Broken): ")
    with pytest.raises(TaskError, match=f"{owner}{message}.*See docs/how_to/new_metric.md"):
        run_protocol(Broken(*results), context, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_protocol_of_the_time_before_metrics_had_a_meaning_is_told_what_is_missing(context):
    class Old(Broken):
        def run(self, context):
            yield MetricResult("a", 1.0, 1)

    with pytest.raises(TaskError, match=r"Old\): yields a metric without meaning; got .*'better'"):
        run_protocol(Old(), context)


def test_an_error_of_a_protocol_is_not_taken_for_a_missing_meaning(context):
    class Mistaken(Broken):
        def run(self, context):
            yield len(3)

    with pytest.raises(TypeError, match="has no len"):
        run_protocol(Mistaken(), context)


def test_metrics_of_the_core_say_what_they_mean(context):
    found = {
        result.name: result
        for protocol in (reconstruction(), generation())
        for result in run_protocol(protocol, context)
    }
    assert {name for name, result in found.items() if result.better == "higher"} == {
        "psnr", "ssim", "precision_pixels", "recall_pixels", "precision_pixels_val", "recall_pixels_val",
    }  # fmt: skip
    assert {name: result.of for name, result in found.items() if result.role == "scale"} == {
        "fd_pixels_floor": "fd_pixels", "fd_pixels_val": "fd_pixels", "fd_pixels_shuffled": "fd_pixels",
        "precision_pixels_val": "precision_pixels", "recall_pixels_val": "recall_pixels",
    }  # fmt: skip
    assert not any(result.levels for result in found.values()), "papers state levels of FID alone"


def test_fid_names_the_level_that_papers_state(context):
    class Inception(PooledPixels):
        name = "inception"

    results = run_protocol(generation(extractor=Inception()), context)
    assert [(result.name, result.levels) for result in results if result.levels] == [("fid", (2.0,))]


def test_ep_fid_reproduces_the_published_numbers():
    assert ep_fid([(80, 2.23), (240, 1.85)], 2) == pytest.approx(176.8, abs=0.05)
    assert ep_fid([(40, 1.82), (20, 2.56)], 2) == pytest.approx(35.1, abs=0.05)


def test_ep_fid_takes_the_first_crossing_and_none_when_there_is_none():
    assert ep_fid([(10, 3.0), (20, 1.0), (30, 5.0), (40, 1.0)], 2) == 15
    assert ep_fid([(10, 1.5), (20, 1.0)], 2) == 10
    assert ep_fid([(10, 3.0), (20, 2.5)], 2) is None
    assert ep_fid([], 2) is None
