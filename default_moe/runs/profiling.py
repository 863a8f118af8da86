"""A profile of some steps of a run: where their time goes. No failure to make one stops a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax

from default_moe.errors import shown
from default_moe.files import io_failure


class Profiler:
    """Profiles the given steps into a folder, for Perfetto and TensorBoard. What is under way at exit is written too.

    report: takes a line that says how to open the profile, or why there is none.

    With several processes only the first one makes one, of itself and its devices.
    """

    def __init__(self, steps: range, folder: Path, report: Callable[[str], None]):
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._folder = folder
        self._report = report
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self.stop(None)

    def begins(self, step: int) -> bool:
        """Whether to `start` before this step, the first of the steps that this start of the run does."""
        return step in self._steps and not self._running

    def ends(self, step: int, stopping: bool) -> bool:
        """Whether to `stop` after this step, which may be the last one of this start."""
        return self._running and (stopping or step == self._steps[-1])

    def start(self, step: int, state: Any) -> None:
        """Profile from `step` on. `state`, what the step before leaves, is waited for."""
        jax.block_until_ready(state)
        try:
            self._folder.mkdir(exist_ok=True)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running, self._steps = True, range(step, self._steps.stop)
        except Exception as error:  # whatever the profiler of a platform may raise
            self._give_up(error)

    def stop(self, state: Any) -> None:
        """Write the profile. `state`, what the last step leaves, is waited for."""
        jax.block_until_ready(state)
        first = self._steps[0]
        self._running, self._steps = False, range(0)
        try:
            jax.profiler.stop_trace()
            *_, trace = sorted(self._folder.glob("plugins/profile/*/perfetto_trace.json.gz"))
            self._report(
                f"profile of the steps from {first} on: open {trace} on https://ui.perfetto.dev, or `pip install "
                f"xprof` and `xprof --logdir={self._folder}`"
            )
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._steps = range(0)
        reason = io_failure(error) or shown(f"{type(error).__name__}: {error}")
        self._report(f"the profile cannot be written ({reason}): training continues without it")
