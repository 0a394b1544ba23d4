"""Weights that no package brings: known as whole, missing or damaged; fetched; or said how to bring them."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from raev2.errors import CheckpointError, SpecError
from raev2.files.assets import INCEPTION_WEIGHTS, LPIPS_WEIGHTS, Asset
from raev2.tokenizer.baselines import VAES, vae_asset
from raev2.tokenizer.encoder_table import ENCODERS, encoder_asset

DATA = b"weights of a network"
NAME = f"toy-{hashlib.sha256(DATA).hexdigest()[:8]}.pth"
HUB = Asset("encoder toy", "owner/toy@v1")


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches of torch and of the hub; this machine has network, as far as it knows."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback that gives `DATA` for any path; downloads of https addresses go there."""

    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA)

        def log_message(self, *_):
            pass

    files = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    real = torch.hub.download_url_to_file
    here = f"http://127.0.0.1:{files.server_port}"
    monkeypatch.setattr(
        torch.hub, "download_url_to_file",
        lambda url, *rest, **more: real(url.replace("https://weights.example", here), *rest, progress=False, **more),
    )  # fmt: skip
    yield
    files.shutdown()
    files.server_close()


@pytest.fixture
def hub(caches, monkeypatch) -> list[dict[str, object]]:
    """A hub with one repository of three files; the calls that downloaded from it."""
    repository, calls = caches / "repository", []
    repository.mkdir()
    (repository / "config.json").write_text("{}")
    (repository / "pytorch_model.bin").write_bytes(b"pickle")
    save_file({"w": torch.zeros(3)}, repository / "model.safetensors")

    def snapshot_download(name, *, revision=None, local_files_only=False, allow_patterns=None, force_download=False):
        folder = caches / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / str(revision)
        if local_files_only and not folder.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        if not local_files_only:
            calls.append({"name": name, "revision": revision, "again": force_download})
            folder.mkdir(parents=True, exist_ok=True)
            names = [file.name for file in repository.iterdir()]
            for file in filter_repo_objects(names, allow_patterns=allow_patterns):
                shutil.copy(repository / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_file_is_downloaded_into_the_cache_of_torch(caches, server):
    asset = Asset("toy", f"https://weights.example/{NAME}")
    assert asset.fault() == "missing" and asset.folder() is None
    asset.fetch()
    assert asset.fault() is None and asset.place == caches / "torch" / "checkpoints" / NAME
    assert asset.place.read_bytes() == DATA


def test_a_damaged_file_is_downloaded_again(caches, server):
    asset = Asset("toy", f"https://weights.example/{NAME}")
    asset.fetch()
    asset.place.write_bytes(DATA[:-1])
    assert asset.fault() == "damaged"
    asset.fetch()
    assert asset.place.read_bytes() == DATA


def test_a_download_with_another_hash_is_refused(caches, server):
    asset = Asset("toy", "https://weights.example/toy-00000000.pth")
    with pytest.raises(CheckpointError) as caught:
        asset.fetch()
    assert str(caught.value).startswith("toy: the weights are missing; got RuntimeError: invalid hash value (expected")
    assert not asset.place.exists()


def test_json_and_safetensors_alone_come_from_the_hub_at_the_revision(hub):
    assert HUB.fault() == "missing"
    HUB.fetch()
    HUB.fetch()
    assert hub == [{"name": "owner/toy", "revision": "v1", "again": False}]
    folder = HUB.folder()
    assert folder is not None and {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_part_of_several_weights_files_is_not_whole(hub):
    HUB.fetch()
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (HUB.folder() / "model.safetensors.index.json").write_text(json.dumps(index))
    assert HUB.fault() == "missing"
    save_file({"b": torch.zeros(3)}, HUB.folder() / "model-2.safetensors")
    assert HUB.fault() is None


def test_weights_that_are_cut_short_are_known_by_their_header_and_downloaded_again(hub):
    HUB.fetch()
    weights = HUB.folder() / "model.safetensors"
    for length in (weights.stat().st_size - 1, 30, 3):
        weights.write_bytes(weights.read_bytes()[:length])
        assert HUB.fault() == "damaged"
    HUB.fetch()
    assert HUB.fault() is None and hub[-1]["again"]


def test_a_local_folder_with_weights_cut_short_says_so(tmp_path):
    asset = Asset("encoder mine", str(tmp_path))
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        asset.fetch()
    assert str(caught.value) == (
        f"encoder mine: the weights are damaged; got no whole safetensors file in it; expected {tmp_path}. "
        "Copy it there, or correct the name."
    )


def test_a_copy_of_a_hub_repository_names_its_commit(caches, monkeypatch):
    """Laid out as huggingface_hub documents it; nothing is replaced here."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert HUB.commit == "" and LPIPS_WEIGHTS["vgg"].commit == "" and Asset("mine", str(caches)).commit == ""
    cache = caches / "hub" / "models--owner--toy"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "v1").write_text("a" * 40)
    (cache / "snapshots" / ("a" * 40)).mkdir(parents=True)
    assert HUB.commit == "a" * 40


def test_an_offline_machine_is_told_what_to_copy_where(caches, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        HUB.fetch()
    assert str(caught.value) == (
        "encoder toy: the weights are missing; got HF_HUB_OFFLINE=1, nothing is downloaded; "
        f"expected {caches}/hub/models--owner--toy. "
        "It comes from https://huggingface.co/owner/toy; without network copy it from a machine that has it."
    )
    with pytest.raises(CheckpointError) as caught:
        LPIPS_WEIGHTS["vgg"].fetch()
    assert str(caught.value) == (
        "LPIPS (VGG): the weights are missing; got HF_HUB_OFFLINE=1, nothing is downloaded; "
        f"expected {caches}/torch/checkpoints/vgg16-397923af.pth. It comes from "
        "https://download.pytorch.org/models/vgg16-397923af.pth; without network copy it from a machine that has it "
        "(SHA-256 begins with 397923af)."
    )


def test_the_cache_of_the_hub_client_is_read_without_network(caches, monkeypatch):
    """Laid out as huggingface_hub documents it; nothing is replaced here."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = caches / "hub" / "models--owner--toy"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots" / ("a" * 40) / "vae").mkdir(parents=True)
    asset = Asset("VAE toy", "owner/toy", ("vae/*.json", "vae/*.safetensors"))
    assert asset.fault() == "missing"
    save_file({"w": torch.zeros(3)}, asset.folder() / "vae" / "model.safetensors")
    assert asset.fault() is None and asset.folder() == cache / "snapshots" / ("a" * 40)


def test_a_gated_model_without_a_login_is_known_before_a_download(caches, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    asset = encoder_asset("dinov3-l16")
    assert asset.barred() == "no login for a gated model" and encoder_asset("dinov2-l").barred() == ""
    assert "Its licence (DINOv3 License) must be accepted at https://huggingface.co/timm/vit_large_patch16_dinov3" in (
        message := str(asset.error(asset.barred()))
    )
    assert message.endswith(
        "A local folder is accepted in place of the name. The nearest encoder with an open licence is 'dinov2-l'."
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert asset.barred() == ""


def test_a_local_folder_is_looked_at_and_never_downloaded(caches):
    folder = caches / "mine"
    asset = Asset("encoder mine", str(folder))
    message = f"encoder mine: the weights are missing; got not a path on this machine; expected {folder}. "
    with pytest.raises(CheckpointError) as caught:
        asset.fetch()
    assert str(caught.value) == f"{message}Copy it there, or correct the name."
    folder.mkdir()
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    assert asset.fault() is None and asset.url == ""


def test_every_known_encoder_and_vae_has_an_address():
    for name, info in ENCODERS.items():
        asset = encoder_asset(name)
        assert (asset.url == "") == (info.route == "local") and asset.gated == info.gated
        assert info.route != "timm" or asset.url == f"https://huggingface.co/timm/{info.model_id}"
    assert encoder_asset("micro").fault() is None, "it is packaged"
    assert all(vae_asset(name).url for name in VAES)
    assert INCEPTION_WEIGHTS.place.name == "weights-inception-2015-12-05-6726825d.pth"


def test_other_names_of_encoders(tmp_path):
    assert encoder_asset("timm:vit_tiny_patch16_224.augreg_in21k").source == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert encoder_asset("hf:facebook/dinov2-small").source == "facebook/dinov2-small"
    assert encoder_asset(str(tmp_path)).place == tmp_path
    with pytest.raises(SpecError, match=r"encoder.name: unknown encoder; got 'dinov9'; .*Did you mean 'dino"):
        encoder_asset("dinov9")
