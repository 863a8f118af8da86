"""What a run logged while it trained, as curves: losses, balance, and where each expert's load went."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from default_moe.analysis.pictures import Part, Picture, colors, finish, heat_maps, lines
from default_moe.config import Config
from default_moe.errors import CheckpointError, ConfigError, shown
from default_moe.files import read_file, read_json
from default_moe.runs.identity import RUN_FILE
from default_moe.runs.metrics import LOAD_FILE, METRICS_FILE
from default_moe.runs.pictures import new_figure

_LARGEST = 4.0  # colours of load go from a quarter of the mean to four times


@dataclass(frozen=True)
class Log:
    """What a run logged. label: of the run.  tokens_per_step: of its batches.  metrics, loads: lines, by step."""

    label: str
    tokens_per_step: int
    metrics: list[dict[str, Any]]
    loads: list[dict[str, Any]]

    def curve(self, tag: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the values of a metric where it was logged and is finite."""
        found = [(line["step"], line[tag]) for line in self.metrics if isinstance(line.get(tag), int | float)]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps), np.array(values, float)


def read_log(workdir: Path, config: Config, label: str) -> Log:
    """Raises ConfigError if the run has logged nothing."""
    metrics = _read_lines(workdir / METRICS_FILE)
    if not metrics:
        raise ConfigError(f"{workdir} has no {METRICS_FILE} with anything in it: has it trained?")
    loads = [line for line in _read_lines(workdir / LOAD_FILE) if "tokens_per_expert" in line]
    return Log(label, config.train.batch_size * config.train.sequence_length, metrics, loads)


def read_other(workdir: Path, label: str) -> Log:
    """The log of a run to compare with. Raises ConfigError if there is none."""
    try:
        config = Config.from_mapping(read_json(workdir / RUN_FILE)["config"])
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise ConfigError(f"--against is {workdir}, which is no run that can be read: {shown(error)}") from None
    return read_log(workdir, config, label)


def part(logs: Sequence[Log], moe_layers: Sequence[int]) -> Part:
    """Curves of the first run, and of the others beside it where all can be drawn. moe_layers: of the first run."""
    log = logs[0]
    pictures = [_losses(logs)]
    for tag, title, unit, of, caption in _BY_LAYER:
        picture = _by_layer(log, moe_layers, tag, title, unit, of, caption)
        pictures += [picture] if picture else []
    if len(logs) > 1:
        pictures.append(_balance(logs))
    if log.loads:
        pictures.append(_loads(log))
    steps, losses = log.curve("eval/bits_per_byte")
    said = [f"{log.label}: {len(log.metrics)} lines of metrics up to step {log.metrics[-1]['step']}"]
    if len(steps):
        said.append(f"held-out bits per byte {losses[-1]:.4f} at step {steps[-1]}, lowest {losses.min():.4f}")
    return Part("Over training", said, pictures)


_BY_LAYER: Sequence[tuple[str, str, str, Callable[[np.ndarray], np.ndarray], str]] = (
    (
        "router_entropy",
        "Router entropy",
        "entropy (nats)",
        lambda x: x,
        "The mean entropy of a token's router probabilities in each layer. The natural logarithm of the number of "
        "experts is an undecided router, 0 one that is certain.",
    ),
    (
        "max_load",
        "MaxVio",
        "busiest load / mean - 1",
        lambda x: x - 1,
        "How far the busiest expert of each layer is above the mean load, for the batch of each logged step. 0 is "
        "perfect balance; about 0.1 to 0.5 is usual with a small batch; N / K - 1 is a router that sends all to one.",
    ),
)


