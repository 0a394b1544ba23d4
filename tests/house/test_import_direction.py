"""The core reads in one direction, is light to start, and knows no task."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import raev2

REPOSITORY = Path(__file__).parents[2]
CORE = REPOSITORY / "raev2"
MAX_LINES = 600

# The reading order. A module imports only from modules above it.
ORDER = """
    errors files.plugins files.spec_base shapes spec batch
    files.damage files.hashes files.assets files.images files.replace files.picture_folder files.manifest
    files.card files.artefact files.grid files.picture_array files.latent_folder files.lines
    flow guidance sampler nn data
    training.dist
    tokenizer.base tokenizer.encoder_table tokenizer.decoder_table tokenizer.encoders tokenizer.decoder
    tokenizer.latent_stats tokenizer.rae tokenizer.baselines tokenizer.losses tokenizer.discriminator
    model.dit model.condition model.frames model.generator
    task spec_io testing
    interop.convert interop.generators interop.tokenizers
    training.parallel training.ema training.optim training.checkpoint training.lock training.health
    training.tracker training.run training.resume training.preflight
    eval.features eval.distances eval.references eval.image_pairs eval.generate eval.sets eval.protocols
    eval.pictures
    model.opened train_tokenizer train_generator
    pipeline model.repository
    command.actions command.cli __main__
""".split()  # noqa: SIM905


def sources() -> Iterator[tuple[str, Path]]:
    for file in sorted(CORE.rglob("*.py")):
        name = ".".join(file.relative_to(CORE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, file


def imports(file: Path) -> Iterator[str]:
    """Modules of our packages that a file imports: at the top, inside functions, for type checkers alone."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    modules = {f"raev2.{name}" for name, _ in sources()}
    yield from (name for name in visit(ast.parse(file.read_text(encoding="utf-8"))) if name.startswith("raev2"))


def test_every_module_has_a_place_in_the_order():
    assert sorted(ORDER) == [name for name, _ in sources()]


@pytest.mark.parametrize(("name", "file"), list(sources()), ids=[name for name, _ in sources()])
def test_a_module_imports_only_from_above(name, file):
    above = {"raev2", *(f"raev2.{module}" for module in ORDER[: ORDER.index(name)])}
    for imported in imports(file):
        if imported.split(".")[0] == "raev2":
            assert imported in above, f"{name} imports {imported}, which is not above it"
        else:
            raise AssertionError(f"the core imports the plugin package {imported}")


def test_no_task_name_in_the_core():
    names = {point.name for point in entry_points(group="raev2.tasks")} | {"imagenet", "t2i", "nwm"}
    word = re.compile(rf"\b({'|'.join(map(re.escape, sorted(names)))})\b")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, file in sources()
        if not name.startswith("interop.")  # reads the reference's configurations, which have these words
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if word.search(line)
    ]
    assert found == []


def test_no_names_from_other_conventions_of_time():
    """x0, x1 and the like mean data in one paper and noise in the next; `="` after it is an attribute of an SVG."""
    word = re.compile(r'\bx_?[01]\b(?!=["{])')
    files = [*CORE.rglob("*.py"), *(REPOSITORY / "tasks").rglob("*.py")]
    found = [
        f"{file.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if word.search(line)
    ]
    assert found == []


def test_no_file_is_longer_than_600_lines():
    too_long = {name: lines for name, file in sources() if (lines := len(file.read_text().splitlines())) > MAX_LINES}
    assert too_long == {}


@pytest.mark.parametrize("command", ["import raev2", "from raev2.command.cli import main; main(['--help'])"])
def test_start_is_light(command):
    heavy = "torch", "transformers", "timm", "pydantic", "numpy", "accelerate"
    show = f"print('imported', *(name for name in {heavy} if name in sys.modules))"
    code = f"import sys\ntry:\n    {command}\nfinally:\n    {show}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "imported"


def test_public_names_load_and_are_documented():
    assert sorted(raev2.__all__) == ["Generator", "Pipeline", "RAE", "__version__", "sample"]
    for name in set(raev2.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(raev2, name)), name
    stable = {
        "raev2.RAE": ("from_pretrained", "save_pretrained", "push_to_hub", "encode", "decode", "latent_stats"),
        "raev2.Generator": ("from_pretrained", "save_pretrained", "push_to_hub", "forward", "null_cond"),
        "raev2.Pipeline": ("from_pretrained", "save_pretrained", "push_to_hub", "__call__"),
        "raev2.interop": ("import_generator", "import_decoder", "aggregate_layers"),
        "raev2.task": ("Task", "Evaluator"),
        "raev2.pipeline": ("train", "sample_run", "evaluate_run"),
    }
    for where, names in stable.items():
        package, _, attribute = where.partition(".")
        owner = getattr(raev2, attribute) if attribute in raev2.__all__ else importlib.import_module(where)
        for name in names:
            assert inspect.getdoc(getattr(owner, name)), f"{where}.{name} has no docstring"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'raev2' has no attribute 'Rae'"):
        raev2.Rae  # noqa: B018


@pytest.mark.parametrize(("name", "file"), list(sources()), ids=[name for name, _ in sources()])
def test_modules_and_public_functions_are_documented(name, file):
    tree = ast.parse(file.read_text())
    nodes = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))]
    public = [node for node in nodes if not getattr(node, "name", "").startswith("_")]
    assert [getattr(node, "name", name) for node in public if not ast.get_docstring(node)] == []
