"""Weights that a run reads and no package brings: are they here, where do they belong, how do they come here.

asset = Asset("encoder dinov2-b", "timm/vit_base_patch14_reg4_dinov2.lvd142m")
asset.fault()                          # 'missing', 'damaged, ...' or None; looks at this machine alone
asset.fetch()
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
        if self._hash:
            return self.source
        is_id = self.source.count("/") == 1 and not self.source.startswith((".", "/", "~"))
        is_path = Path(self.source).expanduser().exists() or not is_id
        return "" if is_path else f"https://huggingface.co/{self._repository[0]}"

    @property
    def place(self) -> Path:
        """The file or folder that a copy of another machine goes to."""
        if self._hash:
            import torch

            return Path(torch.hub.get_dir()) / "checkpoints" / self.source.rpartition("/")[2]
        if not self.url:
            return Path(self.source).expanduser()
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self._repository[0].replace('/', '--')}"

    def folder(self) -> Path | None:
        """The file, or the folder with the files, on this machine; None: not here."""
        if self._hash or not self.url:
            return self.place if self.place.exists() else None
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        name, revision = self._repository
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True)) / self.subfolder
        except (LocalEntryNotFoundError, ValueError):  # the latter for a name that cannot be
            return None

    def fault(self) -> str | None:
        """What is wrong with it on this machine; None: it is whole. Of safetensors files the headers are read."""
        found = self.folder()
        if found is None:
            return MISSING
        if self._hash:
            return None if file_sha256(found).startswith(self._hash) else f"damaged, the SHA-256 is not {self._hash}..."
        return _fault_of_folder(found) if found.is_dir() else None

    def barred(self) -> str:
        """Why it cannot be downloaded, as far as this machine knows; empty: nothing speaks against it."""
        from huggingface_hub import constants, get_token

        if not self.url:
            return "not a path on this machine"
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE=1, nothing is downloaded"
        return "no login for a gated model" if self.gated and get_token() is None else ""

    def fetch(self) -> None:
        """Download it, also over a damaged copy. Raises CheckpointError, which says how to bring it here by hand."""
        fault = self.fault()
        if fault is None:
            return
        if barred := self.barred():
            raise self.error(barred)
        try:
            self._download(again=fault != MISSING)
        except Exception as error:  # network, access and file errors of several libraries
            raise self.error(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}") from error
        if fault := self.fault():
            raise self.error(f"{fault}, after the download")

    def error(self, got: str | None = None) -> CheckpointError:
        """That it is not here, and how to bring it."""
        how = f"It comes from {self.url}; without network copy that folder from a machine that has it"
        if self._hash:
            how = f"Download {self.source} and put it there (SHA-256 begins with {self._hash})"
        if not self.url:
            how = "Copy it there, or correct the name"
        hint = "".join(f"{text}. " for text in (how, self.note) if text).strip()
        what = f"the weights are {self.fault() or MISSING}"
        return CheckpointError(self.what, what, got=got, expected=str(self.place), hint=hint)

    def _download(self, again: bool) -> None:
        if self._hash:
            import torch

            self.place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.source, str(self.place), hash_prefix=self._hash)
            return
        from huggingface_hub import snapshot_download

        name, revision = self._repository
        patterns = [f"{self.subfolder}/{files}".lstrip("/") for files in self.files]
        snapshot_download(name, revision=revision, allow_patterns=patterns, force_download=again)

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


def _fault_of_folder(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    wanted = {file.name for file in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        wanted |= set(read_json(index).get("weight_map", {}).values())
    for name in sorted(wanted):
        try:
            safe_open(folder / name, "numpy").__enter__()
        except (OSError, SafetensorError):
            return f"damaged, {name} is missing or cut short"
    return None if wanted else MISSING
