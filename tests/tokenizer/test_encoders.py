import json
import os
from pathlib import Path

import pytest
import timm
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raev2.errors import CheckpointError, SpecError
from raev2.spec import EncoderSpec
from raev2.tokenizer import encoders
from raev2.tokenizer.encoder_table import ENCODERS, encoder_info, nearest_open_encoder
from raev2.tokenizer.encoders import aggregate_layers, build_encoder, projection_matrix
from raev2_tasks.listings.check import check_encoder

WEIGHTS = os.environ.get("RAEV2_TEST_WEIGHTS")
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}


@pytest.fixture
def folder(tmp_path):
    """A random encoder in our own folder format."""
    torch.manual_seed(0)
    model = VisionTransformer(**KWARGS)
    nn.init.normal_(model.norm.weight, 1.0, 0.3)
    nn.init.normal_(model.norm.bias, 0.0, 0.3)
    return save_folder(tmp_path / "tiny", model)


def save_folder(path, model):
    path.mkdir()
    save_file({name: value.half() for name, value in model.state_dict().items()}, path / "model.safetensors")
    config = {"format_version": 1, "architecture": "vit", "kwargs": KWARGS, "mean": [0.5] * 3, "std": [0.25] * 3}
    (path / "config.json").write_text(json.dumps(config))
    return path


def tiny(folder, grid=(4, 4), **spec):
    return build_encoder(EncoderSpec(name=str(folder), **spec), grid)


def images(size=32, num=2):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1))


# The table.


@pytest.mark.parametrize("name", [name for name, info in ENCODERS.items() if info.route == "timm"])
def test_table_agrees_with_timm(name):
    info = ENCODERS[name]
    side = 16 * info.patch_size
    with torch.device("meta"):
        model = timm.create_model(info.model_id, num_classes=0, img_size=(side, 2 * side), dynamic_img_size=False)
    found = (model.embed_dim, len(model.blocks), model.patch_embed.patch_size, model.num_prefix_tokens)
    assert found == (info.width, info.depth, (info.patch_size, info.patch_size), info.num_prefix_tokens)
    assert model.patch_embed.grid_size == (16, 32)
    assert (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])) == (
        pytest.approx(info.mean, abs=1e-6),
        pytest.approx(info.std, abs=1e-6),
    )
    assert isinstance(model.norm, nn.LayerNorm) or info.norm == "none"
    assert info.gated == ("dinov3" in info.model_id)


def test_unknown_encoder_names_the_closest():
    with pytest.raises(SpecError, match=r"unknown encoder; got 'dinov2-bb'.*Did you mean 'dinov2-b'\?"):
        encoder_info("dinov2-bb")
    with pytest.raises(SpecError, match="timm .* does not know this model; got 'vit_nothing'"):
        build_encoder(EncoderSpec(name="timm:vit_nothing"), (4, 4))
    with pytest.raises(SpecError, match="not a vision transformer with a stack of blocks; got 'resnet18'"):
        build_encoder(EncoderSpec(name="timm:resnet18"), (4, 4), pretrained=False)


def test_nearest_open_encoder_has_the_same_size():
    assert nearest_open_encoder(ENCODERS["dinov3-l16"]).name == "dinov2-l"
    assert nearest_open_encoder(ENCODERS["eupe-b16"]).name == "dinov2-b"


def test_gated_weights_without_access_say_what_to_do(monkeypatch):
    create = timm.create_model

    def refuse(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("401 Client Error")
        return create(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        CheckpointError, match=r"(?s)401.*DINOv3 License.*huggingface.co/timm.*local folder.*'dinov2-s'"
    ):
        build_encoder(EncoderSpec(name="dinov3-s16"), (4, 4))


# Frozen.


def test_train_mode_never_reaches_the_encoder(folder):
    encoder = tiny(folder)
    parent = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)})
    before = encoder(images())
    parent.train()
    parent.requires_grad_(True)
    assert not encoder.training
    assert not any(module.training for module in encoder.trunk.modules())
    assert not any(parameter.requires_grad for parameter in encoder.trunk.parameters())
    assert list(parent.state_dict()) == ["head.weight", "head.bias"]
    assert len(list(parent.parameters())) == 2
    assert torch.equal(before, encoder(images()))


