"""Draws `idea.svg`, the picture of Default MoE at the top of the README: `python .figures/idea.py`."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, GREY, PALE = "#1f2937", "#9ca3af", "#f3f4f6"
EXPERT, VECTOR = "#1d4ed8", "#d97706"  # what an expert that runs gives; what a default vector gives
COLUMNS = (0.0, 2.9, 5.8, 8.7)  # of four experts
ACTIVE = 1
PROBS = (0.2, 0.5, 0.12, 0.18)
SHADES = ((0.9, 0.35, 0.65, 0.2), (0.3, 0.8, 0.45, 1.0), (0.55, 0.2, 0.95, 0.6), (0.25, 0.7, 0.3, 0.85))
MIDDLE = sum(COLUMNS) / len(COLUMNS)


def box(ax: Axes, x: float, y: float, w: float, h: float, text: str, size: float = 13, **style: object) -> None:
    """A rounded box centred at (x, y) with a text in it."""
    look = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.4, **style}
    ink = look.pop("ink", INK)
    shape = FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.18", **look)
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=ink)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1.6) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=color, linewidth=width, **style))


def vector(ax: Axes, x: float, y: float, shades: tuple[float, ...]) -> None:
    """A default vector: a row of cells."""
    size = 0.34
    for number, shade in enumerate(shades):
        left = x + (number - len(shades) / 2) * size
        ax.add_patch(Rectangle((left, y - size / 2), size, size, facecolor=VECTOR, alpha=shade, linewidth=0))
    total = size * len(shades)
    frame = Rectangle((x - total / 2, y - size / 2), total, size, facecolor="none", edgecolor=VECTOR, linewidth=1.4)
    ax.add_patch(frame)


def named_vector(ax: Axes, number: int, x: float, y: float) -> None:
    vector(ax, x, y, SHADES[number])
    ax.text(x + 0.8, y - 0.03, rf"$\hat{{E}}_{number + 1}$", fontsize=12.5, color=VECTOR, ha="left", va="center")


def active_expert(ax: Axes, x: float) -> None:
    box(ax, x, 5.0, 1.8, 0.95, f"$E_{ACTIVE + 1}(x)$", 14, facecolor=EXPERT, edgecolor=EXPERT, ink="white")


def forward(ax: Axes) -> None:
    box(ax, MIDDLE, 9.2, 2.6, 0.75, "token $x$")
    arrow(ax, (MIDDLE, 8.82), (MIDDLE, 8.42), INK)
    box(ax, MIDDLE, 8.05, 2.6, 0.75, "router")
    for number, x in enumerate(COLUMNS):
        runs = number == ACTIVE
        color = EXPERT if runs else VECTOR
        ax.plot([MIDDLE, x], [7.67, 7.15], color=GREY, linewidth=1.0, zorder=0)
        ax.add_patch(Rectangle((x - 0.6, 6.15), 1.2, 1.0, facecolor=PALE, linewidth=0))
        ax.add_patch(Rectangle((x - 0.6, 6.15), 1.2, PROBS[number] * 1.6, facecolor=color, linewidth=0))
        ink, y = ("white", 6.52) if runs else (INK, 6.82)
        ax.text(x, y, f"$p_{number + 1}$", ha="center", va="center", fontsize=13, color=ink)
        if runs:
            arrow(ax, (x, 6.12), (x, 5.5), EXPERT, 2.2)
            active_expert(ax, x)
            ax.plot([x - 0.4, x - 0.4], [4.55, 3.2], color=EXPERT, linewidth=2.2, solid_joinstyle="round")
            arrow(ax, (x - 0.4, 3.22), (MIDDLE - 0.75, 2.14), EXPERT, 2.2)
            named_vector(ax, number, x + 0.66, 3.7)
            arrow(ax, (x + 0.66, 4.52), (x + 0.66, 3.9), EXPERT, 1.2)
            ax.text(x + 0.8, 4.22, "averaged", fontsize=10, color=EXPERT, ha="left", va="center")
        else:
            idle = {"facecolor": PALE, "edgecolor": GREY, "ink": GREY, "linestyle": (0, (4, 3))}
            box(ax, x, 5.0, 1.8, 0.95, f"$E_{number + 1}$ idle", 12.5, **idle)
            named_vector(ax, number, x, 3.7)
            arrow(ax, (x, 3.48), (MIDDLE + {0: -1.2, 2: 0.5, 3: 1.1}[number], 2.14), VECTOR, 1.4)
    box(ax, MIDDLE, 1.75, 3.4, 0.75, r"sum, weighted by $p_i$", size=12.5)
    arrow(ax, (MIDDLE, 1.37), (MIDDLE, 0.97), INK)
    box(ax, MIDDLE, 0.58, 2.6, 0.75, "output $y$")


def backward(ax: Axes) -> None:
    box(ax, MIDDLE, 0.58, 2.6, 0.75, r"$\partial L\,/\,\partial y$", 14)
    box(ax, MIDDLE, 9.2, 10.6, 0.75, "router")
    for number, x in enumerate(COLUMNS):
        runs = number == ACTIVE
        color, width = (EXPERT, 2.2) if runs else (VECTOR, 1.4)
        start = MIDDLE + {0: -1.05, 1: -0.4, 2: 0.4, 3: 1.05}[number]
        arrow(ax, (start, 0.97), (x, 4.5 if runs else 4.76), color, width)
        if runs:
            active_expert(ax, x)
        else:
            named_vector(ax, number, x, 5.0)
        arrow(ax, (x, 5.52 if runs else 5.24), (x, 6.3), color, width)
        hat = f"E_{number + 1}(x)" if runs else rf"\hat{{E}}_{number + 1}"
        inner = rf"$\langle\frac{{\partial L}}{{\partial y}},\,{hat}\rangle$"
        ax.text(x, 6.72, inner, ha="center", va="center", fontsize=14, color=color)
        ax.text(
            x,
            7.62,
            rf"$\dfrac{{\partial L}}{{\partial p_{number + 1}}}\,=$",
            ha="center",
            va="center",
            fontsize=16,
            color=INK,
        )
        arrow(ax, (x, 8.14), (x, 8.8), color, width)
    ax.text(COLUMNS[0] - 0.8, 1.45, "blue: as in top-k", fontsize=11.5, color=EXPERT, ha="left", va="center")
    ax.text(COLUMNS[0] - 0.8, 0.85, "amber: 0 in top-k", fontsize=11.5, color=VECTOR, ha="left", va="center")


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "idea", "font.family": "DejaVu Sans", "mathtext.fontset": "cm"})
    figure = Figure(figsize=(13.2, 6.0))
    axes = figure.subplots(1, 2)
    panels = (("Forward: one expert runs", forward), ("Backward: the router learns from all four", backward))
    for ax, (title, draw) in zip(axes, panels, strict=True):
        ax.set(xlim=(-1.3, 10.3), ylim=(0.1, 10.5), aspect="equal")
        ax.axis("off")
        ax.text(MIDDLE, 10.15, title, ha="center", va="center", fontsize=15, color=INK, weight="bold")
        draw(ax)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, wspace=0.02)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
