"""Pixels as latents, a non-square grid, REPA and base head together: through the whole pipeline."""

import json

import pytest
from PIL import Image

from raev2.pipeline import sample_run, train
from raev2.spec import DDTSpec, DiTSpec, EncoderSpec, NoGuidance, PixelSpec, RepaSpec, SamplingSpec

SMALL = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def test_pixels_with_repa_and_base_head_on_a_non_square_grid(tiny_spec, tmp_path):
    repa = RepaSpec(encoder=EncoderSpec(name="micro"), weight=0.5)
    spec = tiny_spec.replace(
        tokenizer=PixelSpec(image_size=(64, 48)),
        generator=DDTSpec(
            **SMALL, head_width=32, head_depth=1, head_num_heads=2, base_head_depth=1, repa_depth=1, repa_dim=192
        ),
        generator_training=tiny_spec.generator_training.replace(images=16, repa=repa, eval_every_images=None),
    )
    run = train(spec, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if row["kind"] == "train"]
    assert {row["stage"] for row in losses} == {"generator"}, "no stage 1"
    assert all({"full", "base", "repa"} <= row.keys() for row in losses)
    psnr = json.loads((run / "eval" / "reconstruction-micro.json").read_text())
    assert next(row["value"] for row in psnr["results"] if row["name"] == "psnr") > 45, "pixels reconstruct pixels"
    sample_run(run, {"n": 2}, SamplingSpec(steps=2, guidance=NoGuidance()), out=tmp_path / "out")
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert image.size == (48, 64)


@pytest.mark.parametrize(("hidden", "loss"), [(None, "mse"), (8, "cosine")])
def test_repa_alone_and_lightningdit(hidden, loss, tiny_spec, tmp_path):
    """As RAEv2 aligns, and as REPA does."""
    spec = tiny_spec.replace(
        tokenizer=PixelSpec(image_size=(64, 64)),
        generator=DiTSpec(**SMALL, repa_depth=2, repa_dim=192, repa_hidden=hidden),
        generator_training=tiny_spec.generator_training.replace(
            images=16, repa=RepaSpec(encoder=EncoderSpec(name="micro"), loss=loss), eval_every_images=None
        ),
        sampling=SamplingSpec(steps=2),
    )
    run = train(spec, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert all("repa" in row and "base" not in row for row in rows)
    assert all((row["repa"] < 0.5) == (loss == "cosine") for row in rows)  # squares of unit variance are larger
