"""How much of what the exact gradient gains on the baseline each method recovers."""

from collections.abc import Mapping
from dataclasses import dataclass

from default_moe.compare.comparison import FEWEST_SEEDS, Task
from default_moe.compare.statistics import Estimate, Paired, fraction_of_gain, paired

_EXACT = "densemixer"  # the method whose router has the exact gradient for all experts
Losses = Mapping[str, Mapping[int, float]]  # by method and seed


@dataclass(frozen=True)
class Recovered:
    """exact, baseline: methods.  gain: of exact, baseline minus exact.  fractions: by method; None if it is unknown."""

    exact: str
    baseline: str
    gain: Paired
    fractions: Mapping[str, Estimate | None]

    def sentences(self) -> list[str]:
        """Return what each method recovers, or why that cannot be said."""
        gain, pair = self.gain, f"{self.exact} on {self.baseline}"
        if gain.low is None or gain.high is None or gain.count < FEWEST_SEEDS:
            return [f"The gain of {pair} is {gain.mean:+.4f}: fewer than {FEWEST_SEEDS} seeds tell no fraction of it."]
        interval = f"{gain.mean:+.4f} nats per token (95 % interval {gain.low:+.4f} to {gain.high:+.4f})"
        if not gain.low > 0:
            return [f"The gain of {pair} is {interval}: not above zero for certain, so no fraction of it is told."]
        return [
            f"Of the gain of {pair}, {interval}, {method} recovers "
            + (
                f"{f.value:.2f} (95 % interval {f.low:.2f} to {f.high:.2f})."
                if f
                else "a fraction that cannot be told: they share too few seeds."
            )
            for method, f in self.fractions.items()
        ]


def recovered(losses: Losses, baseline: str) -> Recovered | None:
    """None without a baseline or a method that has the exact gradient, or another one."""
    exact = next((method for method in losses if method.split(":")[0] == _EXACT), None)
    if exact is None or baseline not in losses or exact == baseline:
        return None

    def shared(*methods: str) -> list[list[float]]:
        seeds = [seed for seed in losses[baseline] if all(seed in losses[method] for method in methods)]
        return [[losses[method][seed] for seed in seeds] for method in methods]

    both = shared(baseline, exact)
    if not both[0]:
        return None
    fractions = {}
    for method in losses:
        if method not in (baseline, exact):
            values = shared(method, exact, baseline)
            fractions[method] = fraction_of_gain(*values) if len(values[0]) >= FEWEST_SEEDS else None
    return Recovered(exact, baseline, paired(*both), fractions) if fractions else None


def recovered_in(task: Task) -> Recovered | None:
    """What the best row of each method recovers in a task."""
    rows = [task.baseline, *task.contenders]
    losses = {row.candidate.method: {s: r.loss for s, r in row.results.items()} for row in rows}
    return recovered(losses, task.baseline.candidate.method)
