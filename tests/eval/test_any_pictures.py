"""`raev2 eval --images` and `raev2 eval reference build`: pictures of any origin, without a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raev2.command.cli import main
from raev2.errors import DataError
from raev2.eval.features import build_extractor
from raev2.eval.pictures import open_pictures
from raev2.spec import ExpectedSpec
from raev2.task import get_recipe, get_task

NO_WORKERS = ["--workers", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raev2" / "features"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 pictures of 32 px: noise on a colour, in two sub-folders."""
    return write(tmp_path / "pictures", noise(20, seed=0))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write(tmp_path / "others", noise(24, seed=1))


def noise(num: int, seed: int, size: int = 32) -> np.ndarray:
    random = np.random.default_rng(seed)
    colours = random.integers(0, 200, (num, 1, 1, 3))
    return (colours + random.integers(0, 56, (num, size, size, 3))).astype(np.uint8)


def write(folder: Path, pictures: np.ndarray) -> Path:
    for number, pixels in enumerate(pictures):
        file = folder / "ab"[number % 2] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


def evaluate(images: Path, reference: Path, out: Path, protocol: str = "generation-micro") -> dict[str, float]:
    paths = ["--images", str(images), "--reference", str(reference), "--out", str(out)]
    assert main(["eval", *paths, "--protocol", protocol, *NO_WORKERS]) == 0
    return {row["name"]: row["value"] for row in json.loads(out.read_text(encoding="utf-8"))["results"]}


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    assert main(["eval", *map(str, argv)]) == code
    return capsys.readouterr().err.removeprefix("error: ").strip()


# Pictures.


def test_a_folder_and_an_array_hold_the_same_pictures(folder, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise(20, seed=0))
    for path in (folder, tmp_path / "a.npz"):
        pictures, names = open_pictures(path)
        assert len(pictures.places) == 20 and pictures.identity["image_size"] == [32, 32]
        found = {name: pictures.read(place) for place, name in enumerate(names)}
        for number, pixels in enumerate(noise(20, seed=0)):
            name = f"{'ab'[number % 2]}/{number:03d}" if path == folder else str(number)
            assert np.array_equal(found[name].permute(1, 2, 0), pixels)
        assert pictures.places != sorted(pictures.places), "in random order"


def test_the_order_is_that_of_the_content_wherever_the_files_stand(folder, tmp_path):
    pictures, _ = open_pictures(folder)
    for number, file in enumerate(sorted(folder.rglob("*.png"), reverse=True)):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "copy" / f"{number}.png")
    copied, _ = open_pictures(tmp_path / "copy")
    one, two = (torch.stack([own.read(place) for place in own.places]) for own in (pictures, copied))
    assert torch.equal(one, two)


def test_the_grid_of_our_own_folders_is_no_picture_of_theirs(tmp_path):
    write(tmp_path / "s", noise(3, seed=0))
    Image.new("RGB", (100, 100)).save(tmp_path / "s" / "a" / "grid.png")
    with pytest.raises(DataError, match="several sizes"):
        open_pictures(tmp_path / "s")
    (tmp_path / "s" / "a" / "plan.json").write_text("{}")
    assert len(open_pictures(tmp_path / "s")[1]) == 3


# Generation.


def test_scores_are_those_of_the_features(folder, other, tmp_path):
    """Against numpy's covariance and matrix product, whatever reads the pictures."""
    np.savez_compressed(tmp_path / "a.npz", arr_0=noise(20, seed=0))
    found = [evaluate(images, other, tmp_path / "out.json") for images in (folder, tmp_path / "a.npz")]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    micro = build_extractor("micro", torch.device("cpu"))
    one, two = (micro(torch.from_numpy(noise(*how)).permute(0, 3, 1, 2)).double().numpy() for how in ((20, 0), (24, 1)))
    centred = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (one, two)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()  # tr (C1 C2)^(1/2)
    traces = sum((rows**2).sum() for rows in centred)
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + traces - 2 * cross
    assert found[0]["fd_micro"] == pytest.approx(expected, rel=1e-5)
    same = evaluate(folder, folder, tmp_path / "same.json")
    assert abs(same["fd_micro"]) < 1e-6 and same["precision_micro"] == same["recall_micro"] == 1


