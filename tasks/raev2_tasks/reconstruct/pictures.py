"""Picture files after encoding and decoding, with their scores: what `raev2 reconstruct` writes."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raev2.data import to_float, to_uint8
from raev2.errors import DataError
from raev2.eval.image_pairs import build_pair_distance, lpips_available, psnr, ssim
from raev2.files.artefact import write_json
from raev2.files.grid import save_pairs
from raev2.files.images import centre_crop, read_rgb
from raev2.files.picture_folder import image_files, text_of
from raev2.files.replace import RECONSTRUCTIONS, new_folder
from raev2.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)
GRID_PAIRS = 64
NAME_LENGTH = 80  # of a picture; file systems end at 255 bytes


@dataclass(frozen=True)
class Reconstruction:
    """Numbers of one image; `distance_name` says which perceptual distance this machine could compute."""

    file: str
    picture: str
    psnr: float
    ssim: float
    distance: float
    distance_name: str


def reconstruct_pictures(
    rae: Tokenizer, device: torch.device, paths: Sequence[Path], out: Path
) -> tuple[list[Reconstruction], dict[str, str]]:
    """Encode and decode picture files; returns their numbers, and the files that could not be read with the reason.

    Writes one PNG per picture, named by its place in the list and its file, `grid.png`, originals above their
    reconstructions, and the numbers as `table.json` and `table.csv`.

    Raises DataError when there is no picture, or none that can be read.
    """
    name = "lpips_vgg" if lpips_available("vgg") else "feature_distance_micro"
    distance = build_pair_distance(name, device)
    rows: list[Reconstruction] = []
    failed: dict[str, str] = {}
    pairs: list[Tensor] = []
    files = image_files(paths)
    digits = max(5, len(str(len(files))))  # so that the order of names is that of the inputs
    with new_folder(out, RECONSTRUCTIONS) as folder:
        for number, file in enumerate(files):
            try:
                original = read_image(file, rae.spec.image_size)[None]
            except DataError as error:
                logger.warning("left out: %s", error)
                failed[str(file)] = str(error)
                continue
            decoded = to_uint8(rae.reconstruct(to_float(original.to(device)))).cpu()
            values = [float(score(decoded, original)) for score in (psnr, ssim, distance)]
            picture = f"{number:0{digits}d}-{text_of(file.stem)[:NAME_LENGTH]}.png"
            rows.append(Reconstruction(text_of(str(file)), picture, values[0], values[1], values[2], name))
            Image.fromarray(decoded[0].permute(1, 2, 0).numpy()).save(folder / picture)
            if len(pairs) < GRID_PAIRS:
                pairs.append(torch.cat([original, decoded]))
        if not rows:
            where = ", ".join(map(str, paths))
            raise DataError(where, f"none of {len(failed)} pictures can be read", got=next(iter(failed.values())))
        originals, decoded = torch.stack(pairs).unbind(1)
        save_pairs(originals, decoded, folder / "grid.png")
        _write_table(folder, rows, failed)
    return rows, failed


def _write_table(folder: Path, rows: Sequence[Reconstruction], failed: dict[str, str]) -> None:
    """The numbers, once for programs and once for spreadsheets."""
    table = [asdict(row) for row in rows]
    left_out = [{"file": text_of(file), "error": text_of(error)} for file, error in failed.items()]
    write_json(folder / "table.json", {"format_version": 1, "rows": table, "failed": left_out})
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, table[0])
        writer.writeheader()
        writer.writerows(table)


def read_image(file: Path, size: tuple[int, int]) -> Tensor:
    """One image file as uint8 (3, H_px, W_px), resized to cover `size` and centre-cropped."""
    rgb = centre_crop(read_rgb(file, str(file)), size)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
