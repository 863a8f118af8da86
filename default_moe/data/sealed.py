"""Files of prepared data: they appear under their names only when whole, and JSON among them carries its digest."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from default_moe.errors import shown
from default_moe.files import read_json


class Damaged(OSError):
    """Prepared data is not as it was written. The text says which file, and how."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends, or vanishes when it fails."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON values with their digest."""
    with replacing(path) as file:
        file.write(json.dumps({"values": values, "sha256": _digest(path, values)}).encode())


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The values that `write_sealed` wrote, or None if there is no such file. Raises Damaged if it holds others."""
    try:
        sealed = read_json(path)
        values = sealed.get("values")
        if not isinstance(values, dict):
            raise ValueError("it has no digest, as in earlier versions")
        if sealed.get("sha256") != _digest(path, values):
            raise ValueError("its SHA-256 differs")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{shown(path)} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{shown(path)} does not hold what was written: {shown(error)}") from error
    return values


def _digest(path: Path, values: dict[str, Any]) -> str:
    """SHA-256 of the values and of where they belong: one store's file is damage in another's place."""
    return hashlib.sha256(json.dumps([path.parent.name, path.name, values], sort_keys=True).encode()).hexdigest()
