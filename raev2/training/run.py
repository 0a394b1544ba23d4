"""A run: its folder, its log, its processes and its random numbers. Shared by the two training loops.

    run = open_run("runs/TASK/NAME", spec)
    run.log(stage="generator", kind="train", images=128, step=1, loss=1.2)

The folder is described in docs/conventions.md#run-folder. Opening an existing folder with the same spec continues it.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raev2.batch import Batch
from raev2.data import STOP_SIGNALS, ImageDataset, derived_seed, train_batches
from raev2.errors import CheckpointError, SpecError
from raev2.files.artefact import load_strict, write_json
from raev2.files.damage import json_lines, read_json
from raev2.files.replace import RUN, check_replaceable, new_folder, write_text
from raev2.nn import autocast
from raev2.spec import LoopSpec, RunSpec
from raev2.spec_io import fingerprint, load_spec, save_spec, spec_differences, spec_values
from raev2.training import dist
from raev2.training.checkpoint import (
    Checkpoint,
    all_finite,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from raev2.training.ema import EMA
from raev2.training.health import Health, distance
from raev2.training.optim import learning_rate
from raev2.training.parallel import for_main, shard_like, whole
from raev2.training.tracker import Tracker

logger = logging.getLogger(__name__)
Look = Callable[[int], None]  # images seen ->
MAX_NON_FINITE_STEPS = 20


@dataclass
class Run:
    """A run folder opened by this process.

    accelerator   holds device and process group
    commits       of the hub repositories that it reads, by source
    """

    dir: Path
    spec: RunSpec
    accelerator: Accelerator
    commits: Mapping[str, str] = field(default_factory=dict)
    tracker: Tracker | None = None
    other_device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Device of this process, or another one that was asked for."""
        return self.other_device or self.accelerator.device

    def autocast(self) -> torch.autocast:
        """Inside, networks compute in the precision of the run. (Accelerate has one precision per process.)"""
        return autocast(self.spec.precision, self.device)

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl (main process only)."""
        if dist.is_main():
            with (self.dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
            if self.tracker:
                self.tracker.log(values)

    def close(self) -> None:
        """Finish with the tracker."""
        if self.tracker:
            self.tracker.close()

    def history(self, **match: Any) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl whose fields equal `match`."""
        return [line for line in self._lines() if all(line.get(name) == value for name, value in match.items())]

    def best_images(self, stage: str, metric: str | None) -> int | None:
        """Images seen at the best evaluation in the log; SpecError where evaluations have no such metric."""
        lines = self.history(stage=stage, kind="eval") if metric else []
        values = {line["images"]: line["metrics"][metric] for line in lines if metric in line["metrics"]}
        if lines and not values:
            names = ", ".join(sorted({name for line in lines for name in line["metrics"]}))
            raise SpecError(
                f"spec.{stage}_training.keep_best", "no number of the evaluations in training", got=metric,
                expected=f"one of {names}",
            )  # fmt: skip
        best = max if any(line.get("better", {}).get(metric) == "higher" for line in lines) else min
        return best(values, key=values.__getitem__) if values else None

    def forget_after(self, stage: str, images: int) -> None:
        """Drop log lines of a stage past `images` (0: all of them): a resumed run writes them again."""
        file = self.dir / "metrics.jsonl"
        if dist.is_main() and file.is_file():
            last = images if images > 0 else -1
            kept = [line for line in self._lines() if line.get("stage") != stage or line.get("images", 0) <= last]
            write_text(file, "".join(json.dumps(line) + "\n" for line in kept))

    def _lines(self) -> list[dict[str, Any]]:
        return [line for line in json_lines(self.dir / "metrics.jsonl") if line]


