import json

import pytest

from raev2.batch import Measurement
from raev2.command import bench
from raev2.command.bench import run_benchmarks, table, timed
from raev2.errors import SpecError


def test_timed_takes_turns_and_leaves_out_the_warm_up(monkeypatch):
    clock = iter([0.0, 9.0, 20.0, 21.0, 21.0, 23.0])  # two starts of the warm-up, then a: 1 s, b: 2 s
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []
    seconds = timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=1)
    assert seconds == {"a": 1.0, "b": 2.0}
    assert calls == ["a", "b", "a", "b"]


def test_results_are_printed_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "benchmarks", lambda: {"one": lambda: [Measurement("step", 12.5, "images/s", "small")]})
    results = run_benchmarks(json_file=tmp_path / "bench.json")
    assert "one  step  12.5  images/s  small" in table(results)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["benchmarks"]["one"][0]["value"] == 12.5
    assert written["machine"]["torch"]


def test_an_unknown_benchmark_names_the_closest():
    with pytest.raises(SpecError, match=r"unknown benchmark.*'sampeling'.*sampling"):
        run_benchmarks(["sampeling"])
