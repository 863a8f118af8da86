"""Text on every machine with Python: the sources of its standard library, or their English alone.

`python_stdlib` has one document per source file; `python_english` has one per file, its docstrings, and one per pydoc
topic. The documents are extracted once into a TFDS data set (see `stdlib_builder`) and read from there.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import io
import os
import shutil
import sys
import sysconfig
import tokenize
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from default_moe.data.corpus import Split, decode_utf8, in_split
from default_moe.errors import ConfigError

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
    except (SyntaxError, UnicodeDecodeError, LookupError):
        text, _ = decode_utf8(data)
    return text.replace("\r\n", "\n")


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, in order and dedented. Nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = [ast.get_docstring(node, clean=False) for node in nodes]
    cleaned = [inspect.cleandoc(text) for text in found if text]
    return "\n\n".join(text for text in cleaned if text) + "\n" if any(cleaned) else ""


def source_documents(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every source file."""
    for name, path in source_files(root):
        yield name, decode_source(path.read_bytes())


def english_documents(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every file's docstrings and every pydoc topic."""
    for name, source in source_documents(root):
        yield name, docstrings(source)
    for topic, text in pydoc_topics():
        yield f"topics/{topic}", text.strip() + "\n"


def pydoc_topics() -> list[tuple[str, str]]:
    """(topic, text) of the running Python's help, sorted; none where it is not installed."""
    try:
        return sorted(importlib.import_module("pydoc_data.topics").topics.items())
    except ImportError:
        return []


VARIANTS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "python_stdlib": source_documents,
    "python_english": english_documents,
}


class StdlibCorpus:
    """The standard library of the running Python, prepared under `directory`. See `Corpus` for the interface."""

    def __init__(self, variant: str, validation_fraction: float, directory: Path, root: Path | None = None) -> None:
        """`root`: the library's folder, by default the running Python's. Raises ConfigError if it has no sources."""
        self.name = variant
        self.replaced: Counter[str] = Counter()
        self._validation_fraction = validation_fraction
        self._root = root or Path(sysconfig.get_paths()["stdlib"])
        self._directory = directory
        self._files = source_files(self._root)
        if not self._files:
            raise ConfigError(
                f"data.name is {variant!r}, but this Python has no standard library sources in {self._root}; "
                "use data.name='text_files' and data.files"
            )

    def fingerprint(self) -> str:
        """A hash of the sources themselves: they are small, and differ between Python versions."""
        return self._content_key

    @functools.cached_property
    def _content_key(self) -> str:
        topics = pydoc_topics() if self.name == "python_english" else []
        key = (1, self.name, sys.version_info[:2], self._validation_fraction, topics)
        digest = hashlib.sha256(repr(key).encode())
        for name, path in self._files:
            data = path.read_bytes()
            digest.update(repr((name, len(data))).encode())
            digest.update(data)
        return digest.hexdigest()

    def documents(self, split: Split) -> Iterator[str]:
        from default_moe.data import stdlib_builder

        prepared = self._directory / f"{self.name}-{self.fingerprint()[:16]}"
        if not prepared.exists():
            self._prepare(prepared)
        return stdlib_builder.read(prepared, split)

    def _prepare(self, prepared: Path) -> None:
        """Writes the TFDS data set elsewhere, then moves it into place whole, so that `prepared` is never half made."""
        from default_moe.data import stdlib_builder

        documents: dict[Split, list[tuple[str, str]]] = {"train": [], "validation": []}
        for name, text in VARIANTS[self.name](self._root):
            if text.strip():
                held_out = in_split(name, "validation", self._validation_fraction)
                documents["validation" if held_out else "train"].append((name, text))
        temporary = prepared.with_name(f"{prepared.name}.{uuid.uuid4().hex}.tmp")
        try:
            written = stdlib_builder.write(self.name, documents, temporary)
            written.rename(prepared)
        except OSError:
            if not prepared.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
