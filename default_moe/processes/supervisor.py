"""A process that waits for another, which JAX's runtime may end: no Python in that process has a say in it.

When one of several processes has lost the others, the runtime prints a stack trace and aborts: the parent says in one
line why. When a driver crashes in one run of many, the parent starts another process for the rest.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from default_moe.errors import printable

_PR_SET_PDEATHSIG = 1
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_HEARD = (*_PASSED_ON, signal.SIGTSTP, signal.SIGCHLD)
_RUNTIME = re.compile(rb"[WEF]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)")


def go_on_in_child(if_aborted: str) -> None:
    """Fork, and return in the child, which dies with its parent. The parent passes signals on and exits as it does.

    if_aborted: printed after "error: " where the child loses the other processes. To be called before JAX's backend
    starts.
    """
    reader, writer = os.pipe()
    child = _fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, sys.stderr.fileno())
        os.close(writer)
        return
    os.close(writer)
    with os.fdopen(reader, "rb") as lines, ThreadPoolExecutor(1) as reading:
        showing = reading.submit(_show, lines)
        code, _ = _wait(child)
        explained, runtime = showing.result()
    if code == -signal.SIGINT:
        code, explained = 128 + signal.SIGINT, True
        _print([b"error: interrupted before the run began\n"])
    if not explained and runtime and code == -signal.SIGABRT:
        _print([f"error: {if_aborted}\n".encode()])
    elif not explained:
        _print(runtime)
        if code < 0:
            _print([f"error: the process was ended by {signal.Signals(-code).name}\n".encode()])
    os._exit(code if code >= 0 else 1)


def go_on_in_children(progress: Callable[[], object]) -> None:
    """Fork, and return in the child. One that crashes is replaced by another, as long as each gets further.

    progress: compared between the start of a child and its end. To be called before JAX's backend starts. The parent
    passes signals on, after which it starts no other child, and exits as the last child does.
    """
    while True:
        before = progress()
        handlers = {number: signal.getsignal(number) for number in _HEARD}
        child = _fork()
        if child == 0:
            return
        code, told = _wait(child)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if code >= 0 or -code in told:
            os._exit(code if code >= 0 else 128 - code)
        ended_by = f"the process was ended by {signal.Signals(-code).name}"
        if told or progress() == before:
            _print([f"error: {ended_by}\n".encode()])
            os._exit(1)
        _print([f"{ended_by}: another goes on\n".encode()])


def _fork() -> int:
    """0 in the child, which dies with its parent. To the parent signals come when it can pass them on."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches it through its parent, once
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # and it may write to the terminal all the same
        with contextlib.suppress(AttributeError):  # only Linux has it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return child


def _wait(child: int) -> tuple[int, list[int]]:
    """The exit code of `child`, and the signals that came until then, each passed on as it came.

    Handlers stay: what the child said last may have to be waited for.
    """
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        told.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    def pause(number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: both stop, until this process is told to continue."""
        del number, frame
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(child, signal.SIGCONT)

    heard = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup asks for
    handlers = {**dict.fromkeys(heard, pass_on), signal.SIGTSTP: pause, signal.SIGCHLD: lambda number, frame: None}
    # Python runs a handler between two calls: a signal that comes just before `waitpid` would be seen when it returns.
    # The byte that each signal writes lets `read` return, whenever it comes.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        os.read(reader, 1)
    signal.set_wakeup_fd(other)
    os.close(reader)
    os.close(writer)
    return os.waitstatus_to_exitcode(ended[1]), told


def _show(lines: Iterable[bytes]) -> tuple[bool, list[bytes]]:
    """Print what the child prints, up to the first line with which the runtime tells that it has lost the others.

    Returns whether there was a line "error: ...", wherever it stood, and the lines held back.
    """
    explained = False
    held: list[bytes] = []
    for line in lines:
        error = line.startswith(b"error: ")
        explained |= error
        if not error and (held or _RUNTIME.match(line)):
            held.append(line)
        else:
            _print([line])
    return explained, held


def _print(lines: list[bytes]) -> None:
    """Print what a child or its runtime said, which may hold anything: others can reach its port."""
    with contextlib.suppress(OSError):  # the child goes on, whether it is heard or not
        sys.stderr.write("".join(printable(line.decode(errors="backslashreplace")) for line in lines))
        sys.stderr.flush()
