"""Being asked to stop: SIGTERM and Ctrl-C end a run after the step under way, its state saved.

With several processes JAX's runtime takes SIGTERM, tells all of them, and finds a step after which all can stop.
"""

import os
import signal
from types import FrameType
from typing import Any, Self

from jax.experimental import multihost_utils

from default_moe.errors import tell
from default_moe.processes import distributed


class StopRequest:
    """While entered, notes a SIGTERM or Ctrl-C instead of dying; a Ctrl-C after that interrupts at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if distributed.several():
            distributed.listen_for_sigterm()  # a handler of Python's would take its place
        for number in (signal.SIGINT,) if distributed.several() else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 0 after SIGTERM (all is saved), 130 after Ctrl-C, 0 without either."""
        return 130 if self._signal == signal.SIGINT else 0

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signal != 0

    def received(self) -> bool:
        """Whether to stop, since a process was asked to; the same answer in all. To be asked after each step."""
        if not distributed.several():
            return self.requested
        # The runtime counts from 0, whatever step a run continues from: it knows no other before the first call.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._signal:
            raise KeyboardInterrupt
        self._signal = number
        if distributed.several():
            os.kill(os.getpid(), signal.SIGTERM)
        name = signal.Signals(number).name
        tell(f"{name} received: the step under way is finished and saved")
