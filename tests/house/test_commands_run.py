"""Every `raev2` and `hf` line of README and docs runs as it is typed, page by page, on small data with small recipes.

What is published has random values here (published.py), and `raev2 demo` runs in tests/demo. Whether a line fits the
real recipes is tested in test_docs.py, and what the commands do, in the folders of their parts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_demo
from huggingface_hub.cli.hf import app
from loopback_hub import LoopbackHub
from test_docs import MANUAL, ROOT, blocks, modules_from, name, numbered_lines, run_blocks, write_file

pytest.importorskip("av", reason="the extra nwm is not installed (av)")
pytest.importorskip("rosbags", reason="the extra nwm is not installed (rosbags)")
uvicorn = pytest.importorskip("uvicorn", reason="the extra nwm is not installed (uvicorn)")
import published  # noqa: E402
import workplace  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from raev2 import Pipeline  # noqa: E402
from raev2.command.cli import main  # noqa: E402
from raev2.task import get_task  # noqa: E402
from raev2_tasks.bench import sampling, training  # noqa: E402
from raev2_tasks.t2i.benchmark.g60 import geneval_rows  # noqa: E402

Repositories = dict[str, dict[str, bytes]]
PAGES = {name(page): page for page in MANUAL if any(numbered_lines(page))}
LINES = [shlex.join(line.arguments) for file in PAGES.values() for line in numbered_lines(file)]
K7 = "runs/imagenet/raev2-dinov3l-k7"

# A line is named by how it begins, or after a star by what is in it; of several entries the last one counts.
ENDS = {"*--expect": 1}  # published numbers are not those of random weights
LAYERS = "--layers 1 2 --seeds 1 --stage tokenizer --set evaluation.protocols=[reconstruction-micro]"
SHORT = "".join(
    f" --set tokenizer_training.{field}=8"
    for field in ("images", "batch_size", "stats_images", "schedule.warmup_images")
)
# Added to a command so that it ends in a second.
SHORTER = {
    "*--n 50000": "--n 4",
    "*-k7 --expect": "--protocol reconstruction-inception",
    "sweep steps": "--n 4 --values 1 2",
    "*--tracker trackio": "--run tracked --stage tokenizer --set tokenizer_training.images=32",
    "nwm plan": "--goals 1 --set sampler.population=4 --set sampler.elites=2 --set sampler.iterations=1",
    "*sampler.kind=mppi": "--goals 1 --set sampler.population=4 --set sampler.iterations=1",
    "*--image here.jpg": "--set sampler.population=4 --set sampler.elites=2 --set sampler.iterations=1",
    "*generator_training.images=44800": "--set generator_training.images=24",
    "*generator_training.images=22400": "--set tokenizer_training.images=8 --set generator_training.images=16 "
    "--set generator_training.schedule.decay_start_images=8",
    "*generator_training.images=8000": "--set tokenizer_training.images=8 --set generator_training.images=16",
    "*tokenizer_training.images=3200": "--set tokenizer_training.images=8",
    "data build vizdoom": "--set num_train=2 --set num_val=2 --set drives_per_maze=1 --set num_frames=80",
    "data build t2i-embedded": "--set num_g60=4 --set num_s12=4 --set num_txt=4 --set per_emoji=0 --set num_val=2",
    "nwm index build": "--num 2",
    "bench": "optimizer --rounds 1",
    "bench ": "--rounds 1",
    "bench imagenet": "",
    "analyse insight-1": f"{LAYERS} --set data.dir=data/imagenet",
    "*--layers 1 2 4 8 12": LAYERS,
    "*--set tokenizer.decoder.width=192": f"{LAYERS} --set data.dir=data/imagenet {SHORT}",
    "*--out photographs": LAYERS + SHORT,
    "analyse insight-3": "--runs runs/imagenet/a --n 4 --sampler-steps 1 --choice 1 4",
    "analyse probe": "--layers 1",
    "analyse blocks": "--n 4",
    "analyse width": "--steps 1",
    "import decoder.pt": "--encoder micro --set heads=2",
    "import model.pt": "--encoder micro --set heads=2",
}
# Copies of what is in every place, under further names, and of what the repository has.
THERE = {
    "docs/how_to/evaluate.md": {
        K7: "runs/published", "data/imagenet-256": "data/imagenet", "data/synthetic": "data/emoji"
    },
    "docs/how_to/analyse.md": {"data/photos": "data/imagenet"},
    "docs/how_to/follow.md": {"runs/imagenet/longer": "runs/imagenet/a"},
    "docs/how_to/shards.md": {"runs/t2i/own-data": "runs/t2i/quickstart", "data/val": "data/scenes"},
    "docs/results.md": {"docs/reports": str(ROOT / "docs/reports")},
}  # fmt: skip


def shared() -> None:
    """What others have put on the hub."""
    Pipeline.from_pretrained("runs/nwm/quickstart").push_to_hub("OWNER/DRIVES")


def scored() -> None:
    """What GenEval's program writes."""
    row = {"filename": "x", "correct": True, "reason": ""}
    rows = [row | {"tag": one.tag, "prompt": one.prompt} for one in geneval_rows()[::80] for _ in range(4)]
    Path("geneval/results.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def statistics() -> None:
    """The files of ADM and JiT."""
    sizes = {"mu": 2048, "mu_s": 17 * 17 * 7}
    means = {name: np.zeros(size) for name, size in sizes.items()}
    covariances = {name.replace("mu", "sigma"): np.eye(size) for name, size in sizes.items()}
    np.savez("VIRTUAL_imagenet256_labeled.npz", **means, **covariances)
    np.savez("imagenet_256_fid_stats.npz", mu=means["mu"], sigma=covariances["sigma"])


def checkout() -> None:
    """An older one, which is as old as this one."""
    shutil.copytree(ROOT / "raev2", "older/raev2")


# Done before a line: what the page says is done in between by other means.
BEFORE: dict[str, Callable[[], object]] = {
    "nwm rollout --run OWNER/DRIVES": shared,
    "t2i import-eval": scored,
    "eval --images samples.npz --reference VIRTUAL": statistics,
    "bench optimizer --against": checkout,
    "*tokenizer.encoder.name=my_encoder": lambda: run_blocks(PAGES["docs/how_to/new_encoder.md"], Path()),
}


def tracked(words: Sequence[str]) -> int:
    """`raev2 WORDS` in a process of its own, as Trackio starts threads there; what it kept is looked at."""
    command, env = [sys.executable, "-m", "raev2", *words], os.environ | {"TRACKIO_DIR": "trackio"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "tracker" not in done.stderr, done.stderr
    (file,) = Path("trackio").glob("raev2-imagenet*.db")
    with closing(sqlite3.connect(file)) as db:
        assert any("tokenizer/loss" in json.loads(row) for (row,) in db.execute("SELECT metrics FROM metrics"))
    return done.returncode


def hf(words: Sequence[str]) -> int:
    """The command of huggingface_hub."""
    app(list(words), standalone_mode=False)
    return 0


APART = {"*--tracker trackio": tracked}  # run by another than `main`


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What every page begins with. All recipes are small ones."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        published.narrow_networks(patch)
        published.random_inception(patch, tmp_path_factory.mktemp("inception") / "weights.pth")
        for size in ("small", "base"):
            patch.setitem(training.SIZES, size, (workplace.TINY, (4, 4, 4), 2))
        patch.setattr(sampling, "STEPS", 2)
        for make in (workplace.make_pictures, workplace.make_shards, workplace.make_drives, workplace.make_weights):
            make()
        for task in workplace.DATA:
            recipes = get_task(task).recipes()
            for recipe, spec in {recipe: workplace.small(task, recipe, root) for recipe in recipes}.items():
                patch.setitem(recipes, recipe, lambda spec=spec: spec)
        workplace.make_runs()
        yield root


@pytest.fixture(scope="module")
def repositories(world: Path) -> Repositories:
    """What is on the hub; the networks are as narrow as `world` makes them."""
    return published.repositories()


@pytest.fixture
def place(
    world: Path, hub: LoopbackHub, repositories: Repositories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of it, with a hub that has what others publish. A server answers one request and ends, as at Ctrl-C."""
    shutil.copytree(world, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    published.publish(hub, repositories, monkeypatch)

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
def test_the_commands_of_a_page_run(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, source in THERE.get(page, {}).items():
        shutil.copytree(source, there)
    for block in blocks(PAGES[page]):
        write_file(block, place)
    with modules_from(place):
        run_lines(page, monkeypatch)


def run_lines(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, variables, arguments, program in numbered_lines(PAGES[page]):
        line = shlex.join(arguments)
        if arguments == test_demo.LINE:
            continue
        entry(BEFORE, line, lambda: None)()
        here = [re.sub(r"(^|=)/(?=data/|mnt/|models/)", r"\1here/", word) for word in arguments]  # not from the root
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        run = hf if program == "hf" else entry(APART, line, main)
        code = entry(ENDS, line, 0)
        assert run([*here, *shlex.split(entry(SHORTER, line, ""))]) == code, f"{page}:{number}: {program} {line}"


def test_every_exception_is_one_of_a_line_that_is_shown() -> None:
    named = [*SHORTER, *BEFORE, *APART, *ENDS]
    assert [where for where in named if not any(is_meant(where, line) for line in LINES)] == []
    assert THERE.keys() <= PAGES.keys() and shlex.join(test_demo.LINE) in LINES
