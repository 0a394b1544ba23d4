"""Pickle files of other projects, read without running what is in them.

A pickle is a program. Here it may build lists, tuples, dictionaries, numbers, texts and NumPy arrays, and nothing else.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from raev2.errors import DataError

_ARRAYS = {
    (f"{module}.{part}", name)
    for module in ("numpy.core", "numpy._core")
    for part, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}
ALLOWED = _ARRAYS | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if module.startswith("numpy.core"):  # moved in NumPy 2
            try:
                return super().find_class(module.replace("numpy.core", "numpy._core"), name)
            except ModuleNotFoundError:
                return super().find_class(module, name)
        return super().find_class(module, name)


def load_pickle(path: str | Path) -> Any:
    """The value of a pickle file; DataError when it is damaged or asks for more than plain values and arrays."""
    where = f"data {path}"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(where, "cannot be read", got=error.strerror) from error
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle can fail in any way
        raise DataError(
            where, "not loaded, only plain values and arrays are", got=f"{type(error).__name__}: {error}",
            hint="If you trust the file, convert it yourself.",
        ) from error  # fmt: skip
