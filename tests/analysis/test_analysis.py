"""The analyses: definitions on cases with known answers, and the commands on embedded data at tiny size."""

import json
import math

import pytest
import torch

from raev2.command.cli import main
from raev2_tasks.analyses.blocks import block_tokens, linear_cka, spatial_similarity
from raev2_tasks.analyses.correlation import fisher_interval, pearson
from raev2_tasks.analyses.probe import far_distance, linear_probe, local_similarity
from raev2_tasks.analyses.table import Table
from raev2_tasks.analyses.width import overfit, width_bound
from raev2_tasks.report.chart import Series
from raev2_tasks.report.published import published, published_encoders, published_results

# Definitions


def test_a_linear_probe_separates_what_is_separable_and_guesses_noise():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    centres = torch.eye(3)[labels] * 6
    accuracy, balanced = linear_probe(
        centres[:200] + torch.randn(200, 3), labels[:200], centres[200:] + torch.randn(100, 3), labels[200:], 3
    )
    assert accuracy > 0.97
    assert balanced == pytest.approx(accuracy, abs=0.02)
    accuracy, _ = linear_probe(torch.randn(200, 3), labels[:200], torch.randn(100, 3), labels[200:], 3)
    assert accuracy < 0.5


def test_local_similarity_is_one_for_two_halves_and_zero_for_noise():
    halves = torch.zeros(1, 4, 8, 2)
    halves[:, :, :4, 0], halves[:, :, 4:, 1] = 1, 1
    lds = float(local_similarity(halves.flatten(1, 2), (4, 8)))
    near = 1 - 4 / (4 * 7 + 3 * 8)  # 4 of 52 neighbouring pairs are across the middle
    assert lds > near - 0.5
    noise = torch.randn(8, 32, 512)
    assert abs(float(local_similarity(noise, (4, 8)).mean())) < 0.01
    assert far_distance((16, 16)) == 6


def test_pearson_and_its_interval():
    xs = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert pearson(xs, [2 * x for x in xs]) == pytest.approx(1)
    assert pearson(xs, [1.0, 3.0, 2.0, 5.0, 4.0]) == pytest.approx(0.8)
    assert math.isnan(pearson(xs, [1.0] * 5))
    low, high = fisher_interval(-0.53, 9)  # the interval that nine encoders leave
    assert (low, high) == (pytest.approx(-0.88, abs=0.01), pytest.approx(0.21, abs=0.01))
    assert fisher_interval(1.0, 9) == (None, None)


