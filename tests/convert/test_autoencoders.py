"""Whole tokenizers of diffusers: outputs equal theirs, weights go out and come back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
from diffusers import AutoencoderRAE  # noqa: E402

from raev2.command.cli import main  # noqa: E402
from raev2.tokenizer.rae import RAE  # noqa: E402

SIZES = {
    "encoder_hidden_size": 64, "encoder_num_hidden_layers": 2, "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48, "patch_size": 4,
}  # fmt: skip
PATCH = {"dinov2": 14, "mae": 16}


def autoencoder(kind: str, side: int, **changes) -> AutoencoderRAE:
    """A small one with random weights and statistics, as it comes out of a folder."""
    torch.manual_seed(0)
    config = {
        **SIZES, "encoder_type": kind, "encoder_patch_size": PATCH[kind], "encoder_input_size": side * PATCH[kind],
        "latents_mean": torch.randn(64, side, side), "latents_std": torch.rand(64, side, side) + 0.1,
    }  # fmt: skip
    model = AutoencoderRAE(**(config | changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = {
    "dinov2": ("dinov2", 16, {}),
    "mae, another grid": ("mae", 4, {}),
    "no statistics": ("dinov2", 4, {"latents_mean": None, "latents_std": None}),
    "one value per channel, scaled": (
        "mae", 4,
        {"latents_mean": torch.randn(64, 1, 1), "latents_std": torch.rand(64, 1, 1) + 0.1, "scaling_factor": 0.7},
    ),
    "other pixels": ("mae", 4, {"encoder_norm_mean": [0.5, 0.4, 0.3], "encoder_norm_std": [0.5, 0.6, 0.7]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs_equal_those_of_diffusers(case, work):
    kind, side, changes = CASES[case]
    theirs = autoencoder(kind, side, **changes)
    theirs.save_pretrained("theirs")
    theirs = AutoencoderRAE.from_pretrained("theirs").eval()
    assert main(["import", "theirs", "--out", "ours"]) == 0
    rae = RAE.from_pretrained("ours")
    for pixels in (theirs.encoder_input_size, theirs.encoder_input_size + 24):  # the second one is resized
        images = torch.rand(2, 3, pixels, pixels)
        latents = theirs.encode(images).latent
        torch.testing.assert_close(rae.encode(images), latents, atol=1e-5, rtol=1e-5)
    images = theirs.decode(latents).sample
    torch.testing.assert_close(rae.decode(latents, clamp=False), images, atol=1e-5, rtol=1e-5)

    # And back: the folder loads there, with equal tensors.
    assert main(["export", "--run", "ours", "--format", "diffusers", "--out", "back"]) == 0
    back = AutoencoderRAE.from_pretrained("back").eval()
    torch.testing.assert_close(back.decode(latents).sample, images, atol=1e-5, rtol=1e-5)
    expected, found = theirs.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name.startswith("decoder.decoder_pred"):  # pixel normalisation goes into the last layer and out again
            torch.testing.assert_close(found[name], value, rtol=1.2e-7, atol=2e-7)
        elif name.startswith("_latents"):  # written per channel and position; a scale is folded in
            scale = changes.get("scaling_factor", 1)
            value = (value / scale if name.endswith("std") else value).expand(64, side, side)
            tolerance = 0 if scale == 1 else 1e-5  # of the 1e-5 that diffusers adds to the deviation
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)
        else:
            assert torch.equal(found[name], value), name


def test_the_artefact_brings_its_encoder_and_its_provenance(work):
    autoencoder("mae", 4).save_pretrained("theirs")
    Path("theirs/LICENSE").write_text("Some terms.", encoding="utf-8")
    main(["import", "theirs", "--out", "ours"])
    rae = RAE.from_pretrained("ours")
    assert rae.spec.encoder.name == "hf:mae" and not rae.spec.encoder.antialias
    assert set(rae.extra["source"]["sha256"]) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert "Some terms." in Path("ours/README.md").read_text(encoding="utf-8") and "in the folder `encoder`" in Path(
        "ours/README.md"
    ).read_text(encoding="utf-8")
    rae.save_pretrained("copy")
    again = RAE.from_pretrained("copy")
    assert again.encoder.fingerprint() == rae.encoder.fingerprint() and again.extra == rae.extra


def change(folder: str, config: dict | None = None, drop: str = "", add: str = "", **values: torch.Tensor) -> None:
    """Damage a folder of diffusers."""
    file = Path(folder, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **(config or {})}), encoding="utf-8")
    weights = Path(folder, "diffusion_pytorch_model.safetensors")
    tensors = {name: value for name, value in load_file(weights).items() if not drop or drop not in name}
    save_file(tensors | values | ({add: torch.zeros(2)} if add else {}), weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"drop": "encoder."}, "not those of a whole autoencoder; got 0 of the encoder"),
        ({"drop": "decoder_norm.bias"}, r"missing 1 \(decoder_norm.bias\); unexpected none"),
        ({"drop": "layers.0.attention.q"}, r"the encoder weights do not fit the config; got missing 2 \("),
        ({"add": "quant_conv.weight"}, r"unexpected 1 \(quant_conv.weight\)"),
        (
            {"config": {"encoder_type": "clip"}},
            "not supported; got clip, 3 channels; expected encoder_type dinov2, siglip2",
        ),
        (
            {"config": {"encoder_input_size": 70}},
            "not a multiple of the encoder's patch size; got 70; expected 64 or 80",
        ),
        (
            {"_latents_mean": torch.zeros(64, 3, 3)},
            r"mean has the wrong shape; got \(64, 3, 3\); expected \(64, 4, 4\)",
        ),
        ({"_latents_std": torch.zeros(64, 4, 4)}, "standard deviations too small"),
    ],
)
def test_folders_that_do_not_fit(damage, message, work, capsys):
    autoencoder("mae", 4).save_pretrained("theirs")
    change("theirs", **damage)
    assert main(["import", "theirs", "--out", "ours"]) == 4
    text = capsys.readouterr().err
    assert re.search(message, text), text
    assert not Path("ours").exists()


def test_options_of_other_sources_are_refused(work, capsys):
    autoencoder("mae", 4).save_pretrained("theirs")
    assert main(["import", "theirs", "--out", "ours", "--encoder", "micro"]) == 2
    assert "--encoder: has no effect with AutoencoderRAE of diffusers" in capsys.readouterr().err


def test_positions_that_diffusers_does_not_compute_are_not_exported(work, capsys):
    """The table of released decoders drifted while they were trained; diffusers drops it. Here it is kept."""
    model = autoencoder("mae", 4)
    table = torch.randn(1, 17, 32)
    model.save_pretrained("theirs")
    change("theirs", **{"decoder.decoder_pos_embed": table})
    assert main(["import", "theirs", "--out", "ours"]) == 0
    assert torch.equal(RAE.from_pretrained("ours").decoder.pos_embed, table)
    assert main(["export", "--run", "ours", "--format", "diffusers", "--out", "back"]) == 4
    assert "its decoder has other positions than diffusers computes" in capsys.readouterr().err


def test_whitened_latents_are_not_exported(work, capsys):
    """diffusers and the released code have a mean and a variance per element, and no place for a matrix."""
    autoencoder("mae", 4).save_pretrained("theirs")
    assert main(["import", "theirs", "--out", "ours"]) == 0
    ours = RAE.from_pretrained("ours")
    whitened = RAE(ours.spec.replace(whiten=0.5), ours.encoder, decoder=ours.decoder)
    whitened.encoder_dir = ours.encoder_dir
    whitened.set_stats(replace(ours.latent_stats, cov=torch.eye(64)))
    whitened.save_pretrained("whitened")
    for layout in ("diffusers", "reference"):
        assert main(["export", "--run", "whitened", "--format", layout, "--out", "back"]) == 4
        assert "whitened" in (message := capsys.readouterr().err) and "Export it with --format pipeline." in message
    assert not Path("back").exists()


def test_overlapping_patches_are_not_exported(work, capsys):
    autoencoder("mae", 4).save_pretrained("theirs")
    assert main(["import", "theirs", "--out", "ours"]) == 0
    ours = RAE.from_pretrained("ours")
    overlapping = RAE(ours.spec.replace(decoder=ours.spec.decoder.replace(overlap=True)), ours.encoder)
    overlapping.encoder_dir = ours.encoder_dir
    overlapping.set_stats(ours.latent_stats)
    overlapping.save_pretrained("overlapping")
    for layout in ("diffusers", "reference"):
        assert main(["export", "--run", "overlapping", "--format", layout, "--out", "back"]) == 4
        message = capsys.readouterr().err
        assert "tokenizer.decoder.overlap" in message and "Export it with --format pipeline." in message
    assert not Path("back").exists()


def test_folders_with_the_names_of_older_versions(work):
    """transformers renamed the layers of these encoders; published folders have the names of their time."""
    model = autoencoder("mae", 4)
    model.save_pretrained("theirs")
    model.encoder.layernorm = torch.nn.LayerNorm(64)  # transformers saves by the old names
    model.encoder.save_pretrained("old")
    old = {f"encoder.{name}": value for name, value in load_file("old/model.safetensors").items()}
    old = {name: value for name, value in old.items() if not name.startswith("encoder.layernorm.")}
    assert any("attention.attention.query" in name for name in old)
    change("theirs", drop="encoder.layers.", **{n: v for n, v in old.items() if "encoder.encoder.layer" in n})
    assert main(["import", "theirs", "--out", "ours"]) == 0
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        theirs = autoencoder("mae", 4).encode(images).latent
    torch.testing.assert_close(RAE.from_pretrained("ours").encode(images), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prefix", "head"), [("", True), ("vision_model.", True), ("", False)])
def test_a_siglip2_folder(prefix, head, tmp_path):
    """Built by hand: diffusers 0.42 cannot build this kind with transformers 5."""
    import transformers
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    from raev2_tasks.convert.autoencoders import import_autoencoder

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=64, patch_size=16, image_size=256, num_attention_heads=1, num_hidden_layers=2
    )
    encoder = transformers.SiglipVisionModel(config).eval()
    norm = next(module for name, module in encoder.named_modules() if name.endswith("post_layernorm"))
    decoder = RAEDecoder(64, 32, 2, 2, 48, num_patches=16, patch_size=4, image_size=16).eval()
    weights = {name.removeprefix("vision_model."): value for name, value in encoder.state_dict().items()}
    absent = ("post_layernorm",) if head else ("post_layernorm", "head.")
    tensors = {f"encoder.{prefix}{name}": value for name, value in weights.items() if not name.startswith(absent)}
    tensors |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    rae = import_autoencoder(
        tensors,
        {**SIZES, "encoder_type": "siglip2", "encoder_patch_size": 16, "encoder_input_size": 64,
         "encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3},
        tmp_path / "encoder",
    )  # fmt: skip
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        normed = encoder(images * 2 - 1, interpolate_pos_encoding=True).last_hidden_state
        plain = (normed - norm.bias) / norm.weight  # random here: ones and zeros
        torch.testing.assert_close(rae.tokens(images), plain, atol=1e-5, rtol=1e-5)
        pixels = decoder.unpatchify(decoder(plain).logits) * 0.5 + 0.5
        torch.testing.assert_close(rae.decode_tokens(plain), pixels, atol=1e-5, rtol=1e-5)