def open_run(dir: str | Path, spec: RunSpec, *, resume: bool = True, overwrite: bool = False) -> Run:
    """Create a run folder, or continue one that was written with the same spec.

    Raises CheckpointError if the folder belongs to another spec, or exists and `resume` is off; FileError if something
    else is in it, or with `overwrite` what the new run needs.
    """
    dir = Path(dir)
    accelerator = make_accelerator(spec.precision)
    with dist.together():
        if dist.is_main():
            if (dir / "spec.yaml").is_file() and not overwrite:
                _check_continues(dir, load_spec(dir / "spec.yaml"), spec, resume)
                save_spec(spec, dir / "spec.yaml")
            else:
                check_replaceable(dir, RUN, needed=spec_values(spec))
                with new_folder(dir, RUN) as new:
                    save_spec(spec, new / "spec.yaml")
                    write_json(new / "provenance.json", provenance(spec, accelerator.device))
    tracker = Tracker(dir, spec) if spec.tracker and dist.is_main() else None
    return Run(dir, spec, accelerator, tracker=tracker)


def newest_run(task_name: str, root: Path = Path("runs")) -> Path:
    """The run folder of a task that was written to last."""
    runs = [file.parent for file in (root / task_name).glob("*/spec.yaml")]
    if not runs:
        raise CheckpointError(
            f"{root / task_name}", "no run of this task yet", hint=f"Start one with `raev2 train --task {task_name}`."
        )
    return max(runs, key=lambda run: max(file.stat().st_mtime for file in run.iterdir()))


def make_accelerator(precision: str) -> Accelerator:
    """Device and processes; 'fp32' also switches TF32 off. Autocast is `Run.autocast`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    dist.read_environment()
    return Accelerator(mixed_precision="no")


def provenance(spec: RunSpec, device: torch.device) -> dict[str, Any]:
    """Versions, revision, machine and command line, for provenance.json."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "spec_fingerprint": fingerprint(spec),
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "processes": dist.world_size(),
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that numbers may depend on; None: not installed."""
    packages = (
        "raev2", "torch", "torchvision", "timm", "transformers", "accelerate", "torchmetrics", "torch-fidelity",
        "numpy", "pillow",
    )  # fmt: skip
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def add_provenance(run: Run, name: str, value: Any) -> None:
    """Add one entry to provenance.json, such as the dataset once it is open."""
    if dist.is_main():
        file = run.dir / "provenance.json"
        write_json(file, {**read_json(file), name: value})


def step_generator(device: torch.device, seed: int, stage: str, images: int) -> torch.Generator:
    """Random numbers of one step: a generator seeded by a hash of (seed, stage, images seen), equal on all processes.

    A training step draws for the whole global batch and keeps its own rows (`dist.own_rows`), so no number of processes
    and no `micro_batch_size` changes what a sample gets.
    """
    return torch.Generator(device).manual_seed(derived_seed(seed, stage, 0, images))


class StopSignal:
    """True after one of `STOP_SIGNALS`; the loops then save and return. A second Ctrl-C stops at once.

    at_once   raise Stopped instead, where there is no loop that saves
    """

    def __init__(self, at_once: bool = False) -> None:
        self.received, self.at_once = False, at_once

    def __bool__(self) -> bool:
        return dist.any_process(self.received)

    def __enter__(self) -> StopSignal:
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        self._old = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.at_once:
            raise Stopped(f"stopped by {signal.Signals(number).name}")
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


class Stopped(KeyboardInterrupt):
    """Training was asked to stop; what it needs to go on is saved."""


@contextmanager
def memory_field(field: str, value: int) -> Iterator[None]:
    """Inside, memory that runs out is an error that names the field to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        less = value // 2
        raise SpecError(
            f"spec.{field}", "out of memory", got=value, expected=f"at most {less}" if less else "room for one image",
            hint=f"Add --set {field}={less}; it changes speed, not results."
            if less else "See what else takes less memory in docs/how_to/scale.md.",
        ) from error  # fmt: skip


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float, bool]]:
    """Parts of at most `size` samples, each with its share of the batch and whether it is the last one.

    The sum of share * mean loss over the parts has the gradient of the mean loss over the whole batch.
    """
    num = len(batch.key)
    size = size or num
    for start in range(0, num, size):
        rows = slice(start, min(start + size, num))
        cond = {name: value[rows] for name, value in batch.cond.items()}
        part = Batch(batch.images[rows], cond, batch.key[rows])
        yield part, len(part.key) / num, rows.stop == num


