"""`raev2 reconstruct`: options in, table out."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from raev2.command.actions import print_table, refuse_existing
from raev2.errors import DataError
from raev2.files.replace import RECONSTRUCTIONS
from raev2.task import Command

SCORES = ("psnr", "ssim", "distance")


def _options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="PATH", help="image files or folders")
    which = parser.add_mutually_exclusive_group(required=True).add_argument
    which("--run", metavar="DIR", help="run folder; pipeline or tokenizer, as a folder or hub id")
    which("--tokenizer", dest="run", metavar="DIR", help="the same")
    add("--out", metavar="DIR", default="reconstructions")
    add("--overwrite", action="store_true")


def _reconstruct(options: Namespace) -> int:
    from raev2.model.opened import tokenizer_in
    from raev2.training.run import make_accelerator
    from raev2_tasks.reconstruct.pictures import reconstruct_pictures

    out = Path(options.out)
    refuse_existing(options, out, RECONSTRUCTIONS)
    device = make_accelerator("fp32").device
    rae = tokenizer_in(options.run).to(device)
    rows, failed = reconstruct_pictures(rae, device, [Path(path) for path in options.images], out)
    shown = [(Path(row.file).name, f"{row.psnr:.2f}", f"{row.ssim:.4f}", f"{row.distance:.4f}") for row in rows]
    mean = ("mean", *(f"{sum(getattr(row, name) for row in rows) / len(rows):.4f}" for name in SCORES))
    print_table(("file", "PSNR dB", "SSIM", rows[0].distance_name), [*shown, mean])
    print(f"\n{out / 'grid.png'}")
    if failed:
        print(f"not read: {len(failed)} of {len(rows) + len(failed)}: {', '.join(failed)}", file=sys.stderr)
    return DataError.exit_code if failed else 0


RECONSTRUCT = Command("encode and decode images; grid and PSNR/SSIM table", _options, _reconstruct)
