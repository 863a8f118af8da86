"""What the time of a profiled step goes to: the device's kernels, those that take longest first."""

import collections
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from default_moe.bench.report import Row

COLUMNS = ("kernel", "ms", "share", "calls")
_SHOWN = 16


def kernel_times(folder: Path) -> list[Row]:
    """Return a row of each of the first kernels of the newest profile in `folder`, and one of all others.

    share: of the time that all of them take, one after another. Kernels that differ only by a number count as one.
    None are found where the platform's profiler is not there.
    """
    profiles = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not profiles:
        return []
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for events in _events(ProfileData.from_file(str(profiles[-1]))):
        for name, nanoseconds in _own_times(events):
            name = re.sub(r"([._]\d+)+$", "", name)
            seconds[name] += nanoseconds / 1e9
            calls[name] += 1
    found = sorted(seconds.items(), key=lambda item: -item[1])
    shown = [(name, time, calls[name]) for name, time in found[:_SHOWN]]
    if found[_SHOWN:]:
        rest = [name for name, _ in found[_SHOWN:]]
        shown.append((f"{len(rest)} others", sum(seconds[n] for n in rest), sum(calls[n] for n in rest)))
    whole = sum(seconds.values())
    return [{"kernel": n, "ms": time * 1e3, "share": time / whole, "calls": count} for n, time, count in shown]


def _events(profile: ProfileData) -> Iterator[list[Any]]:
    """Yield the kernels of each line of a profile: of a GPU's streams, a TPU's operations, a CPU's threads."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        yield from (list(line.events) for line in streams or lines if streams or line.name == "XLA Ops")
    for plane in planes if not devices else ():
        for line in plane.lines:
            yield [event for event in line.events if "hlo_op" in dict(event.stats)]


def _own_times(events: list[Any]) -> Iterator[tuple[str, float]]:
    """Yield name and nanoseconds of each event of a line, without those within it, as a loop has its body's.

    Events that only overlap, as kernels of one stream may, keep all of their time.
    """
    under_way: list[list[Any]] = []  # of events, each within the one before: name, end, own time
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        end = event.start_ns + event.duration_ns
        while under_way and under_way[-1][1] < end:
            name, _, own = under_way.pop()
            yield name, own
        if under_way:
            under_way[-1][2] -= event.duration_ns
        under_way.append([event.name, end, event.duration_ns])
    for name, _, own in under_way:
        yield name, own
