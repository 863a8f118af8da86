"""Methods and balancers that are defined outside of this package."""

import importlib
import traceback
from pathlib import Path

from default_moe.errors import ConfigError, check, quoted, shown


def load_plugin(name: str) -> None:
    """Import the module of this name, so that the methods and balancers it defines can be chosen.

    Raises ConfigError if it cannot be imported.
    """
    what = f"moe.plugin is {quoted(name)}, but"
    check(all(part.isidentifier() for part in name.split(".")), f"{what} must be the name of a module, like a.b")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = f"there is no module {quoted(error.name)}"
        raise ConfigError(f"{what} {missing}: install it, or name its folder in PYTHONPATH") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ConfigError(f"{what} importing it fails: {type(error).__name__}: {shown(error)} ({where})") from error
