"""Being asked to stop: SIGTERM, Ctrl-C and what schedulers send end a run after the step under way, its state saved.

With several processes JAX's runtime takes SIGTERM, tells all of them, and finds a step after which all can stop.
"""

import os
import signal
from types import FrameType
from typing import Any, Self

from jax.experimental import multihost_utils

from default_moe.errors import tell
from default_moe.processes import distributed

# SIGHUP: the terminal is gone. SIGUSR1: SLURM's --signal and submitit, before a job's time is over.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """While entered, notes one of `SIGNALS` instead of dying; a Ctrl-C after that interrupts at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if distributed.several():
            distributed.listen_for_sigterm()  # a handler of Python's would take its place
        for number in SIGNALS:
            taken = number == signal.SIGTERM and distributed.several()
            if not taken and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 130 after Ctrl-C, else 0 (all is saved)."""
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
