"""Compiled programs kept on a disk, so that the next start of the same program need not compile them again.

JAX brings such a cache, but writes its entries in place: a process that is killed leaves one that every later start
fails to read, and a bit that flips would be run. Here an entry is written whole, and read only if its digest is right.
"""

import contextlib
import hashlib
import os
import platform
import re
from pathlib import Path

import jax
from jax._src import compilation_cache as jax_cache  # there is no public way to bring a cache of one's own
from jax._src.compilation_cache_interface import CacheInterface

from default_moe.files import read_file, write_atomically

FOLDER = "~/.cache/default_moe/xla"
_DIGEST = hashlib.sha256().digest_size


def keep_compiled_programs(place: str, most_bytes: int = 2 * 2**30) -> None:
    """Keep what this process compiles in a folder, made if absent, and take from there what is there already.

    Does nothing if JAX's own cache has a folder (JAX_COMPILATION_CACHE_DIR) or is off, or if the folder cannot be made.
    most_bytes: the entries used last stay, of this size together.
    """
    if jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]:
        return
    try:
        folder = Path(place).expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write there can run code in this process
    except (OSError, RuntimeError):  # RuntimeError: nobody's home is known
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax_cache._cache = CheckedCache(folder, most_bytes)
    jax_cache._cache_initialized = True


class CheckedCache(CacheInterface):
    """JAX's compiled programs by key, in a file each. A file that cannot be read or written is a miss, not an error."""

    def __init__(self, folder: Path, most_bytes: int):
        self._path = folder
        self._most_bytes = most_bytes
        # JAX's key leaves these out: instructions that another machine with the same home may lack, and the packing.
        own = (platform.machine(), _cpu_features(), jax_cache.compress_executable(b""))
        self._machine = hashlib.sha256(repr(own).encode()).hexdigest()[:16]

    def get(self, key: str) -> bytes | None:
        file = self._file(key)
        try:
            content = read_file(file)
            os.utime(file)
        except OSError:
            return None
        digest, program = content[:_DIGEST], content[_DIGEST:]
        return program if hashlib.sha256(program).digest() == digest else None

    def put(self, key: str, value: bytes) -> None:
        with contextlib.suppress(OSError):
            write_atomically(self._file(key), hashlib.sha256(value).digest() + value)
            self._drop_oldest()

    def _file(self, key: str) -> Path:
        return self._path / f"{self._machine}-{key}"

    def _drop_oldest(self) -> None:
        files = [(file.stat(), file) for file in self._path.iterdir() if file.is_file()]
        left = self._most_bytes
        for status, file in sorted(files, key=lambda entry: entry[0].st_mtime, reverse=True):
            left -= status.st_size
            if left < 0:
                file.unlink()


def _cpu_features() -> str:
    try:
        match = re.search(r"^(?:flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        return platform.processor()
    return match[0] if match else ""
