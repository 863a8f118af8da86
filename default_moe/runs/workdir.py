"""A run's work directory: what makes it this run, written once, and compared when the run continues.

`run.json` holds the config, what the data was, and every start. A run continues only where its model, its data and the
order of its data would be the same; other settings may change between starts.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from default_moe.config import MAY_CHANGE, OPTIMIZER_KINDS, Config, flat_items, marked
from default_moe.data import HeldOutSet
from default_moe.errors import ConfigError, TrainingFailed, check, shown
from default_moe.files import read_json
from default_moe.processes import distributed
from default_moe.runs.identity import RUN_FILE, flat_config, has_saved, same_source, source_of, write_run
from default_moe.runs.starts import changed_code, named, starts_before, versions, with_start
from default_moe.runs.step_folders import StepFolders

_FORMAT = 1
_NOBODYS = re.compile(r"\..*|lost\+found|.*\.(log|out|err)")  # of a file system, a desktop, a shell or a scheduler
_UNTIL_SEEN = 60.0  # seconds: network file systems look for new files about once in 30


class Busy(ConfigError):
    """Another process trains in the work directory."""


@dataclass(frozen=True)
class Run:
    """A run in its work directory.

    id: what no other run has.  resumed: whether it goes on from a start before.  notes: one line for each setting that
    has changed since, and one for the code.  start: what `run.json` says of this one, once it has begun.
    """

    workdir: Path
    id: str
    resumed: bool
    notes: list[str]
    start: dict[str, Any] = dataclasses.field(default_factory=dict)

    def begin(self, step: int, config: Config) -> None:
        """Add this start, from a step on, to those that `run.json` keeps.

        Raises ConfigError if it cannot be written, TrainingFailed as `check_there` does.
        """
        if distributed.process_index() > 0:
            return
        self.check_there()
        try:
            run = read_json(self.workdir / RUN_FILE)
            added = with_start(run, config.moe, step, self.resumed)
            write_run(self.workdir, {**run, **added})
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.workdir / RUN_FILE} cannot be written ({getattr(error, 'strerror', error)}): make room, and "
                "start again"
            ) from error
        self.start.update(added["starts"][-1])

    def discard(self) -> None:
        """Leave nothing of a run that could not begin, unless one that never saved has left other files there."""
        if not self.resumed and jax.process_index() == 0:
            with contextlib.suppress(OSError):
                if _contents(self.workdir) == [RUN_FILE]:
                    (self.workdir / RUN_FILE).unlink()

    def check_there(self) -> None:
        """Raises TrainingFailed if the work directory is not the one any more that was opened."""
        try:
            there = read_json(self.workdir / RUN_FILE).get("run_id") == self.id
        except (FileNotFoundError, NotADirectoryError, ValueError):
            there = False
        except OSError:  # a disk that cannot be read now: what is written next will tell
            return
        if not there and jax.process_index() == 0:
            raise TrainingFailed(
                f"the work directory {self.workdir} was moved, deleted or replaced while the run was on: what is saved "
                "from now on would be lost; put it back, and the same command continues from its last checkpoint"
            )


def check_ours(workdir: str | os.PathLike[str]) -> None:
    """Raises ConfigError if `workdir` holds files, but no run, or a run whose checkpoints are gone.

    As `open_run` does, before any data is prepared.
    """
    folder = Path(workdir).absolute()
    if not os.path.exists(folder / RUN_FILE):
        return _check_empty(folder)
    gone = False
    with contextlib.suppress(OSError, ValueError):  # of which `open_run` tells
        gone = has_saved(folder, read_json(folder / RUN_FILE)) and not StepFolders(folder).steps()
    check(
        not gone,
        f"the work directory {folder} holds a run that has trained, but its checkpoints are gone from "
        f"{folder / 'checkpoints'}: bring them back (is a disk not mounted?). To begin anew, empty the directory or "
        "choose another --workdir",
    )


@contextlib.contextmanager
def open_run(
    workdir: str | os.PathLike[str],
    config: Config,
    corpus_hash: str,
    vocab_size: int,
    tokenizer_hash: str | None = None,
    changes_since: Callable[[str], list[str]] = lambda corpus_hash: [],
    sets: Mapping[str, HeldOutSet] | None = None,
) -> Iterator[Run]:
    """A new run in an empty or absent `workdir`, or the same run there; while entered, no other process has it.

    A run that never saved a checkpoint has nothing to go on from: any other takes its place.

    tokenizer_hash: identifies the tokenizer's content, so that the file that holds it may move.
    changes_since: tells how a corpus of another hash differed.
    sets: text that is evaluated too, by name, which may change.
    Raises ConfigError, with nothing written, if the directory holds other files or another run, if another process
    trains in it, or if it cannot be written. With several processes only the first one locks and writes; the others
    raise it if they do not see what that one wrote.
    """
    folder = Path(workdir).absolute()
    if distributed.process_index() > 0:
        yield _join_run(folder)
        return
    identity = {"corpus_hash": corpus_hash, "vocab_size": vocab_size, "tokenizer_hash": tokenizer_hash}
    sets = sets or {}
    _compare(folder, config, identity, changes_since, sets)
    descriptor = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = lock(folder)
            # Another process may have started it before the lock.
            run = _compare(folder, config, identity, changes_since, sets)
            content = {"format": _FORMAT, "run_id": run.id, "saved": run.resumed, **identity}
            saved = read_json(folder / RUN_FILE) if run.resumed else {}
            source = saved.get("source") or source_of(config.init_from)
            content |= {"config": config.to_dict(), "source": source, "versions": versions()}
            content |= starts_before(saved if run.resumed else _unsaved(folder, content))
            content["eval_sets"] = {name: part.content_hash for name, part in sets.items()}
            content["history"] = _history(folder, run, saved)
            write_run(folder, content)
            if run.resumed and (files := changed_code(content, config.moe)):
                run = dataclasses.replace(run, notes=[*run.notes, f"the code ({named(files)})"])
            distributed.share((folder / RUN_FILE).read_text())
        except OSError as error:
            raise ConfigError(
                f"the work directory {folder} cannot be written ({error.strerror}): choose another --workdir"
            ) from error
        yield run
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _history(folder: Path, run: Run, saved: Mapping[str, Any]) -> list[Any]:
    """What changed when the run went on with other settings: from which step on, when, and what."""
    before = saved.get("history")
    now = {
        "from_step": max(StepFolders(folder).steps(), default=0),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "changed": run.notes,
    }
    return [*(before if isinstance(before, list) else []), *([now] if run.notes else [])]


def _unsaved(folder: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """The `run.json` of a run with the same settings and data that never saved a checkpoint; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        run = read_json(folder / RUN_FILE)
        names = ("config", "corpus_hash", "vocab_size", "tokenizer_hash")
        if all(run.get(name) == json.loads(json.dumps(new[name])) for name in names):
            return run
    return {}


