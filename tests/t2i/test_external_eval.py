"""Benchmarks that other programs score: layouts out, result files in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from raev2.command import cli
from raev2.errors import DataError, SpecError
from raev2_tasks.t2i.benchmark.external_eval import (
    dpg_results,
    export_eval,
    geneval_results,
    import_eval,
    vqascore_results,
)
from raev2_tasks.t2i.benchmark.g60 import geneval_rows

ROWS = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"},
]


def lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def by_name(results) -> dict[str, float]:
    return {result.name: result.value for result in results}


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


@pytest.fixture
def export(t2i_run, tmp_path):
    """Export a benchmark from the tiny run; returns its folder."""

    def run(benchmark: str) -> Path:
        prompts = tmp_path / "prompts"
        if benchmark == "geneval":
            prompts.write_text(lines(ROWS))
        elif benchmark == "dpg":
            prompts.mkdir()
            (prompts / "12.txt").write_text("a red star\n")
            (prompts / "coco_7.txt").write_text("two circles\n")
        else:
            prompts.write_text("a red star\ntwo circles\n\n")
        out = tmp_path / "out"
        arguments = ["--run", str(t2i_run), "--benchmark", benchmark, "--prompts", str(prompts), "--out", str(out)]
        assert cli.main(["t2i", "export-eval", *arguments]) == 0
        return out

    return run


# Out.


def test_geneval_has_a_folder_for_each_prompt(export):
    out = export("geneval")
    assert sorted(folder.name for folder in (out / "images").iterdir()) == ["00000", "00001"]
    for folder, row in zip(sorted((out / "images").iterdir()), ROWS, strict=True):
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        samples = sorted((folder / "samples").iterdir())
        assert [file.name for file in samples] == [f"{i:04d}.png" for i in range(4)]
        assert size_of(samples[0]) == (64, 64)
        assert len({file.read_bytes() for file in samples}) == 4, "each with its own noise"
    about = json.loads((out / "export.json").read_text())
    assert (about["num_prompts"], about["num_images"], about["images_per_prompt"], about["seed"]) == (2, 8, 4, 0)
    assert about["sampling"]["steps"] == 2 and len(about["prompts_sha256"]) == 64


def test_dpg_has_four_tiles_in_a_picture(export):
    out = export("dpg")
    assert sorted(file.name for file in (out / "images").iterdir()) == ["12.png", "coco_7.png"]
    assert size_of(out / "images" / "12.png") == (128, 128)


def test_vqascore_has_a_list_of_pictures_and_texts(export):
    out = export("vqascore")
    entries = json.loads((out / "dataset.json").read_text())
    assert [entry["texts"] for entry in entries] == [["a red star"], ["two circles"]]
    assert all((out / entry["images"][0]).is_file() for entry in entries)


def test_prompts_of_another_form_are_refused(t2i_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a dog\n")
    base = [
        "--run",
        str(t2i_run),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "out"),
        "--benchmark",
    ]
    with pytest.raises(DataError, match="not GenEval's metadata.*expected one JSON object with 'prompt' a line"):
        export_eval([*base, "geneval"])
    with pytest.raises(DataError, match="no prompts; expected the folder of DPG-Bench with ID.txt files"):
        export_eval([*base, "dpg"])
    (tmp_path / "out").mkdir()
    with pytest.raises(SpecError, match="--out: exists already"):
        export_eval([*base, "vqascore"])


# In.


def test_geneval_is_the_mean_over_tags_and_keeps_its_name_for_all_of_its_prompts(tmp_path):
    """Three of four in one tag, all in the others: the mean over pictures is another number."""
    file = tmp_path / "results.jsonl"
    found = [
        {"filename": "x", "tag": row.tag, "prompt": row.prompt, "correct": row.tag != "counting" or i < 3, "reason": ""}
        for row in geneval_rows()
        for i in range(4)
    ]
    wrong = sum(not row["correct"] for row in found)
    file.write_text(lines(found))
    results = geneval_results(file, {"num_images": len(found)})
    numbers = by_name(results)
    share = 1 - wrong / sum(row["tag"] == "counting" for row in found)
    assert numbers["geneval"] == pytest.approx((5 + share) / 6)
    assert numbers["geneval_counting"] == pytest.approx(share) and numbers["geneval_position"] == 1
    assert numbers["geneval_micro"] == pytest.approx(1 - wrong / len(found)) != numbers["geneval"]
    assert results[0].num_samples == 4 * 553 and "95 % interval" in results[0].note

    few = [row for row in found if row["tag"] != "counting"]
    file.write_text(lines(few))
    assert "geneval_subset" in by_name(geneval_results(file, {"num_images": len(few)}))


def test_results_of_other_pictures_are_refused(tmp_path):
    file = tmp_path / "results"
    file.write_text(lines([{"tag": "colors", "prompt": "a", "correct": True}]))
    with pytest.raises(DataError, match="other pictures than the export has; got 1 results; expected 8"):
        geneval_results(file, {"num_images": 8})
    file.write_text("no json")
    with pytest.raises(DataError, match="cannot be read; got .*; expected GenEval's results.jsonl"):
        geneval_results(file, {"num_images": 8})
    with pytest.raises(DataError, match="expected the results file of DPG-Bench"):
        dpg_results(file, {"num_prompts": 8, "images_per_prompt": 4})
    with pytest.raises(DataError, match="expected a JSON list of scores"):
        vqascore_results(file, {"num_images": 8})


def test_dpg_is_the_mean_over_prompts(tmp_path):
    file = tmp_path / "results.txt"
    file.write_text(
        "/data/images/12.png, 1.0, 0.5, 0.5, 1.0, 0.75\n"
        "/data/images/coco_7.png, 0.25, 0.25, 0.25, 0.25, 0.25\n"
        "Model: images\nL1 category scores:\n\tentity: 81.5\n\tother: 60\nL2 category scores:\n\tentity - whole: 80.0\n"
        "Image path: /data/images\nSave results to: x\nDPG-Bench score: 50.0\n"
    )
    results = dpg_results(file, {"num_prompts": 2, "images_per_prompt": 4})
    assert by_name(results) == {"dpg": 50.0, "dpg_entity": 81.5, "dpg_other": 60.0}
    assert results[0].num_samples == 2 and results[0].stderr == pytest.approx(25)
    with pytest.raises(DataError, match="got 2 results; expected 3. The benchmark passes over pictures that fail"):
        dpg_results(file, {"num_prompts": 3, "images_per_prompt": 4})


def test_dpg_of_fewer_than_four_pictures_a_prompt_is_refused(tmp_path):
    """Its program looks at the first tile alone unless it is told otherwise."""
    file = tmp_path / "results.txt"
    file.write_text("/data/images/12.png, 1.0, 0.5, 0.5, 1.0, 0.75\n/data/images/coco_7.png, 0.25, 0.25\n")
    message = "too few pictures of a prompt were scored; got 1; expected 4. Run DPG-Bench with --pic-num 4"
    with pytest.raises(DataError, match=message):
        dpg_results(file, {"num_prompts": 2, "images_per_prompt": 4})


def test_vqascore_is_the_mean_of_a_list(tmp_path):
    (tmp_path / "scores.json").write_text("[[[0.5]], [[1.0]]]")
    assert by_name(vqascore_results(tmp_path / "scores.json", {"num_images": 2})) == {"vqascore": 0.75}


def test_imported_numbers_stand_beside_the_others(t2i_run, export, tmp_path, capsys):
    out, run = export("geneval"), tmp_path / "run"
    shutil.copytree(t2i_run, run)
    found = [{"tag": row["tag"], "prompt": row["prompt"], "correct": i > 0} for row in ROWS for i in range(4)]
    (tmp_path / "results.jsonl").write_text(lines(found))
    command = ["--run", str(run), "--export", str(out), "--results", str(tmp_path / "results.jsonl")]
    assert cli.main(["t2i", "import-eval", *command]) == 0
    result = json.loads((run / "eval" / "geneval.json").read_text())
    assert result["results"][0]["name"] == "geneval_subset" and result["results"][0]["value"] == 0.75
    assert result["scorer"] == "Mask2Former Swin-S (mmdet), CLIP ViT-L/14" and result["export"]["num_images"] == 8
    assert result["sampling"]["steps"] == 2
    assert cli.main(["report", "--run", str(run)]) == 0
    assert "geneval_subset" in (run / "report.html").read_text()
    with pytest.raises(DataError, match="not a folder of `raev2 t2i export-eval`"):
        import_eval([*command[:2], "--export", str(tmp_path), *command[4:]])
    about = json.loads((out / "export.json").read_text())
    (out / "export.json").write_text(json.dumps({**about, "benchmark": "vqascore"}))
    with pytest.raises(SpecError, match="--scorer: which model scored.*Scores of different models do not compare"):
        import_eval(command)
