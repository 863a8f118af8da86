"""What default vectors are like at a checkpoint: how alike, how large, and how well they stand in for the outputs.

How well is R^2 = 1 - E||E_i(x) - V_i||^2 / E||E_i(x)||^2, of the true outputs of expert i: for tokens that choose the
expert, of which the vector is a mean, and for those that do not, in whose output it stands.

Dimension key: Y MoE layers, N experts, D model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from default_moe.analysis import statistics
from default_moe.analysis.observation import Observation
from default_moe.analysis.pictures import Part, Picture, heat_maps, lines, points


class Explained(NamedTuple):
    """R^2 of outputs; NaN where there is no such token.

    chosen, not_chosen: what the default vectors explain.  best: what the best constant of each expert explains, for
    tokens that did not choose it.
    """

    chosen: np.ndarray
    not_chosen: np.ndarray
    best: np.ndarray


def explained(experts: Mapping[str, np.ndarray]) -> tuple[Explained, Explained]:
    """Return R^2 by layer and expert [Y, N], and by layer [Y], from the sums of `observation.expert_sums`.

    By expert each token counts once; all experts of a layer together count as in the layer's output, by gate^2.
    """
    weight, square, rest = (experts[name] for name in ("weight", "square", "rest"))
    with np.errstate(invalid="ignore", divide="ignore"):
        of_mean_Y2N = (experts["total"][:, :, 1] ** 2).sum(axis=-1) / weight[:, :, 1]
        r2_Y2N, best_YN = 1 - rest[:, 0] / square[:, 0], of_mean_Y2N[:, 0] / square[:, 0, 1]
        together_Y2 = 1 - rest[:, 1].sum(axis=-1) / square[:, 1].sum(axis=-1)
        best_Y = np.nansum(of_mean_Y2N[:, 1], axis=-1) / square[:, 1, 1].sum(axis=-1)
    by_expert, by_layer = (r2_Y2N[:, 0], r2_Y2N[:, 1], best_YN), (together_Y2[:, 0], together_Y2[:, 1], best_Y)
    return Explained(*by_expert), Explained(*by_layer)


def part(
    vectors_YND: np.ndarray,
    seen: Observation,
    layers: Sequence[int],
    before: Mapping[int, np.ndarray],
    step: int,
) -> Part:
    """vectors_YND: default vectors.  seen: with the experts' sums.  before: vectors of earlier checkpoints, by step."""
    experts = seen.experts
    by_expert, r2 = explained(experts)
    mean_norm = {
        name: experts[f"{name}_norm"] / np.maximum(experts["tokens"], 1) for name in ("active", "default", "output")
    }
    share_Y = mean_norm["default"] / np.maximum(mean_norm["output"], 1e-30)
    said = [
        f"layer {layer}: default vectors explain {r2.not_chosen[i]:.2f} of the outputs of inactive experts (R^2; the "
        f"best constants {r2.best[i]:.2f}); substituted, their sum has {share_Y[i]:.2f} of the output's norm"
        for i, layer in enumerate(layers)
    ]
    pictures = [
        _similarity(vectors_YND, layers),
        _norms(vectors_YND, experts, layers),
        _explained(r2, by_expert, layers),
    ]
    pictures.append(_share(mean_norm, share_Y, layers))
    if before:
        pictures.append(_drift(vectors_YND, before, layers, step))
    return Part("Default vectors", said, pictures)


def _similarity(vectors_YND: np.ndarray, layers: Sequence[int]) -> Picture:
    cosines = {f"layer {layer}": statistics.cosines(vectors_YND[i]) for i, layer in enumerate(layers)}
    caption = (
        "Cosine similarity between the default vectors of two experts. Near 1 everywhere: the vectors are one common "
        "part, and tell the router little about which expert is which."
    )
    return Picture(
        "defaults_similarity",
        "Similarity of default vectors",
        caption,
        {"cosine": cosines},
        lambda: heat_maps(cosines, "expert", "expert", "cosine similarity", (-1, 1), diverging=True),
    )


def _norms(vectors_YND: np.ndarray, experts: Mapping[str, np.ndarray], layers: Sequence[int]) -> Picture:
    norm_YN = np.linalg.norm(vectors_YND.astype(np.float64), axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        output_YN = experts["norm"][:, 0] / experts["weight"][:, 0, 0]
        ratio_YN = norm_YN / output_YN
    series = {f"layer {layer}": ratio_YN[i] for i, layer in enumerate(layers)}
    caption = (
        "Norm of each default vector, in multiples of the mean norm of its expert's outputs. 1 would be an expert that "
        "always answers the same; a mean of outputs in all directions is near 0."
    )
    return Picture(
        "defaults_norms",
        "Norms of default vectors",
        caption,
        {"layers": list(layers), "norm": norm_YN, "output_norm": output_YN},
        lambda: points(range(norm_YN.shape[1]), series, "expert", "norm / mean norm of outputs"),
    )


def _explained(r2: Explained, by_expert: Explained, layers: Sequence[int]) -> Picture:
    series = {
        "tokens that choose the expert": r2.chosen,
        "tokens that do not": r2.not_chosen,
        "the same, best constants": r2.best,
    }
    caption = (
        "Share of the experts' squared outputs, as they count in the layer's, that default vectors explain (R²). A "
        "vector is the mean over "
        "tokens that choose the expert, and stands in for those that do not: where the second is far below the first, "
        "that is selection bias; below 0 no vector at all would be closer. The third is the most that one vector per "
        "expert could explain."
    )
    numbers = {"layers": list(layers), "mean": series, "by_expert": by_expert._asdict()}
    return Picture(
        "defaults_explained",
        "What default vectors explain",
        caption,
        numbers,
        lambda: lines(layers, series, "layer", "R² of experts' outputs", chance=0),
    )


def _share(mean_norm: Mapping[str, np.ndarray], share_Y: np.ndarray, layers: Sequence[int]) -> Picture:
    series = {
        "experts that run": mean_norm["active"] / np.maximum(mean_norm["output"], 1e-30),
        "default vectors": share_Y,
    }
    caption = (
        "Norm of what the experts that run contribute to the layer's output, and of what default vectors contribute "
        "if they are substituted, in multiples of the norm of both together; means over tokens."
    )
    return Picture(
        "defaults_share",
        "Share of the output",
        caption,
        {"layers": list(layers), **mean_norm},
        lambda: lines(layers, series, "layer", "norm / norm of the output"),
    )


def _drift(vectors_YND: np.ndarray, before: Mapping[int, np.ndarray], layers: Sequence[int], step: int) -> Picture:
    steps = [*sorted(before), step]
    all_SYND = np.stack([*(before[s] for s in sorted(before)), vectors_YND]).astype(np.float64)
    size_Y = np.linalg.norm(vectors_YND.astype(np.float64), axis=(1, 2))
    drift_SY = np.linalg.norm(all_SYND - vectors_YND, axis=(2, 3)) / np.maximum(size_Y, 1e-30)
    series: dict[str, Any] = {f"layer {layer}": drift_SY[:, i] for i, layer in enumerate(layers)}
    caption = (
        f"Distance of the default vectors of earlier checkpoints from those of step {step}, in multiples of the "
        "latter's norm. Vectors that move fast stand in for outputs that are no more."
    )
    return Picture(
        "defaults_drift",
        "Drift of default vectors",
        caption,
        {"step": steps, "layers": series},
        lambda: lines(steps, series, "step of the checkpoint", "distance / norm", ordered=True),
    )
