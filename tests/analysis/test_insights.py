"""Insights as commands: what numbers over seeds say, and every grid at tiny size, from command to table and plot."""

import json
import shutil
from pathlib import Path

import pytest
from scipy import stats

from raev2.command.cli import main
from raev2.model.opened import open_trained
from raev2.spec import RunSpec
from raev2.training.checkpoint import list_checkpoints
from raev2_tasks.analyses import grid, guidance, plans
from raev2_tasks.analyses.compare import table_of
from raev2_tasks.analyses.grid import Outcome
from raev2_tasks.analyses.guidance import Budget, guidance_table
from raev2_tasks.analyses.seeds import Claim, Estimate, interval, whiskers
from raev2_tasks.analyses.table import Table


@pytest.fixture
def small(tiny_spec: RunSpec) -> RunSpec:
    """One step a stage."""
    once = {"images": 4, "batch_size": 4, "save_every_images": 4, "sample_every_images": 100}
    return tiny_spec.replace(
        tokenizer_training=tiny_spec.tokenizer_training.replace(adversarial=None, **once),
        generator_training=tiny_spec.generator_training.replace(
            **once, eval_every_images=None, ema_decays=(0.5,), keep_checkpoints=1
        ),
        sampling=tiny_spec.sampling.replace(steps=1),
    )


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch):
    """never(): from here on nothing may be trained or measured."""

    def fail(*_args: object, **_more: object) -> None:
        raise AssertionError("done once more")

    def forbid() -> None:
        monkeypatch.setattr(grid, "train", fail)
        monkeypatch.setattr(grid, "run_protocol", fail)

    return forbid


# Numbers over seeds


@pytest.mark.parametrize("num", [2, 3, 5, 10])
def test_intervals_over_seeds_are_those_of_student(num: int) -> None:
    values = [1.0, 4.0, 2.5, 3.0, 0.5, 2.0, 2.0, 5.0, 1.5, 3.5][:num]
    expected = stats.t.interval(0.95, num - 1, loc=stats.tmean(values), scale=stats.sem(values))
    assert interval(values) == pytest.approx(expected, rel=1e-3)
    assert interval(values[:1]) == (None, None)


def claim(first: list[float], second: list[float], better: str = "lower") -> Claim:
    return Claim("A", "B", "fd", better, dict(enumerate(first)), dict(enumerate(second)))


def test_a_claim_says_what_the_paired_seeds_support() -> None:
    told = claim([1.0, 2.0, 3.0], [2.0, 3.1, 3.9]).sentence
    assert told == ("A has less fd than B in 3 of 3 seeds; paired difference 1, 95 % interval 0.7516 to 1.248.")
    assert claim([2.0, 3.1, 3.9], [1.0, 2.0, 3.0]).sentence == told.replace("A has", "B has").replace(
        "than B", "than A"
    )
    assert claim([9.0, 9.1, 9.2], [7.0, 7.0, 7.3], "higher").sentence.startswith("A has more fd than B in 3 of 3 seeds")


def test_a_claim_without_support_says_so() -> None:
    assert claim([1.0, 2.0, 3.0], [2.0, 1.5, 4.0]).sentence == (
        "fd of A and B: no difference that this budget shows (A better in 2 of 3 seeds; paired difference 0.5, "
        "95 % interval -1.651 to 2.651)."
    )
    assert claim([1.0], [2.0]).sentence == "A against B: 1 seed, which says nothing about fd."
    half = Claim("A", "B", "fd", "lower", {0: 1.0, 1: 2.0}, {1: 3.0, 2: 9.0})
    assert half.gains == [1.0], "seeds that one of them lacks make no pair"


def test_a_table_holds_intervals_and_claims_for_people_and_programs(tmp_path: Path) -> None:
    row = {"variant": "A", "fd": Estimate({0: 1.0, 1: 3.0})}
    Table("t", "Title", [row], "A note.", claims=[claim([1.0, 2.0], [2.0, 3.0])]).write(tmp_path)
    text, data = (tmp_path / "t.md").read_text(), json.loads((tmp_path / "t.json").read_text())
    assert "- A has less fd than B in 2 of 2 seeds" in text and "| A | 2 (-10.71 to 14.71) |" in text
    assert data["rows"][0]["fd"]["seeds"] == {"0": 1.0, "1": 3.0} and data["rows"][0]["fd"]["mean"] == 2
    assert data["claims"][0]["difference"] == 1 and data["claims"][0]["says"].startswith("A has less")


