"""Checkpoints that are written behind the training loop's back, and restored only if every byte is as it was written.

    <workdir>/checkpoints/<step>/state/         the train state, written by Orbax
                                 meta.json      what the run needs to know about itself: config, tokenizer, corpus
                                 metrics.json   held-out metrics at that step, if there were any
                                 digests.json   SHA-256 and size of each of the files above, written last
    <workdir>/checkpoints_damaged/<step>/       steps that failed verification, kept out of the way

A step is used if its files are as they were written, it is of this run, and its name is its number: see
`step_folders.py`. It is put together in `<step>.saving`, or `<step>.1.saving` after a save has failed, and renamed once
its digests are on the disk, and renamed to `<step>.deleting` before it is deleted: a directory whose name is only a
number is whole, unless it was damaged. Older steps are deleted only after that. (Orbax's CheckpointManager commits, and
deletes old steps, before digests could be written.)
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint._src.metadata.array_metadata_store import Store as ArrayMetadataStore  # exported nowhere

from default_moe.config import CheckpointConfig
from default_moe.errors import CheckpointError as CheckpointError  # part of this module's interface
from default_moe.errors import TrainingFailed, shown, tell
from default_moe.files import finite_or_null, io_failure, sync_folder, write_atomically, write_manifest
from default_moe.processes import distributed
from default_moe.runs.identity import mark_saved
from default_moe.runs.shapes import difference, shapes
from default_moe.runs.step_folders import StepFolders

# Devices that hold copies of an array write a part of it each, if the parts are of at least this many bytes. (Orbax by
# itself cuts up small arrays too, which is most of what a save of a small model takes.)
_LEAST_PART = 1 << 20


class CheckpointStore:
    """The checkpoints of one work directory.

    config: how many steps to keep.  read_only: write and move nothing, for evaluation; it need not be closed.
    compress: False writes arrays from where they are, True (8 % less on the disk) from a second copy of all in memory.
    report: takes one line about a save that failed or a step that is damaged, possibly from another thread.

    With several processes all call the same methods at the same points, on a file system that they share.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        read_only: bool = False,
        report: Callable[[str], None] = tell,
        compress: bool = True,
    ):
        _quieten()
        self._folders = StepFolders(Path(workdir).absolute(), report)
        self._config = config or CheckpointConfig()
        self._read_only = read_only
        self._report = report
        self._compress = compress
        self._checkpointer = _new_checkpointer(compress)
        self._thread: threading.Thread | None = None
        self._saving = -1
        self._error: BaseException | None = None
        self._failed = False
        self._failures = 0
        if not read_only and jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the first save tells of it
                self._folders.workdir.mkdir(parents=True, exist_ok=True)
            self._folders.remove_debris()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # What others of several processes have no part in any more is not waited for.
        if error is None or not distributed.several():
            self.close()

    def close(self) -> None:
        """Waits for the save under way, then frees Orbax's threads."""
        try:
            self.wait()
        finally:
            _close(self._checkpointer)

    def steps(self) -> list[int]:
        """The steps on the disk, oldest first, verified or not. Raises CheckpointError if they cannot be listed."""
        return self._folders.steps()

    # Saving

    def save(self, step: int, state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
        """Starts to save `state`, a pytree of jax.Arrays; returns as soon as its arrays may be changed or donated.

        meta, metrics: become JSON; the step with the lowest finite metrics["eval/loss"] is kept, of those with the
        metrics["eval/tokens"] of the latest.
        Waits for the save before this one. Returns whether a save was started: not if the step is there and whole,
        nor if it failed at once. An input/output error is reported and sets `needs_retry`; any other error is raised.
        With several processes an input/output error raises TrainingFailed: the others may wait for this one.
        """
        if self._read_only:
            raise ValueError("this CheckpointStore is read-only")
        self.wait()
        if distributed.share(jax.process_index() == 0 and self._has_whole(step))[0]:
            return False
        numbers = finite_or_null({name: float(value) for name, value in (metrics or {}).items()})
        files = {"meta.json": json.dumps(dict(meta)), "metrics.json": json.dumps(numbers)}
        self._saving = step
        try:
            if jax.process_index() == 0:
                self._folders.remove_debris()
                self._folders.root.mkdir(exist_ok=True)  # but no work directory that has gone
                self._staging.mkdir()
            with _failures_of_a_disk():
                self._checkpointer.save(self._staging / "state", args=ocp.args.PyTreeSave(state))
        except Exception as error:
            self._error = error
            self._settle()
            return False
        self._thread = threading.Thread(target=self._finish, args=(files,), name="checkpoint")
        self._failed = False
        self._thread.start()
        return True

    def wait(self) -> None:
        """Returns when no save is under way, in no process: the last one is whole on the disk, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle()
            distributed.wait_for_all()

    @property
    def needs_retry(self) -> bool:
        """Whether the last save failed. Always False with several processes, which do not outlive that."""
        if distributed.several():
            return False
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        return self._failed

    @property
    def _staging(self) -> Path:
        # Threads of TensorStore write on when a save has failed: into a folder of which the next try knows nothing.
        again = f".{self._failures}" if self._failures else ""
        return self._folders.root / f"{self._saving}{again}.saving"

    def _finish(self, files: Mapping[str, str]) -> None:
        """The background thread: everything after the copy of the arrays."""
        try:
            with _failures_of_a_disk():
                self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                for name, content in files.items():
                    write_atomically(self._staging / name, content)
                write_manifest(self._staging)
                self._staging.rename(self._folders[self._saving])
                sync_folder(self._folders.root)
                self._folders.trust(self._saving)
                with contextlib.suppress(CheckpointError):
                    self._folders.remove_debris()
                mark_saved(self._folders.workdir)
                self._folders.delete_old(self._config.keep_last)
        except BaseException as error:
            self._error = error

    def _settle(self) -> None:
        """Draws the conclusion from a save that ended."""
        error, self._error = self._error, None
        self._failed = error is not None
        if error is None:
            return
        # It remembers its failure, and would fail the next save with it.
        _close(self._checkpointer)
        self._checkpointer = _new_checkpointer(self._compress)
        if jax.process_index() == 0:
            shutil.rmtree(self._staging, ignore_errors=True)
        self._failures += 1
        reason = io_failure(error)
        if reason is None:
            raise error
        if distributed.several():
            raise TrainingFailed(
                f"the checkpoint of step {self._saving} could not be saved ({reason}): make room, and "
                + distributed.CONTINUES
            )
        self._report(f"checkpoint of step {self._saving} not saved ({reason}): training continues, the save is retried")

    def _has_whole(self, step: int) -> bool:
        """Whether `step` is there and whole. If it is there and damaged, it is moved out of the way."""
        if not os.path.lexists(self._folders[step]):
            return False
        problem = self._folders.why_not(step)
        if problem:
            self._report(f"checkpoint of step {step} {problem}: saving it again")
            self._folders.set_aside(step)
        return problem is None

    # Restoring

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """State, meta and step of the newest step that is whole; None if there are no steps at all.

        abstract_state: jax.ShapeDtypeStruct leaves, whose shardings the arrays get (one device where there is none).
        Each damaged step is reported in one line and, unless read-only, moved to checkpoints_damaged.
        Raises CheckpointError if no step is whole, or if the state is of another shape.
        """
        step = self._newest_whole()
        if step is None:
            return None
        return self._restore(step, abstract_state, partial=False), self._folders.read_json(step, "meta.json"), step

    def restore_for_eval(
        self, abstract: Any, step: int | None = None, or_newest: bool = False
    ) -> tuple[Any, dict[str, Any], int]:
        """Some of the state's fields, such as {"params": ..., "variables": ...}; the rest is verified, but not loaded.

        abstract: like `restore_latest`'s.  step: None takes the newest that is whole.  or_newest: so does a step that a
        run under way has deleted since it was found.
        Raises CheckpointError if there is no such step, or if it is damaged or of another shape.
        """
        if or_newest and not os.path.lexists(self._folders[step or 0]) and not distributed.several():
            step = None
        step = self._whole(step)
        try:
            return self._restore(step, abstract, partial=True), self._folders.read_json(step, "meta.json"), step
        except Exception as error:
            if os.path.lexists(self._folders[step]):
                raise
            if or_newest and not distributed.several():
                return self.restore_for_eval(abstract)
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._folders.root} was deleted while it was read: a run goes on "
                "there; the same command takes a newer one"
            ) from error

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of a step. Raises as `restore_for_eval` does."""
        return self._folders.read_json(self._whole(step), "meta.json")

    def newest_whole(self) -> int:
        """The newest step that is whole, which is not verified again. Raises CheckpointError if there is none."""
        step = self._newest_whole()
        if step is None:
            raise self._nothing_here()
        return step

    def saved_shapes(self, step: int) -> dict[str, str]:
        """`shapes` of the state of a step that is there."""
        with ocp.PyTreeCheckpointer() as checkpointer:
            return shapes(checkpointer.metadata(self._folders[step] / "state").item_metadata.tree)

    def _newest_whole(self) -> int | None:
        """Verified by process 0; the others take its word. Damaged steps stay in place if no step is whole."""
        found, seen, damaged = None, set[int](), []
        if jax.process_index() == 0:
            # A run under way may delete those that were listed, and have saved others by then.
            while found is None and (steps := [step for step in self.steps() if step not in seen]):
                step = steps[-1]
                seen.add(step)
                problem = self._folders.why_not(step)
                if problem is None:
                    found = step
                elif os.path.lexists(self._folders[step]):
                    damaged.append(step)
                    self._report(f"checkpoint of step {step} {problem}: trying the one before")
            if found is not None and not self._read_only:
                for step in damaged:
                    self._folders.set_aside(step)
        found, some = distributed.share([found, bool(damaged)])[0]
        if found is None and some:
            raise self._none_whole()
        if found is not None:
            self._folders.trust(found)
        return found

    def _whole(self, step: int | None) -> int:
        """A step that has been verified. Raises CheckpointError if there is no such one."""
        if step is None:
            return self.newest_whole()
        steps = self.steps()
        if not steps:
            raise self._nothing_here()
        if step not in steps:
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self._folders.root}; there is {', '.join(map(str, steps))}"
            )
        problem = self._folders.why_not(step)
        if problem:
            others = ", ".join(str(other) for other in steps if other != step) or "no other step"
            raise CheckpointError(f"the checkpoint of step {step} {problem}; there is {others}")
        self._folders.trust(step)
        return step

    def _nothing_here(self) -> CheckpointError:
        if not self._folders.workdir.is_dir():
            return CheckpointError(f"there is no work directory {self._folders.workdir}; give one that train.py wrote")
        return CheckpointError(f"there is no checkpoint in {self._folders.root}; train there first")

    def _none_whole(self) -> CheckpointError:
        return CheckpointError(
            f"no checkpoint in {self._folders.root} is whole; restore them from a copy, or start anew in another work "
            "directory"
        )

    def _restore(self, step: int, abstract: Any, partial: bool) -> Any:
        path = self._folders[step] / "state"
        abstract = jax.tree.map(_with_sharding, abstract)
        problem = difference(self.saved_shapes(step), shapes(abstract), partial)
        if problem:
            raise CheckpointError(f"the checkpoint of step {step} does not fit this model: {problem}")
        with ocp.PyTreeCheckpointer() as checkpointer:
            arguments = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=partial,
            )
            state = checkpointer.restore(path, args=arguments)
        held = int(getattr(state, "step", step))
        if held != step:  # of a checkpoint that is too old to say so itself
            raise CheckpointError(f"the checkpoint in {path.parent} is of step {held}: rename it, or move it away")
        return state


@contextlib.contextmanager
def _failures_of_a_disk() -> Iterator[None]:
    """Make an OSError of whatever Orbax raises while it writes: disks and networks have many words for a failure."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = io_failure(error) or shown(str(error).partition("\n")[0])
        raise OSError(reason) from error


def _new_checkpointer(compress: bool) -> ocp.AsyncCheckpointer:
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_handlers(), use_compression=compress)
    # If Orbax made folders in the background, and one could not be made, its threads would wait five minutes, and the
    # process for them.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(handler, async_options=options)


def _close(checkpointer: ocp.AsyncCheckpointer) -> None:
    """Free its threads. What it has to say of a save that failed has been said."""
    with contextlib.suppress(Exception):
        checkpointer.close()


def _handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """How arrays are written; what Orbax has for other kinds of leaves is of no use to a train state."""
    handler = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_LEAST_PART,
        array_metadata_store=ArrayMetadataStore(),  # holds the kinds of random keys
    )
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler))


@functools.cache
def _quieten() -> None:
    """Keep what Orbax and TensorStore print of a save that failed, pages of traceback, from a line's reader."""
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # of the arrays not begun yet
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # for which the other arrays of that save are too late
            others(unraisable)

    sys.unraisablehook = hook


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