def _losses(logs: Sequence[Log]) -> Picture:
    curves = {
        log.label: {
            name: {"step": steps, "bits_per_byte": values}
            for name in ("train", "eval")
            for steps, values in [log.curve(f"{name}/bits_per_byte")]
        }
        for log in logs
    }

    def draw() -> Any:
        figure = new_figure(4.6, 3.0)
        axes = figure.add_subplot()
        for log, color in zip(logs, colors(len(logs)), strict=True):
            for name, style, what in (
                ("train", {"alpha": 0.45, "linewidth": 1.0}, "training"),
                ("eval", {"marker": "."}, "held out"),
            ):
                curve = curves[log.label][name]
                label = what if len(logs) == 1 else f"{log.label}, {what}"
                axes.plot(
                    np.array(curve["step"]) * log.tokens_per_step / 1e6,
                    curve["bits_per_byte"],
                    color=color,
                    label=label,
                    **style,
                )
        finish(axes, "tokens (millions)", "loss (bits per byte)")
        return figure

    caption = (
        "Loss in bits per byte of text, which compares tokenizers too: pale of each logged training batch, dotted of "
        "held-out text."
    )
    return Picture("training_loss", "Loss", caption, curves, draw)


def _by_layer(
    log: Log,
    layers: Sequence[int],
    tag: str,
    title: str,
    unit: str,
    of: Callable[[np.ndarray], np.ndarray],
    caption: str,
) -> Picture | None:
    found = {f"layer {layer}": log.curve(f"layer_{layer}/{tag}") for layer in layers}
    if not found or any(not len(steps) for steps, _ in found.values()):
        return None
    steps = next(iter(found.values()))[0]
    series = {name: of(values) for name, (_, values) in found.items() if len(values) == len(steps)}
    return Picture(
        f"training_{tag}",
        f"{title} over training",
        caption,
        {"step": steps, "layers": series},
        lambda: lines(steps, series, "step", unit, ordered=True),
    )


def _balance(logs: Sequence[Log]) -> Picture:
    found = {log.label: log.curve("train/load_balance_loss") for log in logs}

    def draw() -> Any:
        figure = new_figure(4.6, 3.0)
        axes = figure.add_subplot()
        for log, color in zip(logs, colors(len(logs)), strict=True):
            steps, values = found[log.label]
            axes.plot(steps * log.tokens_per_step / 1e6, values, color=color, label=log.label)
        finish(axes, "tokens (millions)", "load balance loss, mean over layers", 1)
        return figure

    numbers = {label: {"step": steps, "load_balance_loss": values} for label, (steps, values) in found.items()}
    caption = "The balance loss, unweighted: 1 is perfect. A run that is higher loads some experts more than others."
    return Picture("training_balance", "Balance of the runs", caption, numbers, draw)


def _loads(log: Log) -> Picture:
    width = max(np.shape(line["tokens_per_expert"])[-1] for line in log.loads)
    kept = [line for line in log.loads if np.shape(line["tokens_per_expert"])[-1] == width]
    split = "train" if any(line.get("split") == "train" for line in kept) else "eval"
    kept = [line for line in kept if line.get("split") == split]
    steps = [line["step"] for line in kept]
    counts_SYN = np.array([line["tokens_per_expert"] for line in kept], float)
    load_SYN = counts_SYN / np.maximum(counts_SYN.mean(axis=-1, keepdims=True), 1e-9)
    layers = kept[-1]["layers"]
    shades = {
        f"layer {layer}": np.log2(np.clip(load_SYN[:, index].T, 1 / _LARGEST, _LARGEST))
        for index, layer in enumerate(layers)
    }
    limit = math.log2(_LARGEST)

    def draw() -> Any:
        span = (steps[0], max(steps[-1], steps[0] + 1))
        figure = heat_maps(shades, "step", "expert", "load / mean", (-limit, limit), diverging=True, extent=span)
        figure.axes[-1].set_yticks([-2, -1, 0, 1, 2], ["≤1/4", "1/2", "1", "2", "≥4"])
        return figure

    caption = (
        "The share of tokens that each expert takes, in multiples of its layer's mean: white is the mean, orange more, "
        "violet less. A row that stays dark violet is an expert that has fallen idle. Of many layers some are shown; "
        "the numbers have all."
    )
    numbers = {"step": steps, "layers": list(layers), "load": load_SYN, "split": split}
    return Picture("training_load", "Load of each expert over training", caption, numbers, draw)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects that have a step; none if there is no file."""
    try:
        texts = read_file(path).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # the last one of a run under way may be half there
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found