def test_lines_of_a_plot_go_up_and_down_their_intervals_side_by_side() -> None:
    one, other = whiskers(
        {"a": [(2, Estimate({0: 5.0})), (1, Estimate({0: 1.0, 1: 1.0}))], "b": [(2, Estimate({0: 3.0}))]}
    )
    assert list(one.ys) == [1, 1, 1, 1, 5] and list(other.ys) == [3]
    assert [*one.xs, *other.xs] == pytest.approx([0.996] * 4 + [1.996, 2.004])
    assert not one.points and other.points, "a line of one place is a dot"


# Tables of plans


def outcome(last: list[float], *curve: tuple[int, list[float]]) -> Outcome:
    """Scores of three seeds."""
    return Outcome(
        {"fd_micro": dict(enumerate(last))}, {images: dict(enumerate(values)) for images, values in curve},
        {"fd_micro": "lower"}, {"fd_micro": 64},
    )  # fmt: skip


def test_images_to_the_level_of_the_baseline_are_read_off_every_seed(tiny_spec: RunSpec) -> None:
    plan = plans.latents_or_alignment(tiny_spec)
    fast = outcome([1.0, 1.0, 1.0], (10, [8.0, 9.0, 8.0]), (20, [1.0, 1.0, 1.0]))
    slow = outcome([4.0, 4.0, 4.0], (10, [8.0, 9.0, 8.0]), (20, [4.0, 4.0, 4.0]))
    never = outcome([5.0, 3.0, 5.0], (10, [9.0, 9.0, 9.0]), (20, [5.0, 3.0, 5.0]))
    found = dict(zip(plan.variants, (fast, fast, never, slow, slow), strict=True))
    table = table_of("insight-2", plan, found)
    rows = {row["variant"]: row["EP@4"] for row in table.rows}
    assert rows["RAE, K = 6"].values[0] == pytest.approx(10 + 10 * 4 / 7)
    assert [*rows["RAE, K = 1"].values] == [1], "two seeds never get there"
    assert "Reached not in every seed: RAE, K = 1 in 1 of 3 seeds." in table.note
    said = [claim.sentence for claim in table.claims]
    assert said[0].startswith("fd_micro of RAE, K = 6 + REPA and RAE, K = 6: no difference")
    assert said[2].startswith("RAE, K = 6 has less fd_micro than pixels in 3 of 3 seeds; paired difference 3")
    assert len(table.series) == 5 and table.x_label == "images seen (upwards: fd_micro)"


def test_insight_1_varies_the_encoders_map_alone_and_insight_2_target_and_latents(tiny_spec: RunSpec) -> None:
    one, two = plans.layers(tiny_spec), plans.latents_or_alignment(tiny_spec)
    maps = [(spec.tokenizer.encoder.layers, spec.tokenizer.encoder.aggregate) for spec in one.variants.values()]
    assert maps == [((5,), "sum"), ((4, 5), "sum"), ((3, 4, 5), "sum"), *[(tuple(range(6)), j) for j in plans.JOINS]]
    assert len({spec.generator_training for spec in one.variants.values()}) == 1
    kinds = {label: (spec.tokenizer.kind, spec.generator.repa_dim) for label, spec in two.variants.items()}
    assert kinds == {
        "RAE, K = 6": ("rae", None), "RAE, K = 6 + REPA": ("rae", 192), "RAE, K = 1": ("rae", None),
        "REPA on pixels": ("pixels", 192), "pixels": ("pixels", None),
    }  # fmt: skip
    assert {spec.generator_training.final_images for spec in two.variants.values()} == {64}, "equal compute"
    assert all(spec.generator.base_head_depth is None for spec in (*one.variants.values(), *two.variants.values()))