def test_moving_the_parent_moves_the_encoder(folder):
    encoder = tiny(folder)
    nn.Sequential(encoder).to(torch.float64)
    assert encoder(images().double()).dtype == torch.float64


def test_gradient_flows_to_images_for_losses_but_not_through_forward(folder):
    encoder, x = tiny(folder), images().requires_grad_()
    assert not encoder(x).requires_grad
    encoder.layers_tokens(x, (0, 2))[1].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


# Preprocessing.


def test_images_are_normalised_and_resized_with_antialias_only_when_shrinking(folder):
    encoder = tiny(folder)
    assert torch.equal(encoder.preprocess(images()), (images() - 0.5) / 0.25)
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    small = encoder.preprocess(checkerboard)
    assert small[..., 4:-4, 4:-4].abs().max() < 0.1  # an antialiased checkerboard is grey
    assert encoder.preprocess(images(16)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 5)])
def test_grid_is_built_once_for_any_shape(folder, grid):
    encoder = tiny(folder, grid)
    assert encoder.input_size == (grid[0] * 8, grid[1] * 8)
    assert encoder(images(40)).shape == (2, grid[0] * grid[1], 24)


# Layers and norms.


def raw_blocks(encoder, x):
    """Outputs of all blocks without prefix token, by running the timm model by hand."""
    model = encoder.trunk.model
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(encoder.preprocess(x))))
    outputs = []
    for block in model.blocks:
        tokens = block(tokens)
        outputs.append(tokens[:, 1:])
    return outputs


def test_norms_equal_the_hand_computation(folder):
    encoder = tiny(folder, layers=(1,), norm="plain")
    raw = raw_blocks(encoder, images())[1]
    plain = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    final = encoder.trunk.final_norm
    torch.testing.assert_close(encoder(images()), plain)
    torch.testing.assert_close(tiny(folder, layers=(1,), norm="affine")(images()), plain * final.weight + final.bias)
    torch.testing.assert_close(tiny(folder, layers=(1,), norm="none")(images()), raw)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "random_projection"])
@pytest.mark.parametrize("pooled_term", [False, True])
def test_aggregation_equals_the_hand_computation(folder, aggregate, pooled_term):
    encoder = tiny(folder, layers=(0, 2), aggregate=aggregate, pooled_term=pooled_term, norm="none")
    first, _, last = raw_blocks(encoder, images())
    expected = {
        "sum": first + last,
        "mean": (first + last) / 2,
        "random_projection": torch.cat([first, last], -1) @ projection_matrix(48, 24),
    }[aggregate]
    if pooled_term:
        expected = expected + last.mean(1, keepdim=True)
    torch.testing.assert_close(encoder(images()), expected)
    torch.testing.assert_close(aggregate_layers([first, last], aggregate, pooled_term), expected)


def test_default_layer_is_the_last_and_order_is_the_callers(folder):
    encoder = tiny(folder)
    assert encoder.layers == (2,)
    first, last, again = encoder.layers_tokens(images(), (0, 2, 0))
    assert torch.equal(first, again) and not torch.equal(first, last)
    assert torch.equal(last, encoder(images()))


def test_layer_out_of_range_is_a_spec_error(folder):
    with pytest.raises(SpecError, match=r"tiny has 3 blocks; got \[1, 3\]; expected block indices from 0 to 2"):
        tiny(folder, layers=(1, 3))


def test_random_projection_keeps_variance_and_is_nearly_orthogonal():
    projection = projection_matrix(2048, 64)
    assert torch.equal(projection, projection_matrix(2048, 64))
    gram = projection.T @ projection
    assert (gram - torch.eye(64)).abs().max() < 0.15


