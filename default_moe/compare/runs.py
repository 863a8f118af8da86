"""Doing the runs of a comparison, or going on with them, and reading what they left."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from default_moe.compare import provenance
from default_moe.compare.causality import check_causal
from default_moe.compare.compute import training_flops_per_token
from default_moe.compare.matrix import Entry, Settings, same_run
from default_moe.compare.provenance import Provenance
from default_moe.compare.statistics import Curve
from default_moe.config import Config
from default_moe.errors import ConfigError, Diverged, check
from default_moe.files import read_file, read_json
from default_moe.processes.stopping import StopRequest
from default_moe.runs import trainer
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.identity import RUN_FILE, same_source
from default_moe.runs.progress import Progress
from default_moe.runs.workdir import Busy
from default_moe.training.program import Program

RUNS = "runs"
_TEXT = ("corpus_hash", "vocab_size", "tokenizer_hash")  # what run.json says of the text that was read


@dataclass(frozen=True)
class Result:
    """What a finished run left.

    held_out, training: loss in nats per token.  bits_per_byte: of held-out text, at the end.
    tokens_per_second: median over the run, None if it was too short to tell.
    load_balance_loss, max_load, experts_per_token: of the last quarter of training, means over its logged steps;
      max_load is that of the busiest expert of any layer, in multiples of the mean.
    flops_per_token: of training, with the experts that tokens ran on average over all of it.
    """

    held_out: Curve
    training: Curve
    bits_per_byte: float
    tokens_per_second: float | None
    load_balance_loss: float
    max_load: float
    experts_per_token: float
    flops_per_token: float

    @property
    def loss(self) -> float:
        """The held-out loss after all training."""
        return self.held_out.final

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole training."""
        return self.flops_per_token * self.held_out.tokens[-1]

    @property
    def seconds(self) -> float | None:
        """What the whole training takes at the median speed, without compiling and evaluating."""
        return self.held_out.tokens[-1] / self.tokens_per_second if self.tokens_per_second else None


class Programs:
    """Programs by config: runs that differ in nothing but their seed share what is compiled.

    The first 16 are kept, and later ones made for one run each: with the code of 31 small models a process on Linux has
    mapped as many pieces of memory as it may (65,530), and crashes.
    """

    _KEPT = 16

    def __init__(self) -> None:
        self._made: dict[tuple[Config, int], Program] = {}

    def __call__(self, config: Config, vocab_size: int, mesh: Mesh | None = None) -> Program:
        key = _without_seed(config), vocab_size
        program = self._made.get(key)
        if program is None:
            program = Program(config, vocab_size, mesh)
            if len(self._made) < self._KEPT:
                self._made[key] = program
        return program.with_seed(config.train.seed)


def _without_seed(config: Config) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))


def do_runs(
    entries: Sequence[Entry], workdir: Path, again: bool = False, programs: "Programs | None" = None
) -> tuple[dict[str, str], int | None]:
    """Train all that has not come to its end yet, but for runs that another process trains.

    again: train those anew that were trained by other code than now. What is there of them is moved aside.
    programs: those of earlier calls, which need not be compiled again.

    Returns:
      what went wrong with the runs that diverged, by folder, and the exit code if a run was asked to stop, else None.

    Raises ConfigError, with nothing trained, if a run there was made with other settings, or if a method sees the
    tokens that it is to predict.
    """
    say = Progress(0).message
    check_runs(entries, workdir)
    found = provenances(entries, workdir)
    for line in provenance.lines(found, again):
        say(line)
    anew = [folder for folder, each in found.items() if again and each.stale]
    waiting = [entry for entry in entries if entry.folder in anew or not finished(entry, workdir)]
    say(f"{len(entries)} runs in {workdir / RUNS}, {len(entries) - len(waiting)} of them finished before")
    # Neither seeds, learning rates nor lengths of training change what a model sees.
    models = {(e.config.model, e.config.moe, e.config.train.sequence_length): e for e in waiting}
    for entry in models.values():
        if note := check_causal(entry.config, entry.candidate.method):
            say(note)
    programs, failures = programs or Programs(), {}
    began = time.monotonic()
    operations = [_operations(entry) for entry in waiting]
    with StopRequest() as stop:
        for number, entry in enumerate(waiting, 1):
            done, left = sum(operations[: number - 1]), sum(operations[number - 1 :])
            seconds = (time.monotonic() - began) * left / done if done else 0.0
            say(
                f"\nrun {number} of {len(waiting)}: {entry.folder}"
                + (f" ({_about(seconds)} for all that is left)" if seconds else "")
            )
            try:
                if again:
                    provenance.move_aside(workdir / RUNS / entry.folder, entry.config)
                trainer.train(entry.config, workdir / RUNS / entry.folder, programs, stop)
            except Busy:
                say("another process trains it")
            except Diverged as error:
                failures[entry.folder] = str(error)
                say(f"failed: {error}")
            if stop.requested and (number < len(waiting) or not finished(entry, workdir)):
                return failures, stop.exit_code
    check_same_text([e for e in entries if e.folder not in failures and finished(e, workdir)], workdir)
    return failures, None