def test_insight_1_over_numbers_of_layers_takes_sums_alone(tiny_spec: RunSpec) -> None:
    plan = plans.layers(tiny_spec, [4, 1, 4])
    assert [*plan.variants] == ["K = 1", "K = 4"] and plan.pairs == [("K = 4", "K = 1")]
    encoder = plan.variants["K = 4"].tokenizer.encoder
    assert (encoder.layers, encoder.aggregate) == ((2, 3, 4, 5), "sum")
    found = {label: Outcome({"psnr": {0: 20 + k, 1: 21 + k}}, {}, {"psnr": "higher"}, {"psnr": 9})
             for k, label in enumerate(plan.variants)}  # fmt: skip
    table = table_of("insight-1", plan, found)
    assert table.x_label == "K (upwards: psnr)" and [min(table.series[0].xs), max(table.series[0].xs)] == [1, 4]


def test_insight_1_knows_how_many_layers_there_are(small, tmp_path, monkeypatch, capsys) -> None:
    from raev2.task import get_task

    monkeypatch.setitem(get_task("imagenet").recipes(), "small", lambda: small)
    command = ["analyse", "insight-1", "--task", "imagenet", "--recipe", "small", "--out", str(tmp_path)]
    assert main([*command, "--layers", "1", "7"]) == 2
    assert "--layers: no such numbers of last layers; got [1, 7]; expected 1 to 6" in capsys.readouterr().err


# Commands, at tiny size


