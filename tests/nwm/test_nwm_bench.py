from __future__ import annotations

from raev2_tasks.nwm import bench


def test_cached_and_recomputed_frames_are_the_same(monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    rows = {row.name: row for row in bench.bench_rollout_frame()}
    for num in (1, bench.BATCH):
        assert rows[f"difference, {num} at once"].value < 1e-5
        for name in ("cached", "recomputed", "in_context"):
            row = rows[f"{name}, {num} at once"]
            assert row.unit == "s/frame" and row.value > 0
