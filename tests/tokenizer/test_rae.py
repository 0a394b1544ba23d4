import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from raev2.errors import CheckpointError, SpecError
from raev2.spec import DecoderSpec, EncoderSpec, TokenizerSpec
from raev2.tokenizer.latent_stats import LatentStatsAccumulator
from raev2.tokenizer.rae import RAE, token_noise

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
DECODER = DecoderSpec(width=24, depth=1, num_heads=2, mlp_dim=24, patch_size=8)


@pytest.fixture
def make_encoder(tmp_path):
    def make(name, seed=0):
        torch.manual_seed(seed)
        folder = tmp_path / name
        folder.mkdir()
        save_file(VisionTransformer(**KWARGS).state_dict(), folder / "model.safetensors")
        config = {"architecture": "vit", "kwargs": KWARGS, "mean": [0.5] * 3, "std": [0.5] * 3, "licence": "CC0"}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def rae(make_encoder):
    spec = TokenizerSpec(encoder=EncoderSpec(name=str(make_encoder("tiny"))), decoder=DECODER, grid=(4, 4))
    return with_stats(RAE.from_spec(spec))


def with_stats(rae, with_cov=False):
    accumulator = LatentStatsAccumulator(rae.encoder.fingerprint(), "random", with_cov=with_cov)
    accumulator.update(rae.token_latents(rae.tokens(images(16))))
    rae.set_stats(accumulator.result())
    return rae


def images(num=2):
    return torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_encode_normalises_and_decode_clamps(rae):
    latents = rae.encode(images(16))
    assert latents.shape[1:] == rae.latent_shape == (24, 4, 4)
    torch.testing.assert_close(latents.mean(0), torch.zeros(24, 4, 4), atol=1e-4, rtol=0)
    assert not latents.requires_grad
    decoded, unclamped = rae.decode(latents), rae.decode(latents, clamp=False)
    assert decoded.shape == (16, 3, 32, 32)
    assert decoded.min() >= 0 and decoded.max() <= 1 and unclamped.min() < 0
    torch.testing.assert_close(decoded, unclamped.clamp(0, 1))
    torch.testing.assert_close(rae.reconstruct(images(16)), decoded, atol=1e-4, rtol=1e-4)


def test_encode_then_decode_with_an_identity_decoder_gives_the_tokens(rae):
    rae.decoder = nn.Identity()
    tokens = rae.tokens(images())
    back = []
    rae.decoder.register_forward_hook(lambda module, inputs, output: back.append(output))
    with pytest.raises(Exception):  # noqa: B017  tokens are not images, which the shape checker notices
        rae.decode(rae.encode(images()), clamp=False)
    torch.testing.assert_close(back[0], tokens, rtol=1e-5, atol=1e-5)


def test_only_the_decoder_is_trained_and_saved(rae):
    rae.train()
    assert {name.split(".")[0] for name in rae.state_dict()} == {"decoder"}
    assert {name.split(".")[0] for name, _ in rae.named_parameters()} == {"decoder"}
    assert not rae.encoder.training


def test_8_bit_images_are_rejected(rae):
    with pytest.raises(SpecError, match=r"images must be floats in \[0, 1\]; got torch.uint8.*float\(\) / 255"):
        rae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_range_is_never_guessed_from_the_data(rae):
    """Images that happen to be dark are not treated differently (a scale would break this homogeneity)."""
    assert torch.equal(rae.encoder.preprocess(images() / 1000), (images() / 1000 - 0.5) / 0.5)
    assert torch.equal(rae.encoder.preprocess(images() * 3), (images() * 3 - 0.5) / 0.5)


def test_encode_without_statistics_is_an_error(make_encoder):
    spec = TokenizerSpec(encoder=EncoderSpec(name=str(make_encoder("tiny"))), decoder=DECODER, grid=(4, 4))
    rae = RAE.from_spec(spec)
    with pytest.raises(CheckpointError, match="the tokenizer has no latent statistics"):
        rae.encode(images())
    assert rae.latent_stats is None
    assert rae.reconstruct(images()).shape == (2, 3, 32, 32)


def test_save_and_load_is_bit_equal(rae, tmp_path):
    rae.save_pretrained(tmp_path / "artefact")
    loaded = RAE.from_pretrained(tmp_path / "artefact")
    assert loaded.spec == rae.spec
    assert not loaded.training
    latents = rae.encode(images())
    assert torch.equal(latents, loaded.encode(images()))
    assert torch.equal(rae.decode(latents), loaded.decode(latents))
    assert loaded.latent_stats.num_images == 16 and loaded.latent_stats.data == "random"
    names = load_file(tmp_path / "artefact/model.safetensors")
    assert {name.split(".")[0] for name in names} == {"decoder", "stats"}
    card = (tmp_path / "artefact/README.md").read_text()
    assert "**encoder tiny**: CC0." in card and "24 x 4 x 4" in card


