"""The cases of `raev2 bench` by name: those here, then `<task>` or `<task>-<name>` of the installed tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from raev2.batch import Measurement
from raev2.task import check_known, usable_tasks
from raev2_tasks.bench.measure import Setting, Work, measure
from raev2_tasks.bench.reading import frechet, loader, startup
from raev2_tasks.bench.sampling import decode, encode, sampling
from raev2_tasks.bench.training import growth, optimizers, stage1_step, train_step

Case = Callable[[Setting], Iterator[Work | Measurement]]
CASES: dict[str, Case] = {
    "train-step": train_step, "stage1-step": stage1_step, "optimizer": optimizers, "growth": growth,
    "sample": sampling, "encode": encode, "decode": decode,
    "loader": loader, "frechet": frechet, "startup": startup,
}  # fmt: skip


def run_case(case: Case, setting: Setting) -> list[Measurement]:
    """The measurements of a case; each piece of work is forgotten before the next is made."""
    return [work if isinstance(work, Measurement) else measure(work, setting) for work in case(setting)]


def benchmarks(setting: Setting) -> dict[str, Callable[[], list[Measurement]]]:
    """All of them by name."""
    found: dict[str, Callable[[], list[Measurement]]] = {
        name: partial(run_case, case, setting) for name, case in CASES.items()
    }
    for task in usable_tasks():
        found |= {name if name == task.name else f"{task.name}-{name}": f for name, f in task.benchmarks().items()}
    return found


def run_benchmarks(names: Sequence[str], setting: Setting) -> dict[str, list[Measurement]]:
    """Run by name; default: all."""
    known = benchmarks(setting)
    for name in names:
        check_known("raev2 bench", "unknown benchmark", name, known)
    return {name: known[name]() for name in names or known}
