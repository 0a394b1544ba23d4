"""Every command of README and docs runs as it is typed, page by page, on small data and with small recipes.

`NOT_RUN` is the whole list of those that do not. Whether a line fits the real recipes is tested in test_docs.py, and
what the commands do, in the folders of their parts.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from test_docs import MANUAL, ROOT, name, numbered_lines, run_blocks

pytest.importorskip("av", reason="the extra nwm is not installed (av)")
pytest.importorskip("rosbags", reason="the extra nwm is not installed (rosbags)")
uvicorn = pytest.importorskip("uvicorn", reason="the extra nwm is not installed (uvicorn)")
import workplace  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from raev2 import Pipeline  # noqa: E402
from raev2.command.cli import main  # noqa: E402
from raev2.task import get_task  # noqa: E402
from raev2_tasks.t2i.benchmark.g60 import geneval_rows  # noqa: E402

PAGES = {name(page): page for page in MANUAL if any(numbered_lines(page))}
LINES = [(page, number, arguments) for page, file in PAGES.items() for number, arguments in numbered_lines(file)]
K7 = "runs/imagenet/raev2-dinov3l-k7"

# A line is named by how it begins, or after a star by what is in it; of several entries the last one counts.
# What does not run here, by reason.
WEIGHTS = "needs published weights"
GPU = "is for a GPU"
LONG = "takes minutes even when small; the tests of its folder run it smaller"
OTHERS = "needs a server or a checkout of others"
APART = "leaves threads behind; tests/demo and tests/training/test_tracker.py start it in a process of its own"
NOT_RUN = {
    "eval --images": WEIGHTS,
    f"eval --run {K7} --expect": WEIGHTS,
    "*tokenizer.encoder.name=dinov2-s": WEIGHTS,
    "encoders check dinov3-l16": WEIGHTS,
    "*task.text_encoder.name=google/t5-v1_1-base": WEIGHTS,
    "demo --run": APART,
    "*--tracker trackio": APART,
    "bench imagenet": GPU,
    "bench sample --cpu-time": LONG,
    "bench train-step --size base": LONG,
    "analyse insight-1": LONG,
    "analyse insight-3": LONG,
    "*https://example.org/pairs-{000000..000127}.tar": OTHERS,
    "bench optimizer --against raev2_tasks.bench.older:same": OTHERS,
}
# Added to a command so that it ends in a second.
SHORTER = {
    "*--n 50000": "--n 4",
    "sweep steps": "--n 4 --values 1 2",
    "nwm plan": "--goals 1 --set sampler.population=4 --set sampler.elites=2 --set sampler.iterations=1",
    "*sampler.kind=mppi": "--goals 1 --set sampler.population=4 --set sampler.iterations=1",
    "*--image here.jpg": "--set sampler.population=4 --set sampler.elites=2 --set sampler.iterations=1",
    "*generator_training.images=44800": "--set generator_training.images=24",
    "*generator_training.images=8000": "--set tokenizer_training.images=8 --set generator_training.images=16",
    "*tokenizer_training.images=3200": "--set tokenizer_training.images=8",
    "data build vizdoom": "--set num_train=2 --set num_val=2 --set drives_per_maze=1 --set num_frames=80",
    "data build t2i-embedded": "--set num_g60=4 --set num_s12=4 --set num_txt=4 --set per_emoji=0 --set num_val=2",
    "nwm index build": "--num 2",
    "bench": "optimizer --rounds 1",
    "analyse probe": "--layers 1",
    "analyse blocks": "--n 4",
    "analyse width": "--steps 1",
    "import decoder.pt": "--encoder micro --set heads=2",
    "import model.pt": "--encoder micro --set heads=2",
}
# Copies of what is in every place, under further names, and of what the repository has.
THERE = {
    "docs/how_to/evaluate.md": {
        K7: "runs/imagenet/a", "data/imagenet-256": "data/emoji", "data/synthetic": "data/emoji"
    },
    "docs/how_to/follow.md": {"runs/imagenet/longer": "runs/imagenet/a"},
    "docs/results.md": {"docs/reports": str(ROOT / "docs/reports")},
}  # fmt: skip


def shared() -> None:
    """What `hf upload` and others have put on the hub."""
    Pipeline.from_pretrained("runs/imagenet/quickstart").push_to_hub("OWNER/NAME")
    Pipeline.from_pretrained("runs/nwm/quickstart").push_to_hub("OWNER/DRIVES")


def scored() -> None:
    """What GenEval's program writes."""
    row = {"filename": "x", "correct": True, "reason": ""}
    rows = [row | {"tag": one.tag, "prompt": one.prompt} for one in geneval_rows()[::80] for _ in range(4)]
    Path("geneval/results.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


# Done before a line: what the page says is done in between by other means.
BEFORE: dict[str, Callable[[], object]] = {
    "sample --run OWNER/NAME": shared,
    "t2i import-eval": scored,
    "*tokenizer.encoder.name=my_encoder": lambda: run_blocks(PAGES["docs/how_to/new_encoder.md"], Path()),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What every page begins with. All recipes are small ones."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for make in (workplace.make_pictures, workplace.make_shards, workplace.make_drives, workplace.make_weights):
            make()
        for task in workplace.DATA:
            recipes = get_task(task).recipes()
            for recipe, spec in {recipe: workplace.small(task, recipe, root) for recipe in recipes}.items():
                patch.setitem(recipes, recipe, lambda spec=spec: spec)
        workplace.make_runs()
        yield root


@pytest.fixture
def place(world: Path, hub: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with a hub; a server answers one request for its page and ends, as at Ctrl-C."""
    shutil.copytree(world, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")

    def ask(app: Any) -> None:
        answer = TestClient(app, base_url="http://127.0.0.1").get("/")
        assert answer.status_code == 200 and "<html" in answer.text

    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: ask(server.config.app))
    return tmp_path / "place"


def entry(table: Mapping[str, Any], line: str, default: Any) -> Any:
    """What a table says of a line."""
    return [default, *(value for where, value in table.items() if is_meant(where, line))][-1]


def is_meant(where: str, line: str) -> bool:
    return where[1:] in line if where.startswith("*") else line.startswith(where)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, place: Path) -> None:
    for there, source in THERE.get(page, {}).items():
        shutil.copytree(source, there)
    for number, arguments in numbered_lines(PAGES[page]):
        line = shlex.join(arguments)
        if entry(NOT_RUN, line, ""):
            continue
        entry(BEFORE, line, lambda: None)()
        here = [re.sub(r"(^|=)/(?=data/|mnt/|models/)", r"\1here/", word) for word in arguments]  # not from the root
        assert main([*here, *shlex.split(entry(SHORTER, line, ""))]) == 0, f"{page}:{number}: raev2 {line}"


def test_every_exception_is_one_of_a_line_that_is_shown() -> None:
    lines = [shlex.join(arguments) for _, _, arguments in LINES]
    named = [*NOT_RUN, *SHORTER, *BEFORE]
    assert [where for where in named if not any(is_meant(where, line) for line in lines)] == []
    assert THERE.keys() <= PAGES.keys()
