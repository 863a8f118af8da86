"""Files that survive a crash: whole or absent when written, with digests that tell when they have changed.

What is read may come from anyone: a pipe or a device is no file here, and JSON holds what it should or is refused.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

from default_moe.errors import ConfigError, shown

MANIFEST = "digests.json"


def open_regular(path: Path) -> BufferedReader:
    """Return a regular file, open to be read.

    Raises OSError; at once for pipes and devices, which may never end.
    """
    # Without O_NONBLOCK a pipe would be waited for before it is known to be one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_file(path: Path) -> bytes:
    """Return the content of a regular file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises OSError as `open_regular` does, ValueError if it holds anything else."""
    try:
        value = json.loads(read_file(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {shown(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is not a JSON object: {shown(value, 40)}")
    return value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Puts `content` at `path`, which is seen either as it was before or as it is afterwards. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_report(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write files to `folder`, made if absent: text and bytes as they are, anything else as JSON.

    Raises ConfigError if they cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            as_it_is = isinstance(content, str | bytes)
            write_atomically(folder / name, content if as_it_is else json.dumps(finite_or_null(content), indent=1))
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {folder}: {error.strerror}") from error


def finite_or_null(value: Any) -> Any:
    """`value` as JSON can hold it: None for NaN and infinity, names for keys."""
    if isinstance(value, Mapping):
        return {str(name): finite_or_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_folder(folder: Path) -> None:
    """Makes renames within `folder` outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 and the size of every file below `folder` to its manifest, all of them flushed to the disk."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _digest(folder / name, sync=True), names)
        files = {
            name: {"sha256": digest, "bytes": (folder / name).stat().st_size}
            for name, digest in zip(names, digests, strict=True)
        }
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=1))


def find_damage(folder: Path, required: Iterable[str] = ()) -> str | None:
    """Return what is wrong with the files below `folder`, all of which its manifest lists; None if nothing is.

    required: files without which nothing is whole, whatever the manifest says.
    """
    try:
        files = read_json(folder / MANIFEST)["files"]
        listed = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
        there = {str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if not path.is_dir()}
    except FileNotFoundError:
        return f"{MANIFEST}, written last, is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return f"{MANIFEST} is not readable as a list of digests"
    unlisted = sorted({*there, *required} - {*listed, MANIFEST})
    if unlisted:
        return f"{MANIFEST} does not list {unlisted[0]}"
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda item: _file_damage(folder, *item), listed.items())
        return next((problem for problem in problems if problem), None)


def io_failure(error: BaseException | None) -> str | None:
    """Why the disk failed, if that is the cause of `error`: TensorStore raises ValueErrors that hold an errno."""
    while error is not None:
        if isinstance(error, OSError):
            return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        code = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
        if code:
            return os.strerror(int(code[1] or code[2]))
        error = error.__cause__ or error.__context__
    return None


def _file_damage(folder: Path, name: str, wanted: tuple[str, int]) -> str | None:
    wanted_digest, wanted_size = wanted
    try:
        size = (folder / name).stat().st_size
        if size != wanted_size:
            return f"{shown(name)} has {size} bytes, not the {wanted_size} written"
        if _digest(folder / name) != wanted_digest:
            return f"{shown(name)} does not hold what was written: its SHA-256 differs"
    except (FileNotFoundError, ValueError):  # ValueError: no file can be called that
        return f"{shown(name)} is missing"
    except OSError as error:
        return f"{shown(name)} cannot be read: {error.strerror}"
    return None


def _digest(path: Path, sync: bool = False) -> str:
    with open_regular(path) as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
