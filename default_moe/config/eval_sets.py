"""`eval.sets`: a mapping of names to globs in a config file, one text wherever else settings are kept."""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from default_moe.errors import check, quoted


def split_sets(text: str) -> dict[str, str]:
    """Return globs by name, of 'name:glob,name:glob'.

    A part with no name belongs to the set before: a set may have several globs. Raises ConfigError.
    """
    sets: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, glob = (word.strip() for word in part.partition(":"))
        if colon and "/" not in name:
            check(name not in sets, f"eval.sets has two sets called {quoted(name)}: choose another name")
            fits = re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) is not None
            check(
                fits and bool(glob),
                f"eval.sets has the part {quoted(part)}, but must be NAME:GLOB, separated by commas: NAME of at most "
                "40 letters, digits, '_', '-' and '.'",
            )
            sets[name] = glob
        else:
            check(
                bool(sets),
                f"eval.sets is {quoted(text)}, but must begin with a name: 'code:texts/*.md', say",
            )
            last = next(reversed(sets))
            sets[last] += f",{part}"
    return sets


class SetsReference(config_dict.FieldReference):
    """The setting in a ConfigDict, to which a mapping of names to globs may be assigned too."""

    def set(self, value: Any, type_safe: bool = True) -> None:
        if isinstance(value, Mapping):
            text = ",".join(f"{name}:{glob}" for name, glob in value.items())
            check(
                split_sets(text) == {**value},
                f"eval.sets is {quoted(dict(value))}, but must be globs by name; one with a colon begins with './'",
            )
            value = text
        super().set(value, type_safe)
