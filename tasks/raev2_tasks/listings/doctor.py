"""What `raev2 doctor` prints about this machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch
from packaging.requirements import Requirement

from raev2.files.assets import INCEPTION_WEIGHTS, LPIPS_WEIGHTS
from raev2.tokenizer.encoder_table import encoder_asset
from raev2.training.run import package_versions


def machine() -> list[tuple[str, str]]:
    """(what, state) of versions, devices, optional parts and weights."""
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, version or "not installed") for name, version in package_versions().items()]
    rows += [("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()}"), *_devices()]
    for extra, missing in _missing_of_extras().items():
        names = ", ".join(missing)
        rows.append((f"extra {extra}", f"missing {names}: pip install 'raev2[{extra}]'" if missing else "ok"))
    assets = [encoder_asset("micro"), *LPIPS_WEIGHTS.values(), INCEPTION_WEIGHTS]
    return [*rows, *((asset.what, "ok" if asset.fault() is None else str(asset.error())) for asset in assets)]


def _devices() -> list[tuple[str, str]]:
    rows = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "none; runs on the CPU"))
    return [*rows, ("bf16", "fast" if _has_fast_bf16() else "emulated: use --set precision=fp32")]


def _missing_of_extras() -> dict[str, list[str]]:
    """Packages that are not installed, by optional part of this package."""
    names = metadata.metadata("raev2").get_all("Provides-Extra") or []
    missing: dict[str, list[str]] = {name: [] for name in names if name != "dev"}
    for requirement in map(Requirement, metadata.requires("raev2") or []):
        for extra, packages in missing.items():
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                try:
                    metadata.version(requirement.name)
                except metadata.PackageNotFoundError:
                    packages.append(requirement.name)
    return missing


def _has_fast_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
