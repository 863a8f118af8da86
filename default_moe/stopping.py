"""Being asked to stop: SIGTERM and Ctrl-C end a run after the step under way, its state saved."""

import contextlib
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """While entered, notes a SIGTERM or Ctrl-C instead of dying; a Ctrl-C after that interrupts at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 0 after SIGTERM (all is saved), 130 after Ctrl-C, 0 without either."""
        return 130 if self._signal == signal.SIGINT else 0

    def received(self) -> bool:
        """Whether any process was asked to stop; the same answer in all of them."""
        return any_process(self._signal != 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._signal:
            raise KeyboardInterrupt
        self._signal = number
        name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # where it interrupts another print to the same stream
            print(f"{name} received: the step under way is finished and saved", file=sys.stderr, flush=True)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process. With several, all must call this at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
