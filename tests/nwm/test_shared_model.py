"""A navigation model as one repository: the commands of the task take its folder and its hub id as they take a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raev2 import Pipeline
from raev2.command.cli import main

PLAN = (
    "--goals",
    "1",
    "--seconds",
    "0.5",
    "--set",
    "sampler.iterations=1",
    "--set",
    "sampler.population=4",
    "--set",
    "sampler.elites=2",
)


@pytest.fixture(scope="module")
def saved(tiny_nwm_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as a pipeline folder. Read only."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    return Pipeline.from_pretrained(tiny_nwm_run, device="cpu").save_pretrained(folder, licence="cc-by-4.0")


def what_was_done(out: Path) -> tuple[bytes, dict]:
    """The predicted frames of a rollout, and the goals of a plan with all errors."""
    return (out / "rollout/sheet.png").read_bytes(), json.loads((out / "plans/0.5s.json").read_text())["goals"]


def test_rollout_plan_and_drive_take_a_pipeline_and_a_hub_id(
    tiny_nwm_run, saved, world, hub, elsewhere, tmp_path, capsys
):
    def commands(run: object, out: Path) -> list[list[str]]:
        of = ["--run", str(run), "--data", str(world), "--out"]
        return [["nwm", "rollout", *of, str(out / "rollout"), "--seconds", "0.5"],
                ["nwm", "plan", *of, str(out / "plans"), *PLAN]]  # fmt: skip

    for run, name in ((tiny_nwm_run, "run"), (saved, "folder")):
        assert [main(line) for line in commands(run, tmp_path / name)] == [0, 0]
    Pipeline.from_pretrained(saved).push_to_hub("lab/tiny")
    printed = elsewhere(f"""
import numpy as np
from raev2_tasks.nwm.drive import page
def serve(make_worlds, *_):
    world, _ = make_worlds()
    world.reset(0)
    print("drove", world.step(np.array([0.2, 0, 0]), 0.5).shape)
page.serve = serve
lines = {commands("lab/tiny", tmp_path / "hub")!r} + [["nwm", "drive", "--run", "lab/tiny", "--data", {str(world)!r}]]
print("exit codes", [main(line) for line in lines])
""")
    assert "drove (64, 64, 3)" in printed and "exit codes [0, 0, 0]" in printed
    expected = what_was_done(tmp_path / "run")
    assert expected == what_was_done(tmp_path / "folder") == what_was_done(tmp_path / "hub")
