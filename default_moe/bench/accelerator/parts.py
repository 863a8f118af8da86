"""The parts one after another, each in a process of its own, and a report of what they found."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from default_moe.bench import layer, report
from default_moe.bench.accelerator import ceilings, correctness, products, results, torch_products, training
from default_moe.bench.accelerator.results import Results
from default_moe.bench.accelerator.scale import scale
from default_moe.bench.report import Row
from default_moe.bench.torch_block import missing_packages
from default_moe.errors import ConfigError

TOTAL_SECONDS = 530.0
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
    for index, shape in enumerate(s.layers):
        for row in layer.run([shape], ["auto"], s.dtype, s.rounds, vs_torch and index == 0, ("balanced",)):
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

    Raises ConfigError if the folder cannot be written or holds results already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / results.FILE).exists():
            raise ConfigError(f"{folder} holds results already: choose another --out")
        (folder / results.FILE).write_text(json.dumps({"part": "machine", **_machine()}) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
    end = time.monotonic() + seconds
    lines = []
    for name, part in PARTS.items():
        began = time.monotonic()
        problem = _run_in_process(name, folder, min(part.seconds, end - began), part.memory)
        rows = [row for row in results.read(folder) if row["part"] == name]
        lines.append(_table(name, rows, time.monotonic() - began, problem))
        print(lines[-1], flush=True)
        (folder / _REPORT).write_text("\n".join(lines))
    return results.read(folder)


def run_part(name: str, folder: Path) -> None:
    """One part, in this process."""
    PARTS[name].measure(Results(folder, name), folder)


def _machine() -> Row:
    """`report.machine()` as a process of its own finds it: this one must not hold the device."""
    code = "import json; from default_moe.bench import report; print(json.dumps(report.machine()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
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
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(memory)
    return environment


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]


def _table(name: str, rows: list[Row], seconds: float, problem: str | None) -> str:
    """A part's results, those with the same columns together."""
    lines = [f"\n{name} ({seconds:.0f} s)" + (f": {problem}" if problem else "")]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(tuple(key for key in row if key not in _NOT_SHOWN), []).append(row)
    lines += [report.table(group, columns) for columns, group in groups.items()]
    lines += [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines) + "\n"
