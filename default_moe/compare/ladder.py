"""A ladder: the same comparison on several scales, and how much compute a method is worth.

A rung is a task of its own: settings that scale width, depth and tokens together. Over the rungs a line is fitted for
each method and seed, log loss over the logarithm of the floating-point operations of the whole training. It is good
between the rungs only. The form with a floor, a + b C^-c, has one more number to fit; a few rungs are too few for it.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from default_moe.compare.comparison import FEWEST_SEEDS, Row, Task
from default_moe.compare.compute import training_flops_per_token
from default_moe.compare.matrix import FEWEST_RUNGS, Entry, Settings
from default_moe.compare.recovered import Recovered, recovered
from default_moe.compare.statistics import Estimate, Line, fit_line, paired
from default_moe.errors import check


@dataclass(frozen=True)
class Climb:
    """A method on a ladder.

    rows: its best of each rung.  lines: by seed, of those that have a result on every rung.
    speed_ups: for each rung the compute at which the baseline's line has the baseline's loss of that rung, in multiples
      of that at which the method's line has it. None where that loss is not between those of the method's line on its
      first and last rung, and for the baseline.
    """

    method: str
    rows: tuple[Row, ...]
    lines: dict[int, Line]
    speed_ups: tuple[Estimate | None, ...] = ()

    def compute(self, rung: int) -> float:
        return self.rows[rung].mean_of_seeds("flops", self.lines)

    @property
    def line(self) -> Line:
        """The mean over seeds."""
        return Line(
            *(float(np.mean([getattr(line, n) for line in self.lines.values()])) for n in ("intercept", "slope"))
        )

    @property
    def misfit(self) -> float:
        """How far losses, geometric means over seeds, are from the line where that is most, as a share of them."""
        return max(
            math.exp(abs(np.mean([math.log(row.results[seed].loss / self.line.loss(compute)) for seed in self.lines])))
            - 1
            for row, compute in zip(self.rows, map(self.compute, range(len(self.rows))), strict=True)
        )


@dataclass(frozen=True)
class Ladder:
    """settings: of its tasks, without those of rungs.  tasks: its rungs, from the least compute of the baseline on.

    climbs: of each method that has a seed with a result on every rung, the baseline first.
    recovered: from losses averaged over the rungs, seed by seed.
    """

    settings: Settings
    tasks: tuple[Task, ...]
    climbs: tuple[Climb, ...]
    recovered: Recovered | None


def check_rungs(entries: Sequence[Entry], names: Collection[str]) -> None:
    """Raises ConfigError if two rungs take nearly the same compute: no line can be fitted over that."""
    computes: dict[Settings, float] = {}
    for entry in entries:
        rung = tuple(item for item in entry.task if item[0] in names)
        if rung not in computes:
            train = entry.config.train
            tokens = train.num_steps * train.batch_size * train.sequence_length
            computes[rung] = tokens * training_flops_per_token(
                entry.config, entry.config.model.vocab_size or 256, math.nan
            )
    ordered = sorted(computes.items(), key=lambda item: item[1])
    for (one, less), (other, more) in itertools.pairwise(ordered):
        check(
            more > 1.05 * less,
            f"--rungs has {_named(one)} and {_named(other)}, which take nearly the same operations: scale width, depth "
            "or tokens",
        )


def _named(rung: Settings) -> str:
    return ":".join(f"{name}={value}" for name, value in rung)


def ladders(tasks: Sequence[Task], names: Collection[str]) -> list[Ladder]:
    """Those of which the baseline has climbed at least three rungs.

    names: of the settings that differ between rungs.
    """
    groups: dict[Settings, list[Task]] = {}
    for task in tasks:
        rest = tuple(item for item in task.settings if item[0] not in names)
        groups.setdefault(rest, []).append(task)
    found = [_ladder(settings, group) for settings, group in groups.items() if len(group) >= FEWEST_RUNGS]
    return [ladder for ladder in found if ladder]


def _ladder(settings: Settings, tasks: Sequence[Task]) -> Ladder | None:
    tasks = sorted(tasks, key=lambda task: task.baseline.mean_of("flops"))
    baseline = _climb([task.baseline for task in tasks])
    if not baseline.lines:
        return None
    climbs = [baseline]
    for method in dict.fromkeys(row.candidate.method for row in tasks[0].contenders):
        rows = [next((r for r in task.contenders if r.candidate.method == method), None) for task in tasks]
        climb = _climb([row for row in rows if row])
        if None not in rows and climb.lines:
            climbs.append(dataclasses.replace(climb, speed_ups=_speed_ups(climb, baseline)))
    losses = {
        climb.method: {seed: float(np.mean([row.results[seed].loss for row in climb.rows])) for seed in climb.lines}
        for climb in climbs
    }
    return Ladder(settings, tuple(tasks), tuple(climbs), recovered(losses, baseline.method))


def _climb(rows: Sequence[Row]) -> Climb:
    seeds = [seed for seed in rows[0].results if all(seed in row.results for row in rows)] if rows else []
    lines = {}
    for seed in seeds:
        results = [row.results[seed] for row in rows]
        lines[seed] = fit_line([r.flops for r in results], [r.loss for r in results])
    return Climb(rows[0].candidate.method if rows else "", tuple(rows), lines)


def _speed_ups(climb: Climb, baseline: Climb) -> tuple[Estimate | None, ...]:
    seeds = [seed for seed in climb.lines if seed in baseline.lines]
    if not seeds or any(of.lines[seed].slope >= 0 for seed in seeds for of in (climb, baseline)):
        return (None,) * len(baseline.rows)
    most, least = (climb.line.loss(climb.compute(rung)) for rung in (0, -1))
    found: list[Estimate | None] = []
    for rung in range(len(baseline.rows)):
        compute = baseline.compute(rung)
        if not least <= baseline.line.loss(compute) <= most:
            found.append(None)
            continue
        logs = [math.log(compute) - climb.lines[seed].log_compute(baseline.lines[seed].loss(compute)) for seed in seeds]
        of_logs = paired(logs, [0.0] * len(logs))
        low, high = (None if end is None else math.exp(end) for end in (of_logs.low, of_logs.high))
        found.append(Estimate(math.exp(of_logs.mean), low, high))
    return tuple(found)


def markdown(ladders: Sequence[Ladder]) -> list[str]:
    """Lines of the report: a table per ladder, and what it says of the exact gradient."""
    lines: list[str] = []
    for ladder in ladders:
        name = ", ".join(f"{name}={value}" for name, value in ladder.settings)
        baseline = ladder.climbs[0]
        losses = [baseline.line.loss(baseline.compute(rung)) for rung in range(len(ladder.tasks))]
        lines += ["", f"## Ladder{f', {name}' if name else ''}", "", _explanation(ladder), ""]
        columns = ["", "seeds", "loss falls as compute to the power", *(f"speed-up at {loss:.4f}" for loss in losses)]
        rows = [columns, ["---"] * len(columns), *(_cells(climb) for climb in ladder.climbs)]
        lines += ["| " + " | ".join(cells) + " |" for cells in rows]
        few = min(len(climb.lines) for climb in ladder.climbs) < FEWEST_SEEDS
        lines += ["", f"Fewer than {FEWEST_SEEDS} seeds decide nothing."] if few else []
        if ladder.recovered:
            lines += ["", *(f"Averaged over rungs: {text}" for text in ladder.recovered.sentences())]
        lines += ["", "![ladder](ladder.png)"]
    return lines


def as_json(ladders: Sequence[Ladder]) -> list[dict[str, Any]]:
    """Everything that is fitted."""
    return [
        {
            "settings": dict(ladder.settings),
            "rungs": [dict(task.settings) for task in ladder.tasks],
            "climbs": [
                {
                    "method": climb.method,
                    "compute": [climb.compute(rung) for rung in range(len(climb.rows))],
                    "loss": [row.mean_of_seeds("loss", climb.lines) for row in climb.rows],
                    "lines": {seed: dataclasses.asdict(line) for seed, line in climb.lines.items()},
                    "misfit": climb.misfit,
                    "speed_ups": [dataclasses.asdict(one) if one else None for one in climb.speed_ups],
                }
                for climb in ladder.climbs
            ],
            "recovered": dataclasses.asdict(ladder.recovered) if ladder.recovered else None,
        }
        for ladder in ladders
    ]


def _cells(climb: Climb) -> list[str]:
    cells = [climb.method, str(len(climb.lines)), f"{climb.line.slope:.4f}"]
    if not climb.speed_ups:
        return [*cells, *["-"] * len(climb.rows)]
    return [*cells, *(_speed_up(one) for one in climb.speed_ups)]


def _speed_up(one: Estimate | None) -> str:
    if one is None:
        return "outside"
    return f"{one.value:.3f}" + (f" ({one.low:.3f} to {one.high:.3f})" if one.low is not None else "")


def _explanation(ladder: Ladder) -> str:
    baseline, misfit = ladder.climbs[0].line, max(climb.misfit for climb in ladder.climbs)
    gap = max(
        abs(climb.line.loss(climb.compute(rung)) / baseline.loss(climb.compute(rung)) - 1)
        for climb in ladder.climbs
        for rung in range(len(climb.rows))
    )
    warning = " That is more than the lines differ: speed-ups tell little." if misfit > gap > 0 else ""
    return (
        f"{len(ladder.tasks)} rungs. For each seed a straight line is fitted to the logarithm of the final held-out "
        "loss over that of the FLOPs of the whole training; it holds between the rungs only. Mean losses lie within "
        f"{100 * misfit:.2g} % of the mean lines.{warning} Speed-up: the compute that the baseline takes to a loss, "
        "which is that of its line on a rung, in multiples of what the method takes to it; above 1 the method needs "
        "less. In brackets Student's 95 % interval over seeds, of logarithms. Outside: the method has no such loss "
        "between its rungs, or a line that does not fall."
    )
