"""Evaluation protocols of this task; every name is a complete recipe for numbers.

`*-micro` measure in the space of the embedded encoder and run anywhere; `*-inception` are rFID and gFID with all that
Inception gives; `generation-fdr6` and `generation-mind6` look through six networks (spaces.py). A generation protocol
has the labels of random validation pictures; with `-balanced` or `-uniform` after its name it has others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from raev2.batch import Cond
from raev2.data import ImageDataset, derived_seed
from raev2.eval.features import INCEPTION
from raev2.eval.protocols import GenerationEvaluator, ReconstructionEvaluator
from raev2.spec import RunSpec
from raev2.task import Evaluator
from raev2_tasks.imagenet.spaces import FD_VAL, build_space, distances_alone, fdr6, mind6, mind_of, space_needs
from raev2_tasks.imagenet.spec import ClassToImageSpec

STORED = (
    "imagenet_256_fid_stats.npz of JiT, as RAEv2 reports, or VIRTUAL_imagenet256_labeled.npz of ADM, as RAE reports; "
    "numbers against the two differ by up to a tenth"
)
MIND_IMAGES = 50_000  # all validation pictures of ImageNet
logger = logging.getLogger(__name__)
VALIDATION = "validation"
LABEL_POLICIES = {
    VALIDATION: "labels of random pictures of the validation split, each once before any repeats",
    "balanced": "every class equally often, in random order",
    "uniform": "every label drawn from all classes with equal probability",
}


def protocols(spec: RunSpec) -> list[Evaluator]:
    """Reconstruction and generation, each in the embedded encoder's features and in Inception's."""
    assert isinstance(spec.task, ClassToImageSpec)
    if spec.task.eval_labels != VALIDATION:
        logger.warning(
            "task.eval_labels=%s has no effect: choose a protocol with -%s after its name", *[spec.task.eval_labels] * 2
        )
    found: list[Evaluator] = []
    for features in ("micro", "inception"):
        found.append(ReconstructionEvaluator(f"reconstruction-{features}", (features,)))
        for policy in [VALIDATION] if spec.task.unconditional else LABEL_POLICIES:
            made_for = STORED if features == INCEPTION else ""
            found.append(_generation(spec, features, policy, (features,), made_for=made_for))
    for policy in [VALIDATION] if spec.task.unconditional else LABEL_POLICIES:
        spaces = partial(
            _generation, spec, extractors=tuple(FD_VAL), policy=policy, build=build_space, weights=space_needs
        )
        found.append(spaces("fdr6", metrics=distances_alone, summary=fdr6))
        splits = {"reference_split": "val", "scale_split": "train"}
        found.append(spaces("mind6", metrics=mind_of, summary=mind6, max_rows=MIND_IMAGES, **splits))
    return found


def _generation(
    spec: RunSpec, name: str, policy: str, extractors: Sequence[str], **options: Any
) -> GenerationEvaluator:
    assert isinstance(spec.task, ClassToImageSpec)
    return GenerationEvaluator(
        f"generation-{name}" + ("" if policy == VALIDATION else f"-{policy}"),
        partial(label_cond, policy),
        extractors,
        label_policy="no labels" if spec.task.unconditional else f"{policy}: {LABEL_POLICIES[policy]}",
        num_samples=spec.evaluation.num_samples,
        groups=partial(labels, policy),
        **options,
    )


def label_cond(policy: str, spec: RunSpec, dataset: ImageDataset, numbers: Sequence[int]) -> Cond:
    """Raw conditions of evaluation samples."""
    assert isinstance(spec.task, ClassToImageSpec)
    return {} if spec.task.unconditional else {"label": torch.tensor(labels(policy, spec, dataset, numbers))}


def labels(policy: str, spec: RunSpec, dataset: ImageDataset, numbers: Sequence[int]) -> list[Any]:
    """Labels of evaluation samples by their numbers; `dataset` is the validation split."""
    num, seed, num_classes = spec.evaluation.num_samples, spec.evaluation.seed, len(dataset.classes)
    if policy == "balanced":
        order = _balanced(num, num_classes, seed)
        return [order[number % num] for number in numbers]
    if policy == "uniform":
        return [derived_seed("label", seed, number) % num_classes for number in numbers]
    return [dataset.group(index) for index in dataset.asked(num, numbers)]


@lru_cache(maxsize=1)
def _balanced(num: int, num_classes: int, seed: int) -> list[int]:
    """Every class num // num_classes times, random classes once more, in random order."""
    generator = torch.Generator().manual_seed(derived_seed("balanced", seed))
    rounds = [torch.randperm(num_classes, generator=generator) for _ in range(-(-num // num_classes))]
    return torch.cat(rounds)[:num][torch.randperm(num, generator=generator)].tolist()
