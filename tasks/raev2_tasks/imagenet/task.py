"""Class to image: labels as conditions, and the protocols for reconstruction and generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raev2.errors import SpecError, did_you_mean
from raev2.spec import RunSpec
from raev2.task import Evaluator, Task
from raev2_tasks.imagenet.recipes import RECIPES
from raev2_tasks.imagenet.spec import ClassToImageSpec

if TYPE_CHECKING:
    from raev2.batch import Cond, Measurement
    from raev2.data import ImageDataset
    from raev2.model.condition import ConditionSpec


ASSUMED_CLASSES = 1000  # for estimates before there is data


class ClassToImage(Task):
    """One class label a picture; the null label is the one after the last class."""

    name = "imagenet"
    summary = "class label -> image (ImageNet, class folders, emoji)"
    spec_type = ClassToImageSpec

    def dataset(self, spec: RunSpec, split: str) -> ImageDataset:
        """Images with their label, or without any condition for an unconditional run."""
        from raev2.data import FolderDataset

        fields = () if _task_spec(spec).unconditional else ("label",)
        dataset = FolderDataset(spec.data.dir, split, spec.tokenizer.image_size, fields, spec.data.cache)
        if fields and not dataset.classes:
            raise SpecError(
                "spec.task.unconditional", f"the data in {spec.data.dir} has no classes", got="false",
                hint="Set task.unconditional=true to train without labels.",
            )  # fmt: skip
        return dataset

    def condition(self, spec: RunSpec, dataset: ImageDataset | None) -> ConditionSpec:
        """Label tokens, or no tokens."""
        from raev2.model.condition import LabelCondition, NoCondition

        task = _task_spec(spec)
        if task.unconditional:
            return NoCondition()
        known = len(dataset.classes) if dataset is not None else 0
        num_classes = task.num_classes or known or ASSUMED_CLASSES
        if known > num_classes:
            raise SpecError(
                "spec.task.num_classes", "fewer classes than the data has", got=num_classes,
                expected=f"at least {known}, or null to count them",
            )  # fmt: skip
        return LabelCondition(num_classes=num_classes, num_tokens=task.num_class_tokens)

    def eval_cond(self, spec: RunSpec, dataset: ImageDataset, indices: Sequence[int]) -> Cond:
        """Labels of evaluation samples by `task.eval_labels`; `dataset` is the validation split."""
        from raev2_tasks.imagenet.protocols import label_cond

        return label_cond(_task_spec(spec).eval_labels, spec, dataset, indices)

    def sample_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Classes."""
        return {"--label": {"nargs": "+", "metavar": "LABEL", "help": "class names or indices"}}

    def sample_cond(
        self, spec: RunSpec, dataset: ImageDataset, options: Mapping[str, object]
    ) -> tuple[Cond, list[str]]:
        """`label`: class names or indices, repeated to fill `n`; default: classes spread over the list."""
        import torch

        n, wanted = int(str(options["n"])), options.get("label")
        if _task_spec(spec).unconditional:
            if wanted is not None:
                raise SpecError("--label", "has no effect with an unconditional generator")
            return {}, [""] * n
        classes = dataset.classes
        if wanted is None:
            labels = [
                int(i * len(classes) / n) % len(classes) if n < len(classes) else i % len(classes) for i in range(n)
            ]
        else:
            given = [_label(str(name), classes) for name in wanted]  # type: ignore[attr-defined]
            labels = [given[i * len(given) // n] if n >= len(given) else given[i] for i in range(max(n, len(given)))]
        return {"label": torch.tensor(labels)}, [classes[label] for label in labels]

    def evaluators(self, spec: RunSpec) -> list[Evaluator]:
        """Protocols; the names say which features measure."""
        from raev2_tasks.imagenet.protocols import protocols

        return protocols(spec)

    def recipes(self) -> dict[str, Callable[[], RunSpec]]:
        """quickstart, laptop, and the published systems."""
        return RECIPES

    def commands(self) -> dict[str, Callable[[Sequence[str]], None]]:
        """Lengths for your own photographs, other classes for a trained generator."""
        from raev2_tasks.imagenet.own_photos import own_photos
        from raev2_tasks.imagenet.reclass import reclass

        return {"own-photos": own_photos, "reclass": reclass}

    def benchmarks(self) -> dict[str, Callable[[], list[Measurement]]]:
        """A training step of a whole recipe's generator."""
        from raev2_tasks.imagenet.bench import bench_recipe

        return {"imagenet": bench_recipe}


def _task_spec(spec: RunSpec) -> ClassToImageSpec:
    assert isinstance(spec.task, ClassToImageSpec)
    return spec.task


def _label(name: str, classes: Sequence[str]) -> int:
    if name in classes:
        return classes.index(name)
    if name.isdigit() and int(name) < len(classes):
        return int(name)
    raise SpecError(
        "--label", "unknown class", got=repr(name), expected=f"a class name or an index below {len(classes)}",
        hint=did_you_mean(name, classes),
    )  # fmt: skip
