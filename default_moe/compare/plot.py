"""The picture of a comparison: loss curves, and how far each method is from the baseline on the way."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from default_moe.compare.comparison import Row, Task
from default_moe.compare.statistics import paired
from default_moe.runs.pictures import as_png, new_figure


def picture(tasks: Sequence[Task]) -> bytes:
    """A PNG. Above held-out loss over training tokens, below its difference to the baseline; a column per task."""
    figure = new_figure(max(5.2 * len(tasks), 6.4), 7.2)
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    for column, task in enumerate(tasks):
        _draw_losses(axes[0, column], task)
        _draw_differences(axes[1, column], task)
        axes[1, column].set_xlabel("training tokens (millions)")
    axes[0, 0].set_ylabel("held-out loss (nats per token)")
    axes[1, 0].set_ylabel("difference to the baseline")
    return as_png(figure)


def _draw_losses(axes: Any, task: Task) -> None:
    for index, row in enumerate(task.rows):
        losses = np.array([result.held_out.loss for result in row.results.values()])
        axes.plot(_millions(row), losses.mean(axis=0), color=f"C{index % 10}", label=str(row.candidate))
        if len(losses) > 1:
            axes.fill_between(
                _millions(row), losses.min(axis=0), losses.max(axis=0), color=f"C{index % 10}", alpha=0.15
            )
    axes.axhline(task.baseline.loss, color="grey", linewidth=0.8, linestyle="--")
    # The beginning is the same for all: leave it out of the scale.
    lowest = min(min(row.curve.loss) for row in task.rows)
    middle = max(float(np.interp(0.3 * row.curve.tokens[-1], row.curve.tokens, row.curve.loss)) for row in task.rows)
    axes.set_ylim(lowest - 0.05 * (middle - lowest + 1e-3), middle + 1e-3)
    axes.set_title(task.name or "all seeds: mean and range", fontsize=10)
    axes.legend(fontsize=8)


def _draw_differences(axes: Any, task: Task) -> None:
    axes.axhline(0, color="C0", linewidth=1)
    shown = []
    for index, row in enumerate(task.rows[1:], 1):
        seeds = [seed for seed in row.results if seed in task.baseline.results]
        if not seeds:
            continue
        ours = np.array([row.results[seed].held_out.loss for seed in seeds])
        theirs = np.array([task.baseline.results[seed].held_out.loss for seed in seeds])
        points = [paired(ours[:, i].tolist(), theirs[:, i].tolist()) for i in range(ours.shape[1])]
        mean = np.array([point.mean for point in points])
        axes.plot(_millions(row), mean, color=f"C{index % 10}")
        for seed_difference in ours - theirs:
            axes.plot(_millions(row), seed_difference, color=f"C{index % 10}", linewidth=0.5, alpha=0.5)
        shown.append((ours - theirs)[:, len(mean) // 5 :])  # the beginning, again, is left out of the scale
    if shown:
        low, high = min(0, *(d.min() for d in shown)), max(0, *(d.max() for d in shown))
        margin = 0.1 * (high - low) + 1e-6
        axes.set_ylim(low - margin, high + margin)
    axes.set_title("mean, and each seed (thin)", fontsize=10)


def _millions(row: Row) -> np.ndarray:
    return np.array(row.curve.tokens) / 1e6
