"""Captions of an image: how they are read from a sample, and which one a training step sees.

Read `parse_captions` for the layouts of sample files and `CaptionRule` for the choice. Nothing here touches files or
torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raev2.errors import DataError, SpecError
from raev2_tasks.t2i.text.encodings import decode_text

KINDS = ("short", "long", "alt", "prompt", "ocr", "template")
UNLABELLED_KIND = "alt"  # of a caption whose file does not say what it is
TXT = "txt"  # the name of the txt member in a list of caption fields
KNOWN_FIELDS: dict[str, str | None] = {  # of a json, in the order in which they serve, with the kind that a name says
    "caption": None, "prompt": None, "text": None, "recaption": "long", "re_caption": "long", "llava_caption": "long",
    "vlm_caption": "long", "long_caption": "long", "dense_caption": "long", "blip_caption": "short",
    "short_caption": "short", "long": "long", "short": "short", "alt_text": "alt", "alt": "alt", "description": None,
    "title": None, "annotations": None, "sentences": None,
}  # fmt: skip
CaptionFields = Sequence[tuple[str, str]]
"""Fields that hold captions, the default one first, each with the kind of its captions; 'txt' is the txt member."""
TEXT_KEYS = ("text", "caption", "raw", "value", "content", "sentence")  # of a caption that is an object

_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u180e\ud800-\udfff]")
_JOINER = re.compile("(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])")  # emoji and some scripts need it

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
    field   where it stood: 'txt', or the name of the json field
    """

    text: str
    kind: str
    model: str = ""
    score: float | None = None
    field: str = ""

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
        fields |= {"field": self.field} if self.field else {}
        return fields if self.score is None else {**fields, "score": self.score}


@dataclass(frozen=True)
class CaptionRule:
    """Which caption of an image a training step sees.

    The kind is drawn by `mix` among the kinds that the image has, then one caption of that kind; or the field by
    `fields` in the same way.

    mix                 weight by kind; kinds that are not named are never drawn. None: always the default caption
    fields              weight by field ('txt' or a name in the json) instead of by kind
    min_score           captions with a lower score are left out; a caption without score stays
    score_temperature   inside a kind the weight is exp(score / temperature); None: equal weights
    shorten_prob        probability of keeping only the first k sentences, k uniform over 1 to their number
    """

    mix: Mapping[str, float] | None = None
    min_score: float | None = None
    score_temperature: float | None = None
    shorten_prob: float = 0.0
    fields: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.mix is not None and self.fields is not None:
            raise SpecError("caption_mix", "weights by kind and by field", expected="one of them")
        unknown = [kind for kind in self.mix or {} if kind not in KINDS]
        if unknown:
            raise SpecError("caption_mix", "unknown kind", got=unknown[0], expected=f"some of {', '.join(KINDS)}")
        weights = self.weights
        if weights is not None and not (sum(weights.values()) > 0 and min(weights.values()) >= 0):
            raise SpecError("caption_mix", "weights must be >= 0 and not all 0", got=dict(weights))

    @property
    def weights(self) -> Mapping[str, float] | None:
        """Weight by what is drawn first, kind or field; None: nothing is drawn."""
        return self.mix if self.fields is None else self.fields

    def group(self, caption: Caption) -> str:
        """What of a caption is drawn first: its kind or its field."""
        return caption.kind if self.fields is None else caption.field

    def reading(self, source_fields: CaptionFields, kind: str) -> CaptionFields:
        """Which fields of a source to read: those of this rule first, then those that the source names."""
        if self.fields is None:
            return source_fields
        known = dict(source_fields)
        first = [(name, known.pop(name, "") or KNOWN_FIELDS.get(name) or kind) for name in self.fields]
        return [*first, *known.items()]

    def choose(self, captions: Sequence[Caption], draws: Sequence[float], where: str = "caption") -> Caption:
        """One of `captions`, of which the first is the default.

        draws   four uniform numbers in [0, 1): for the kind, the caption, whether to shorten, and to how many sentences

        Raises BadSample when no caption passes.
        """
        weights = self.weights
        allowed = [
            caption for caption in captions
            if (weights is None or weights.get(self.group(caption), 0) > 0)
            and (self.min_score is None or caption.score is None or caption.score >= self.min_score)
        ]  # fmt: skip
        if not allowed:
            name = "kinds" if self.fields is None else "fields"
            found = ", ".join(sorted({self.group(caption) for caption in captions})) or "none"
            raise BadSample(
                "bad_caption", where, f"no caption of the {name} and scores asked for", got=f"{name} {found}"
            )
        if weights is None:
            caption = allowed[0]
        else:
            groups = list(dict.fromkeys(map(self.group, allowed)))
            group = groups[_draw([weights[name] for name in groups], draws[0])]
            same = [caption for caption in allowed if self.group(caption) == group]
            caption = same[_draw(self._weights(same), draws[1])]
        if draws[2] < self.shorten_prob:
            parts = sentences(caption.text)
            text = " ".join(parts[: 1 + int(draws[3] * len(parts))])
            caption = replace(caption, text=text)
        return caption

    def _weights(self, captions: Sequence[Caption]) -> list[float]:
        if self.score_temperature is None or any(caption.score is None for caption in captions):
            return [1.0] * len(captions)
        scores = [caption.score or 0.0 for caption in captions]
        return [math.exp((score - max(scores)) / self.score_temperature) for score in scores]


