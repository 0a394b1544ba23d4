"""What is around the networks: reading pictures, the Fréchet distance, starting a command."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raev2.batch import Measurement
from raev2.data import FolderDataset, train_batches
from raev2.eval.distances import FrechetTo, Moments, moments_distance
from raev2.files.artefact import write_json
from raev2.files.manifest import FORMAT_VERSION
from raev2.sampler import noise_for
from raev2_tasks.bench.measure import Outputs, Setting, Work

PICTURES = 16
START = """
import shutil, sys
from pathlib import Path
from raev2.command.cli import main
file, *words = sys.argv[1:]
code = main(words)
if Path("/proc/self/status").exists():
    shutil.copyfile("/proc/self/status", file)
sys.exit(code)
"""
COMMANDS = {"--version": ["--version"], "recipes": ["recipes"], "show": ["show", "quickstart", "--task", "imagenet"]}


def loader(setting: Setting) -> Iterator[Work]:
    """JPEGs of 500 x 375 pixels to squares, in this process; batches of two worker processes."""
    with tempfile.TemporaryDirectory() as folder:
        _write_pictures(Path(folder))
        for side in (256, 64):
            make = partial(_read, folder, side)
            yield Work(f"JPEG 500 x 375 to {side} px", PICTURES, "images", FolderDataset, make)
        if setting.clock is time.perf_counter:  # the CPU seconds of a process are not those of its workers
            yield Work("to 64 px, two workers", PICTURES, "images", FolderDataset, partial(_read_in_workers, folder))


def _read(folder: str, side: int, dataset_type: Any) -> Callable[[], Outputs]:
    dataset = dataset_type(folder, "train", (side, side))
    return lambda: [dataset.image(index).float() for index in range(PICTURES)]


def _read_in_workers(folder: str, dataset_type: Any) -> Callable[[], Outputs]:
    batches = train_batches(dataset_type(folder, "train", (64, 64)), batch_size=PICTURES, seed=0, num_workers=2)
    return lambda: [next(batches)[0].images[:0].float()]


def _write_pictures(folder: Path) -> None:
    """Smooth colours with some noise, which compress like photographs."""
    rng, names = np.random.default_rng(0), [f"{number}.jpg" for number in range(PICTURES)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 8, (375, 500, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=90)
    (folder / "train.jsonl").write_text("".join(json.dumps({"file": name}) + "\n" for name in names))
    splits = {"train": {"index": "train.jsonl", "num_samples": PICTURES}}
    manifest = {"format_version": FORMAT_VERSION, "splits": splits, "classes": [], "fingerprint": "none"}
    write_json(folder / "manifest.json", manifest)


def frechet(setting: Setting) -> Iterator[Work]:
    """A Fréchet distance with the decomposition of its reference, and its standard error without."""
    size = 512 if setting.size == "small" else 2048
    scales = torch.linspace(0.1, 1, size)
    features, others = (noise_for(0, [i], (2 * size, size))[0] * scales for i in range(2))

    def distance(parts: Any) -> Callable[[], Outputs]:
        moments, distance = parts
        first, second = moments.of(features), moments.of(others)
        return lambda: [torch.tensor(distance(first, second))]

    yield Work(f"distance, {size} features", 1, "distances", (Moments, moments_distance), distance)

    def error(parts: Any) -> Callable[[], Outputs]:
        moments, to = parts
        reference = to(moments.of(others))
        return lambda: [torch.tensor(reference.stderr(features))]

    yield Work(f"standard error, {size} features", 1, "errors", (Moments, FrechetTo), error)


def startup(setting: Setting) -> Iterator[Measurement]:
    """CPU seconds and memory of commands that start nothing."""
    for name, words in COMMANDS.items():
        found = [_start(words) for _ in range(min(setting.rounds, 3) + 1)][1:]  # the first one reads from disk
        note = f"{max(memory for _, memory in found):.2f} GiB"
        yield Measurement(f"raev2 {name}", statistics.median(seconds for seconds, _ in found), "CPU s", note)


def _start(words: list[str]) -> tuple[float, float]:
    """CPU seconds and peak GiB of a command, which tells its peak itself: its parent is told the larger of both."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as status:
        command = [sys.executable, "-c", START, status.name, *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        assert process.returncode == 0, words
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read())
    return usage.ru_utime + usage.ru_stime, int(peak[1]) / 2**20 if peak else math.nan
