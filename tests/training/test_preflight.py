"""Everything that a training needs later is looked at before it starts; one test for each finding, with its text."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from raev2 import pipeline
from raev2.command.cli import main
from raev2.errors import CheckpointError, DataError, FileError, SpecError
from raev2.files.assets import INCEPTION_WEIGHTS, Asset
from raev2.spec import CFG, AdamWSpec, AutoGuidance, InternalGuidance, LPIPSLoss, MuonSpec, PixelSpec
from raev2.task import Task, get_recipe, get_task
from raev2.training import preflight
from raev2.training.preflight import GENERATOR, TOKENIZER, Plan, make_ready, network_of, run_sizes, state_bytes

IMAGENET = get_task("imagenet")


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches of torch and of the hub; this machine has network, as far as it knows."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    return tmp_path


@pytest.fixture
def find(caches, tiny_spec, monkeypatch):
    """Findings about the tiny run with some fields changed; any connection is a failed test."""

    def refuse(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    def run(task: Task = IMAGENET, stage: str = "generator", **changes):
        return list(preflight.preflight(Plan(task, tiny_spec.replace(**changes), caches / "run", stage)))

    return run


def of(findings, what: str):
    """The findings about something."""
    return [finding for finding in findings if finding.what.startswith(what)]


def test_a_run_that_has_everything(find, synthetic_data):
    findings = find()
    assert {finding.what: finding.state for finding in findings if finding.state != "guessed"} == {
        "networks": "ok", f"data {synthetic_data}": "ok", "encoder micro": "ok",
        "LPIPS (VGG)": "missing",
    }  # fmt: skip
    assert all(finding.error is None for finding in findings)
    assert of(findings, "data ")[0].detail == "train 32, val 16, 4 classes"
    assert of(findings, "LPIPS")[0].detail == "missing; feature_distance_micro is used instead"
    assert of(findings, "networks")[0].detail == "latents 192 x 8 x 8 of pictures of 64 x 64 px"


# Protocols and networks.


def test_an_unknown_protocol_is_found(find, tiny_spec):
    (finding,) = of(find(evaluation=tiny_spec.evaluation.replace(in_training=("generation-mikro",))), "weights")
    assert finding.state == "error" and isinstance(finding.error, SpecError)
    assert finding.detail.startswith("--protocol: unknown protocol of task imagenet; got 'generation-mikro'")


def test_a_layer_that_an_encoder_has_not_is_found_wherever_it_is_named(find, tiny_spec):
    training = tiny_spec.tokenizer_training
    for change in (
        {"tokenizer": tiny_spec.tokenizer.replace(encoder=tiny_spec.tokenizer.encoder.replace(layers=(0, 6)))},
        {"tokenizer_training": training.replace(adversarial=training.adversarial.replace(layers=(0, 6)))},
        {"tokenizer_training": training.replace(perceptual=training.perceptual.replace(layers=(0, 6)))},
    ):
        (finding,) = of(find(**change), "networks")
        assert finding.detail == "encoder.layers: micro has 6 blocks; got [0, 6]; expected block indices from 0 to 5"


def test_guidance_that_is_compared_at_the_end_is_tried_at_the_start(find, tiny_spec):
    network = tiny_spec.generator.replace(base_head_depth=None)
    sampling = tiny_spec.sampling.replace(guidance=CFG(scale=2.0))
    evaluation = tiny_spec.evaluation.replace(compare_guidance=(InternalGuidance(),))
    (finding,) = of(find(generator=network, sampling=sampling, evaluation=evaluation), "networks")
    assert finding.detail == "guidance internal: needs a base head, there is none. Use another kind."
    (finding,) = of(find(sampling=tiny_spec.sampling.replace(guidance=CFG(scale=2.0, drop=("action",)))), "networks")
    assert finding.error is not None and "action" in finding.detail


def test_the_width_of_the_alignment_target_is_found(find, tiny_spec):
    from raev2.spec import EncoderSpec, RepaSpec

    found = find(
        generator=tiny_spec.generator.replace(repa_depth=1, repa_dim=191),
        generator_training=tiny_spec.generator_training.replace(repa=RepaSpec(encoder=EncoderSpec(name="micro"))),
    )
    (finding,) = of(found, "networks")
    assert finding.detail == (
        "spec.generator.repa_dim: differs from the width of the target encoder; got 191; expected 192"
    )


def test_a_weak_or_initial_generator_that_is_nowhere_is_found(find, tiny_spec, trained_run):
    artefact = str(trained_run / "generator")
    guided = tiny_spec.sampling.replace(guidance=AutoGuidance(weak="no-weak"))
    found = find(sampling=guided, generator_from=artefact)
    assert of(found, "networks")[0].state == of(found, "generator_from")[0].state == "ok"
    (finding,) = of(found, "guidance auto.weak")
    assert finding.detail == (
        "guidance auto.weak: the weights are missing; got not a path on this machine; expected no-weak. "
        "Copy it there, or correct the name."
    )


def test_the_tokenizer_of_another_run_is_the_one_that_counts(find, tiny_spec, trained_run):
    """The spec's own tokenizer does not matter then, nor do the weights that only its training needs."""
    training = tiny_spec.tokenizer_training.replace(perceptual=LPIPSLoss())
    found = find(tokenizer=PixelSpec(), tokenizer_training=training, tokenizer_from=str(trained_run / "tokenizer"))
    assert of(found, "networks")[0].detail == "latents 192 x 8 x 8 of pictures of 64 x 64 px"
    assert of(found, "tokenizer_from")[0].state == "ok" and not of(found, "memory, tokenizer")
    (finding,) = of(find(tokenizer_from="nowhere"), "tokenizer_from")
    assert finding.detail == (
        "tokenizer_from: the weights are missing; got not a path on this machine; expected nowhere. "
        "Copy it there, or correct the name."
    )


