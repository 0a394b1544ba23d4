"""`raev2 doctor` compares what is installed with what the package says it needs."""

from __future__ import annotations

from importlib import metadata

from raev2_tasks.listings import doctor


def test_versions_that_are_too_old_or_missing_are_said_with_the_way_out(monkeypatch):
    needs = ["numpy>=99", "pillow>=1", "nothing-such>=2", "pyyaml>=99; extra == 'eval'", "gone>=1; extra == 'nwm'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    rows = dict(doctor.machine())
    assert rows["numpy"] == f"{metadata.version('numpy')}, but raev2 needs >=99: pip install 'numpy>=99'"
    assert rows["pillow"] == metadata.version("pillow")
    assert rows["nothing-such"] == "not installed: pip install 'nothing-such>=2'"
    assert rows["extra eval"] == "missing or too old: pyyaml. pip install -U 'raev2[eval]'"
    assert rows["extra nwm"] == "missing or too old: gone. pip install -U 'raev2[nwm]'"
    assert rows["extra t2i"] == "ok" and "gone" not in rows
