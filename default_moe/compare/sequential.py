"""More seeds, one at a time, until differences are known well enough.

The rule looks at how wide intervals are, not at where they lie. For normal losses the mean of a sample does not depend
on its spread, so that a stop at a small spread leaves the mean where it is. A rule that stopped at a small p value
would stop at the seeds that flatter. What a stop at a small spread costs: of all 95 % intervals 91 to 95 in 100 contain
the true difference, and fewer of those that were narrow early.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from default_moe.compare.comparison import FEWEST_SEEDS, Task
from default_moe.errors import check


@dataclass(frozen=True)
class WidthRule:
    """Seeds are added until every interval's half-width is below `half_width`, or there are `most` seeds."""

    half_width: float
    most: int

    def wide(self, tasks: Sequence[Task]) -> dict[str, float]:
        """Return the half-width of each interval that is not narrow yet, by method and task; infinity if there is none.

        A method of which every run failed is left out.
        """
        widths = {}
        for task in tasks:
            for row in task.contenders:
                known = row.difference
                half = math.inf
                if known and known.low is not None and known.high is not None and known.count >= FEWEST_SEEDS:
                    half = (known.high - known.low) / 2
                if not half < self.half_width:
                    widths[f"{row.candidate}{f' ({task.name})' if task.name else ''}"] = half
        return widths

    def all_seeds(self, seeds: Sequence[int]) -> list[int]:
        """Return the seeds, and those that are added until there are the most."""
        first = max(seeds) + 1
        return [*seeds, *range(first, first + self.most - len(seeds))]

    def sentences(self, tasks: Sequence[Task], count: int) -> str:
        """Return how it came to this number of seeds, and what that means for the intervals."""
        wide = ", ".join(
            f"{name}: {half:.4f}" if math.isfinite(half) else f"{name}: none" for name, half in self.wide(tasks).items()
        )
        reached = f"It is not below that yet for {wide}." if wide else "It is below that for all."
        return (
            f"Seeds were added one at a time until the half-width of the 95 % interval of every method's difference is "
            f"below {self.half_width:g}, at most {self.most} and at least {FEWEST_SEEDS}; there are {count}. {reached} "
            "This rule looks at widths only, not at which method is ahead or how significantly: the mean of normal "
            "losses does not depend on their spread, so the differences are not biased. The intervals are too "
            "narrow: in simulations 91 to 95 in 100 contained the true difference, those with the most seeds "
            "included, and fewer of those that stopped early."
        )


def width_rule(half_width: float | None, most: int, seeds: Sequence[int], methods: int, shard: str | None) -> WidthRule:
    """Make the rule of --until and --max_seeds. Raises ConfigError.

    methods: how many there are.  shard: the flag's value.
    """
    check(half_width is not None, "--max_seeds is given without --until: it says where --until stops")
    assert half_width is not None
    check(
        0 < half_width < math.inf,
        f"--until is {half_width}, but must be a half-width in nats per token above 0, 0.01 for instance",
    )
    check(
        most >= max(len(seeds), FEWEST_SEEDS),
        f"--max_seeds is {most}, but --seeds has {len(seeds)}, and at least {FEWEST_SEEDS} are needed",
    )
    check(methods > 1, "--until is about differences between methods, but --methods has only one")
    check(
        shard is None,
        "--until cannot go with --shard: the next seed depends on all runs of the last. Give --seeds to the shards, "
        "and --until to one process after them",
    )
    return WidthRule(half_width, most)
