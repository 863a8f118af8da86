"""The parts one after another, each in a process of its own, and a report of what they found."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from default_moe.bench import layer, report
from default_moe.bench.accelerator import ceilings, correctness, products, results, torch_products, training
from default_moe.bench.accelerator.results import Results
from default_moe.bench.accelerator.scale import scale
from default_moe.bench.report import Row
from default_moe.bench.torch_block import missing_packages
from default_moe.bench.workload import LayerShape
from default_moe.errors import ConfigError
from default_moe.moe.experts.grouped_matmul import SlowKernel

TOTAL_SECONDS = 530.0
_START_SECONDS = 120.0
FAILED = "the whole part"
_REPORT, _LOG = "report.txt", "log.txt"
_NOT_SHOWN = ("part", "shape", "dtype", "pass", "candidate", "routing", "rounds")  # the name says it


class _Part(NamedTuple):
    """seconds: its limit.  measure: takes its Results and the folder.  memory: share of the device's that JAX takes."""

    seconds: float
    measure: Callable[[Results, Path], None]
    memory: float = 0.75


def _layers(found: Results, folder: Path) -> None:
    """The layer table, with balanced routing and the backend that "auto" picks."""
    s = scale()
    ceiling = ceilings.matmul_ceiling(results.read(folder))
    vs_torch = not missing_packages(("torch", "transformers"))
    first, *others = s.layers
    for shape, with_torch in [(first, False), *([(first, True)] if vs_torch else []), *((o, False) for o in others)]:
        rows: list[Row] = []

        def time_shape(shape: LayerShape = shape, with_torch: bool = with_torch, rows: list[Row] = rows) -> Row:
            rows += layer.run([shape], ["auto"], s.dtype, s.rounds, with_torch, ("balanced",))
            return {"candidates": len(rows)}

        found.guarded(f"{shape}{', with torch' if with_torch else ''}", time_shape)
        for row in rows:
            share = row["GFLOP/s"] * 1e9 / ceiling if ceiling else None
            found.add({"name": f"{row['shape']}, {row['pass']}, {row['candidate']}", **row, "/ matrix product": share})


# In the order of what would be missed most.
PARTS: dict[str, _Part] = {
    "ceilings": _Part(40, lambda found, _: ceilings.measure(found)),
    "correctness": _Part(90, lambda found, _: correctness.measure(found)),
    "training": _Part(260, lambda found, _: training.measure(found), memory=0.93),
    "products": _Part(90, products.measure),
    "torch": _Part(40, torch_products.measure, memory=0.4),
    "layers": _Part(120, _layers, memory=0.5),
}


def run(folder: Path, seconds: float = TOTAL_SECONDS) -> list[Row]:
    """Run all parts within `seconds`, write everything to `folder`, print a report and return the rows.

    Raises ConfigError if the folder cannot be written or is not empty.
    """
    end = time.monotonic() + seconds
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: choose another --out")
        (folder / results.FILE).write_text(json.dumps({"part": "machine", **_machine()}))
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
    lines = []
    for name, part in PARTS.items():
        began = time.monotonic()
        problem = _run_in_process(name, folder, min(part.seconds, end - began), part.memory)
        if problem:
            Results(folder, name).add({"name": FAILED, "error": problem})
        rows = [row for row in results.read(folder) if row["part"] == name]
        lines.append(_table(name, rows, time.monotonic() - began))
        print(lines[-1], flush=True)
        (folder / _REPORT).write_text("\n".join(lines))
    return results.read(folder)


def run_part(name: str, folder: Path) -> None:
    """One part, in this process. Raises ConfigError if there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"there is no directory {folder}: --part adds to one that exists")
    # A kernel must not be timed or checked under the name of another that stood in for it.
    warnings.simplefilter("error", SlowKernel)
    PARTS[name].measure(Results(folder, name), folder)


def _machine() -> Row:
    """`report.machine()` as a process of its own finds it: this one must not hold the device."""
    code = "import json; from default_moe.bench import report; print(json.dumps(report.machine()))"
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=_START_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"JAX does not start here in {_START_SECONDS:.0f} s: is the device in use?") from None
    if done.returncode:
        raise ConfigError(f"JAX does not start here: {_last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_in_process(name: str, folder: Path, seconds: float, memory: float) -> str | None:
    """What went wrong, in one line, or None."""
    if seconds <= 0:
        return "no time was left for it"
    command = [sys.executable, "-m", "default_moe.bench", "--suite=accelerator", f"--part={name}", f"--out={folder}"]
    log = folder / _LOG
    with log.open("a") as output:
        output.write(f"\n--- {name}\n")
        output.flush()
        start = log.stat().st_size
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, env=_environment(memory)
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    if code == 0:
        return None
    with log.open(errors="replace") as file:
        file.seek(start)
        return f"ended with code {code}: {_last_line(file.read())}"


def _environment(memory: float | None = None) -> dict[str, str]:
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if memory is not None:
        environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name; JAX takes one of them
        environment["XLA_CLIENT_MEM_FRACTION"] = str(memory)
    return environment


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]


def _table(name: str, rows: list[Row], seconds: float) -> str:
    """A part's results, those with the same columns together."""
    lines = [f"\n{name} ({seconds:.0f} s)"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(tuple(key for key in row if key not in _NOT_SHOWN), []).append(row)
    lines += [report.table(group, columns) for columns, group in groups.items()]
    lines += [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines) + "\n"
