"""`raev2 sweep`: the numbers are those of `raev2 eval`, a stopped sweep goes on, the best is said with its doubt."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from raev2 import pipeline
from raev2.batch import MetricResult
from raev2.command.cli import main
from raev2.errors import CheckpointError, SpecError
from raev2.spec_io import apply_overrides, load_spec, save_spec
from raev2_tasks.sweep import command
from raev2_tasks.sweep.table import Sweep

PROTOCOL = "generation-micro"


def result(value, stderr=None, **meaning) -> MetricResult:
    return MetricResult("woe", value, 8, stderr, **{"better": "lower", "role": "headline", "about": "Woe.", **meaning})


@pytest.fixture
def sweep(tmp_path):
    return Sweep.open(tmp_path / "steps-p.json", {"kind": "steps", "seed": 3, "protocol": "p"}, False)


def test_the_numbers_are_those_of_an_evaluation_and_a_stopped_sweep_goes_on(trained_run, tmp_path, monkeypatch, capsys):
    line = ["sweep", "steps", "--run", str(trained_run), "--protocol", PROTOCOL, "--out", str(tmp_path), "--values"]
    assert main([*line, "2"]) == 0
    measured, real = [], command.run_protocol

    def run_protocol(evaluator, context):
        measured.append(context.spec.sampling.steps)
        return real(evaluator, context)

    monkeypatch.setattr(command, "run_protocol", run_protocol)
    assert main([*line, "2", "3"]) == 0
    assert measured == [3], "2 is there already"
    file = tmp_path / f"steps-{PROTOCOL}.json"
    found = {row["value"]: row["results"] for row in json.loads(file.read_text())["rows"]}
    other = tmp_path / "run"
    shutil.copytree(trained_run, other)
    save_spec(apply_overrides(load_spec(other / "spec.yaml"), ["sampling.steps=3"]), other / "spec.yaml")
    evaluated = pipeline.evaluate_run(other, [PROTOCOL])[PROTOCOL]
    assert [(row["name"], row["value"]) for row in found["3"]] == [(row.name, row.value) for row in evaluated]
    table = list(csv.DictReader(file.with_suffix(".csv").read_text().splitlines()))
    assert [(row["steps"], float(row["value"])) for row in table if row["metric"] == "fd_micro"] == [
        (value, next(row["value"] for row in rows if row["name"] == "fd_micro")) for value, rows in found.items()
    ]
    assert "fd_micro by steps" in file.with_suffix(".svg").read_text()
    assert "Best steps: " in capsys.readouterr().out
    assert main([*line, "2", "--seed", "1"]) == SpecError.exit_code
    assert "a sweep with other settings; got another seed. Choose another --out" in capsys.readouterr().err


def test_averages_are_those_of_the_checkpoint(trained_run):
    trained = pipeline.open_trained(trained_run)
    decay = str(trained.run.spec.generator_training.ema_decays[0])
    before = {name: value.clone() for name, value in trained.generator.state_dict().items()}
    with torch.no_grad():
        for parameter in trained.generator.parameters():
            parameter.zero_()
    command._average(trained, trained.run.spec.sampling, decay)
    assert all(value.equal(before[name]) for name, value in trained.generator.state_dict().items())
    with pytest.raises(CheckpointError, match="no averaged weights of this decay, and none to mix it from; got 0.01"):
        command._average(trained, trained.run.spec.sampling, "0.01")


def test_settings_that_cannot_be_are_refused(trained_run, capsys):
    line = ["--run", str(trained_run), "--protocol", PROTOCOL]
    for kind, more, text in (
        ("colour", [], "nothing that can be varied; got 'colour'; expected one of guidance, ema, steps, interval"),
        ("steps", ["--values", "x"], "--values: cannot be read; got 'x'; expected a number"),
        ("interval", ["--values", "1"], "--values: cannot be read; got '1'; expected LOW,HIGH"),
        ("interval", ["--values", "1,0"], "empty interval"),
        ("steps", ["--n", "0"], "--n: not usable; got 0; expected a number >= 1"),
        ("steps", ["--protocol", "reconstruction-micro"], "--protocol: does not depend on sampling"),
        ("guidance", ["--guidance", "none"], "--guidance: the run samples without guidance; expected a kind"),
    ):
        assert main(["sweep", kind, *line, *more]) == SpecError.exit_code
        assert text in capsys.readouterr().err


def test_the_best_is_said_with_its_interval_and_what_it_was_chosen_on(sweep):
    for value, number in (("10", 5.0), ("20", 3.0), ("50", 3.5)):
        sweep.add(value, [result(number, 0.25), result(9.0, role="scale", of="woe")], None)
    assert sweep.best(None) == (
        "Best steps: 20, woe 3, 95 % interval 2.51 to 3.49. Not told apart from it (intervals overlap): 50. "
        "Chosen among 3 on seed 3 with p: evaluate it with another seed before you quote it."
    )
    with pytest.raises(SpecError, match="--metric: no number of this protocol; got 'joy'; expected one of woe"):
        sweep.best("joy")


def test_higher_is_better_where_the_metric_says_so(sweep):
    for value, number in (("10", 0.5), ("20", 0.25)):
        sweep.add(value, [result(number, better="higher")], None)
    assert sweep.best(None).startswith("Best steps: 10, woe 0.5, no interval. Chosen among 2")
    again = Sweep.open(sweep.file, sweep.settings, False)
    assert again.best(None) == sweep.best(None) and json.loads(sweep.file.read_text())["best"] == sweep.best(None)