def plan(entries: Sequence[Entry], workdir: Path, again: bool = False) -> list[str]:
    """A line for each run, what is done of it, and how long the rest takes at the speed of those that are finished.

    again: as for `do_runs`. Then a line for each set of files by which runs were trained, and which have changed since.
    """
    check_runs(entries, workdir)
    found = provenances(entries, workdir)
    speeds: dict[tuple[str, Settings], list[float]] = {}
    for entry in entries:
        if finished(entry, workdir):
            speed = read_result(entry, workdir).tokens_per_second
            speeds.setdefault((entry.candidate.method, entry.task), []).extend([speed] if speed else [])
    known = [speed for of_method in speeds.values() for speed in of_method]
    lines, seconds = [], 0.0
    for entry in entries:
        train, done = entry.config.train, _steps_done(entry, workdir)
        anew = again and entry.folder in found and found[entry.folder].stale
        done = 0 if anew else done
        left = (train.num_steps - done) * train.batch_size * train.sequence_length
        of_method = speeds.get((entry.candidate.method, entry.task)) or known
        seconds += left / float(np.median(of_method)) if of_method else 0.0
        state = (
            f"finished ({done} steps)" if not left else f"at step {done} of {train.num_steps}" if done else "not begun"
        )
        lines.append(f"{entry.folder}: {'to be trained anew' if anew else state}")
    lines += provenance.lines(found, again)
    estimate = f"about {_about(seconds)} of training left" if known else "no run is finished yet, so no time is known"
    return [*lines, f"{len(entries)} runs; {estimate}, one after the other, without compiling and evaluating"]


def _operations(entry: Entry) -> float:
    """Return what a run computes, about: the scales of a ladder differ."""
    train, vocab_size = entry.config.train, entry.config.model.vocab_size or 257
    tokens = train.num_steps * train.batch_size * train.sequence_length
    return tokens * training_flops_per_token(entry.config, vocab_size, math.nan)


def _about(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    minutes = max(round(seconds / 60), 1)
    return "1 minute" if minutes == 1 else f"{minutes} minutes"


def _steps_done(entry: Entry, workdir: Path) -> int:
    folder = workdir / RUNS / entry.folder
    if not (folder / RUN_FILE).exists():
        return 0
    with CheckpointStore(folder, read_only=True) as store:
        return max(store.steps(), default=0)


def provenances(entries: Sequence[Entry], workdir: Path) -> dict[str, Provenance]:
    """Return by which code each run that has begun was trained, by folder."""
    found = {entry.folder: provenance.provenance(workdir / RUNS / entry.folder, entry.config) for entry in entries}
    return {folder: each for folder, each in found.items() if each}


def check_same_text(entries: Sequence[Entry], workdir: Path) -> None:
    """Raises ConfigError if runs that are to be compared read different text: it may have changed between them."""
    first: dict[Settings, tuple[Entry, Any]] = {}
    for entry in entries:
        run = _run_file(entry, workdir)
        text = [run[name] for name in _TEXT]
        other, before = first.setdefault(entry.task, (entry, text))
        if text != before:
            raise ConfigError(
                f"the runs {other.folder} and {entry.folder} in {workdir / RUNS} were trained on different text, which "
                "has changed between them: choose another --workdir"
            )


def check_runs(entries: Sequence[Entry], workdir: Path) -> None:
    """Raises ConfigError if one has been begun with settings on which its result would depend."""
    for entry in entries:
        folder = workdir / RUNS / entry.folder
        if not os.path.lexists(folder / RUN_FILE):
            continue
        run = _run_file(entry, workdir)
        saved, init_from = run["config"], entry.config.init_from
        if same_source(run, saved.init_from, init_from):
            saved = dataclasses.replace(saved, init_from=init_from)
        differences = same_run(entry.config, saved)
        if differences:
            raise ConfigError(
                f"{folder} holds a run with other settings ({'; '.join(differences[:3])}): choose another "
                "--workdir, or set them back"
            )


def _run_file(entry: Entry, workdir: Path) -> dict[str, Any]:
    """The `run.json` of a run that has begun, its config a Config. Raises ConfigError if it is none of ours."""
    path = workdir / RUNS / entry.folder / RUN_FILE
    try:
        run = read_json(path)
        missing = [name for name in ("config", *_TEXT) if name not in run]
        check(not missing, f"it has no {', '.join(missing)}")
        return {**run, "config": Config.from_mapping(run["config"])}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): choose another --workdir") from None


