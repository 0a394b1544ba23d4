"""Evaluation protocols of this task; every name is a complete recipe for numbers.

`*-micro` measure in the space of the embedded encoder and run anywhere; `*-inception` are rFID and gFID.
"""

from __future__ import annotations

from raev2.eval.protocols import GenerationEvaluator, ReconstructionEvaluator
from raev2.spec import RunSpec
from raev2.task import Evaluator, Task
from raev2_tasks.imagenet.spec import ClassToImageSpec

LABEL_POLICIES = {
    "validation": "labels of the validation split in its order, repeated as needed",
    "balanced": "every class equally often",
}


def protocols(task: Task, spec: RunSpec) -> list[Evaluator]:
    """Reconstruction and generation, each in the embedded encoder's features and in Inception's."""
    assert isinstance(spec.task, ClassToImageSpec)
    policy = "no labels" if spec.task.unconditional else LABEL_POLICIES[spec.task.eval_labels]
    found: list[Evaluator] = []
    for features in ("micro", "inception"):
        found.append(ReconstructionEvaluator(f"reconstruction-{features}", (features,)))
        found.append(
            GenerationEvaluator(
                f"generation-{features}",
                task.eval_cond,
                (features,),
                label_policy=policy,
                num_samples=spec.evaluation.num_samples,
            )
        )
    return found