# Data.


def test_missing_data_without_a_recipe(find, tiny_spec):
    (finding,) = of(find(data=tiny_spec.data.replace(dir="nowhere", recipe=None)), "data")
    assert finding.state == "error" and isinstance(finding.error, DataError)
    assert finding.detail.startswith(
        "data nowhere: no dataset folder here; expected a folder with manifest.json. Build"
    )


def test_missing_data_that_a_recipe_builds(find, tiny_spec):
    (finding,) = of(find(data=tiny_spec.data.replace(dir="nowhere")), "data")
    assert (finding.state, finding.error) == ("missing", None)
    assert finding.detail.startswith("will be built by synthetic: ") and "options" not in finding.detail


def test_the_size_of_missing_data_is_that_of_the_recipe_without_its_options(find, tiny_spec):
    (finding,) = of(find(data=tiny_spec.data.replace(dir="nowhere", options={"num_train": "5000"})), "data")
    assert finding.detail.endswith(" without its options")


def test_a_recipe_that_cannot_build(find, tiny_spec, monkeypatch):
    data = tiny_spec.data.replace(dir="nowhere", recipe="image-folder", options={"src": "no-pictures"})
    (finding,) = of(find(data=data), "data")
    assert isinstance(finding.error, DataError) and "no-pictures" in finding.detail
    (finding,) = of(find(data=data.replace(options={"sorce": "x"})), "data")
    assert finding.detail.startswith("data image-folder: unknown option; got sorce; expected one of ")
    monkeypatch.setattr(preflight, "get_data_recipe", lambda _: SimpleNamespace(name="odd", packages=("no-such-one",)))
    (finding,) = of(find(data=data), "data")
    assert finding.detail == (
        "data recipe odd: the package no-such-one is not installed. Run `pip install no-such-one`."
    )