def caption_fields(text: str, kind: str = UNLABELLED_KIND) -> list[tuple[str, str]]:
    """The fields in "recaption:long,caption:alt,txt", of `kind` where they have none. SpecError for an unknown kind."""
    items = [item.strip().partition(":") for item in text.split(",") if item.strip()]
    fields = [(name.strip(), given.strip() or kind) for name, _, given in items]
    for name, given in fields:
        if given not in KINDS:
            raise SpecError(
                f"captions: {name}", "unknown kind of caption", got=given, expected=f"one of {', '.join(KINDS)}"
            )
    return fields


def parse_captions(
    text: bytes | None, data: bytes | None, kind: str = UNLABELLED_KIND, fields: CaptionFields = ()
) -> list[Caption]:
    """Captions of a sample, the default one first.

    text     the txt member
    data     the json member, in any form that `texts_of` reads. Where no caption in it can be used, the txt serves
    kind     of captions for which the files do not say it
    fields   which fields to read, all of them; none: `captions` or `conversations` of the json, else the txt, else the
             first of `KNOWN_FIELDS` in the json

    Raises BadSample when there is none.
    """
    unusable = ""
    captions: list[Caption] = []
    try:
        value = parse_json(data)
        captions = _listed(value, text, fields) if fields else _found(value, text, kind)
    except BadSample as error:
        if text is None:
            raise
        unusable = f"; {error}"
    captions = [caption for caption in captions if caption.text] or [
        caption for caption in _from_text(text, kind) if caption.text
    ]
    if not captions:
        what = "missing or empty" if text is None or text.strip() else "the txt is empty"
        raise BadSample("bad_caption", "caption", f"{what}{unusable}")
    return captions


def json_failure(data: bytes | None, kind: str = UNLABELLED_KIND, fields: CaptionFields = ()) -> str:
    """Why the captions of a json member cannot be used, so that the txt serves; '' where nothing is wrong with it."""
    try:
        value = parse_json(data)
        _listed(value, None, fields) if fields else _found(value, None, kind)
    except BadSample as error:
        return str(error)
    return ""


def parse_json(data: bytes | None) -> Any:
    """The value of the json member, {} where there is none. Raises BadSample when it cannot be read."""
    if data is None:
        return {}
    try:
        return json.loads(decode_text(data)[0])
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_caption", "json", "cannot be read", got=str(error)) from error


def json_fields(data: bytes | None) -> dict[str, Any]:
    """The json member as a dictionary; empty where there is none, or where it is none."""
    try:
        value = parse_json(data)
    except BadSample:
        return {}
    return value if isinstance(value, dict) else {}


def clean(text: str) -> str:
    """One line without characters that nobody sees: byte order marks, zero-width spaces, halves of characters.

    Joiners stay between characters beyond ASCII, where emoji and some scripts need them.
    """
    return " ".join(_JOINER.sub("", _INVISIBLE.sub("", text)).split())


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


def _found(value: Any, text: bytes | None, kind: str) -> list[Caption]:
    """Captions of a sample for which nobody named the fields."""
    if not isinstance(value, Mapping):
        return texts_of(value, kind, "json")
    if captions := texts_of(value.get("captions"), kind, "captions"):
        return _default_first(captions, value.get("default", 0))
    if captions := texts_of(value.get("conversations"), kind, "conversations"):
        return captions
    if text is not None and text.strip():
        return _from_text(text, kind)
    names = {str(name).lower(): name for name in value}
    unusable: BadSample | None = None
    for field, its_kind in KNOWN_FIELDS.items():
        try:
            captions = texts_of(value[names[field]], its_kind or kind, names[field]) if field in names else []
        except BadSample as error:
            unusable = unusable or error
            continue
        if any(caption.text for caption in captions):
            return captions
    if unusable is not None:
        raise unusable
    return []


