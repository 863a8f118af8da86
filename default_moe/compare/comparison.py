"""Runs held against the baseline: who wins, by how much, with what certainty."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from default_moe.compare.matrix import Candidate, Entry, Settings
from default_moe.compare.runs import Result
from default_moe.compare.statistics import Curve, Paired, holm, mean_curve, paired, standard_error, tokens_to_reach
from default_moe.config import Config

FEWEST_SEEDS = 4  # for a sentence about better or worse


@dataclass(frozen=True)
class Row:
    """A candidate in a task.

    results: by seed.  loss, standard_error: held-out, nats per token, after all training, over seeds.
    Against the baseline, over the seeds that both have:
      difference: in held-out loss.
      tokens_to_target: by seed, training tokens to reach the baseline's final held-out loss of that seed, in multiples
        of those that the baseline took; infinity where it is not reached.  tokens_to_target_of_means: of the curves
        averaged over seeds.
      speed: tokens per second in multiples of the baseline's, median over seeds; None if not known.
      flops: of training, per token, in multiples of the baseline's, mean over seeds.
    None in the baseline's own row, and where no seed is shared.
    corrected_p: `difference.p`, corrected for all methods and tasks that are held against a baseline; None if there
      is none, and in rows that are not their method's best.
    missing: how many of its runs have no result, for they diverged.
    best: whether its mean loss is the method's lowest in this task, among those with the fewest runs missing.
    """

    candidate: Candidate
    results: Mapping[int, Result]
    loss: float
    standard_error: float | None
    difference: Paired | None
    tokens_to_target: Mapping[int, float] | None
    tokens_to_target_of_means: float | None
    speed: float | None
    flops: float | None
    missing: int
    best: bool
    corrected_p: float | None = None

    @property
    def curve(self) -> Curve:
        """Held-out loss, averaged over seeds."""
        return mean_curve([result.held_out for result in self.results.values()])

    @property
    def median_tokens_to_target(self) -> float | None:
        return float(np.median(list(self.tokens_to_target.values()))) if self.tokens_to_target else None

    @property
    def tokens_per_second(self) -> float | None:
        """Return the median over seeds; None if not known."""
        speeds = [result.tokens_per_second for result in self.results.values() if result.tokens_per_second]
        return float(np.median(speeds)) if speeds else None

    def mean_of(self, name: str) -> float:
        """Return the mean of a field of the results, over seeds."""
        return self.mean_of_seeds(name, self.results)

    def mean_of_seeds(self, name: str, seeds: Iterable[int]) -> float:
        """Return the same over some seeds."""
        return float(np.mean([getattr(self.results[seed], name) for seed in seeds]))


@dataclass(frozen=True)
class Task:
    """Candidates that learnt the same.

    config: of one of the baseline's runs.  baseline: the baseline method's best row; it comes first.
    without: methods of which no run has a result.
    """

    settings: Settings
    config: Config
    rows: tuple[Row, ...]
    without: tuple[str, ...]

    @property
    def baseline(self) -> Row:
        return self.rows[0]

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings)

    @property
    def contenders(self) -> list[Row]:
        """The best row of every other method."""
        return [row for row in self.rows if row.best and row.candidate.method != self.baseline.candidate.method]


def compare(entries: Sequence[Entry], results: Mapping[str, Result], baseline: str) -> list[Task]:
    """The tasks in which the baseline has a result.

    results: by folder, those that there are.
    """
    of_tasks: dict[Settings, list[Entry]] = {}
    for entry in entries:
        of_tasks.setdefault(entry.task, []).append(entry)
    tasks = [
        _task(settings, of_task, results, baseline)
        for settings, of_task in of_tasks.items()
        if any(entry.candidate.method == baseline and entry.folder in results for entry in of_task)
    ]
    ps = [row.difference.p for task in tasks for row in task.contenders if row.difference]
    corrected = iter(holm([p for p in ps if p is not None]))

    def judged(task: Task) -> Task:
        known = [row for row in task.contenders if row.difference and row.difference.p is not None]
        rows = (dataclasses.replace(row, corrected_p=next(corrected)) if row in known else row for row in task.rows)
        return dataclasses.replace(task, rows=tuple(rows))

    return [judged(task) for task in tasks]


def _task(settings: Settings, entries: Sequence[Entry], results: Mapping[str, Result], baseline: str) -> Task:
    runs: dict[Candidate, dict[int, Result]] = {}
    missing: collections.Counter[Candidate] = collections.Counter()
    for entry in entries:
        if entry.folder in results:
            runs.setdefault(entry.candidate, {})[entry.seed] = results[entry.folder]
        else:
            missing[entry.candidate] += 1

    def rank(candidate: Candidate) -> tuple[int, float]:
        return missing[candidate], float(np.mean([result.held_out.final for result in runs[candidate].values()]))

    methods = dict.fromkeys(candidate.method for candidate in runs)
    best = {method: min((c for c in runs if c.method == method), key=rank) for method in methods}
    reference = best[baseline]
    rows = [
        _row(candidate, reference, runs, missing[candidate], candidate == best[candidate.method])
        for candidate in sorted(runs, key=lambda candidate: candidate != reference)
    ]
    config = next(entry.config for entry in entries if entry.candidate == reference)
    without = dict.fromkeys(entry.candidate.method for entry in entries if entry.candidate.method not in methods)
    return Task(settings, config, tuple(rows), tuple(without))


def _row(
    candidate: Candidate,
    reference: Candidate,
    runs: Mapping[Candidate, Mapping[int, Result]],
    missing: int,
    best: bool,
) -> Row:
    results, baseline = runs[candidate], runs[reference]
    losses = [result.held_out.final for result in results.values()]
    seeds = [seed for seed in results if seed in baseline] if candidate != reference else []
    difference = tokens = of_means = speed = flops = None
    if seeds:
        ours, theirs = [results[seed] for seed in seeds], [baseline[seed] for seed in seeds]
        difference = paired([r.held_out.final for r in ours], [r.held_out.final for r in theirs])
        tokens = {seed: _tokens_to_target(results[seed].held_out, baseline[seed].held_out) for seed in seeds}
        of_means = _tokens_to_target(mean_curve([r.held_out for r in ours]), mean_curve([r.held_out for r in theirs]))
        speeds = [(a.tokens_per_second, b.tokens_per_second) for a, b in zip(ours, theirs, strict=True)]
        ratios = [a / b for a, b in speeds if a and b]
        speed = float(np.median(ratios)) if ratios else None
        flops = float(np.mean([a.flops_per_token / b.flops_per_token for a, b in zip(ours, theirs, strict=True)]))
    mean, error = float(np.mean(losses)), standard_error(losses)
    return Row(candidate, results, mean, error, difference, tokens, of_means, speed, flops, missing, best)


def _tokens_to_target(curve: Curve, baseline: Curve) -> float:
    return tokens_to_reach(curve, baseline.final) / tokens_to_reach(baseline, baseline.final)


def _unequal(row: Row, baseline: Row) -> str:
    """Return a sentence if they do not run equally many experts per token, or do not compute equally much."""
    ours, theirs = (of.mean_of("experts_per_token") for of in (row, baseline))
    if abs(ours - theirs) > 0.05 * theirs:
        return (
            f" It runs {ours:.2f} experts per token, {baseline.candidate} {theirs:.2f}: the computation is not equal."
        )
    if row.flops is not None and abs(row.flops - 1) > 0.05:
        of = f"{row.flops:.2f} times the FLOPs of {baseline.candidate}"
        return f" Its training takes {of}: the computation is not equal."
    return ""


def conclusions(task: Task) -> list[str]:
    """For each other method, one sentence about what may be concluded, and nothing that may not."""
    nothing = [f"{method}: every run failed." for method in task.without]
    return [*(_conclusion(row, task.baseline) for row in task.contenders), *nothing]


def _conclusion(row: Row, baseline: Row) -> str:
    difference, name, other = row.difference, row.candidate, baseline.candidate
    lost = [
        f"{r.missing} of the {r.missing + len(r.results)} runs of {r.candidate}" for r in (row, baseline) if r.missing
    ]
    failed = f" {' and '.join(lost)} failed and are left out, which may flatter." if lost else ""
    if difference is None:
        return f"{name}: no seed has come to its end with {other} too, so nothing can be concluded.{failed}"
    seeds = f"{difference.lower} of {difference.count} seeds"
    failed = _unequal(row, baseline) + failed
    if difference.count < FEWEST_SEEDS or difference.low is None or difference.high is None or row.corrected_p is None:
        return (
            f"{name} differs from {other} by {difference.mean:+.4f}, lower on {seeds}: fewer than {FEWEST_SEEDS} "
            f"seeds decide nothing.{failed}"
        )
    interval = f"{difference.mean:+.4f} nats per token, 95 % interval {difference.low:+.4f} to {difference.high:+.4f}"
    if row.corrected_p >= 0.05:
        return f"{name} cannot be told from {other}: {interval}, lower on {seeds}.{failed}"
    if difference.mean > 0:
        return f"{name} ends with a higher held-out loss than {other}: {interval}, lower on {seeds}.{failed}"
    tokens = row.median_tokens_to_target
    assert tokens is not None
    reach = (
        f"it reaches the final loss of {other} with {tokens:.2f} of its tokens (median)"
        if math.isfinite(tokens)
        else f"but on half of the seeds or more it does not reach the final loss of {other}"
    )
    return f"{name} ends with a lower held-out loss than {other}: {interval}, lower on {seeds}; {reach}.{failed}"
