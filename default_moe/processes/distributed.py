"""Processes that train as one: how they find each other, agree, and end together.

A run of one process starts nothing of this: what others would say is then what it says itself. What processes tell each
other goes through the key-value store of JAX's coordinator, which lives in process 0, and never through a device.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import clusters  # which cluster this is
from jax._src.distributed import global_state  # the key-value store; there is no public way to either

from default_moe.errors import AnotherProcessFailed, ConfigError, TrainingFailed, shown, tell
from default_moe.processes.supervisor import go_on_in_child

_GONE = "another process is gone, or cannot be reached any more"
CONTINUES = "the same command in all processes continues from the last checkpoint"
_LOST = re.compile(r"gloo|nccl|connection|socket|UNAVAILABLE", re.IGNORECASE)
_UNTIL_MISSED = 30  # seconds without a sign of life after which a process counts as gone
_LONGEST_PAUSE = 0.2  # seconds between two looks at what others have said
_TO_UNWIND = 5.0  # seconds in which a process may end by itself after another has failed
_TO_HEAR = 10.0  # seconds that process 0, with which the store ends, waits for the others to have read it
_KEYS = "default_moe"
T = TypeVar("T")


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: int) -> None:
    """Join the other processes, if there are any. To be called before JAX's backend starts.

    coordinator ("HOST:PORT" of process 0), num_processes, process_id: all or none, in which case the processes are
    those of the TPU slice, SLURM step or Open MPI job that this one belongs to. Only num_processes=1 looks for none.
    seconds: how long to wait for them.
    Raises ConfigError if the arguments are not right. Exits with 2 if the others do not come.
    """
    global _processes
    cluster = None
    if coordinator is None and num_processes is None and process_id is None:
        cluster = _cluster()
        if cluster is None:
            return
    elif num_processes == 1 and coordinator is None and process_id is None:
        return
    else:
        _check(coordinator, num_processes, process_id)
    go_on_in_child(f"{_GONE}: {CONTINUES}")
    jax.config.update("jax_enable_preemption_service", False)  # until there is something to save
    clock = threading.Timer(seconds, _give_up, [seconds])
    clock.daemon = True
    clock.start()
    # While the runtime waits, no handler of Python's is called: Ctrl-C ends this process, of which its parent tells.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        # The runtime aborts when it has waited long enough, so it must not be the first.
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=cluster or "deactivate",
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=_UNTIL_MISSED,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"the processes cannot be joined ({reason}): give --coordinator, --num_processes and --process_id"
        ) from None
    finally:
        clock.cancel()
        signal.signal(signal.SIGINT, handler)
    _processes = _Processes(global_state.client, global_state.process_id, global_state.num_processes)


def several() -> bool:
    """Whether this is one of several processes."""
    return _processes is not None


def process_index() -> int:
    """The number of this process. Unlike jax.process_index it starts no backend."""
    return _processes.index if _processes else 0


def share(value: T) -> list[T]:
    """The `value` of every process, by number. All must call it at the same points, each in its main thread.

    value: of JSON's types. Waits for the others as long as it takes.
    Raises AnotherProcessFailed if one of them has failed before it came here.
    """
    return _processes.share(value) if _processes else [value]


def wait_for_all() -> None:
    """Returns when all processes have come here. Raises as `share` does."""
    share(None)


def in_turn(prepare: Callable[[], T]) -> T:
    """`prepare()`, first only in process 0, then in the others, which may find what it has left on a shared disk."""
    if process_index() > 0:
        wait_for_all()
    result = prepare()
    if process_index() == 0:
        wait_for_all()
    wait_for_all()
    return result


def check_same(values: Mapping[str, Any], advice: str) -> None:
    """Raises ConfigError in all processes if a value, of JSON's types, is not the same in all of them."""
    everywhere = share(dict(values))
    first, differences = everywhere[0], []
    for index, other in enumerate(everywhere):
        for name in [*first, *(name for name in other if name not in first)]:
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                differences.append(f"{name} is {ours} in process 0 but {theirs} in process {index}")
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ConfigError(f"{'; '.join(differences[:5])}{more}: {advice}")


def check_same_start(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError in all processes unless all were started with the same settings, code and version of JAX."""
    if several():
        check_same({**settings, **_program()}, "start the same in every process")


def listen_for_sigterm() -> None:
    """From now on SIGTERM ends no process, but is what `multihost_utils.reached_preemption_sync_point` tells of."""
    jax.config.update("jax_enable_preemption_service", True)
    global_state.initialize_preemption_sync_manager()


def fail(message: str, code: int, until_heard: bool = True) -> NoReturn:
    """End this process with a line and exit code, and with the same all others: there must be others.

    until_heard: whether process 0, with which the key-value store ends, waits for the others to have read it.
    """
    assert _processes
    line = f"process {_processes.index}: {message}"
    with contextlib.suppress(Exception):  # without a coordinator nobody is there to be told
        _processes.tell("failed", json.dumps([line, code]))
    _processes.end(line, code, until_heard)


def fail_after(error: BaseException) -> NoReturn:
    """End all processes after an error that may come of another's end, or else is a bug and gets a traceback."""
    assert _processes
    try:
        _processes.look()
    except AnotherProcessFailed:
        end_after_another()
    except jax.errors.JaxRuntimeError:
        pass  # process 0 is gone, and with it the key-value store
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, (ValueError, jax.errors.JaxRuntimeError)) and _LOST.search(reason):
        fail(f"{_GONE} ({reason[:200]}): {CONTINUES}", 1, until_heard=False)
    traceback.print_exception(error)
    fail(f"{type(error).__name__}: {reason}", 1)


