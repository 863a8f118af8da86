"""Metrics of a run, in its files and elsewhere. No failure to write stops a run."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from default_moe.errors import shown, tell
from default_moe.files import io_failure, write_atomically
from default_moe.runs.pictures import load_heat_map

METRICS_FILE = "metrics.jsonl"
LOAD_FILE = "expert_load.jsonl"


class Writer(Protocol):
    """Takes metrics step after step. What it raises is told, and ends no run: see `MetricsWriter`."""

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_png(self, step: int, tag: str, png: bytes) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes a run's metrics to `metrics.jsonl`, `expert_load.jsonl` and `tensorboard/` in its work directory.

    resume_step: the step that the run continues from; what was written for later steps is dropped, so that a run that
      was killed leaves the same file as one that was not. None starts anew.
    report: takes one line when writing begins to fail.
    more: other places, by name, that get the same scalars and pictures.

    With several processes only the first one writes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int | None = None,
        report: Callable[[str], None] = tell,
        more: Mapping[str, Writer] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._report = report
        self._failing: set[str] = set()
        files = {name: _LineFile(Path(workdir) / name) for name in (METRICS_FILE, LOAD_FILE)}
        events = _EventFile(Path(workdir) / "tensorboard", 0 if resume_step is None else resume_step + 1)
        self._load = files[LOAD_FILE]
        self._writers: dict[str, Writer] = {METRICS_FILE: files[METRICS_FILE], "tensorboard": events, **(more or {})}
        for name, lines in files.items() if self._active else ():
            self._try(name, functools.partial(lines.drop_after, resume_step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, {"step": step, ...}, flushed, and scalars in all other places.

        metrics: scalars by name, "train/loss" for instance. JSON has no NaN or infinity: they become null.
        """
        if not self._active:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        self._write_all(lambda writer: writer.write_scalars(step, values))

    def write_load(self, step: int, split: str, tokens_per_expert: np.ndarray, layers: Sequence[int]) -> None:
        """One line of expert_load.jsonl; of held-out text also the picture of `load_heat_map` in all other places.

        split: "train", of the batch of that step, or "eval".  tokens_per_expert: counts [layers, experts].
        layers: numbers of the layers in the model.
        """
        if not self._active:
            return
        counts = np.asarray(tokens_per_expert).astype(int).tolist()
        line = {"step": step, "split": split, "layers": layers, "tokens_per_expert": counts}
        self._try(LOAD_FILE, lambda: self._load.write(line))
        if split == "eval":
            title = f"load of each expert at step {step} (1 = mean)"
            self._try("pictures", lambda: self._write_picture(step, load_heat_map(tokens_per_expert, title, layers)))

    def close(self) -> None:
        if self._active:
            self._write_all(lambda writer: writer.close())
            self._try(LOAD_FILE, self._load.close)

    def _write_picture(self, step: int, png: bytes) -> None:
        self._write_all(lambda writer: writer.write_png(step, "expert_load", png))

    def _write_all(self, write: Callable[[Writer], None]) -> None:
        for name, writer in self._writers.items():
            self._try(name, functools.partial(write, writer))

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
            self._failing.discard(what)
        except Exception as error:  # whatever a library for pictures may raise
            if what not in self._failing:
                reason = io_failure(error) or shown(f"{type(error).__name__}: {error}")
                self._report(f"{what} cannot be written ({reason}): training continues, writing is retried")
                self._failing.add(what)


class _LineFile:
    """A file of JSON lines. Lines that could not be written are kept and written before the next ones."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None
        self._unwritten = b""

    def drop_after(self, step: int | None) -> None:
        """Leaves the whole lines up to `step`, or none."""
        if not self._path.exists():
            return
        old = self._path.read_bytes()
        new = b"".join(line for line in old.splitlines(keepends=True) if step is not None and _step_of(line) <= step)
        if new != old:
            write_atomically(self._path, new)

    def write(self, line: Mapping[str, Any]) -> None:
        self._append(json.dumps(line).encode() + b"\n")

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.write({"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}})

    def write_png(self, step: int, tag: str, png: bytes) -> None:
        """Write what could not be written before; lines hold no pictures."""
        if self._unwritten:
            self._append(b"")

    def _append(self, line: bytes) -> None:
        self._unwritten += line
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(self._unwritten):
                written += os.write(self._descriptor, self._unwritten[written:])
        except OSError:
            os.ftruncate(self._descriptor, size)  # no half lines on a full disk
            raise
        self._unwritten = b""

    def close(self) -> None:
        if self._unwritten:
            self._append(b"")
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _EventFile:
    """TensorBoard's event files, written in the calling thread.

    tensorboardX's SummaryWriter writes in another one, which dies on a full disk; the queue to it then fills and
    blocks training. After a failure a new file is begun, since the old one may end in half a record.

    hide_from: TensorBoard shall not show what older files hold for this step and later ones.
    """

    def __init__(self, folder: Path, hide_from: int):
        self._folder = folder
        self._hide_from: int | None = hide_from
        self._writer: Any = None

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(step, Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]))

    def write_png(self, step: int, tag: str, png: bytes) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._write(step, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        try:
            writer = self._writer or self._open()
            writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            writer.flush()
        except Exception:
            self._writer = None
            raise

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{time.time_ns()}")
        if self._hide_from is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=self._hide_from, session_log=start))
            self._hide_from = None
        return self._writer


def _plain(value: Any) -> int | float:
    return value if isinstance(value, int) else np.asarray(value).item()


def _step_of(line: bytes) -> float:
    """The step of a line; infinity if it is not a whole line of ours."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
