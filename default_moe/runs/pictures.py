"""Pictures as PNG, drawn without a display."""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from default_moe.errors import shown

# Okabe and Ito (2008): people with any common colour blindness tell them apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
_LARGEST = 4.0  # colours go from a quarter of the mean to four times, so that pictures of different steps compare


def new_figure(width: float, height: float) -> Any:
    """Return a matplotlib figure of that many inches to draw on."""
    # A notebook leaves the name of a backend there that only it can load; files need none.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # a second of loading, which nothing else needs
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def as_png(figure: Any) -> bytes:
    """Return the figure as a PNG file."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def picture_file(name: str, draw: Callable[[], bytes], say: Callable[[str], None]) -> dict[str, bytes]:
    """Return the picture by its file's name; say so in a line, and return none, if it cannot be drawn."""
    return picture_files(name, lambda: {name: draw()}, say)


def picture_files(name: str, draw: Callable[[], dict[str, bytes]], say: Callable[[str], None]) -> dict[str, bytes]:
    """Return several of them, the first of which is `name`, as `picture_file` does."""
    try:
        return draw()
    except Exception as error:  # whatever a library for pictures may raise: no figures are to be lost of it
        say(f"{name} cannot be drawn ({shown(f'{type(error).__name__}: {error}')}): the figures are written without it")
        return {}


def load_heat_map(tokens_per_expert: np.ndarray, title: str = "", layers: Sequence[int] | None = None) -> bytes:
    """Draw how evenly tokens spread over the experts of each layer, as a PNG.

    A row is a MoE layer, a column an expert; white is the mean load, red more, blue less.

    Args:
      tokens_per_expert: counts [layers, experts].
      layers: numbers of the rows' layers; None counts from 0.
    """
    counts = np.asarray(tokens_per_expert, np.float64)
    rows, experts = counts.shape
    load = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
    shade = np.log2(np.clip(load, 1 / _LARGEST, _LARGEST))

    cell = 0.5 if experts <= 16 else 0.32 if experts <= 32 else 0.12
    figure = new_figure(cell * experts + 2.4, cell * rows + 1.4)
    axes = figure.add_subplot()
    image = axes.imshow(shade, cmap="RdBu_r", vmin=-np.log2(_LARGEST), vmax=np.log2(_LARGEST))
    for layer, expert in np.ndindex(rows, experts) if experts <= 32 else ():
        color = "white" if abs(shade[layer, expert]) > 1.3 else "black"
        text = f"{load[layer, expert]:.1f}"
        axes.text(expert, layer, text, ha="center", va="center", color=color, fontsize=18 * cell)
    every = 1 if experts <= 16 else 2 if experts <= 64 else 8
    axes.set_xticks(range(0, experts, every), [str(expert) for expert in range(0, experts, every)])
    axes.set_yticks(range(rows), [str(layer) for layer in layers or range(rows)])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title or "load of each expert (1 = mean)", fontsize=10)
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], shrink=0.9)
    bar.ax.set_yticklabels(["\N{LESS-THAN OR EQUAL TO}1/4", "1/2", "1", "2", "\N{GREATER-THAN OR EQUAL TO}4"])
    return as_png(figure)
