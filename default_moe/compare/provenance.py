"""By which code the runs of a comparison were trained: those of other code than now are named, or trained anew."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from default_moe.config import Config
from default_moe.errors import ConfigError
from default_moe.files import read_json, sync_folder
from default_moe.runs.identity import RUN_FILE
from default_moe.runs.starts import differences, named, starts_of
from default_moe.runs.step_folders import StepFolders
from default_moe.runs.workdir import lock

_MOST_RUNS = 8


@dataclass(frozen=True)
class Provenance:
    """By what a run was trained.

    commits: what git called the checkout, by start; None if that is not known.  other: files that matter to the run and
    have changed since; None if its code is not known.
    """

    commits: tuple[str | None, ...]
    other: tuple[str, ...] | None

    @property
    def stale(self) -> bool:
        """Whether its result may not be that of the code now."""
        return self.other != ()


def provenance(folder: Path, config: Config) -> Provenance | None:
    """Return that of the run in `folder`; None if nothing is trained there."""
    steps = max(StepFolders(folder).steps(), default=0)
    if not steps or not os.path.lexists(folder / RUN_FILE):
        return None
    try:
        run = read_json(folder / RUN_FILE)
    except (OSError, ValueError):  # of which those tell that read its settings
        run = {}
    starts = starts_of(run, steps)
    changed = [differences(run, start, config.moe) for start in starts]
    known = [file for files in changed for file in files or ()]
    commits = dict.fromkeys(_text(start.get("commit")) for start in starts)
    return Provenance(tuple(commits), None if None in changed else tuple(sorted(set(known))))


def lines(found: Mapping[str, Provenance], again: bool = False) -> list[str]:
    """Return a line for each set of files by which runs, given by folder, were trained and which have changed since.

    again: whether they are about to be trained anew.
    """
    runs: dict[tuple[str, ...] | None, list[str]] = {}
    for folder, each in found.items():
        if each.stale:
            runs.setdefault(each.other, []).append(folder)
    what = "they are trained anew" if again else "`--again` trains them anew"
    return [
        f"{len(folders)} run{'s were' if len(folders) > 1 else ' was'} trained by "
        + ("unknown code" if other is None else f"other code ({named(list(other))})")
        + f": {what} ({named(folders)})"
        for other, folders in runs.items()
    ]


def commits_line(found: Mapping[str, Provenance]) -> str:
    """Return a sentence about the commits of runs."""
    commits = dict.fromkeys(commit for each in found.values() for commit in each.commits)
    known = [commit for commit in commits if commit]
    return "Commit of the runs: " + ", ".join([*known, *(["unknown"] if None in commits else [])]) + "."


def as_json(found: Mapping[str, Provenance]) -> dict[str, Any]:
    """Return for each folder the commits, and the files of other code: a list, or null if its code is not known."""
    return {folder: {"commits": list(each.commits), "other_code": each.other} for folder, each in found.items()}


def move_aside(folder: Path, config: Config) -> None:
    """Rename the folder of a run by other code, so that it can be trained anew: `<folder>.before-1`, or the next free.

    Its name is free from then on, whatever happens: the run is one that has not begun. What another process has done to
    it in the meantime stays. Raises Busy if another process trains there, ConfigError if it cannot be renamed.
    """
    try:
        descriptor = lock(folder)
    except FileNotFoundError:
        return
    try:
        found = provenance(folder, config)
        if found is None or not found.stale:
            return
        number = 1
        while os.path.lexists(target := folder.with_name(f"{folder.name}.before-{number}")):
            number += 1
        folder.rename(target)
        sync_folder(folder.parent)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be moved aside ({error.strerror}): make its folder writable") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
