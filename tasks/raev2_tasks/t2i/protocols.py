"""Evaluation protocols of this task; every name is a complete recipe for numbers.

`compositional-*`, `text-rendering` and `emoji-names` score pictures exactly, with the renderer's own scorer; what they
say is about the embedded scenes alone. `*-micro` measure in the space of the embedded encoder. GenEval, DPG-Bench and
VQAScore are scored by other programs: `external_eval.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raev2.batch import Better, Cond, MetricResult, Role
from raev2.data import ImageDataset, random_subset
from raev2.errors import DataError
from raev2.eval.features import FeatureExtractor, build_extractor, extractor_needs
from raev2.eval.generate import CHUNK_SIZE, collect, generated_images, local_chunks
from raev2.eval.protocols import GenerationEvaluator, ReconstructionEvaluator, mean_and_error
from raev2.files.assets import Asset
from raev2.spec import RunSpec
from raev2.task import EvalContext, Evaluator, Task
from raev2.training import dist
from raev2_tasks.t2i.benchmark.baselines import class_only_floor, retrieve
from raev2_tasks.t2i.benchmark.rows import PromptRow
from raev2_tasks.t2i.benchmark.rules import ImageScore
from raev2_tasks.t2i.benchmark.scoring import TrackSummary, get_track, score_images, summarise
from raev2_tasks.t2i.text.encoder import TEXT_FILES

TRACKS = {
    "compositional-g60": "g60",
    "compositional-s12": "s12",
    "text-rendering": "txt",
    "emoji-names": "emo",
}
WITH_COMPOSITIONS = ("g60", "s12")
HELD, SEEN = "test_held", "test_seen"
CLIP = "openai/clip-vit-large-patch14"
CAPTIONS = "captions of random pictures of the validation split, each once before any repeats"

VALUES: dict[str, tuple[Better, str]] = {  # further numbers of the scorers
    "components": ("lower", "Objects found in a picture, mean; prompts name one to four, more are clutter."),
    "unknown": ("lower", "Objects of no known shape found in a picture, mean."),
    "char_accuracy": ("higher", "1 - edit distance over length of the written word, at least 0, mean."),
    "color": ("higher", "Share of pictures whose word has the right colour."),
    "top5": ("higher", "Share of pictures with the emoji asked for among the five nearest."),
}

PromptCond = Callable[[Sequence[str]], Cond]


def protocols(task: Task, spec: RunSpec) -> list[Evaluator]:
    """Exact scores of the embedded benchmark, retrieval, CLIPScore, and reconstruction and generation."""
    num = spec.evaluation.num_samples

    def prompt_cond(prompts: Sequence[str]) -> Cond:
        return task.prompt_cond(spec, prompts)  # type: ignore[attr-defined]

    found: list[Evaluator] = [
        BenchmarkEvaluator(protocol, track, prompt_cond, num_samples=num) for protocol, track in TRACKS.items()
    ]
    found.append(RetrievalEvaluator("retrieval-micro", task.eval_cond, "micro", num_samples=num))
    found.append(ClipScoreEvaluator("clipscore", task.eval_cond, CLIP, num_samples=num))
    for features in ("micro", "inception"):
        found.append(ReconstructionEvaluator(f"reconstruction-{features}", (features,)))
        found.append(
            GenerationEvaluator(
                f"generation-{features}", task.eval_cond, (features,), label_policy=CAPTIONS, num_samples=num
            )
        )
    return found


# Exact scores


class BenchmarkEvaluator(Evaluator):
    """A track of the embedded benchmark: generated pictures of its prompts, judged by its scorer.

    The headline, `TRACK_exact`, is the share of pictures that show what is asked for and nothing else: unweighted mean
    over tags, for the prompts `test_held`, whose compositions no training picture shows. Beside it stand numbers with
    a known place, from the same scorer and the same prompts:

    oracle       the renderer's own pictures, at the size of the run
    ceiling      these pictures after the tokenizer; a generator can hardly be better
    shuffled     the generated pictures, judged by another prompt of the same tag; also by tag
    class_only   rendered pictures with the right classes and the rest at random, where a track has more than classes
    retrieval    the training picture whose caption is most like the prompt, where the training data has the track
    seen         generated pictures of prompts whose compositions training does show
    """

    needs_generator = True

    def __init__(self, protocol: str, track: str, prompt_cond: PromptCond, *, num_samples: int) -> None:
        """Name a protocol.

        prompt_cond   texts -> raw conditions
        num_samples   at most so many pictures of each split: whole passes over its prompts, or a random part of them
        """
        self.protocol, self.track, self.prompt_cond, self.num_samples = protocol, track, prompt_cond, num_samples
        self.metric = f"{track}_exact"
        self.description = f"pictures of the prompts of track {track}, scored by what is in them"

    def rows(self, split: str) -> list[PromptRow]:
        """Which prompt picture i is of."""
        track = get_track(self.track)
        prompts = track.prompts(split)
        passes = min(track.IMAGES_PER_PROMPT, self.num_samples // len(prompts))
        if passes:
            return prompts * passes
        chosen = random_subset([(row.prompt, row.tag) for row in prompts], self.num_samples)
        return [prompts[number] for number in chosen]

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """Prompts and their hashes."""
        prompts = {
            split: {
                "num_prompts": len({row.prompt for row in self.rows(split)}),
                "num_images": len(self.rows(split)),
                "sha256": hashlib.sha256("\n".join(row.prompt for row in self.rows(split)).encode()).hexdigest(),
            }
            for split in (HELD, SEEN)
        }
        known = {row.prompt for row in get_track(self.track).prompts(HELD)}
        coverage = {"what": "prompts", "asked": prompts[HELD]["num_prompts"], "of": len(known)}
        return {"track": self.track, "prompts": prompts, "coverage": coverage, "scored_at_px": 256}

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """The headline, its parts by tag and tier, and the scale."""
        held, seen = self.rows(HELD), self.rows(SEEN)
        order = rotation(held)

        def generate(rows: Sequence[PromptRow]) -> Callable[[Sequence[int]], Tensor]:
            return lambda indices: generated_images(
                context, lambda i: self.prompt_cond([rows[index].prompt for index in i]), indices
            )

        def render(indices: Sequence[int]) -> Tensor:
            return torch.stack([self._picture(held[i], i, context.spec.tokenizer.image_size) for i in indices])

        def reconstruct(indices: Sequence[int]) -> Tensor:
            return context.reconstruct(render(indices))

        own, other = self._scores(generate(held), held, [held[i] for i in order])
        yield from self._results(own, held)
        (scores,) = self._scores(generate(seen), seen)
        yield self._mean("seen", scores, seen, "The same for prompts whose compositions training shows.", "detail")
        about = "Each picture judged by another prompt of its tag: right by chance."
        yield self._mean("shuffled", other, held, about)
        yield from self._tags(summarise(other, held, self.track), about, "shuffled")
        (scores,) = self._scores(reconstruct, held)
        about = "Rendered pictures after the tokenizer: a generator can hardly be better."
        yield self._mean("ceiling", scores, held, about)
        (scores,) = self._scores(render, held)
        yield self._mean("oracle", scores, held, "Rendered pictures themselves: what the scorer gives right ones.")
        if self.track in WITH_COMPOSITIONS:
            guesses = torch.from_numpy(class_only_floor(self.track, held, context.spec.tokenizer.image_size[0]))
            (scores,) = self._scores(lambda indices: guesses[list(indices)], held)
            about = "Rendered pictures with the right classes and the rest at random."
            yield self._mean("class_only", scores, held, about)
        train = context.dataset("train")
        numbers = [i for i in range(len(train)) if train.source_name(i) == self.track]  # type: ignore[attr-defined]
        if numbers:
            captions = [train.caption(i) for i in numbers]  # type: ignore[attr-defined]
            nearest = [numbers[place] for place in retrieve(held, captions)]
            (scores,) = self._scores(lambda indices: torch.stack([train.image(nearest[i]) for i in indices]), held)
            about = "The training picture with the caption most like the prompt."
            yield self._mean("retrieval", scores, held, about)

    def _picture(self, row: PromptRow, index: int, size: tuple[int, int]) -> Tensor:
        """The rendered scene of a row, another one for every index: uint8 (3, H_px, W_px)."""
        height, width = size
        if height != width:
            raise DataError(f"protocol {self.protocol}", "pictures must be square", got=f"{height} x {width} px")
        rng = np.random.default_rng([0, index])
        image = get_track(self.track).scene(row, rng).render(size=height)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _scores(self, images: Callable[[Sequence[int]], Tensor], *rows: Sequence[PromptRow]) -> list[list[ImageScore]]:
        """Scores of pictures 0, 1, ..., each judged by every one of `rows`; work shared by all processes."""
        own: list[tuple[list[int], list[list[ImageScore]]]] = []
        for indices in local_chunks(len(rows[0]), CHUNK_SIZE, f"pictures of {self.track}"):
            pictures = images(indices).cpu()
            own.append((indices, [score_images(self.track, pictures, [part[i] for i in indices]) for part in rows]))
        chunks = [chunk for process in dist.gather_objects(own) for chunk in process]
        chunks.sort(key=lambda chunk: chunk[0][0])
        return [[score for _, found in chunks for score in found[number]] for number in range(len(rows))]

    def _mean(
        self, suffix: str, scores: Sequence[ImageScore], rows: Sequence[PromptRow], about: str, role: Role = "scale"
    ) -> MetricResult:
        """The mean over tags, under the name of the track and a suffix."""
        summary = summarise(scores, rows, self.track)
        low, high = summary.interval
        return MetricResult(
            f"{self.metric}_{suffix}" if suffix else self.metric, summary.macro, summary.num_images,
            (high - low) / (2 * 1.96), f"95 % interval {low:.3f} to {high:.3f}",
            better="higher", role=role, about=about, of=self.metric if role == "scale" else None,
        )  # fmt: skip

    def _results(self, scores: Sequence[ImageScore], rows: Sequence[PromptRow]) -> Iterator[MetricResult]:
        """The headline and its parts."""
        summary, num, name = summarise(scores, rows, self.track), len(scores), self.metric
        about = "Share of pictures with what their prompt asks for and nothing else, mean over tags, new compositions."
        yield self._mean("", scores, rows, about, "headline")
        yield from self._tags(summary, "Share of right pictures for prompts of this tag.")
        for tier, share in summary.per_tier.items():
            count = sum(row.tier == tier for row in rows)
            yield _share(f"{name}_{tier}", share, count, "Share of right pictures for prompts of this tier.")
        about = (
            "The same where other objects, or another colour of a word, do no harm: one crowded picture scores high."
        )
        yield MetricResult(f"{self.track}_lenient", summary.lenient, num, better="higher", role="detail", about=about)
        yield _share(f"{name}_micro", summary.micro, num, "Share of right pictures, whatever the tag.")
        about = "Share of prompts with at least one right picture."
        yield _share(f"{name}_any", summary.any, summary.num_prompts, about)
        for value, mean in summary.values.items():
            better, about = VALUES[value]
            yield MetricResult(f"{self.track}_{value}", mean, num, better=better, role="detail", about=about)

    def _tags(self, summary: TrackSummary, about: str, scale: str = "") -> Iterator[MetricResult]:
        for tag, share in summary.per_tag.items():
            of, num = f"{self.metric}_{tag}", summary.images_per_tag[tag]
            yield _share(f"{self.metric}_{scale}_{tag}" if scale else of, share, num, about, of if scale else None)


def rotation(rows: Sequence[PromptRow]) -> list[int]:
    """For each row the number of another one of its tag: the next in the tag's list with another prompt, if any."""
    of_tag: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        of_tag.setdefault(row.tag, []).append(number)
    found = list(range(len(rows)))
    for numbers in of_tag.values():
        for place, number in enumerate(numbers):
            following = numbers[place + 1 :] + numbers[:place]
            found[number] = next((n for n in following if rows[n].prompt != rows[number].prompt), number)
    return found


