from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn

from raev2 import RAE, Generator
from raev2.errors import CheckpointError, FileError
from raev2.files import artefact
from raev2.files.artefact import load_artefact, load_strict, save_artefact, write_json
from raev2.model.condition import LabelCondition
from raev2.spec import DiTSpec, FlowSpec

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}


def save(path: Path, kind: str = "tokenizer", **config) -> Path:
    return save_artefact(path, kind=kind, config={"size": 3, **config}, tensors=TENSORS, card="# Card\n")


def small_generator() -> Generator:
    torch.manual_seed(0)
    network = DiTSpec(width=16, depth=1, num_heads=2)
    return Generator(network, LabelCondition(num_classes=3), FlowSpec(), (4, 2, 2))


# Writing.


def test_an_artefact_survives_its_folder(tmp_path):
    path = save(tmp_path / "deep" / "tokenizer")
    assert sorted(file.name for file in path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config, tensors, found = load_artefact(path, kind="tokenizer")
    assert config == {"format_version": 1, "kind": "tokenizer", "size": 3} and found == path
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_others_may_read_the_folder(tmp_path):
    """As far as the process's umask allows, like any other folder it makes."""
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(save(tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_an_older_artefact_is_replaced(tmp_path):
    save(tmp_path / "a")
    save(tmp_path / "a", size=4)
    assert load_artefact(tmp_path / "a", kind="tokenizer")[0]["size"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(
            FileError, match="exists and is not replaced; got .*; expected only what raev2 wrote. Choose"
        ):
            save(folder)
    save(tmp_path / "a")
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match="exists and is not replaced; got thesis.tex in it"):
        save(tmp_path / "a")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("not JSON")])
def test_a_failed_save_leaves_the_older_artefact(tmp_path, monkeypatch, error):
    save(tmp_path / "a")

    def fail(*_):
        raise error

    monkeypatch.setattr(artefact, "write_json", fail)
    with pytest.raises((FileError, TypeError), match="could not be saved; got .*No space left|not JSON"):
        save(tmp_path / "a", size=4)
    assert load_artefact(tmp_path / "a", kind="tokenizer")[0]["size"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "state.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}


# Reading.


def test_the_wrong_kind_says_what_it_is(tmp_path):
    path = save(tmp_path / "a", kind="generator")
    with pytest.raises(CheckpointError, match="a: wrong kind of artefact; got generator; expected tokenizer"):
        load_artefact(path, kind="tokenizer")


def test_a_config_of_another_program_is_refused(tmp_path):
    path = save(tmp_path / "a")
    (path / "config.json").write_text('{"_class_name": "UNet2DModel", "_diffusers_version": "0.39.0"}')
    with pytest.raises(
        CheckpointError,
        match="wrong kind of artefact; got a config.json of another program; expected generator",
    ):
        Generator.from_pretrained(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: damaged, not JSON"):
        Generator.from_pretrained(path)


def test_a_format_of_the_future_asks_for_an_update(tmp_path):
    path = save(tmp_path / "a", format_version=2)
    with pytest.raises(CheckpointError, match="unknown format_version; got 2; expected 1. Update raev2."):
        load_artefact(path, kind="tokenizer")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    path = save(tmp_path / "a")
    (path / name).unlink()
    with pytest.raises(
        CheckpointError, match=f"not an artefact folder, {name} is missing; expected a tokenizer folder"
    ):
        RAE.from_pretrained(path)


def test_a_run_folder_and_a_checkpoint_say_where_the_artefact_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec.yaml").touch()
    with pytest.raises(CheckpointError, match="This is a run folder; its generator is .*run/generator"):
        load_artefact(tmp_path / "run", kind="generator")
    (tmp_path / "000000064").mkdir()
    (tmp_path / "000000064" / "MANIFEST.json").touch()
    with pytest.raises(
        CheckpointError, match="This is a training checkpoint; the artefact of a finished run is RUN/tok"
    ):
        load_artefact(tmp_path / "000000064", kind="tokenizer")


@pytest.mark.parametrize("size", [0, 4, 100, -4])
def test_truncated_weights_are_refused(tmp_path, size):
    path = save(tmp_path / "a")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated or not a safetensors file; got .*again"):
        load_artefact(path, kind="tokenizer")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("network", {"width": 2**22}, "weights do not fit the configuration; got missing none, unexpected none, missh"),
        ("network", {"depth": 999}, "weights do not fit the configuration; got missing [0-9]+ .*blocks.1.attn"),
        ("network", {"depth": 10**9}, "damaged, or of another kind; .*less than or equal to 1000"),
        ("condition", {"num_classes": 10**12}, "weights do not fit the configuration; got missing none, unexpected"),
    ],
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(tmp_path, part, value, message):
    file = small_generator().save_pretrained(tmp_path / "a") / "config.json"
    config = json.loads(file.read_text())
    write_json(file, {**config, part: config[part] | value})
    with pytest.raises(CheckpointError, match=message):
        Generator.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("name", ["nowhere", "user/no-such-repository", "runs/a/b/tokenizer"])
def test_a_name_that_is_nothing_is_a_checkpoint_error(name):
    with pytest.raises(CheckpointError, match=f"model {name}: the weights are missing; got .*; expected "):
        load_artefact(name, kind="tokenizer")


# Strict loading.


def test_strict_loading_lists_what_does_not_fit():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tensors = dict(module.state_dict())
    del tensors["1.weight"]
    tensors["0.weight"] = torch.zeros(3, 5)
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(6)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, tensors, "runs/a/model")
    assert str(caught.value) == (
        "runs/a/model: the weights do not fit the configuration; got missing 1 (1.weight), "
        "unexpected 6 (extra.0, extra.1, extra.2, extra.3, ...), misshapen 1 (0.weight (3, 5) instead of (3, 2)); "
        "expected 6 tensors of Sequential"
    )


def test_a_generator_survives_its_folder(tmp_path):
    generator = small_generator().eval()
    generator.extra = {"note": "x"}
    generator.save_pretrained(tmp_path / "generator")
    loaded = Generator.from_pretrained(tmp_path / "generator")
    assert (loaded.network_spec, loaded.flow, loaded.extra) == (generator.network_spec, generator.flow, {"note": "x"})
    assert not loaded.training
    z_t, t, cond = torch.randn(2, 4, 2, 2), torch.tensor([0.3, 0.9]), {"label": torch.tensor([0, 2])}
    assert torch.equal(loaded(z_t, t, cond).pred, generator(z_t, t, cond).pred)


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    path = small_generator().save_pretrained(tmp_path / "generator")
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "network": {**config["network"], "depth": 2}})
    with pytest.raises(CheckpointError, match="generator: the weights do not fit the configuration; got missing"):
        Generator.from_pretrained(path)
    write_json(path / "config.json", {**config, "network": {**config["network"], "depth": "deep"}})
    with pytest.raises(CheckpointError, match="config.json: damaged, or of another kind; got ValidationError"):
        Generator.from_pretrained(path)
    write_json(path / "config.json", {name: value for name, value in config.items() if name != "network"})
    with pytest.raises(CheckpointError, match="config.json: damaged, or of another kind; got KeyError: 'network'"):
        Generator.from_pretrained(path)


