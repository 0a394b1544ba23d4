"""The task as a whole: recipes without files, data and prompts, and a tiny run from shards to sampled prompts."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from PIL import Image

from raev2 import pipeline
from raev2.command import cli
from raev2.errors import DataError, SpecError
from raev2.spec_io import apply_overrides
from raev2.task import get_recipe, get_task
from raev2.training.preflight import run_sizes
from raev2_tasks.t2i.text.encoder import KNOWN_ENCODERS
from raev2_tasks.t2i.text.prompts import given_prompts, read_prompts, spread

TASK = get_task("t2i")


# Recipes.


@pytest.mark.parametrize("name", sorted(TASK.recipes()))
def test_sizes_of_a_recipe_need_no_file(name):
    sizes = dict(run_sizes(TASK, get_recipe(TASK, name)))
    assert "generator parameters" in sizes


def test_published_recipes_have_the_published_sizes():
    """DiT^DH with SigLIP-2 B latents and Qwen3-0.6B: 615 M parameters (diffusion-bench), shift sqrt(196608 / 4096)."""
    sizes = dict(run_sizes(TASK, get_recipe(TASK, "raev2-siglip2b")))
    assert float(sizes["generator parameters"].split()[0]) == pytest.approx(615, abs=3)
    assert sizes["latents"] == "768 x 16 x 16" and sizes["time shift"] == "6.928"
    for name in ("k1", "k7", "k23"):
        spec = get_recipe(TASK, f"raev2-dinov3l-{name}")
        assert (spec.task.text_encoder.name, spec.task.text_encoder.max_tokens) == ("Qwen/Qwen3-0.6B", 256)
        assert dict(run_sizes(TASK, spec))["time shift"] == "8"
        assert spec.sampling.steps == 50 and spec.sampling.guidance.scale == 6.0
        assert spec.tokenizer_from == f"runs/imagenet/raev2-dinov3l-{name}/tokenizer"


@pytest.mark.parametrize(("recipe", "width"), [("-t5xl", 2048), ("-gemma2", 2304), ("", 1024)])
def test_variants_differ_in_the_text_encoder(recipe, width):
    spec = get_recipe(TASK, f"raev2-siglip2b{recipe}")
    condition = TASK.condition(spec, None)
    assert condition.dim == width == KNOWN_ENCODERS[spec.task.text_encoder.name].width
    assert condition.num_null_tokens == KNOWN_ENCODERS[spec.task.text_encoder.name].num_null_tokens
    changed = apply_overrides(spec, ["task.null=none_visible", "task.adapter=mlp"])
    assert (TASK.condition(changed, None).num_null_tokens, TASK.condition(changed, None).adapter) == (0, "mlp")


def test_the_second_stage_starts_from_the_weights_of_the_first():
    base, fine = get_recipe(TASK, "raev2-siglip2b"), get_recipe(TASK, "raev2-siglip2b-finetune")
    assert fine.generator_from == "runs/t2i/raev2-siglip2b/generator"
    assert fine.generator == base.generator and fine.flow == base.flow and fine.task == base.task
    assert fine.generator_training.schedule.lr == base.generator_training.schedule.lr / 10


# Data and prompts.


def test_captions_of_a_batch_are_tokens_of_the_text_encoder(t2i_spec):
    dataset = TASK.dataset(t2i_spec, "val")
    cond = TASK.eval_cond(t2i_spec, dataset, [0, 1, len(dataset)])
    assert cond.keys() == {"token_ids", "token_mask"}
    assert cond["token_ids"][0].tolist() == cond["token_ids"][2].tolist(), "captions are repeated"
    longest = cond["token_mask"].sum(1).max()
    assert cond["token_ids"].shape == (3, longest)


def test_prompts_come_from_words_or_a_file(t2i_spec, tmp_path, caplog):
    dataset = TASK.dataset(t2i_spec, "train")
    _, default = TASK.sample_cond(t2i_spec, dataset, {"n": 4})
    val = TASK.dataset(t2i_spec, "val")
    assert default == [val.caption(i) for i in (0, 4, 8, 12)], "captions of the validation split"
    cond, captions = TASK.sample_cond(t2i_spec, dataset, {"n": 4, "prompt": ["a red  circle", "two stars"]})
    assert captions == ["a red circle"] * 2 + ["two stars"] * 2
    assert cond["token_ids"].shape[0] == 4
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n   \ntwo stars\na heart\n")
    with caplog.at_level(logging.WARNING):
        assert TASK.sample_cond(t2i_spec, dataset, {"n": 1, "prompts": file})[1] == read_prompts(file)
    assert "skipped 2 empty lines" in caplog.text
    with caplog.at_level(logging.WARNING):
        TASK.sample_cond(t2i_spec, dataset, {"n": 1, "prompt": ["word " * 100]})
    assert "tokens: word word" in caplog.text and "to 64 tokens" in caplog.text


def test_unusable_prompts_say_why(t2i_spec, tmp_path):
    with pytest.raises(SpecError, match="--prompt: no prompt in it; expected at least one line of text"):
        given_prompts({"prompt": ["", "  "]})
    with pytest.raises(DataError, match="cannot be read; got .*; expected a UTF-8 text file"):
        read_prompts(tmp_path / "none.txt")
    assert spread(["a", "b", "c"], 7) == ["a", "a", "a", "b", "b", "c", "c"] and spread(["a", "b"], 1) == ["a", "b"]


def test_a_frozen_encoder_is_run_on_the_tokens_that_are_there(t2i_spec, encoder_folder):
    spec = apply_overrides(
        t2i_spec, [f"task.text_encoder.name={encoder_folder('bert')}", "task.text_encoder.dtype=fp32"]
    )
    dataset = TASK.dataset(spec, "train")
    condition = TASK.condition(spec, dataset)
    assert condition.num_null_tokens == 2 and condition.null_tokens.shape == (2, 16)
    encode = TASK.cond_encoder(spec, lambda images, keys: images, torch.device("cpu"))
    raw = TASK.prompt_cond(spec, ["a red cat", "dog"])
    padded = {name: torch.nn.functional.pad(value, (0, 9)) for name, value in raw.items()}
    cond = encode(padded)
    assert cond["text_tokens"].shape == (2, 5, 16) and cond["text_mask"].sum(1).tolist() == [5, 3]
    assert (cond["text_tokens"][1, 3:] == 0).all()
    condition.build(spec.generator, (4, 2, 2)).check(cond)


def test_evaluation_data_alternates_between_sources(tmp_path):
    """The first pictures of a split are what protocols take."""
    from raev2_tasks.t2i.shards.files import Example, write_collection, write_shards
    from raev2_tasks.t2i.shards.reader import TextImageDataset
    from raev2_tasks.t2i.text.captions import Caption

    for name, num in (("a", 6), ("b", 3)):
        examples = [Example(str(i), Image.new("RGB", (16, 16)), [Caption(f"{name}{i}", "short")]) for i in range(num)]
        write_shards(
            tmp_path / name, name, {"train": examples, "val": examples}, licence="CC0-1.0", attribution="",
            recipe="test", options={}, shuffle_seed=None,
        )  # fmt: skip
    write_collection(tmp_path, ["a", "b"], recipe="test", options={})
    found = {split: TextImageDataset(tmp_path, split, (16, 16)) for split in ("train", "val")}
    assert [found["val"].caption(i) for i in range(9)] == ["a0", "b0", "a1", "a2", "b1", "a3", "a4", "b2", "a5"]
    assert [found["train"].caption(i) for i in range(9)] == [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(3)]


# A whole run.


def test_a_run_trains_and_leaves_what_a_run_leaves(t2i_run):
    assert (t2i_run / "report.html").is_file() and (t2i_run / "generator" / "config.json").is_file()
    config = json.loads((t2i_run / "generator" / "config.json").read_text())
    assert config["condition"]["kind"] == "scratch_text"
    trained = pipeline.open_trained(t2i_run)
    assert trained.generator.condition_spec.vocab_size == 2048
    assert json.loads((t2i_run / "eval" / "reconstruction-micro.json").read_text())["results"][0]["num_samples"] == 16


def test_pictures_of_prompts_from_the_command_line(t2i_run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a photo of a red star\na photo of two circles\n")
    out = tmp_path / "out"
    command = [
        "sample",
        "--run",
        str(t2i_run),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--n",
        "1",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    assert json.loads((out / "plan.json").read_text())["captions"] == [
        "a photo of a red star",
        "a photo of two circles",
    ]
    assert sorted(file.name for file in out.iterdir()) == ["00000.png", "00001.png", "grid.png", "plan.json"]
    with Image.open(out / "grid.png") as grid:
        assert grid.height > 64 + 20, "the captions are below the pictures"
    assert cli.main(["sample", "--run", str(t2i_run), "--prompt", "", "--out", str(tmp_path / "other")]) == 2
    assert "--prompt: no prompt in it" in capsys.readouterr().err


def test_a_second_stage_and_a_frozen_encoder_with_its_cache(t2i_run, t2i_spec, encoder_folder, tmp_path, capsys):
    """Fine-tuning starts from given weights; another text encoder does not fit them; cached captions are used."""
    short = t2i_spec.generator_training.replace(images=8, save_every_images=8, sample_every_images=8)
    frozen = [f"task.text_encoder.name={encoder_folder('t5')}", "task.text_encoder.dtype=fp32"]
    base = t2i_spec.replace(tokenizer_from=str(t2i_run / "tokenizer"), generator_training=short)
    base = base.replace(evaluation=base.evaluation.replace(protocols=()))

    still = base.replace(
        generator_from=str(t2i_run / "generator"),
        generator_training=short.replace(schedule=short.schedule.replace(lr=1e-12, final_lr=0.0)),
    )
    run = pipeline.train(still, tmp_path / "second")
    one, other = pipeline.load_generator(run / "generator"), pipeline.load_generator(t2i_run / "generator")
    for name, value in one.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name

    fields = [*frozen, f"data.dir={t2i_spec.data.dir}"]
    overrides = [word for field in fields for word in ("--set", field)]
    command = ["t2i", "cache-captions", "--recipe", "own-data", *overrides, "--out", str(tmp_path / "cache")]
    assert cli.main(command) == 0
    assert "different captions" in capsys.readouterr().out
    spec = apply_overrides(base, [*frozen, f"task.caption_cache={tmp_path / 'cache'}"])
    run = pipeline.train(spec, tmp_path / "frozen")
    generator = pipeline.load_generator(run / "generator")
    assert generator.conditioner.null_tokens.shape == (1, 16) and generator.conditioner.null_tokens.abs().sum() > 0
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="Write it with `raev2 t2i cache-captions`"):
        pipeline.sample_run(run, {"n": 1, "prompt": ["a cat"]}, out=tmp_path / "out")
    with pytest.raises(SpecError, match="this encoder is trained, its outputs change; got scratch"):
        from raev2_tasks.t2i.text.cache import cache_captions

        cache_captions(["--out", str(tmp_path / "no")])


def test_known_text_encoders_are_listed(capsys):
    assert cli.main(["t2i", "text-encoders"]) == 0
    listed = capsys.readouterr().out
    assert "google/t5-v1_1-xl" in listed and "gated" in listed and "Apache-2.0" in listed
