"""Which labels a class-to-image run is asked for, by the name of the protocol."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from raev2.spec_io import apply_overrides
from raev2.task import get_evaluators, get_task
from raev2_tasks.imagenet.protocols import LABEL_POLICIES, labels

NAMES = {"": "validation", "-balanced": "balanced", "-uniform": "uniform"}


def asked(spec, policy, num):
    spec = apply_overrides(spec, [f"evaluation.num_samples={num}"])
    return labels(policy, spec, get_task("imagenet").dataset(spec, "val"), range(num))


def test_every_policy_is_a_protocol_of_its_own(tiny_spec):
    for suffix, policy in NAMES.items():
        (evaluator,) = get_evaluators(get_task("imagenet"), tiny_spec, [f"generation-micro{suffix}"])
        assert evaluator.label_policy == f"{policy}: {LABEL_POLICIES[policy]}"


def test_balanced_labels_are_equally_many_and_in_random_order(tiny_spec):
    found = asked(tiny_spec, "balanced", 402)
    assert sorted(Counter(found).values()) == [100, 100, 101, 101]
    assert all(abs(count - 25) < 20 for count in Counter(found[::4]).values()), "not class after class in turn"
    assert found == asked(tiny_spec, "balanced", 402)


def test_uniform_labels_are_drawn_independently_by_number_and_seed(tiny_spec):
    found = asked(tiny_spec, "uniform", 4000)
    assert all(abs(count - 1000) < 5 * 28 for count in Counter(found).values()), "standard deviation 27"
    assert found[:10] == asked(tiny_spec, "uniform", 10), "whatever the number of samples"
    other = asked(apply_overrides(tiny_spec, ["evaluation.seed=1"]), "uniform", 4000)
    assert 800 < sum(a == b for a, b in zip(found, other, strict=True)) < 1200


def test_validation_labels_are_those_of_the_held_out_pictures_of_the_scale(tiny_spec):
    val = get_task("imagenet").dataset(tiny_spec, "val")
    assert asked(tiny_spec, "validation", 10) == [val.cond(index)["label"] for index in val.subset(10)]


@pytest.mark.parametrize("policy", ["balanced", "uniform"])
def test_a_setting_that_named_the_policy_is_told_to_have_no_effect(tiny_spec, caplog, policy):
    spec = apply_overrides(tiny_spec, [f"task.eval_labels={policy}"])
    with caplog.at_level(logging.WARNING):
        (evaluator,) = get_evaluators(get_task("imagenet"), spec, ["generation-micro"])
    assert evaluator.label_policy.startswith("validation")
    message = f"task.eval_labels={policy} has no effect: choose a protocol with -{policy} after its name"
    assert caplog.messages == [message]


def test_a_run_without_labels_has_one_generation_protocol(tiny_spec):
    spec = apply_overrides(tiny_spec, ["task.unconditional=true"])
    names = [evaluator.protocol for evaluator in get_task("imagenet").evaluators(spec)]
    assert [name for name in names if "generation" in name] == [
        "generation-micro", "generation-inception", "generation-fdr6", "generation-mind6"
    ]  # fmt: skip
