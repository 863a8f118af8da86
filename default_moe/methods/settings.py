"""What a setting means and may be: its type, and what is in the metadata of its field. Checked here, in one place.

Without a range of its own a number may be anything that 32 bits hold, and a text anything of reasonable length.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from default_moe.errors import check, quoted

_MOST = 2**31 - 1
_LONGEST_TEXT = 2**16

# Tells what a value must do, "be at least 1", or None if it does it.
Rule = Callable[[Any], str | None]


def setting(default: Any, meaning: str, *more: Mapping[str, Any]) -> Any:
    """Return the dataclass field of a setting.

    meaning: for `--help`.  more: a range, made by one of the functions below, and marks (`config/mappings`).
    """
    metadata: dict[str, Any] = {"meaning": meaning}
    for entry in more:
        metadata |= entry
    return dataclasses.field(default=default, metadata=metadata)


def at_least(least: float, most: float = _MOST) -> dict[str, Any]:
    return _rule(lambda value: _bounds(value, least, most, f"be at least {least}"), f"at least {least}")


def positive(most: float = _MOST, least: float = 1e-30) -> dict[str, Any]:
    """Far enough above zero for float32."""
    return _rule(lambda value: _bounds(value, least, most, f"be positive, and not below {least}"), "positive")


def between(least: float, most: float) -> dict[str, Any]:
    inside = f"in [{least}, {most}]"
    return _rule(lambda value: None if least <= value <= most else f"lie {inside}", inside)


def one_of(*choices: str) -> dict[str, Any]:
    listed = f"one of {', '.join(map(repr, choices))}"
    return _rule(lambda value: None if value in choices else f"be {listed}", listed)


def names_of_files() -> dict[str, Any]:
    """Of any bytes: those that are not UTF-8 are the surrogates U+DC80 to U+DCFF in Python's text."""
    return _rule(lambda value: _text_fault(re.sub("[\udc80-\udcff]", "", value)), "names of files")


def path() -> dict[str, Any]:
    return _rule(path_fault, "a path")


def path_fault(value: str) -> str | None:
    """Tell what a path must be to be looked for at all, None if it is."""
    if fault := _text_fault(value):
        return fault
    if re.match("[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        return "be a path: mount what is elsewhere, nothing is read from or written to an address"
    encoded = os.fsencode(value)
    if len(encoded) > 4000 or max(map(len, encoded.split(b"/"))) > 255:
        return "be a path of at most 4000 bytes, and 255 in each name"
    homeless = os.path.expanduser(value).startswith("~")
    return "begin with the home directory of a known user (is HOME set?), or without ~" if homeless else None


def optional_type(annotation: Any) -> type | None:
    """int for `int | None`; None for any other annotation."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    return next(t for t in kinds if t is not type(None)) if type(None) in kinds else None


def register(cls: Any, known: dict[str, Any]) -> None:
    """Enter a class under its `name`. Raises TypeError if another class has it; one that is defined again may."""
    other = known.setdefault(cls.name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"{cls.__name__} and {other.__name__} have the same name, {cls.name!r}: choose another")
    known[cls.name] = cls


def check_settings(settings: Any, prefix: str) -> None:
    """Check all plain values of a dataclass by type and range; whole numbers for a float become one.

    prefix: of their names in messages.  Raises ConfigError.
    """
    for f in dataclasses.fields(settings):
        name, value, optional = f"{prefix}.{f.name}".lstrip("."), getattr(settings, f.name), optional_type(f.type)
        kind: Any = optional or f.type
        if optional is str and value == "None":  # as the pages write it, and as a flag cannot say otherwise
            value = None
            object.__setattr__(settings, f.name, value)
        if kind not in _BY_TYPE or (optional and value is None):
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool)
        right_type = is_number if kind is int else isinstance(value, kind) or (kind is float and is_number)
        check(right_type, f"{name} is {quoted(value)}, but must be of type {kind.__name__}")
        too_large = kind is float and is_number and abs(value) >= 2**1000  # for `float` to take
        fault = "be finite" if too_large else f.metadata.get("rule", _BY_TYPE[kind])(value)
        check(not fault, f"{name} is {quoted(value)}, but must {fault}")
        if kind is float:
            object.__setattr__(settings, f.name, float(value))


def _rule(rule: Rule, description: str) -> dict[str, Any]:
    return {"rule": rule, "range": description}


def _bounds(value: float, least: float, most: float, below: str) -> str | None:
    if least <= value <= most:
        return None
    if value > most:
        return "be finite" if value == math.inf else f"be at most {most}"
    return below


def _text_fault(value: str) -> str | None:
    if len(value) > _LONGEST_TEXT:
        return f"have at most {_LONGEST_TEXT} characters"
    return "be text without NUL and lone surrogates" if set(value) & _NO_TEXT else None


_NO_TEXT = {"\0", *map(chr, range(0xD800, 0xE000))}
_BY_TYPE: dict[Any, Rule] = {
    bool: lambda value: None,
    int: lambda value: _bounds(value, -_MOST, _MOST, f"be at least {-_MOST}"),
    float: lambda value: _bounds(value, -1e38, 1e38, "be finite"),
    str: _text_fault,
}
