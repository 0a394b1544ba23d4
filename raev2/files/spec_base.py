"""What every spec is: a frozen pydantic model that knows which of its fields older files lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

AnySpec = TypeVar("AnySpec", bound="Spec")
FILE = "file"  # context of validation: fields may be missing because the file is older than they are


class Spec(BaseModel):
    """Base of every spec: frozen, and a misspelt field is an error.

    added   fields that are younger than runs of others, with what the code did before: files without them mean this,
            and with this value they are no part of the fingerprint
    """

    added: ClassVar[Mapping[str, Any]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_a_file(cls, values: Any, info: Any) -> Any:
        """With the context FILE: what a file that is older than a field means."""
        return {**cls.added, **values} if info.context == FILE and isinstance(values, Mapping) else values

    def replace(self: AnySpec, **changes: Any) -> AnySpec:
        """Copy with some fields changed, validated again (pydantic's own copy is not)."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**fields, **changes})
