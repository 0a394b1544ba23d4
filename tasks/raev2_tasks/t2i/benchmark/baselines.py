"""Pictures with a known score, to tell what a score is worth.

oracle          the renderer's own pictures of the prompts: what the scorer can see at most
negatives       pictures that miss their prompt by one thing: the scorer must refuse all of them
class-only      the right classes, everything else random: what knowing the nouns alone is worth
retrieval       the training picture whose caption is most like the prompt: what memorising is worth
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raev2.errors import SpecError
from raev2_tasks.t2i.benchmark import emo, g60, rows, s12, txt, words
from raev2_tasks.t2i.benchmark.compositions import Compositions
from raev2_tasks.t2i.benchmark.palette import COLORS
from raev2_tasks.t2i.benchmark.rows import RELATIONS, PromptRow
from raev2_tasks.t2i.benchmark.scene import SIZE_PX, Scene
from raev2_tasks.t2i.benchmark.scoring import get_track

Images = NDArray[np.uint8]


def oracle_images(track: str, prompts: Sequence[PromptRow], size: int = SIZE_PX, seed: int = 0) -> Images:
    """The renderer's pictures of the prompts, uint8 (N, 3, size, size); picture ``i`` depends on seed, i and prompt."""
    return _render(oracle_scenes(track, prompts, seed), size)


def oracle_scenes(track: str, prompts: Sequence[PromptRow], seed: int = 0) -> list[Scene]:
    """The scenes of ``oracle_images``."""
    module = get_track(track)
    return [module.scene(row, np.random.default_rng([7, seed, index])) for index, row in enumerate(prompts)]


def minimal_negatives(
    track: str, prompts: Sequence[PromptRow], size: int = SIZE_PX, seed: int = 0
) -> tuple[Images, list[PromptRow]]:
    """Pictures that miss their prompt by one thing, with the prompt of each: several for a prompt.

    One object too many or too few, another class, another colour, colours swapped, places swapped; one letter changed;
    another emoji.
    """
    wrong, wanted = [], []
    rng = np.random.default_rng([8, seed])
    for row in prompts:
        for other in _near_misses(track, row, rng):
            wrong.append(other)
            wanted.append(row)
    return oracle_images(track, wrong, size, seed), wanted


def class_only_floor(track: str, prompts: Sequence[PromptRow], size: int = SIZE_PX, seed: int = 0) -> Images:
    """Pictures with the classes of the prompts and nothing else of them: number, colours and places are random.

    SpecError for the tracks of words and emojis, which are all class.
    """
    _compositions(track)
    rng = np.random.default_rng([9, seed])
    guesses = []
    for row in prompts:
        names = [entry["class"] for entry in row.include]
        coloured = [str(color) for color in rng.choice(COLORS, size=2)]
        if row.tag == "counting":
            guesses.append(rows.counting(names[0], int(rng.integers(1, 5))))
        elif row.tag == "colors":
            guesses.append(rows.colors(names[0], coloured[0]))
        elif row.tag == "color_attr":
            guesses.append(rows.color_attr((names[0], coloured[0]), (names[1], coloured[1])))
        elif row.tag == "position":
            guesses.append(rows.two_object(names[1], names[0]))
        else:
            guesses.append(row)
    return oracle_images(track, guesses, size, seed)


def retrieve(prompts: Sequence[PromptRow], captions: Sequence[str]) -> list[int]:
    """For each prompt the index of the training caption with the most similar set of words; the first one on ties.

    Similarity: shared words over all words of both.
    """
    texts: dict[str, int] = {}
    for index, text in enumerate(captions):
        texts.setdefault(text, index)
    if not texts:
        raise SpecError("benchmark retrieval", "no captions", got=0, expected="captions of training pictures")
    sets = [frozenset(text.lower().split()) for text in texts]
    holders: dict[str, list[int]] = defaultdict(list)
    for number, words_of in enumerate(sets):
        for word in words_of:
            holders[word].append(number)
    sizes = np.array([len(words_of) for words_of in sets])
    first = list(texts.values())
    best = []
    for row in prompts:
        wanted = frozenset(row.prompt.lower().split())
        shared = np.zeros(len(sets), dtype=np.int64)
        for word in wanted:
            shared[holders.get(word, [])] += 1
        best.append(first[int((shared / (sizes + len(wanted) - shared)).argmax())])
    return best


def _near_misses(track: str, row: PromptRow, rng: np.random.Generator) -> list[PromptRow]:
    if track == "txt":
        return _misspelled(row, rng)
    if track == "emo":
        same = {row.include[0]["code"], *emo.near_duplicates().get(row.include[0]["code"], ())}
        others = [item for item in emo.emojis() if item.code not in same]
        return [emo.row(others[int(rng.integers(len(others)))])]
    known = _compositions(track)
    names = [entry["class"] for entry in row.include]
    left = [name for name in known.classes if name not in names and (name != "person" or row.tag in _COLOURLESS)]
    other = left[int(rng.integers(len(left)))]
    if row.tag == "single_object":
        return [rows.single_object(other)]
    if row.tag == "two_object":
        return [rows.single_object(names[0]), rows.two_object(names[0], other), rows.two_object(other, names[1])]
    if row.tag == "counting":
        num = row.include[0]["count"]
        return [rows.counting(names[0], num - 1), rows.counting(names[0], num + 1), rows.counting(other, num)]
    if row.tag == "position":
        relation = row.include[1]["position"][0]
        opposite = RELATIONS[RELATIONS.index(relation) ^ 1]
        reference, subject = names
        return [
            rows.position(subject, opposite, reference),
            rows.position(other, relation, reference),
            rows.single_object(subject),
        ]
    colors = [entry["color"] for entry in row.include]
    rest = [color for color in COLORS if color not in colors]
    new = rest[int(rng.integers(len(rest)))]
    if row.tag == "colors":
        return [rows.colors(names[0], new), rows.colors(other, colors[0])]
    (a, b), (red, blue) = names, colors
    return [
        rows.color_attr((a, blue), (b, red)),
        rows.color_attr((a, new), (b, blue)),
        rows.color_attr((other, red), (b, blue)),
        rows.colors(a, red),
    ]


_COLOURLESS = ("single_object", "two_object", "counting", "position")


def _misspelled(row: PromptRow, rng: np.random.Generator) -> list[PromptRow]:
    """One letter replaced, one left out, one more; only words that still are words of the alphabet."""
    entry = row.include[0]
    text, color = entry["text"], entry["color"]
    place = int(rng.integers(len(text)))
    letter = words.ALPHABET[(words.ALPHABET.index(text[place]) + int(rng.integers(1, 25))) % 25]
    changed = [text[:place] + letter + text[place + 1 :], text[:place] + text[place + 1 :]]
    if len(text) < words.LENGTHS[1]:
        changed.append(text[:place] + letter + text[place:])
    return [txt.row(word, color, row.tag) for word in changed]


def _compositions(track: str) -> Compositions:
    modules = {"s12": s12, "g60": g60}
    if track not in modules:
        raise SpecError("benchmark", "the track has no compositions", got=repr(track), expected="s12 or g60")
    return modules[track].training()


def _render(scenes: Sequence[Scene], size: int) -> Images:
    images = [np.asarray(scene.render(size)).transpose(2, 0, 1) for scene in scenes]
    return np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