# Retrieval and CLIPScore


class RetrievalEvaluator(Evaluator):
    """Is the generated picture nearest to the picture that its caption describes, among N? Cosine of mean tokens.

    Features are centred on the mean of the real pictures first. A caption that several pictures share counts as found
    with any of them.
    """

    needs_generator = True

    def __init__(
        self,
        protocol: str,
        cond: Callable[[RunSpec, ImageDataset, Sequence[int]], Cond],
        extractor: str,
        *,
        num_samples: int,
        split: str = "val",
        build: Callable[[str, torch.device], FeatureExtractor] = build_extractor,
    ) -> None:
        """Name a protocol; `cond` is `eval_cond` of the task, `extractor` a feature network."""
        self.protocol, self.cond, self.extractor, self.build = protocol, cond, extractor, build
        self.num_samples, self.split = num_samples, split
        self.description = f"generated pictures matched to the pictures of their captions, space of {extractor}"

    def needs(self) -> list[Asset]:
        """Weights of the feature network."""
        return extractor_needs(self.extractor)

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """Which captions, among how many pictures."""
        return {"label_policy": f"captions of random pictures of '{self.split}', each once"}

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """Share of captions whose picture is found first, and among the first 5; then the same after the tokenizer."""
        dataset = context.dataset(self.split)
        asked = dataset.subset(self.num_samples)
        num = len(asked)
        extractor = self.build(self.extractor, context.device)

        def rows(indices: Sequence[int]) -> dict[str, Tensor]:
            real = torch.stack([dataset.image(asked[index]) for index in indices])
            images = generated_images(context, lambda i: self.cond(context.spec, dataset, i), indices)
            decoded = context.reconstruct(real)
            return {"real": extractor(real), "image": extractor(images), "decoded": extractor(decoded)}

        found = collect(num, CHUNK_SIZE, rows, "pictures to match")
        captions = [dataset.caption(index) for index in asked]  # type: ignore[attr-defined]
        name = f"retrieval_{self.extractor}"
        ranks = retrieval_ranks(found["image"], found["real"], captions)
        first, chance = f"{name}@1", f"by chance {1 / num:.3f}"
        about = f"Share of captions whose own picture is the nearest to the generated one, among {num}; {chance}."
        yield _share(first, _share_below(ranks, 1), num, about, role="headline", point="1")
        about = f"Share of captions whose own picture is among the 5 nearest of {num}."
        yield _share(f"{name}@5", _share_below(ranks, 5), num, about, point="5")
        ranks = retrieval_ranks(found["decoded"], found["real"], captions)
        about = "The pictures themselves after the tokenizer, in place of generated ones."
        yield _share(f"{first}_ceiling", _share_below(ranks, 1), num, about, first, point="1")


