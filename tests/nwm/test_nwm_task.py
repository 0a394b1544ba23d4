from __future__ import annotations

import json


def test_a_whole_run(tiny_nwm_run):
    assert (tiny_nwm_run / "report.html").is_file()
