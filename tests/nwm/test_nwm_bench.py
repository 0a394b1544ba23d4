from __future__ import annotations

from raev2_tasks.nwm import bench


def test_cached_and_recomputed_frames_are_the_same(monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    rows = {row.name: row for row in bench.bench_rollout_frame()}
    assert rows["cached against recomputed"].value < 1e-5
    assert {"cached", "recomputed", "in_context"} <= rows.keys()
    assert rows["cached"].unit == "s/frame" and rows["cached"].value > 0
