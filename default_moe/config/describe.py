"""Every setting with its default, range and meaning, as text for `--help`."""

import dataclasses
import textwrap
from typing import Any

from default_moe.config.run import Config
from default_moe.methods import groups_of_settings


def describe_settings(width: int = 100) -> str:
    """Return all settings as they are given on the command line, in groups, in lines of at most `width` characters."""
    plain = [f for f in dataclasses.fields(Config) if not dataclasses.is_dataclass(f.type)]
    blocks = ["\n".join(_describe(f, "", width) for f in plain)]
    for group in (f for f in dataclasses.fields(Config) if f not in plain):
        blocks.append(_group(group.name, group.type, width))
        if group.name == "moe":
            own = [(name, choice) for name, choice in groups_of_settings().items() if dataclasses.fields(choice)]
            blocks += [_group(f"moe.{name}", choice, width) for name, choice in own]
    return "\n\n".join(blocks)


def _group(name: str, section: Any, width: int) -> str:
    heading = f"{name}: {section.__doc__.splitlines()[0]}"
    return "\n".join([heading, *(_describe(f, f"{name}.", width) for f in dataclasses.fields(section))])


def _describe(setting: dataclasses.Field[Any], prefix: str, width: int) -> str:
    default = setting.default if isinstance(setting.default, str) else repr(setting.default)
    text = setting.metadata.get("meaning", "")  # a method from elsewhere may do without
    if "range" in setting.metadata:
        text += f" Must be {setting.metadata['range']}."
    first = textwrap.shorten(f"--config.{prefix}{setting.name}={default}", width, placeholder=" ...")
    lines = textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([f"  {first}", *lines])