def _share_below(ranks: Tensor, limit: int) -> float:
    return float((ranks < limit).double().mean())


def retrieval_ranks(queries: Tensor, targets: Tensor, captions: Sequence[str]) -> Tensor:
    """Rank (0 = nearest) at which query i meets the first target with its caption; both (N, D)."""
    mean = targets.mean(0)
    similarity = F.normalize(queries - mean, dim=1) @ F.normalize(targets - mean, dim=1).T  # (N, N)
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([numbers[caption] for caption in captions])
    same = label[:, None] == label
    best = similarity.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
    return ((similarity > best) & ~same).sum(1)


class ClipScoreEvaluator(Evaluator):
    """100 * max(cos, 0) of image and caption in CLIP, by torchmetrics; the mean over images."""

    needs_generator = True

    def __init__(
        self,
        protocol: str,
        cond: Callable[[RunSpec, ImageDataset, Sequence[int]], Cond],
        model: str,
        *,
        num_samples: int,
        split: str = "val",
    ) -> None:
        """Name a protocol; `model` is a hub id or folder of a CLIP with image and text part."""
        self.protocol, self.cond, self.model, self.num_samples, self.split = protocol, cond, model, num_samples, split
        self.description = f"CLIPScore with {model}, captions of '{split}'"

    def needs(self) -> list[Asset]:
        """Weights of CLIP, and the files of its tokenizer."""
        return [Asset("CLIP", self.model, files=TEXT_FILES)]

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """Model and captions."""
        return {"model": self.model, "formula": "100 * max(cosine, 0)", "label_policy": CAPTIONS}

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """CLIPScore, and the share of captions that CLIP cannot read to the end."""
        metric, text_tokenizer = load_clip(self.model, context.device)
        dataset = context.dataset(self.split)
        limit = metric.model.config.text_config.max_position_embeddings

        def rows(indices: Sequence[int]) -> dict[str, Tensor]:
            captions = [dataset.caption(i) for i in dataset.asked(self.num_samples, indices)]  # type: ignore[attr-defined]
            images = generated_images(context, lambda i: self.cond(context.spec, dataset, i), indices)
            long = [len(text_tokenizer(caption)["input_ids"]) > limit for caption in captions]
            scores = [
                float(_clip_score(metric, image, caption)) for image, caption in zip(images, captions, strict=True)
            ]
            return {"score": torch.tensor(scores), "long": torch.tensor(long)}

        found = collect(self.num_samples, CHUNK_SIZE, rows, "pictures")
        about = f"100 * max(cosine, 0) of picture and caption in {self.model}, mean over pictures."
        yield MetricResult("clipscore", *mean_and_error(found["score"]), better="higher", role="headline", about=about)
        share = float(found["long"].double().mean())
        about = f"Share of captions longer than {limit} tokens, of which CLIP does not see the end."
        yield MetricResult(
            "clipscore_cut_captions", share, self.num_samples, better="lower", role="detail", about=about
        )


