"""Discriminator heads of RAE and RAEv2 in and out.

They keep spectral normalisation as `weight_orig`, `weight_u`, `weight_v` (hooks), we as a parametrisation. The frozen
trunk is in neither. The released discriminators have five heads, of which the first reads the last block a second
time: `AdversarialSpec(layers=(11, 2, 5, 8, 11))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raev2.errors import CheckpointError
from raev2.interop.convert import Conversion, Names, export, unwrap
from raev2.tokenizer.discriminator import Discriminator

SPECTRAL = {
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}


def import_discriminator(state_dict: Mapping[str, Any], discriminator: Discriminator) -> Discriminator:
    """Load reference heads into a discriminator; raises CheckpointError unless every tensor finds its place.

    state_dict   heads, or a stage-1 training checkpoint with them under "disc"
    """
    inner = state_dict.get("disc", state_dict)
    if not isinstance(inner, Mapping):
        raise CheckpointError("discriminator", "no heads under 'disc'", got=type(inner).__name__)
    conversion = Conversion(discriminator.heads, unwrap(inner), _reference_names(discriminator))
    conversion.check("discriminator weights")
    conversion.load()
    return discriminator


def export_discriminator(discriminator: Discriminator) -> dict[str, Tensor]:
    """The heads in the reference's layout: the inverse of `import_discriminator`."""
    return export(discriminator.heads, _reference_names(discriminator))


def _reference_names(discriminator: Discriminator) -> Names:
    names = {}
    for ours in discriminator.heads.state_dict():
        theirs = ours
        for part in SPECTRAL:
            theirs = theirs.replace(part, SPECTRAL[part])
        names[ours] = [f"heads.{theirs}"]
    return names
