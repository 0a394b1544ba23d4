from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from raev2.batch import MetricResult
from raev2.command.cli import main
from raev2.errors import CheckpointError, SpecError
from raev2_tasks.report.chart import Series, line_chart, number, smooth
from raev2_tasks.report.page import write_report


def old_entry(name, value, num=500, stderr=None, note="") -> dict:
    """A row as result files had it before metrics said what they mean."""
    return {"name": name, "value": value, "num_samples": num, "stderr": stderr, "note": note}


def entry(name, value, num=500, stderr=None, note="", **meaning) -> dict:
    result = MetricResult(
        name, value, num, stderr, note, **{"better": "lower", "role": "headline", "about": f"About {name}.", **meaning}
    )
    return vars(result)


def scale(name, value, of, **meaning) -> dict:
    return entry(name, value, 400, role="scale", of=of, **meaning)


def write_eval(run: Path, protocol: str, entries: list[dict], guidance: dict | None, **more) -> None:
    result = {
        "protocol": protocol, "date": "2026-11-22T12:00:00+0000", "description": "500 generated images against 'train'",
        "results": entries, "images_seen": 128_000, "ema_decay": 0.999, "label_policy": "labels of 'val' in order",
        "reference": {"split": "train", "fingerprint": "ab" * 32},
        "sampling": {"solver": "euler", "steps": 50, "guidance": guidance} if guidance else None,
        "versions": {"torch": "2.14"}, **more,
    }  # fmt: skip
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{protocol}.json").write_text(json.dumps(result))


def grid(path: Path, seed: int, quality: float, columns: int = 8, rows: int = 4) -> None:
    """Coloured discs that come out of noise as `quality` grows."""
    generator = np.random.default_rng(seed)
    size = 64
    canvas = np.full((rows * (size + 2) + 2, columns * (size + 2) + 2, 3), 255, np.uint8)
    y, x = np.mgrid[:size, :size] - size / 2
    for i in range(rows * columns):
        colour, radius = generator.integers(40, 230, 3), generator.integers(12, 28)
        clean = np.where(((x**2 + y**2) < radius**2)[..., None], colour, 255)
        noisy = quality * clean + (1 - quality) * generator.integers(0, 255, clean.shape)
        top, left = 2 + i // columns * (size + 2), 2 + i % columns * (size + 2)
        canvas[top : top + size, left : left + size] = noisy.astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(canvas).save(path)


