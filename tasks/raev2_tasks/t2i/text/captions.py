"""Captions of an image: how they are read from a sample, and which one a training step sees.

Read `parse_captions` for the three layouts of sample files and `CaptionRule` for the choice. Nothing here touches
files or torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raev2.errors import DataError, SpecError

KINDS = ("short", "long", "alt", "prompt", "ocr", "template")
UNLABELLED_KIND = "alt"  # of a caption whose file does not say what it is

_VERB = r"(?:generate|create|make|draw|produce|render|paint|design|show)"
_NOUN = r"(?:an?|the|one)?\s*(?:image|picture|photo|photograph|illustration|painting|drawing|visual)"
_LINK = r"(?:\s+(?:that\s+shows|of|showing|depicting|based\s+on|with|for|from))?"
_TEXT = r"(?:\s+(?:the|this)\s+(?:following\s+)?(?:caption|prompt|description|text))?\s*:?\s+"
_REQUEST = re.compile(  # 'Can you draw a dog?' or 'Draw an image of a dog.', but not 'Show jumping in Wales'
    rf"^(?:please\s+)?(?:(?:can|could|would|will)\s+you\s+(?:please\s+)?{_VERB}(?:\s+me)?(?:\s+{_NOUN}{_LINK}{_TEXT}|\s+)"
    rf"|{_VERB}(?:\s+me)?\s+{_NOUN}{_LINK}{_TEXT})",
    re.IGNORECASE,
)


class BadSample(DataError):
    """A sample that cannot be used. `kind` is the name under which it is counted, such as bad_caption."""

    def __init__(self, kind: str, where: str, what: str, *, got: object = None, hint: str = "") -> None:
        super().__init__(where, what, got=got, hint=hint)
        self.kind = kind


@dataclass(frozen=True)
class Caption:
    """One text about an image.

    kind    what sort of text it is, one of `KINDS`
    model   which captioner wrote it, or 'human'; empty where unknown
    score   agreement of text and image by the captioner's own measure, if there is one
    """

    text: str
    kind: str
    model: str = ""
    score: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError("caption", "unknown kind", got=repr(self.kind), expected=f"one of {', '.join(KINDS)}")

    @property
    def num_words(self) -> int:
        """Words between white space."""
        return len(self.text.split())

    def as_json(self) -> dict[str, Any]:
        """Fields for the json member of a sample."""
        fields = {"text": self.text, "kind": self.kind, "model": self.model, "n_words": self.num_words}
        return fields if self.score is None else {**fields, "score": self.score}


@dataclass(frozen=True)
class CaptionRule:
    """Which caption of an image a training step sees.

    The kind is drawn by `mix` among the kinds that the image has, then one caption of that kind.

    mix                 weight by kind; kinds that are not named are never drawn. None: always the default caption
    min_score           captions with a lower score are left out; a caption without score stays
    score_temperature   inside a kind the weight is exp(score / temperature); None: equal weights
    shorten_prob        probability of keeping only the first k sentences, k uniform over 1 to their number
    """

    mix: Mapping[str, float] | None = None
    min_score: float | None = None
    score_temperature: float | None = None
    shorten_prob: float = 0.0

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.mix or {} if kind not in KINDS]
        if unknown:
            raise SpecError("caption_mix", "unknown kind", got=unknown[0], expected=f"some of {', '.join(KINDS)}")
        if self.mix is not None and not (sum(self.mix.values()) > 0 and min(self.mix.values()) >= 0):
            raise SpecError("caption_mix", "weights must be >= 0 and not all 0", got=dict(self.mix))

    def choose(self, captions: Sequence[Caption], draws: Sequence[float], where: str = "caption") -> Caption:
        """One of `captions`, of which the first is the default.

        draws   four uniform numbers in [0, 1): for the kind, the caption, whether to shorten, and to how many sentences

        Raises BadSample when no caption passes.
        """
        allowed = [
            caption for caption in captions
            if (self.mix is None or self.mix.get(caption.kind, 0) > 0)
            and (self.min_score is None or caption.score is None or caption.score >= self.min_score)
        ]  # fmt: skip
        if not allowed:
            got = ", ".join(sorted({caption.kind for caption in captions})) or "none"
            raise BadSample("bad_caption", where, "no caption of the kinds and scores asked for", got=f"kinds {got}")
        if self.mix is None:
            caption = allowed[0]
        else:
            kinds = list(dict.fromkeys(caption.kind for caption in allowed))
            kind = kinds[_draw([self.mix[kind] for kind in kinds], draws[0])]
            same = [caption for caption in allowed if caption.kind == kind]
            caption = same[_draw(self._weights(same), draws[1])]
        if draws[2] < self.shorten_prob:
            parts = sentences(caption.text)
            text = " ".join(parts[: 1 + int(draws[3] * len(parts))])
            caption = Caption(text, caption.kind, caption.model, caption.score)
        return caption

    def _weights(self, captions: Sequence[Caption]) -> list[float]:
        if self.score_temperature is None or any(caption.score is None for caption in captions):
            return [1.0] * len(captions)
        scores = [caption.score or 0.0 for caption in captions]
        return [math.exp((score - max(scores)) / self.score_temperature) for score in scores]


def parse_captions(text: bytes | None, data: bytes | None, kind: str = UNLABELLED_KIND) -> list[Caption]:
    """Captions of a sample, the default one first.

    text   the txt member
    data   the json member: of this project (a list `captions`), with `conversations`, with a string `caption`,
           `prompt` or `text`, or without any caption, in which case `text` counts
    kind   of captions for which the files do not say it

    Raises BadSample when there is none, or when a member cannot be decoded.
    """
    fields = parse_json(data)
    if text is not None and not text.strip():
        raise BadSample("bad_caption", "caption", "the txt is empty")
    try:
        if isinstance(fields.get("captions"), list):
            captions = _listed(fields)
        elif isinstance(fields.get("conversations"), list):
            captions = _from_conversation(fields["conversations"], kind)
        else:
            named = next(
                (fields[name] for name in ("caption", "prompt", "text") if isinstance(fields.get(name), str)), ""
            )
            plain = text.decode("utf-8") if text is not None else named
            captions = [Caption(" ".join(plain.split()), kind)]
    except UnicodeDecodeError as error:
        raise BadSample("bad_caption", "caption", "not UTF-8", got=str(error)) from error
    except (KeyError, TypeError, AttributeError, DataError) as error:
        raise BadSample("bad_caption", "caption", "its json has other fields than expected", got=repr(error)) from error
    captions = [caption for caption in captions if caption.text]
    if not captions:
        raise BadSample("bad_caption", "caption", "missing or empty")
    return captions


def parse_json(data: bytes | None) -> dict[str, Any]:
    """The json member as a dictionary; empty where there is none. Raises BadSample when it cannot be read."""
    if data is None:
        return {}
    try:
        fields = json.loads(data)
    except ValueError as error:  # also UnicodeDecodeError
        raise BadSample("bad_caption", "json", "cannot be read", got=str(error)) from error
    if not isinstance(fields, dict):
        raise BadSample("bad_caption", "json", "not an object", got=type(fields).__name__)
    return fields


def strip_request(text: str) -> str:
    """The description inside a request such as 'Can you generate an image of a dog?': 'a dog'."""
    text = " ".join(text.replace("<image>", " ").split())
    match = _REQUEST.match(text)
    if match is None:
        return text
    inner = text[match.end() :].strip().strip("\"'").rstrip("?").strip()
    return inner or text


def sentences(text: str) -> list[str]:
    """Sentences of a text, with their full stops."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def _draw(weights: Sequence[float], uniform: float) -> int:
    """Index drawn with these weights by a uniform number in [0, 1)."""
    target = uniform * sum(weights)
    for index, weight in enumerate(weights):
        target -= weight
        if target < 0:
            return index
    return len(weights) - 1


def _listed(fields: Mapping[str, Any]) -> list[Caption]:
    captions = [
        Caption(" ".join(entry["text"].split()), entry["kind"], entry.get("model", ""), entry.get("score"))
        for entry in fields["captions"]
    ]
    default = fields.get("default", 0)
    if not 0 <= default < max(len(captions), 1):
        raise KeyError(f"default {default}")
    return captions[default : default + 1] + captions[:default] + captions[default + 1 :]


def _from_conversation(turns: Sequence[Mapping[str, str]], kind: str) -> list[Caption]:
    """The description in the first human turn, and the turn as it stands as a `prompt`."""
    raw = next((turn["value"] for turn in turns if turn.get("from", turn.get("role")) in ("human", "user")), "")
    raw = " ".join(raw.replace("<image>", " ").split())
    stripped = strip_request(raw)
    return [Caption(stripped, kind)] + ([Caption(raw, "prompt")] if stripped != raw else [])
