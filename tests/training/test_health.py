"""Each rule at its threshold, by closed forms; and a training that goes well sets off none."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from raev2.training import health
from raev2.training.health import FEW, WINDOW, Health, distance, spread
from raev2_tasks.report.page import write_report


def steps(num: int = WINDOW, **last: float) -> list[dict[str, float]]:
    """Losses that fall from 1.2 to 1; the last step has these numbers besides."""
    losses = [{"loss": 1 + 0.2 * (num - 1 - i) / num} for i in range(num)]
    return [*losses[:-1], {**losses[-1], **last}]


def holding(numbers: list[dict[str, float]]) -> list[str]:
    return [rule.__name__ for rule in health.RULES if rule(numbers)]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (steps(), []),
        (steps(1), []),
        (steps(loss=9.0), []),
        (steps(loss=12.1), ["exploded"]),
        (steps(FEW, loss=1e6), []),  # too few before it
        ([{"loss": 1.0}] * FEW, ["dead"]),
        ([{"loss": 1.0}] * (FEW - 1), []),
        ([{"loss": 1.0}] * (FEW - 1) + [{"loss": 1.00001}], []),
        ([{**step, "mean": 0.9, "std": 2.9} for step in steps()], []),
        ([{**step, "mean": -1.1, "std": 1.0} for step in steps()], ["latents_off"]),
        ([{**step, "mean": 0.0, "std": 0.3} for step in steps()], ["latents_off"]),
        (steps(mean=5.0), []),  # one odd batch
        ([{**step, "spread": 0.009} for step in steps()], ["collapsed"]),
        ([{**step, "spread": 0.009} for step in steps(WINDOW - 1)], []),
        ([{**step, "spread": 0.009} for step in steps()][:-1] + steps(1, spread=0.02), []),
        (steps(average_distance=0.9), []),
        (steps(average_distance=1.1), ["average_far"]),
        (steps(disc=3.0), []),
        (steps(disc=math.nan), ["discriminator_not_finite"]),
        (steps(disc=math.inf), ["discriminator_not_finite"]),
    ],
)
def test_a_rule_holds_beyond_its_threshold(numbers, expected):
    assert holding(numbers) == expected


def test_an_alarm_is_one_event_and_one_line_until_it_is_over(caplog):
    events: list[dict] = []
    watch = Health(lambda **values: events.append(values), "generator")
    for step, far in enumerate([0.5, 1.5, 1.6, 0.5, 1.5], start=1):
        watch.check(8 * step, step, {"loss": 1 / step, "average_distance": far})
    assert [(event["event"], event["images"]) for event in events] == [("average_far", 16), ("average_far", 40)]
    assert caplog.messages[0] == (
        "generator step 2: average far. Averaged weights are farther from the weights than these are from zero."
    )


def test_spread_is_a_share_of_that_of_the_targets():
    target = torch.randn(8, 3, 4, 4)
    assert spread(0.25 * target + 7, target) == pytest.approx(0.25)
    assert spread(target.mean(0, keepdim=True).expand_as(target), target) == pytest.approx(0, abs=1e-6)
    assert spread(target[:1], target[:1]) == 1


def test_the_distance_of_averages_is_relative():
    model = torch.nn.Linear(3, 2)
    averages = {name: 1.5 * value.detach() for name, value in model.named_parameters()}
    assert distance(averages, model) == pytest.approx(0.5)
    assert distance(dict(model.named_parameters()), model) == 0


def test_a_training_that_goes_well_sets_off_no_alarm(trained_run):
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "event"] == []


def test_the_report_says_what_was_found(trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    event = {"stage": "generator", "kind": "event", "event": "dead", "images": 8, "step": 1, "finding": "It is dead."}
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"time": 0, **event}) + "\n")
    assert '<p class="warn">generator, step 1: It is dead.</p>' in write_report(run).read_text()