def test_a_result_says_what_its_numbers_depend_on(folder, other, tmp_path, capsys):
    paths = ["--images", str(folder), "--reference", str(other)]
    assert main(["eval", *paths, "--protocol", "generation-micro", "--workers", "2"]) == 0
    out = tmp_path / "pictures.generation-micro.json"
    assert capsys.readouterr().out.splitlines()[-1] == str(out), "beside the pictures"
    said = json.loads(out.read_text())
    assert said["num_samples"] == said["pictures"]["num_images"] == 20 and said["reference"]["num_images"] == 24
    assert said["pictures"]["path"] == str(folder) and said["reference"]["path"] == str(other)
    assert len(said["features"]["micro"]["fingerprint"]) == 64 and said["versions"]["torch"]
    assert said["warnings"][0] == "fd_micro: only 20 pictures for 192 features: biased, compare at equal numbers alone"
    fingerprint = said["pictures"]["fingerprint"]
    (folder / "a" / "000.png").write_bytes((other / "a" / "000.png").read_bytes())
    evaluate(folder, other, out)
    assert json.loads(out.read_text())["pictures"]["fingerprint"] != fingerprint


def test_a_reference_is_built_once_and_read_by_runs_and_evaluations(
    trained_run, synthetic_data, folder, cache, tmp_path
):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    assert main(["eval", "reference", "build", str(synthetic_data), "--protocol", "generation-micro", *NO_WORKERS]) == 0
    (built,) = cache.iterdir()
    before = built.stat().st_mtime_ns, built.read_bytes()
    assert main(["eval", "--run", str(run), "--protocol", "generation-micro"]) == 0
    assert not (run / "eval" / "reference").exists()
    kept = {file.name for file in cache.iterdir()}
    assert len(kept) == 4, "the reference, and three sets of the scale"

    pictures = write(tmp_path / "large", noise(20, seed=0, size=64))
    by_data = evaluate(pictures, synthetic_data, tmp_path / "a.json")
    by_file = evaluate(pictures, built, tmp_path / "b.json")
    assert by_data == pytest.approx(by_file, rel=1e-9)
    assert {file.name for file in cache.iterdir()} == kept, "pictures that are scored are not kept"
    assert (built.stat().st_mtime_ns, built.read_bytes()) == before
    assert json.loads((tmp_path / "b.json").read_text())["reference"]["sha256"]


def test_stored_statistics_give_the_distance_alone_and_pictures_beside_them_the_rest(folder, other, tmp_path):
    micro = build_extractor("micro", torch.device("cpu"))
    pictures = noise(24, seed=1)
    rows = micro(torch.from_numpy(pictures).permute(0, 3, 1, 2)).double().numpy()
    statistics = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    np.savez(tmp_path / "jit.npz", **statistics)
    np.savez(tmp_path / "adm.npz", **statistics, arr_0=pictures)
    expected = evaluate(folder, other, tmp_path / "out.json")
    assert evaluate(folder, tmp_path / "jit.npz", tmp_path / "out.json") == pytest.approx(
        {"fd_micro": expected["fd_micro"]}, rel=1e-5
    )
    assert evaluate(folder, tmp_path / "adm.npz", tmp_path / "out.json") == pytest.approx(expected, rel=1e-5)


def test_what_a_recipe_expects_is_compared_with_pictures_too(folder, other, tmp_path, capsys, monkeypatch):
    task = get_task("imagenet")
    base = get_recipe(task, "quickstart")
    row = ExpectedSpec(protocol="generation-micro", metric="fd_micro", value=0, tolerance=0.1, source="a paper")
    recipe = base.replace(recipe="paper", evaluation=base.evaluation.replace(expected=(row,)))
    monkeypatch.setitem(task.recipes(), "paper", lambda: recipe)
    common = ["eval", "--images", folder, "--protocol", "generation-micro", *NO_WORKERS]
    assert main([*map(str, common), "--reference", str(folder), "--expect", "paper"]) == 0
    assert main([*map(str, common), "--reference", str(other), "--expect", "paper"]) == 1
    assert "OUTSIDE" in capsys.readouterr().out
    message = refused(capsys, 2, *common[1:], "--reference", other, "--expect")
    assert message == "--expect: which recipe states the numbers?; expected --expect RECIPE"


# Reconstruction.


def test_pairs_are_found_by_name_or_by_place(folder, tmp_path):
    """PSNR of pairs by its definition; other pairs score several decibels less."""
    originals = noise(20, seed=0)
    decoded = np.clip(originals.astype(int) + np.random.default_rng(5).integers(-9, 10, originals.shape), 0, 255)
    decoded = decoded.astype(np.uint8)
    np.savez(tmp_path / "decoded.npz", arr_0=decoded)
    np.savez(tmp_path / "originals.npz", arr_0=originals)
    named = write(tmp_path / "decoded", decoded)
    for file in list(named.rglob("*.png")):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    errors = ((decoded / 255 - originals / 255) ** 2).mean((1, 2, 3))
    expected = float((-10 * np.log10(errors)).mean())
    sorted_files = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
    np.savez(tmp_path / "sorted.npz", arr_0=sorted_files)
    for images, reference, how in (
        (named, folder, "by name"),
        (tmp_path / "decoded.npz", tmp_path / "originals.npz", "by name"),
        (named, tmp_path / "sorted.npz", "by place"),
    ):
        out = tmp_path / "out.json"
        found = evaluate(images, reference, out, "reconstruction-micro")
        assert found["psnr"] == pytest.approx(expected, rel=1e-5)
        assert json.loads(out.read_text())["pairs"] == how
        assert {"ssim", "rfd_micro"} < found.keys()


