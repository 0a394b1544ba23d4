"""`raev2 import` and `raev2 export`: files in, folders out, and one line for everything that does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from raev2.command.cli import main
from raev2.errors import SpecError
from raev2.files.artefact import load_artefact
from raev2.files.hashes import file_sha256
from raev2.interop import export_decoder, export_generator, generator_config
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.spec import DDTSpec, DecoderSpec, FlowSpec
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.rae import RAE
from raev2_tasks.convert.encoders import is_reference_name, reference_encoder, v1_encoder
from raev2_tasks.convert.files import generator_part, read_source, tokenizer_part

SPEC = DDTSpec(width=16, depth=2, num_heads=2, head_width=32, head_depth=1, head_num_heads=2, base_head_depth=1)
TOKENIZER = ["--encoder", "micro", "--set", "heads=2", "--from", "raev2"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    generator = Generator(SPEC, LabelCondition(num_classes=3), FlowSpec(), (192, 8, 8)).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return generator


@pytest.fixture(scope="module")
def decoder() -> ViTDecoder:
    torch.manual_seed(1)
    return ViTDecoder(192, DecoderSpec(width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=8), (8, 8)).eval()


@pytest.fixture
def files(generator, decoder, tmp_path, monkeypatch) -> Path:
    """A folder with published-like files: generator.pt, decoder.pt, stats.pt and LICENSE; the tests run inside."""
    monkeypatch.chdir(tmp_path)
    theirs = export_generator(generator)
    torch.save(
        {"step": 5, "epoch": 1, "model": {}, "ema": {f"module._orig_mod.{name}": v for name, v in theirs.items()},
         "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}}, "generator.pt"
    )  # fmt: skip
    torch.save(export_decoder(decoder), "decoder.pt")
    torch.save({"mean": torch.randn(192, 8, 8), "var": torch.rand(192, 8, 8) + 0.1}, "stats.pt")
    Path("LICENSE").write_text("Do no harm.\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(capsys, files):
    """Runs a command: (exit code, everything printed)."""

    def call(*argv: object) -> tuple[int, str]:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.fixture
def refused(run):
    """Checks that a command prints one line, writes nothing and has this exit code; the line."""

    def call(code: int, *argv: object) -> str:
        before = sorted(Path().rglob("*"))
        found, text = run(*argv)
        assert found == code and text.startswith("error: ") and text.count("\n") == 1, text
        assert sorted(Path().rglob("*")) == before, "a refused command writes nothing"
        return text.removeprefix("error: ").strip()

    return call


# Import.


def test_a_generator_with_provenance_and_licence(run, generator):
    code, text = run("import", "generator.pt", "--out", "gen", "--set", "base_model_depth=1")
    assert code == 0 and "RAEv2 DiTwDDTHeadIG, averaged weights" in text and "x (not in the weights;" in text
    loaded = Generator.from_pretrained("gen")
    assert loaded.network_spec == generator.network_spec
    assert all(torch.equal(value, generator.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.extra["source"] == {
        "layout": "RAEv2 DiTwDDTHeadIG", "origin": "RAEv2", "path": "generator.pt", "weights": "ema",
        "sha256": {"generator.pt": file_sha256(Path("generator.pt"))},
    }  # fmt: skip
    card = Path("gen/README.md").read_text(encoding="utf-8")
    assert "CC BY-NC 4.0" in card and "Do no harm." in card and file_sha256(Path("generator.pt")) in card


@pytest.mark.parametrize(
    ("origin", "network", "flow", "layout"),
    [("raev2", SPEC, FlowSpec(), "RAEv2 DiTwDDTHeadIG"),
     ("rae", SPEC.replace(conditioning="adaln", base_head_depth=None), FlowSpec(prediction="velocity"),
      "RAE (v1) DiTwDDTHead")],
)  # fmt: skip
def test_imported_weights_are_sampled_and_scored(run, synthetic_data, origin, network, flow, layout):
    """The commands of docs/how_to/import_export.md, on random weights in the reference's layout."""
    random = Generator(network, LabelCondition(num_classes=4), flow, (192, 8, 8))
    for parameter in random.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    torch.save({"ema": export_generator(random)}, "checkpoint.pt")
    Path("config.yaml").write_text(yaml.safe_dump(generator_config(random)), encoding="utf-8")
    code, text = run("import", "checkpoint.pt", "--out", "gen", "--config", "config.yaml")
    assert code == 0 and layout in text, text
    tokenizer = ["--encoder", "micro", "--set", "heads=2", "--from", origin]
    assert run("import", "decoder.pt", "--out", "tok", "--stats", "stats.pt", *tokenizer)[0] == 0
    pair = ["--generator", "gen", "--tokenizer", "tok", "--task", "imagenet", "--recipe", "quickstart",
            "--data", synthetic_data, "--set", "sampling.guidance.kind=none", "--set", "sampling.steps=2",
            "--set", "evaluation.num_samples=16"]  # fmt: skip
    assert run("sample", *pair, "--label", "ring", "--n", "2", "--out", "pictures")[0] == 0
    code, text = run("eval", *pair, "--protocol", "generation-micro")
    assert code == 0 and "fd_micro" in text
    result = json.loads(Path("results/gen/eval/generation-micro.json").read_text(encoding="utf-8"))
    assert result["spec"]["generator"]["width"] == 16 and result["sampling"]["steps"] == 2
    assert run("export", *pair, "--format", "pipeline", "--out", "whole")[0] == 0
    card = Path("whole/README.md").read_text(encoding="utf-8")
    assert "Do no harm." in card and "### generation-micro" in card and file_sha256(Path("checkpoint.pt")) in card
    assert run("sample", "--run", "whole", "--label", "ring", "--n", "2", "--out", "again")[0] == 0
    for name in ("00000.png", "00001.png"):
        assert Path("pictures", name).read_bytes() == Path("again", name).read_bytes()


