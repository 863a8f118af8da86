"""A process that waits for another and says in one line why it ended, where JAX's runtime would abort it.

When a process of several has lost the others, the runtime prints a stack trace and aborts: no Python in that process
has a say in it.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterable
from types import FrameType

_PR_SET_PDEATHSIG = 1
_RUNTIME = re.compile(rb"[WEF]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)")


def go_on_in_child(if_aborted: str) -> None:
    """Fork, and return in the child, which dies with its parent. The parent passes signals on and exits as it does.

    if_aborted: printed after "error: " where the child loses the other processes. To be called before JAX's backend
    starts.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, sys.stderr.fileno())
        os.close(writer)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches it through its parent, once
        with contextlib.suppress(AttributeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    os.close(writer)

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    with os.fdopen(reader, "rb") as lines:
        explained, runtime = _show(lines)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not explained and runtime and code == -signal.SIGABRT:
        _print([f"error: {if_aborted}\n".encode()])
    elif not explained:
        _print(runtime)
        if code < 0:
            _print([f"error: the process was ended by {signal.Signals(-code).name}\n".encode()])
    os._exit(code if code >= 0 else 1)


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
    sys.stderr.buffer.writelines(lines)
    sys.stderr.buffer.flush()