def make_run(run: Path) -> Path:
    """A run folder as training leaves it."""
    run.mkdir()
    (run / "spec.yaml").write_text(
        "fingerprint: 3f2a91bc77d0\nrecipe: quickstart\nsummary: small <model> on small pictures\n"
        "task: {name: toy}\n"
        "sampling: {guidance: {kind: internal, scale: 1.5}}\n"
        "tokenizer_training: {images: 64000}\ngenerator_training: {images: 160000}\n"
    )
    (run / "provenance.json").write_text(
        json.dumps({
            "started": "2026-11-22T10:00:00+0000", "command": ["raev2", "train", "--task", "toy"],
            "git_revision": "0a1b2c3d4e5f", "device": "Toy CPU @ 2 GHz", "platform": "Linux", "num_threads": 2,
            "processes": 1, "versions": {"raev2": "0.1.0", "torch": "2.14"},
            "data": {
                "name": "emoji", "fingerprint": "77" * 8, "licence": "CC-BY-4.0",
                "attribution": "Graphics by somebody & others", "splits": {"train": {"num_samples": 3200}},
            },
        })
    )  # fmt: skip
    draw, lines, clock = random.Random(0), [], 1.7e9
    for step in range(1, 251):
        clock += 2
        share = step / 250
        lines.append({
            "time": clock, "stage": "tokenizer", "kind": "train", "images": step * 256, "step": step,
            "loss": 0.9 * math.exp(-3 * share) + 0.12 + draw.gauss(0, 0.02), "l1": 0.3 * math.exp(-3 * share) + 0.03,
            "perceptual": 0.6 * math.exp(-2 * share) + 0.08 + draw.gauss(0, 0.01), "lr": 2e-4 * (1 - 0.9 * share),
            "grad_norm": 0.5 + abs(draw.gauss(0, 0.2)), "images_per_s": 128 + draw.gauss(0, 4), "data_wait": 0.02,
            **({"gan": -0.2, "disc": 0.9, "adaptive_weight": 0.4} if share > 0.5 else {}),
        })  # fmt: skip
    lines.append(
        {"time": clock + 1, "stage": "generator", "kind": "event", "event": "non_finite", "images": 512, "step": 2}
    )
    for step in range(1, 501):
        clock += 4
        share = step / 500
        loss = math.nan if step == 3 else 1.2 * math.exp(-2 * share) + 0.6 + draw.gauss(0, 0.05)
        lines.append({
            "time": clock, "stage": "generator", "kind": "train", "images": step * 256, "step": step, "loss": loss,
            "base": 0.7 + 0.3 * math.exp(-3 * share), "lr": min(step / 20, 1) * 2e-4, "grad_norm": 1 / step + 0.2,
            "images_per_s": 64.0, "data_wait": 0.01,
        })  # fmt: skip
        if step % 100 == 0:
            metrics = {"fd_micro": 90 * math.exp(-2.2 * share) + 8, "precision_micro": 0.2 + 0.4 * share}
            lines.append(
                {
                    "time": clock,
                    "stage": "generator",
                    "kind": "eval",
                    "images": step * 256,
                    "protocol": "fd-500",
                    "metrics": metrics,
                }
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "gen')
    for number_of_images in (0, 32_000, 64_000, 96_000, 128_000):
        grid(run / f"samples/generator-{number_of_images:09d}.png", 1, min(1, number_of_images / 128_000))
    for number_of_images in (0, 32_000, 64_000):
        grid(run / f"samples/tokenizer-{number_of_images:09d}.png", 2, 0.4 + 0.6 * number_of_images / 64_000, rows=2)
    grid(run / "samples/guidance-none.png", 1, 0.9)
    grid(run / "samples/guidance-internal_1.78.png", 1, 1.0)
    levels = [
        scale("fd_micro_val", 6.4, "fd_micro", about="Real pictures of 'val'."),
        scale("fd_micro_shuffled", 61.0, "fd_micro", about="Real pictures, blocks shuffled."),
    ]
    first = [
        entry("fd_micro", 17.97, 500, 0.41, "against 3,200 images", about="Distance in features. It is not FID."),
        entry("fd_ratio_micro", 2.8, role="detail"),
        entry("precision_micro", 0.6, 500, 0.02, better="higher"),
    ]
    write_eval(run, "fd-500", [*first, *levels], {"kind": "none"})
    guided = {"kind": "internal", "scale": 1.78, "interval": [0.0, 1.0]}
    second = [entry("fd_micro", 14.2), entry("precision_micro", 0.66, better="higher")]
    write_eval(run, "fd-500-guided", [*second, *levels], guided)
    recon = [
        entry("psnr", 24.31, 400, 0.11, better="higher"), entry("ssim", 0.874, 400, 0.003, better="higher"),
        entry("feature_distance_micro", 0.0871, 400, 0.002), entry("rfd_micro", 2.31, 400, 0.09),
    ]  # fmt: skip
    write_eval(run, "reconstruction", recon, None, label_policy="none")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "quickstart")
    assert write_report(run) == run / "report.html"
    return run


def test_a_small_page_has_the_same_pictures_at_half_size(run, tmp_path):
    def pictures(html: str, kind: str) -> list[Image.Image]:
        found = re.findall(f'data:image/{kind};base64,([^"]+)', html)
        return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]

    assert main(["report", str(run), "--out", str(tmp_path / "small.html"), "--small"]) == 0
    full, small = (run / "report.html").read_text(), (tmp_path / "small.html").read_text()
    before, after = pictures(full, "png"), pictures(small, "webp")
    assert len(before) == len(after) == full.count("data:image") == small.count("data:image")
    assert [one.reduce(2).size for one in before] == [one.size for one in after]
    away = [np.abs(np.asarray(a.convert("RGB").reduce(2), float) - np.asarray(b, float)).mean()
            for a, b in zip(before, after, strict=True)]  # fmt: skip
    assert max(away) < 32, "the same picture, lossy"
    assert len(small) < len(full) / 3


def test_the_page_is_self_contained(run):
    html = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "http://" not in html and "https://" not in html and "@import" not in html and "<script" not in html
    assert html.count("data:image/png;base64,") == 1 + 5 + 1 + 3 + 3


