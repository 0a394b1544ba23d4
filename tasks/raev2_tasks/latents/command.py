"""The options of `raev2 latents`; files.py and pictures.py do the work."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from raev2.task import Command


def _options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("stats", "build"), help="statistics as one file, or the latents that training reads")
    add("--run", required=True, metavar="DIR", help="run folder or tokenizer folder")
    add("--data", metavar="DIR", help="dataset folder (default: the data of the run)")
    add("--split", default="train")
    add("--out", required=True, metavar="PATH", help="file of statistics; folder of latents, which is continued")
    add(
        "--dtype",
        choices=("fp16", "bf16", "fp32", "int8"),
        default="fp16",
        help="build: of the latents (default: fp16)",
    )
    add("--mirrored", action="store_true", help="build: also those of mirrored pictures, for data.horizontal_flip")
    add("--workers", type=int, help="build: processes that read pictures (default: up to 8)")


def _latents(options: Namespace) -> None:
    from raev2_tasks.latents import files, pictures

    source = pictures.open_source(options.run, options.data, options.split)
    if options.action == "stats":
        print(files.write_statistics(source, Path(options.out)))
        return
    workers = min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    files.build(source, Path(options.out), files.Format(options.dtype, options.mirrored), workers)


LATENTS = Command("latents of a dataset by a trained tokenizer: statistics, or files for training", _options, _latents)
