"""The training loop: batches in, metrics and checkpoints out. All arithmetic is elsewhere."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from default_moe.config import Config, flat_items
from default_moe.data import (
    Data,
    HeldOutSet,
    Rows,
    measure_reading,
    open_data,
    open_sets,
    prefetched,
    tokenizer_fingerprint,
)
from default_moe.errors import ConfigError, Diverged, TrainingFailed
from default_moe.processes import distributed
from default_moe.processes.huge_pages import return_free_memory
from default_moe.processes.stopping import StopRequest
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.evaluation import Evaluation, evaluate
from default_moe.runs.fine_tuning import Source, check_tokenizer, find_source, fine_tuned_state
from default_moe.runs.measurements import StepMeasurements
from default_moe.runs.metrics import MetricsWriter
from default_moe.runs.profiling import Profiler
from default_moe.runs.progress import Progress
from default_moe.runs.sampling import Sampling, sample_texts
from default_moe.runs.starts import note_code
from default_moe.runs.workdir import Run, check_ours, open_run
from default_moe.runs.writers import check_writers, open_writers
from default_moe.training.memory import out_of_memory_in_one_line, step_memory
from default_moe.training.optimizer import learning_rate_schedule
from default_moe.training.program import Program, mesh_for
from default_moe.training.state import TrainState
from default_moe.training.step import Batch

_SCHEDULE = (
    "train.num_steps",
    *(f"optim.{name}" for name in ("peak_lr", "warmup_fraction", "schedule", "decay_fraction", "final_lr_fraction")),
)


def train(
    config: Config,
    workdir: Path,
    make_program: Callable[[Config, int, Mesh], Program] = Program,
    stop: StopRequest | None = None,
) -> int:
    """Train as `config` says, in `workdir`; continue from the newest checkpoint there, bit for bit.

    Checks what it can, prepares the data, compiles, restores or makes the state, trains, and prints a sample.

    make_program: `Program`, or one that gives a run what another has compiled.
    stop: entered by the caller, who wants to know of it too.

    Returns:
      the exit code: 0 when done or stopped by SIGTERM, 130 when stopped by Ctrl-C.

    Raises:
      ConfigError: bad input, with nothing written but prepared data. TrainingFailed, CheckpointError: see there.
    """
    distributed.check_same_start({"--workdir": str(workdir.absolute()), **dict(flat_items(config.to_dict()))})
    note_code(config.moe.plugin)
    progress = Progress(config.train.num_steps)
    mesh = mesh_for(config)
    check_ours(workdir)
    check_writers(config)
    source = find_source(config, workdir, progress.message)

    data = distributed.in_turn(lambda: open_data(config.data, progress.message))
    train_rows = data.train_rows(config.train.sequence_length, config.train.seed)
    validation_rows = data.validation_rows(config.train.sequence_length)
    check_tokenizer(source, data.tokenizer)
    sets = distributed.in_turn(
        lambda: open_sets(
            config.eval.globs_by_set, config.data, data.tokenizer, config.train.sequence_length, progress.message
        )
    )
    program = make_program(config, data.tokenizer.vocab_size, mesh)
    identity: dict[str, Any] = {
        "corpus_hash": data.corpus_hash,
        "vocab_size": program.vocab_size,
        "tokenizer_hash": tokenizer_fingerprint(data.tokenizer),
    }
    texts = {f"eval.sets {name}": part.content_hash for name, part in sets.items()}
    distributed.check_same({**identity, **texts}, "data must be the same on every host")

    with (
        open_run(workdir, config, **identity, changes_since=data.changes_since, sets=sets) as run,
        CheckpointStore(workdir, config.checkpoint, report=progress.message) as store,
        contextlib.nullcontext(stop) if stop else StopRequest() as stop,
        out_of_memory_in_one_line(TrainingFailed, "training", config, program.num_batch_shards),
    ):
        for note in run.notes:
            progress.message(f"changed since the last start: {note}")
        try:
            progress.message(_description(program, data))
            saved = store.steps()
            train_step = None
            if not saved or saved[-1] < config.train.num_steps:
                # Before anything of the state's size is read or made: it may not fit.
                train_step = _compile(program, train_rows, progress)
            restored = store.restore_latest(program.abstract_state)
            state, meta, start = restored or (None, {}, 0)
            progress.message(f"workdir: {workdir}, " + (f"continuing from step {start}" if start else "a new run"))
            if start >= config.train.num_steps:
                progress.message(
                    f"nothing to do: the run is at step {start}; a larger train.num_steps would continue it"
                )
                return 0
            train_step = train_step or _compile(program, train_rows, progress)
            if state is None:
                state = _first_state(program, source, train_rows, progress)
                start = int(state.step)
                meta = {"config": source.config.to_dict()} if source and start else {}
            run.begin(start, config)
            if jump := learning_rate_jump(meta, config, int(state.step) - int(state.bad_steps)):
                progress.message(jump)
        except BaseException:
            run.discard()
            raise
        more = open_writers(config, run, progress.message)
        writer = MetricsWriter(workdir, start if restored else None, progress.message, more)
        loop = _Loop(program, train_step, data, train_rows, validation_rows, sets, run, store, writer, progress, start)
        try:
            state, finished = loop.run(state, stop)
        except Exception:
            run.check_there()  # of which this error may come
            raise
        finally:
            writer.close()
            progress.close()

    if not finished:
        progress.message(f"stopped; the same command continues from the last checkpoint in {workdir}")
        return stop.exit_code
    with out_of_memory_in_one_line(TrainingFailed, "sampling", config, program.num_batch_shards):
        [text], _ = sample_texts(
            program, state.params, state.variables, data.tokenizer, [config.eval.prompt], Sampling().of(config.eval)
        )
    run.check_there()
    progress.message(f"a sample:\n{text}\n\ndone: everything is in {workdir}")
    return 0


def _compile(program: Program, rows: Rows, progress: Progress) -> Any:
    """The training step. Raises ConfigError if it does not fit the memory of a device."""
    began = time.monotonic()
    train_step = program.compile_train_step(rows.batch(0, 1))
    distributed.wait_for_all()
    seconds = time.monotonic() - began
    progress.message(f"compiled the training step in {seconds:.1f} s; it takes {step_memory(train_step)}")
    return train_step


def learning_rate_jump(meta: Mapping[str, Any], config: Config, updates: int) -> str | None:
    """Return a line if after so many updates the learning rate is another than with the checkpoint's own settings."""
    with contextlib.suppress(KeyError, ConfigError):  # what nobody can read may still be continued
        saved = Config.from_mapping(meta["config"])
        before, now = (f"{learning_rate_schedule(c.optim, c.train.num_steps)(updates):.3g}" for c in (saved, config))
        if before != now:
            old, new = (dict(flat_items(c.to_dict())) for c in (saved, config))
            changed = ", ".join(f"{name} {old[name]} -> {new[name]}" for name in _SCHEDULE if old[name] != new[name])
            return f"the learning rate of the next step is {now}; with the settings before it was {before} ({changed})"
    return None


