"""Paths that a setting or the environment names."""

import os
from pathlib import Path

from default_moe.errors import ConfigError, shown


def expanded(setting: str, path: str) -> Path:
    """The absolute path, a user's folder in place of `~`. Raises ConfigError if no file can be called that."""
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it holds a null character")
        return Path(path).expanduser().absolute()
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: no such user, or one without a folder
        raise ConfigError(f"{setting} is {shown(repr(path))}, which cannot be a path: {shown(error)}") from error
