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
    except RuntimeError as error:
        reason = "no home directory is known for it; set HOME, or give a path without ~"
        raise ConfigError(f"{setting} is {shown(repr(path))}, which cannot be a path: {reason}") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{setting} is {shown(repr(path))}, which cannot be a path: {shown(error)}") from error
