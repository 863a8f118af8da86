"""Timing things against each other, on machines that are shared and noisy."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

_Key = TypeVar("_Key", bound=Hashable)

# What takes longer than this is timed less often.
_SLOW_SECONDS = 1.0
_SLOW_ROUNDS = 3
_CALLED_AT_A_TIME = 4  # more would need memory for what each of them makes
# A sample is about this long: functions that are quicker are called several times in it. Hearing that an accelerator is
# done can take a millisecond.
_CPU_SAMPLE_SECONDS, _ACCELERATOR_SAMPLE_SECONDS = 2e-3, 5e-2


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each of several calls, in the order of the rounds."""

    samples: list[float]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    def ratio_to(self, other: "Timing") -> tuple[float, float, float]:
        """Return median, lower and upper quartile of this time over the other's, round by round."""
        ratios = [a / b for a, b in zip(self.samples, other.samples, strict=False)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high

    def versus(self, other: "Timing", name: str) -> dict[str, Any]:
        """Return that ratio as columns of a table."""
        middle, low, high = self.ratio_to(other)
        return {name: middle, "quartiles": f"{low:.3f}-{high:.3f}"}


def call_once(functions: Mapping[_Key, Callable[[], Any]]) -> dict[_Key, BaseException]:
    """Call each function, some at a time, since most of the time goes into compiling. Return what those raised."""

    def call(function: Callable[[], Any]) -> None:
        jax.block_until_ready(function())

    with ThreadPoolExecutor(_CALLED_AT_A_TIME) as pool:
        calls = {name: pool.submit(call, function) for name, function in functions.items()}
    return {name: error for name, called in calls.items() if (error := called.exception())}


def one_line(error: BaseException) -> str:
    """Return what a kernel, a compiler or a library raised in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def time_alternately(functions: Mapping[_Key, Callable[[], Any]], rounds: int) -> dict[_Key, Timing]:
    """Time each function once a round, so that what slows the machine slows all of them alike.

    Every other round goes backwards, so that no function always follows the same one. Each is called first, which
    compiles it and wakes the device. What takes over a second is timed in 3 rounds only. Each function returns what
    `jax.block_until_ready` waits for.
    """
    calls, limit = {}, {}
    sample_seconds = _CPU_SAMPLE_SECONDS if jax.default_backend() == "cpu" else _ACCELERATOR_SAMPLE_SECONDS
    for name, function in functions.items():
        jax.block_until_ready(function())
        seconds = _seconds(function, 1)
        if seconds < sample_seconds:
            seconds = _seconds(function, int(sample_seconds / seconds))  # with less of the wait in it
        calls[name] = max(1, round(sample_seconds / seconds))
        limit[name] = rounds if seconds < _SLOW_SECONDS else min(rounds, _SLOW_ROUNDS)
    samples: dict[_Key, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        names = list(functions)[:: 1 if index % 2 == 0 else -1]
        for name in names:
            if index < limit[name]:
                samples[name].append(_seconds(functions[name], calls[name]))
    return {name: Timing(values) for name, values in samples.items()}


def _seconds(function: Callable[[], Any], calls: int) -> float:
    """Return the seconds of one call, the mean over `calls` that are waited for together."""
    began = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / calls
