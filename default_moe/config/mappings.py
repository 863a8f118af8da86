"""Settings from nested mappings, and what is wrong with them said in one line."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from default_moe.errors import check, check_choice, closest

# What may be done with a setting, as metadata of its field; on a field of `Config` it counts for the whole group.
MAY_CHANGE = {"may change": True}  # in a run that continues: the model's function, the data and its order stay the same
NO_EFFECT = {"no effect": True}  # on what a run computes
TUNED = {"tuned": True}  # a comparison may give each method its own best value


def check_keys(mapping: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for key in mapping:
        check(key in known, f"there is no setting {prefix + key!r}{closest(key, known)}")


def optional_type(annotation: Any) -> type | None:
    """int for `int | None`; None for any other annotation."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    return next(t for t in kinds if t is not type(None)) if type(None) in kinds else None


def section_from_mapping(section: Any, name: str, mapping: Mapping[str, Any]) -> Any:
    """The dataclass `section` from a mapping of its fields, also of nested ones. Raises ConfigError.

    name: of the section in messages; empty for all settings.
    """
    check(isinstance(mapping, Mapping), f"{name} is {mapping!r}, but must be a group of settings")
    prefix = f"{name}." if name else ""
    fields = {f.name: f for f in dataclasses.fields(section)}
    check_keys(mapping, list(fields), prefix)
    values = {}
    for key, value in mapping.items():
        optional = optional_type(fields[key].type)
        wanted: Any = optional or fields[key].type
        if dataclasses.is_dataclass(wanted):
            own = getattr(wanted, "from_mapping", None)
            value = own(value) if own else section_from_mapping(wanted, prefix + key, value)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(wanted, type) and not (optional and value is None):
            check(
                isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)),
                f"{prefix}{key} is {value!r}, but must be of type {wanted.__name__}",
            )
        values[key] = value
    return section(**values)


def dtype_name(name: str, value: Any) -> str:
    """The name of a compute dtype given as a string or as a NumPy or JAX type."""
    try:
        dtype = jnp.dtype(value).name
    except TypeError:
        dtype = str(value)
    check_choice(name, dtype, ("float32", "bfloat16"))
    return dtype


def flat_items(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('model.d_model', 128), ... of a nested mapping."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
