"""`raev2 selftest`: a tiny training, broken in every way we know; it must go on as if nothing had happened.

Every start of `raev2 train` is a process of its own, which sees its file operations through an audit hook. At the first
one that no start before it had trouble with, it is killed, or at the next start fails; so one run is broken everywhere,
goes on each time from what is left, and must end with the files of a run that was left alone, bit for bit.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from raev2.task import get_recipe, get_task, usable_tasks
from raev2.training.checkpoint import list_checkpoints

Main = Callable[[list[str]], int]
Row = tuple[str, str, int | None, str]  # fault, where, exit code, verdict
RECIPE, FAILED = "selftest", "FAILED"
NONE, KILL, FULL, BROKEN, LIMIT = "none", "kill", "disk full", "I/O error", "file too large"
ERRORS = {FULL: errno.ENOSPC, BROKEN: errno.EIO}
CODES = {NONE: (0,), KILL: (-signal.SIGKILL,), FULL: (6,), LIMIT: (6,), BROKEN: (0, 4, 6)}  # 0: a file not needed
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
ENDS = {f"mkdir .{stage}.partial": stage for stage in ("tokenizer", "generator")}  # trained, and not yet an artefact
MOMENTARY = ("time", "images_per_s", "data_wait")  # of a log line
QUICK = (  # after a file that is too large: a fault of each kind, at points that every run comes to in this order
    (KILL, "mkdir .tokenizer.partial"),
    (FULL, "write .generator.partial/.config.json.partial"),
    (BROKEN, "read checkpoints/generator/N/MANIFEST.json"),
    (NONE, ""),
)
LARGER_THAN_THE_OUTPUT, PATIENCE_S = 16_384, 600.0
PROCESSES = multiprocessing.get_context("forkserver")  # imports everything once; a start is a fork of it
PROCESSES.set_forkserver_preload(["raev2.pipeline", "raev2_tasks.report.page", "raev2.command.actions"])


@dataclass
class Plan:
    """What a start meets.

    known   faults so far at each point, a file operation with numbers left out: the first that had less than two is
            met; None: only the one of `at`
    at      a fault, and its point
    size    bytes that a file may have; 0: no limit
    """

    known: dict[str, int] | None = None
    at: tuple[str, str] = (NONE, "")
    size: int = 0


class Hook:
    """An audit hook that commits one fault by its plan, and notes it: [fault, point]."""

    def __init__(self, plan: Plan, run: Path, notes: Path) -> None:
        self.plan, self.run, self.notes, self.met = plan, f"{run}/", notes, False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Python calls it before each operation."""
        path = str(args[event == "os.rename"]) if event in ("open", *CHANGES) else ""
        if self.met or not path.startswith(self.run):
            return
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        operation = ("write" if writes else "read") if event == "open" else event.rpartition(".")[2]
        point = f"{operation} {re.sub(r'[0-9a-f]{9,}', 'N', path.removeprefix(self.run))}"
        kind, at = self.plan.at
        known = 2 if self.plan.known is None else self.plan.known.get(point, 0)
        if point == at or known < 2:
            self.met = True
            error = BROKEN if operation == "read" else FULL
            self.commit(kind if point == at else KILL if known == 0 else error, point)

    def commit(self, kind: str, point: str) -> None:
        """Die, or fail."""
        with self.notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, point]) + "\n")
        if kind == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]), point)


