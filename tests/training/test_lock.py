"""One process writes a folder: who holds the lock, and when it is stale."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from raev2 import pipeline
from raev2.command.cli import main
from raev2.files.manifest import read_manifest
from raev2.task import get_data_recipe
from raev2.training import lock
from raev2.training.lock import STALE_S, BusyError, folder_lock


def write_lock(folder, host: str, pid: int, age_s: float = 0.0) -> None:
    file = folder / ".run.lock"
    file.write_text(json.dumps({"host": host, "pid": pid}))
    os.utime(file, (time.time() - age_s,) * 2)


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    return subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    ).stdout


def test_the_lock_says_who_holds_it_and_goes_with_him(tmp_path):
    with folder_lock(tmp_path / "deep" / "run"):
        holder = json.loads((tmp_path / "deep" / ".run.lock").read_text())
        assert holder == {"host": socket.gethostname(), "pid": os.getpid()}
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path / "run"):
        raise KeyboardInterrupt
    assert not (tmp_path / ".run.lock").exists()


@pytest.mark.parametrize("age_s", [0.0, 10 * STALE_S])
def test_a_process_that_runs_here_holds_its_lock(tiny_spec, tmp_path, age_s):
    """However long it is silent: it may be suspended."""
    write_lock(tmp_path, socket.gethostname(), os.getppid(), age_s)
    with pytest.raises(BusyError) as caught:
        pipeline.train(tiny_spec, tmp_path / "run")
    message, _, ending = str(caught.value).partition(" s ago")
    who = f"got process {os.getppid()} on {socket.gethostname()}, heard of "
    assert message.startswith(f"{tmp_path / '.run.lock'}: another process writes this folder; {who}")
    assert int(message.rpartition(" ")[2]) >= age_s
    assert ending == ". Wait for it or stop it; delete this file if it does not run."
    assert not (tmp_path / "run").exists() and (tmp_path / ".run.lock").exists()


def test_a_process_elsewhere_holds_its_lock_while_its_heart_beats(tmp_path):
    write_lock(tmp_path, "elsewhere", 1, STALE_S / 2)
    with (
        pytest.raises(BusyError, match=r"got process 1 on elsewhere, heard of 3\d\d s ago"),
        folder_lock(tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "who", "age_s"), [("here", "gone", 0), ("here", "self", 0), ("elsewhere", "gone", 2 * STALE_S)]
)
def test_a_stale_lock_is_taken_over_with_a_line(tmp_path, caplog, gone, host, who, age_s):
    """Our own number is left from before a restart, as in a container."""
    pid = int(gone) if who == "gone" else os.getpid()
    host = socket.gethostname() if host == "here" else host
    write_lock(tmp_path, host, pid, age_s)
    with folder_lock(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()
    assert caplog.messages == [f"{tmp_path / '.run.lock'}: taken over, process {pid} on {host} is gone"]
    assert not (tmp_path / ".run.lock").exists()


def test_a_lock_that_was_cut_short_becomes_stale(tmp_path):
    (tmp_path / ".run.lock").write_text('{"host": "els')
    with pytest.raises(BusyError, match="got process 0 on an unknown host"), folder_lock(tmp_path / "run"):
        pass
    os.utime(tmp_path / ".run.lock", (0, 0))
    with folder_lock(tmp_path / "run"):
        pass


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with folder_lock(tmp_path / "run"):
        os.utime(tmp_path / ".run.lock", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / ".run.lock").stat().st_mtime < 1000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / ".run.lock").stat().st_mtime > 1000


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["raev2.training.lock"])


def try_to_take(run, gone, meeting, results, done) -> None:
    """Both processes find the holder gone at the same moment, where nothing keeps them from it."""
    alive = lock._is_alive

    def find_out(pid: int) -> bool:
        if pid == gone:
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(timeout=1)
        return alive(pid)

    lock._is_alive = find_out
    try:
        with folder_lock(run):
            results.put("taken")
            done.wait()
    except BusyError as error:
        results.put(str(error))
        done.wait()


def test_of_two_processes_that_find_the_same_stale_lock_one_takes_it_over(tmp_path, gone):
    write_lock(tmp_path, socket.gethostname(), int(gone))
    meeting, done, results = PROCESSES.Barrier(2), PROCESSES.Barrier(2, timeout=60), PROCESSES.Queue()
    arguments = (tmp_path / "run", int(gone), meeting, results, done)
    both = [PROCESSES.Process(target=try_to_take, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    found = sorted(results.get(timeout=60) for _ in both)
    for process in both:
        process.join(60)
    assert found[1] == "taken" and "another process writes this folder; got process" in found[0]
    assert not (tmp_path / ".run.lock").exists()


def test_a_lock_without_a_name_in_it_is_free(tmp_path):
    """Its process was killed before it wrote one."""
    (tmp_path / ".run.lock").write_text("")
    with folder_lock(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()


def build_slowly(folder, begun, go_on) -> None:
    recipe = get_data_recipe("synthetic")
    write = recipe.write

    def slow(*args):
        begun.set()
        assert go_on.wait(60)
        return write(*args)

    recipe.write = slow
    recipe.build(folder, {"num_train": "4", "num_val": "2"})


@pytest.fixture
def building(tmp_path):
    """A process that builds the folder `data`, and what lets it go on."""
    begun, go_on = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=build_slowly, args=(tmp_path / "data", begun, go_on))
    process.start()
    assert begun.wait(60)
    yield process, go_on
    go_on.set()
    process.join(60)
    assert process.exitcode == 0 and [file.name for file in tmp_path.iterdir()] == ["data"]
    assert read_manifest(tmp_path / "data")["splits"]["train"]["num_samples"] == 4


def test_a_data_set_that_another_process_builds_is_left_alone(building, tmp_path, capsys):
    assert main(["data", "build", "synthetic", "--out", str(tmp_path / "data")]) == 6
    assert "data.lock: another process writes this folder; got process" in capsys.readouterr().err
    assert (tmp_path / "data.partial").is_dir()


def test_a_training_waits_for_its_data_where_another_one_builds_it(building, tiny_spec, tmp_path, monkeypatch, caplog):
    """Such as three seeds that are started at once."""
    caplog.set_level("INFO")
    monkeypatch.setattr(pipeline.time, "sleep", lambda seconds: building[1].set())
    data = tiny_spec.data.replace(dir=str(tmp_path / "data"), recipe="synthetic")
    pipeline.prepare_data(tiny_spec.replace(data=data))
    assert any("waiting: " in line and "another process writes this folder" in line for line in caplog.messages)