def test_a_tokenizer_without_statistics_can_be_saved(make_encoder, tmp_path):
    spec = TokenizerSpec(encoder=EncoderSpec(name=str(make_encoder("tiny"))), decoder=DECODER, grid=(4, 4))
    RAE.from_spec(spec).save_pretrained(tmp_path / "artefact")
    assert RAE.from_pretrained(tmp_path / "artefact").latent_stats is None


def test_a_local_folder_replaces_the_encoder_and_a_wrong_one_is_refused(rae, make_encoder, tmp_path):
    rae.save_pretrained(tmp_path / "artefact")
    loaded = RAE.from_pretrained(tmp_path / "artefact", encoder=make_encoder("moved", seed=0))
    assert torch.equal(loaded.encode(images()), rae.encode(images()))
    with pytest.raises(CheckpointError, match="computed with another encoder; got weights="):
        RAE.from_pretrained(tmp_path / "artefact", encoder=make_encoder("wrong", seed=1))


def test_statistics_of_another_shape_are_refused(rae):
    accumulator = LatentStatsAccumulator(rae.encoder.fingerprint())
    accumulator.update(torch.randn(3, 24, 2, 2))
    with pytest.raises(CheckpointError, match=r"wrong shape; got \(24, 2, 2\)"):
        rae.set_stats(accumulator.result())


def test_whitened_latents_are_the_same_pictures_in_other_numbers(rae, tmp_path):
    whitened = RAE(rae.spec.replace(whiten=0.5), rae.encoder, decoder=rae.decoder)
    with_stats(whitened, with_cov=True)
    plain, latents = rae.encode(images(16)), whitened.encode(images(16))
    assert latents.std().item() == pytest.approx(1, abs=0.05) and (latents - plain).abs().max() > 0.5
    torch.testing.assert_close(whitened.decode(latents), rae.decode(plain), rtol=1e-4, atol=1e-4)
    assert len({rae.identity(), whitened.identity()}) == 2

    loaded = RAE.from_pretrained(whitened.save_pretrained(tmp_path / "artefact"))
    assert loaded.spec.whiten == 0.5 and loaded.identity() == whitened.identity()
    assert torch.equal(loaded.encode(images()), whitened.encode(images()))
    assert torch.equal(loaded.decode(latents), whitened.decode(latents))
    assert {name.split(".")[0] for name in whitened.state_dict()} == {"decoder"}


def test_statistics_without_covariance_are_refused_where_latents_are_whitened(rae):
    whitened = RAE(rae.spec.replace(whiten=1.0), rae.encoder)
    with pytest.raises(CheckpointError, match="no covariance of channels.*or set tokenizer.whiten=null"):
        whitened.set_stats(rae.latent_stats)
    assert whitened.latent_stats is None


def test_push_to_hub_uploads_the_artefact_folder(rae, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token):
            assert token is None

        def create_repo(self, repo_id, private, exist_ok):
            uploaded["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded["files"] = sorted(file.name for file in folder_path.iterdir())
            return "https://example.org/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert rae.push_to_hub("someone/rae", private=True) == "https://example.org/commit"
    assert uploaded == {"repo": ("someone/rae", True), "files": ["README.md", "config.json", "model.safetensors"]}


# Noise.


@pytest.mark.parametrize(
    ("distribution", "mean", "second_moment"),
    [("uniform", 0.4, 0.8**2 / 3), ("half_normal", 0.8 * (2 / torch.pi) ** 0.5, 0.8**2)],
)
def test_noise_has_one_sigma_per_sample_of_the_given_distribution(distribution, mean, second_moment):
    noise = token_noise((8000, 4, 32), 0.8, distribution, torch.Generator().manual_seed(0))
    sigma = noise.square().mean((1, 2)).sqrt()
    assert sigma.mean().item() == pytest.approx(mean, rel=0.03)
    assert sigma.square().mean().item() == pytest.approx(second_moment, rel=0.03)
    halves = [noise[:, :2].std((1, 2)), noise[:, 2:].std((1, 2))]
    assert torch.corrcoef(torch.stack(halves))[0, 1] > 0.9  # the same sigma for all tokens of a sample
    if distribution == "uniform":
        assert sigma.max() < 0.8 * 1.4


def test_noise_follows_the_generator_and_tau_zero_is_none(rae):
    tokens = rae.tokens(images())
    first, second = (rae.token_noise(len(tokens), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == tokens.shape and first.std() > 0
    assert not token_noise((2, 4, 8), 0.0, "uniform", torch.Generator()).any()