def attention_kernels(device: torch.device, num_tokens: int) -> AbstractContextManager[object]:
    """Attention kernels of transformers and timm in stage 1: plain matrix products for short sequences on a CPU.

    Only around forward and backward: the setting is global, and an evaluation in training must compute as one after it.
    The backward of torch's fused CPU kernel takes 5 times as long at 64 tokens, and the same at 256 (measured, bf16).
    """
    plain = device.type == "cpu" and num_tokens <= 128
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], loss: Tensor, clip: float | None) -> float:
    """Clip the gradients and step; returns their norm.

    With a non-finite loss or gradient on any process nothing is changed and the result is nan, so that it never
    reaches weights, averages or optimizer state.
    """
    norm = whole(nn.utils.clip_grad_norm_(parameters, clip if clip is not None else math.inf))
    finite = not dist.any_process(not bool(torch.isfinite(norm + loss.detach())))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm) if finite else math.nan


@dataclass
class TrainingState:
    """What a checkpoint of a stage holds: networks, averaged weights and optimizers. The rest follows from the spec.

    ema          averages of the first of the modules
    best         images of the checkpoint that is kept for its evaluation; `best_every` so many images there is one
    images       seen so far
    """

    run_dir: Path
    stage: str
    modules: Mapping[str, nn.Module]
    ema: EMA
    optimizers: Mapping[str, torch.optim.Optimizer]
    best: Callable[[], int | None] = lambda: None
    best_every: int | None = None
    images: int = 0

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.run_dir / "checkpoints" / self.stage

    def save(self, images: int, keep: int) -> bool:
        """Write a checkpoint (main process), everyone waits for it; nothing is written while a value is not finite."""
        if not self.finite():
            logger.warning("%s: weights are not finite after %d images, no checkpoint", self.stage, images)
            return False
        tensors = {stem: for_main(part) for stem, part in self._tensors().items()}
        with dist.together():
            if dist.is_main():
                save_checkpoint(self.folder, images, Checkpoint(tensors, {}), keep, self.best())
        return True

    def finite(self) -> bool:
        """Whether all of it is finite, on all processes."""
        return not dist.any_process(not all_finite(v for part in self._tensors().values() for v in part.values()))

    def require_finite(self) -> None:
        """Raise CheckpointError before an artefact is made of weights that are not finite."""
        if not self.finite():
            raise CheckpointError(
                str(self.run_dir), f"the weights of the {self.stage} are not finite at the end",
                hint="The last checkpoint is intact. Try a lower learning rate or precision=fp32.",
            )  # fmt: skip

    def restore(self) -> int:
        """Take over the newest checkpoint that is intact, as the main process sees it; images seen, 0 without one."""
        checkpoint = latest_checkpoint(self.folder) if dist.is_main() else None
        path = dist.from_main(checkpoint and checkpoint.path)
        if path is None:
            return 0
        checkpoint = checkpoint or load_checkpoint(path)
        for stem, module in self.modules.items():
            own, read = module.state_dict(), checkpoint.tensors[stem]
            load_strict(module, {n: shard_like(v, own.get(n, v)) for n, v in read.items()}, f"{path}/{stem}")
        for decay in self.ema.decays:
            self.ema.load_state_dict(decay, checkpoint.tensors[f"ema-{decay}"])
        for stem, optimizer in self.optimizers.items():
            optimizer.state.clear()
            load_optimizer_tensors(optimizer, _parameter_names(self.modules), checkpoint.tensors[stem])
        return int(checkpoint.state["images"])

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        names = _parameter_names(self.modules)
        tensors: dict[str, Mapping[str, Tensor]] = {stem: module.state_dict() for stem, module in self.modules.items()}
        tensors |= {f"ema-{decay}": self.ema.state_dict(decay) for decay in self.ema.decays}
        return tensors | {stem: optimizer_tensors(optimizer, names) for stem, optimizer in self.optimizers.items()}


