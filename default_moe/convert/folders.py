"""Folders of Hugging Face models: tensors in safetensors files, read one at a time and written in shards."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from default_moe.errors import ConfigError, check, quoted, shown
from default_moe.files import open_regular, read_json

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")
SHARD_BYTES = 4 << 30


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class TensorFiles:
    """The tensors of a folder by name. names: all of them. Raises ConfigError where a file is missing or damaged."""

    def __init__(self, folder: Path):
        check(folder.is_dir(), f"there is no folder {folder}: give one that holds config.json and {_ONE}")
        if (folder / _INDEX).is_file():
            where = folder / _INDEX
            names = read_json_file(where).get("weight_map")
            right = isinstance(names, dict) and all(isinstance(file, str) for file in names.values())
            check(right, f"{where} has no weight_map of tensors to files")
            self._files = {name: folder / os.path.basename(file) for name, file in (names or {}).items()}
        else:
            file = folder / _ONE
            with self._opened(file) as opened:
                self._files = dict.fromkeys(opened.keys(), file)
        self.names = set(self._files)
        for file in set(self._files.values()):
            with self._opened(file) as opened:
                missing = sorted(name for name in self._files if self._files[name] == file)
                missing = [name for name in missing if name not in set(opened.keys())]
                check(not missing, f"{file} has no tensor {missing[:1]}, which {_INDEX} looks for there")

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as float32. Raises ConfigError if it has another shape or no floating-point numbers."""
        with self._opened(self._files[name]) as opened:
            part = opened.get_slice(name)
            found, dtype = tuple(part.get_shape()), part.get_dtype()
            check(found == shape, f"{name} has the shape {list(found)}, but must have {list(shape)} by config.json")
            check(dtype in _DTYPES, f"{name} is of type {dtype}, but must be of one of {', '.join(_DTYPES)}")
            return np.asarray(opened.get_tensor(name), np.float32)

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        try:
            open_regular(file).close()  # a pipe would be waited for
            with safe_open(file, framework="numpy") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or shown(error)}") from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when all is written, and is removed if anything fails.

    Raises ConfigError if `folder` is there and holds anything, or if it cannot be written.
    """
    folder = folder.absolute()
    check(not os.path.lexists(folder) or _is_empty(folder), f"{folder} is not an empty folder: choose another")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.replace(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:  # how it tells of a full disk
        raise ConfigError(f"{folder} cannot be written: {shown(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, tuple[int, ...], Any]], dtype: Any, largest: int) -> None:
    """Write tensors, given by name, shape and a function that makes them, to files of at most `largest` bytes.

    A tensor that is larger has a file of its own.
    """
    shards: list[list[tuple[str, Any]]] = []
    size, total, width = largest, 0, np.dtype(dtype).itemsize
    for name, shape, make in tensors:
        needed = int(np.prod(shape)) * width
        if size + needed > largest:
            shards.append([])
            size = 0
        shards[-1].append((name, make))
        size, total = size + needed, total + needed
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _ONE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Its bytes are written as they lie there, whatever the strides say.
        arrays = {name: np.ascontiguousarray(make().astype(dtype)) for name, make in shard}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": names})


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{quoted(str(folder))} cannot be written: {error.strerror}") from error