def run_recipe(name: str, spec: RunSpec, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict:
    """The JSON that the command writes."""
    from raev2.task import get_task

    monkeypatch.setitem(get_task("imagenet").recipes(), "small", lambda: spec)
    command = ["analyse", name, "--task", "imagenet", "--recipe", "small", "--out", str(out), *more]
    assert main(command) == 0
    return json.loads((out / f"{name}.json").read_text())


def test_insight_1_is_trained_once_and_tabulated(small, tmp_path, monkeypatch, never) -> None:
    monkeypatch.setattr(plans, "JOINS", ("sum",))
    options = ("--stage", "tokenizer", "--seeds", "1")
    data = run_recipe("insight-1", small, tmp_path, monkeypatch, *options)
    assert [row["variant"] for row in data["rows"]] == ["K = 1", "K = 2", "K = 3", "K = 6, sum"]
    assert all(row["psnr"]["mean"] > 0 and row["seeds"] == 1 for row in data["rows"])
    assert (tmp_path / "insight-1.svg").read_text().startswith("<svg")
    never()
    assert run_recipe("insight-1", small, tmp_path, monkeypatch, *options) == data


def test_insight_2_trains_both_kinds_of_latents_with_and_without_alignment(small, tmp_path, monkeypatch, never) -> None:
    data = run_recipe("insight-2", small, tmp_path, monkeypatch, "--seeds", "1")
    assert len(data["rows"]) == 5 and all(row["fd_micro"]["mean"] > 0 for row in data["rows"])
    assert [row["psnr"] is None for row in data["rows"]] == [False] * 3 + [True] * 2, "pixels need no tokenizer"
    assert len([*(tmp_path / "runs").iterdir()]) == 2 + 5, "RAE with and without REPA have one tokenizer"
    assert data["claims"][0]["says"].endswith("1 seed, which says nothing about fd_micro.")
    never()
    assert run_recipe("insight-2", small, tmp_path, monkeypatch, "--seeds", "1") == data


def test_decoders_are_compared_on_the_latents_of_one_generator(small, tmp_path, monkeypatch, never) -> None:
    monkeypatch.setattr(plans, "STRENGTHS", (0.0, 1.0))
    data = run_recipe("decoder-noise", small, tmp_path, monkeypatch, "--seeds", "1")
    generators = [*(tmp_path / "runs").glob("*/generator/model.safetensors")]
    tokenizers = [*(tmp_path / "runs").glob("*/tokenizer/model.safetensors")]
    assert len(generators) == 1 and len({file.read_bytes() for file in tokenizers}) == 2
    assert data["rows"][0]["fd_micro"] != data["rows"][1]["fd_micro"]
    never()
    assert run_recipe("decoder-noise", small, tmp_path, monkeypatch, "--seeds", "1") == data


def test_insight_3_chooses_on_other_samples_and_counts_evaluations(trained_run, tmp_path, monkeypatch, never) -> None:
    monkeypatch.setattr(guidance, "INTERVALS", ((0.9, 1.0),))
    budget = Budget(steps=(2,), choice_steps=1, choice_pictures=8, scales=(1.5,))
    table = guidance_table([trained_run], budget, tmp_path, n=8)
    cost = {row["guidance"]: row["evaluations a picture"] for row in table.rows}
    assert cost["none"] == cost["internal"] == 2
    whole = [row["guidance"] for row in table.rows if row["scale, by run"] == "1.5 on [0, 1]"]
    assert all(cost[kind] == (4 if kind in whole else 3) for kind in ("cfg", "auto", "internal+cfg"))
    seeds = [json.loads(file.read_text())["seed"] for file in (tmp_path / "points").glob("*/*.json")]
    assert sorted(seeds) == [guidance.SEED] * 5 + [guidance.SEED_OF_CHOICE] * 8
    assert [[len(tried) for tried in runs] for runs in table.settings["chosen"].values()] == [[2]] * 4
    never()
    assert guidance_table([trained_run], budget, tmp_path, n=8).rows == table.rows


def test_insight_3_chooses_for_each_run_by_itself(trained_run, tmp_path, monkeypatch) -> None:
    runs = {tmp_path / "a": 1.1, tmp_path / "b": 2.0}  # the scale that is best for it
    for run in runs:
        shutil.copytree(trained_run, run)

    def measured(trained, sampling, _seed, _out) -> dict:
        scale, low = getattr(sampling.guidance, "scale", 9), getattr(sampling.guidance, "interval", (0,))[0]
        away = abs(scale - runs[trained.run.dir]) + low
        row = {"name": "fd", "value": away, "better": "lower", "role": "headline", "num_samples": 4}
        return {"results": [row], grid.EVALUATIONS: 4}

    monkeypatch.setattr(guidance, "measure", measured)
    table = guidance_table([*runs], Budget((2,), 1, 4, scales=(1.1, 2.0)), tmp_path / "out", n=4)
    assert {row["scale, by run"] for row in table.rows[1:]} == {"1.1 on [0, 1]; 2 on [0, 1]"}
    assert table.rows[1]["fd"].values == {0: 0.0, 1: 0.0}


def test_insight_3_takes_trained_runs_from_the_command_line(trained_run, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("raev2_tasks.analyses.command.guidance_table", lambda *args: asked.append(args) or Table(
        "insight-3", "T", [{"a": 1}], ""))  # fmt: skip
    command = ["analyse", "insight-3", "--runs", str(trained_run), "--n", "8", "--sampler-steps", "2", "4"]
    assert main([*command, "--choice", "1", "8", "--out", str(tmp_path)]) == 0
    assert asked == [([trained_run], Budget((2, 4), 1, 8), tmp_path, 8)]


def test_a_run_without_an_earlier_checkpoint_has_no_weak_generator(trained_run, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["analyse", "insight-3", "--runs", str(run), "--out", str(tmp_path / "out")]) == 4
    assert "no earlier checkpoint for auto guidance; got 0; expected 2 checkpoints" in capsys.readouterr().err


def test_the_weak_generator_is_the_oldest_whole_checkpoint(trained_run, tmp_path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    checkpoints = run / "checkpoints" / "generator"
    oldest = list_checkpoints(checkpoints)[0]
    (checkpoints / f".{oldest.name}.partial").mkdir()  # what a killed process left
    assert guidance.earlier(open_trained(run), tmp_path / "out").name.endswith(f"-{oldest.name}")


def test_plans_need_an_encoder_to_vary(tiny_spec: RunSpec, tmp_path, monkeypatch, capsys) -> None:
    from raev2.spec import PixelSpec
    from raev2.task import get_task

    pixels = tiny_spec.replace(tokenizer=PixelSpec(image_size=(64, 64)))
    monkeypatch.setitem(get_task("imagenet").recipes(), "pixels", lambda: pixels)
    command = ["analyse", "insight-1", "--task", "imagenet", "--recipe", "pixels", "--out", str(tmp_path)]
    assert main(command) == 2
    assert "raev2 analyse insight-1: needs a recipe with an RAE tokenizer; got pixels" in capsys.readouterr().err
