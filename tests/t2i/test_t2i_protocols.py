"""Protocols of text to image with generators whose score is known: the renderer itself, and one that draws nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raev2.errors import DataError
from raev2.eval.features import FeatureExtractor
from raev2.eval.protocols import run_protocol
from raev2.spec import RunSpec
from raev2.task import EvalContext, get_task
from raev2_tasks.t2i import protocols as module
from raev2_tasks.t2i.benchmark.rows import PromptRow, colors
from raev2_tasks.t2i.benchmark.scoring import get_track
from raev2_tasks.t2i.protocols import (
    BenchmarkEvaluator,
    ClipScoreEvaluator,
    RetrievalEvaluator,
    retrieval_ranks,
    rotation,
    wilson_interval,
)

CPU = torch.device("cpu")


class Identity:
    """A tokenizer that loses nothing."""

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        return images


class MeanColor(FeatureExtractor):
    """The picture in 4 x 4 pixels."""

    name, dim, preparation, fingerprint = "mean", 48, "", "mean"

    def __call__(self, images_u8: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images_u8.float(), 4).flatten(1)


def context(spec: RunSpec, tmp_path: Path, generate) -> EvalContext:
    task = get_task("t2i")
    return EvalContext(
        spec=spec, rae=Identity(), dataset=lambda split: task.dataset(spec, split), device=CPU, cache_dir=tmp_path,
        generate=generate,
    )  # fmt: skip


def drawer(track: str, rows: list[PromptRow]):
    """A generator that draws every prompt perfectly. It knows the prompts by their tokens."""
    by_prompt = {row.prompt: row for row in rows}

    def generate(cond, indices):
        prompts = [bytes(row[row > 0].tolist()).decode() for row in cond["text"]]
        scenes = [
            get_track(track).scene(by_prompt[p], np.random.default_rng(i))
            for p, i in zip(prompts, indices, strict=True)
        ]
        return torch.stack([torch.from_numpy(np.array(scene.render(64))).permute(2, 0, 1) for scene in scenes])

    return generate


def as_bytes(prompts):
    """Prompts as conditions that can be read back."""
    rows = [torch.tensor(list(prompt.encode())) for prompt in prompts]
    return {"text": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def numbers(results) -> dict[str, float]:
    return {result.name: result.value for result in results}


@pytest.mark.parametrize(("track", "num"), [("s12", 30), ("txt", 10)])
def test_a_generator_that_draws_what_is_asked_for_scores_one(track, num, t2i_spec, tmp_path):
    evaluator = BenchmarkEvaluator("protocol", track, as_bytes, num_samples=num)
    rows = [row for split in ("test_held", "test_seen") for row in get_track(track).prompts(split)]
    results = run_protocol(evaluator, context(t2i_spec, tmp_path, drawer(track, rows)), tmp_path / "eval")
    found = numbers(results)
    name = f"{track}_exact"
    assert found[name] == found[f"{name}_seen"] == found[f"{name}_oracle"] == found[f"{name}_ceiling"] == 1
    assert found[f"{name}_shuffled"] < 0.2
    tags = {row.tag for row in evaluator.rows("test_held")}
    assert all(found[f"{name}_{tag}"] == 1 > found[f"{name}_shuffled_{tag}"] for tag in tags)
    if track == "s12":
        assert found["s12_exact_class_only"] < 0.8 and found["s12_exact_retrieval"] < 0.8
        assert {"s12_exact_single_object", "s12_exact_color_attr", "s12_lenient", "s12_exact_micro"} <= found.keys()
    first = results[0]
    assert first.num_samples == num and "95 % interval 1.000 to 1.000" in first.note and first.stderr == 0
    assert len(evaluator.describe(None)["prompts"]["test_held"]["sha256"]) == 64


def test_a_generator_that_draws_nothing_scores_zero(t2i_spec, tmp_path):
    evaluator = BenchmarkEvaluator("protocol", "s12", as_bytes, num_samples=12)
    grey = context(
        t2i_spec, tmp_path, lambda cond, indices: torch.full((len(indices), 3, 64, 64), 118, dtype=torch.uint8)
    )
    found = numbers(run_protocol(evaluator, grey))
    assert found["s12_exact"] == found["s12_exact_seen"] == found["s12_lenient"] == 0
    assert found["s12_exact_oracle"] == 1


def test_shares_have_wilson_intervals():
    assert wilson_interval(0.0, 24) == pytest.approx((0, 0.1380), abs=1e-4)
    assert wilson_interval(1.0, 24) == pytest.approx((0.8620, 1), abs=1e-4)
    low, high = wilson_interval(0.25, 48)
    observed = 0.25
    for bound in (low, high):  # the bounds are the shares of which the observed one is 1.96 standard errors away
        assert abs(observed - bound) == pytest.approx(1.96 * (bound * (1 - bound) / 48) ** 0.5)


def test_pictures_are_whole_passes_over_the_prompts_or_spread_over_them():
    prompts = get_track("s12").prompts("test_held")
    assert len(BenchmarkEvaluator("p", "s12", as_bytes, num_samples=10_000).rows("test_held")) == 8 * len(prompts)
    assert len(BenchmarkEvaluator("p", "s12", as_bytes, num_samples=2 * len(prompts) + 5).rows("test_held")) == 2 * len(
        prompts
    )
    few = BenchmarkEvaluator("p", "s12", as_bytes, num_samples=30).rows("test_held")
    assert len(few) == 30 and {row.tag for row in few} == {row.tag for row in prompts}


def test_shuffled_prompts_stay_inside_their_tag():
    rows = [colors("star", "red"), colors("star", "red"), colors("ring", "blue"), PromptRow("alone", "counting", ())]
    assert rotation(rows) == [2, 2, 0, 3]


def test_retrieval_finds_the_picture_of_the_caption(t2i_spec, tmp_path):
    dataset = get_task("t2i").dataset(t2i_spec, "val")
    asked = dataset.subset(16)

    def evaluate(generate):
        evaluator = RetrievalEvaluator(
            "retrieval", lambda spec, data, indices: {"key": torch.tensor(indices)}, "mean", num_samples=16,
            build=lambda name, device: MeanColor(),
        )  # fmt: skip
        return numbers(run_protocol(evaluator, context(t2i_spec, tmp_path, generate)))

    found = evaluate(lambda cond, indices: torch.stack([dataset.image(asked[i]) for i in cond["key"].tolist()]))
    assert found["retrieval_mean@1"] == found["retrieval_mean@5"] == found["retrieval_mean@1_ceiling"] == 1
    found = evaluate(
        lambda cond, indices: torch.stack([dataset.image(asked[(i + 7) % 16]) for i in cond["key"].tolist()])
    )
    assert found["retrieval_mean@1"] < 0.2 and found["retrieval_mean@1_ceiling"] == 1


def test_a_caption_of_several_pictures_is_found_with_any_of_them():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    queries = targets[[1, 0, 0]]
    assert retrieval_ranks(queries, targets, ["a", "a", "b"]).tolist() == [0, 0, 2]
    assert retrieval_ranks(queries, targets, ["a", "c", "b"]).tolist() == [1, 1, 2]


def test_clip_score_is_a_hundred_times_the_cosine(t2i_spec, encoder_folder, tmp_path):
    dataset = get_task("t2i").dataset(t2i_spec, "val")
    asked = dataset.subset(4)
    images = torch.stack([dataset.image(i) for i in asked])
    model = str(encoder_folder("clip"))
    evaluator = ClipScoreEvaluator("clipscore", lambda spec, data, i: {"k": torch.tensor(i)}, model, num_samples=4)
    found = numbers(run_protocol(evaluator, context(t2i_spec, tmp_path, lambda cond, i: images[list(i)])))
    metric, tokenizer = module.load_clip(model, CPU)
    expected = []
    for i in range(4):
        inputs = metric.processor(
            text=[dataset.caption(asked[i])], images=[images[i]], return_tensors="pt", padding=True
        )
        with torch.no_grad():
            output = metric.model.model(**inputs)
        expected.append(100 * max(float(output.text_embeds[0] @ output.image_embeds[0]), 0))
    assert found["clipscore"] == pytest.approx(np.mean(expected), abs=0.1)
    assert found["clipscore_cut_captions"] == 0


def test_clip_score_without_its_weights_says_what_is_missing(t2i_spec, tmp_path):
    (evaluator,) = [e for e in get_task("t2i").evaluators(t2i_spec) if e.protocol == "clipscore"]
    with pytest.raises(
        DataError, match="weights openai/clip-vit-large-patch14: the CLIP of protocol clipscore is missing"
    ):
        run_protocol(evaluator, context(t2i_spec, tmp_path, lambda cond, indices: SimpleNamespace()))


def test_every_protocol_is_there():
    spec = get_task("t2i").recipes()["quickstart"]()
    names = {evaluator.protocol for evaluator in get_task("t2i").evaluators(spec)}
    assert names == {
        "compositional-g60", "compositional-s12", "text-rendering", "emoji-names", "retrieval-micro", "clipscore",
        "reconstruction-micro", "generation-micro", "reconstruction-inception", "generation-inception",
    }  # fmt: skip
