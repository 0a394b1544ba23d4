"""Weights that a run reads and no package brings: are they here, where do they belong, how do they come here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from raev2.errors import CheckpointError, DataError
from raev2.files.damage import read_json
from raev2.files.hashes import file_sha256

MISSING, DAMAGED = "missing", "damaged"
WAYS_OUT = {
    "GatedRepoError": "Accept its terms there, then log in with `hf auth login`. ",
    "RepositoryNotFoundError": "Check the name; for a private one log in with `hf auth login`. ",
}
TORCH = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Asset:
    """Weights by name for people and source: OWNER/NAME[@REVISION] of the hub, https://.../NAME-SHA256.pth, or a path.

    files      those of a repository that are read
    note       what to say besides where to get it: the licence, what to use in its place
    without    what is done without it; empty: it is needed
    package    distribution that reads it, if it is an optional one
    """

    what: str
    source: str
    files: tuple[str, ...] = ("*.json", "*.safetensors")
    gated: bool = False
    note: str = ""
    without: str = ""
    package: str = ""

    @property
    def sha256(self) -> str:
        """The beginning of the SHA-256 of a file that torch caches; else empty."""
        return Path(self.source).stem.rpartition("-")[2] if self.source.startswith("https://") else ""

    @property
    def url(self) -> str:
        """Where it comes from; empty for a path."""
        is_id = self.source.count("/") == 1 and self.source[0] not in "./" and not Path(self.source).exists()
        return f"https://huggingface.co/{self.source.partition('@')[0]}" if is_id else self.source * bool(self.sha256)

    @property
    def place(self) -> Path:
        """The file or folder that a copy of another machine goes to."""
        if self.sha256:
            import torch

            return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.source).name
        in_hub = f"models--{self.source.partition('@')[0].replace('/', '--')}"
        return Path(constants.HF_HUB_CACHE) / in_hub if self.url else Path(self.source)

    def folder(self) -> Path | None:
        """The file, or the folder with the files, on this machine; None: not here."""
        if self.sha256 or not self.url:
            return self.place if self.place.exists() else None
        try:
            return self._snapshot(local_files_only=True)
        except (FileNotFoundError, ValueError):  # the latter for a name that cannot be
            return None

    @property
    def commit(self) -> str:
        """The commit of the copy of a hub repository on this machine; empty: no copy, or not of the hub."""
        folder = None if self.sha256 or not self.url else self.folder()
        return folder.name if folder else ""

    def fault(self) -> str | None:
        """'missing' or 'damaged', told without reading networks; None: it is whole."""
        found = self.folder()
        if found is not None and found.is_file():
            return DAMAGED if self.sha256 and not file_sha256(found).startswith(self.sha256) else None
        files = {file for pattern in self.files for file in found.glob(pattern)} if found else set()
        for index in [file for file in files if file.name.endswith(".safetensors.index.json")]:
            files |= {index.with_name(name) for name in read_json(index).get("weight_map", {}).values()}
        weights = [file for file in files if file.suffix == ".safetensors"]
        if not weights or not all(file.is_file() for file in files):
            return MISSING
        return None if all(map(_as_long_as_its_header_says, weights)) else DAMAGED

    def barred(self) -> str:
        """Why it cannot be downloaded, as far as this machine knows; empty: nothing speaks against it."""
        if not self.url:
            return "not a path on this machine" if self.folder() is None else "no whole safetensors file in it"
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE=1, nothing is downloaded"
        return "no login for a gated model" if self.gated and huggingface_hub.get_token() is None else ""

    def fetch(self) -> None:
        """Download what is missing or damaged. Raises CheckpointError, which says how to bring it here by hand."""
        if (fault := self.fault()) and (barred := self.barred()):
            raise self.error(barred)
        if fault:
            self.download(again=fault == DAMAGED)

    def download(self, again: bool = False, **hub: Any) -> Path:
        """The file or folder, got from its source even if an older one is here; `again`: even if the same one is.

        hub   revision, token or local_files_only, as huggingface_hub takes them
        """
        try:
            if not self.sha256:
                return self._snapshot(allow_patterns=list(self.files), force_download=again, **hub)
            import torch

            self.place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.source, str(self.place), hash_prefix=self.sha256)
            return self.place
        except Exception as error:  # network, access and file errors of several libraries
            raise self.error(error) from error

    def error(self, got: str | Exception | None = None) -> CheckpointError:
        """That it is not here or cannot be loaded, and how to bring it."""
        how = f"It comes from {self.url}; without network copy it from a machine that has it" if self.url else ""
        how += f" (SHA-256 begins with {self.sha256})" if self.sha256 else ""
        hint = f"{how or 'Copy it there, or correct the name'}. {self.note and self.note + '.'}".strip()
        fault = self.fault()
        what = f"the weights are {fault}" if fault else "the weights cannot be loaded"
        if isinstance(got, Exception):
            hint = f"{WAYS_OUT.get(type(got).__name__, '')}{hint}"
            got = f"{type(got).__name__}: {(str(got).strip().splitlines() or [''])[0][:200]}"
        return CheckpointError(self.what, what, got=got, expected=str(self.place), hint=hint)

    def _snapshot(self, **options: Any) -> Path:
        name, _, revision = self.source.partition("@")
        return Path(huggingface_hub.snapshot_download(name, **{"revision": revision or None, **options}))


LPIPS_WEIGHTS = {
    "vgg": Asset("LPIPS (VGG)", f"{TORCH}vgg16-397923af.pth"),
    "alex": Asset("LPIPS (AlexNet)", f"{TORCH}alexnet-owt-7be5be79.pth"),
}
INCEPTION_WEIGHTS = Asset(
    "Inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    package="torch-fidelity",
)


def _as_long_as_its_header_says(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def need_package(where: str, package: str) -> None:
    """Raise DataError unless a distribution is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        hint = f"Run `pip install {package}`."
        raise DataError(where, f"the package {package} is not installed", hint=hint) from None
