"""Statistics of reference pictures that other people publish, read from their files. Read `read_reference` first.

A reference of generation is a mean and a covariance. A reference of reconstruction is the originals themselves, one
for each picture. They are never interchanged: FID to training statistics and rFID are different numbers.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from raev2.errors import DataError
from raev2.eval.distances import Gaussian, Moments
from raev2.files.hashes import file_sha256

PICTURES = "arr_0"
# Output of a network -> names of its mean and covariance in files of ADM, clean-fid and torch-fidelity, and of JiT.
NAMES = {"": (("mu", "sigma"), ("ref_mu", "ref_sigma")), "spatial": (("mu_s", "sigma_s"),)}
STATISTICS = {name for pairs in NAMES.values() for pair in pairs for name in pair}
FORMATS = {".npz": "an archive of numpy", ".pt": "statistics of torch-fidelity", ".safetensors": "features of ours"}
REBUILD = np.zeros(0).__reduce__()[0]  # how arrays come out of a file, whatever numpy calls its module
NUMPY: list[Any] = [REBUILD, (REBUILD, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, codecs.encode]
NUMPY += [np.dtypes.Float32DType, np.dtypes.Float64DType]


@dataclass(frozen=True)
class Reference:
    """A stored reference of generation.

    statistics    by output of the feature network: '' its features, 'spatial' those of sFID
    has_pictures  whether `arr_0` holds pictures, for precision, recall and KID
    rows          features of some of the pictures, in a file of ours
    """

    file: Path
    sha256: str
    statistics: Mapping[str, Gaussian]
    has_pictures: bool = False
    rows: Tensor | None = None

    def of_space(self, space: str, dim: int, output: str = "") -> Gaussian | None:
        """Statistics of an output with `dim` features; None where the file has none for it."""
        found = self.statistics.get(output)
        if found is not None and len(found.mean) != dim:
            raise DataError(
                f"reference {self.file}", "made in another feature space", got=f"{len(found.mean):,} features",
                expected=f"{dim:,}, as '{space}' has", hint="Choose the file that was made in this space.",
            )  # fmt: skip
        return found

    def identity(self) -> dict[str, Any]:
        """What a result file says about it."""
        return {"file": self.file.name, "sha256": self.sha256, "num_images": self.statistics[""].count}


def read_reference(file: Path) -> Reference:
    """Statistics in a file of ADM, JiT or clean-fid (.npz), of torch-fidelity (.pt) or of ours (.safetensors).

    Nothing in the file is executed. Raises DataError for originals without statistics and for damaged statistics.
    """
    arrays = _arrays(file)
    found = {output: _gaussian(file, arrays, pairs) for output, pairs in NAMES.items()}
    statistics = {output: gaussian for output, gaussian in found.items() if gaussian is not None}
    if "" not in statistics:
        pictures = ": pictures alone are a reference of reconstruction" if PICTURES in arrays else ""
        raise DataError(
            f"reference {file}", f"holds no statistics{pictures}", got=", ".join(arrays) or "nothing",
            expected="mu and sigma", hint="`raev2 eval reference build` makes them from pictures.",
        )  # fmt: skip
    return Reference(file, file_sha256(file), statistics, PICTURES in arrays, arrays.get("rows"))


def check_originals(file: Path) -> None:
    """Raise DataError where the reference given to a reconstruction is one of generation."""
    if file.suffix in FORMATS and (own := sorted(STATISTICS & _arrays(file).keys())):
        raise DataError(
            f"reference {file}", "statistics are a reference of generation, not of reconstruction",
            got=", ".join(own), expected=f"the originals: a folder, or an .npz file with {PICTURES} alone",
        )  # fmt: skip


def _arrays(file: Path) -> dict[str, Any]:
    """What is in a file by name; None for arrays that are no statistics."""
    if file.suffix not in FORMATS:
        raise DataError(
            f"reference {file}", "not one of the formats that run nothing when they are read", got=repr(file.suffix),
            expected=", ".join(FORMATS),
            hint="Where you trust a pickle, load it and np.savez('reference.npz', mu=mu, sigma=sigma).",
        )  # fmt: skip
    try:
        if file.suffix == ".npz":
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
                return {name: archive[name] if name in STATISTICS else None for name in archive.files}
        if file.suffix == ".pt":
            with torch.serialization.safe_globals(NUMPY):
                return dict(torch.load(file, weights_only=True))
        tensors = load_file(file)
        moments = Moments.from_tensors(tensors)
        return {"mu": moments.mean, "sigma": moments.cov, "count": moments.count, "rows": tensors.get("rows")}
    except Exception as error:  # of the file system, numpy, zipfile, pickle, torch and safetensors
        what, expected = str(error).split("\n")[0], FORMATS[file.suffix]
        raise DataError(f"reference {file}", "cannot be read", got=what, expected=expected) from error


def _gaussian(file: Path, arrays: Mapping[str, Any], pairs: tuple[tuple[str, str], ...]) -> Gaussian | None:
    """The statistics with the first of these names that the file has."""
    names = next((pair for pair in pairs if arrays.keys() & {*pair}), None)
    if names is None:
        return None
    where = f"reference {file}"
    if missing := [name for name in names if name not in arrays]:
        raise DataError(where, "half of the statistics are missing", got=", ".join(arrays), expected=missing[0])
    mean, cov = (torch.as_tensor(arrays[name]) for name in names)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not cov.is_floating_point():
        raise DataError(
            where, f"{' and '.join(names)} are not a mean and a covariance",
            got=f"shapes {tuple(mean.shape)} and {tuple(cov.shape)}", expected="(D,) and (D, D)",
        )  # fmt: skip
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise DataError(where, f"{' or '.join(names)} is not finite", hint="The file is broken; fetch it again.")
    return Gaussian(mean.double(), cov.double(), arrays.get("count"))