def test_fingerprint_depends_on_weights_layers_and_grid_but_not_on_place(folder, tmp_path):
    base = tiny(folder).fingerprint()
    assert json.loads(json.dumps(base)) == base
    torch.manual_seed(0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((folder / name).read_bytes())
    same = tiny(copy).fingerprint()
    assert {**same, "encoder": ""} == {**base, "encoder": ""}
    other_weights = tiny(save_folder(tmp_path / "other", VisionTransformer(**KWARGS))).fingerprint()
    assert other_weights["weights"] != base["weights"]
    assert tiny(folder, layers=(0,)).fingerprint() != base
    assert tiny(folder, (8, 8)).fingerprint()["weights"] == base["weights"]


# The other local formats.


def test_timm_folder_gives_the_tokens_of_timm(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, img_size=160).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    encoder = tiny(tmp_path, (10, 10), norm="affine")
    pixels = encoder.preprocess(images(160))
    torch.testing.assert_close(encoder(images(160)), model.forward_features(pixels)[:, model.num_prefix_tokens :])


SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
TRANSFORMERS_CONFIGS = {
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersConfig(**SMALL, image_size=32, patch_size=8, num_register_tokens=4), 5
    ),
    "dinov3": (transformers.DINOv3ViTConfig(**SMALL, image_size=32, patch_size=8, num_register_tokens=4), 5),
    "siglip": (transformers.SiglipVisionConfig(**SMALL, image_size=32, patch_size=8), 0),
    "mae": (transformers.ViTMAEConfig(**SMALL, image_size=32, patch_size=8, decoder_hidden_size=24), 1),
    "ijepa": (transformers.IJepaConfig(**SMALL, image_size=32, patch_size=8), 0),
    "clip": (transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8), 1),
}  # fmt: skip


@pytest.mark.parametrize("family", TRANSFORMERS_CONFIGS)
def test_transformers_folder_gives_normed_patch_tokens(tmp_path, family):
    config, num_prefix = TRANSFORMERS_CONFIGS[family]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    encoder_norms = [m for n, m in model.named_modules() if n.split(".")[-1] in encoders.FINAL_NORM_NAMES]
    for norm in encoder_norms:
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight, 1.0, 0.3)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))

    encoder = tiny(tmp_path, layers=(1, 2), norm="affine")
    assert encoder.info.num_prefix_tokens == num_prefix
    assert (encoder.width, encoder.depth, encoder.patch_size) == (24, 3, 8)
    middle, last = encoder.layers_tokens(images(), (1, 2))
    assert middle.shape == (2, 16, 24)

    # The final-normed output of the library is the affine-normed output of the last block.
    kwargs = {"noise": torch.arange(16.0).expand(2, -1)} if family == "mae" else {}
    model.config.mask_ratio = 0.0
    reference = model(pixel_values=images() * 2 - 1, output_hidden_states=True, **kwargs)
    hidden = reference.hidden_states[2][:, num_prefix:]  # [0] is the embedding, [l + 1] the output of block l
    raw_middle, raw_last = encoder.layers_tokens(images(), (1, 2), norm="none")
    torch.testing.assert_close(raw_middle, hidden)
    if family == "clip":  # CLIP norms only the pooled token: the library gives the raw block output
        last = raw_last
    torch.testing.assert_close(last, reference.last_hidden_state[:, num_prefix:])

    assert tiny(tmp_path, (6, 5))(images()).shape == (2, 30, 24)


def test_transformers_folder_without_pixel_statistics_is_an_error(tmp_path):
    transformers.AutoModel.from_config(TRANSFORMERS_CONFIGS["siglip"][0]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the pixel normalisation is unknown.*preprocessor_config.json"):
        tiny(tmp_path)


def test_folder_of_an_unknown_format_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot tell the format"):
        tiny(tmp_path)
    with pytest.raises(CheckpointError, match="config.json is missing.*mocov3-b: no maintained hub copy"):
        build_encoder(EncoderSpec(name="mocov3-b"), (16, 16))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": 2**22}, "model.safetensors: the weights do not fit the configuration; got missing none, unexp"),
        ({"depth": 10**9}, "config.json: damaged, or of another kind; got ValueError: 1000000000 blocks and [0-9]+ te"),
        ({"patch_size": None}, "config.json: damaged, or of another kind; got TypeError"),
    ],
)
def test_a_folder_whose_config_is_of_another_network_is_refused_before_one_is_built(folder, kwargs, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "kwargs": config["kwargs"] | kwargs}))
    with pytest.raises(CheckpointError, match=message):
        tiny(folder)


