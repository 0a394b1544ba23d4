"""Which captions a sample has, and which one a step sees."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from raev2.errors import DataError, SpecError
from raev2_tasks.t2i.text.captions import BadSample, Caption, CaptionRule, parse_captions, sentences, strip_request

CAPTIONS = [
    Caption("a dog", "short"),
    Caption("A dog runs. It is brown. It barks.", "long", "one", 0.2),
    Caption("A brown dog.", "long", "two", 0.4),
    Caption("dog", "prompt"),
]


def drawn(rule: CaptionRule, count: int = 2000) -> Counter[str]:
    """How often each caption comes out, over a grid of draws for kind and caption."""
    side = int(count**0.5)
    grid = [((i + 0.5) / side, (j + 0.5) / side) for i in range(side) for j in range(side)]
    return Counter(rule.choose(CAPTIONS, (*draws, 0.9, 0.5)).text for draws in grid)


def test_without_a_mix_it_is_the_default_caption():
    assert CaptionRule().choose(CAPTIONS, (0.99, 0.99, 0.99, 0.99)) is CAPTIONS[0]


def test_kinds_are_drawn_by_weight_and_captions_of_a_kind_evenly():
    counts = drawn(CaptionRule({"short": 1, "long": 3}), 1600)
    assert counts == {"a dog": 400, CAPTIONS[1].text: 600, CAPTIONS[2].text: 600}
    weights = {"long": 0.45, "short": 0.35, "template": 0.2}  # no image has a template: the others share its part
    assert drawn(CaptionRule(weights), 1600)["a dog"] == pytest.approx(1600 * 0.35 / 0.8, abs=40)


def test_scores_leave_out_and_weigh():
    assert drawn(CaptionRule({"long": 1}, min_score=0.3)).keys() == {CAPTIONS[2].text}
    assert drawn(CaptionRule({"short": 1}, min_score=0.3)).keys() == {"a dog"}  # no score: stays
    counts = drawn(CaptionRule({"long": 1}, score_temperature=0.1))
    assert counts[CAPTIONS[2].text] / counts[CAPTIONS[1].text] == pytest.approx(2.718**2, rel=0.1)


def test_a_shortened_caption_is_its_first_sentences():
    rule = CaptionRule({"long": 1}, shorten_prob=0.5)
    texts = {rule.choose(CAPTIONS[1:2], (0, 0, 0.49, k)).text for k in (0.0, 0.4, 0.99)}
    assert texts == {"A dog runs.", "A dog runs. It is brown.", "A dog runs. It is brown. It barks."}
    assert rule.choose(CAPTIONS[1:2], (0, 0, 0.5, 0.0)) == CAPTIONS[1]
    assert sentences("No stop") == ["No stop"]


def test_no_caption_is_an_error_and_never_an_empty_text():
    with pytest.raises(BadSample, match="no caption of the kinds and scores asked for; got kinds long, prompt, short"):
        CaptionRule({"ocr": 1}).choose(CAPTIONS, (0, 0, 0, 0))
    with pytest.raises(SpecError, match="caption_mix: unknown kind; got lang"):
        CaptionRule({"lang": 1})
    with pytest.raises(SpecError, match="weights must be >= 0 and not all 0"):
        CaptionRule({"long": 0})
    with pytest.raises(DataError, match="unknown kind; got 'lang'"):
        Caption("x", "lang")


def test_the_default_of_our_json_comes_first_and_empty_texts_are_left_out():
    entries = [{"text": "", "kind": "alt"}, {"text": "b", "kind": "long"}, {"text": " c\nd ", "kind": "short"}]
    data = json.dumps({"captions": entries, "default": 2}).encode()
    assert [caption.text for caption in parse_captions(b"c d", data)] == ["c d", "b"]


@pytest.mark.parametrize(
    ("text", "data", "expected"),
    [
        (b"plain\n", None, "plain"),
        (b"plain", {"width": 3}, "plain"),
        (None, {"caption": "from json"}, "from json"),
        (b"txt wins", {"prompt": "p"}, "txt wins"),
        (None, {"conversations": [{"from": "human", "value": "<image>\nDraw a picture of a cat."}]}, "a cat."),
    ],
)
def test_other_layouts(text, data, expected):
    captions = parse_captions(text, None if data is None else json.dumps(data).encode(), "long")
    assert (captions[0].text, captions[0].kind) == (expected, "long")


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        (None, None, "missing or empty"),
        (b"  ", None, "the txt is empty"),
        (b"\x81", None, "the txt cannot be read; got neither UTF-8, UTF-16 nor cp1252; save it as UTF-8"),
        (None, b"{", "json: cannot be read"),
        (None, b"[1]", "its json has other fields than expected; got json: 1"),
        (None, b'{"captions": [{"kind": "long"}]}', "its json has other fields than expected; got captions: {'kind'"),
        (None, b'{"captions": [{"text": "t", "kind": "poem"}]}', "other fields than expected.*A kind is one of short"),
        (None, b'{"captions": ["a"], "default": 3}', "no caption of its default number; got 3"),
        (None, b'{"conversations": [{"from": "human", "value": 3}]}', "a turn of its conversation is no text; got 3"),
        (b" ", b"{", "the txt is empty; json: cannot be read"),
        (None, b'{"captions": []}', "missing or empty"),
    ],
)
def test_captions_that_cannot_be_read(text, data, message):
    with pytest.raises(BadSample, match=message) as error:
        parse_captions(text, data)
    assert error.value.kind == "bad_caption"


@pytest.mark.parametrize(
    ("request_text", "expected"),
    [
        ("Can you generate an image of a red fox in snow?", "a red fox in snow"),
        ("Please draw a picture showing two cats.", "two cats."),
        ("Create an image based on the following description: A tall man.", "A tall man."),
        ("Could you draw a dog?", "a dog"),
        ("Show jumping in Wales", "Show jumping in Wales"),
        ("Paint peeling off a wall", "Paint peeling off a wall"),
    ],
)
def test_requests_are_stripped_to_what_they_describe(request_text, expected):
    assert strip_request(request_text) == expected
