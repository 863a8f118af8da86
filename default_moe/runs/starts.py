"""The starts of a run, as `run.json` keeps them: when, by what command, by what code, from which step on.

`starts` is a list, the latest last; `code` has the digests of the files, by the digest of all that a start names.
"""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from default_moe.config import MoEConfig
from default_moe.runs.code import running_code

_LONGEST = 5.0  # seconds to wait for git
_MOST_NAMES = 8


def note_code(plugin: str | None) -> None:
    """Read the code now: its files may be edited while data is prepared."""
    running_code(plugin)
    commit()


def with_start(run: Mapping[str, Any], moe: MoEConfig, step: int, resumed: bool) -> dict[str, Any]:
    """Return `starts` and `code` of a run, with the start that is made now.

    run: its `run.json`.  step: the one that it begins from.  resumed: whether it goes on from a start before.
    """
    code = running_code(moe.plugin)
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "commit": commit(),
        "code": code.digest,
        "versions": versions(),
        "from_step": step,
    }
    unknown = {"commit": None, "code": None, "from_step": 0}  # what earlier versions kept of theirs
    before = _starts(run) or ([unknown] if resumed else [])
    return {"starts": [*before, start], "code": {**_files(run), code.digest: dict(code.digests)}}


def starts_before(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return `starts` and `code` of a run as they are."""
    return {"starts": _starts(run), "code": _files(run)}


def changed_code(run: Mapping[str, Any], moe: MoEConfig) -> list[str]:
    """Return the files of code that differ from those of the last start, if they matter and it is known."""
    return differences(run, _starts(run)[-1], moe) or [] if _starts(run) else []


def differences(run: Mapping[str, Any], start: Mapping[str, Any], moe: MoEConfig) -> list[str] | None:
    """Return the files that matter and differ from those of a start of a run; None if its code is not known."""
    before = _files(run).get(str(start.get("code")))
    return running_code(moe.plugin).differences(before, moe) if isinstance(before, dict) else None


def starts_of(run: Mapping[str, Any], steps: int) -> list[Mapping[str, Any]]:
    """Return the starts that have trained the first `steps` of a run; an empty one if that is not known.

    What a start has trained may have been lost, and trained again by a later one.
    """
    found = []
    for start in reversed(_starts(run)):
        if start["from_step"] < steps:
            found.append(start)
            steps = start["from_step"]
    return found[::-1] if _starts(run) else [{}]


def named(files: list[str]) -> str:
    """Return the names of files as a line has room for them."""
    more = f" and {len(files) - _MOST_NAMES} more" if len(files) > _MOST_NAMES else ""
    return ", ".join(files[:_MOST_NAMES]) + more


@functools.cache
def commit() -> str | None:
    """Return what git calls the checkout that the package is in; None if it is in none, or git does not tell."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # an installed package may lie in a checkout of something else
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LONGEST
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def versions() -> dict[str, str]:
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _starts(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    starts = run.get("starts")
    whole = isinstance(starts, list) and all(
        isinstance(s, dict) and isinstance(s.get("from_step"), int) for s in starts
    )
    return starts if isinstance(starts, list) and whole else []


def _files(run: Mapping[str, Any]) -> dict[str, Any]:
    code = run.get("code")
    return code if isinstance(code, dict) else {}
