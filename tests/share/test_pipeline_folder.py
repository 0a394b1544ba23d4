"""A run as one repository: saved, pushed to a hub, loaded by id in another process; the same pictures everywhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file

from raev2 import Pipeline, pipeline
from raev2.command.cli import main
from raev2.errors import CheckpointError, DataError, SpecError
from raev2.files.hashes import folder_sha256
from raev2.model.opened import find_source, open_trained
from raev2.spec import CFG, PixelSpec
from raev2.tokenizer.baselines import PixelTokenizer

PARTS = ("tokenizer", "generator")


@pytest.fixture(scope="module")
def saved(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as a pipeline folder. Read only."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    return Pipeline.from_pretrained(trained_run, device="cpu").save_pretrained(folder, licence="cc-by-4.0")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def pngs(folder: Path) -> list[bytes]:
    return [np.asarray(Image.open(file)).tobytes() for file in sorted(folder.glob("0*.png"))]


def drawn(images: list[Image.Image]) -> list[bytes]:
    return [np.asarray(image).tobytes() for image in images]


# The same model everywhere.


def test_a_pipeline_draws_what_the_command_draws(trained_run, saved, tmp_path):
    arguments = ["--label", "square", "--n", "3", "--seed", "5", "--guidance", "cfg", "--scale", "2", "--steps", "3"]
    assert main(["sample", "--run", str(trained_run), *arguments, "--out", str(tmp_path / "a")]) == 0
    expected = pngs(tmp_path / "a")
    assert len(set(expected)) == 3
    for path in (trained_run, saved):
        pipe = Pipeline.from_pretrained(path)
        assert drawn(pipe(label="square", n=3, seed=5, guidance=CFG(scale=2), steps=3)) == expected
    assert drawn(pipe(label=["square"], n=3, seed=5, guidance={"kind": "cfg", "scale": 2}, steps=3)) == expected
    assert drawn(pipe(label="disc", n=3, seed=5, guidance=CFG(scale=2), steps=3)) != expected
    assert len(pipe(label=["square", "disc"])) == 2


def test_a_model_goes_from_the_wheel_through_a_hub(hub, elsewhere, tmp_path):
    """Trained, saved, pushed with the wheel; in another process loaded by id, sampled, scored, used as a tokenizer."""
    there, drawn_by = tmp_path / "there", "'--label', 'disc', 'square', '--n', '4', '--seed', '3'"
    printed = elsewhere(f"""
codes = [main(['train', '--task', 'imagenet', '--recipe', 'selftest', '--run', 'run']),
         main(['sample', '--run', 'run', {drawn_by}, '--out', 'expected'])]
Pipeline.from_pretrained('run', device='cpu').save_pretrained('saved', licence='cc-by-4.0')
print('exit codes', codes, Pipeline.from_pretrained('saved').push_to_hub('lab/tiny', licence='mit'))
""")
    assert "exit codes [0, 0]" in printed and hub.commit("lab/tiny") in printed
    files = {file.relative_to(there / "saved").as_posix() for file in (there / "saved").rglob("*.*")}
    assert set(hub.files["lab/tiny"]) == files
    printed = elsewhere(f"""
pipe = Pipeline.from_pretrained('lab/tiny', revision='main', device='cpu')
for number, image in enumerate(pipe(label=['disc', 'square'], n=4, seed=3)):
    image.save(f'python-{{number}}.png')
codes = [main(['sample', '--run', 'lab/tiny', {drawn_by}]),
         main(['eval', '--run', 'lab/tiny', '--data', 'data/selftest', '--protocol', 'generation-micro']),
         main(['reconstruct', 'data/selftest/val', '--run', 'lab/tiny'])]
print('exit codes', codes)
""")
    assert "exit codes [0, 0, 0]" in printed
    expected = pngs(there / "expected")
    assert len(expected) == 4 and pngs(there / "results/lab--tiny/samples/seed-3") == expected
    assert [np.asarray(Image.open(there / f"python-{i}.png")).tobytes() for i in range(4)] == expected
    now, then = (json.loads((there / folder / "eval/generation-micro.json").read_text())["results"]
                 for folder in ("results/lab--tiny", "run"))  # fmt: skip
    assert [row["value"] for row in now] == pytest.approx([row["value"] for row in then], rel=1e-6)
    assert (there / "reconstructions/grid.png").is_file()


def test_the_card_is_complete(saved, trained_run):
    """Read back by the hub's own classes."""
    card = ModelCard.load(saved / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "raev2")
    found = {(result.metric_type, result.metric_value) for result in card.data.eval_results}
    for protocol in ("reconstruction-micro", "generation-micro"):
        result = json.loads((trained_run / "eval" / f"{protocol}.json").read_text())
        rows = [row for row in result["results"] if not row["of"]]
        assert rows and {(row["name"], row["value"]) for row in rows} <= found
        assert f"### {protocol}" in card.text and result["description"] in card.text
    manifest = json.loads((trained_run / "provenance.json").read_text())["data"]
    for text in (manifest["licence"], manifest["attribution"], "encoder micro", "![Samples](samples.png)"):
        assert text in card.text
    assert (saved / "samples.png").is_file()
    assert not re.search(r"(?<!`)/(tmp|home|root)/", (saved / "pipeline.json").read_text() + card.content)


