"""Results on the terminal and as JSON, with the machine and the versions they are from."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from default_moe.errors import ConfigError
from default_moe.files import write_atomically
from default_moe.hardware import machine

Row = dict[str, Any]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the rows' values under the columns' names, aligned. Columns without any value are left out."""
    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]
    lines = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    # The first column's texts to the left, numbers to the right.
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in aligned)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def figure(path: Path, width: float) -> Iterator[Any]:
    """Give a matplotlib figure to draw on, written to `path` (.png) at the end. Raises ConfigError if it cannot be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing = plt.figure(figsize=(width, 4.2), layout="constrained")
    try:
        yield drawing
        drawing.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from None
    finally:
        plt.close(drawing)


def write_json(path: Path, suite: str, rows: list[Row]) -> None:
    """Write the rows, with the machine, whole or not at all. Raises ConfigError if that cannot be done."""
    try:
        write_atomically(path, json.dumps({"suite": suite, "machine": machine(), "results": rows}, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
