"""`python_stdlib`: the sources of Python's standard library, text on every machine. A document is a file.

They are written once to a TFDS data set (see `stdlib_builder`) and read from there.
"""

import contextlib
import functools
import hashlib
import io
import os
import platform
import shutil
import sys
import sysconfig
import tokenize
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from default_moe.data.corpus import Split, decode_utf8, in_split
from default_moe.data.sources import describe
from default_moe.errors import ConfigError, shown
from default_moe.files import find_damage, write_manifest

LEFT_OUT = {"test", "tests", "idle_test", "turtledemo", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def source_files(root: Path) -> list[tuple[str, Path]]:
    """(name, path) of the library's own modules, sorted: no tests, demos, generated data or installed packages."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def decode_source(data: bytes) -> str:
    """A source file's text, in the encoding that it declares."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeError, LookupError):
        text, _ = decode_utf8(data)
    return text.replace("\r\n", "\n")


class StdlibCorpus:
    """The standard library of the running Python, prepared under `directory`. See `Corpus` for the interface."""

    name = "python_stdlib"

    def __init__(
        self,
        validation_fraction: float,
        directory: Path,
        root: Path | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        """`root`: the library's folder, by default the running Python's. Raises ConfigError if it has no sources."""
        self.replaced: Counter[str] = Counter()
        self._validation_fraction = validation_fraction
        self._root = root or Path(sysconfig.get_paths()["stdlib"])
        self._directory = directory
        self._log = log
        self._files = source_files(self._root)
        if not self._files:
            raise ConfigError(
                f"data.name is {self.name!r}, but this Python has no standard library sources in {shown(self._root)}; "
                "use data.name='text_files' and data.files"
            )

    def fingerprint(self) -> str:
        """A hash of the sources themselves: they are small, and differ between Python versions."""
        return self._content_key

    @functools.cached_property
    def _content_key(self) -> str:
        digest = hashlib.sha256(repr((1, self.name, sys.version_info[:2], self._validation_fraction, [])).encode())
        for name, path in self._files:
            data = path.read_bytes()
            digest.update(repr((name, len(data))).encode())
            digest.update(data)
        return digest.hexdigest()

    def sources(self) -> dict[str, Any]:
        return describe(self._files, Python=platform.python_version())

    def documents(self, split: Split) -> Iterator[str]:
        from default_moe.data import stdlib_builder

        prepared = self._directory / f"{self.name}-{self.fingerprint()[:16]}"
        damage = find_damage(prepared)
        if damage:
            if prepared.exists():
                self._log(f"{shown(prepared)}: {shown(damage)}; it is made again")
            self._prepare(prepared)
        return stdlib_builder.read(prepared, split)

    def _prepare(self, prepared: Path) -> None:
        """Writes the TFDS data set elsewhere, then moves it into place whole, so that `prepared` is never half made."""
        from default_moe.data import stdlib_builder

        documents: dict[Split, list[tuple[str, str]]] = {"train": [], "validation": []}
        for name, path in self._files:
            text = decode_source(path.read_bytes())
            if text.strip():
                held_out = in_split(name, "validation", self._validation_fraction)
                documents["validation" if held_out else "train"].append((name, text))
        temporary = prepared.with_name(f"{prepared.name}.{uuid.uuid4().hex}.tmp")
        try:
            written = stdlib_builder.write(documents, temporary)
            write_manifest(written)
            if find_damage(prepared):
                with contextlib.suppress(FileNotFoundError):
                    prepared.rename(temporary / "damaged")
            written.rename(prepared)
        except OSError:
            if find_damage(prepared):  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
