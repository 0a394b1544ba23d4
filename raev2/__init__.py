"""raev2: generative modelling in the latent space of frozen vision encoders.

The public names load on first use, so that importing the package is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "RAE": "raev2.tokenizer.rae", "Generator": "raev2.model.generator", "Pipeline": "raev2.model.repository",
    "sample": "raev2.sampler",
}  # fmt: skip
__all__ = ["RAE", "Generator", "Pipeline", "__version__", "sample"]

if TYPE_CHECKING:
    from raev2.model.generator import Generator
    from raev2.model.repository import Pipeline
    from raev2.sampler import sample
    from raev2.tokenizer.rae import RAE


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'raev2' has no attribute {name!r}")