def test_the_page_shows_what_a_reader_needs(run):
    html = (run / "report.html").read_text()
    for text in (
        "toy: quickstart", "Data: emoji, train 3,200. CC-BY-4.0", "3f2a91bc77d0", "0a1b2c3d4e5f", "Toy CPU @ 2 GHz",
        "fd_micro", "17.97", "0.41", "fd_micro_shuffled", "It is not FID", "CC-BY-4.0",
        "Graphics by somebody &amp; others", "the generator saw 128,000 images (40.0 epochs), 80% of the plan",
        "internal, scale 1.78",
        "internal, scale 1.5 (the setting of this run, as above)",
        "mean of the last 20 log lines", "Before clipping", "Logarithmic scale",
        "gradient was not finite: 1.", "that were left out: 1.", "raev2 train --task toy",
        "fd_micro_val 6.4 (Real pictures of &#39;val&#39;)", "Adaptive weight",
        "fd_micro is 17.97, n = 500; lower is better. On the same scale: fd_micro_val 6.4", "scale of fd_micro",
        "About psnr. Higher is better.", "± 0.41, n = 500, lower is better, protocol fd-500",
    ):  # fmt: skip
        assert text in html, text
    head, _, rest = html.partition("<h2>Summary</h2>")
    assert "small &lt;model&gt; on small pictures" in rest and "small &lt;model&gt;" not in head, "data, no motto"
    assert "Full spec" in html and "generator_training" in html
    assert not re.search(r"\bnan\b", re.sub(r'base64,[^"]*', "", html))


def test_report_json_holds_the_same_numbers(run):
    report = json.loads((run / "report.json").read_text())
    by_protocol = {result["protocol"]: result["results"] for result in report["runs"][0]["evaluations"]}
    assert by_protocol["fd-500"][0]["value"] == 17.97
    report = report["runs"][0]
    assert report["training"]["generator"]["images"] == 128_000
    history = {(h["protocol"], h["metric"]): h for h in report["history"]}
    assert history["fd-500", "fd_micro"]["images"] == [25_600, 51_200, 76_800, 102_400, 128_000]
    assert history["fd-500", "fd_micro"]["values"][-1] == 17.97  # the result file, not the log
    assert report["facts"]["Wall time, from the log"] == "42 min"


def test_ep_is_named_after_its_metric_and_takes_k_from_the_scale(run):
    rows = json.loads((run / "report.json").read_text())["runs"][0]["ep"]
    assert [row["name"] for row in rows] == ["EP_fd_micro@61", "EP_fd_micro@19.8"]
    first, second = (90 * math.exp(-2.2 * share) + 8 for share in (0.2, 0.4))
    assert rows[0]["images_exact"] == pytest.approx(25_600 * (1 + (first - 61) / (first - second)), rel=1e-6)
    assert rows[0]["epochs"] == f"{rows[0]['images_exact'] / 3200:.1f}"


def test_missing_parts_are_left_out_with_a_sentence(tmp_path):
    (tmp_path / "spec.yaml").write_text("recipe: quickstart\ntask: {name: toy}\n")
    html = write_report(tmp_path).read_text()
    for text in (
        "There are no sample grids", "There are no reconstruction grids", "No protocol was run yet",
        "metrics.jsonl has no training lines", "provenance.json is missing", "Nothing was evaluated yet",
    ):  # fmt: skip
        assert text in html
    assert "EP_" not in html and "<svg" not in html


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder; expected a folder with spec.yaml"):
        write_report(tmp_path)


def test_charts_survive_one_point_constants_and_values_that_are_not_finite():
    one = line_chart([Series("a", [5.0], [2.0])], title="one", x_label="x")
    assert "circle" in one
    flat = line_chart([Series("a", [0.0, 1.0], [3.0, 3.0])], title="flat", x_label="x", log=True)
    assert flat.count("<path") == 1
    nearly = line_chart([Series("a", [0.0, 1.0], [0.4, 0.4 + 1e-16], raw=[0.4, 0.4])], title="nearly", x_label="x")
    assert nearly.count('class="grid"') > 2
    gap = line_chart([Series("a", [0.0, 1.0, 2.0, 3.0], [1.0, math.nan, 2.0, 3.0])], title="gap", x_label="x")
    assert gap.count("M") == 2 and "nan" not in gap
    assert line_chart([Series("a", [0.0], [math.nan])], title="none", x_label="x") == ""
    coordinates = [float(v) for v in re.findall(r"[ML]([\d.]+),", gap)]
    assert coordinates == sorted(coordinates)


def test_smoothing_is_the_mean_of_the_last_values_and_skips_nan():
    assert smooth([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12_800.0, "12,800"), (2e-5, "2e-05"), (0.0312, "0.0312"), (2.5e6, "2.5M"), (17.97, "17.97")],
)
def test_numbers_are_written_short(value, text):
    assert number(value) == text


