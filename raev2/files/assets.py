"""Weights that a run reads and no package brings: are they here, where do they belong, how do they come here.

asset = Asset("encoder dinov2-b", "timm/vit_base_patch14_reg4_dinov2.lvd142m")
asset.fault()                          # 'missing', 'damaged' or None; looks at this machine alone
asset.fetch()
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from raev2.errors import CheckpointError
from raev2.files.damage import read_json
from raev2.files.hashes import file_sha256

MISSING: Literal["missing"] = "missing"
TORCH = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Asset:
    """Weights by their source, which is one of three.

    a repository of the Hugging Face hub    OWNER/NAME or OWNER/NAME@REVISION; only `files` of it are read
    a file at https://.../NAME-HASH.SUFFIX  belongs into torch's cache; HASH begins its SHA-256
    a local folder or file                  nothing is downloaded

    what       for people: 'encoder dinov2-b'
    subfolder  of the repository
    gated      a licence must be accepted at the source
    note       what to say besides where to get it: the licence, what to use in its place
    without    what is done without it; empty: it is needed
    package    distribution that reads it, if it is an optional one
    """

    what: str
    source: str
    subfolder: str = ""
    files: tuple[str, ...] = ("*.json", "*.safetensors")
    gated: bool = False
    note: str = ""
    without: str = ""
    package: str = ""

    @property
    def url(self) -> str:
        """Where it comes from; empty for a path."""
        is_id = self.source.count("/") == 1 and self.source[0] not in "./" and not Path(self.source).exists()
        return f"https://huggingface.co/{self._repository[0]}" if is_id else self.source if self._hash else ""

    @property
    def place(self) -> Path:
        """The file or folder that a copy of another machine goes to."""
        if self._hash:
            import torch

            return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.source).name
        in_hub = Path(constants.HF_HUB_CACHE) / f"models--{self._repository[0].replace('/', '--')}"
        return in_hub if self.url else Path(self.source)

    def folder(self) -> Path | None:
        """The file, or the folder with the files, on this machine; None: not here."""
        if self._hash or not self.url:
            return self.place if self.place.exists() else None
        name, revision = self._repository
        try:
            found = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):  # the latter for a name that cannot be
            return None
        return Path(found) / self.subfolder

    def fault(self) -> str | None:
        """'missing' or 'damaged' as far as this machine knows without reading networks; None: it is whole."""
        found = self.folder()
        if found is None:
            return MISSING
        if found.is_file():
            return "damaged" if self._hash and not file_sha256(found).startswith(self._hash) else None
        files = set(found.glob("*.safetensors"))
        for index in found.glob("*.safetensors.index.json"):
            files |= {found / name for name in read_json(index).get("weight_map", {}).values()}
        return None if files and all(file.is_file() for file in files) else MISSING

    def check(self) -> None:
        """Raise CheckpointError if it is not here and cannot be downloaded, as far as this machine knows."""
        if self.fault() is None:
            return
        if not self.url:
            raise self.error("not a path on this machine")
        if constants.HF_HUB_OFFLINE:
            raise self.error("HF_HUB_OFFLINE=1, nothing is downloaded")
        if self.gated and huggingface_hub.get_token() is None:
            raise self.error("no login for a gated model")

    def fetch(self) -> None:
        """Download what is missing or damaged. Raises CheckpointError, which says how to bring it here by hand."""
        self.check()
        try:
            if self.fault():
                self._download()
        except Exception as error:  # network, access and file errors of several libraries
            raise self.error(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}") from error

    def error(self, got: str | None = None) -> CheckpointError:
        """That it is not here, and how to bring it."""
        how = f"It comes from {self.url}; without network copy that folder from a machine that has it"
        if self._hash:
            how = f"Download {self.source} and put it there (SHA-256 begins with {self._hash})"
        hint = "".join(f"{text}. " for text in (how if self.url else "Copy it there, or correct the name", self.note))
        what = f"the weights are {self.fault() or MISSING}"
        return CheckpointError(self.what, what, got=got, expected=str(self.place), hint=hint.rstrip(". ") + ".")

    def _download(self) -> None:
        if self._hash:
            import torch

            self.place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.source, str(self.place), hash_prefix=self._hash)
            return
        (name, revision), folder = self._repository, self.subfolder and f"{self.subfolder}/"
        huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[folder + file for file in self.files]
        )

    @property
    def _hash(self) -> str:
        return Path(self.source).stem.rpartition("-")[2] if self.source.startswith("https://") else ""

    @property
    def _repository(self) -> tuple[str, str | None]:
        name, _, revision = self.source.partition("@")
        return name, revision or None


LPIPS_WEIGHTS = {
    "vgg": Asset("LPIPS (VGG)", f"{TORCH}vgg16-397923af.pth"),
    "alex": Asset("LPIPS (AlexNet)", f"{TORCH}alexnet-owt-7be5be79.pth"),
}
INCEPTION_WEIGHTS = Asset(
    "Inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    package="torch-fidelity",
)
