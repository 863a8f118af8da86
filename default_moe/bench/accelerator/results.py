"""Where parts leave what they measure: one JSON object a line, appended as it is found."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from default_moe.bench.report import Row
from default_moe.errors import ConfigError
from default_moe.training.memory import is_out_of_memory

FILE = "results.jsonl"


class Results:
    """The results of one part in a folder, and those of the parts before it."""

    def __init__(self, folder: Path, part: str):
        self._path, self._part = folder / FILE, part

    def add(self, row: Row) -> None:
        with self._path.open("a") as file:
            # On a line of its own even if a process was killed while it wrote the last one.
            file.write("\n" + json.dumps({"part": self._part, **{k: _plain(v) for k, v in row.items()}}))

    def guarded(self, name: str, measure: Callable[[], Row]) -> Row | None:
        """Add and return what `measure` gives, or say in a row called `name` why there is nothing, and return None."""
        try:
            row = {"name": name, **measure()}
        except Exception as error:  # whatever a kernel, a compiler or a library thinks of: the next one may work
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            text = "out of memory" if is_out_of_memory(error) else f"{kind}{error}"
            self.add({"name": name, "error": " ".join(text.split())[:300]})
            return None
        finally:
            jax.clear_caches()  # and with them the constants of compiled programs
        self.add(row)
        return row


def read(folder: Path) -> list[Row]:
    """All rows so far. A line that was being written when its process was killed is left out."""
    rows: list[Row] = []
    try:
        lines = (folder / FILE).read_text().splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