# What is refused.


def test_options_that_are_missing_or_have_no_effect(folder, capsys, trained_run):
    images = ["--images", folder]
    assert refused(capsys, 2, *images, "--protocol", "generation-micro") == "--reference: needed with --images"
    assert refused(capsys, 2, *images, "--reference", folder) == "--protocol: needed with --images"
    message = refused(
        capsys, 2, *images, "--reference", folder, "--protocol", "generation-micro", "reconstruction-micro"
    )
    assert message == "--protocol: one at a time with --images; got generation-micro reconstruction-micro"
    assert refused(capsys, 2, "--run", trained_run, "--out", "x") == "--out: has no effect without --images"
    assert refused(capsys, 2, "--run", trained_run, "--reference", "x") == "--reference: has no effect without --images"
    message = refused(capsys, 2, *images, "--reference", folder, "--protocol", "nope")
    assert message.startswith("--protocol: unknown protocol; got 'nope'; expected one of generation-fdr6, ")
    message = refused(capsys, 2, *images, "--reference", folder, "--protocol", "action-following")
    assert message.startswith("--protocol: needs a run, it does not score pictures alone; got 'action-following'")


def test_a_reconstruction_has_no_reference_to_build(folder, capsys):
    message = refused(capsys, 2, "reference", "build", folder, "--protocol", "reconstruction-micro")
    assert message == "--protocol: its reference are the originals, nothing is built; got reconstruction-micro"


def test_pictures_that_cannot_be_scored(folder, tmp_path, capsys):
    common = ["--protocol", "generation-micro", *NO_WORKERS, "--images"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("a")
    assert refused(capsys, 3, *common, tmp_path / "empty", "--reference", folder) == (
        f"{tmp_path / 'empty'}: no images here; got no picture (.txt): 1; expected files of a format that Pillow reads"
    )
    message = refused(capsys, 3, *common, tmp_path / "nowhere", "--reference", folder)
    assert message == f"{tmp_path / 'nowhere'}: no such file or folder"
    large = write(tmp_path / "large", noise(2, seed=0, size=40))
    message = refused(capsys, 3, *common, large, "--reference", folder)
    assert message == (
        f"reference {folder}: pictures of another size; got 32 x 32 px; expected 40 x 40 px. Prepare both sets in the "
        "same way."
    )
    np.savez(tmp_path / "adm.npz", arr_0=noise(4, seed=0), mu=np.zeros(192), sigma=np.eye(192))
    message = refused(capsys, 3, *common, large, "--reference", tmp_path / "adm.npz")
    assert message.startswith(
        f"reference {tmp_path / 'adm.npz'}: pictures of another size; got 32 x 32 px; expected 40"
    )
    shutil.copy(large / "a" / "000.png", folder / "b" / "z.png")
    message = refused(capsys, 3, *common, folder, "--reference", large)
    assert message.startswith(
        f"pictures {folder}: pictures of several sizes; got 000.png 32 x 32 px, z.png 40 x 40 px. "
    )
    (folder / "b" / "z.png").unlink()
    broken = folder / "b" / "001.png"
    broken.write_bytes(broken.read_bytes()[:-500])
    message = refused(capsys, 3, *common, folder, "--reference", folder)
    assert message.startswith(f"picture {broken}: cannot be read as an image; got ")


def test_originals_that_do_not_match(folder, other, tmp_path, capsys):
    common = ["--protocol", "reconstruction-micro", *NO_WORKERS, "--images", folder, "--reference"]
    message = refused(capsys, 3, *common, other)
    assert message == (
        f"reference {other}: not one original for each picture; got 20 pictures, 24 originals, 0 names without an "
        "original. Give both the same names, or as many without a common name."
    )
    shutil.move(other / "a" / "000.png", other / "a" / "x.png")
    for number in (20, 21, 22, 23):
        (other / "ab"[number % 2] / f"{number:03d}.png").unlink()
    assert "got 20 pictures, 20 originals, 1 names without an original" in refused(capsys, 3, *common, other)
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    message = refused(capsys, 3, *common, tmp_path / "s.npz")
    assert "statistics are a reference of generation, not of reconstruction; got mu, sigma" in message
    np.savez(tmp_path / "a.npz", arr_0=noise(20, seed=0))
    common[1] = "generation-micro"
    message = refused(capsys, 3, *common, tmp_path / "a.npz")
    assert "holds no statistics: pictures alone are a reference of reconstruction; got arr_0" in message