def test_weights_of_another_precision_are_cast(tmp_path):
    """A half-precision artefact is smaller to publish; computing stays in the precision of the module."""
    path = small_generator().save_pretrained(tmp_path / "generator")
    file = path / "model.safetensors"
    save_file({name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()},
              file)  # fmt: skip
    assert all(value.dtype == torch.float32 for value in Generator.from_pretrained(path).parameters())


# What others wrote.


@pytest.mark.parametrize(
    ("field", "value"),
    [("network", None), ("network", []), ("network", {"kind": "dit", "width": "wide"}), ("latent_shape", 5),
     ("latent_shape", [4, -2, 2]), ("latent_shape", []), ("condition", 7),
     ("flow", []), ("latent_shape", ["a", "b", "c"])],
)  # fmt: skip
def test_a_generator_with_a_malformed_config_is_one_line(tmp_path, field, value):
    path = small_generator().save_pretrained(tmp_path / "a")
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, field: value})
    with pytest.raises(CheckpointError) as caught:
        Generator.from_pretrained(path)
    assert "config.json: damaged, or of another kind; got " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tokenizer", [None, [], "rae", {"kind": "rae", "encoder": 3}, {"kind": "rae", "no_such_field": 3}]
)
def test_a_tokenizer_with_a_malformed_config_is_one_line(tmp_path, tokenizer):
    path = save(tmp_path / "a", tokenizer=tokenizer, stats=None)
    with pytest.raises(CheckpointError) as caught:
        RAE.from_pretrained(path)
    assert "config.json: damaged, or of another kind; got " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "name"), [("[]", "list"), ("3", "int"), ("null", "NoneType")])
def test_a_config_that_is_no_object_is_one_line(tmp_path, text, name):
    path = save(tmp_path / "a")
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json: damaged; got {name}; expected a JSON object"):
        load_artefact(path, kind="tokenizer")


def test_only_json_and_safetensors_come_from_the_hub_at_the_revision_asked_for(tmp_path, monkeypatch):
    repository = save(tmp_path / "repository")
    for name in ("encoder/config.json", "encoder/model.safetensors", "encoder/model.py", "encoder/weights.bin",
                 "pytorch_model.bin", "modeling.py", "extra.safetensors"):  # fmt: skip
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"")
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns, force_download):
        asked.append((repo_id, revision))
        names = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _, _, found = load_artefact("owner/name", kind="tokenizer")
    load_artefact("owner/name@v1.2", kind="tokenizer")
    assert asked == [("owner/name", None), ("owner/name", "v1.2")]
    assert {str(file.relative_to(found)) for file in found.rglob("*") if file.is_file()} == {
        "config.json", "model.safetensors", "README.md", "encoder/config.json", "encoder/model.safetensors",
    }  # fmt: skip
