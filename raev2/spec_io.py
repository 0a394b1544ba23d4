"""Load, override, write and compare run specs; every pydantic error becomes one line in our form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raev2.errors import CheckpointError, RaeError, SpecError, did_you_mean
from raev2.files.damage import damaged
from raev2.files.hashes import json_sha256
from raev2.files.replace import write_text
from raev2.files.spec_base import FILE, Spec
from raev2.spec import RunSpec
from raev2.task import get_task

AnySpec = TypeVar("AnySpec", bound=Spec)

# Fields that change what a run shows or how fast it goes, never its numbers. A resumed run may differ in them.
FREE_FIELDS = (
    "summary", "cost", "data.num_workers", "data.cache",
    *(f"{loop}.{field}" for loop in ("tokenizer_training", "generator_training")
      for field in ("log_every_steps", "sample_every_images", "save_every_images", "keep_checkpoints")),
    "generator_training.eval_every_images", "generator_training.latent_cache", "generator_training.keep_best",
    "generator_training.latents", "sampling", "evaluation", "parallel", "tracker",
)  # fmt: skip


def spec_from_dict(values: Mapping[str, Any], context: str | None = None) -> RunSpec:
    """Validate a nested mapping; the task's own fields are checked by the task that `task.name` names."""
    values = dict(values)
    task_values = values.get("task")
    if not isinstance(task_values, Mapping) or "name" not in task_values:
        raise SpecError("spec.task", "a run spec names its task", got=task_values, expected="a mapping with 'name'")
    task = get_task(str(task_values["name"]))
    values["task"] = validated(task.spec_type, dict(task_values), "spec.task.", context=context)
    return validated(RunSpec, values, context=context)


def spec_to_dict(spec: RunSpec) -> dict[str, Any]:
    """Plain JSON types, every default written out."""
    return spec.model_dump(mode="json")


def load_spec(file: str | Path) -> RunSpec:
    """Read `spec.yaml` of a run folder."""
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(str(file), "no spec here", expected="spec.yaml of a run folder")
    values = read_yaml(file, "the mapping of a run spec")
    values.pop("fingerprint", None)
    return spec_from_dict(values, FILE)


def read_yaml(file: Path, expected: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; `expected` says what it should be."""
    try:
        with damaged(file):
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(str(file), "not readable as YAML", got=str(error)) from error
    if not isinstance(values, dict):
        raise CheckpointError(str(file), "damaged", got=type(values).__name__, expected=expected)
    return values


def save_spec(spec: RunSpec, file: str | Path) -> None:
    """Write the resolved spec with its fingerprint."""
    values = {"fingerprint": fingerprint(spec), **spec_to_dict(spec)}
    write_text(Path(file), yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def fingerprint(spec: RunSpec) -> str:
    """Hash of everything that a run's numbers depend on (12 hex digits)."""
    return json_sha256(_bound(_without_added(spec, spec_to_dict(spec))))[:12]


def _without_added(spec: Spec, values: dict[str, Any]) -> dict[str, Any]:
    """`values` as the code before a spec's `added` fields wrote them."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if name in spec.added and value == spec.added[name]:
            del values[name]
        elif isinstance(value, Spec):
            _without_added(value, values[name])
    return values


def spec_differences(old: RunSpec, new: RunSpec) -> list[str]:
    """'path old -> new' for every field that changes the numbers of a run."""
    old_leaves, new_leaves = (dict(_leaves(_bound(spec_to_dict(spec)))) for spec in (old, new))
    return [
        f"{path} {old_leaves.get(path)} -> {new_leaves.get(path)}"
        for path in {**old_leaves, **new_leaves}
        if old_leaves.get(path) != new_leaves.get(path)
    ]


def spec_values(spec: RunSpec) -> list[str]:
    """Every text in a spec; those that are paths are what the run reads."""
    found: set[str] = set()
    rest: list[Any] = [spec_to_dict(spec)]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict | list):
            rest.extend(value.values() if isinstance(value, dict) else value)
    return sorted(found)


def apply_overrides(spec: RunSpec, overrides: Sequence[str]) -> RunSpec:
    """Apply `path.to.field=value` settings; values are YAML. Setting a `kind` starts that choice from its defaults."""
    return spec_from_dict(override_values(spec_to_dict(spec), overrides))


def override_spec(spec: AnySpec, overrides: Sequence[str]) -> AnySpec:
    """`apply_overrides` for a spec that is not a whole run, such as the settings of a command."""
    return validated(type(spec), override_values(spec.model_dump(mode="json"), overrides))


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `path.to.field=value` settings to a nested mapping in place; nothing is validated."""
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise SpecError("--set", "cannot be read", got=repr(override), expected="path.to.field=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError("--set", "the value is not YAML", got=repr(override), hint=str(error)) from None
        *parents, last = path.split(".")
        node = values
        for parent in parents:
            if node.get(parent) is None:  # a part that is off, or an unknown one: validation tells
                node[parent] = {}
            if not isinstance(node[parent], dict):
                raise SpecError(f"spec.{path}", f"{parent} has no fields", got=repr(node[parent]))
            node = node[parent]
        if last == "kind" and node.get("kind") != value:
            node.clear()
        node[last] = value
    return values


def validated(
    model: type[AnySpec],
    values: Any,
    prefix: str = "spec.",
    error: type[RaeError] = SpecError,
    context: str | None = None,
) -> AnySpec:
    """`values` as a spec; the first thing that is wrong with them is an error at `prefix` and the path of the field."""
    try:
        return model.model_validate(values, context=context)
    except ValidationError as problem:
        first, *others = problem.errors()
    path, known = _place(model, first["loc"])
    where = f"{prefix}{'.'.join(path)}".rstrip(". ")
    more = f" ({len(others)} more error{'s' if len(others) > 1 else ''})" if others else ""
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(path[-1], known) or (f"Known: {', '.join(known)}." if known else "")
        raise error(where, "unknown field", hint=hint + more)
    if first["type"] == "value_error":
        raise error(where, str(first["ctx"]["error"]) + more)
    if first["type"] == "missing":
        raise error(where, "missing field", expected="a value" + more)
    message = first["msg"]
    raise error(where, "not valid", got=repr(first["input"]), expected=message[:1].lower() + message[1:] + more)


def _place(model: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """Path of an error as users write it, and the names of the fields beside it, from the JSON schema.

    pydantic puts the chosen kind of a union into the path, which is left out.
    """
    schema = model.model_json_schema()

    def options(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return options(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
        several = node.get("oneOf") or node.get("anyOf") or node.get("allOf") or []
        return [found for option in several for found in options(option)] or [node]

    path: list[str] = []
    nodes = beside = options(schema)
    for part in map(str, loc):
        chosen = [node for node in nodes if node.get("properties", {}).get("kind", {}).get("const") == part]
        if not chosen:
            path.append(part)
            beside = nodes
            chosen = [sub for node in nodes for sub in options(node.get("properties", {}).get(part, {}))]
        nodes = chosen
    return path, sorted({name for node in beside for name in node.get("properties", {})})


def _bound(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is left without `FREE_FIELDS`; a free part takes all that lies in it with it."""
    return {
        name: _bound(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if f"{prefix}{name}" not in FREE_FIELDS
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