class NonFiniteGuard:
    """Watches for steps that were skipped. After many in a row the last good checkpoint is taken over, with the images
    that follow; when that does not help the run stops. `steady`: the last step was taken, so the state may be saved.
    """

    def __init__(self, run: Run, state: TrainingState) -> None:
        self.run, self.state, self.stage = run, state, state.stage
        self.in_a_row, self.steady, self.went_back_to = 0, True, 0

    def check(self, grad_norm: float, images: int, step: int, keys: Tensor) -> bool:
        """Whether the step was taken; CheckpointError when going back did not help, the last checkpoint is intact."""
        self.steady = math.isfinite(grad_norm)
        if self.steady:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self._log("non_finite", images, step, rank=dist.rank(), keys=keys[:8].tolist())
        logger.warning("%s step %d: loss or gradient is not finite, step skipped", self.stage, step)
        if self.in_a_row >= MAX_NON_FINITE_STEPS:
            self._go_back(images, step)
        return False

    def _go_back(self, images: int, step: int) -> None:
        what = f"{self.in_a_row} steps in a row without a finite loss"
        last = self.state.restore()
        if last == self.went_back_to:  # 0: there is none
            raise CheckpointError(
                str(self.run.dir), f"{what}, stopped at step {step}",
                hint="The last checkpoint is intact. Try a lower learning rate or precision=fp32.",
            )  # fmt: skip
        self.in_a_row, self.went_back_to = 0, last
        self._log("went_back", images, step, to_images=last)
        logger.warning("%s step %d: %s, back to the weights of %d images", self.stage, step, what, last)

    def _log(self, event: str, images: int, step: int, **values: Any) -> None:
        self.run.log(stage=self.stage, kind="event", event=event, images=images, step=step, **values)


def _parameter_names(modules: Mapping[str, nn.Module]) -> dict[Tensor, str]:
    return {p: f"{stem}/{name}" for stem, module in modules.items() for name, p in module.named_parameters()}


class Progress:
    """Status lines: images, loss, rate, data-wait share, time left. One line that moves on a terminal."""

    def __init__(self, stage: str, loop: LoopSpec, start_images: int) -> None:
        self.stage, self.loop, self.start_images = stage, loop, start_images
        self.start = self.last = time.perf_counter()
        self.last_images, self.wait = start_images, 0.0
        self.on_terminal = sys.stderr.isatty()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.wait += time.perf_counter() - start

    def report(self, images: int, **values: float) -> dict[str, float]:
        """Print one status line; returns its rate and data-wait share for the log."""
        now = time.perf_counter()
        rate = (images - self.last_images) / max(now - self.last, 1e-9)
        wait = self.wait / max(now - self.last, 1e-9)
        left = (self.loop.images - images) * (now - self.start) / max(images - self.start_images, 1)
        self.last, self.last_images, self.wait = now, images, 0.0
        if dist.is_main():
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            line = (
                f"{self.stage}  {images:,}/{self.loop.images:,} images  {numbers}  "
                f"{rate:,.0f} images/s  wait {wait:.0%}  left {timedelta(seconds=int(left))}"
            )
            end = "\r" if self.on_terminal and images < self.loop.images else "\n"
            print(f"\x1b[2K{line}" if self.on_terminal else line, end=end, file=sys.stderr, flush=True)
        return {"images_per_s": round(rate, 2), "data_wait": round(wait, 4)}