def test_the_snippet_of_the_card_runs(saved):
    card = (saved / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict = {}
    exec(snippet.replace("FOLDER_OR_REPOSITORY", str(saved)), names)
    assert [image.size for image in names["images"]] == [(64, 64)] * 4


def test_the_parts_of_a_run_have_cards_with_its_numbers(trained_run):
    cards = {part: ModelCard.load(trained_run / part / "README.md") for part in PARTS}
    assert "### reconstruction-micro" in cards["tokenizer"].text and "generation" not in cards["tokenizer"].text
    assert "### generation-micro" in cards["generator"].text
    for card in cards.values():
        assert "Shapes drawn by raev2" in card.text or "trained on the data" in card.text


# A pair of artefacts, and other data.


def test_a_generator_and_its_tokenizer_are_a_model(trained_run, synthetic_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair = ["--generator", str(trained_run / "generator"), "--tokenizer", str(trained_run / "tokenizer"),
            "--task", "imagenet", "--recipe", "quickstart", "--data", str(synthetic_data),
            "--set", "evaluation.num_samples=8", "--set", "sampling.steps=2", "--set", "precision=fp32"]  # fmt: skip
    assert main(["sample", *pair, "--label", "disc", "--n", "2", "--guidance", "none", "--out", "a"]) == 0
    sampled = ["sample", "--run", str(trained_run), "--label", "disc", "--n", "2", "--guidance", "none", "--out", "b"]
    assert main(sampled) == 0
    assert pngs(tmp_path / "a") == pngs(tmp_path / "b") and len(pngs(tmp_path / "a")) == 2
    assert main(["eval", *pair, "--protocol", "generation-micro"]) == 0
    assert (
        json.loads(Path("results/tiny--generator/eval/generation-micro.json").read_text(encoding="utf-8"))["spec"][
            "sampling"
        ]["steps"]
        == 2
    )
    assert main(["export", *pair, "--format", "pipeline", "--out", "whole"]) == 0
    assert drawn(Pipeline.from_pretrained("whole")(label="disc", n=2, guidance={"kind": "none"})) == pngs(Path("a"))


def test_without_data_labels_of_a_pair_are_numbers(trained_run):
    source = find_source(task="imagenet", generator=str(trained_run / "generator"), data="nowhere",
                         tokenizer=str(trained_run / "tokenizer"), recipe="quickstart")  # fmt: skip
    pipe = Pipeline(source)
    assert pipe.trained.names().classes == ["0", "1", "2", "3"]
    named = Pipeline.from_pretrained(trained_run, dtype=torch.bfloat16)
    assert named.trained.run.spec.precision == "bf16"
    settings = {"guidance": {"kind": "none"}, "steps": 1}
    assert drawn(pipe(label=1, **settings)) == drawn(named(label="disc", **settings))


def test_a_pipeline_is_evaluated_on_data_with_its_classes_only(folder, tmp_path, synthetic_data):
    with pytest.raises(DataError, match="data synthetic: no dataset folder here"):
        pipeline.evaluate_run(folder, ["generation-micro"])
    other = Path(shutil.copytree(synthetic_data, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "classes": [*"abcd"]}))
    expected = "data .*other: not the classes of the model; got 4: a, b, c, ...; expected 4: "
    with pytest.raises(DataError, match=expected):
        pipeline.evaluate_run(find_source(folder, data=str(other)), ["generation-micro"])


# What can be wrong.


def test_another_tokenizer_is_refused(trained_run, tmp_path):
    moved = Path(shutil.copytree(trained_run / "tokenizer", tmp_path / "tokenizer"))
    tensors = load_file(moved / "model.safetensors")
    save_file({**tensors, "stats.mean": tensors["stats.mean"] + 1}, moved / "model.safetensors")
    pair = {"generator": str(trained_run / "generator"), "task": "imagenet", "recipe": "quickstart"}
    with pytest.raises(
        CheckpointError, match="generator: trained with another tokenizer, which gives other latents; got"
    ):
        open_trained(find_source(**pair, tokenizer=str(moved)))
    other = PixelTokenizer(PixelSpec(image_size=(64, 64))).save_pretrained(tmp_path / "pixels")
    expected = re.escape(
        "which gives other latents; got (3, 64, 64); expected (192, 8, 8). Use the tokenizer of its run."
    )
    with pytest.raises(CheckpointError, match=expected):
        open_trained(find_source(**pair, tokenizer=str(other)))


def test_a_retrained_decoder_is_no_other_tokenizer(trained_run, tmp_path):
    moved = Path(shutil.copytree(trained_run / "tokenizer", tmp_path / "tokenizer"))
    tensors = load_file(moved / "model.safetensors")
    save_file(
        {n: v * 2 if n.startswith("decoder.head") else v for n, v in tensors.items()}, moved / "model.safetensors"
    )
    open_trained(find_source(generator=str(trained_run / "generator"), task="imagenet", recipe="quickstart",
                             tokenizer=str(moved)))  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_or_missing_part_is_named(folder, part):
    config = folder / part / "config.json"
    config.write_text(config.read_text() + "\n")
    got = folder_sha256(folder / part)[:14]
    with pytest.raises(
        CheckpointError, match=f"{part}: not the part that the pipeline was saved with; got {got}; expec"
    ):
        Pipeline.from_pretrained(folder)
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"{part}: not the part .* got no such folder; expected .* whole pipe"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 2}, "pipeline.json: unknown format_version; got 2; expected 1. Update raev2."),
     ({"parts": {}}, "pipeline.json: damaged, or of another kind; got KeyError: 'tokenizer'"),
     ({"spec": {}}, "spec.task: a run spec names its task")],
)  # fmt: skip
def test_a_damaged_pipeline_file_is_one_line(folder, change, message):
    file = folder / "pipeline.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises((CheckpointError, SpecError), match=re.escape(message)):
        Pipeline.from_pretrained(folder)