def test_cka_and_spatial_similarity_ignore_rotation_and_scale_and_see_order():
    torch.manual_seed(0)
    x = torch.randn(4, 16, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    assert linear_cka(x.flatten(0, 1), 3 * x.flatten(0, 1) @ rotation) == pytest.approx(1, abs=1e-6)
    assert linear_cka(torch.randn(2000, 8), torch.randn(2000, 8)) < 0.02
    assert spatial_similarity(x, 2 * x @ rotation) == pytest.approx(1, abs=1e-6)
    assert spatial_similarity(x, x[:, torch.randperm(16)]) < 0.5


def test_the_width_bound_is_the_sum_of_the_smallest_eigenvalues():
    latents = torch.zeros(4, 1, 2)
    latents[0, 0, 0], latents[0, 0, 1] = 1.0, -1.0  # covariance of the tokens: 1 in the first channel, else 0
    assert width_bound(latents, 4) == 0
    assert width_bound(latents, 2) == pytest.approx((1 + 1) / 4)
    assert width_bound(latents, 0) == pytest.approx((1 + 1 + 1 + 2) / 4)


def test_a_narrow_network_stays_above_its_bound():
    torch.manual_seed(0)
    latents = torch.randn(32, 4, 4)
    loss = overfit(latents, 8, steps=30, depth=1, batch_size=4, lr=3e-3, seed=0)
    assert loss > width_bound(latents, 8) > 0.3


# Published numbers


def test_published_numbers_say_where_they_come_from():
    sources = published()["sources"]
    for row in [*published_results(), *published_encoders()]:
        assert row["status"] == "quoted"
        assert row["source"] in sources
        assert row["how"] in ("printed", "read off a figure", "second-hand")
    headline = [row for row in published_results("raev2-dinov3l-k7") if row["metric"] == "gFID"]
    assert {row["value"] for row in headline} >= {1.06, 1.65}
    keys = [(row["system"], row["metric"], row["setting"], row["task"]) for row in published_results()]
    twice = {key for key in keys if keys.count(key) > 1}
    values = {
        key: {r["value"] for r in published_results() if (r["system"], r["metric"], r["setting"], r["task"]) == key}
        for key in twice
    }
    assert all(len(found) == 1 for found in values.values()), values


# Commands


def test_a_table_is_written_as_json_markdown_and_svg(tmp_path):
    table = Table("t", "Title", [{"a": 1, "b": 0.5}, {"a": 2}], "A note.", [Series("b", [1, 2], [0.5, 1.0])])
    table.write(tmp_path)
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == [{"a": 1, "b": 0.5}, {"a": 2, "b": None}]
    assert "| 2 | - |" in (tmp_path / "t.md").read_text()
    svg = (tmp_path / "t.svg").read_text()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "<style>" in svg and svg.count("<svg") == svg.count("</svg>") == 1


def test_probe_of_the_embedded_encoder(synthetic_data, tmp_path):
    assert main(["analyse", "probe", "--data", str(synthetic_data), "--layers", "1", "6", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "probe.json").read_text())["rows"]
    assert [row["K"] for row in rows] == [1, 6]
    assert all(0 <= row["LP"] <= 1 and -1 < row["LDS"] < 1 for row in rows)


def test_correlation_of_the_published_encoders(tmp_path):
    assert main(["analyse", "correlation", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "correlation.json").read_text())["rows"]
    found = {(row["outcome"], row["property"]): row for row in rows}
    assert found["gFID RAE", "LDS"]["r"] < 0
    assert found["gFID RAE", "LP"]["low"] < found["gFID RAE", "LP"]["r"] < found["gFID RAE", "LP"]["high"]


def test_correlation_of_points_of_a_file(tmp_path, capsys):
    points = [{"name": str(i), "LP": lp, "LDS": 0.1 * i, "fd": 3 - lp} for i, lp in enumerate((0.5, 0.2, 0.9, 0.4))]
    (tmp_path / "points.json").write_text(json.dumps({"points": points}))
    command = ["analyse", "correlation", "--out", str(tmp_path), "--points"]
    assert main([*command, str(tmp_path / "points.json")]) == 0
    rows = json.loads((tmp_path / "correlation.json").read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"fd"} and rows[0]["n"] == 4
    assert [row["r"] for row in rows if row["property"] == "LP"] == [pytest.approx(-1)]
    (tmp_path / "other.json").write_text("{}")
    assert main([*command, str(tmp_path / "other.json")]) == 3
    assert "damaged, or of another kind; got KeyError: 'points'" in capsys.readouterr().err


def test_blocks_and_width_of_a_trained_run(trained_run, tmp_path):
    assert main(["analyse", "blocks", "--run", str(trained_run), "--n", "4", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "blocks.json").read_text())["rows"]
    assert [(row["t"], row["block"]) for row in rows] == [(t, block) for t in (0.2, 0.5, 0.8) for block in (1, 2)]
    command = ["analyse", "width", "--run", str(trained_run), "--widths", "48", "192", "--steps", "2"]
    assert main([*command, "--seeds", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "width.json").read_text())["rows"]
    assert rows[0]["bound"] > 0 == rows[1]["bound"]
    assert len({*rows[0]["loss"]["seeds"].values()}) == 2, "a seed has weights and noises of its own"
    assert rows[0]["loss"]["low"] < rows[0]["loss"]["mean"] < rows[0]["loss"]["high"]
    assert all(row["seeds below the bound"] == 0 for row in rows)


def test_errors_name_what_is_there(capsys):
    assert main(["analyse", "prob"]) == 2
    assert "unknown analysis" in capsys.readouterr().err
    assert main(["analyse", "time-shift"]) == 2
    assert "--task" in capsys.readouterr().err


def test_block_tokens_leave_no_hooks(trained_run):
    from raev2 import Generator

    generator = Generator.from_pretrained(trained_run / "generator")
    z = torch.randn(1, *generator.latent_shape)
    found = block_tokens(generator, z, torch.ones(1), {"label": torch.zeros(1, dtype=torch.int64)})
    assert [tuple(tokens.shape) for tokens in found] == [(1, 64, 32)] * 2
    assert not any(block._forward_hooks for block in generator.network.trunk.blocks)
