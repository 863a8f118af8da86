"""Settings from nested mappings, and what is wrong with them said in one line."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from default_moe.errors import ConfigError, check, closest, quoted

# What may be done with a setting, as metadata of its field; on a field of `Config` it counts for the whole group.
MAY_CHANGE = {"may change": True}  # in a run that continues: the model's function, the data and its order stay the same
NO_EFFECT = {"no effect": True}  # on what a run computes
TUNED = {"tuned": True}  # a comparison may give each method its own best value


def check_keys(mapping: Mapping[str, Any], known: list[str], prefix: str) -> None:
    names = f"{prefix}* are " if prefix else "there are "
    group = f" ({names}{', '.join(known)})" if known else ""
    for key in mapping:
        if key not in known:  # to look for the closest one takes long
            raise ConfigError(f"there is no setting {quoted(f'{prefix}{key}')}{closest(str(key), known)}{group}")


def section_from_mapping(section: Any, name: str, mapping: Mapping[str, Any]) -> Any:
    """The dataclass `section` from a mapping of its fields, also of nested ones. Raises ConfigError.

    name: of the section in messages; empty for all settings.
    """
    check(isinstance(mapping, Mapping), f"{name or 'the config'} is {quoted(mapping)}, but must be a group of settings")
    prefix = f"{name}." if name else ""
    fields = {f.name: f for f in dataclasses.fields(section)}
    check_keys(mapping, list(fields), prefix)
    values = {}
    for key, value in mapping.items():
        group: Any = fields[key].type
        if dataclasses.is_dataclass(group):
            own = getattr(group, "from_mapping", None)
            value = own(value) if own else section_from_mapping(group, prefix + key, value)
        values[key] = value
    return section(**values)


def dtype_name(value: Any) -> Any:
    """The name of a NumPy or JAX type; anything else as it is."""
    return jnp.dtype(value).name if isinstance(value, type | jnp.dtype) else value


def flat_items(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('model.d_model', 128), ... of a nested mapping."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