def test_conditions_that_do_not_exist_name_the_closest(saved, tmp_path):
    pipe = Pipeline.from_pretrained(saved)
    with pytest.raises(SpecError, match="--label: unknown class; got 'dicc'; .*Did you mean 'disc'?"):
        pipe(label="dicc")
    with pytest.raises(
        SpecError, match="no condition of task imagenet; got 'lable'; expected one of label. Did you mea"
    ):
        pipe(lable="disc")
    with pytest.raises(SpecError, match="sampling.steps: not valid; got 0; expected input should be greater than 0"):
        pipe(steps=0)
    with pytest.raises(SpecError, match="dtype: not usable; got 'torch.int8'; expected one of torch.float32"):
        Pipeline.from_pretrained(saved, dtype=torch.int8)
    with pytest.raises(
        CheckpointError, match="neither a run folder nor a pipeline; expected a run folder with spec.yaml"
    ):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--generator", "g"], "--generator: a pair of artefacts lacks something, or has --run beside it; expected --gen"),
     (["--run", "r", "--generator", "g", "--tokenizer", "t"], "has --run beside it"),
     (["--run", "r", "--recipe", "q"], "--recipe: has no effect without --generator and --tokenizer"),
     (["--task", "imagenet", "--set", "seed=1"], "--set: has no effect without --generator and --tokenizer"),
     ([], "--run: which run?")],
)  # fmt: skip
def test_options_that_name_no_model_are_one_line(options, message, capsys):
    assert main(["eval", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_hub_that_refuses_says_the_way_out(hub, saved, monkeypatch):
    hub.gated.add("lab/gated")
    where = "the weights are missing; got"
    login = "log in with `hf auth login`. It comes from"
    for name, options, message in (
        ("lab/gated", {}, f"{where} GatedRepoError: .* Accept its terms there, then {login} .*/lab/gated"),
        ("lab/none", {}, f"{where} RepositoryNotFoundError: .* Check the name; for a private one {login}"),
        (
            "lab/none",
            {"local_files_only": True},
            f"{where} LocalEntryNotFoundError.*without network copy it from a mach",
        ),
    ):
        with pytest.raises(CheckpointError, match=f"^model {name}: {message}"):
            Pipeline.from_pretrained(name, **options)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="^hub lab/tiny: not uploaded; got .*Log in with `hf auth login`, with a"):
        Pipeline.from_pretrained(saved).push_to_hub("lab/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=f"^model lab/none: {where} LocalEntryNotFoundError.*without network copy"
    ):
        Pipeline.from_pretrained("lab/none")
