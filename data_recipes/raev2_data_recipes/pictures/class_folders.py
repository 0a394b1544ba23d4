"""What a folder of pictures means: its splits, its classes, and what takes no part. Read `read_layout` first.

A layout that can be read in two ways is refused with both readings and the option for each, and no file is left out
without being counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raev2.errors import DataError
from raev2.files.picture_folder import PictureFolder, scan_folder, text_of, told
from raev2_data_recipes.pictures.layout import File, Layout, few, num_pictures, source_name
from raev2_tasks.splits import SPLIT_WORDS, split_in_name

WHERE = "data image-folder: src"
BESIDE = "picture beside the splits"

Labelled = list[tuple[str, Path]]
"""(class name or "", picture)"""


@dataclass(frozen=True)
class Choice:
    """What the user decided; None is decided by what lies there.

    class_level   0: no classes; n: the class is the n-th folder below `src`, or below the folder of its split
    splits        whether folders called train, val or test are splits
    """

    class_level: int | None = None
    splits: bool | None = None


def read_layout(src: Path, val_fraction: float, choice: Choice) -> Layout:
    """Splits, classes and pictures of a folder.

    A single folder around everything is looked through. Folders called train, val or test, in any usual spelling, are
    splits; the folders in them, or in `src`, are classes. Where there is no folder for val, that for test is held
    out, and where there is none either, the share `val_fraction` of each class.

    Raises DataError for a folder without pictures, and for one that can be read in two ways.
    """
    top = scan_folder(src)
    layout = Layout(src, left_out=top.all_ignored())
    if not top.has_pictures():
        got = f"{src} ({told(layout.left_out)})" if layout.left_out else src
        raise DataError(WHERE, "no pictures found", got=got, expected="files of a format that Pillow reads")
    root = _root(top, choice, layout)
    parts = _parts(root, choice, layout)
    level = choice.class_level
    if level is None:
        level = _class_level(parts, 0 if "train" in layout.split_folders else len(root.path.relative_to(src).parts))
    taken = {split: _labelled(part, level, layout) for split, part in parts.items()}
    if not taken["train"]:
        raise DataError(WHERE, "no pictures for training at this level of folders", got=f"class_level={level}")
    if "val" not in taken:
        taken = _divided(src, taken["train"], val_fraction)
    layout.classes = sorted({name for found in taken.values() for name, _ in found if name})
    files = [File(split, name, path) for split, found in taken.items() for name, path in found]
    layout.files = sorted(files, key=lambda file: (file.split, file.class_name, str(file.path)))
    return layout


# Parts of `read_layout`


def _split_of(folder: PictureFolder) -> str | None:
    return SPLIT_WORDS.get(folder.path.name.lower())


def _word_in(folder: PictureFolder) -> str | None:
    """The split whose word is in the name of a folder, such as train2017; None where there is none, or two."""
    try:
        return split_in_name([folder.path.name], WHERE)
    except DataError:
        return None


def _inside_wrapper(folder: PictureFolder) -> PictureFolder:
    """The innermost folder that is alone around everything; `folder` itself where there is none."""
    if len(folder.filled()) != 1 or _split_of(folder.filled()[0]):
        return folder
    (only,) = folder.filled()
    inner = _inside_wrapper(only)
    if any(map(_split_of, inner.filled())):
        return inner
    around_many = inner is not only or (len(only.filled()) > 1 and not only.pictures)
    return inner if around_many and not folder.pictures else folder


def _root(top: PictureFolder, choice: Choice, layout: Layout) -> PictureFolder:
    """The folder with the splits or classes in it: `top`, or what a folder around everything holds."""
    inner = _inside_wrapper(top)
    has_splits = choice.splits is not False and any(map(_split_of, inner.filled()))
    if inner is top or (choice.class_level is not None and not has_splits):
        return top
    note = f"{source_name(layout.src, inner.path)}/ is around everything and was looked through"
    layout.notes.append(note + ("." if has_splits else "; if it is the one class: --set class_level=1."))
    layout.left_out += Counter({BESIDE: len(top.all_pictures()) - len(inner.all_pictures())})
    return inner


def _parts(root: PictureFolder, choice: Choice, layout: Layout) -> dict[str, PictureFolder]:
    """The folder of train, and that of val where there is one."""
    named = [folder for folder in root.filled() if _split_of(folder)]
    worded = {_word_in(folder) for folder in root.filled()}
    alike = not named and "train" in worded and None not in worded and len(worded) > 1
    if alike and choice.splits is None:
        raise _doubt(_names(root.filled()), ("splits", "splits=yes"), ("classes", "splits=no"))
    named = root.filled() if alike else named
    others = [folder for folder in root.filled() if folder not in named]
    if not _are_splits(named, others, choice, layout):
        return {"train": root}
    folders = _by_split(named)
    if "train" not in folders:
        hint = f"To train on it: --set src={named[0].path}. If it is a class: --set splits=no." if named else ""
        raise DataError(WHERE, "no folder for train", got=_names(root.folders) or root.path, hint=hint)
    if choice == Choice() and not any(part.filled() for part in folders.values()):
        raise _doubt(
            f"pictures directly in {_names(named)}",
            ("splits of pictures without labels", "class_level=0"), ("these are the classes", "splits=no"),
        )  # fmt: skip
    for folder in others:
        layout.left_out[f"picture in {text_of(folder.path.name)}/"] += len(folder.all_pictures())
    layout.left_out += Counter({BESIDE: len(root.pictures)})
    parts = _with_held_out(folders, choice, layout)
    layout.split_folders = {split: f"{source_name(layout.src, part.path)}/" for split, part in parts.items()}
    return parts


def _are_splits(
    named: Sequence[PictureFolder], others: Sequence[PictureFolder], choice: Choice, layout: Layout
) -> bool:
    """Whether the folders with names of splits are splits; `others` lie beside them."""
    if choice.splits is not None:
        return choice.splits
    if not named or not others:
        return bool(named)
    if len(named) == 1 and _split_of(named[0]) == "train" and not named[0].filled():
        layout.notes.append(f"{named[0].path.name}/ is read as a class; if it is a split: --set splits=yes.")
        return False
    raise _doubt(
        f"{_names(named)} beside {_names(others)}",
        ("splits, and the others take no part", "splits=yes"), ("all of them are classes", "splits=no"),
    )  # fmt: skip


def _by_split(named: Sequence[PictureFolder]) -> dict[str, PictureFolder]:
    """Split -> its folder; two folders for one are refused."""
    folders: dict[str, PictureFolder] = {}
    for folder in named:
        split = str(_split_of(folder) or _word_in(folder))
        first = folders.setdefault(split, folder)
        if first is not folder:
            what = f"two folders for {split}"
            raise DataError(WHERE, what, got=_names([first, folder]), hint="Move one away.")
    return folders


def _with_held_out(folders: Mapping[str, PictureFolder], choice: Choice, layout: Layout) -> dict[str, PictureFolder]:
    """Train and what is held out; a test folder that is not used is counted."""
    parts = {split: folder for split, folder in folders.items() if split != "test"}
    test = folders.get("test")
    if test is None:
        return parts
    name = f"{test.path.name}/"
    flat = choice.class_level != 0 and bool(parts["train"].filled()) and not test.filled()
    if "val" not in parts and not flat:
        layout.notes.append(f"{name} is the held-out split, as there is no folder for val; it is never trained on.")
        return parts | {"val": test}
    reason = "which has no class folders" if flat else "not needed beside the folder for val"
    layout.left_out[f"picture in {name}, {reason}"] += len(test.all_pictures())
    return parts


def _class_level(parts: Mapping[str, PictureFolder], above: int) -> int:
    """0 for pictures without classes, 1 for class folders; `above` folders are looked through (for the options)."""
    if not any(part.filled() for part in parts.values()):
        return 0
    for part in parts.values():
        if not part.filled():
            hint = "Sort the pictures of both splits into class sub-folders of the same names."
            raise DataError(f"data image-folder: {part.path}", "pictures without a class folder", hint=hint)
    folders = [folder for part in parts.values() for folder in part.filled()]
    inside = [f"{one.path.parent.name}/{one.path.name}/" for f in folders for one in f.filled() if _split_of(one)]
    if inside:
        raise DataError(
            WHERE, "folders for splits inside the class folders", got=text_of(few(inside)),
            hint="Put the class folders into train/ and test/ instead; or, if all the pictures are for training: "
            f"--set class_level={above + 1}.",
        )  # fmt: skip
    names = sorted({text_of(folder.path.name) for folder in folders})
    num_outside = sum(len(part.pictures) for part in parts.values())
    num_inside = sum(len(folder.all_pictures()) for folder in folders)
    one_class = (f"{names[0]} is the one class", f"class_level={above + 1}")
    if len(names) == 1 and any(folder.filled() for folder in folders):
        raise _doubt(f"{names[0]}/ is alone and has folders in it", one_class,
                     ("the folders in it are the classes", f"class_level={above + 2}"))  # fmt: skip
    if num_outside >= num_inside or (num_outside and len(names) == 1):
        raise _doubt(
            f"{num_pictures(num_outside)} beside {few([f'{name}/' for name in names])}",
            ("no classes, and all the pictures are taken", "class_level=0"),
            ("the folders are the classes, and the pictures beside them are left out", f"class_level={above + 1}"),
        )  # fmt: skip
    return 1


def _labelled(part: PictureFolder, level: int, layout: Layout) -> Labelled:
    """The pictures of a part with their classes; those outside of class folders are counted."""
    if level == 0:
        return [("", picture) for picture in part.all_pictures()]
    outside, folders = list(part.pictures), part.folders
    for _ in range(level - 1):
        outside += [picture for folder in folders for picture in folder.pictures]
        folders = [inside for folder in folders for inside in folder.folders]
    if outside:
        layout.left_out["picture outside the class folders"] += len(outside)
        layout.notes.append(f"Outside the class folders: {few([source_name(layout.src, path) for path in outside])}.")
    found = [(text_of(folder.path.name), picture) for folder in folders for picture in folder.all_pictures()]
    filled = Counter(text_of(folder.path.name) for folder in folders if folder.has_pictures())
    empty = [source_name(layout.src, folder.path) for folder in folders if not folder.has_pictures()]
    if empty:
        layout.notes.append(f"Class folders without pictures: {few(empty)}.")
    if joined := [name for name, number in filled.items() if number > 1]:
        layout.notes.append(f"Several folders are one class, as their names are the same text: {few(joined)}.")
    return found


def _divided(src: Path, labelled: Labelled, val_fraction: float) -> dict[str, Labelled]:
    """A share of each class for val, in the order of the hashes of the paths: a new picture moves hardly any other."""
    by_class = defaultdict[str, list[Path]](list)
    for name, path in labelled:
        by_class[name].append(path)
    in_val: set[Path] = set()
    least = 0 if val_fraction == 0 else 1 if len(by_class) > 1 else 2  # a Fréchet distance needs two pictures
    for paths in by_class.values():
        num_val = min(len(paths) - 1, max(min(least, len(paths) // 2), round(len(paths) * val_fraction)))
        in_val |= set(
            sorted(paths, key=lambda path: hashlib.sha256(source_name(src, path).encode()).hexdigest())[:num_val]
        )
    return {
        "train": [item for item in labelled if item[1] not in in_val],
        "val": [item for item in labelled if item[1] in in_val],
    }


def _doubt(what: str, *readings: tuple[str, str]) -> DataError:
    ways = "; or ".join(f"{text} (--set {option})" for text, option in readings)
    return DataError(WHERE, "can be read in two ways", got=what, hint=f"Say which: {ways}.")


def _names(folders: Sequence[PictureFolder]) -> str:
    return few([f"{text_of(folder.path.name)}/" for folder in folders])