def _first_state(program: Program, source: Source | None, rows: Rows, progress: Progress) -> TrainState:
    """The state before the first step."""
    if source is None:
        return program.new_state()
    state, origin = fine_tuned_state(program, source, rows)
    progress.message(origin)
    return state


@dataclasses.dataclass
class _Loop:
    """The loop of one run from step `start` on, and what it talks to."""

    program: Program
    train_step: Any
    data: Data
    train_rows: Rows
    validation_rows: Rows
    sets: Mapping[str, HeldOutSet]
    place: Run
    store: CheckpointStore
    writer: MetricsWriter
    progress: Progress
    start: int

    def run(self, state: TrainState, stop: StopRequest) -> tuple[TrainState, bool]:
        """Train. Returns the state, and whether all steps are done (False: asked to stop)."""
        config = self.program.config
        self._bad_in_row = 0
        self._pending: tuple[int, Any] | None = None
        with (
            prefetched(self._load, self.start, config.data.prefetch) as batches,
            Profiler(config.train.profiled, self.place.workdir / "profile", self.progress.message) as profiler,
        ):
            self._measurements = StepMeasurements(self.program, self.start)
            self._last_save = time.monotonic()
            self.progress.start(self.start)
            for step in range(self.start + 1, config.train.num_steps + 1):
                if profiler.begins(step):
                    self._record_pending()
                    profiler.start(step, state)
                    self._measurements.restart(step - 1)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = self.train_step(state, next(batches))
                self._record_pending()  # the step before, while this one runs: the device never waits
                self._pending = step, metrics
                self.progress.step(step)

                finished, stopping = step == config.train.num_steps, stop.received()
                if profiler.ends(step, stopping):
                    self._record_pending()
                    profiler.stop(state)
                    self._measurements.restart(step)
                held_out = None
                if finished or step % config.eval.every_steps == 0:
                    self._record_pending()
                    held_out = self._evaluate(state, step)
                if finished or stopping or self._save_is_due(step):
                    self._record_pending()
                    return_free_memory()
                    # What led to a bad step may lie in the weights: it must not push good checkpoints out.
                    if finished or stopping or not self._bad_in_row:
                        self._save(state, step, held_out)
                if stopping:
                    break
        self._make_sure_of_the_last_save(state, step, held_out)
        speed = self._measurements.mean_tokens_per_second()
        if speed:
            self.progress.message(f"trained at {speed:,.0f} tokens/s (compiling, evaluating and saving left out)")
        return state, finished

    def _load(self, step: int) -> Batch:
        batch_size = self.program.config.train.batch_size

        def rows(first: int, count: int) -> Batch:
            return self.train_rows.batch(step * batch_size + first, count)

        return self.program.put_batch(rows, batch_size)

    def _save_is_due(self, step: int) -> bool:
        """By its number, since the last one failed, or by process 0's clock, which several look at when they log."""
        config = self.program.config
        logged = step % config.train.log_every_steps == 0
        if step % config.checkpoint.every_steps == 0 or (logged and self.store.needs_retry):
            return True
        minutes = config.checkpoint.every_minutes
        if not minutes or (distributed.several() and not logged):
            return False
        return distributed.share(time.monotonic() - self._last_save > 60 * minutes)[0]

    def _make_sure_of_the_last_save(self, state: TrainState, step: int, held_out: dict[str, float] | None) -> None:
        """Wait for it, and try once more if it failed. Raises TrainingFailed if it cannot be saved."""
        self.store.wait()
        self.place.check_there()
        if self.store.needs_retry:
            self._save(state, step, held_out)
            self.store.wait()
        if self.store.needs_retry:
            saved = self.store.steps()
            raise TrainingFailed(
                f"the checkpoint of step {step} could not be saved; make room, and the same command continues from "
                + (f"step {saved[-1]}" if saved else "the start")
            )

    def _record_pending(self) -> None:
        """Log the metrics of the last step, if it is one to log. Raises Diverged after too many bad steps in a row."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        train = self.program.config.train
        self._bad_in_row = bad_in_row = int(metrics["bad_steps_in_row"])
        if bad_in_row:
            self.progress.message(
                f"step {step}: the loss or a gradient is not finite; nothing was updated ({bad_in_row} in a row)"
            )
        if step % train.log_every_steps == 0 or bad_in_row:
            metrics = jax.device_get(metrics)
            values = self._measurements.scalars(step, metrics)
            self.writer.write(step, values)
            if metrics["layers"]:
                counts_YN = metrics["layers"].tokens_per_expert
                self.writer.write_load(step, "train", counts_YN, self.program.config.model.moe_layers)
            self.progress.log(step, values)
        if bad_in_row >= train.max_bad_steps:
            self.store.wait()
            saved = self.store.steps()
            raise Diverged(
                f"{bad_in_row} steps in a row had a loss or gradient that is not finite (up to step {step}); "
                + (f"the checkpoint of step {saved[-1]} is intact; " if saved else "there is no checkpoint yet; ")
                + "a lower optim.peak_lr may help"
            )

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        config = self.program.config

        def of(rows: Rows) -> Evaluation:
            return evaluate(self.program, state.params, state.variables, rows, config.eval.num_batches)

        try:
            result, of_sets = of(self.validation_rows), {name: of(part.rows) for name, part in self.sets.items()}
        except Exception:  # of which no training is to be lost
            self._save(state, step, None)
            self.store.wait()
            raise
        values = {f"eval/{name}": value for name, value in {**result.scalars(), "tokens": result.tokens}.items()}
        for name, found in of_sets.items():
            values |= {f"eval/{name}/loss": found.loss, f"eval/{name}/bits_per_byte": found.bits_per_byte}
        self.writer.write(step, values)
        if result.layers:
            counts_YN = np.array([layer["tokens_per_expert"] for layer in result.layers])
            self.writer.write_load(step, "eval", counts_YN, config.model.moe_layers)
        self.progress.message(
            f"step {step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits/byte over {result.tokens:,} tokens"
        )
        for name, found in of_sets.items():
            self.progress.message(
                f"step {step}: set {name!r}: loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits/byte over "
                f"{found.tokens:,} tokens"
            )
        self._measurements.restart(step)
        return values

    def _save(self, state: TrainState, step: int, held_out: dict[str, float] | None) -> None:
        self.place.check_there()
        meta = {
            "step": step,
            "run_id": self.place.id,
            "config": self.program.config.to_dict(),
            "tokenizer": self.data.tokenizer.to_dict(),
            "corpus_hash": self.data.corpus_hash,
            "start": self.place.start,
        }
        self.store.save(step, state, meta, held_out)
        self._last_save = time.monotonic()
        self._measurements.restart(step)


def _description(program: Program, data: Data) -> str:
    """What is about to be trained, on what."""
    config = program.config
    counts = program.parameter_counts
    devices = jax.devices()
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    rows = min(config.train.batch_size, 64)  # a whole batch might not end
    reading = measure_reading(data, config.train.sequence_length, rows, seconds=0.2)
    routing = "no MoE layers, as model.num_dense_layers is model.num_layers: moe.* is not used"
    if config.model.num_moe_layers:
        routing = (
            f"router {config.moe.method.name!r}, {config.moe.num_experts} experts, top {config.moe.experts_per_token}"
        )
    form = f" over devices by {program.expert_parallel!r}" if program.expert_parallel else ""
    return (
        f"model: {counts.total / 1e6:.2f} M parameters, {counts.active / 1e6:.2f} M active, {routing}\n"
        f"data: {config.data.name}, {data.train.info.tokens:,} training and {data.validation.info.tokens:,} held-out "
        f"tokens, read at {reading:,.0f} tokens/s\n"
        f"devices: {len(devices)} x {devices[0].device_kind}, mesh {mesh}, experts by {program.matmul!r}{form}, "
        f"attention by {program.attention!r}"
    )
