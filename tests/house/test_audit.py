"""What the sources never do: run code that comes with weights or data, or read a pickle that can."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    file for folder in ("raev2", "tasks", "data_recipes", "docs") for file in sorted((ROOT / folder).rglob("*.py"))
]
PICKLE = {
    "tasks/raev2_tasks/nwm/data/safe_pickle.py": "the reader",
    "tasks/raev2_tasks/convert/files.py": "names its error",
}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, object]]]:
    """Every call: what is called, and its keywords with constant values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            constants = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), constants


def faults(text: str, name: str = "") -> list[str]:
    """What a source does and must not."""
    tree, found = ast.parse(text), []
    for called, given in calls(tree):
        remote = called.endswith("from_pretrained") and ".Auto" in f".{called}"  # the classes of transformers that can
        if given.get("trust_remote_code", remote):
            found.append(f"{called} without trust_remote_code=False")
        if called in ("torch.load", "torch.serialization.load") and given.get("weights_only") is not True:
            found.append(f"{called} without weights_only=True")
        if called == "np.load" and given.get("allow_pickle", False) is not False:
            found.append(f"{called} with allow_pickle")
        if called in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "torch.hub.load", "torch.jit.load"):
            found.append(called)
        if given.get("shell") is True:
            found.append(f"{called} with a shell")
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {one}" for one in names if one in ("pickle", "dill", "cloudpickle") and name not in PICKLE]
    return found


def test_the_sources_run_nothing_that_comes_with_weights_or_data():
    found = {name: faults(file.read_text(), name) for file in SOURCES if (name := str(file.relative_to(ROOT)))}
    assert len(found) > 150 and {name: some for name, some in found.items() if some} == {}


def test_only_the_safe_reader_unpickles():
    loads = [name for name in PICKLE if "pickle.load" in (ROOT / name).read_text()]
    assert loads == [] and "pickle.Unpickler" in (ROOT / "tasks/raev2_tasks/nwm/data/safe_pickle.py").read_text()


@pytest.mark.parametrize(
    "line",
    ["transformers.AutoModel.from_pretrained(x)", "AutoConfig.from_pretrained(x, trust_remote_code=True)",
     "load(trust_remote_code=True)", "torch.load(x)", "torch.load(x, weights_only=False)", "import pickle",
     "from pickle import loads", "np.load(x, allow_pickle=True)", "eval(x)", "yaml.load(x)", "run(x, shell=True)"],
)  # fmt: skip
def test_the_audit_finds_what_it_looks_for(line):
    assert len(faults(line)) == 1


@pytest.mark.parametrize(
    "line", ["torch.load(x, weights_only=True)", "AutoModel.from_pretrained(x, trust_remote_code=False)", "np.load(x)",
             "RAE.from_pretrained(x)", "model.eval()"],
)  # fmt: skip
def test_the_audit_lets_the_rest_be(line):
    assert faults(line) == []