def test_numbers_at_points_become_a_table_with_a_column_each(tmp_path):
    run = make_run(tmp_path / "run")
    entries = [
        entry("psnr@1s", 21.5, stderr=0.25, point="1s"), scale("psnr@1s_copy", 17.0, "psnr@1s", point="1s"),
        entry("psnr@4s", 15.5, point="4s"), scale("psnr@4s_copy", 12.0, "psnr@4s", point="4s"), entry("plain@4s", 3.0),
    ]  # fmt: skip
    write_eval(run, "horizons", entries, guidance=None)
    page = write_report(run).read_text()
    table = re.search(
        r"<tr><th>metric</th><th>better</th><th class=\"num\">1s</th><th class=\"num\">4s</th></tr>(.*?)</table>",
        page,
        re.S,
    )
    assert table and re.findall(r"<code>(.*?)</code>", table[1]) == ["psnr", "psnr_copy"]
    assert re.findall(r'<td class="num".*?>(.*?)</td>', table[1]) == ["21.5 ± 0.25", "15.5", "17", "12"]


def test_the_picture_of_a_protocol_is_shown_beside_its_numbers(tmp_path):
    run = make_run(tmp_path / "run")
    write_eval(run, "rollout", [entry("psnr@1s", 21.5)], guidance=None, picture="rollouts above, true frames below")
    assert "rollouts above" not in re.sub(r"<pre>.*?</pre>", "", write_report(run).read_text(), flags=re.S)
    grid(run / "eval" / "rollout.png", 0, 1.0)
    assert 'alt="rollouts above, true frames below"' in write_report(run).read_text()


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory) -> Path:
    """The page about a run, one like it with other settings and results, and one that has just begun."""
    folder = tmp_path_factory.mktemp("compared")
    other, new = make_run(folder / "slow"), folder / "new"
    spec = yaml.safe_load((other / "spec.yaml").read_text())
    (other / "spec.yaml").write_text(yaml.safe_dump({**spec, "seed": 7, "generator_training": {"images": 320_000}}))
    write_eval(
        other, "fd-500", [entry("fd_micro", 15.5, 400, 0.5)], {"kind": "none"}, reference={"fingerprint": "cd" * 32}
    )
    new.mkdir()
    (new / "spec.yaml").write_text((run / "spec.yaml").read_text())
    assert main(["report", str(run), str(other), str(new), "--out", str(folder / "all.html")]) == 0
    return folder / "all.html"


def test_runs_are_shown_side_by_side(compared):
    page = compared.read_text()
    row = re.search(r'<code>fd_micro</code></td>(.*?)<td class="note">', page)
    assert row and re.findall(r'<td class="num".*?>(.*?)</td>', row[1]) == [
        "17.97 ± 0.41",
        "15.5 ± 0.5",
        "",
        "500, 400",
    ]
    assert "<th>field</th><th>quickstart</th><th>slow</th><th>new</th>" in page
    assert re.findall(r"<tr><td><code>([\w.]+)</code></td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page) == [
        ("generator_training.images", "160000", "320000", "160000"), ("seed", "", "7", ""),
    ]  # fmt: skip
    assert page.count("These numbers are against different references, so they do not compare.") == 1
    grids = re.findall(r'alt="(\w+): Samples of the averaged weights after 128,000 images', page)
    assert grids == ["quickstart", "slow"] and "new: There are no sample grids in this run." in page
    chart = re.search(r"<h3>grad_norm</h3>(<svg.*?</svg>.*?)</figure>", page)
    assert chart and re.findall(r"</i>(\w+)</span>", chart[1]) == ["quickstart", "slow", "new"], "a value has one chart"
    told = json.loads(compared.with_suffix(".json").read_text())
    assert [run["run"] for run in told["runs"]] == ["quickstart", "slow", "new"]


def test_a_comparison_replaces_no_file_unasked(compared, run, capsys):
    before = compared.read_bytes()
    assert main(["report", str(run), str(run), "--out", str(compared)]) == SpecError.exit_code
    assert f"--out: exists already; got {compared}. Choose another file, or add --overwrite." in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(compared.with_suffix(".txt"))]) == SpecError.exit_code
    assert "expected a name that ends in .html" in capsys.readouterr().err
    assert compared.read_bytes() == before


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "same").mkdir(parents=True)
        (tmp_path / parent / "same" / "spec.yaml").write_text("recipe: tiny")
    page = write_report(tmp_path / "a" / "same", tmp_path / "b" / "same", out=tmp_path / "two.html").read_text()
    assert f"<th>{tmp_path / 'a' / 'same'}</th><th>{tmp_path / 'b' / 'same'}</th>" in page
    assert "The specs are the same." in page