class ClipFeatures(nn.Module):
    """A CLIP of transformers as torchmetrics wants it: features as tensors, in every version of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        """Projected image features."""
        return _features(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        """Projected text features."""
        return _features(self.model.get_text_features(*inputs))


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def load_clip(model: str, device: torch.device) -> tuple[Any, Any]:
    """torchmetrics' CLIPScore and the text tokenizer of its model; DataError where the weights are not at hand."""
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    try:
        features: Any = ClipFeatures(CLIPModel.from_pretrained(model))  # all that torchmetrics uses of a CLIPModel
        processor = CLIPProcessor.from_pretrained(model)
    except Exception as error:  # transformers and the hub client have many error types
        raise DataError(
            f"weights {model}", "the CLIP of protocol clipscore is missing", got=type(error).__name__,
            hint=f"Download {model} into the hub's cache on this machine.",
        ) from error  # fmt: skip
    return CLIPScore(model_name_or_path=lambda: (features, processor)).to(device), processor.tokenizer


def _clip_score(metric: Any, image: Tensor, caption: str) -> Tensor:
    metric.reset()
    metric.update(image.to(metric.device), caption)
    return metric.compute()


def _share(
    name: str,
    share: float,
    num: int,
    about: str,
    of: str | None = None,
    role: Role = "detail",
    point: str | None = None,
) -> MetricResult:
    """A share of independent trials with its interval; a scale row where `of` is given."""
    low, high = wilson_interval(share, num)
    note = f"95 % interval {low:.3f} to {high:.3f}"
    return MetricResult(
        name, share, num, (share * (1 - share) / num) ** 0.5, note,
        better="higher", role="scale" if of else role, about=about, of=of, point=point,
    )  # fmt: skip


def wilson_interval(share: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a share of `num` independent trials; unlike `share ± z * stderr` it is not empty at 0 or 1."""
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * (share * (1 - share) / num + z**2 / (4 * num**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
