"""What `gradients.py` found, as text, JSON and a picture."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from default_moe.analysis.gradients import Checkpoint, Fidelity
from default_moe.runs.pictures import as_png, new_figure

# Okabe and Ito's, which colour-blind people tell apart, the yellow left out; in grey the markers do.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_MOST_LAYERS = 3  # beside the mean over all: more would not be legible


class Summary(NamedTuple):
    """Of values [runs, batches]: the mean, the standard deviation over batches, in the mean over runs, and over runs.

    over_runs: that of a sample; None for one run.
    """

    mean: float
    over_batches: float
    over_runs: float | None


def summary(values_RB: np.ndarray) -> Summary:
    over_runs = float(values_RB.mean(axis=1).std(ddof=1)) if len(values_RB) > 1 else None
    return Summary(float(values_RB.mean()), float(values_RB.std(axis=1).mean()), over_runs)


def line(fidelity: Fidelity) -> str:
    """Cosine similarity and norm of one method and K: the mean over layers, and each layer's."""
    mean, over_batches, over_runs = summary(fidelity.cosine.mean(axis=2))
    spread = f"± {over_batches:.3f}" + ("" if over_runs is None else f" ± {over_runs:.3f}")
    layers = "  ".join(f"{value:6.3f}" for value in fidelity.cosine.mean(axis=(0, 1)))
    norms = "  ".join(f"{value:6.3f}" for value in fidelity.norm_ratio.mean(axis=(0, 1)))
    return f"K {fidelity.top_k}  {fidelity.method:12} {mean:6.3f} {spread}   layers {layers}   norm {norms}"


def verdict(found: Sequence[Fidelity], method: str, other: str) -> str:
    """For which K a method's gradient is closer to the true one than another's, in the mean over all."""
    mean = {(f.method, f.top_k): float(f.cosine.mean()) for f in found}
    top_ks = sorted({k for name, k in mean if name == method and (other, k) in mean})
    if not top_ks:
        return f"{method} and {other} have no K in common"
    unknown = [k for k in top_ks if math.isnan(mean[method, k] - mean[other, k])]
    top_ks = [k for k in top_ks if k not in unknown]
    above = [k for k in top_ks if mean[method, k] > mean[other, k]]
    below = [k for k in top_ks if k not in above]
    parts = [f"closer to the true gradient than {other} for " + (f"K = {_listed(above)}" if above else "no K")]
    parts += [f"not for K = {_listed(below)}" if below else ""]
    parts += [f"a gradient is zero for K = {_listed(unknown)}" if unknown else ""]
    return f"{method} is " + ", ".join(filter(None, parts))


def as_json(
    found: Sequence[Fidelity], checkpoints: Sequence[Checkpoint], reference: str, machine: dict[str, Any]
) -> dict[str, Any]:
    """Every number, by run, batch and layer, and means and standard deviations over batches and runs."""
    checkpoint = checkpoints[0]
    return {
        "step": checkpoint.step,
        "seeds": [checkpoint.config.train.seed for checkpoint in checkpoints],
        "reference": reference,
        "num_experts": checkpoint.config.moe.num_experts,
        "trained_with": {"method": checkpoint.config.moe.method.name, "top_k": checkpoint.config.moe.top_k},
        "layers": list(checkpoint.config.model.moe_layers),
        "machine": machine,
        "results": [
            {
                "method": f.method,
                "top_k": f.top_k,
                "mean_cosine": of_f.mean,
                "std_of_mean_cosine": of_f.over_batches,
                "std_of_mean_cosine_over_runs": of_f.over_runs,
                "cosine": f.cosine.tolist(),
                "norm_ratio": f.norm_ratio.tolist(),
            }
            for f in found
            for of_f in [summary(f.cosine.mean(axis=2))]
        ],
    }


def picture(found: Sequence[Fidelity], reference: str, layers: Sequence[int]) -> bytes:
    """A PNG: cosine similarity above, norms below, against K; the mean over layers, then up to three of `layers`."""
    num_runs, num_batches, num_layers = found[0].cosine.shape
    shown = sorted({*np.linspace(0, num_layers - 1, min(num_layers, _MOST_LAYERS)).astype(int).tolist()})
    columns: list[int | None] = [None, *shown]
    figure = new_figure(1.75 * len(columns) + 0.6, 4.4)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    methods = list(dict.fromkeys(f.method for f in found))
    for column, layer in enumerate(columns):
        for index, method in enumerate(methods):
            rows = [f for f in found if f.method == method]
            beside = 0.1 * (index - (len(methods) - 1) / 2)  # so that bars do not hide each other
            for axis, name in ((axes[0, column], "cosine"), (axes[1, column], "norm_ratio")):
                values = [getattr(f, name) for f in rows]
                of_K = [summary(v.mean(axis=2) if layer is None else v[:, :, layer]) for v in values]
                axis.errorbar(
                    [f.top_k + beside for f in rows],
                    [s.mean for s in of_K],
                    [s.over_batches if s.over_runs is None else s.over_runs for s in of_K],
                    color=_COLORS[index % len(_COLORS)],
                    marker=_MARKERS[index % len(_MARKERS)],
                    label=method,
                    markersize=3.5,
                    linewidth=1.2,
                    capsize=2,
                )
        axes[0, column].set_title("mean over layers" if layer is None else f"layer {layers[layer]}", fontsize=10)
        axes[0, column].grid(alpha=0.3)
        axes[1, column].grid(alpha=0.3)
        axes[1, column].axhline(1, color="grey", linewidth=0.8)
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel(f"cosine similarity to\nthe {reference} gradient")
    axes[1, 0].set_ylabel(f"norm / that of\nthe {reference} gradient")
    spread_over = f"{num_batches} batches" if num_runs == 1 else f"{num_runs} runs"
    figure.supxlabel(f"experts active, K (bars: standard deviation over {spread_over})", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    return as_png(figure)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
