"""What `gradients.py` found, as text, JSON and a picture."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from default_moe.analysis.gradients import Checkpoint, Fidelity
from default_moe.runs.pictures import as_png, new_figure


def line(fidelity: Fidelity) -> str:
    """Cosine similarity and norm of one method and K: the mean over layers, and each layer's."""
    mean_B = fidelity.cosine.mean(axis=1)
    layers = "  ".join(f"{value:6.3f}" for value in fidelity.cosine.mean(axis=0))
    norms = "  ".join(f"{value:6.3f}" for value in fidelity.norm_ratio.mean(axis=0))
    return (
        f"K {fidelity.top_k}  {fidelity.method:12} {mean_B.mean():6.3f} ± {mean_B.std():.3f}   "
        f"layers {layers}   norm {norms}"
    )


def verdict(found: Sequence[Fidelity], method: str, other: str) -> str:
    """For which K a method's gradient is closer to the true one than another's, in the mean over layers and batches."""
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
    found: Sequence[Fidelity], checkpoint: Checkpoint, reference: str, machine: dict[str, Any]
) -> dict[str, Any]:
    """Every number, and means and standard deviations over batches."""
    return {
        "step": checkpoint.step,
        "reference": reference,
        "num_experts": checkpoint.config.moe.num_experts,
        "trained_with": {"method": checkpoint.config.moe.method.name, "top_k": checkpoint.config.moe.top_k},
        "layers": list(checkpoint.config.model.moe_layers),
        "machine": machine,
        "results": [
            {
                "method": f.method,
                "top_k": f.top_k,
                "mean_cosine": float(f.cosine.mean()),
                "std_of_mean_cosine": float(f.cosine.mean(axis=1).std()),
                "cosine": f.cosine.tolist(),
                "norm_ratio": f.norm_ratio.tolist(),
            }
            for f in found
        ],
    }


def picture(found: Sequence[Fidelity], reference: str, layers: Sequence[int]) -> bytes:
    """A PNG: cosine similarity above, norms below, against K; the mean over layers, then each of `layers`."""
    num_layers = found[0].cosine.shape[1]
    shown = list(range(num_layers)) if num_layers <= 6 else sorted({*np.linspace(0, num_layers - 1, 6).astype(int)})
    columns: list[int | None] = [None, *shown]
    figure = new_figure(2.6 * len(columns) + 1, 5.4)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for column, layer in enumerate(columns):
        for index, method in enumerate(dict.fromkeys(f.method for f in found)):
            rows = sorted((f for f in found if f.method == method), key=lambda f: f.top_k)
            top_ks = [f.top_k for f in rows]
            for axis, name in ((axes[0, column], "cosine"), (axes[1, column], "norm_ratio")):
                values = [getattr(f, name) for f in rows]
                of_batches = [v.mean(axis=1) if layer is None else v[:, layer] for v in values]
                means, spread = (np.array([getattr(v, of)() for v in of_batches]) for of in ("mean", "std"))
                axis.errorbar(top_ks, means, spread, color=f"C{index}", label=method, marker=".", capsize=2)
        title = "mean over layers" if layer is None else f"layer {layers[layer]}"
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].axhline(1, color="grey", linewidth=0.8)
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)
        axes[1, column].set_xlabel("experts active, K")
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel(f"cosine similarity to\nthe {reference} router gradient")
    axes[1, 0].set_ylabel(f"norm / that of\nthe {reference} router gradient")
    axes[0, 0].legend(fontsize=8)
    return as_png(figure)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
