"""Data, tokenizer, generator, samples, evaluation and report, through the command line and the Python names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from raev2 import RAE, Generator, pipeline, sample, train_generator, train_tokenizer
from raev2.command.cli import main
from raev2.data import FolderDataset, to_float, to_uint8
from raev2.errors import CheckpointError
from raev2.spec import NoGuidance
from raev2.spec_io import apply_overrides, fingerprint, load_spec, save_spec
from raev2.tokenizer.encoders import TimmTrunk

PROTOCOLS = ("reconstruction-micro", "generation-micro")


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(trained_run, tmp_path / "runs" / "imagenet" / "tiny"))


def numbers(run: Path, protocol: str) -> dict:
    return json.loads((run / "eval" / f"{protocol}.json").read_text())


def history(run: Path, **match) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if all(line[name] == value for name, value in match.items())]


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


# What training leaves.


def test_a_run_folder_is_complete(trained_run, tiny_spec):
    for file in (
        "spec.yaml", "provenance.json", "metrics.jsonl", "report.html", "tokenizer/config.json",
        "tokenizer/README.md", "tokenizer/model.safetensors", "generator/config.json", "generator/README.md",
        "generator/model.safetensors", "checkpoints/generator/000000064/MANIFEST.json",
        *(f"eval/{protocol}.json" for protocol in PROTOCOLS),
        *(f"samples/tokenizer-{images:09d}.png" for images in (0, 24, 48)),
        *(f"samples/generator-{images:09d}.png" for images in (0, 32, 64)),
    ):  # fmt: skip
        assert (trained_run / file).is_file(), file
    assert load_spec(trained_run / "spec.yaml") == tiny_spec
    assert list(trained_run.rglob("*.partial")) == []
    provenance = json.loads((trained_run / "provenance.json").read_text())
    assert provenance["spec_fingerprint"] == fingerprint(tiny_spec)
    assert provenance["data"]["recipe"] == "synthetic" and len(provenance["data"]["fingerprint"]) == 64


def changed(file: Path, **values) -> Path:
    said = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps(said), encoding="utf-8")
    return file


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_result_file_alone_gives_the_same_numbers(run, tmp_path, protocol):
    """Also when the run was moved, and its spec says something else by now."""
    expected = numbers(run, protocol)["results"]
    spec = load_spec(run / "spec.yaml")
    save_spec(apply_overrides(spec, ["sampling.steps=1", "evaluation.num_samples=8"]), run / "spec.yaml")
    found = pipeline.rerun(changed(run / "eval" / f"{protocol}.json", run=str(tmp_path / "gone")))
    assert [result.name for result in found] == [entry["name"] for entry in expected]
    assert [result.value for result in found] == pytest.approx([entry["value"] for entry in expected], rel=1e-6)


def test_a_result_of_other_weights_or_data_is_not_measured_again(run):
    file = changed(run / "eval" / "generation-micro.json", weights={}, label_policy="other", run=str(run))
    message = "what it measured is another now; got weights, label_policy. Evaluate the run again"
    with pytest.raises(CheckpointError, match=message):
        pipeline.rerun(file)


def test_every_step_is_logged_once(trained_run):
    for stage, steps in (("tokenizer", 6), ("generator", 8)):
        lines = history(trained_run, stage=stage, kind="train")
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert [line["images"] for line in lines] == list(range(8, 8 * steps + 1, 8))
        for line in lines:
            assert line["lr"] > 0 and line["grad_norm"] > 0 and line["skipped_images"] == 0
            assert all(np.isfinite(value) for value in line.values() if isinstance(value, float))
    adversarial = [line["images"] for line in history(trained_run, stage="tokenizer", kind="train") if "gan" in line]
    assert adversarial == [32, 40, 48], "from half of the training on, not before"
    assert all("disc" in line for line in history(trained_run, stage="tokenizer", kind="train"))
    assert all("base" in line for line in history(trained_run, stage="generator", kind="train"))


def test_the_tokenizer_is_evaluated_at_its_end_and_the_generator_on_the_way(trained_run):
    found = [(line["stage"], line["images"]) for line in history(trained_run, kind="eval")]
    assert found == [("tokenizer", 48), ("generator", 32), ("generator", 64)]


@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_stage_1_is_the_same_training_where_one_pass_serves_tokens_and_perceptual_loss(
    tiny_spec, tmp_path, monkeypatch, micro_batch_size
):
    """With the adversary from the second step on; one pass of the encoder less for each picture."""
    loop = tiny_spec.tokenizer_training.replace(images=24, micro_batch_size=micro_batch_size)
    spec = tiny_spec.replace(tokenizer_training=loop)
    block_outputs, seen = TimmTrunk.block_outputs, []

    def counted(trunk, pixels, layers):
        seen.append(len(pixels))
        return block_outputs(trunk, pixels, layers)

    monkeypatch.setattr(TimmTrunk, "block_outputs", counted)
    trained = []
    for name in ("shared", "apart"):
        seen.clear()
        run = pipeline.train(spec, tmp_path / name, stage="tokenizer")
        trained.append((load_file(run / "tokenizer" / "model.safetensors"), sum(seen)))
        monkeypatch.setattr(train_tokenizer, "shared_layers", lambda *_: ())
    (ours, few), (theirs, many) = trained
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) and ours.keys() == theirs.keys()
    assert many - few == loop.images


def test_both_stages_learn(trained_run):
    losses = [line["l1"] for line in history(trained_run, stage="tokenizer", kind="train")]
    assert losses[-1] < losses[0]
    trained = load_file(trained_run / "generator/model.safetensors").values()
    assert all(value.isfinite().all() for value in trained)


# Python names.


def test_the_artefacts_are_all_that_is_needed(trained_run, synthetic_data):
    """Images to samples through the two folders alone, and the same bytes as the command."""
    rae = RAE.from_pretrained(trained_run / "tokenizer")
    generator = Generator.from_pretrained(trained_run / "generator")
    images = to_float(torch.stack([FolderDataset(synthetic_data, "val", (64, 64)).image(i) for i in range(2)]))
    latents = rae.encode(images)
    assert tuple(latents.shape) == (2, *generator.latent_shape) == (2, *rae.latent_shape)
    assert rae.latent_stats.num_images == 32
    assert torch.allclose(rae.decode(latents), rae.reconstruct(images), atol=1e-5)
    cond = {"label": torch.tensor([0, 1, 2])}
    spec = load_spec(trained_run / "spec.yaml")
    pixels = sample(generator, rae, cond, steps=2, guidance=spec.sampling.guidance, seed=5)
    assert tuple(pixels.shape) == (3, 3, 64, 64) and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    again = sample(
        Generator.from_pretrained(trained_run / "generator"), RAE.from_pretrained(trained_run / "tokenizer"), cond,
        steps=2, guidance=spec.sampling.guidance, seed=5, batch_size=1,
    )  # fmt: skip
    assert torch.equal(pixels, again)


def test_a_saved_artefact_is_the_artefact(trained_run, tmp_path):
    for kind, class_ in (("tokenizer", RAE), ("generator", Generator)):
        class_.from_pretrained(trained_run / kind).save_pretrained(tmp_path / kind)
        old, new = (load_file(folder / kind / "model.safetensors") for folder in (trained_run, tmp_path))
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
        config = json.loads((trained_run / kind / "config.json").read_text())
        assert json.loads((tmp_path / kind / "config.json").read_text()) == config


def test_the_generator_artefact_holds_the_averaged_weights(trained_run):
    weights = load_file(trained_run / "generator/model.safetensors")
    folder = trained_run / "checkpoints/generator/000000064"
    averaged, raw = load_file(folder / "ema-0.5.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in averaged.items())
    assert any(not torch.equal(raw[name], value) for name, value in averaged.items())


# raev2 sample


def test_samples_are_the_same_bytes_for_the_same_seed(run, capsys):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert main(["sample", "--run", str(run), "--n", "6", "--seed", str(seed), "--out", str(run / name)]) == 0
    assert "guidance: internal scale 1.5" in capsys.readouterr().out
    a, b, c = (pictures(run / name) for name in "abc")
    assert list(a) == [*(f"{i:05d}.png" for i in range(6)), "grid.png"]
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_a_sample_does_not_depend_on_how_many_there_are(run):
    for n in (2, 5):
        assert main(["sample", "--run", str(run), "--n", str(n), "--label", "disc", "--out", str(run / str(n))]) == 0
    few, many = pictures(run / "2"), pictures(run / "5")
    assert [few[f"{i:05d}.png"] for i in range(2)] == [many[f"{i:05d}.png"] for i in range(2)]


def test_samples_by_name_or_number_and_their_plan(run):
    options = ["--steps", "3", "--guidance", "cfg", "--scale", "2", "--interval", "0.1", "1"]
    for name, label in (("name", ["ring", "disc"]), ("number", ["2", "1"])):
        command = ["sample", "--run", str(run), "--n", "4", "--label", *label, *options, "--out", str(run / name)]
        assert main(command) == 0
    assert pictures(run / "name") == pictures(run / "number")
    plan = json.loads((run / "name" / "plan.json").read_text())
    assert plan["captions"] == ["ring", "ring", "disc", "disc"] and plan["seed"] == 0
    assert plan["sampling"]["steps"] == 3
    assert plan["sampling"]["guidance"] == {"kind": "cfg", "scale": 2.0, "interval": [0.1, 1.0], "drop": []}


def test_the_newest_run_is_sampled_by_default(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--task", "imagenet", "--n", "1"]) == 0
    assert (run / "samples" / "seed-0" / "00000.png").is_file()


def test_a_run_in_training_is_sampled_from_its_newest_checkpoint(run):
    """At the end both are the averaged weights, so the pictures are the same."""
    assert main(["sample", "--run", str(run), "--n", "2", "--out", str(run / "finished")]) == 0
    shutil.rmtree(run / "generator")
    assert main(["sample", "--run", str(run), "--n", "2", "--out", str(run / "training")]) == 0
    assert pictures(run / "finished") == pictures(run / "training")


# raev2 reconstruct


@pytest.mark.parametrize("source", [".", "tokenizer"])
def test_reconstruct_writes_a_table_and_a_grid(run, synthetic_data, capsys, source):
    files = [synthetic_data / "val" / f"{i:06d}.png" for i in range(3)]
    out = run / "out"
    assert main(["reconstruct", "--run", str(run / source), *map(str, files), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["file", "PSNR", "dB", "SSIM"]
    assert [line.split()[0] for line in lines[1:5]] == ["000000.png", "000001.png", "000002.png", "mean"]
    psnr = [float(line.split()[1]) for line in lines[1:5]]
    assert psnr[3] == pytest.approx(sum(psnr[:3]) / 3, abs=0.01)
    assert sorted(pictures(out)) == ["00000-000000.png", "00001-000001.png", "00002-000002.png", "grid.png"]
    original, decoded = (np.asarray(Image.open(file)) / 255 for file in (files[0], out / "00000-000000.png"))
    assert psnr[0] == pytest.approx(-10 * np.log10(np.mean((original - decoded) ** 2)), abs=0.01)


# raev2 eval


def test_evaluations_are_the_same_every_time(run):
    """In training, by the command, and by the command again with nothing kept from before."""
    trained = {protocol: numbers(run, protocol) for protocol in PROTOCOLS}
    assert main(["eval", "--run", str(run)]) == 0
    first = {protocol: numbers(run, protocol) for protocol in PROTOCOLS}
    shutil.rmtree(run / "eval")
    assert main(["eval", "--run", str(run)]) == 0
    second = {protocol: numbers(run, protocol) for protocol in PROTOCOLS}
    for protocol in PROTOCOLS:
        results = [found[protocol]["results"] for found in (trained, first, second)]
        assert results[0] == results[1] == results[2], "to the last digit"
        for found in (trained, first):
            del found[protocol]["date"], found[protocol]["run"]
        assert trained[protocol] == first[protocol], "also what the file says about the numbers"
    assert (first[PROTOCOLS[0]]["images_seen"], first[PROTOCOLS[1]]["images_seen"]) == (48, 64)
    assert (first[PROTOCOLS[0]]["ema_decay"], first[PROTOCOLS[1]]["ema_decay"]) == (0.5, 0.5)
    assert first[PROTOCOLS[0]]["sampling"] is None and first[PROTOCOLS[1]]["sampling"]["steps"] == 2


def test_an_evaluation_in_training_is_the_one_of_its_checkpoint(run):
    """The run as it was after 32 images; evaluations on the way are without guidance."""
    shutil.rmtree(run / "generator")
    for images in (48, 64):
        shutil.rmtree(run / f"checkpoints/generator/{images:09d}")
    spec = load_spec(run / "spec.yaml")
    save_spec(spec.replace(sampling=spec.sampling.replace(guidance=NoGuidance())), run / "spec.yaml")
    results = pipeline.evaluate_run(run, ["generation-micro"])["generation-micro"]
    (logged,) = history(run, kind="eval", images=32)[:1]
    assert {result.name: result.value for result in results} == logged["metrics"]
    assert numbers(run, "generation-micro")["images_seen"] == 32


def test_one_protocol_can_be_asked_for(run, capsys):
    shutil.rmtree(run / "eval")
    assert main(["eval", "--run", str(run), "--protocol", "reconstruction-micro"]) == 0
    assert [file.name for file in (run / "eval").glob("*.json")] == ["reconstruction-micro.json"]
    assert "psnr" in capsys.readouterr().out


# raev2 report, raev2 latents, raev2 train


def test_a_report_is_one_file(run):
    (run / "report.html").unlink()
    assert main(["report", "--run", str(run)]) == 0
    html = (run / "report.html").read_text()
    assert "fd_micro" in html and "synthetic" in html
    assert 'src="http' not in html and "<script src" not in html


def test_latent_statistics(run, synthetic_data):
    common = ["--run", str(run), "--data", str(synthetic_data), "--out"]
    assert main(["latents", "stats", *common, str(run / "stats.safetensors")]) == 0
    rae, stats = RAE.from_pretrained(run / "tokenizer"), load_file(run / "stats.safetensors")
    assert torch.equal(stats["mean"], rae.latent_stats.mean) and torch.equal(stats["var"], rae.latent_stats.var)


def test_a_finished_run_is_not_trained_again(run, tiny_recipe, capsys):
    before = {file: file.read_bytes() for file in run.rglob("*.safetensors")}
    assert main(["train", "--task", "imagenet", "--recipe", "tiny", "--run", str(run)]) == 0
    assert {file: file.read_bytes() for file in run.rglob("*.safetensors")} == before
    out = capsys.readouterr().out
    assert "fd_micro" in out and str(run / "report.html") in out


def test_train_builds_its_data_and_stops_after_the_stage_asked_for(tiny_recipe, tmp_path, monkeypatch):
    """From nothing, in another precision, with accumulation, workers and a tokenizer only; then stage 2 on top."""
    monkeypatch.chdir(tmp_path)
    command = [
        "train", "--task", "imagenet", "--recipe", "tiny", "--set", "data.dir=shapes", "--set", "precision=bf16",
        "--set", "data.options={num_train: 16, num_val: 8}", "--set", "evaluation.protocols=[reconstruction-micro]",
        "--set", "evaluation.in_training=[]", "--set", "data.num_workers=1",
        *(f"--set={stage}_training.{field}" for stage in ("tokenizer", "generator")
          for field in ("images=16", "save_every_images=8", "micro_batch_size=4")),
    ]  # fmt: skip
    assert main([*command, "--stage", "tokenizer"]) == 0
    run = Path("runs/imagenet/tiny")
    assert (run / "tokenizer" / "config.json").is_file() and not (run / "generator").exists()
    tokenizer = (run / "tokenizer" / "model.safetensors").read_bytes()
    assert main(command) == 0
    assert (run / "generator" / "config.json").is_file()
    assert (run / "tokenizer" / "model.safetensors").read_bytes() == tokenizer
    assert load_file(run / "generator" / "model.safetensors")["network.trunk.blocks.0.mlp.w3.weight"].dtype == (
        torch.float32
    )


def test_another_run_can_use_the_tokenizer(trained_run, tiny_spec, tmp_path):
    spec = apply_overrides(
        tiny_spec,
        [f"tokenizer_from={trained_run / 'tokenizer'}", "tokenizer.noise_tau=0.1", "evaluation.protocols=[]",
         "evaluation.in_training=[]", "generator_training.images=8", "generator_training.sample_every_images=8",
         "generator_training.latent_cache=true"],
    )  # fmt: skip
    run = pipeline.train(spec, tmp_path / "run")
    assert not (run / "tokenizer").exists() and (run / "generator" / "config.json").is_file()
    assert load_spec(run / "spec.yaml").tokenizer == tiny_spec.tokenizer, "the one that is used"
    assert main(["sample", "--run", str(run), "--n", "1"]) == 0


def test_an_unreadable_picture_does_not_stop_a_training(tiny_spec, synthetic_data, tmp_path):
    data = Path(shutil.copytree(synthetic_data, tmp_path / "data"))
    (data / "train" / "000005.png").write_bytes(b"")
    spec = apply_overrides(
        tiny_spec,
        [f"data.dir={data}", "evaluation.protocols=[]", "evaluation.in_training=[]", "tokenizer_training.images=32",
         "generator_training.images=32", "generator_training.latent_cache=true"],
    )  # fmt: skip
    run = pipeline.train(spec, tmp_path / "run")
    for stage in ("tokenizer", "generator"):
        assert history(run, stage=stage, kind="train")[-1]["skipped_images"] == 1
    assert RAE.from_pretrained(run / "tokenizer").latent_stats.num_images == 31


@pytest.mark.parametrize("whiten", ["null", "0.5"])
def test_the_latents_that_the_statistics_read_are_those_that_the_generator_looks_up(
    whiten, tiny_spec, tmp_path, monkeypatch
):
    spec = apply_overrides(
        tiny_spec,
        [f"tokenizer.whiten={whiten}", "evaluation.protocols=[]", "evaluation.in_training=[]",
         "tokenizer_training.images=16", "generator_training.images=16", "generator_training.latent_cache=true"],
    )  # fmt: skip
    pipeline.train(spec, tmp_path / "two", stage="tokenizer")
    two = pipeline.train(spec, tmp_path / "two")  # encodes them again
    monkeypatch.setattr(train_generator, "ordered_batches", None)  # nothing is left to encode
    one = pipeline.train(spec, tmp_path / "one")
    weights = [(run / "generator" / "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]


def test_images_become_8_bit_in_one_place(trained_run):
    """A picture on disk is the sample, rounded."""
    rae, generator = (c.from_pretrained(trained_run / k) for c, k in ((RAE, "tokenizer"), (Generator, "generator")))
    spec = load_spec(trained_run / "spec.yaml")
    out = pipeline.sample_run(trained_run, {"n": 1, "label": ["ring"]}, seed=3, out=trained_run.parent / "one")
    pixels = sample(generator, rae, {"label": torch.tensor([2])}, 2, spec.sampling.guidance, 3)
    saved = torch.from_numpy(np.array(Image.open(out / "00000.png"))).permute(2, 0, 1)
    assert torch.equal(saved, to_uint8(pixels)[0])
