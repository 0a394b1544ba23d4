"""Several processes: one that works for long is waited for, an error or a kill of one ends all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from raev2.errors import CheckpointError
from raev2.training import dist

SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as torch_dist
from raev2.errors import DataError
from raev2.training import dist

torch_dist.init_process_group("gloo", timeout=timedelta(seconds=2))
rank = dist.rank()
assert dist.on_main(lambda: time.sleep(4) or "built") == "built"
assert dist.any_process(rank == 1) and not dist.any_process(False)
try:
    with dist.together():
        if rank == 1:
            raise DataError("data x", "cannot be read", got="rubbish")
except DataError as error:
    said = str(error)
dist.barrier()
Path(sys.argv[1], f"said.{rank}").write_text(f"{said} @{time.time()}")
dist.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
"""


class Ended(NamedTuple):
    """Two processes of the script after their end."""

    code: int
    log: str
    at: float
    said: list[str]  # by process: the error that it caught
    waited_from: list[float]  # by process: the time just before the kill


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Ended:
    """Each process writes a file of its own: lines of two processes in one stream can be mixed."""
    folder = tmp_path_factory.mktemp("script")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)
    at = time.time()
    files = [folder / f"said.{rank}" for rank in (0, 1)]
    assert all(file.exists() for file in files), result.stderr[-2000:]
    said, waited_from = zip(*(file.read_text().split(" @") for file in files), strict=True)
    return Ended(result.returncode, result.stderr, at, list(said), [float(text) for text in waited_from])


def test_the_main_process_is_waited_for_longer_than_the_timeout_of_tensors(ended):
    assert "built" not in ended.log and len(ended.waited_from) == 2, ended.log[-2000:]


def test_an_error_of_one_process_is_raised_on_all_with_its_message(ended):
    assert ended.said == ["data x: cannot be read; got rubbish"] * 2


def test_the_others_end_soon_after_one_was_killed(ended):
    assert ended.code != 0 and ended.at - max(ended.waited_from) < 30


def test_one_process_is_together_with_itself(tmp_path: Path):
    with pytest.raises(CheckpointError, match="x: y"), dist.together():
        raise CheckpointError("x", "y")
    assert dist.on_main(lambda: 3) == 3