def test_a_split_that_is_missing_or_empty(find, tiny_spec, synthetic_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(synthetic_data, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (finding,) = of(find(data=tiny_spec.data.replace(dir=str(folder))), "data")
    assert finding.detail == f"data {folder}: unknown split; got val; expected one of train"


def test_one_held_out_picture_is_told_before_the_training_and_not_after_it(find, tiny_spec, synthetic_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(synthetic_data, folder)
    (folder / "val.jsonl").write_text((folder / "val.jsonl").read_text().splitlines(keepends=True)[0])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"]["num_samples"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = tiny_spec.data.replace(dir=str(folder))
    (finding,) = of(find(data=data), "data")
    assert finding.detail == (
        f"data {folder}: too few held-out samples to evaluate; got 1; expected at least 2. "
        "Hold out more, or evaluate nothing: --set evaluation.protocols=[]."
    )
    (finding,) = of(find(data=data, evaluation=tiny_spec.evaluation.replace(protocols=())), "data")
    assert finding.detail == "train 32, val 1, 4 classes"


def test_pictures_smaller_than_those_of_the_model_are_said_and_no_error(find, tiny_spec):
    found = find(tokenizer=tiny_spec.tokenizer.replace(grid=(16, 16)))
    finding = of(found, "data")[1]
    assert (finding.state, finding.error) == ("too small", None)
    assert finding.detail == "64 x 64 px are enlarged to 128 x 128 px"


# Weights.


def test_weights_that_can_be_downloaded_are_no_error(find, tiny_spec):
    found = find(tokenizer=tiny_spec.tokenizer.replace(encoder=tiny_spec.tokenizer.encoder.replace(name="dinov2-b")))
    (finding,) = of(found, "encoder dinov2-b")
    assert (finding.state, finding.error) == ("missing", None)
    assert finding.detail == (
        "missing; will be downloaded from https://huggingface.co/timm/vit_base_patch14_reg4_dinov2.lvd142m"
    )


def test_a_gated_encoder_without_access_names_licence_page_and_the_nearest_open_one(find, tiny_spec):
    found = find(tokenizer=tiny_spec.tokenizer.replace(encoder=tiny_spec.tokenizer.encoder.replace(name="dinov3-b16")))
    (finding,) = of(found, "encoder dinov3-b16")
    assert finding.state == "error" and isinstance(finding.error, CheckpointError)
    for text in ("no login for a gated model", "DINOv3 License", "https://huggingface.co/timm/vit_base_patch16_dinov3",
                 "The nearest encoder with an open licence is 'dinov2-b'"):  # fmt: skip
        assert text in finding.detail


def test_weights_of_metrics_and_losses_are_looked_for(find, tiny_spec, monkeypatch):
    changes = {
        "evaluation": tiny_spec.evaluation.replace(protocols=("reconstruction-inception",)),
        "tokenizer_training": tiny_spec.tokenizer_training.replace(perceptual=LPIPSLoss()),
    }
    found = find(**changes)
    assert of(found, "Inception")[0].detail.startswith(
        "missing; will be downloaded from https://github.com/toshas/torch-"
    )
    assert "downloaded" in of(found, "LPIPS (VGG)")[0].detail, "the loss cannot do without it, the metric could"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find(**changes)
    assert isinstance(of(found, "Inception")[0].error, CheckpointError)
    assert "HF_HUB_OFFLINE=1, nothing is downloaded" in of(found, "LPIPS")[0].detail
    monkeypatch.setattr("importlib.metadata.version", _not_installed)
    assert of(find(**changes), "Inception")[0].detail == (
        "Inception: the package torch-fidelity is not installed. Run `pip install torch-fidelity`."
    )


def _not_installed(name):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_a_feature_space_among_several_may_be_missing(find, tiny_spec):
    found = find(evaluation=tiny_spec.evaluation.replace(protocols=("generation-fdr6",)))
    spaces = [finding for finding in found if finding.detail == "missing; the space is left out"]
    assert sorted(finding.what for finding in spaces) == [
        "Inception", "space clip", "space convnext", "space dinov2", "space mae", "space siglip"
    ]  # fmt: skip
    assert all((finding.state, finding.error) == ("missing", None) for finding in spaces)


def test_a_task_says_what_its_conditions_need():
    task = get_task("t2i")
    spec = get_recipe(task, "raev2-siglip2b-gemma2")
    (asset,) = task.needs(spec)
    assert (asset.what, asset.source, asset.gated) == ("text encoder google/gemma-2-2b", "google/gemma-2-2b", True)
    assert "*.model" in asset.files and not any("bin" in files for files in asset.files)
    assert asset in Plan(task, spec).assets()
    assert task.needs(get_recipe(task, "quickstart")) == []


@pytest.mark.parametrize("task", ["imagenet", "nwm", "t2i"])
def test_quickstarts_need_nothing_that_is_not_packaged(task):
    task = get_task(task)
    needed = Plan(task, get_recipe(task, "quickstart")).assets()
    assert [asset.what for asset in needed if not asset.without] == ["encoder micro"]


# Disk and memory.


def test_a_disk_that_is_too_small(find, monkeypatch, tiny_spec, caches):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    (finding,) = of(find(), "space")
    assert finding.state == "error" and isinstance(finding.error, FileError)
    assert re.fullmatch(
        rf"disk of {caches}/run: at least 0\.\d\d GiB needed, 0\.00 GiB there\. "
        r"Choose another --run, or lower keep_checkpoints\.", finding.detail,
    )  # fmt: skip


def test_the_disk_is_estimated_from_what_checkpoints_hold(trained_run, tiny_spec):
    """Against the files of a real run: weights, averages and moments of both stages."""
    for stage in ("tokenizer", "generator"):
        loop = getattr(tiny_spec, f"{stage}_training")
        parameters = sum(weight.numel() for weight in network_of(IMAGENET, tiny_spec, stage).parameters())
        estimate = state_bytes(parameters, loop) - 4 * parameters
        newest = max((trained_run / "checkpoints" / stage).iterdir())
        files = [file for file in newest.glob("*.safetensors") if not file.name.startswith("disc")]
        assert sum(file.stat().st_size for file in files) == pytest.approx(estimate, rel=0.25)


def test_memory_that_is_too_small(find, tiny_spec, monkeypatch):
    monkeypatch.setattr(preflight, "_memory", lambda: 10_000)
    for stage in (TOKENIZER, GENERATOR):
        run = {} if stage == TOKENIZER else {"tokenizer": PixelSpec(image_size=(8, 8))}
        (finding,) = of(find(**run), "space")
        assert isinstance(finding.error, SpecError)
        assert re.fullmatch(
            rf"memory, {stage}: at least 0\.\d\d GiB needed, 0\.00 GiB there\. "
            r"Choose a smaller network, parallel\.strategy=fsdp, or another machine\.", finding.detail,
        )  # fmt: skip


def test_shards_take_less_memory(find, tiny_spec, monkeypatch):
    given = []
    monkeypatch.setattr(preflight, "_fits", lambda what, needed, *_: given.append((what, needed)))
    monkeypatch.setattr(preflight.dist, "world_size", lambda: 2)
    needed = []
    for strategy in ("ddp", "fsdp"):
        find(parallel=tiny_spec.parallel.replace(strategy=strategy))
        needed.append(dict(given)["memory, generator"])
    assert needed[1] == needed[0] // 2


def test_moments_of_the_optimizer_count(tiny_spec):
    loop = tiny_spec.generator_training.replace(ema_decays=(0.5,), optimizer=MuonSpec())
    assert state_bytes(10, loop) == 4 * 10 * (1 + 1 + 1 + 1)
    assert state_bytes(10, tiny_spec.tokenizer_training.replace(optimizer=AdamWSpec())) == 4 * 10 * (1 + 1 + 1 + 2)


def test_sizes_of_an_encoder_that_is_not_in_the_table(tiny_spec):
    encoder = tiny_spec.tokenizer.encoder.replace(name="timm:vit_tiny_patch16_224", layers=())
    sizes = dict(run_sizes(IMAGENET, tiny_spec.replace(tokenizer=tiny_spec.tokenizer.replace(encoder=encoder))))
    assert sizes["latents"] == "192 x 8 x 8" and sizes["encoder"].startswith("timm:vit_tiny_patch16_224, layers last")


# What is done with the findings.


def test_training_stops_with_the_first_error_before_it_writes(tiny_spec, caches):
    data = tiny_spec.data.replace(dir=str(caches / "data"))
    spec = tiny_spec.replace(data=data, tokenizer=tiny_spec.tokenizer.replace(
        encoder=tiny_spec.tokenizer.encoder.replace(name="dinov3-b16")))  # fmt: skip
    with pytest.raises(CheckpointError, match="encoder dinov3-b16: the weights are missing; got no login for a gated"):
        pipeline.train(spec, caches / "run")
    assert not (caches / "data").exists() and not (caches / "run").exists()


def test_missing_weights_are_fetched_at_the_start(tiny_spec, caches, monkeypatch):
    fetched = []
    monkeypatch.setattr(Asset, "download", lambda asset, **_: fetched.append(asset.what))
    spec = tiny_spec.replace(
        evaluation=tiny_spec.evaluation.replace(protocols=("reconstruction-inception",)),
        tokenizer_training=tiny_spec.tokenizer_training.replace(perceptual=LPIPSLoss()),
    )
    make_ready(Plan(IMAGENET, spec, caches / "run"))
    assert sorted(fetched) == ["Inception", "LPIPS (VGG)"]


def test_a_dry_run_prints_the_findings_and_ends_with_the_code_of_the_first_error(
    tiny_recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train = ["train", "--task", "imagenet", "--recipe", "tiny", "--dry-run"]
    cases = {
        0: [],
        2: ["--set", "tokenizer.encoder.layers=[0,6]"],
        3: ["--set", "data.dir=nowhere", "--set", "data.recipe=null"],
        4: ["--set", "tokenizer.encoder.name=dinov3-b16", "--set", "tokenizer.encoder.layers=[]"],
    }
    for code, settings in cases.items():
        assert main([*train, *settings]) == code
        printed = capsys.readouterr()
        assert "needed" in printed.out and printed.out.endswith("nothing was started\n")
        assert len(printed.err.splitlines()) == (code != 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert main(train) == 6
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_and_fetches_the_weights_of_a_recipe(caches, capsys, monkeypatch):
    command = ["raev2-dinov3l-k7", "--task", "imagenet"]
    assert main(["assets", "list", *command]) == 0
    table = capsys.readouterr().out
    for asset in (INCEPTION_WEIGHTS, Asset("encoder dinov3-l16", "timm/vit_large_patch16_dinov3.lvd1689m")):
        (line,) = [line for line in table.splitlines() if line.startswith(asset.what)]
        assert re.split(" {2,}", line) == [asset.what, "missing", asset.url, str(asset.place)]
    fetched = []
    monkeypatch.setattr(Asset, "fetch", lambda asset, **_: fetched.append(asset.what))
    assert main(["assets", "fetch", *command]) == 0
    assert sorted(fetched) == ["Inception", "LPIPS (VGG)", "encoder dino-s8", "encoder dinov3-l16", "encoder micro"]