def test_values_show_under_the_pointer(compared):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here: the values of charts were not looked at in a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(compared.as_uri())
        chart = page.locator("figure", has=page.locator("h3", has_text=re.compile("^fd_micro$"))).locator("svg").first
        reading = chart.locator("g.at", has_text="128,000 images seen").locator("text")
        assert not reading.is_visible()
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 16, box["y"] + box["height"] / 2)
        assert reading.is_visible() and reading.text_content() == "128,000 images seenquickstart 17.97slow 15.5"
        assert page.locator("g.at text:visible").count() == 1
        browser.close()


def test_published_numbers_are_shown_where_the_recipe_is_a_published_system(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Published numbers" not in write_report(run).read_text()
    spec = yaml.safe_load((run / "spec.yaml").read_text())
    spec["recipe"], spec["task"] = "raev2-dinov3l-k7", {"name": "imagenet"}
    (run / "spec.yaml").write_text(yaml.safe_dump(spec))
    page = write_report(run).read_text()
    assert "Published numbers of this system" in page and "not measured in this run" in page
    assert re.search(r'<td>gFID</td><td class="num">1.06</td>', page)
    assert "GenEval" not in page, "numbers of another task"


def test_a_metric_that_nobody_has_heard_of_is_told_by_what_it_says_of_itself(tmp_path):
    """No name is known to the report: tile, sentence, scale, curve, level and glossary come from the result file."""
    run = make_run(tmp_path / "run")
    rows = [
        entry("zeal", 0.5, better="higher", about="How zealous pictures are."),
        scale("idle", 0.1, "zeal", better="higher", about="Idle pictures."),
        entry("woe", 3.0, levels=(4.0,), about="How sad pictures are."),
        scale("grief", 8.0, "woe", about="Sad pictures."), entry("aside", 7.0, role="detail"),
    ]  # fmt: skip
    write_eval(run, "moods", rows, {"kind": "none"})
    with (run / "metrics.jsonl").open("a") as log:
        for images, woe in ((64_000, 9.0), (128_000, 3.0)):
            metrics = {row["name"]: row["value"] for row in rows} | {"woe": woe}
            line = {"time": 1.7e9, "stage": "generator", "kind": "eval", "images": images, "protocol": "moods"}
            log.write("\n" + json.dumps({**line, "metrics": metrics}))
    page = write_report(run).read_text()
    (told,) = json.loads((run / "report.json").read_text())["runs"]
    assert "zeal is 0.5, n = 500; higher is better. On the same scale: idle 0.1 (Idle pictures)." in page
    assert re.search(r"<dt>zeal</dt><dd>How zealous pictures are. Higher is better.</dd>", page)
    tiles = re.findall(r'<div class="tile"><code>(.*?)</code>', page)
    assert "zeal" in tiles and "idle" not in tiles and "aside" not in tiles
    assert tiles.index("zeal") < tiles.index("precision_micro"), "first headlines come first"
    curves, details = page.split("<summary>Details over training</summary>")
    assert "<h3>zeal</h3>" in curves and "<h3>aside</h3>" in details and "<h3>idle</h3>" not in page
    assert [row["name"] for row in told["ep"] if row["protocol"] == "moods"] == ["EP_woe@4", "EP_woe@8"]
    assert told["ep"][-1]["images_exact"] == pytest.approx(64_000 * (1 + 1 / 6))


def test_a_result_file_of_the_time_before_metrics_had_a_meaning_is_shown_as_details(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [old_entry("fid", 9.0, stderr=0.1), old_entry("fid_val", 2.0, note="scale: real pictures")]
    write_eval(run, "ancient", rows, {"kind": "none"})
    assert write_report(run).read_text().count("before metrics said what they mean") == 1
    for file in (run / "eval").glob("fd-500*.json"):
        result = json.loads(file.read_text())
        result["results"] = [{name: row[name] for name in rows[0]} for row in result["results"]]
        file.write_text(json.dumps(result))
    page = write_report(run).read_text()
    assert page.count("This file was written before metrics said what they mean, so its rows are shown as details") == 3
    assert re.search(r'<tr class="detail"><td><code>fid_val</code></td><td class="num" title="n = 500">2</td>', page)
    assert "EP_" not in page and '<div class="tile"><code>fid</code>' not in page
    assert "<h3>fd_micro</h3>" in page.split("<summary>Details over training</summary>")[1]
