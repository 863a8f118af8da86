"""What experts have to do with each other and with tokens: coactivation, transitions, specialisation, norms."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from default_moe.analysis import statistics
from default_moe.analysis.observation import Observation
from default_moe.analysis.pictures import Part, Picture, bars, heat_maps, points


def part(seen: Observation, layers: Sequence[int]) -> Part:
    """layers: numbers of the MoE layers."""
    num_experts = seen.probs.shape[-1]
    explained = _explained(seen, num_experts)
    said = [
        f"layer {layer}: "
        + ", ".join(f"{what} {shares[i][0]:.2f} ({shares[i][1]:.2f} by chance)" for what, shares in explained.items())
        + " of the choice's entropy explained"
        for i, layer in enumerate(layers)
    ]
    pictures = [_specialisation(explained, layers)]
    if 1 < seen.chosen.sum(axis=-1).max() < num_experts:
        pictures.append(_coactivation(seen, layers))
    if len(layers) > 1:
        pictures.append(_transitions(seen, layers, num_experts))
    pictures.append(_norms(seen, layers))
    return Part("Experts", said, pictures)


def _explained(seen: Observation, num_experts: int) -> dict[str, list[tuple[float, float]]]:
    """Shares by label and layer, each beside that of shuffled labels."""
    same_row = np.concatenate([[False], seen.rows[1:] == seen.rows[:-1]])
    before = np.where(same_row, np.roll(seen.tokens, 1) + 1, 0)
    labels: dict[str, Any] = {"token": seen.tokens, "token before": before, "position": seen.positions}
    found = {
        what: [statistics.explained(label, first, num_experts) for first in seen.first]
        for what, label in labels.items()
    }
    if len(seen.first) > 1:
        pairs = zip(seen.first[:-1], seen.first[1:], strict=True)
        above = [statistics.explained(below, above, num_experts) for below, above in pairs]
        found["expert in the layer below"] = [(0.0, 0.0), *above]  # there is none below the first
    return found


def _specialisation(explained: dict[str, list[tuple[float, float]]], layers: Sequence[int]) -> Picture:
    shares = {what: [share for share, _ in values] for what, values in explained.items()}
    by_chance = {what: [chance for _, chance in values] for what, values in explained.items()}
    caption = (
        "How much of the entropy of a token's first expert is explained by the token itself, by the one before it, by "
        "its position, and by its expert in the MoE layer below (mutual information / entropy). 1: it decides the "
        "expert. The numbers have what shuffled labels explain: a share below that says nothing."
    )
    return Picture(
        "experts_specialisation",
        "What decides the expert",
        caption,
        {"layers": list(layers), "share": shares, "by_chance": by_chance},
        lambda: bars([str(layer) for layer in layers], shares, "layer", "share of entropy explained"),
    )


def _coactivation(seen: Observation, layers: Sequence[int]) -> Picture:
    share = {f"layer {layer}": statistics.coactivation(seen.chosen[i]) for i, layer in enumerate(layers)}
    expected = {f"layer {layer}": statistics.expected_coactivation(seen.chosen[i]) for i, layer in enumerate(layers)}
    most = max(float(np.nanmax(matrix, initial=0)) for matrix in share.values())
    caption = (
        "Of the tokens that choose the expert of a row, the share that choose the column's too. The numbers have what "
        "load alone would give, under `expected`."
    )
    return Picture(
        "experts_coactivation",
        "Coactivation",
        caption,
        {"share": share, "expected": expected},
        lambda: heat_maps(share, "expert", "expert", "share of tokens", (0, most)),
    )


def _transitions(seen: Observation, layers: Sequence[int], num_experts: int) -> Picture:
    share = {
        f"layer {layers[i]} to {layers[i + 1]}": statistics.transitions(seen.first[i], seen.first[i + 1], num_experts)
        for i in range(len(layers) - 1)
    }
    most = max(float(np.nanmax(matrix, initial=0)) for matrix in share.values())
    caption = (
        "Of the tokens whose first expert is the row's in one MoE layer, the share whose first expert is the column's "
        "in the next. Rows that look alike are layers that route independently."
    )
    return Picture(
        "experts_transitions",
        "Transitions between layers",
        caption,
        {"share": share},
        lambda: heat_maps(share, "expert in the upper layer", "expert in the lower", "share of tokens", (0, most)),
    )


def _norms(seen: Observation, layers: Sequence[int]) -> Picture:
    with np.errstate(invalid="ignore"):
        norm_Y2N = seen.experts["norm"] / seen.experts["weight"][:, 0]
    series = {f"layer {layer}": norm_Y2N[i, 0] for i, layer in enumerate(layers)}
    caption = (
        "Mean norm of each expert's output over the tokens that choose it. The numbers have the mean over all other "
        "tokens too."
    )
    return Picture(
        "experts_norms",
        "Norms of experts' outputs",
        caption,
        {"chosen": series, "not_chosen": {f"layer {layer}": norm_Y2N[i, 1] for i, layer in enumerate(layers)}},
        lambda: points(range(norm_Y2N.shape[-1]), series, "expert", "mean norm of the output"),
    )
