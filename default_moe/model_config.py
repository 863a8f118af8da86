"""The settings of the model: its MoE layers and what is around them. Used through `config.py`."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from default_moe.checks import check, check_at_least, check_choice, check_fraction

MATMUL_BACKENDS = ("blocks", "ragged", "tokamax")
EXPERT_PARALLEL_FORMS = ("gather", "exchange")
REMATS = ("none", "dots", "full")  # from the most memory to the most recomputation


def _dtype_name(name: str, value: Any) -> str:
    """The name of a compute dtype given as a string or as a NumPy or JAX type."""
    try:
        dtype = jnp.dtype(value).name
    except TypeError:
        dtype = str(value)
    check_choice(name, dtype, ("float32", "bfloat16"))
    return dtype


@dataclass(frozen=True)
class MoEConfig:
    """One sparse Mixture-of-Experts layer.

    num_experts: N.  top_k: K, experts that each token runs.  expert_dim: F, hidden width of one SwiGLU expert.
    router: "default" (the router gets a dense gradient through default vectors) or "topk" (it does not).
    ema_decay: beta of the default vectors' moving average.  ema_weighted: average expert outputs weighted by their
      router probability.  substitute: "forward" adds the default vectors of the inactive experts to the output,
      "backward" uses them for the router's gradient alone.  ema_init: "zeros" or "gaussian" (with ema_init_std).
    load_balance_weight, router_z_weight: factors of the auxiliary losses in the training loss.
    dtype: compute type of the experts; None stands for model.dtype in a config file, for float32 on its own. The
      router and the default vectors are float32 always.
    matmul: how experts are computed, "blocks", "ragged" or "tokamax", see `grouped_matmul.py`; "auto" picks by
      platform.
    expert_parallel: how devices that hold different experts share tokens, "gather" or "exchange", see
      `expert_parallel.py`; "auto" picks by platform and by what is moved.
    """

    num_experts: int = 8
    top_k: int = 1
    expert_dim: int = 352
    router: str = "default"
    ema_decay: float = 0.9
    ema_weighted: bool = True
    substitute: str = "forward"
    ema_init: str = "zeros"
    ema_init_std: float = 0.02
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.0
    dtype: str | None = None
    matmul: str = "auto"
    expert_parallel: str = "auto"

    def __post_init__(self) -> None:
        check_at_least("moe.num_experts", self.num_experts, 1)
        check(
            1 <= self.top_k <= self.num_experts,
            f"moe.top_k is {self.top_k}, but must lie between 1 and moe.num_experts = {self.num_experts}",
        )
        check_at_least("moe.expert_dim", self.expert_dim, 1)
        check_choice("moe.router", self.router, ("default", "topk"))
        check_fraction("moe.ema_decay", self.ema_decay)
        check_choice("moe.substitute", self.substitute, ("forward", "backward"))
        check_choice("moe.ema_init", self.ema_init, ("zeros", "gaussian"))
        check_at_least("moe.ema_init_std", self.ema_init_std, 0)
        check_at_least("moe.load_balance_weight", self.load_balance_weight, 0)
        check_at_least("moe.router_z_weight", self.router_z_weight, 0)
        check_choice("moe.matmul", self.matmul, ("auto", *MATMUL_BACKENDS))
        check_choice("moe.expert_parallel", self.expert_parallel, ("auto", *EXPERT_PARALLEL_FORMS))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _dtype_name("moe.dtype", self.dtype))


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only language model around the MoE layers.

    vocab_size: None takes the tokenizer's.  num_dense_layers: leading layers with a dense feed-forward network of
    width dense_dim (None: as wide as one expert).  attention: "xla", "cudnn" (an NVIDIA GPU and bfloat16), "splash"
    (a TPU), or "auto", which takes a kernel where it runs.  remat: what the backward pass recomputes, "none", "full" or
    "dots" (all but products with weights and kernels).  scan_unroll: layers unrolled per step of the scan over layers.
    """

    vocab_size: int | None = None
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_dense_layers: int = 1
    dense_dim: int | None = None
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "scan_unroll"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
        check(
            self.d_model % self.num_heads == 0,
            f"model.num_heads is {self.num_heads}, but must divide model.d_model = {self.d_model}",
        )
        check(
            (self.d_model // self.num_heads) % 2 == 0,
            f"model.d_model / model.num_heads is {self.d_model // self.num_heads}, but rotary embeddings need it even",
        )
        check(
            0 <= self.num_dense_layers <= self.num_layers,
            f"model.num_dense_layers is {self.num_dense_layers}, but must lie between 0 and model.num_layers = "
            f"{self.num_layers}",
        )
        for name in ("vocab_size", "dense_dim"):
            if getattr(self, name) is not None:
                check_at_least(f"model.{name}", getattr(self, name), 1)
        check(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}, but must be positive")
        check_choice("model.attention", self.attention, ("auto", "xla", "cudnn", "splash"))
        check_choice("model.remat", self.remat, REMATS)
        object.__setattr__(self, "dtype", _dtype_name("model.dtype", self.dtype))

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers
