"""How the training step grows: with the number of experts at fixed active FLOPs, with depth, and with tokens."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from default_moe.bench import report
from default_moe.bench.candidate import StepCandidate, random_batch
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately
from default_moe.config import Config, ConfigError, ModelConfig
from default_moe.hardware import heading
from default_moe.training.program import mesh_for

NUM_EXPERTS = (8, 16, 32, 64, 128)
NUM_LAYERS = (6, 12, 24)
BATCHES = (0.25, 0.5, 1, 2, 4)
_VOCAB_SIZE = 257


def sweeps(config: Config) -> dict[str, dict[int, Config]]:
    """Return the configs of each sweep by the value that is swept, all else as in `config`."""

    def changed(section: str, **values: int) -> Config:
        part = dataclasses.replace(getattr(config, section), **values)
        return dataclasses.replace(config, **{section: part})

    # top_k and expert_dim stay, so a token's FLOPs do too, but for the router's. Batches stay multiples of the devices.
    devices = jax.device_count()
    sizes = {max(1, round(config.train.batch_size * factor / devices)) * devices for factor in BATCHES}
    found = {
        "num_experts": {n: changed("moe", num_experts=n) for n in NUM_EXPERTS if n >= config.moe.top_k},
        "num_layers": {n: changed("model", num_layers=n) for n in NUM_LAYERS if _has_experts(config.model, n)},
        "tokens": {
            size * config.train.sequence_length: changed("train", batch_size=size, grad_accum_steps=1)
            for size in sorted(sizes)
        },
    }
    return {sweep: configs for sweep, configs in found.items() if configs}


def _has_experts(model: ModelConfig, num_layers: int) -> bool:
    try:
        return dataclasses.replace(model, num_layers=num_layers).num_moe_layers > 0
    except ConfigError:
        return False


def run(config: Config, rounds: int) -> list[Row]:
    """Time the step of all configs of a sweep alternately, print a table of each, and return the rows.

    Tokens are random. Raises ConfigError.
    """
    for configs in sweeps(config).values():
        for swept in configs.values():
            mesh_for(swept)  # what does not fit the devices is said before anything is timed
    print(heading())
    rows: list[Row] = []
    for sweep, configs in sweeps(config).items():
        group = _run_sweep(sweep, configs, rounds)
        print(f"\n{report.table(group, tuple(group[0]))}", flush=True)
        rows += group
    return rows


def _run_sweep(sweep: str, configs: Mapping[int, Config], rounds: int) -> list[Row]:
    candidates = {v: StepCandidate(c, random_batch(c, _VOCAB_SIZE), _VOCAB_SIZE) for v, c in configs.items()}
    steps = time_alternately({value: c.step for value, c in candidates.items()}, rounds)
    gradients = time_alternately({value: c.gradient for value, c in candidates.items()}, rounds)
    first = next(iter(candidates))
    rows: list[Row] = []
    for value, candidate in candidates.items():
        train = configs[value].train
        rows.append(
            {
                "sweep": sweep,
                "value": value,
                "step ms": steps[value].seconds * 1e3,
                **steps[value].versus(steps[first], "/ first"),
                "forward+backward ms": gradients[value].seconds * 1e3,
                "tokens/s": train.batch_size * train.sequence_length / steps[value].seconds,
                "compile s": candidate.compile_seconds,
                "/ first's": candidate.compile_seconds / candidates[first].compile_seconds,
            }
        )
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Draw the time against the first value of each sweep, and for depth the compile time too. Raises ConfigError."""
    with report.figure(path, width=11) as figure:
        for axes, (sweep, label) in zip(
            figure.subplots(1, 3),
            (("num_experts", "experts (active FLOPs fixed)"), ("num_layers", "layers"), ("tokens", "tokens a step")),
            strict=True,
        ):
            found = [row for row in rows if row["sweep"] == sweep]
            values = [row["value"] for row in found]
            axes.plot(values, [row["/ first"] for row in found], marker="o", label="step")
            if sweep == "num_layers":
                axes.plot(values, [row["/ first's"] for row in found], marker="s", label="compiling")
                axes.legend(fontsize=8)
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
            axes.set_xlabel(label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("time / that of the first")
