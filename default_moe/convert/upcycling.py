"""A dense model as a Mixture-of-Experts: experts begin as copies of the dense network (Komatsuzaki et al. 2023)."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from default_moe.config import Config
from default_moe.convert.checkpoints import Weights, empty_array, write_checkpoint
from default_moe.errors import check
from default_moe.moe.feed_forward import small_init_std


@dataclass(frozen=True)
class Upcycling:
    """How experts are made of a dense network.

    num_experts, top_k: of each layer.
    noise: standard deviation of what is added to an expert's weights, as a part of that of each matrix.
    redraw: share of an expert's hidden units, others in each, whose weights are drawn anew with the mean and the
      standard deviation of what they were (Drop-Upcycling: Nakamura et al. 2025).
    seed: of the router, the noise and the units.
    """

    num_experts: int = 8
    top_k: int = 2
    noise: float = 0.0
    redraw: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check(0 <= self.noise < 1e30, f"--noise is {self.noise}, but must be at least 0, and finite")
        check(0 <= self.redraw <= 1, f"--redraw is {self.redraw}, but must lie between 0 and 1")


def upcycle(dense: Weights, workdir: Path, how: Upcycling) -> Config:
    """Write a dense model to a new work directory as a Mixture-of-Experts, at step 0. Returns its config.

    The weights of a token's experts sum to one: without noise and redrawn units the model computes what the dense one
    does, whatever its router chooses.
    Raises ConfigError, with nothing written, if that cannot be.
    """
    config = _upcycled_config(dense.config, how)
    rng = np.random.default_rng(how.seed)
    params = dict(dense.arrays["params"])
    layers = dict(params.pop("dense_layers"))
    kernels = {name: parameter["kernel"] for name, parameter in layers.pop("ffn").items()}
    layers["moe"] = {"router": {"kernel": _router(config, rng)}, "experts": _experts(kernels, how, rng)}
    params["moe_layers"] = layers
    write_checkpoint(workdir, dataclasses.replace(dense, config=config, arrays={"params": params}))
    return config


def check_dense(config: Config) -> None:
    """Raises ConfigError if a model has experts already."""
    layers = config.model.num_moe_layers
    check(layers == 0, f"{layers} of the model's layers have experts already, but upcycling takes one without any")


def _upcycled_config(dense: Config, how: Upcycling) -> Config:
    """The dense model's config with experts in all layers. Raises ConfigError."""
    values = {name: value for name, value in dense.to_dict().items() if not name.startswith("init_")}
    return Config.from_mapping(
        {
            **values,
            "model": {
                **values["model"],
                "num_dense_layers": 0,
                "moe_every": 1,
                "dense_layers": None,
                "dense_dim": None,
            },
            "moe": {
                "router": "topk",
                "num_experts": how.num_experts,
                "top_k": how.top_k,
                "expert_dim": dense.model.dense_dim or dense.moe.expert_dim,
                "normalize_weights": True,
            },
        }
    )


def _router(config: Config, rng: np.random.Generator) -> np.ndarray:
    """As small as that of a model that begins to train."""
    shape = (config.model.num_layers, config.model.d_model, config.moe.num_experts)
    return small_init_std(config.model.d_model) * rng.standard_normal(shape, np.float32)


def _experts(kernels: dict[str, Any], how: Upcycling, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The experts' weights, made of the dense networks' [layers, in, out]."""
    num_layers, _, hidden = kernels["gate"].shape
    shapes = {name: (num_layers, how.num_experts, *kernel.shape[1:]) for name, kernel in kernels.items()}
    experts = {name: empty_array(shape) for name, shape in shapes.items()}
    for layer, expert in itertools.product(range(num_layers), range(how.num_experts)):
        units = rng.choice(hidden, round(how.redraw * hidden), replace=False)
        for name, kernel in kernels.items():
            weights = experts[name][layer, expert]
            weights[...] = kernel[layer]
            if how.noise:
                weights += how.noise * weights.std() * rng.standard_normal(weights.shape, np.float32)
            if units.size:
                of_units = weights if name == "down" else weights.T
                old = of_units[units]
                of_units[units] = old.mean() + old.std() * rng.standard_normal(old.shape, np.float32)
    return experts