def end_after_another() -> NoReturn:
    """End this process with the line and the exit code of the one that failed."""
    assert _processes and _processes.failure
    _processes.end(*_processes.failure)


def finish() -> None:
    """Returns when all processes have done their work. Raises as `share` does."""
    if _processes:
        wait_for_all()
        _processes.stop()
        # Together: a process that is left when the first one has gone takes that for a failure.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()


class _Processes:
    """The link to the other processes. failure: line and exit code of one that failed, once this one knows."""

    def __init__(self, client: Any, index: int, count: int):
        self.index = index
        self.failure: tuple[str, int] | None = None
        self._client, self._count, self._round = client, count, 0
        self._ending = threading.Lock()
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="other processes", daemon=True)
        self._watcher.start()

    def share(self, value: Any) -> list[Any]:
        topic, pause = f"round_{self._round}", 0.001
        self.tell(topic, json.dumps(value))
        while len(said := self._said(topic)) < self._count:
            if self.failure:
                raise AnotherProcessFailed(*self.failure)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        if self._round:  # all are here, so all have read the round before
            self._client.key_value_delete(f"{_KEYS}/round_{self._round - 1}/{self.index}")
        self._round += 1
        try:
            return [json.loads(said[index]) for index in range(self._count)]
        except (ValueError, RecursionError):
            raise TrainingFailed(
                f"another process, or a stranger on the coordinator's port, said: {shown(said)}"
            ) from None

    def tell(self, topic: str, text: str) -> None:
        self._client.key_value_set(f"{_KEYS}/{topic}/{self.index}", text)

    def look(self) -> None:
        """Raises AnotherProcessFailed if one has."""
        others = {index: text for index, text in self._said("failed").items() if index != self.index}
        if others:
            index = min(others)
            try:
                line, code = json.loads(others[index])
            except (ValueError, TypeError, RecursionError):
                line, code = others[index], 1
            # Whoever reaches the port can write there: no text is trusted, and nothing makes a failure a success.
            code = code if type(code) is int and 0 < code < 256 else 1
            self.failure = shown(line, 2000), code
            raise AnotherProcessFailed(*self.failure)

    def end(self, line: str, code: int, until_heard: bool = True) -> NoReturn:
        """Exit, whatever other threads or the device wait for."""
        self._ending.acquire()  # whoever comes first
        tell(f"error: {line}")
        with contextlib.suppress(Exception):  # the coordinator may be gone
            sys.stdout.flush()
            self.tell("ended", "")
            last = time.monotonic() + (_TO_HEAR if until_heard and self.index == 0 else 0)
            while time.monotonic() < last and len(self._said("ended")) < self._count:
                time.sleep(_LONGEST_PAUSE)
        os._exit(code)

    def stop(self) -> None:
        self._stopped.set()
        self._watcher.join()

    def _said(self, topic: str) -> dict[int, str]:
        found = {key.rsplit("/", 1)[1]: text for key, text in self._client.key_value_dir_get(f"{_KEYS}/{topic}/")}
        return {index: found[str(index)] for index in range(self._count) if str(index) in found}

    def _watch(self) -> None:
        """Ends this process some time after another has failed: it may wait for that one in a computation."""
        try:
            while not self._stopped.wait(1.0):
                self.look()
        except AnotherProcessFailed as error:
            if not self._stopped.wait(_TO_UNWIND):
                self.end(str(error), error.code)
        except jax.errors.JaxRuntimeError:  # the coordinator is gone, and the runtime ends this process
            pass


_processes: _Processes | None = None


def _program() -> dict[str, str]:
    """JAX's version, and a digest of this package's code."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return {"the version of jax": jax.__version__, "the code (its digest)": digest.hexdigest()[:12]}


def _cluster() -> str | None:
    """JAX's name of the kind of cluster in which this process has others; None if it has none."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # not set by a job that merely was given several tasks
        return "slurm"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi"
    for tpus in (clusters.GkeTpuCluster, clusters.GceTpuCluster):  # both False at once where there is no TPU
        if tpus.is_env_present() and tpus.get_process_count() > 1:
            return tpus.name
    return None


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises ConfigError if flags are missing or cannot be right."""
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        given = ", ".join(name for name in flags if name not in missing)
        raise ConfigError(f"{given} must come with {' and '.join(missing)}: the three go together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator is {coordinator!r}, but must be HOST:PORT, 10.0.0.1:8476 for instance")
    if num_processes < 1:
        raise ConfigError(f"--num_processes is {num_processes}, but must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id is {process_id}, but must lie between 0 and --num_processes - 1")
    if process_id == 0 and not _is_free(int(port)):
        raise ConfigError(f"--coordinator: port {port} is in use on this host: choose another in all processes")


def _is_free(port: int) -> bool:
    """Whether the coordinator can listen there: it crashes if it cannot."""
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError:
        return False
    return True


def _give_up(seconds: int) -> NoReturn:
    tell(
        f"error: the {global_state.num_processes} processes did not all meet at {global_state.coordinator_address} "
        f"within {seconds} s: check that process 0 runs there, that no firewall closes that port to the others, and "
        "that all were started"
    )
    os._exit(2)
