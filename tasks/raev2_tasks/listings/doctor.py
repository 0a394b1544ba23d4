"""What `raev2 doctor` prints about this machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from raev2.files.assets import INCEPTION_WEIGHTS, LPIPS_WEIGHTS
from raev2.tokenizer.encoder_table import encoder_asset
from raev2.training.run import package_versions


def machine() -> list[tuple[str, str]]:
    """(what, state) of versions, devices, optional parts and weights."""
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, _state(name, needed)) for name, needed in {**dict.fromkeys(package_versions()), **_needs()}.items()]
    rows += [("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()}"), *_devices()]
    for extra, names in _faults_of_extras().items():
        faults = f"missing or too old: {', '.join(names)}. pip install -U 'raev2[{extra}]'"
        rows.append((f"extra {extra}", faults if names else "ok"))
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


def _needs(extra: str = "") -> dict[str, SpecifierSet]:
    """Versions that this package needs, or one of its optional parts adds, by distribution."""
    found = [need for need in map(Requirement, metadata.requires("raev2") or []) if bool(extra) == bool(need.marker)]
    return {need.name: need.specifier for need in found if not need.marker or need.marker.evaluate({"extra": extra})}


def _state(name: str, needed: SpecifierSet | None) -> str:
    """The installed version of a distribution, and what is wrong with it."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed" if needed is None else f"not installed: pip install '{name}{needed}'"
    fits = needed is None or needed.contains(version, prereleases=True)
    return version if fits else f"{version}, but raev2 needs {needed}: pip install '{name}{needed}'"


def _faults_of_extras() -> dict[str, list[str]]:
    """Packages that are not installed or too old, by optional part of this package."""
    names = [name for name in metadata.metadata("raev2").get_all("Provides-Extra") or [] if name != "dev"]
    return {
        extra: [name for name, needed in _needs(extra).items() if "pip install" in _state(name, needed)]
        for extra in names
    }


def _has_fast_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
