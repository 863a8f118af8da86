"""What is wrong with a setting, said in one line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from default_moe.errors import ConfigError


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")


def check_at_least(name: str, value: float, least: float) -> None:
    check(value >= least, f"{name} is {value}, but must be at least {least}")


def check_fraction(name: str, value: float) -> None:
    check(0 <= value <= 1, f"{name} is {value}, but must lie in [0, 1]")


def closest(name: str, known: list[str]) -> str:
    """'; did you mean ...?' with the known name closest to `name`, or an empty string if none is close."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_keys(mapping: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for key in mapping:
        check(key in known, f"there is no setting {prefix + key!r}{closest(key, known)}")


def optional_type(annotation: Any) -> type | None:
    """int for `int | None`; None for any other annotation."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    return next(t for t in kinds if t is not type(None)) if type(None) in kinds else None


def section_from_mapping(section: type, name: str, mapping: Mapping[str, Any]) -> Any:
    """The dataclass `section`, called `name` in messages, of a mapping of its fields. Raises ConfigError."""
    check(isinstance(mapping, Mapping), f"{name} is {mapping!r}, but must be a group of settings")
    fields = {f.name: f for f in dataclasses.fields(section)}
    check_keys(mapping, list(fields), prefix=f"{name}.")
    values = {}
    for key, value in mapping.items():
        optional = optional_type(fields[key].type)
        wanted = optional or fields[key].type
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(wanted, type) and not (optional and value is None):
            check(
                isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)),
                f"{name}.{key} is {value!r}, but must be of type {wanted.__name__}",
            )
        values[key] = value
    return section(**values)
