"""What is measured of a training step or an evaluation: how each MoE layer spreads its tokens, and how fast steps are.

Dimension key: Y MoE layers, N experts.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from default_moe.hardware import peak_flops
from default_moe.model.size import train_flops_per_token
from default_moe.training.program import Program

_OF_A_STEP = ("load_balance_loss", "router_entropy", "max_load", "min_load", "idle_experts", "experts_per_token")


def layer_statistics(stats: Any) -> dict[str, np.ndarray]:
    """Statistics [Y] by name, of `LayerStats` of NumPy arrays; loads are relative to the mean over experts."""
    counts_YN = stats.tokens_per_expert
    load_YN = counts_YN / np.maximum(counts_YN.mean(axis=1, keepdims=True), 1e-9)
    return {
        "load_balance_loss": stats.load_balance_loss,
        "router_z_loss": stats.router_z_loss,
        "router_entropy": stats.router_entropy,
        **stats.more,
        "max_load": load_YN.max(axis=1),
        "min_load": load_YN.min(axis=1),
        "idle_experts": (counts_YN == 0).mean(axis=1),
        "experts_per_token": counts_YN.sum(axis=1) / np.maximum(stats.num_tokens, 1),
    }


class StepMeasurements:
    """What is logged of training steps. Time counts from `start`, a step, or the last `restart` on."""

    def __init__(self, program: Program, start: int):
        train = program.config.train
        self._moe_layers = program.config.model.moe_layers
        self._tokens_per_step = train.batch_size * train.sequence_length
        self._flops_per_token = train_flops_per_token(program.config, program.vocab_size)
        self._steps, self._seconds, self._seconds_per_step = 0, 0.0, math.nan
        self.restart(start)

    def restart(self, step: int) -> None:
        """The time since the last step that was logged counts for nothing: it went into something else."""
        self._step, self._time = step, time.monotonic()

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Flat metrics of a step, fetched from the devices: its own, speed since the last ones, and its layers'."""
        layers = metrics["layers"]
        values = {f"train/{name}": value for name, value in metrics.items() if name != "layers"}
        return {**values, **self._speed(step), **(self._of_layers(layers) if layers else {})}

    def mean_tokens_per_second(self) -> float:
        """Over all steps measured; 0 if there was none."""
        return self._steps / self._seconds * self._tokens_per_step if self._seconds else 0.0

    def _speed(self, step: int) -> dict[str, float]:
        """Since the last call or restart, whichever was later; what the last call gave if no step has passed."""
        seconds, steps = time.monotonic() - self._time, step - self._step
        if steps > 0:
            self._seconds_per_step = seconds / steps
            self._steps += steps
            self._seconds += seconds
            self.restart(step)
        tokens_per_second = self._tokens_per_step / self._seconds_per_step
        flops = tokens_per_second * self._flops_per_token
        values = {
            "train/step_seconds": self._seconds_per_step,
            "train/tokens_per_second": tokens_per_second,
            "train/model_flops_per_second": flops,
        }
        peak = peak_flops(jax.devices()[0])
        return {**values, "train/mfu": flops / (peak * jax.device_count())} if peak else values

    def _of_layers(self, stats: Any) -> dict[str, float]:
        """Means over layers (of loads the extremes), and each layer's own under layer_<number in the model>/."""
        of_layers = layer_statistics(stats)
        names = [*_OF_A_STEP, *stats.more]
        values = {f"train/{name}": of_layers[name].mean() for name in [*names, "router_z_loss"]}
        values["train/max_load"] = of_layers["max_load"].max()
        values["train/min_load"] = of_layers["min_load"].min()
        for index, layer in enumerate(self._moe_layers):
            values |= {f"layer_{layer}/{name}": of_layers[name][index] for name in names}
        return values
