"""README and docs: links resolve, generated pages are fresh, python blocks run, command lines are valid."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from raev2 import pipeline
from raev2.command import actions, cli
from raev2.files.plugins import COMMANDS, installed
from raev2.spec import FeatureLoss, RunSpec
from raev2.spec_io import apply_overrides
from raev2.task import Task, get_command, get_data_recipe, get_evaluators, get_recipe, get_task, installed_tasks

ROOT = Path(__file__).parents[2]
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*MANUAL, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "data_recipes" / "README.md"]
SOURCES = [file for folder in ("raev2", "tasks", "data_recipes") for file in sorted((ROOT / folder).rglob("*.py"))]


@dataclass(frozen=True)
class Block:
    """A fenced code block: ```language words"""

    language: str
    words: list[str]
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2].split(), match[3], text.count("\n", 0, match.start(3)))
        for match in re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, re.M | re.S)
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    found: list[str] = []
    for heading in headings:
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def targets(page: Path) -> list[str]:
    """Link and image targets inside the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


# Links


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in targets(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_pages_named_in_the_code_exist() -> None:
    missing = []
    for source in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        for path, anchor in re.findall(r"\b(docs/[\w/.-]+\.md)(?:#([\w-]+))?", source.read_text()):
            if not (ROOT / path).is_file() or (anchor and anchor not in anchors(ROOT / path)):
                missing.append(f"{name(source)}: {path}#{anchor}")
    assert not missing


def test_every_page_is_linked_from_another_one() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in MANUAL for target in targets(page)}
    assert [name(page) for page in MANUAL[1:] if page not in linked] == []


# Generated pages


def test_reference_pages_are_fresh() -> None:
    location = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert location is not None and location.loader is not None
    generate = importlib.util.module_from_spec(location)
    location.loader.exec_module(generate)
    assert list(generate.stale_pages()) == [], "run `python docs/generate.py`"


# Python blocks


@pytest.fixture(scope="module")
def small_run(tiny_spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the quickstart's kind, trained for two steps a stage."""
    short = {"images": 16, "batch_size": 8, "sample_every_images": 16, "save_every_images": 8}
    spec = tiny_spec.replace(
        tokenizer_training=tiny_spec.tokenizer_training.replace(
            **short, adversarial=None, perceptual=FeatureLoss(layers=(1,))
        ),
        generator_training=tiny_spec.generator_training.replace(**short, eval_every_images=None),
        evaluation=tiny_spec.evaluation.replace(num_samples=8),
    )
    return pipeline.train(spec, tmp_path_factory.mktemp("docs") / "quickstart")


@pytest.fixture
def workplace(small_run: Path, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page's blocks run: data/synthetic, runs/imagenet/quickstart, and the folder itself on the path."""
    shutil.copytree(small_run, tmp_path / "runs" / "imagenet" / "quickstart")
    shutil.copytree(synthetic_data, tmp_path / "data" / "synthetic")
    monkeypatch.chdir(tmp_path)
    with modules_from(tmp_path):
        yield tmp_path


@contextmanager
def modules_from(folder: Path) -> Iterator[None]:
    """Inside, Python finds modules in a folder."""
    modules = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for module in set(sys.modules) - modules:
        if str(folder) in (getattr(sys.modules[module], "__file__", None) or ""):
            del sys.modules[module]


def install(project_file: Path) -> None:
    """What `pip install -e .` would do for the entry points of a project."""
    project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
    info = project_file.parent / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    "page", [page for page in MANUAL if any(b.language == "python" for b in blocks(page))], ids=name
)
def test_python_blocks_run(page: Path, workplace: Path) -> None:
    run_blocks(page, workplace)


def write_file(block: Block, folder: Path) -> bool:
    """The file that a block shows, if it shows one; a project is installed."""
    files = [word.removeprefix("file=") for word in block.words if word.startswith("file=")]
    for file in files:
        (folder / file).write_text(block.text)
        if file == "pyproject.toml":
            install(folder / file)
    return bool(files)


def run_blocks(page: Path, workplace: Path) -> None:
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if write_file(block, workplace):
            continue
        if block.language == "python" and "no-run" not in block.words:
            exec(compile("\n" * block.line + block.text, name(page), "exec"), namespace)
        elif block.language == "python":
            compile(block.text, name(page), "exec")


def test_the_metric_of_the_how_to_page_is_in_the_report_with_its_sentence(workplace: Path) -> None:
    run_blocks(ROOT / "docs" / "how_to" / "new_metric.md", workplace)
    page = (workplace / "runs" / "imagenet" / "quickstart" / "report.html").read_text()
    sentence = "How colourful generated pictures are: largest minus smallest channel, mean over pictures."
    assert f"<dt>saturation</dt><dd>{sentence} Higher is better.</dd>" in page
    assert '<div class="tile"><code>saturation</code>' in page
    assert re.search(
        r"Protocol saturation: saturation is [\d.]+, .* On the same scale: saturation_real [\d.]+ \(", page
    )
    report = [file for file in (ROOT / "tasks" / "raev2_tasks" / "report").iterdir() if file.is_file()]
    results = (workplace / "runs" / "imagenet" / "quickstart" / "eval").glob("*.json")
    names = {row["name"] for file in results for row in json.loads(file.read_text())["results"]}
    assert {"saturation", "psnr", "fd_micro", "fd_micro_shuffled"} <= names
    assert not [metric for metric in names for file in report if metric in file.read_text()], "it knows no metric"


def test_the_notebook_runs(
    trained_run: Path, tiny_recipe: RunSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the tiny run, which is trained already; the cell tagged `parameters` is replaced, nothing else."""
    shutil.copytree(trained_run, tmp_path / "run")
    namespace: dict[str, object] = {}
    for cell in json.loads((ROOT / "docs" / "notebooks" / "quickstart.ipynb").read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            namespace |= {"RECIPE": "tiny", "RUN": str(tmp_path / "run")}
        elif cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert (tmp_path / "run" / "samples" / "notebook-internal" / "grid.png").is_file()
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out


def test_questions_quote_what_the_code_says() -> None:
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(), re.M)
    said = [re.sub(r"\{[^{}]*\}", "{}", source.read_text()) for source in SOURCES]
    assert len(quoted) > 9 and [text for text in quoted if not any(text in source for source in said)] == []


# Command lines


class Line(NamedTuple):
    """VARIABLE=VALUE PROGRAM ARGUMENT... on a page; `number` of its line there."""

    number: int
    variables: dict[str, str]
    arguments: list[str]
    program: str


def numbered_lines(page: Path) -> Iterator[Line]:
    """Every `raev2 ...` and `hf ...` in the page's bash blocks, also behind torchrun, srun and variables."""
    for block in blocks(page):
        if block.language != "bash":
            continue
        number = block.line
        for line in re.split(r"(?<!\\)\n", block.text):
            number, first = number + line.count("\n") + 1, number + 1
            words = shlex.split(line.replace("\\\n", " "), comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "||")), len(words))
                command, words = words[:end], words[end + 1 :]
                starts = [i for i, word in enumerate(command) if Path(word).name in ("raev2", "hf")]
                if starts and all(word in ("-m", "--", "srun") or "=" in word for word in command[: starts[0]][-1:]):
                    pairs = (word.split("=", 1) for word in command[: starts[0]] if re.match("[A-Z0-9_]+=", word))
                    yield Line(first, dict(pairs), command[starts[0] + 1 :], Path(command[starts[0]]).name)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Arguments of those of raev2."""
    return (line.arguments for line in numbered_lines(page) if line.program == "raev2")


def sampled_task(arguments: list[str]) -> Task | None:
    """The task of a `raev2 sample` line, from --task or from a run folder runs/TASK/NAME."""
    names = [word for argument in arguments for word in argument.split("/") if word in installed_tasks()]
    return get_task(names[0]) if arguments[0] == "sample" and names else None


def parse_only(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Have the command of a plugin read its options and do nothing; SystemExit for options that it lacks."""

    class Parsed(Exception):
        pass

    def parse_args(parser: argparse.ArgumentParser, argv: list[str]) -> None:
        _, rest = parser.parse_known_args(argv)
        raise Parsed if not rest else SystemExit(rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        command(arguments)


@pytest.mark.parametrize("page", [page for page in MANUAL if any(b.language == "bash" for b in blocks(page))], ids=name)
def test_command_lines_are_valid(page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for block in blocks(page):
        write_file(block, tmp_path)
    with modules_from(tmp_path):
        check_command_lines(page, capsys)


def check_command_lines(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added = {name: get_command(name) for name in installed(COMMANDS)}
    for arguments in command_lines(page):
        if arguments[0] in installed_tasks():  # raev2 TASK COMMAND ...
            parse_only(get_task(arguments[0]).commands()[arguments[1]], arguments[2:])
            continue
        try:
            options = cli.parser(sampled_task(arguments), added).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"raev2 {shlex.join(arguments)}\n{capsys.readouterr().err}")
        if options.command == "train":
            apply_overrides(get_recipe(get_task(options.task), options.recipe), options.overrides)
        elif options.command == "show":
            assert any(options.recipe in get_task(task).recipes() for task in installed_tasks())
        elif options.command == "sample":
            actions._sampling(get_recipe(get_task("imagenet"), "quickstart").sampling, options)
        elif options.command == "eval":
            task = get_task(options.task or "imagenet")
            get_evaluators(task, get_recipe(task, "quickstart"), options.protocol or [])
        elif options.command == "data" and options.action in ("plan", "build"):
            get_data_recipe(options.recipe).resolve(dict(pair.split("=", 1) for pair in options.overrides))


def test_the_two_commands_of_the_readme_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    venv = "python3 -m venv .venv && .venv/bin/pip install -e"
    assert f"{venv} '.[quickstart]' && .venv/bin/raev2 train --task imagenet\n" in text
    assert f"{venv} '.[dev]' && .venv/bin/python -m pytest -n 2 --dist loadfile\n" in text


def test_no_two_test_files_have_one_name():
    """pytest without packages imports tests by base name: a second file of a name cannot be collected."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
