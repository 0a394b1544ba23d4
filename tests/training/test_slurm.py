"""Slurm: processes that `srun` starts without torchrun find each other, and the job script of the docs requeues."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raev2.command.cli import RESUMABLE, parse
from raev2.errors import SpecError
from raev2.spec_io import apply_overrides
from raev2.task import get_recipe, get_task
from raev2.training import dist

PAGE = Path(__file__).parents[2] / "docs/how_to/scale.md"
STEP = {"SLURM_JOB_ID": "8200", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}
SCRIPT = """
import sys
from pathlib import Path
from raev2.training import dist
from raev2.training.run import make_accelerator

make_accelerator("fp32")
Path(sys.argv[1], str(dist.rank())).write_text(str(dist.gather_objects(dist.rank() * 10)))
"""


def outside() -> dict[str, str]:
    """The environment without what a launcher or a job would have set."""
    launcher = ("SLURM_", "ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(launcher)}


def read(monkeypatch, **step: str) -> dict[str, str]:
    """The environment after `read_environment` found a step of a job."""
    environment = {**STEP, "SLURM_STEP_NODELIST": "n1,n2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", **step}
    monkeypatch.setattr(os, "environ", environment)
    dist.read_environment()
    return environment


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("a,b[1-2]", "a"), ("gpu[003-010,012],x1", "gpu003"), ("rack[1-2]n[07,09]-ib,x", "rack1n07-ib")],
)
def test_the_first_node_of_a_step_is_where_all_meet(monkeypatch, nodes, first):
    found = read(monkeypatch, SLURM_STEP_NODELIST=nodes)
    assert found["MASTER_ADDR"] == first
    assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["9", "16", "1", "8"]
    assert found["MASTER_PORT"] == str(61440 + 8200 - 2 * 4096)


def test_what_torchrun_or_the_user_said_stays(monkeypatch):
    assert "MASTER_ADDR" not in read(monkeypatch, RANK="3")
    assert read(monkeypatch, MASTER_ADDR="here")["MASTER_ADDR"] == "here"
    assert "RANK" not in read(monkeypatch, SLURM_STEP_NUM_TASKS="1"), "one process needs no others"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(SpecError, match="processes: more than GPUs on this machine; got 8; expected at most 4"):
        read(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert read(monkeypatch)["LOCAL_WORLD_SIZE"] == "8", "each process sees the one that Slurm gave it"
    with pytest.raises(SpecError, match="got 8; expected at most 1"):
        read(monkeypatch, RANK="0", LOCAL_WORLD_SIZE="8", TORCHELASTIC_RUN_ID="none")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert read(monkeypatch)["LOCAL_WORLD_SIZE"] == "8", "on CPUs"


def test_two_processes_of_a_step_work_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**outside(), **step, "SLURM_PROCID": n, "SLURM_LOCALID": n, "MASTER_PORT": port,
                 "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        for n in ("0", "1")
    ]  # fmt: skip
    assert [process.wait(timeout=600) for process in started] == [0, 0]
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"0": "[0, 10]", "1": "[0, 10]"}


def job(tmp_path: Path, code: int) -> tuple[int, list[str], str]:
    """The job script of the docs with a Slurm that ends with `code`: (its code, what it started, what it requeued)."""
    script = next(block for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S) if "#SBATCH" in block)
    for name, does in (("srun", f'printf "%s\\n" "$@" > srun; exit {code}'), ("scontrol", 'echo "$@" > scontrol')):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**outside(), "SLURM_JOB_ID": "7", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", "-eu", "-c", script], env=environment, cwd=tmp_path, check=False).returncode
    requeued = tmp_path / "scontrol"
    return ended, (tmp_path / "srun").read_text().splitlines(), requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize(("code", "ends", "requeued"), [(RESUMABLE, 0, "requeue 7\n"), (0, 0, ""), (3, 3, "")])
def test_the_job_of_the_docs_requeues_what_is_not_finished_and_nothing_else(tmp_path, code, ends, requeued):
    ended, started, found = job(tmp_path, code)
    assert (ended, found) == (ends, requeued)
    assert started[0] == "raev2"
    options = parse(started[1:])
    apply_overrides(get_recipe(get_task(options.task), options.recipe), options.overrides)
