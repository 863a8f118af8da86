"""The report of a comparison: Markdown and JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from default_moe.compare import ladder
from default_moe.compare.comparison import Row, Task, conclusions
from default_moe.compare.ladder import Ladder
from default_moe.compare.matrix import Entry, Settings
from default_moe.compare.recovered import recovered_in
from default_moe.hardware import heading, machine
from default_moe.model.size import parameter_counts

_COLUMNS = (
    "",
    "seeds",
    "held-out loss",
    "difference",
    "95 % interval",
    "lower on",
    "tokens to target",
    "tokens/s",
    "FLOPs/token",
    "experts/token",
    "balance loss",
    "max load",
)


def markdown(
    tasks: Sequence[Task],
    vocab_sizes: Mapping[Settings, int],
    failures: Mapping[str, str],
    missing: Sequence[str] = (),
    notes: Sequence[str] = (),
    seeds: str = "",
    ladders: Sequence[Ladder] = (),
) -> str:
    """What was compared, a table per task, and what may be concluded.

    vocab_sizes: of each task.  failures: what went wrong, by folder of the run.  missing: folders of runs that are not
    finished.  notes: lines about the code that trained the runs.  seeds: how their number came about, if it was not
    given.
    """
    lines = [
        "# Comparison",
        "",
        f"{heading()}. Within a seed all methods see the same text in the same order and start from the same weights.",
    ]
    lines += [text for note in notes for text in ("", note)]
    for task in tasks:
        lines += ["", f"## {task.name or 'Results'}", "", _description(task, vocab_sizes[task.settings]), ""]
        lines += [*_table([_cells(row) for row in task.rows]), ""]
        lines += [f"**{line}**" for line in conclusions(task)] or ["Nothing to compare with."]
        if fractions := recovered_in(task):
            lines += ["", *fractions.sentences()]
    lines += ladder.markdown(ladders)
    lines += ["", seeds] if seeds else []
    lines += ["", _caveat(tasks), "", "![curves](report.png)", "", "![cost](cost.png)"]
    lines += ["", _explanation(tasks[0].baseline)]
    lines += ["", *(f"- failed: {folder}: {message}" for folder, message in failures.items())] if failures else []
    lines += ["", *(f"- not finished, and left out: {folder}" for folder in missing)] if missing else []
    return "\n".join(lines) + "\n"


def as_json(
    tasks: Sequence[Task],
    entries: Sequence[Entry],
    base: Mapping[str, Any],
    failures: Mapping[str, str],
    missing: Sequence[str] = (),
    seeds: str = "",
    ladders: Sequence[Ladder] = (),
) -> dict[str, Any]:
    """Everything the report is made of, curves included.

    base: the settings that the runs were derived from.  seeds: as for `markdown`.
    """
    return {
        "machine": machine(),
        "config": base,
        "failures": dict(failures),
        "missing": list(missing),
        "seeds": seeds,
        "ladders": ladder.as_json(ladders),
        "folders": [entry.folder for entry in entries],
        "tasks": [
            {
                "settings": dict(task.settings),
                "rows": [_row(row) for row in task.rows],
                "conclusions": conclusions(task),
                "recovered": dataclasses.asdict(fractions) if (fractions := recovered_in(task)) else None,
            }
            for task in tasks
        ],
    }


def _row(row: Row) -> dict[str, Any]:
    seconds = [result.seconds for result in row.results.values() if result.seconds]
    more = {
        "name": str(row.candidate),
        "median_tokens_to_target": row.median_tokens_to_target,
        "flops_per_token": row.mean_of("flops_per_token"),
        "median_seconds": float(np.median(seconds)) if seconds else None,
    }
    return {**more, **dataclasses.asdict(row)}


def _cells(row: Row) -> list[str]:
    difference = row.difference
    error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
    name = f"**{row.candidate}**" if row.best else str(row.candidate)
    cells = [name, str(len(row.results)), f"{row.loss:.4f}{error}"]
    if difference is None:
        cells += ["-"] * 6
    else:
        known = difference.low is not None and difference.high is not None
        cells += [
            f"{difference.mean:+.4f}",
            f"{difference.low:+.4f} to {difference.high:+.4f}" if known else "-",
            f"{difference.lower} of {difference.count}",
            _tokens_to_target(row),
            "-" if row.speed is None else f"{row.speed:.2f}",
            "-" if row.flops is None else f"{row.flops:.2f}",
        ]
    of_routing = (("experts_per_token", 2), ("load_balance_loss", 3), ("max_load", 2))
    return [*cells, *(f"{row.mean_of(name):.{digits}f}" for name, digits in of_routing)]


def _tokens_to_target(row: Row) -> str:
    values = list((row.tokens_to_target or {}).values())
    reached = [value for value in values if math.isfinite(value)]
    median = row.median_tokens_to_target
    if median is None or not reached:
        return "not reached"
    missed = "" if len(reached) == len(values) else f", reached on {len(reached)} of {len(values)}"
    return (f"{median:.3f}" if math.isfinite(median) else "> 1") + missed


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *rows)]


def _description(task: Task, vocab_size: int) -> str:
    config, train = task.config, task.config.train
    counts = parameter_counts(config, vocab_size)
    tokens = train.num_steps * train.batch_size * train.sequence_length
    return (
        f"{counts.total / 1e6:.2f} M parameters, {counts.active / 1e6:.2f} M active, {config.moe.num_experts} experts, "
        f"of which a token runs {config.moe.experts_per_token} (in the baseline); {tokens:,} tokens of "
        f"{config.data.name} ({config.data.tokenizer}) in {train.num_steps:,} steps of {train.batch_size:,} x "
        f"{train.sequence_length:,}."
    )


def _explanation(baseline: Row) -> str:
    return (
        f"Baseline: {baseline.candidate}. Held-out loss in nats per token, mean ± standard error over seeds. "
        "Difference: to the baseline, seed by seed, with Student's 95 % interval. Tokens to target: training tokens to "
        "reach the baseline's final held-out loss, in multiples of the baseline's, median over seeds. tokens/s: in "
        "multiples of the baseline's, as timed when each ran. FLOPs/token: of training, with the experts that tokens "
        "ran in all of it, in multiples of the baseline's. Experts that a token runs, balance loss (1 is perfect) and "
        "the load of the busiest expert in any layer, in multiples of the mean: over the last quarter of training. "
        "Bold: a method's best."
    )


def _caveat(tasks: Sequence[Task]) -> str:
    tuned = any(not row.best for task in tasks for row in task.rows)
    choice = (
        "The best settings of each method were chosen on these very seeds, which flatters whichever had more to choose "
        "from: confirm them on other seeds."
        if tuned
        else "All methods had the same settings but for their own, which may suit one better than another: vary them "
        "with --set."
    )
    return (
        "This holds for this model, this text and this many tokens; it says nothing about larger models or longer "
        "training. Each interval is about seeds (weights and order of data), not about other texts, and one in twenty "
        "misses. The sentences say better or worse only where chance alone would give such a difference in fewer than "
        f"one of twenty reports like this one (Holm's correction for all of its comparisons). {choice}"
    )
