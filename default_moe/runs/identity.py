"""What ties the parts of a work directory to one run: `run.json`, and what it says about a checkpoint found there."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from default_moe.config import MAY_CHANGE, Config, flat_items, marked
from default_moe.errors import ConfigError, shown
from default_moe.files import read_file, read_json, write_atomically

RUN_FILE = "run.json"


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `run.json`. Raises OSError."""
    write_atomically(folder / RUN_FILE, json.dumps(content, indent=1))


def mark_saved(folder: Path) -> None:
    """Note in `run.json` that there has been a checkpoint, so that its absence is noticed."""
    with contextlib.suppress(OSError, ValueError):  # then the next save does
        run = read_json(folder / RUN_FILE)
        if run.get("saved") is not True:
            write_run(folder, {**run, "saved": True})


def has_saved(folder: Path, run: Mapping[str, Any]) -> bool:
    """Whether a run has ever saved a checkpoint, by its `run.json`; in earlier ones by whether it logged a step."""
    if "saved" in run:
        return run["saved"] is not False
    with contextlib.suppress(OSError):
        return bool(read_file(folder / "metrics.jsonl"))
    return False


def source_of(init_from: str | None) -> dict[str, Any] | None:
    """The run that another starts from, as `run.json` keeps it: its id (None if it cannot be read) and its place."""
    if init_from is None:
        return None
    place = os.path.realpath(os.path.expanduser(init_from))
    run_id = None
    with contextlib.suppress(OSError, ValueError):
        run_id = read_json(Path(place) / RUN_FILE).get("run_id")
    return {"run_id": run_id, "path": place}


def same_source(run: Mapping[str, Any], before: str | None, now: str | None) -> bool:
    """Whether `init_from` names the run that it named before: spelt otherwise, moved or deleted it is no other.

    run: the `run.json` of the run that started from it.
    """
    there, here = source_of(before), source_of(now)
    if before == now or there is None or here is None:
        return before == now
    recorded = run.get("source")
    started = {**there, **recorded} if isinstance(recorded, dict) else there
    if started["run_id"] and here["run_id"]:
        return started["run_id"] == here["run_id"]
    return here["path"] in (started["path"], there["path"])


def why_foreign(folder: Path, step: int, meta: Mapping[str, Any]) -> str | None:
    """Return why a checkpoint with this `meta.json` is not the step `step` of the run in `folder`; None if it is."""
    if meta.get("step", step) != step:
        return f"it is of step {shown(meta['step'], 20)}"
    try:
        run = read_json(folder / RUN_FILE)
    except (OSError, ValueError):  # a checkpoint that was copied by itself; whoever opens the run reports the rest
        return None
    for name in ("run_id", "corpus_hash"):
        if name in run and name in meta and run[name] != meta[name]:
            return (
                f"it is of another run: its {name} is {shown(meta[name], 60)}, but {shown(run[name], 60)} in {RUN_FILE}"
            )
    if "run_id" in meta:
        return None
    # Earlier ones have no name of their run: those of the same settings cannot be told apart.
    try:
        theirs, ours = flat_config(meta["config"]), flat_config(run["config"])
    except (KeyError, ConfigError):
        return None
    for name in ours:
        if name == "init_from" and same_source(run, theirs[name], ours[name]):
            continue
        if theirs.get(name) != ours[name] and not marked(name, MAY_CHANGE):
            return (
                f"it is of another run: its {name} is {shown(theirs.get(name), 60)}, but {shown(ours[name], 60)} here"
            )
    return None


def flat_config(saved: Any) -> dict[str, Any]:
    """The settings of a saved config by name, with defaults for those that it lacks. Raises ConfigError."""
    return dict(flat_items(Config.from_mapping(saved).to_dict()))
