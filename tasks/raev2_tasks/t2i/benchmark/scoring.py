"""Scores of many pictures and their summary. Tracks: ``s12``, ``g60``, ``txt``, ``emo``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raev2.errors import SpecError, did_you_mean
from raev2_tasks.t2i.benchmark.foreground import to_pictures
from raev2_tasks.t2i.benchmark.rows import PromptRow
from raev2_tasks.t2i.benchmark.rules import ImageScore

TRACKS = ("s12", "g60", "txt", "emo")
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class TrackSummary:
    """Scores of a track, all between 0 and 1 unless said otherwise; a picture is right when it is ``exact``.

    per_tag   mean over the pictures of a tag
    macro     unweighted mean over tags, the headline; ``interval`` is its 95 % bootstrap interval over prompts
    micro     mean over all pictures
    lenient   like macro, by GenEval's rule: other objects do no harm
    any       part of the prompts with at least one right picture
    per_tier  like per_tag, for the tiers of a track that has them
    values    means of further numbers of the track
    """

    track: str
    num_images: int
    num_prompts: int
    per_tag: dict[str, float]
    images_per_tag: dict[str, int]
    macro: float
    interval: tuple[float, float]
    micro: float
    lenient: float
    any: float
    per_tier: dict[str, float]
    values: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)


def get_track(name: str) -> ModuleType:
    """The module of a track; SpecError for an unknown one."""
    if name not in TRACKS:
        raise SpecError(
            "benchmark", "unknown track", got=repr(name), expected=f"one of {', '.join(TRACKS)}",
            hint=did_you_mean(name, TRACKS),
        )  # fmt: skip
    return importlib.import_module(f"{__package__}.{name}")


def score_images(track: str, images_u8: Any, rows: Sequence[PromptRow]) -> list[ImageScore]:
    """Judge image ``i`` by ``rows[i]``.

    images_u8  8-bit images (N, 3, H, H), tensor or array, of any size; resized to 256 px
    """
    module = get_track(track)
    pictures = to_pictures(images_u8)
    if len(pictures) != len(rows):
        raise SpecError("benchmark", "images and prompts differ in number", got=len(pictures), expected=str(len(rows)))
    return [module.judge(module.look(picture, row.tag), row) for picture, row in zip(pictures, rows, strict=True)]


def summarise(scores: Sequence[ImageScore], rows: Sequence[PromptRow], track: str = "") -> TrackSummary:
    """Means by tag and over tags; several pictures of a prompt are several equal rows."""
    if not scores or len(scores) != len(rows):
        raise SpecError("benchmark", "nothing to summarise", got=f"{len(scores)} scores, {len(rows)} prompts")
    exact = np.array([item.exact for item in scores], dtype=float)
    lenient = np.array([item.lenient for item in scores], dtype=float)
    tags = np.array([row.tag for row in rows])
    names = list(dict.fromkeys(tags.tolist()))
    prompt_ids = {key: index for index, key in enumerate(dict.fromkeys((row.tag, row.prompt) for row in rows))}
    prompt_of = np.array([prompt_ids[row.tag, row.prompt] for row in rows])
    tiers = np.array([row.tier or "" for row in rows])
    values = {
        key: float(np.mean([item.details["values"][key] for item in scores])) for key in scores[0].details["values"]
    }
    per_tag = {name: float(exact[tags == name].mean()) for name in names}
    return TrackSummary(
        track=track,
        num_images=len(scores),
        num_prompts=len(prompt_ids),
        per_tag=per_tag,
        images_per_tag={name: int((tags == name).sum()) for name in names},
        macro=float(np.mean(list(per_tag.values()))),
        interval=_interval(exact, tags, prompt_of),
        micro=float(exact.mean()),
        lenient=float(np.mean([lenient[tags == name].mean() for name in names])),
        any=float(np.mean([exact[prompt_of == index].any() for index in range(len(prompt_ids))])),
        per_tier={str(name): float(exact[tiers == name].mean()) for name in np.unique(tiers) if name},
        values=values,
    )


def _interval(right: NDArray[np.float64], tags: NDArray[Any], prompt_of: NDArray[np.int64]) -> tuple[float, float]:
    """95 % interval of the macro mean: prompts are drawn again inside each tag, 10,000 times, seed 0."""
    rng = np.random.default_rng(0)
    means = []
    for tag in dict.fromkeys(tags.tolist()):
        _, prompt = np.unique(prompt_of[tags == tag], return_inverse=True)
        num = np.bincount(prompt)
        hits = np.bincount(prompt, weights=right[tags == tag])
        drawn = rng.integers(len(num), size=(NUM_RESAMPLES, len(num)))
        means.append(hits[drawn].sum(axis=1) / num[drawn].sum(axis=1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)
