"""Pictures of an analysis: each as PNG and SVG, with its numbers beside it as JSON.

Colours are those of Okabe and Ito (2008), and cividis and PuOr, which people with any common colour blindness tell
apart.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from default_moe.files import write_report
from default_moe.runs.pictures import COLORS, as_png, new_figure

_PANEL = 2.5  # inches
_MOST_COLUMNS = 3
MOST_PANELS = 6


@dataclass(frozen=True)
class Picture:
    """What is drawn, and what it is drawn from.

    name: of its files.  caption: how to read it.  numbers: become JSON.  draw: gives a matplotlib figure.
    """

    name: str
    title: str
    caption: str
    numbers: dict[str, Any]
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """One part of a report.

    lines: figures to print.  html: what stands in the report only, after the pictures.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    html: str = ""


def write_pictures(folder: Path, parts: Iterable[Part], failed: Callable[[str], None]) -> dict[str, bytes]:
    """Write every picture's NAME.png, NAME.svg and NAME.json. Returns the SVGs by name.

    failed: takes a line for each picture that cannot be drawn; its numbers are written all the same.
    Raises ConfigError if the folder cannot be written.
    """
    drawn = {}
    for picture in [picture for part in parts for picture in part.pictures]:
        about = {"title": picture.title, "caption": picture.caption}
        files: dict[str, Any] = {f"{picture.name}.json": about | _plain(picture.numbers)}
        try:
            figure = picture.draw()
            files |= {f"{picture.name}.png": as_png(figure), f"{picture.name}.svg": _as_svg(figure, picture.name)}
            drawn[picture.name] = files[f"{picture.name}.svg"]
        except Exception as error:  # whatever a library for pictures may raise: no figures are to be lost of it
            failed(f"{picture.name} cannot be drawn ({type(error).__name__}: {error}): its numbers are written")
        write_report(folder, files)
    return drawn


def lines(
    xs: Any,
    series: Mapping[str, Any],
    xlabel: str,
    ylabel: str,
    ordered: bool = False,
    chance: float | None = None,
) -> Any:
    """Return a figure of one line per series. ordered: layers, say, in colours that run from dark to light.

    chance: a level to be marked.
    """
    figure = new_figure(4.6, 3.0)
    axes = figure.add_subplot()
    for (label, values), color in zip(series.items(), colors(len(series), ordered), strict=True):
        axes.plot(xs, np.asarray(values, float), label=label, color=color, marker="." if len(xs) < 30 else None)
    if all(float(x).is_integer() for x in xs):
        axes.locator_params(axis="x", integer=True)
    finish(axes, xlabel, ylabel, chance)
    return figure


def points(xs: Any, series: Mapping[str, Any], xlabel: str, ylabel: str) -> Any:
    """Return a figure of one row of points per series, a layer say: above each other where several share an x.

    The scale is logarithmic if the largest is 20 times the smallest or more.
    """
    figure = new_figure(4.6, 3.0)
    axes = figure.add_subplot()
    for (label, values), color in zip(series.items(), colors(len(series), ordered=True), strict=True):
        axes.plot(xs, np.asarray(values, float), "o", label=label, color=color, markersize=5, alpha=0.8)
    values = np.concatenate([np.asarray(values, float) for values in series.values()])
    values = values[values > 0]
    if values.size and values.max() > 20 * values.min():
        axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    finish(axes, xlabel, ylabel)
    return figure


def finish(axes: Any, xlabel: str, ylabel: str, level: float | None = None) -> None:
    """Add labels, a legend beside the curves, and a level to be marked."""
    if level is not None:
        axes.axhline(level, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(labels) <= 12:
        axes.legend(handles, labels, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def heat_maps(
    matrices: dict[str, np.ndarray],
    xlabel: str,
    ylabel: str,
    bar: str,
    limits: tuple[float, float],
    diverging: bool = False,
    extent: tuple[float, float] | None = None,
    rows: Sequence[object] = (),
) -> Any:
    """Return a figure with a heat map per matrix, at most `MOST_PANELS` of them, in one scale of colours.

    limits: values at the ends of the scale.  bar: what it shows.  extent: from and to on the x axis, if these are no
    numbers of columns.  rows: what the rows are called, if not by their numbers from 0 on.
    """
    from matplotlib import colormaps

    titles = list(matrices)
    shown = [titles[i] for i in np.linspace(0, len(titles) - 1, min(len(titles), MOST_PANELS)).round().astype(int)]
    across = min(len(shown), _MOST_COLUMNS)
    down = -(-len(shown) // across)
    figure = new_figure(_PANEL * across + 0.9, (_PANEL - 0.2) * down + 0.3)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    cmap = colormaps["PuOr_r" if diverging else "cividis"].with_extremes(bad="#dddddd")
    image = None
    for axes, title in zip(grid.flat, shown, strict=False):
        matrix = np.asarray(matrices[title], float)
        edges = (*(extent or (-0.5, matrix.shape[1] - 0.5)), matrix.shape[0] - 0.5, -0.5)
        image = axes.imshow(
            matrix, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest", extent=edges
        )
        axes.set_title(title, fontsize=9)
        if rows:
            kept = range(0, len(rows), -(-len(rows) // 12))
            axes.set_yticks(kept, [str(rows[i]) for i in kept])
        else:
            axes.locator_params(axis="y", integer=True, nbins=8)
        axes.locator_params(axis="x", integer=extent is None, nbins=4 if extent else 8)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    figure.colorbar(image, ax=grid, label=bar, shrink=0.9)
    return figure


def bars(groups: Sequence[str], series: Mapping[str, Any], xlabel: str, ylabel: str) -> Any:
    """Return a figure of grouped bars: a group per name in `groups`, a bar in each per series."""
    figure = new_figure(max(4.6, 0.5 * len(groups) + 2), 3.0)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for index, ((label, values), color) in enumerate(zip(series.items(), colors(len(series)), strict=True)):
        offset = (index - (len(series) - 1) / 2) * width
        axes.bar(np.arange(len(groups)) + offset, np.asarray(values, float), width, label=label, color=color)
    axes.set_xticks(range(len(groups)), groups, rotation=30 if max(map(len, groups)) > 8 else 0)
    finish(axes, xlabel, ylabel)
    return figure


def colors(number: int, ordered: bool = False) -> list[Any]:
    """Return so many colours: in an order from dark to light, or as different as can be."""
    if not ordered and number <= len(COLORS):
        return list(COLORS[:number])
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0, 0.9, number)]


def _as_svg(figure: Any, name: str) -> bytes:
    """Return the figure as an SVG file, the same for the same figure: without a date, its parts named by `name`."""
    import matplotlib

    svg = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