def test_two_imports_write_the_same_bytes(run):
    for out in "ab":
        assert run("import", "generator.pt", "--out", out, "--set", "base_model_depth=1")[0] == 0
    for name in ("config.json", "model.safetensors", "README.md"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_a_tokenizer_from_decoder_and_statistics(run, decoder):
    code, text = run("import", "decoder.pt", "--out", "tok", "--stats", "stats.pt", *TOKENIZER)
    assert code == 0 and "imported from stats.pt, SHA-256" in text
    rae, stats = RAE.from_pretrained("tok"), torch.load("stats.pt", weights_only=True)
    assert not rae.spec.encoder.antialias and rae.extra["source"]["origin"] == "RAEv2"
    assert set(rae.extra["source"]["sha256"]) == {"decoder.pt", "stats.pt"}
    latents = torch.randn(1, 192, 8, 8)
    tokens = (latents * (stats["var"] + 1e-5).sqrt() + stats["mean"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(rae.decode(latents, clamp=False), decoder(tokens))
    card = Path("tok/README.md").read_text(encoding="utf-8")
    assert "imported from stats.pt" in card and "Do no harm." in card and "for their author to add" not in card


def test_a_decoder_of_v1_predicts_pixels_after_the_import(run, decoder):
    run("import", "decoder.pt", "--out", "tok", "--encoder", "micro", "--set", "heads=2", "--from", "rae")
    rae, tokens = RAE.from_pretrained("tok"), torch.randn(1, 64, 192)
    std, mean = torch.tensor(rae.encoder.info.std).view(3, 1, 1), torch.tensor(rae.encoder.info.mean).view(3, 1, 1)
    torch.testing.assert_close(rae.decode_tokens(tokens), decoder(tokens) * std + mean, atol=1e-5, rtol=0)


def test_a_stage_1_checkpoint_is_a_decoder(run, decoder):
    weights = {f"module.decoder.{name}": value for name, value in export_decoder(decoder).items()}
    torch.save({"step": 1, "ema": weights | {"module.encoder.w": torch.zeros(3)}, "disc": {}}, "ep-0000001.pt")
    assert run("import", "ep-0000001.pt", "--out", "tok", *TOKENIZER)[0] == 0
    assert torch.equal(RAE.from_pretrained("tok").decoder.pred.weight, decoder.pred.weight)


def test_statistics_without_a_mean_are_told(run):
    torch.save({"var": torch.ones(192, 8, 8)}, "stat.pt")
    _, text = run("import", "decoder.pt", "--out", "tok", "--stats", "stat.pt", *TOKENIZER)
    assert "no mean: taken as 0" in text
    assert not RAE.from_pretrained("tok").latent_stats.mean.any()


def test_safetensors_are_read_too(run, generator):
    from safetensors.torch import save_file

    save_file(export_generator(generator), "generator.safetensors")
    assert run("import", "generator.safetensors", "--out", "gen", "--set", "base_model_depth=1")[0] == 0


def test_a_configuration_of_the_reference(run, generator):
    """As RAE nests it: 'target' names the class, 'params' are its arguments; guidance may name a second network."""
    params = {key: value for key, value in generator_config(generator).items() if key not in ("model", "prediction")}
    other = {"target": "a.DiTwDDTHead", "params": {"hidden_size": [8, 8], "depth": [1, 1], "num_heads": [1, 1]}}
    config = {"stage_2": {"target": "stage2.models.DDT.DiTwDDTHeadIG", "params": params},
              "transport": {"params": {"prediction": "velocity"}}, "guidance": {"guidance_model": other}}  # fmt: skip
    assert generator_part(config) == {"model": "DiTwDDTHeadIG", **params, "prediction": "velocity"}
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert run("import", "generator.pt", "--out", "gen", "--config", "config.yaml")[0] == 0
    assert Generator.from_pretrained("gen").flow.prediction == "velocity"


def test_names_of_encoders():
    several = reference_encoder("dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]")
    assert (several.name, several.layers) == ("dinov3-l16", (11, 13, 15, 17, 19, 21, 23))
    assert (several.aggregate, several.pooled_term, several.antialias) == ("mean", True, False)
    one = reference_encoder("dinov3-vit-l16")
    assert (one.layers, one.aggregate, one.pooled_term) == ((), "sum", False)
    assert reference_encoder("dinov3mls-vit-l16").layers == (5, 11, 17, 23)
    assert reference_encoder("siglip2mls-vit-b").layers == (2, 5, 8, 11)
    assert reference_encoder("dinov2mls-vit-b").pooled_term is False
    assert reference_encoder("eupemls-vit-b16").aggregate == "sum"
    assert reference_encoder("dinov2-vit-bnorm") == reference_encoder("dinov2-vit-b[norm]")
    assert reference_encoder("dinov2-vit-b[norm]").norm == "affine"
    for theirs, ours in {
        "dinov2-vit-l[woreg]": "dinov2-l-woreg", "dinov3-vit-s16plus": "dinov3-s16plus", "clip-vit-L": "clip-l",
        "siglip2-vit-so400m": "siglip2-so400m", "webssl-vit-dino1b_full2b_224": "webssl-1b", "jepa-vit-h": "ijepa-h",
        "tipsv2-vit-b14": "tipsv2-b14", "mocov3-vit-b": "mocov3-b", "spatialpe-vit-g": "spatialpe-g",
        "mae-vit-h": "mae-h", "eupe-vit-t16": "eupe-t16", "pe-vit-l": "pe-l",
    }.items():  # fmt: skip
        assert is_reference_name(theirs) and reference_encoder(theirs).name == ours
    assert not is_reference_name("dinov3-l16") and not is_reference_name("micro")
    with pytest.raises(SpecError, match="unknown encoder of RAEv2; got 'dinov9-vit-l16'. Did you mean 'dinov3-l16'"):
        reference_encoder("dinov9-vit-l16")
    with pytest.raises(SpecError, match="unknown flag; got 'layer=3'"):
        reference_encoder("dinov3mls-vit-l16[layer=3]")
    with pytest.raises(SpecError, match="ascending"):
        reference_encoder("dinov3mls-vit-l16[layers=3.1]")
    v1 = v1_encoder({"encoder_cls": "Dinov2withNorm", "encoder_config_path": "facebook/dinov2-with-registers-base"})
    assert (v1.name, v1.norm, v1.antialias) == ("hf:facebook/dinov2-with-registers-base", "plain", False)
    with pytest.raises(SpecError, match="unknown encoder of RAE v1; got CLIP, None"):
        v1_encoder({"encoder_cls": "CLIP"})


# What does not fit.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.pt"], "nothing.pt: no such file or folder; .*Get weights of the Hugging Face hub with `hf download"),
        (["stats.pt"], "stats.pt: latent statistics alone are no tokenizer; .*raev2 import DECODER --stats stats.pt"),
        (["generator.pt"], "do not determine base_model_depth; .*--config FILE or --set base_model_depth=VALUE"),
        (["LICENSE"], "LICENSE: (truncated or not a PyTorch file|holds Python objects)"),
        (["."], r"not a folder that can be imported; got 4 \(LICENSE, decoder.pt, "),
        (["decoder.pt", *TOKENIZER, "--stats", "generator.pt"], "not latent statistics; got RAEv2 DiTwDDTHeadIG"),
    ],
)  # fmt: skip
def test_wrong_files(refused, arguments, message):
    import re

    assert re.search(message, refused(4, "import", *arguments, "--out", "x"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decoder.pt"], "--encoder: a decoder does not say which encoder it belongs to; expected a name from"),
        (["decoder.pt", "--encoder", "micro"], "--from: decoders of RAE and RAEv2 look alike"),
        (["decoder.pt", *TOKENIZER, "--set", "depht=1"], "--set depht: unknown field; expected encoder.FIELD, "),
        (["decoder.pt", *TOKENIZER, "--set", "encoder.layer=[1]"], "layer: unknown field. Did you mean 'layers'"),
        (["decoder.pt", *TOKENIZER[2:], "--encoder", "mikro"], "unknown encoder; got 'mikro'.*Did you mean 'micro'"),
        (["decoder.pt", *TOKENIZER, "--set", "noise_tau=-1"], "--set noise_tau: not valid; got -1; expected input"),
        (["generator.pt", "--encoder", "micro"], "--encoder: has no effect with RAEv2 DiTwDDTHeadIG"),
        (["generator.pt", "--stats", "stats.pt"], "--stats: has no effect with RAEv2 DiTwDDTHeadIG"),
    ],
)  # fmt: skip
def test_wrong_options(refused, arguments, message):
    import re

    assert re.search(message, refused(2, "import", *arguments, "--out", "x"))


def test_files_with_code_in_them_are_not_loaded(refused):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("gotcha",)

    torch.save({"ema": {}, "config": Evil()}, "evil.pt")
    message = refused(4, "import", "evil.pt", "--out", "x")
    assert "holds Python objects besides tensors, which are not loaded because they can run code" in message


def test_a_truncated_file(refused):
    Path("cut.pt").write_bytes(Path("decoder.pt").read_bytes()[:2000])
    assert "cut.pt: truncated or not a PyTorch file" in refused(4, "import", "cut.pt", "--out", "x")
    Path("cut.safetensors").write_bytes(b"12345678")
    assert "truncated or not a safetensors file" in refused(4, "import", "cut.safetensors", "--out", "x")


def test_statistics_of_another_encoder(refused):
    torch.save({"mean": torch.zeros(768, 16, 16), "var": torch.ones(768, 16, 16)}, "other.pt")
    message = refused(4, "import", "decoder.pt", "--out", "x", *TOKENIZER, "--stats", "other.pt")
    assert "mean has the wrong shape; got (768, 16, 16); expected (192, 8, 8)" in message


def test_a_decoder_of_another_encoder(refused):
    other = ViTDecoder(384, DecoderSpec(width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=8), (8, 8))
    torch.save(export_decoder(other), "other.pt")
    message = refused(4, "import", "other.pt", "--out", "x", *TOKENIZER)
    assert (
        message.endswith("got latents of width 384; expected 192, the width of micro.") or "width of micro" in message
    )


def test_a_gated_encoder_without_access(refused):
    arguments = ["--encoder", "dinov3mls-vit-l16[layers=11.23]", "--set", "heads=2", "--from", "raev2"]
    message = refused(4, "import", "decoder.pt", "--out", "x", *arguments)
    for part in ("encoder dinov3-l16: the weights are missing", "DINOv3 License", "must be accepted at https://",
                 "A local folder is accepted in place of the name", "'dinov2-l'"):  # fmt: skip
        assert part in message


def test_an_encoder_from_a_local_folder(run):
    from raev2.tokenizer.encoders import ASSETS

    shutil.copytree(ASSETS / "micro_encoder", "enc")
    assert run("import", "decoder.pt", "--out", "tok", *TOKENIZER, "--encoder-dir", "enc")[0] == 0
    assert run("import", "decoder.pt", "--out", "tok2", "--encoder", "enc", *TOKENIZER[2:])[0] == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (66, "config encoder_input_size: no image size for this encoder; got 66; expected a multiple of 8: 64 or 72"),
        (128, "does not fit the decoder; got 128 px, 256 tokens; expected 64 px, 64 tokens"),
    ],
)
def test_an_impossible_image_size(refused, size, message):
    config = {
        "stage_1": {"params": {"encoder_cls": "MAEwNorm", "encoder_config_path": "x", "encoder_input_size": size}}
    }
    Path("c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert message in refused(2, "import", "decoder.pt", "--out", "x", "--config", "c.yaml", *TOKENIZER[:4])


def test_folders_of_other_things(refused):
    for name, config, message in [
        (
            "vae",
            {"_class_name": "AutoencoderKL"},
            "got AutoencoderKL of diffusers; expected an AutoencoderRAE of diffusers",
        ),
        ("vit", {"model_type": "dinov2"}, "got a vision encoder; .*Name this folder as the encoder"),
        ("ours", {"kind": "tokenizer"}, "got a tokenizer of raev2; .*It needs no import"),
        ("rae", {"_class_name": "AutoencoderRAE"}, "no weights; expected diffusion_pytorch_model.safetensors"),
    ]:
        import re

        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert re.search(message, refused(4, "import", name, "--out", "x"))


def test_nothing_is_overwritten(refused, run):
    arguments = ["import", "generator.pt", "--out", "gen", "--set", "base_model_depth=1"]
    assert run(*arguments)[0] == 0
    assert refused(2, *arguments) == "--out: exists already; got gen. Choose another folder, or add --overwrite."
    assert run(*arguments, "--overwrite")[0] == 0


# Export.


def test_the_reference_layout_goes_out_and_comes_back(run, generator, decoder):
    run("import", "generator.pt", "--out", "run/generator", "--set", "base_model_depth=1")
    run("import", "decoder.pt", "--out", "run/tokenizer", "--stats", "stats.pt", *TOKENIZER)
    assert run("export", "--run", "run", "--format", "reference", "--out", "ref")[0] == 0
    assert sorted(file.name for file in Path("ref").iterdir()) == [
        "config.yaml",
        "decoder.pt",
        "export.json",
        "generator.pt",
        "stats.pt",
    ]
    theirs = torch.load("generator.pt", weights_only=True)["ema"]
    for name, expected in [
        ("generator", {name.removeprefix("module._orig_mod."): value for name, value in theirs.items()}),
        ("decoder", torch.load("decoder.pt", weights_only=True)),
        ("stats", torch.load("stats.pt", weights_only=True)),
    ]:
        found = torch.load(f"ref/{name}.pt", weights_only=True)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert generator_part(yaml.safe_load(Path("ref/config.yaml").read_text(encoding="utf-8"))) == generator_config(
        generator
    )

    config = ["--config", "ref/config.yaml"]
    assert run("import", "ref/generator.pt", "--out", "again/generator", *config)[0] == 0
    assert run("import", "ref/decoder.pt", "--stats", "ref/stats.pt", "--out", "again/tokenizer", *config)[0] == 0
    for kind in ("generator", "tokenizer"):
        first, second = (load_artefact(f"{where}/{kind}", kind=kind)[1] for where in ("run", "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_goes_out_as_a_pipeline_whose_parts_are_artefacts(run, trained_run):
    assert run("export", "--run", trained_run, "--format", "pipeline", "--out", "whole")[0] == 0
    assert sorted(file.name for file in Path("whole").iterdir()) == [
        "README.md", "eval", "generator", "pipeline.json", "samples.png", "tokenizer",
    ]  # fmt: skip
    assert RAE.from_pretrained("whole").latent_stats is not None
    assert Generator.from_pretrained("whole").extra["data"]["name"] == "synthetic"
    assert run("export", "--run", "whole", "--format", "reference", "--out", "ref")[0] == 0


def test_a_trained_run_goes_out_in_the_reference_layout(run, trained_run):
    assert run("export", "--run", trained_run, "--format", "reference", "--out", "ref")[0] == 0
    assert (
        tokenizer_part(yaml.safe_load(Path("ref/config.yaml").read_text(encoding="utf-8")))["encoder"]["name"]
        == "micro"
    )
    assert read_source("ref/generator.pt").layout == "RAEv2 DiTwDDTHeadIG"
    assert run("import", "ref/generator.pt", "--config", "ref/config.yaml", "--out", "gen")[0] == 0


def test_what_cannot_be_exported(refused, run):
    assert "nowhere: nothing to export; got no such folder" in refused(
        4, "export", "--run", "nowhere", "--format", "diffusers", "--out", "x"
    )
    run("import", "generator.pt", "--out", "gen", "--set", "base_model_depth=1")
    run("import", "decoder.pt", "--out", "tok", "--stats", "stats.pt", *TOKENIZER)
    diffusers = ["--format", "diffusers", "--out", "x"]
    assert "diffusers has a class for tokenizers only" in refused(4, "export", "--run", "gen", *diffusers)
    message = refused(4, "export", "--run", "tok", *diffusers)
    assert "AutoencoderRAE cannot express this tokenizer; got its encoder micro is built by local" in message


# Memory.

MEASURE = """
import resource, sys
from raev2.command.cli import main
import raev2.command.actions, raev2_tasks.convert.command, raev2_tasks.convert.files  # what the command imports
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
assert main(["import", sys.argv[1], "--out", sys.argv[2], "--set", "base_model_depth=8"]) == 0
print("KiB", peak() - before)
"""


def test_a_big_checkpoint_is_never_in_memory_twice(tmp_path):
    """Released checkpoints hold the weights twice, and optimizer state; only the averaged weights are read."""
    spec = DDTSpec(width=384, depth=16, num_heads=6, head_width=768, head_depth=2, head_num_heads=6, base_head_depth=8)
    weights = export_generator(Generator(spec, LabelCondition(num_classes=10), FlowSpec(), (64, 8, 8)))
    size = sum(value.numel() * 4 for value in weights.values())
    assert size > 150e6
    torch.save({"ema": weights, "optimizer": {"exp_avg": torch.zeros(size // 4)}}, tmp_path / "checkpoint.pt")
    del weights
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "checkpoint.pt", tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 1024 * int(result.stdout.split("KiB")[1]) < 1.4 * size
