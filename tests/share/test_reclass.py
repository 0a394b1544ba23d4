"""A trained generator gets other classes: named ones draw what they drew, new ones begin anew, and training goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from raev2 import Pipeline, pipeline
from raev2.command.cli import main
from raev2.files.manifest import fingerprint
from raev2.model.opened import find_source


@pytest.fixture(scope="module")
def other_data(synthetic_data, tmp_path_factory) -> Path:
    """The pictures of `synthetic`, with the classes renamed: disc and square are still there, in another place."""
    folder = Path(shutil.copytree(synthetic_data, tmp_path_factory.mktemp("data") / "other"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["classes"] == ["cross", "disc", "ring", "square"]
    manifest["classes"] = ["square", "star", "disc", "moon"]
    manifest["fingerprint"] = fingerprint(manifest["splits"], manifest["classes"])
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_classes_are_kept_by_name(trained_run, tiny_spec, other_data, tmp_path, capsys):
    out = tmp_path / "generator"
    arguments = ["--run", str(trained_run), "--classes", str(other_data), "--out", str(out)]
    assert main(["imagenet", "reclass", *arguments]) == 0
    printed = capsys.readouterr().out
    words = ["square", "kept", "star", "new", "disc", "kept", "moon", "new", "cross", "dropped", "ring", "dropped"]
    assert [word for line in printed.splitlines()[1:7] for word in line.split()] == words

    pair = find_source(generator=str(out), tokenizer=str(trained_run / "tokenizer"), task="imagenet",
                       recipe="quickstart", data=str(other_data), settings=["precision=fp32"])  # fmt: skip
    old, new = Pipeline.from_pretrained(trained_run), Pipeline(pair)
    settings = {"n": 2, "steps": 2, "guidance": {"kind": "cfg", "scale": 2}}
    for name in ("square", "disc"):
        pictures = [np.asarray(image) for pipe in (old, new) for image in pipe(label=name, **settings)]
        assert np.array_equal(pictures[:2], pictures[2:])
    tables = [pipe.trained.generator.conditioner.table.weight for pipe in (old, new)]
    assert not any(torch.equal(tables[1][row], kept) for row in (1, 3) for kept in tables[0])

    loop = tiny_spec.generator_training.replace(images=8, batch_size=8, eval_every_images=None)
    spec = tiny_spec.replace(
        tokenizer_from=str(trained_run / "tokenizer"), generator_from=str(out), generator_training=loop,
        data=tiny_spec.data.replace(dir=str(other_data), recipe=None),
        evaluation=tiny_spec.evaluation.replace(protocols=(), in_training=()),
    )  # fmt: skip
    tuned = Pipeline.from_pretrained(pipeline.train(spec, tmp_path / "run"))
    assert tuned.trained.names().classes == ["square", "star", "disc", "moon"]
    assert len(tuned(label=["star", "moon"], steps=1)) == 2


def test_reclass_refuses_what_is_there_and_data_without_classes(trained_run, other_data, tmp_path, capsys):
    arguments = ["imagenet", "reclass", "--run", str(trained_run), "--out"]
    assert main([*arguments, str(trained_run), "--classes", str(other_data)]) == 2
    assert "--out: exists already" in capsys.readouterr().err
    manifest = json.loads((other_data / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "classes": []}), encoding="utf-8")
    assert main([*arguments, str(tmp_path / "x"), "--classes", str(tmp_path)]) == 2
    assert "needs class labels, in the generator and in the data" in capsys.readouterr().err
