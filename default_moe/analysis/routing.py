"""Routing at a checkpoint, as pictures: load, certainty, position, and how much of it had settled before."""

from collections.abc import Mapping, Sequence

import numpy as np

from default_moe.analysis import statistics
from default_moe.analysis.observation import Observation
from default_moe.analysis.pictures import Part, Picture, bars, heat_maps, lines

_QUANTILES = (0.1, 0.5, 0.9)
_POSITIONS = 16  # parts of a row


def part(seen: Observation, layers: Sequence[int], before: Mapping[int, Observation], step: int) -> Part:
    """layers: numbers of the MoE layers.  before: the same text at earlier checkpoints.  step: of `seen`."""
    names = [str(layer) for layer in layers]
    load_YN = statistics.load(seen.chosen)
    entropy_Y = statistics.entropy(seen.probs).mean(axis=1)
    top_YT = seen.probs.max(axis=-1)
    quantiles = {f"{q:.0%} of tokens below": np.quantile(top_YT, q, axis=1) for q in _QUANTILES}
    said = [
        f"layer {layer}: entropy {entropy:.3f} nats, busiest expert {load.max():.2f} and idlest {load.min():.2f} of "
        f"the mean load, largest probability {top:.3f} in the median"
        for layer, entropy, load, top in zip(layers, entropy_Y, load_YN, np.median(top_YT, axis=1), strict=True)
    ]
    pictures = [
        Picture(
            "routing_load",
            "Load by layer and expert",
            "Choices of each expert in each layer, in multiples of the layer's mean: white is the mean, orange more, "
            "violet less.",
            {"layers": list(layers), "load": load_YN},
            lambda: heat_maps(
                {"": load_YN - 1}, "expert", "layer", "load / mean - 1", (-1, 1), diverging=True, rows=names
            ),
        ),
        Picture(
            "routing_entropy",
            "Entropy by layer",
            f"Mean entropy of a token's router probabilities. The dashed line, ln {load_YN.shape[1]}, is a router that "
            "is undecided; 0 is one that is certain.",
            {"layers": list(layers), "entropy": entropy_Y},
            lambda: lines(layers, {"": entropy_Y}, "layer", "entropy (nats)", chance=float(np.log(load_YN.shape[1]))),
        ),
        Picture(
            "routing_confidence",
            "Confidence by layer",
            "The largest router probability of a token: a tenth, half and nine tenths of the tokens lie below these "
            "bars.",
            {"layers": list(layers), **quantiles},
            lambda: bars(names, quantiles, "layer", "largest router probability"),
        ),
        _by_position(seen, layers),
    ]
    if before:
        pictures.append(_saturation(seen, layers, before, step))
    return Part("Routing", said, pictures)


def _by_position(seen: Observation, layers: Sequence[int]) -> Picture:
    length = int(seen.positions.max()) + 1
    parts = min(_POSITIONS, length)
    of_token = seen.positions.astype(np.int64) * parts // length
    share = {}
    for index, layer in enumerate(layers):
        counts_PN = np.stack([seen.chosen[index, of_token == p].sum(axis=0) for p in range(parts)]).astype(float)
        mean_P1 = np.maximum(counts_PN.mean(axis=1, keepdims=True), 1e-9)
        share[f"layer {layer}"] = (counts_PN / mean_P1).T

    def draw() -> object:
        shades = {name: np.log2(np.clip(load_NP, 0.25, 4)) for name, load_NP in share.items()}
        figure = heat_maps(
            shades, "position in the row", "expert", "load / mean", (-2, 2), diverging=True, extent=(0, length)
        )
        figure.axes[-1].set_yticks([-2, -1, 0, 1, 2], ["≤1/4", "1/2", "1", "2", "≥4"])
        return figure

    caption = (
        "Load of each expert by a token's position in its row, in multiples of the mean at that position. Stripes from "
        "left to right are experts whose load does not depend on it."
    )
    return Picture("routing_position", "Load by position", caption, {"positions": length, "load": share}, draw)


def _saturation(seen: Observation, layers: Sequence[int], before: Mapping[int, Observation], step: int) -> Picture:
    steps = [*sorted(before), step]
    chosen = {**{s: o.chosen for s, o in before.items()}, step: seen.chosen}
    agreement_SY = np.array([statistics.agreement(chosen[s], seen.chosen) for s in steps])
    by_chance = float((seen.chosen.mean(axis=1) ** 2).sum(axis=-1).mean() / seen.chosen.sum(axis=-1).mean())
    caption = (
        f"Share of the choices at step {step} that an earlier checkpoint makes too, for the same text. 1 is routing "
        "that has settled; the dashed line is what load alone would give. Only checkpoints that are still there count."
    )
    series = {f"layer {layer}": agreement_SY[:, index] for index, layer in enumerate(layers)}
    return Picture(
        "routing_saturation",
        "Saturation",
        caption,
        {"step": steps, "layers": series, "by_chance": by_chance},
        lambda: lines(steps, series, "step of the checkpoint", "choices as at the end (share)", True, by_chance),
    )
