"""Runs held against the baseline: who wins, by how much, with what certainty."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from default_moe.compare.matrix import Candidate, Entry, Settings
from default_moe.compare.runs import Result
from default_moe.compare.statistics import Curve, Paired, mean_curve, paired, standard_error, tokens_to_reach
from default_moe.config import Config


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
    None in the baseline's own row, and where no seed is shared.
    best: whether its mean loss is the method's lowest in this task.
    """

    candidate: Candidate
    results: Mapping[int, Result]
    loss: float
    standard_error: float | None
    difference: Paired | None
    tokens_to_target: Mapping[int, float] | None
    tokens_to_target_of_means: float | None
    speed: float | None
    best: bool

    @property
    def curve(self) -> Curve:
        """Held-out loss, averaged over seeds."""
        return mean_curve([result.held_out for result in self.results.values()])

    @property
    def median_tokens_to_target(self) -> float | None:
        return float(np.median(list(self.tokens_to_target.values()))) if self.tokens_to_target else None

    def mean_of(self, name: str) -> float:
        """Of a field of the results, over seeds."""
        return float(np.mean([getattr(result, name) for result in self.results.values()]))


@dataclass(frozen=True)
class Task:
    """Candidates that learnt the same.

    config: of one of the runs.  baseline: the baseline method's row with the lowest loss; it comes first.
    """

    settings: Settings
    config: Config
    rows: tuple[Row, ...]

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
    tasks: dict[Settings, dict[Candidate, dict[int, Result]]] = {}
    configs: dict[Settings, Config] = {}
    for entry in entries:
        configs.setdefault(entry.task, entry.config)
        if entry.folder in results:
            candidates = tasks.setdefault(entry.task, {})
            candidates.setdefault(entry.candidate, {})[entry.seed] = results[entry.folder]
    return [
        _task(settings, configs[settings], candidates, baseline)
        for settings, candidates in tasks.items()
        if any(candidate.method == baseline for candidate in candidates)
    ]


def _task(
    settings: Settings, config: Config, candidates: Mapping[Candidate, Mapping[int, Result]], baseline: str
) -> Task:
    def loss(candidate: Candidate) -> float:
        return float(np.mean([result.held_out.final for result in candidates[candidate].values()]))

    methods = dict.fromkeys(candidate.method for candidate in candidates)
    best = {method: min((c for c in candidates if c.method == method), key=loss) for method in methods}
    reference = best[baseline]
    order = sorted(candidates, key=lambda candidate: candidate != reference)
    rows = [_row(candidate, reference, candidates, candidate == best[candidate.method]) for candidate in order]
    return Task(settings, config, tuple(rows))


def _row(
    candidate: Candidate, reference: Candidate, candidates: Mapping[Candidate, Mapping[int, Result]], best: bool
) -> Row:
    results, baseline = candidates[candidate], candidates[reference]
    losses = [result.held_out.final for result in results.values()]
    seeds = [seed for seed in results if seed in baseline] if candidate != reference else []
    difference = tokens = of_means = speed = None
    if seeds:
        ours, theirs = [results[seed] for seed in seeds], [baseline[seed] for seed in seeds]
        difference = paired([r.held_out.final for r in ours], [r.held_out.final for r in theirs])
        tokens = {seed: _tokens_to_target(results[seed].held_out, baseline[seed].held_out) for seed in seeds}
        of_means = _tokens_to_target(mean_curve([r.held_out for r in ours]), mean_curve([r.held_out for r in theirs]))
        speeds = [(a.tokens_per_second, b.tokens_per_second) for a, b in zip(ours, theirs, strict=True)]
        ratios = [a / b for a, b in speeds if a and b]
        speed = float(np.median(ratios)) if ratios else None
    mean = float(np.mean(losses))
    return Row(candidate, results, mean, standard_error(losses), difference, tokens, of_means, speed, best)


def _tokens_to_target(curve: Curve, baseline: Curve) -> float:
    return tokens_to_reach(curve, baseline.final) / baseline.tokens[-1]


def conclusions(task: Task) -> list[str]:
    """For each other method, one sentence about what may be concluded, and nothing that may not."""
    return [_conclusion(row, task.baseline) for row in task.contenders]


def _conclusion(row: Row, baseline: Row) -> str:
    difference, name, other = row.difference, row.candidate, baseline.candidate
    if difference is None:
        return f"{name}: no seed has come to its end with {other} too, so nothing can be concluded."
    seeds = f"{difference.lower} of {difference.count} seeds"
    if difference.low is None or difference.high is None:
        return f"{name} differs from {other} by {difference.mean:+.4f} on one seed: chance cannot be told from effect."
    interval = f"{difference.mean:+.4f} nats per token, 95 % interval {difference.low:+.4f} to {difference.high:+.4f}"
    if not difference.certain:
        return f"{name} cannot be told from {other}: {interval}, lower on {seeds}."
    if difference.mean > 0:
        return f"{name} ends with a higher held-out loss than {other}: {interval}, lower on {seeds}."
    tokens = row.median_tokens_to_target
    assert tokens is not None
    reach = (
        f"it reaches the final loss of {other} with {tokens:.2f} of its tokens (median)"
        if math.isfinite(tokens)
        else f"but on most seeds it does not reach the final loss of {other}"
    )
    return f"{name} ends with a lower held-out loss than {other}: {interval}, lower on {seeds}; {reach}."