def crossed(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and after // every > before // every


@dataclass
class Step:
    """One step of a loop: what it computes on, and the terms of its loss.

    batch       samples of this process
    images      seen before it; with `number`, from 0
    rng         random numbers of the global batch; `dist.own_rows` are those of this process
    lr          of the schedule
    size        most samples a forward
    logged      whether it is reported
    values      terms of the loss by name, 'loss' their sum; the loop adds them, and the norm of the gradients
    seen        where it is logged, further numbers for the rules of `Health`
    """

    batch: Batch
    images: int
    number: int
    rng: torch.Generator
    lr: float
    size: int
    logged: bool
    values: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    grad_norm: float = math.nan

    def add(self, share: float, terms: Mapping[str, Tensor | None]) -> None:
        """Count the terms of a part that is this share of the batch; None: a run without that term."""
        for name, term in terms.items():
            if term is not None:
                self.values[name] = self.values.get(name, 0) + share * term.detach().mean()


@contextmanager
def training_steps(
    run: Run, loop: LoopSpec, state: TrainingState, dataset: ImageDataset, look: Look, shown: Sequence[str]
) -> Iterator[Iterator[Step]]:
    """The steps of a stage, from its newest checkpoint on, for the loop inside; it computes, updates and fills them in.

    look    called with the images seen, from the start on and as long as the training goes on
    shown   values on the status line

    Around each step: a signal to stop, averages, report, checkpoint. Raises Stopped after the signal with a checkpoint
    saved, and CheckpointError for weights that are not finite at the end.
    """
    micro = loop.micro_batch_size or loop.batch_size // dist.world_size()
    with StopSignal() as stop, memory_field(f"{state.stage}_training.micro_batch_size", micro):
        yield _steps(run, loop, state, dataset, look, shown, stop)
    state.require_finite()


def _steps(
    run: Run, loop: LoopSpec, state: TrainingState, dataset: ImageDataset, look: Look, shown: Sequence[str],
    stop: StopSignal,
) -> Iterator[Step]:  # fmt: skip
    # Resume.
    spec, stage = run.spec, state.stage
    images = state.images = state.restore()
    run.forget_after(stage, images)
    batches = train_batches(
        dataset, batch_size=loop.batch_size, seed=spec.seed, start_images=images, flip=spec.data.horizontal_flip,
        num_workers=spec.data.num_workers, rank=dist.rank(), world_size=dist.world_size(),
    )  # fmt: skip
    guard, progress, skipped_images = NonFiniteGuard(run, state), Progress(stage, loop, images), 0
    health, averaged = Health(run.log, stage), next(iter(state.modules.values()))
    due = False  # a checkpoint

    while images < loop.images:
        look(images)  # at the start, and again where a killed run may have stopped before it did

        # Stop?
        if stop:
            if guard.steady:
                state.save(images, loop.keep_checkpoints)
            raise Stopped(f"{stage} stopped after {images:,} images")

        # Batch.
        with progress.waiting():
            batch, skipped = next(batches)
        skipped_images += skipped
        rng, size = step_generator(run.device, spec.seed, stage, images), loop.micro_batch_size or len(batch.key)
        lr = learning_rate(loop.schedule, images, loop.images, loop.batch_size)
        number, after = images // loop.batch_size, images + loop.batch_size
        logged = (number + 1) % loop.log_every_steps == 0 or after >= loop.images
        step = Step(batch, images, number, rng, lr, size, logged)
        yield step

        # Averages.
        if guard.check(step.grad_norm, images, number, batch.key):
            state.ema.update(averaged, number)
        images = state.images = after

        # Report, save; saved before looking, which a resumed run repeats if it has to.
        if logged:
            numbers = {name: float(dist.mean_over_processes(value)) for name, value in step.values.items()}
            speed = progress.report(images, **{name: numbers[name] for name in shown if name in numbers})
            run.log(
                stage=stage, kind="train", images=images, step=number + 1, lr=lr, grad_norm=step.grad_norm,
                skipped_images=skipped_images, **numbers, **speed,
            )  # fmt: skip
            away = distance(state.ema.state_dict(state.ema.decays[0]), averaged)
            health.check(images, number + 1, {**numbers, **step.seen, "average_distance": away})
        due = due or any(crossed(every, step.images, images) for every in (loop.save_every_images, state.best_every))
        due = due or images >= loop.images
        if due and guard.steady:
            due = not state.save(images, loop.keep_checkpoints)


def _check_continues(dir: Path, old: RunSpec, new: RunSpec, resume: bool) -> None:
    if not resume:
        raise CheckpointError(
            str(dir), "the run folder exists",
            hint="Choose another --run, or --overwrite to delete it, or --resume auto.",
        )  # fmt: skip
    differences = spec_differences(old, new)
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            str(dir), f"written for spec fingerprint {fingerprint(old)}",
            got=f"{fingerprint(new)} ({differences[0]}{more})", expected="the same spec to continue",
            hint="Choose another --run, or --overwrite to delete this one.",
        )  # fmt: skip


def _git_revision() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """Model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
