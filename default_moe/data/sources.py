"""What text was read from, recorded beside its tokens, to tell later what has changed."""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from default_moe.data.sealed import Damaged, read_sealed
from default_moe.errors import shown
from default_moe.files import open_regular

RECORD = "sources.json"
LARGEST_DIGESTED = 1 << 30  # bytes; larger files are known by their size only


def describe(files: Iterable[tuple[str, Path]], **versions: str) -> dict[str, Any]:
    """JSON values about (name, path) of files: for each name size and digest of the file, or of all so called."""
    known: dict[str, list[int | str]] = {}
    for name, path in files:
        with contextlib.suppress(OSError), open_regular(path) as file:  # one that has just vanished
            size = path.stat().st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16] if size <= LARGEST_DIGESTED else ""
            known.setdefault(name, []).extend((size, digest))
    return {"versions": versions, "files": known}


def find_record(directory: Path, is_wanted: Callable[[Path], bool]) -> dict[str, Any] | None:
    """The record in the first folder of prepared tokens below `directory` that is wanted, None if there is none."""
    for path in directory.glob(f"*-tokens/*/{RECORD}"):
        with contextlib.suppress(Damaged):
            if is_wanted(path.parent):
                return read_sealed(path)
    return None


def differences(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What differs between two results of `describe`, `before` None if it is not known: a few words for each kind."""
    there = before["versions"] if before else {}
    found = [
        f"{name}: {shown(there.get(name, 'unknown'), 60)} there, {shown(version, 60)} here"
        for name, version in now["versions"].items()
        if there.get(name) != version
    ]
    if before:
        old, new = before["files"], now["files"]
        changed = [name for name in old if name in new and old[name] != new[name]]
        for what, names in ("added", new.keys() - old), ("removed", old.keys() - new), ("changed", changed):
            if names:
                found.append(f"text {what}: {_some(names)}")
        found = found or ["the files are the same, but were read or split in another way"]
    return found


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(shown(repr(name), 60) for name in sorted(names)[:3]) + more
