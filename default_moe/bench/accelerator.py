"""All that is worth knowing about one GPU or TPU: the other suites, each in a process of its own with a time limit."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from default_moe.bench.workload import ACCELERATOR_SHAPES
from default_moe.errors import ConfigError

MINUTES = 8.0
_ROOT = Path(__file__).parents[2]
_KERNELS_TEST = Path("tests", "bench", "test_every_kernel.py")
_STEP = "--suite=step --config=configs/paper.py:8c1{} --random_tokens --config.train.grad_accum_steps=1"
# Batch and remat for 80 GB, and less; the last is a smaller model for 16 GB.
_STEPS = (
    f"{_STEP.format('')} --config.train.batch_size=32 --config.model.remat=dots",
    f"{_STEP.format('')} --config.train.batch_size=16 --config.model.remat=dots",
    f"{_STEP.format('')} --config.train.batch_size=8 --config.model.remat=full",
    f"{_STEP.format(',d_model=512')} --config.train.batch_size=8 --config.model.remat=full",
)
_TINY_STEP = (
    f"{_STEP.format('')} --config.train.batch_size=8 --config.train.sequence_length=16 --config.model.num_layers=2 "
    "--config.model.d_model=32 --config.model.num_heads=2 --config.model.vocab_size=64 --config.model.dtype=float32 "
    "--config.moe.expert_dim=16 --config.model.remat=none"
)


class Part(NamedTuple):
    """A suite to run, or what tests kernels.

    name: of the files that it leaves.  seconds: its limit, of `MINUTES`.
    attempts: flags; the next ones are tried where some fail.
    memory: share of a GPU's memory that JAX takes; torch needs the rest.
    rank: of the backend to do it with among those that the layer was timed with, the fastest first.
    """

    name: str
    seconds: float
    attempts: tuple[str, ...]
    memory: float = 0.93
    rank: int | None = None


def parts(platform: str) -> list[Part]:
    """Return what to run, in the order of what would be missed most; for a CPU tiny versions."""
    on_cpu = platform == "cpu"
    shape = "--shape=128,32,4,2,16" if on_cpu else ""  # the standard ones if none is given
    first, last = (f"--shape={','.join(map(str, ACCELERATOR_SHAPES[i]))}" for i in (0, -1))
    rounds = f"--rounds={2 if on_cpu else 10}"
    layer = f"--suite=layer {shape or f'{first} {last}'} {rounds} --matmul="
    steps = tuple(f"{flags} {rounds}" for flags in ((_TINY_STEP,) if on_cpu else _STEPS))
    found = [Part("ceilings", 25, (f"--suite=ceilings {rounds}",))]
    if (_ROOT / _KERNELS_TEST).exists() and importlib.util.find_spec("xdist"):
        few = "-k drawn" if on_cpu else ""
        processes = 4 if platform == "gpu" else 1  # compile while others compute; a TPU is one process's
        command = f"-m pytest --noconftest -m gpu -p no:cacheprovider -n {processes} --dist load {_KERNELS_TEST}"
        found.append(Part("correctness", 60, (f"{command} {few}",), 0.2))
    found += [
        Part("products", 130, (f"--suite=products {shape} {rounds}",)),
        Part("layer", 70, (f"{layer}auto",) if on_cpu else (f"{layer}mosaic,hopper", f"{layer}auto")),
        Part("step", 110, steps, rank=0),
    ]
    if not on_cpu:
        found.append(Part("step_by_another", 80, steps, rank=1))
    if importlib.util.find_spec("torch"):
        found.append(Part("products_torch", 60, (f"--suite=products --vs_torch {shape or first} {rounds}",), 0.4))
        if importlib.util.find_spec("transformers"):
            torch = f"--suite=layer --matmul=auto --vs_torch {shape or first} {rounds}"
            found.append(Part("layer_torch", 60, (torch,), 0.4))
    return found


def run(folder: Path, minutes: float = MINUTES) -> bool:
    """Run all parts, print what each finds, and return whether all succeeded.

    Each part leaves a text in `folder`, all but the test of kernels a JSON file, and the steps profiles too.
    Raises ConfigError if the folder cannot be written or is not empty, or if JAX does not start.
    """
    folder = folder.absolute()
    end = time.monotonic() + 60 * minutes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: choose another --out")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
    # Asked in a process that ends: this one must not hold the device.
    problem = _run(["-c", "import jax; print(jax.default_backend())"], folder / "platform.txt", 120)
    platform = (folder / "platform.txt").read_text()
    if problem:
        raise ConfigError(f"JAX does not start here: {problem}: {_last_line(platform)}")
    # So that a part, which is in a session of its own, ends with this process.
    before = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        chosen = parts(_last_line(platform))
        problems = [_run_part(part, folder, end, part.seconds * minutes / MINUTES) for part in chosen]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return not any(problems)


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def _run_part(part: Part, folder: Path, end: float, seconds: float) -> str | None:
    """Return what went wrong with it in one line, or None."""
    end = min(end, time.monotonic() + seconds)
    text = folder / f"{part.name}.txt"
    backend = ""
    if part.rank is not None:
        backends = fastest_backends(folder / "layer.json")
        if part.rank >= len(backends):
            return None
        backend = f"--config.moe.matmul={backends[part.rank]}"
    for attempt in part.attempts:
        command = [*attempt.split(), *backend.split()]
        if command[0] != "-m":
            command = ["-m", "default_moe.bench", *command, f"--json={folder / part.name}.json"]
        if part.rank is not None:
            command.append(f"--profile={folder / part.name}.profile")
        problem = _run(command, text, end - time.monotonic(), part.memory)
        found = text.read_text(errors="replace") if text.exists() else ""
        print(f"\n{part.name}: {problem or 'done'}\n{found}", flush=True)
        # Another attempt would write over what this one has found.
        if problem is None or time.monotonic() >= end or (folder / f"{part.name}.json").exists():
            break
    return problem


def fastest_backends(layer: Path) -> list[str]:
    """Return the backends in the results of a layer, the fastest in training first; `auto` without results."""
    try:
        rows = json.loads(layer.read_text())["results"]
    except (OSError, ValueError):
        rows = []
    found = [
        (row["ms"], row["candidate"].removeprefix("default "))
        for row in rows
        if row["candidate"].startswith("default ") and row["routing"] == "balanced"
        if row["shape"] == rows[0]["shape"] and row["pass"] == "forward+backward"
    ]
    return [backend for _, backend in sorted(found)] or ["auto"]


def _run(arguments: list[str], output: Path, seconds: float, memory: float = 0.93) -> str | None:
    """Run Python, write what it prints to a file, and return what went wrong in one line, or None."""
    if seconds <= 0:
        return "no time was left for it"
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "XLA_CLIENT_MEM_FRACTION": str(memory)}
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name; JAX takes one of them
    with output.open("w") as file:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=_ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:  # with all that it started: none of them may keep the device
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ended with code {code}" if code else None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:300]
