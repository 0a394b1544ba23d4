"""Several processes: one that works for long is waited for, an error or a kill of one ends all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raev2.errors import CheckpointError
from raev2.training import dist

SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
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
    print(f"{rank}: {error}", flush=True)
dist.barrier()
print(f"waits from {time.time()}", flush=True)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], float]:
    """What two processes of the script said, and when they had ended."""
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)
    return result, time.time()


def test_the_main_process_is_waited_for_longer_than_the_timeout_of_tensors(ended):
    assert "built" not in ended[0].stderr and "waits from" in ended[0].stdout, ended[0].stderr[-2000:]


def test_an_error_of_one_process_is_raised_on_all_with_its_message(ended):
    said = [line for line in ended[0].stdout.splitlines() if "data x" in line]
    assert sorted(said) == [f"{rank}: data x: cannot be read; got rubbish" for rank in (0, 1)]


def test_the_others_end_soon_after_one_was_killed(ended):
    result, end = ended
    killed = max(float(line.rpartition(" ")[2]) for line in result.stdout.splitlines() if line.startswith("waits"))
    assert result.returncode != 0 and end - killed < 30


def test_one_process_is_together_with_itself(tmp_path: Path):
    with pytest.raises(CheckpointError, match="x: y"), dist.together():
        raise CheckpointError("x", "y")
    assert dist.on_main(lambda: 3) == 3
