"""`raev2 t2i shards ...`: check, index, stats, rewrite and collect folders of image-text shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from raev2_tasks.t2i.shards.tar_scan import MAX_ASPECT, MIN_SIDE, ScanRule, ShapeRule


def shards(argv: Sequence[str]) -> None:
    """Check, index, count, rewrite and collect folders of image-text shards."""
    parser = argparse.ArgumentParser(prog="raev2 t2i shards", description="Folders of image-text shards.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help, description=help)
        added.add_argument("dir", metavar="DIR")
        return added

    check = action("check", "decode every sample and list what is wrong; changes nothing")
    _add_shape(check)
    index = action("index", "make tar shards of other origin readable: write an index beside each, and a manifest")
    index.add_argument("--out", metavar="DIR", help="write index and manifest here instead")
    index.add_argument("--name", help="name of the source (default: that of the folder)")
    index.add_argument("--kind", default="alt", help="kind of captions whose files do not say it (default: alt)")
    index.add_argument(
        "--captions", default="", metavar="FIELD[:KIND],...", help="json fields with captions, the default one first"
    )
    index.add_argument("--skip", default="", metavar="PATTERNS", help="leave out tars whose path matches")
    index.add_argument(
        "--val-samples", type=int, default=1000, help="how many validate where no tar is named val; at most a tenth"
    )
    index.add_argument("--max-bad-share", type=float, default=0.5, help="stop when more samples are unusable")
    _add_shape(index)
    index.add_argument("--licence", default="unstated")
    index.add_argument("--attribution", default="")
    action("stats", "samples, caption kinds and caption lengths, from the index alone")
    rewrite = action("rewrite", "write the usable samples as new shards")
    rewrite.add_argument("--out", metavar="DIR", required=True)
    rewrite.add_argument("--per-shard", type=int, default=5000)
    _add_shape(rewrite)
    collect = action("collect", "make one dataset of several source folders that lie in DIR")
    collect.add_argument("sources", nargs="+", metavar="NAME", help="folders inside DIR")
    options = parser.parse_args(list(argv))
    ACTIONS[options.action](options)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    """Options of the rule by which training leaves pictures out."""
    parser.add_argument("--size", type=int, default=0, metavar="PX", help="side of the training images; 0: any")
    parser.add_argument("--min-side", type=float, default=MIN_SIDE, help="least shorter side as a share of --size")
    parser.add_argument("--max-aspect", type=float, default=MAX_ASPECT, help="longest side over shortest")


def _shape(options: argparse.Namespace) -> ShapeRule:
    return ShapeRule.of((options.size, options.size), options.min_side, options.max_aspect)


def _check(options: argparse.Namespace) -> None:
    from raev2.errors import DataError
    from raev2_tasks.t2i.shards.check import check_shards

    found = check_shards(options.dir, _shape(options), num_workers=0)
    num_fatal = 0
    for file, problems in found.items():
        for problem in problems:
            num_fatal += problem.fatal
            print(f"{'error' if problem.fatal else 'note'}: {file}: {problem.key}: {problem.kind}: {problem.text}")
    if num_fatal:
        raise DataError(
            f"data {options.dir}", "unusable samples", got=num_fatal,
            hint=f"`raev2 t2i shards rewrite {options.dir} --out DIR` writes shards without them.",
        )  # fmt: skip
    print(f"{options.dir}: every sample can be read")


def _index(options: argparse.Namespace) -> None:
    from raev2_tasks.t2i.shards.index import index_shards
    from raev2_tasks.t2i.text.captions import caption_fields

    rule = ScanRule(options.kind, caption_fields(options.captions, options.kind), _shape(options))
    manifest = index_shards(
        options.dir, options.out, source=options.name, skip=options.skip, val_samples=options.val_samples, rule=rule,
        max_bad_share=options.max_bad_share, licence=options.licence, attribution=options.attribution,
        num_workers=0,
    )  # fmt: skip
    _print_counts(options.out or options.dir, manifest)


def _stats(options: argparse.Namespace) -> None:
    from raev2.files.manifest import read_manifest
    from raev2_tasks.t2i.shards.check import caption_lengths
    from raev2_tasks.t2i.shards.files import source_folders, source_manifest

    for split in read_manifest(options.dir)["splits"]:
        for name, lengths in caption_lengths(options.dir, split).items():
            words = ", ".join(f"{count} ({percentile} %)" for percentile, count in lengths.num_words.items())
            print(
                f"{split} {name}: {lengths.num_samples:,} samples, {lengths.num_captions:.1f} captions each, "
                f"shortest side {lengths.least_side_px} px; words of the default caption: {words}"
            )
    for name, folder in source_folders(options.dir).items():
        kinds = source_manifest(folder)["caption_kinds"]
        print(f"kinds in {name}: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.items()))


def _rewrite(options: argparse.Namespace) -> None:
    from raev2_tasks.t2i.shards.files import rewrite_shards

    _print_counts(
        options.out, rewrite_shards(options.dir, options.out, per_shard=options.per_shard, shape=_shape(options))
    )


def _collect(options: argparse.Namespace) -> None:
    from pathlib import Path

    from raev2_tasks.t2i.shards.files import write_collection

    _print_counts(options.dir, write_collection(Path(options.dir), options.sources, recipe="tar-shards", options={}))


def _print_counts(where: str, manifest: dict[str, Any]) -> None:
    counts = ", ".join(f"{split} {entry['num_samples']:,}" for split, entry in manifest["splits"].items())
    print(f"{where}: {counts}, {manifest['rejected']} rejected; fingerprint {manifest['fingerprint'][:12]}")


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": _check, "index": _index, "stats": _stats, "rewrite": _rewrite, "collect": _collect,
}  # fmt: skip
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"shards": shards}