def _process(main: Main, argv: list[str], output: Path, size: int, hook: Hook) -> None:
    """A start of `raev2 train`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    if size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.addaudithook(hook)
    sys.exit(main(argv))


class Trainings:
    """Starts the recipe `selftest` of a task again and again, and says in rows what became of it."""

    def __init__(self, main: Main, task: str, work: Path, seed: int) -> None:
        self.main, self.rng, self.known = main, random.Random(seed), dict[str, int]()
        self.run, self.whole, self.output, self.notes = (work / name for name in ("run", "whole", "output", "notes"))
        self.argv = ["train", "--task", task, "--recipe", RECIPE, "--set", f"data.dir={work / 'data'}", "--run"]

    def rows(self, quick: bool, kills: int) -> Iterator[Row]:
        """The table: every fault, one of each kind, or kills at random moments."""
        yield self.start(Plan(), self.whole)
        if kills:
            started = time.monotonic()
            yield self.start(Plan())
            yield from self.random_kills(kills, time.monotonic() - started)
            return
        sizes = [n for file in self.whole.rglob("*.safetensors") if (n := file.stat().st_size) > LARGER_THAN_THE_OUTPUT]
        for size in [max(sizes)] if quick else sorted(set(sizes)):
            yield self.start(Plan(size=size - 1))
        if not quick:
            shutil.rmtree(self.run, ignore_errors=True)
        for plan in [Plan(at=at) for at in QUICK] if quick else repeat(Plan(self.known)):
            fault, where, *_ = row = self.start(plan)
            yield row
            if fault == KILL and where in ENDS:
                yield from islice(self.damages(where), *((2, 4) if quick else (None,)))  # of its weights
            if fault == NONE:
                return

    def start(self, plan: Plan, run: Path | None = None, patience_s: float = PATIENCE_S) -> Row:
        """A process that meets its plan, and is killed when the time is over."""
        run = run or self.run
        self.notes.write_text("", encoding="utf-8")
        arguments = (self.main, [*self.argv, str(run)], self.output, plan.size, Hook(plan, run, self.notes))
        process = PROCESSES.Process(target=_process, args=arguments)
        process.start()
        process.join(patience_s)
        fault, where = (LIMIT, f"beyond {plan.size:,} bytes") if plan.size else (NONE, "to the end")
        if process.exitcode is None:
            process.kill()
            process.join()
            if process.exitcode != 0:  # it was done just before
                fault, where = KILL, last_step(run)
        for kind, point in map(json.loads, self.notes.read_text(encoding="utf-8").splitlines()):
            self.known[point] = self.known.get(point, 0) + 1
            fault, where = kind, point
        return fault, where, process.exitcode, self.verdict(run, fault, process.exitcode)

    def damages(self, end: str) -> Iterator[Row]:
        """The last checkpoint of the stage that was killed at its end is damaged, one file after the other."""
        for file in sorted(list_checkpoints(self.whole / "checkpoints" / ENDS[end])[-1].iterdir()):
            for kind in ("truncated", "bit flipped"):
                name, data = file.relative_to(self.whole), bytearray(file.read_bytes())
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                (self.run / name).write_bytes(data[: len(data) // 2] if kind == "truncated" else data)
                yield kind, str(name), *self.start(Plan(at=(KILL, end)))[2:]

    def random_kills(self, kills: int, seconds: float) -> Iterator[Row]:
        """Each within `seconds` of a start. A run that gets to its end is compared, and another one begins."""
        shutil.rmtree(self.run)
        while kills:
            row = self.start(Plan(), patience_s=self.rng.uniform(0, seconds))
            yield row
            if row[0] == KILL:
                kills -= 1
            else:
                shutil.rmtree(self.run)
        yield self.start(Plan())

    def verdict(self, run: Path, fault: str, code: int | None) -> str:
        """Compare with the run that was left alone: all of it, or the weights and pictures that are there already."""
        output = self.output.read_text(encoding="utf-8", errors="replace") if self.output.is_file() else ""
        if code not in CODES[fault] or "Traceback" in output:
            return f"{FAILED}: {(output.splitlines() or ['no output'])[-1]}"
        different = differences(run, self.whole, to_the_end=fault == NONE)
        return (
            f"{FAILED}: other {', '.join(different[:3])}"
            if different
            else "identical"
            if fault == NONE
            else "as before"
        )


def differences(run: Path, whole: Path, to_the_end: bool) -> list[str]:
    """Names of what two runs have otherwise: weights, states and pictures bit for bit, logs and results by value.

    Before the end only weights and pictures that both have, and that no later evaluation replaces. A checkpoint too
    many is no loss.
    """
    found, expected = _contents(run, to_the_end), _contents(whole, to_the_end)
    both = {name for name in expected.keys() & found.keys() if not name.startswith("eval/")}
    more = {name for name in found if not name.startswith("checkpoints/")}
    names = expected.keys() | more if to_the_end else both
    return sorted(name for name in names if found.get(name) != expected.get(name))


def _contents(run: Path, results: bool) -> dict[str, Any]:
    files = [file for file in run.rglob("*") if file.suffix in (".safetensors", ".png")]
    contents: dict[str, Any] = {str(file.relative_to(run)): file.read_bytes() for file in files}
    if results:
        for file in (run / "eval").glob("*.json"):
            contents[f"eval/{file.name}"] = json.loads(file.read_text(encoding="utf-8"))["results"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [json.dumps({k: v for k, v in line.items() if k not in MOMENTARY}) for line in lines]
        contents["metrics.jsonl"] = (
            set(steps),
            sum(line["kind"] == "train" for line in lines),
        )  # an eval may be repeated
    return contents


def last_step(run: Path) -> str:
    """The last step in the log of a run."""
    log = run / "metrics.jsonl"
    steps = re.findall(
        r'"stage": "(\w+)".*"images": (\d+).*\n', log.read_text(encoding="utf-8") if log.is_file() else ""
    )
    return "{}, {} images".format(*steps[-1]) if steps else "before the first step"


def run(options: Namespace, main: Main) -> int:
    """The whole command: 0, or 1 when something was lost."""
    tasks = [get_task(options.task)] if options.task else [task for task in usable_tasks() if RECIPE in task.recipes()]
    count: Counter[str] = Counter()
    for task in tasks:
        get_recipe(task, RECIPE)
        with tempfile.TemporaryDirectory(prefix="raev2-selftest-") as work:
            trainings = Trainings(main, task.name, Path(work).resolve(), options.seed)
            for fault, where, code, verdict in trainings.rows(options.quick, options.kills):
                print(f"{task.name:<10}{fault:<16}{where:<72} exit {code!s:<4} {verdict}", flush=True)
                count.update([fault, *[FAILED] * verdict.startswith(FAILED)])
    print(", ".join(f"{name}: {number}" for name, number in count.items()))
    return int(FAILED in count)