@pytest.mark.parametrize("length", [0, 100, -1])
def test_weights_of_a_folder_that_are_cut_short_are_one_line(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"encoder {folder.name}: the weights are damaged; expected {folder}. "):
        tiny(folder)


def test_of_two_commits_in_the_cache_of_the_hub_the_current_one_is_asked_for(tmp_path, monkeypatch):
    """Both libraries get the commit that a run records, and no branch that may have moved since."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name, asked = "test_vit.r160_in1k", []
    for owner, model in (("timm", name), ("toy", "clip")):
        cache = tmp_path / f"models--{owner}--{model}"
        for commit in ("a" * 40, "b" * 40):
            (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("b" * 40)

    def refuse(*_, pretrained=False, pretrained_cfg_overlay=None, revision=None, **__):
        if not pretrained and revision is None:
            return create(name)
        asked.append(revision or pretrained_cfg_overlay["hf_hub_id"])
        raise OSError("no network")

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    for other in (f"timm:{name}", "hf:toy/clip"):
        with pytest.raises(CheckpointError, match="no network"):
            tiny(other)
    assert asked == [f"timm/{name}@{'b' * 40}", "b" * 40]


def test_named_encoder_takes_its_weights_from_a_folder(folder):
    encoder = build_encoder(EncoderSpec(name="micro"), (4, 4), source=folder)
    assert encoder.info is ENCODERS["micro"]
    assert encoder.width == 24


# Checks and real weights.


def test_check_encoder_passes_on_a_good_encoder(folder):
    rows = check_encoder(str(folder), (4, 4))
    assert [check for check, ok, _ in rows if not ok] == []
    assert {check for check, _, _ in rows} >= {"input", "grid", "prefix tokens", "deterministic", "frozen", "features"}


@pytest.mark.skipif(
    not (encoders.ASSETS / "micro_encoder/config.json").is_file(), reason="the packaged encoder is not built yet"
)
def test_packaged_micro_encoder_agrees_with_the_table():
    encoder, info = build_encoder(EncoderSpec(name="micro"), (8, 8)), ENCODERS["micro"]
    assert (encoder.width, encoder.depth, encoder.patch_size) == (info.width, info.depth, info.patch_size)
    assert encoder.trunk.num_prefix_tokens == info.num_prefix_tokens
    config = json.loads((encoders.ASSETS / "micro_encoder/config.json").read_text())
    assert (tuple(config["mean"]), tuple(config["std"])) == (info.mean, info.std)
    assert encoder(images(64)).std() == pytest.approx(1, abs=0.01)


@pytest.mark.weights
@pytest.mark.skipif(WEIGHTS is None, reason="RAEV2_TEST_WEIGHTS is not set")
def test_real_dinov2_separates_images_and_equals_timm(tmp_path):
    source = Path(WEIGHTS) / "dinov2_small_patch14_timm_fp16.safetensors"
    (tmp_path / "model.safetensors").symlink_to(source)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_dinov2"}))
    encoder = build_encoder(EncoderSpec(name="dinov2-s-woreg", norm="affine"), (16, 16), source=tmp_path)
    x = images(224, 1)
    with torch.no_grad():
        reference = encoder.trunk.model.forward_features(encoder.preprocess(x))
        torch.testing.assert_close(encoder(x), reference[:, 1:])
        smooth = nn.functional.interpolate(images(4, 1), (224, 224), mode="bilinear")
        (tokens,) = encoder.layers_tokens(torch.cat([x, smooth]), (11,), norm="plain")
    assert tokens.mean().abs() < 1e-5 and tokens.std() == pytest.approx(1, abs=1e-3)
    assert torch.cosine_similarity(tokens[0], tokens[1], dim=-1).mean() < 0.5
