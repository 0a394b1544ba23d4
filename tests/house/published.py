"""What the pages take from others, with random values: published weights on the hub of the tests, shards at an address.

The networks are those of timm and transformers under their published names, files and layouts, all of their blocks but
32 wide; Inception has its own size. So download and reading are those of the real thing, and no number is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import timm
import torch
import transformers
from inception_weights import write_random_inception
from loopback_hub import LoopbackHub
from safetensors.torch import save
from test_plans import tar
from timm.models import _registry
from tokenizers import Tokenizer, models, pre_tokenizers

from raev2.eval import features
from raev2.tokenizer.encoder_table import ENCODERS
from raev2_tasks.imagenet import spaces

WIDTH = 32
ENCODER_NAMES = ("dinov2-s", "dinov3-l16")
DINOV2 = "vit_small_patch14_dinov2.lvd142m"  # without registers, a folder on the results page
T5 = "google/t5-v1_1-base"
SHARDS, ADDRESS = "OWNER/SHARDS", "https://example.org"
WORDS = ["[PAD]", "[UNK]", "a", "picture", "of", "blocks"]


def narrow_networks(patch: pytest.MonkeyPatch) -> None:
    """From here on timm builds the published networks `WIDTH` wide, and the tables say so."""
    for name in {name.partition(".")[0] for name in [*published_names(), DINOV2]}:
        sizes: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": 2}
        if name.startswith("convnext"):
            sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, WIDTH)}
        entries = _registry._model_entrypoints
        patch.setitem(entries, name, partial(entries[name], **sizes))
    for name in ENCODER_NAMES:
        patch.setitem(ENCODERS, name, replace(ENCODERS[name], width=WIDTH))
    for name, space in spaces.SPACES.items():
        patch.setitem(spaces.SPACES, name, space._replace(dim=WIDTH))


def random_inception(patch: pytest.MonkeyPatch, file: Path) -> None:
    """A file in the place of the weights of FID."""
    write_random_inception(file)
    for module in (features, spaces):
        patch.setattr(module, "INCEPTION_WEIGHTS", replace(features.INCEPTION_WEIGHTS, source=str(file)))


def repositories() -> dict[str, dict[str, bytes]]:
    """Files by repository. One of them has the shards of the web address."""
    torch.manual_seed(0)
    found = {f"timm/{name}": {"model.safetensors": timm_weights(name)} for name in published_names()}
    with TemporaryDirectory() as folder:
        t5 = transformers.T5Config(
            vocab_size=len(WORDS), d_model=768, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        transformers.T5ForConditionalGeneration(t5).save_pretrained(folder)
        write_tokenizer(folder)
        found[T5] = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        tar(f"{folder}/shard.tar", range(4))
        shard = Path(folder, "shard.tar").read_bytes()
    return {**found, SHARDS: {f"pairs-{number:06d}.tar": shard for number in range(128)}}


def published_names() -> list[str]:
    """Networks of timm that the pages need."""
    return [space.model for space in spaces.SPACES.values()] + [ENCODERS[name].model_id for name in ENCODER_NAMES]


def timm_weights(name: str) -> bytes:
    """Random weights of a network of timm, as its safetensors file has them."""
    return save(timm.create_model(name, num_classes=0).state_dict())


def write_tokenizer(folder: str | Path) -> None:
    """A tokenizer of six words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def publish(hub: LoopbackHub, files: dict[str, dict[str, bytes]], patch: pytest.MonkeyPatch) -> None:
    """Put them on the hub; the web address leads there too."""
    hub.files |= files
    patch.setenv("GOPEN_REWRITE", f"{ADDRESS}={hub.url}/{SHARDS}/resolve/main")  # of webdataset