def read_result(entry: Entry, workdir: Path) -> Result:
    """Raises ConfigError if the run's metrics are not there or not whole, Diverged if a held-out loss is not finite."""
    path = workdir / RUNS / entry.folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in read_file(path).splitlines()]
        return _result(lines, entry.config, vocab_size(entry, workdir))
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} does not hold the metrics of a whole run ({type(error).__name__}: {error}): remove {path.parent} "
            "to have it run again"
        ) from None


def read_results(entries: Sequence[Entry], workdir: Path, failures: dict[str, str]) -> dict[str, Result]:
    """By folder, those of runs that did not fail. A loss that is not finite is added to `failures`."""
    results = {}
    for entry in entries:
        if entry.folder not in failures:
            try:
                results[entry.folder] = read_result(entry, workdir)
            except Diverged as error:
                failures[entry.folder] = str(error)
    return results


def checkpoints(workdir: Path) -> set[Path]:
    """Those of all runs: others are there when a run has got further."""
    return {path for path in (workdir / RUNS).glob("**/checkpoints/*") if path.name.isdigit()}


def vocab_size(entry: Entry, workdir: Path) -> int:
    """Return that of a run that has begun."""
    return int(_run_file(entry, workdir)["vocab_size"])


def begun(entry: Entry, workdir: Path) -> bool:
    """Whether there is such a run."""
    return os.path.lexists(workdir / RUNS / entry.folder / RUN_FILE)


def finished(entry: Entry, workdir: Path) -> bool:
    """Whether a run has come to its end."""
    return _steps_done(entry, workdir) == entry.config.train.num_steps


def _result(lines: list[dict[str, Any]], config: Config, vocab_size: int) -> Result:
    tokens_per_step = config.train.batch_size * config.train.sequence_length
    last = config.train.num_steps

    def curve(name: str) -> Curve:
        points = list(_values(lines, name, 0))
        return Curve(tuple(step * tokens_per_step for step, _ in points), tuple(value for _, value in points))

    def mean_after(name: str, after: float = 3 * last / 4) -> float:
        return float(np.mean([value for _, value in _values(lines, name, after)] or [math.nan]))

    for line in lines:
        if "eval/loss" in line and line["eval/loss"] is None:
            raise Diverged(f"the held-out loss of step {line['step']} is not finite")
    held_out = curve("eval/loss")
    if held_out.tokens[-1] != last * tokens_per_step:
        raise ValueError(f"the last evaluation is not that of step {last}")
    speeds = [value for _, value in _values(lines, "train/tokens_per_second", 0)]
    return Result(
        held_out=held_out,
        training=curve("train/loss"),
        bits_per_byte=dict(_values(lines, "eval/bits_per_byte", 0))[last],
        tokens_per_second=float(np.median(speeds)) if speeds else None,
        load_balance_loss=mean_after("train/load_balance_loss"),
        max_load=mean_after("train/max_load"),
        experts_per_token=mean_after("train/experts_per_token"),
        flops_per_token=training_flops_per_token(config, vocab_size, mean_after("train/experts_per_token", 0)),
    )


def _values(lines: list[dict[str, Any]], name: str, after: float) -> Iterator[tuple[int, float]]:
    """(step, value) of a metric, where it is finite, after a step."""
    for line in lines:
        if line["step"] > after and isinstance(line.get(name), int | float):
            yield line["step"], float(line[name])
