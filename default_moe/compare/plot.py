"""Pictures of a comparison: loss curves, how far each method is from the baseline, what its training costs, and losses
over a tuned setting.

A colour is a method, a style of line is what was tuned for it.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from default_moe.compare.comparison import Row, Task
from default_moe.compare.ladder import Climb, Ladder
from default_moe.compare.statistics import paired, standard_error
from default_moe.runs.pictures import COLORS, as_png, new_figure

_STYLES = ("-", "--", ":", "-.")


def pictures(tasks: Sequence[Task], ladders: Sequence[Ladder] = ()) -> dict[str, bytes]:
    """Return the files report.png, cost.png, for ladders ladder.png, for tuned numbers sweep.png, and each as PDF."""
    figures = {"report": _report(tasks), "cost": _cost(tasks)}
    if ladders:
        figures["ladder"] = _ladder(ladders, _Styles(tasks))
    name = _swept(tasks)
    if name:
        figures["sweep"] = _sweep(tasks, name)
    files: dict[str, bytes] = {}
    for stem, figure in figures.items():
        pdf = io.BytesIO()
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
        files |= {f"{stem}.png": as_png(figure), f"{stem}.pdf": pdf.getvalue()}
    return files


def _report(tasks: Sequence[Task]) -> Any:
    """Above held-out loss over training tokens, below its difference to the baseline; a column per task."""
    figure = new_figure(4.6 * len(tasks), 6.6)
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    styles = _Styles(tasks)
    for column, task in enumerate(tasks):
        _draw_losses(axes[0, column], task, styles, _millions_of_tokens)
        _draw_differences(axes[1, column], task, styles)
        axes[1, column].set_xlabel("training tokens (millions)")
    axes[0, 0].set_ylabel("held-out loss (nats per token)")
    axes[1, 0].set_ylabel("difference to the baseline")
    _legend(figure, [*axes.flat])
    return figure


def _cost(tasks: Sequence[Task]) -> Any:
    """Held-out loss over training tokens, FLOPs and time; a row per task."""
    figure = new_figure(11, 3.6 * len(tasks))
    axes = figure.subplots(len(tasks), 3, squeeze=False, sharey="row")
    styles = _Styles(tasks)
    columns = {
        "training tokens (millions)": _millions_of_tokens,
        "training FLOPs": lambda row: np.array(row.curve.tokens) * row.mean_of("flops_per_token"),
        "training time (minutes)": lambda row: (
            np.array(row.curve.tokens) / row.tokens_per_second / 60 if row.tokens_per_second else None
        ),
    }
    for panels, task in zip(axes, tasks, strict=True):
        for panel, (label, xs) in zip(panels, columns.items(), strict=True):
            _draw_losses(panel, task, styles, xs)
            panel.set_xlabel(label)
        panels[0].set_ylabel("held-out loss (nats per token)")
    _legend(figure, [*axes.flat])
    return figure


def _millions_of_tokens(row: Row) -> np.ndarray:
    return np.array(row.curve.tokens) / 1e6


class _Styles:
    """The colour and the style of line of each candidate, the same in all tasks."""

    def __init__(self, tasks: Sequence[Task]):
        candidates = [row.candidate for task in tasks for row in task.rows]
        self._methods = list(dict.fromkeys(c.method for c in candidates))
        self._tuned = {
            method: list(dict.fromkeys(c.tuned for c in candidates if c.method == method)) for method in self._methods
        }

    def of(self, row: Row) -> dict[str, Any]:
        method = row.candidate.method
        style = self._tuned[method].index(row.candidate.tuned)
        return {"color": self.color(method), "linestyle": _STYLES[style % len(_STYLES)]}

    def color(self, method: str) -> str:
        return COLORS[self._methods.index(method) % len(COLORS)]


def _draw_losses(axes: Any, task: Task, styles: _Styles, xs_of: Callable[[Row], np.ndarray | None]) -> None:
    """xs_of: where the points of a row's curve lie; None leaves it out."""
    for row in task.rows:
        losses = np.array([result.held_out.loss for result in row.results.values()])
        if (xs := xs_of(row)) is not None:
            _draw_band(axes, row, xs, losses, styles)
    axes.axhline(task.baseline.loss, color="grey", linewidth=0.8, linestyle="--")
    # The beginning is the same for all: leave it out of the scale.
    lowest = min(min(row.curve.loss) for row in task.rows)
    middle = max(float(np.interp(0.3 * row.curve.tokens[-1], row.curve.tokens, row.curve.loss)) for row in task.rows)
    axes.set_ylim(lowest - 0.05 * (middle - lowest + 1e-3), middle + 1e-3)
    axes.set_title(task.name or "mean and 95 % interval over seeds", fontsize=10)


