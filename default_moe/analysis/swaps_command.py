"""The analysis `swaps` as a command: what it prints and what it draws."""

import dataclasses
from pathlib import Path

from default_moe import cli
from default_moe.analysis import swaps
from default_moe.analysis.gradients_command import BATCHES
from default_moe.analysis.pictures import Part, Picture, lines, write_pictures
from default_moe.analysis.swaps import Summary, Swaps
from default_moe.config import Config
from default_moe.errors import check
from default_moe.runs.progress import Progress
from default_moe.runs.saved_run import open_saved_run


def run(workdirs: list[Path], step: int | None, overrides: list[str]) -> int:
    """Measure, print and draw; returns the exit code."""
    check(len(workdirs) == 1, "--workdir is given several times: swaps looks at one run")
    workdir, say = workdirs[0], Progress(0).message

    def override(saved: Config) -> Config:
        config = cli.parse_overrides(overrides, saved, allowed=("eval", "mesh", "data"))
        swaps.check_swappable(config)
        return config

    model = open_saved_run(workdir, step, override, training=False)
    config = model.program.config
    found = swaps.measure(model, BATCHES.value)
    say(
        f"step {model.step} of {workdir}: {config.moe.method.name!r}, {config.moe.top_k} of {config.moe.num_experts} "
        f"experts; in each layer another expert in the place of the first, for {found.gain.shape[1]} held-out tokens"
    )
    part = part_of(found, config.model.moe_layers)
    for line in part.lines:
        say(line)
    drawn = write_pictures(workdir / "analysis", [part], say)
    say(f"\nwritten to {workdir / 'analysis'}: {', '.join(f'{name}.png' for name in drawn) or 'nothing'}")
    return 0


def part_of(found: Swaps, layers: tuple[int, ...]) -> Part:
    summaries = [swaps.summary(found, index) for index in range(len(layers))]
    said = [line for layer, each in zip(layers, summaries, strict=True) for line in _lines(layer, each)]
    by_layer = {str(layer): dataclasses.asdict(each) for layer, each in zip(layers, summaries, strict=True)}
    correlations = {name: [each.correlation[name][0] for each in summaries] for name in swaps.SIGNALS}
    gains = {
        "the best expert": [each.best[0] for each in summaries],
        **{f"as the {name} advises": [each.advised[name][0] for each in summaries] for name in swaps.SIGNALS[:2]},
        "any inactive expert": [each.random[0] for each in summaries],
    }
    return Part(
        "Experts exchanged",
        said,
        [
            Picture(
                "swaps_correlation",
                "What ranks experts as the loss does",
                "Rank correlation, over a token's inactive experts, of what tells the router that an expert is good "
                "with the true gain if it ran in the place of the first one; mean over tokens. 1 would be a perfect "
                "signal, 0 says nothing.",
                {"by_layer": by_layer},
                lambda: lines(layers, correlations, "layer", "rank correlation with the gain", chance=0),
            ),
            Picture(
                "swaps_gain",
                "What another expert would have gained",
                "By how much the loss of the row (nats) falls on average if one of its tokens takes another expert in "
                "this layer: the best one in hindsight, the one that a slope advises, any. Below 0 the loss rises.",
                {"by_layer": by_layer},
                lambda: lines(layers, gains, "layer", "gain (nats)", chance=0),
            ),
        ],
    )


def _lines(layer: int, of_layer: Summary) -> list[str]:
    def told(pair: tuple[float, float]) -> str:
        return "-" if pair[0] != pair[0] else f"{pair[0]:+.4f} ± {pair[1]:.4f}"

    ranked = ", ".join(f"{name} {told(of_layer.correlation[name])}" for name in swaps.SIGNALS)
    advice = ", ".join(f"{name} {told(of_layer.advised[name])}" for name in swaps.SIGNALS[:2])
    return [
        f"layer {layer}: rank correlation with the true gain: {ranked}",
        f"layer {layer}: gain in nats: best expert {told(of_layer.best)}, any other {told(of_layer.random)}; as "
        f"advised by the {advice}",
    ]
