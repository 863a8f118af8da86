"""The folders of a run's checkpoints: which steps there are, whether each is what it says it is, and what has to go."""

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from default_moe.errors import CheckpointError, tell
from default_moe.files import find_damage, io_failure, read_json
from default_moe.runs.identity import why_foreign

_REQUIRED = ("meta.json", "state/_METADATA")
_BEST_METRIC = "eval/loss"
_DEBRIS = re.compile(r"[0-9.]+\.(saving|deleting)|.*\.orbax-checkpoint-tmp.*")


class StepFolders:
    """The folder `checkpoints` of a work directory.

    report: takes one line about a step that is damaged or cannot be moved.
    """

    def __init__(self, workdir: Path, report: Callable[[str], None] = tell):
        self.workdir = workdir
        self.root = workdir / "checkpoints"
        self._report = report
        self._trusted: set[int] = set()

    def __getitem__(self, step: int) -> Path:
        return self.root / str(step)

    def steps(self) -> list[int]:
        """The steps on the disk, oldest first, verified or not. Raises CheckpointError if they cannot be listed."""
        return sorted(int(path.name) for path in self._paths() if re.fullmatch("0|[1-9][0-9]*", path.name))

    def why_not(self, step: int) -> str | None:
        """Return why a step cannot be used, "is damaged (...)"; None if it can. Each is verified once."""
        if step in self._trusted:
            return None
        damage = find_damage(self[step], _REQUIRED)
        foreign = None
        if damage is None:
            try:
                foreign = why_foreign(self.workdir, step, self.read_json(step, "meta.json"))
            except (OSError, ValueError) as error:
                damage = f"meta.json: {error}"
        if foreign:
            return f"is not what its name says ({foreign})"
        return f"is damaged ({damage})" if damage else None

    def trust(self, step: int) -> None:
        """The step has been verified, or has just been written."""
        self._trusted.add(step)

    def read_json(self, step: int, name: str) -> dict[str, Any]:
        """Raises OSError or ValueError."""
        return read_json(self[step] / name)

    def set_aside(self, step: int) -> None:
        """Move a step that cannot be used to `checkpoints_damaged`, or else out of the names of steps."""
        self._trusted.discard(step)
        try:
            folder = self.workdir / "checkpoints_damaged"
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
            try:
                target = _move(self[step], folder / str(step))
            except PermissionError:  # a folder that may not be written may only be renamed where it is
                target = _move(self[step], self.root / f"{step}.damaged")
            self._report(f"checkpoint of step {step} moved to {target}")
        except OSError as error:
            self._report(f"checkpoint of step {step} cannot be moved away ({io_failure(error)})")

    def remove_debris(self) -> None:
        """Remove what saves and deletions left that did not end."""
        for path in self._paths():
            if _DEBRIS.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    _remove(path)

    def delete_old(self, keep_last: int) -> None:
        """Delete all but the newest steps and the best: the lowest held-out loss of those evaluated as the latest."""
        try:
            steps = self.steps()
        except CheckpointError as error:
            return self._report(str(error))
        evaluated = {step: found for step in steps if (found := self._held_out(step)) is not None}
        alike = [step for step in evaluated if evaluated[step][1] == evaluated[max(evaluated)][1]]
        best = [min(alike, key=lambda step: (evaluated[step][0], -step))] if alike else []
        for step in set(steps) - set(steps[-keep_last:]) - set(best):
            doomed = self.root / f"{step}.deleting"
            try:
                self[step].rename(doomed)
                _remove(doomed)
            except OSError as error:
                self._report(f"old checkpoint of step {step} not deleted ({io_failure(error)})")

    def _held_out(self, step: int) -> tuple[float, Any] | None:
        """The held-out loss of a step, and over how many tokens it is; None without an evaluation."""
        try:
            metrics = self.read_json(step, "metrics.json")
            return float(metrics[_BEST_METRIC]), metrics.get("eval/tokens")
        except (OSError, ValueError, KeyError, TypeError):  # not evaluated, not finite, or damaged
            return None

    def _paths(self) -> list[Path]:
        try:
            return list(self.root.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(
                f"the checkpoints in {self.root} cannot be read ({error.strerror}): make them readable"
            ) from error


def _move(path: Path, target: Path) -> Path:
    """Rename to `target`, or to a name like it that is free, which is returned."""
    base, copy = target, 1
    while target.exists() or target.is_symlink():
        target, copy = base.with_name(f"{base.name}.{copy}"), copy + 1
    return path.rename(target)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)