def _join_run(folder: Path) -> Run:
    """The run that process 0 opens. Raises ConfigError if it is not to be seen in `folder`."""
    written = distributed.share("")[0]
    last = time.monotonic() + _UNTIL_SEEN
    while time.monotonic() < last:
        with contextlib.suppress(OSError):
            if (folder / RUN_FILE).read_text() == written:
                return Run(folder, json.loads(written)["run_id"], resumed=True, notes=[])
        time.sleep(0.5)
    raise ConfigError(
        f"the work directory {folder} does not hold the {RUN_FILE} that process 0 wrote there: choose a --workdir on a "
        "file system that all hosts share"
    )


def _compare(
    folder: Path,
    config: Config,
    identity: Mapping[str, Any],
    changes_since: Callable[[str], list[str]],
    sets: Mapping[str, HeldOutSet],
) -> Run:
    """The run that these settings begin or continue in `folder`. Raises ConfigError where they must not."""
    new = Run(folder, uuid.uuid4().hex, resumed=False, notes=[])
    try:
        saved = read_json(folder / RUN_FILE)
    except FileNotFoundError:
        _check_empty(folder)
        return new
    except OSError as error:
        raise ConfigError(f"{folder / RUN_FILE} cannot be read ({error.strerror}): choose another --workdir") from error
    except ValueError as error:
        raise ConfigError(
            f"{folder / RUN_FILE} is damaged ({error}): restore it, or choose another --workdir"
        ) from error
    if not has_saved(folder, saved) and not StepFolders(folder).steps():
        return new
    try:
        if saved["format"] != _FORMAT:
            raise ConfigError(f"its format is {shown(saved['format'], 40)}, not {_FORMAT}")
        before = {**flat_config(saved["config"]), **{name: saved[name] for name in identity}}
    except (KeyError, ConfigError) as error:
        reason = error if isinstance(error, ConfigError) else f"it has no {error}"
        raise ConfigError(
            f"{folder / RUN_FILE} is not what this version writes ({reason}): choose another --workdir"
        ) from error
    now = {**dict(flat_items(config.to_dict())), **identity}
    changed = [name for name in now if name in before and now[name] != before[name]]
    refused = [name for name in changed if not _may_change(name, before, now, saved)]
    if refused:
        differences = [f"{name}: {shown(before[name], 60)} there, {shown(now[name], 60)} here" for name in refused]
        if "corpus_hash" in refused:
            differences += changes_since(str(before["corpus_hash"]))
        raise ConfigError(
            f"the work directory {folder} holds a run that these settings cannot continue ({'; '.join(differences)}): "
            "choose another --workdir, or set them back"
        )
    notes = [f"{name} was {shown(before[name], 60)}, is now {shown(now[name], 60)}" for name in changed]
    notes += _changed_sets(saved.get("eval_sets"), sets)
    return Run(folder, str(saved.get("run_id") or new.id), resumed=True, notes=notes)


def _changed_sets(before: Any, sets: Mapping[str, HeldOutSet]) -> list[str]:
    """A line for each set of the same name whose text was another."""
    known = before if isinstance(before, dict) else {}
    notes = []
    for name, part in sets.items():
        if known.get(name, part.content_hash) != part.content_hash:
            differences = "; ".join(part.changes_since(str(known[name])))
            notes.append(f"the text of the set {name!r} of eval.sets" + (f" ({differences})" if differences else ""))
    return notes


def _may_change(name: str, before: Mapping[str, Any], now: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    if name == "init_from":
        return same_source(run, before[name], now[name])
    if name == "data.tokenizer":  # a tokenizer file may move, if its content is known to be the same
        return now["tokenizer_hash"] is not None and now["tokenizer_hash"] == before["tokenizer_hash"]
    return marked(name, MAY_CHANGE) and name not in OPTIMIZER_KINDS


def _contents(folder: Path) -> list[str]:
    """What is in a folder that somebody or some run has put there."""
    return sorted(path.name for path in folder.iterdir() if not _NOBODYS.fullmatch(path.name))


def _check_empty(folder: Path) -> None:
    try:
        names = _contents(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"the work directory {folder} cannot be read ({error.strerror}): choose another --workdir"
        ) from error
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ConfigError(
            f"the work directory {folder} holds {shown}, but no {RUN_FILE}, so it is none of ours: choose an empty "
            "or new --workdir"
        )


def lock(folder: Path) -> int | None:
    """A descriptor that keeps other processes on this host out; None where the file system has no locks.

    Raises Busy if another one has it, OSError if the folder cannot be read.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise Busy(
            f"another process is training in the work directory {folder}: stop it, or choose another --workdir"
        ) from error
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
