"""`raev2 eval --expect`: the numbers that a recipe states, beside those obtained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raev2.command.cli import main
from raev2.spec import ExpectedSpec, RunSpec
from raev2.spec_io import fingerprint, load_spec, save_spec
from raev2.task import get_evaluators, get_recipe, get_task, installed_tasks
from raev2_tasks.report.published import published, published_results

METRICS = {"fid": "gFID", "rfid": "rFID", "psnr": "PSNR", "inception_score": "IS"}


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def expect(run: Path, *rows: tuple[str, str, float, float]) -> None:
    """Write expected numbers into the spec of a run."""
    spec = load_spec(run / "spec.yaml")
    expected = [
        ExpectedSpec(protocol=protocol, metric=metric, value=value, tolerance=tolerance, source="a paper, table 1")
        for protocol, metric, value, tolerance in rows
    ]
    save_spec(spec.replace(evaluation=spec.evaluation.replace(expected=expected)), run / "spec.yaml")


def test_a_number_inside_its_tolerance_is_exit_code_0_and_one_outside_1(run, capsys):
    before = fingerprint(load_spec(run / "spec.yaml"))
    file = run / "eval" / "reconstruction-micro.json"
    psnr = {row["name"]: row["value"] for row in json.loads(file.read_text())["results"]}["psnr"]
    command = ["eval", "--run", str(run), "--protocol", "reconstruction-micro", "--expect"]
    for shift, code, verdict in ((0.9, 0, "ok"), (-0.9, 0, "ok"), (1.1, 1, "OUTSIDE"), (-1.1, 1, "OUTSIDE")):
        expect(run, ("reconstruction-micro", "psnr", psnr + shift, 1.0), ("generation-micro", "fd_micro", 0, 1))
        assert main(command) == code
        header, line = capsys.readouterr().out.splitlines()[-2:]
        assert header.split() == ["protocol", "metric", "expected", "obtained", "tolerance", "source"]
        assert line.split()[:2] == ["reconstruction-micro", "psnr"] and line.endswith("a paper, table 1")
        assert [float(word) for word in line.split()[2:5]] == pytest.approx([psnr + shift, psnr, 1], rel=1e-5)
        assert line.split()[5] == verdict
    assert fingerprint(load_spec(run / "spec.yaml")) == before, "what is expected changes no run"
    assert main(command[:-1]) == 0, "nothing is compared unless asked for"


def test_a_protocol_is_run_for_what_is_expected_of_it_and_a_metric_that_is_missing_fails(run, capsys):
    spec = load_spec(run / "spec.yaml")
    save_spec(spec.replace(evaluation=spec.evaluation.replace(protocols=())), run / "spec.yaml")
    expect(run, ("reconstruction-micro", "psnr", 0, 100), ("reconstruction-micro", "rfid", 1, 100))
    assert main(["eval", "--run", str(run), "--expect"]) == 1
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert " ok " in lines[0] and "not measured" in lines[1] and "OUTSIDE" in lines[1]


def test_a_recipe_that_expects_nothing_is_an_error(run, capsys):
    assert main(["eval", "--run", str(run), "--expect"]) == 2
    message = (
        "error: --expect: the recipe tiny states no number for these protocols; expected entries in "
        "evaluation.expected. Name another recipe: --expect RECIPE.\n"
    )
    assert capsys.readouterr().err == message
    assert main(["eval", "--run", str(run), "--expect", "nope"]) == 2
    assert capsys.readouterr().err.startswith("error: --expect: unknown recipe; got 'nope'")


RECIPES = [(task, name) for task in sorted(installed_tasks()) for name in get_task(task).recipes()]
STATED = [(task, name) for task, name in RECIPES if get_recipe(get_task(task), name).evaluation.expected]


@pytest.mark.parametrize(("task", "name"), STATED, ids=[f"{task}/{name}" for task, name in STATED])
def test_what_recipes_expect_is_quoted(task, name):
    """Every number stands in the table of published results with the same source, and its protocol is known."""
    spec: RunSpec = get_recipe(get_task(task), name)
    sources = published()["sources"]
    rows = [(r["metric"], r["value"], sources[r["source"]]) for r in published_results(name) if r["task"] == task]
    for row in spec.evaluation.expected:
        get_evaluators(get_task(task), spec, [row.protocol])
        quoted = [(metric, value) for metric, value, source in rows if row.source.startswith(source)]
        assert (METRICS[row.metric], row.value) in quoted


def test_the_headline_of_the_papers_is_expected():
    assert ("imagenet", "raev2-dinov3l-k7") in STATED