def _listed(value: Any, text: bytes | None, fields: CaptionFields) -> list[Caption]:
    """Captions of these fields, in their order. In a json of this project a caption says from which field it came."""
    captions: list[Caption] = []
    ours = texts_of(value["captions"], UNLABELLED_KIND, "") if isinstance(value, Mapping) and "v" in value else []
    for name, kind in fields:
        if named := [caption for caption in ours if caption.field == name]:
            captions += named
        elif name == TXT:
            captions += _from_text(text, kind)
        elif isinstance(value, Mapping):
            captions += texts_of(value.get(name), kind, name)
    return captions


def texts_of(value: Any, kind: str, field: str) -> list[Caption]:
    """Captions in a value: a text, an object with a text, a conversation, a list of these, or an object of these.

    Names of an object that are kinds are the kinds of what they hold. Raises BadSample for anything else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [Caption(clean(value), kind, field=field)]
    if isinstance(value, list):
        if value and all(isinstance(turn, Mapping) and ("from" in turn or "role" in turn) for turn in value):
            return _from_conversation(value, kind, field)
        return [caption for entry in value for caption in _from_entry(entry, kind, field)]
    if isinstance(value, Mapping) and not any(name in value for name in TEXT_KEYS):
        if "annotations" in value:  # COCO, which keeps its images beside them
            return texts_of(value["annotations"], kind, field)
        return [c for name, part in value.items() for c in texts_of(part, name if name in KINDS else kind, field)]
    return _from_entry(value, kind, field)


def _from_entry(entry: Any, kind: str, field: str) -> list[Caption]:
    if isinstance(entry, str | list):
        return texts_of(entry, kind, field)
    if isinstance(entry, Mapping) and any(name in entry for name in TEXT_KEYS):
        return _from_object(entry, kind, field)
    raise BadSample("bad_caption", "caption", "its json has other fields than expected", got=f"{field}: {entry!r:.60}")


def _from_object(entry: Mapping[str, Any], kind: str, field: str) -> list[Caption]:
    text = next(entry[name] for name in TEXT_KEYS if name in entry)
    kind, score = entry.get("kind", kind), entry.get("score")
    if isinstance(text, list):
        return texts_of(text, kind, field)
    right_types = (text is None or isinstance(text, str)) and kind in KINDS
    if not right_types or not (score is None or isinstance(score, int | float)):
        raise BadSample(
            "bad_caption", "caption", "its json has other fields than expected", got=f"{dict(entry)!r:.100}",
            hint=f"A kind is one of {', '.join(KINDS)}.",
        )  # fmt: skip
    return [Caption(clean(text or ""), kind, str(entry.get("model") or ""), score, str(entry.get("field", field)))]


def _from_text(text: bytes | None, kind: str) -> list[Caption]:
    try:
        return [Caption(clean(decode_text(text or b"")[0]), kind, field=TXT)]
    except ValueError as error:
        raise BadSample("bad_caption", "caption", "the txt cannot be read", got=str(error)) from error


def _default_first(captions: list[Caption], default: Any) -> list[Caption]:
    if not isinstance(default, int) or not 0 <= default < max(len(captions), 1):
        raise BadSample("bad_caption", "caption", "its json has no caption of its default number", got=repr(default))
    return captions[default : default + 1] + captions[:default] + captions[default + 1 :]


def _from_conversation(turns: Sequence[Mapping[str, Any]], kind: str, field: str) -> list[Caption]:
    """The description in the first human turn, and the turn as it stands as a `prompt`."""
    human = (turn for turn in turns if turn.get("from", turn.get("role")) in ("human", "user"))
    raw = next((turn.get("value", turn.get("content")) for turn in human), "")
    if not isinstance(raw, str):
        raise BadSample("bad_caption", "caption", "a turn of its conversation is no text", got=f"{raw!r:.60}")
    raw = clean(raw.replace("<image>", " "))
    stripped = strip_request(raw)
    caption = Caption(stripped, kind, field=field)
    return [caption] + ([Caption(raw, "prompt", field=field)] if stripped != raw else [])
