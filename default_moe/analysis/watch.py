"""A page about a run under way, for a terminal: `python -m default_moe.analysis watch --workdir=runs/quickstart`."""

import sys
import time
from pathlib import Path

import numpy as np

from default_moe.analysis.over_training import Log, read_log
from default_moe.config import Config
from default_moe.errors import ConfigError, check, shown
from default_moe.files import read_json
from default_moe.runs.identity import RUN_FILE

_SECONDS = 2.0
_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60
_COLUMNS = ("load_balance_loss", "router_entropy", "max_load", "min_load", "idle_experts", "top_prob")
_CLEAR = "\033[H\033[2J"


def run(workdirs: list[Path], step: int | None, overrides: list[str]) -> int:
    """Show the page again and again until Ctrl-C, or once if the output is no terminal; returns the exit code."""
    check(len(workdirs) == 1, "--workdir is given several times, but one run is watched")
    check(step is None and len(overrides) == 1, "watch takes --workdir and nothing else")
    workdir = workdirs[0]
    try:
        config = Config.from_mapping(read_json(workdir / RUN_FILE)["config"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{workdir} is no run that can be read: {shown(error)}") from None
    while True:
        text = page(read_log(workdir, config, str(workdir)), config)
        if not sys.stdout.isatty():
            print(text)
            return 0
        print(f"{_CLEAR}{text}\n\nCtrl-C ends this page, not the run", flush=True)
        time.sleep(_SECONDS)


def page(log: Log, config: Config) -> str:
    """What the newest lines of the metrics say, and a curve of the loss."""
    steps, losses = log.curve("train/loss")
    held_out_steps, held_out = log.curve("eval/loss")
    _, seconds = log.curve("train/step_seconds")
    _, speeds = log.curve("train/tokens_per_second")
    lines = [f"{log.label}: {config.moe.method.name!r}, step {log.metrics[-1]['step']} of {config.train.num_steps}"]
    if len(losses):
        lines.append(f"loss       {losses[-1]:.4f}  {curve(losses)}")
    if len(held_out):
        lines.append(f"held out   {held_out[-1]:.4f}  at step {held_out_steps[-1]}, lowest {held_out.min():.4f}")
    if len(speeds):
        left = float(np.median(seconds[-20:])) * (config.train.num_steps - steps[-1])
        lines.append(f"speed      {speeds[-1]:,.0f} tokens/s, {max(left, 0) / 60:.0f} minutes left")
    if config.model.num_moe_layers:
        lines.append("layer" + "".join(f"{name:>19}" for name in _COLUMNS))
    for layer in config.model.moe_layers:
        values = [log.curve(f"layer_{layer}/{name}")[1][-1:] for name in _COLUMNS]
        lines.append(f"{layer:5}" + "".join(f"{x[0]:19.3f}" if len(x) else f"{'-':>19}" for x in values))
    return "\n".join(lines)


def curve(values: np.ndarray) -> str:
    """A line of bars, at most `_WIDTH`, each the mean of its part of the values; the highest is the largest."""
    parts = [float(part.mean()) for part in np.array_split(values, min(len(values), _WIDTH))]
    low, high = min(parts), max(parts)
    scale = (len(_BARS) - 2) / (high - low) if high > low else 0.0
    return "".join(_BARS[1 + round((part - low) * scale)] for part in parts)