def _draw_differences(axes: Any, task: Task, styles: _Styles) -> None:
    axes.axhline(0, color="grey", linewidth=0.8, linestyle="--")
    shown = []
    for row in task.rows[1:]:
        seeds = [seed for seed in row.results if seed in task.baseline.results]
        if not seeds:
            continue
        ours = np.array([row.results[seed].held_out.loss for seed in seeds])
        theirs = np.array([task.baseline.results[seed].held_out.loss for seed in seeds])
        _draw_band(axes, row, _millions_of_tokens(row), ours - theirs, styles)
        shown.append((ours - theirs)[:, ours.shape[1] // 5 :])  # the beginning, again, is left out of the scale
    if shown:
        low, high = min(0, *(d.min() for d in shown)), max(0, *(d.max() for d in shown))
        margin = 0.15 * (high - low) + 1e-6
        axes.set_ylim(low - margin, high + margin)


def _draw_band(axes: Any, row: Row, xs: np.ndarray, values: np.ndarray, styles: _Styles) -> None:
    """Draw the mean over seeds, and Student's 95 % interval. xs: [points].  values: [seeds, points]."""
    marker = "." if len(xs) == 1 else ""
    axes.plot(xs, values.mean(axis=0), label=str(row.candidate), marker=marker, **styles.of(row))
    if len(values) > 1:
        points = [paired(of_point.tolist(), [0.0] * len(values)) for of_point in values.T]
        low, high = [p.low for p in points], [p.high for p in points]
        axes.fill_between(xs, low, high, color=styles.of(row)["color"], alpha=0.15, linewidth=0)


def _ladder(ladders: Sequence[Ladder], styles: _Styles) -> Any:
    """Above loss over compute with fitted lines, below both in multiples of the baseline's line; a column a ladder.

    The room between a router that never learns and the exact gradient is grey.
    """
    figure = new_figure(5.2 * len(ladders), 6.6)
    axes = figure.subplots(2, len(ladders), squeeze=False, sharex="col")
    for (above, below), ladder in zip(axes.T, ladders, strict=True):
        for climb in ladder.climbs:
            _draw_climb(above, below, climb, ladder.climbs[0], styles.color(climb.method))
        bounds = [climb for climb in ladder.climbs if _is_bound(climb)]
        if len({climb.method.split(":")[0] for climb in bounds}) == len(bounds) == 2:
            first, last = (max(c.compute(0) for c in bounds), min(c.compute(-1) for c in bounds))
            xs = np.geomspace(first, last, 60)
            lines = [_losses(climb, xs) for climb in bounds]
            above.fill_between(xs, *lines, color="grey", alpha=0.15, linewidth=0)
            below.fill_between(
                xs, *(line / _losses(ladder.climbs[0], xs) for line in lines), color="grey", alpha=0.15, linewidth=0
            )
        above.set_yscale("log")
        above.yaxis.set_major_formatter("{x:.3g}")
        above.yaxis.set_minor_formatter("{x:.3g}")
        above.set_title(", ".join(f"{name}={value}" for name, value in ladder.settings), fontsize=10)
        below.set_xscale("log")
        below.set_xlabel("FLOPs of the whole training")
    axes[0, 0].set_ylabel("held-out loss (nats per token)")
    axes[1, 0].set_ylabel("in multiples of the baseline's line")
    _legend(figure, [*axes.flat])
    return figure


def _draw_climb(above: Any, below: Any, climb: Climb, baseline: Climb, color: str) -> None:
    """Draw points with intervals over seeds, and lines. Below, what a seed's luck does to both cancels."""
    places = [climb.compute(rung) for rung in range(len(climb.rows))]
    seeds = [seed for seed in climb.lines if seed in baseline.lines]
    for row, place in zip(climb.rows, places, strict=True):
        losses = [row.results[seed].loss for seed in seeds]
        of_line = [baseline.lines[seed].loss(place) for seed in seeds]
        for panel, values in ((above, losses), (below, np.divide(losses, of_line).tolist())):
            if values:
                panel.errorbar(
                    place, np.mean(values), _half_width(values), color=color, fmt="o", markersize=4, capsize=2
                )
    xs = np.geomspace(places[0], places[-1], 60)
    style = {"color": color, "linestyle": ":" if _is_bound(climb) else "-", "label": climb.method}
    above.plot(xs, _losses(climb, xs), **style)
    below.plot(xs, _losses(climb, xs) / _losses(baseline, xs), **style)


def _is_bound(climb: Climb) -> bool:
    return climb.method.split(":")[0] in ("frozen", "densemixer")


def _losses(climb: Climb, xs: np.ndarray) -> np.ndarray:
    return np.array([climb.line.loss(x) for x in xs])


def _swept(tasks: Sequence[Task]) -> str | None:
    """The first tuned setting of which a method has two numbers or more."""
    values: dict[tuple[str, str], set[float]] = {}
    for row in (row for task in tasks for row in task.rows):
        for name, value in row.candidate.tuned:
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault((name, row.candidate.method), set()).add(value)
    return next((name for (name, _), numbers in values.items() if len(numbers) > 1), None)


def _sweep(tasks: Sequence[Task], name: str) -> Any:
    """The final held-out loss over a tuned setting, mean and 95 % interval over seeds; a column per task."""
    figure = new_figure(4.6 * len(tasks), 3.6)
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    styles = _Styles(tasks)
    for panel, task in zip(axes, tasks, strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for row in task.rows:
            value = dict(row.candidate.tuned).get(name)
            if isinstance(value, int | float):
                half = _half_width([result.loss for result in row.results.values()])
                lines.setdefault(_without(row, name), []).append((value, row.loss, half))
        for label, points in lines.items():
            xs, losses, halves = zip(*sorted(points), strict=True)
            panel.errorbar(
                xs, losses, halves, label=label, color=styles.color(label.split(" ")[0]), marker=".", capsize=2
            )
        tried = sorted({x for points in lines.values() for x, _, _ in points})
        if all(x > 0 for x in tried):
            panel.set_xscale("log")
        if len(tried) <= 6:  # labels that do not lie on each other
            panel.minorticks_off()
            panel.set_xticks(tried, [f"{x:g}" for x in tried])
        panel.set_xlabel(name)
        panel.set_title(task.name, fontsize=10)
    axes[0].set_ylabel("held-out loss (nats per token)")
    _legend(figure, [*axes])
    return figure


def _without(row: Row, name: str) -> str:
    """What a candidate is called without one of its settings."""
    rest = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in row.candidate.tuned if key != name]
    return " ".join([row.candidate.method, *rest])


def _half_width(values: Sequence[float]) -> float:
    error = standard_error(values)
    return 0.0 if error is None or math.isnan(error) else float(stats.t.ppf(0.975, len(values) - 1)) * error


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """Add one legend for all panels, beside them and over no curve, and room for it."""
    handles: dict[str, Any] = {}
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    legend = figure.legend([*handles.values()], [*handles], loc="outside right upper", fontsize=8, frameon=False)
    figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)
