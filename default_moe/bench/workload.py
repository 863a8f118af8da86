"""The MoE layer and its rivals on the same work: what the `layer` and `products` suites time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from default_moe.config import MoEConfig
from default_moe.errors import ConfigError, quoted
from default_moe.moe import MoELayer
from default_moe.moe.experts.swiglu import ExpertParams, swiglu_hidden

ROUTINGS = ("balanced", "skewed")


class LayerShape(NamedTuple):
    """T tokens, model width D, N experts of hidden width F, of which each token runs K."""

    tokens: int
    d_model: int
    num_experts: int
    top_k: int
    expert_dim: int

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.d_model} N{self.num_experts} K{self.top_k} F{self.expert_dim}"

    @classmethod
    def parse(cls, text: str) -> "LayerShape":
        """Return the shape that "T,D,N,K,F" says. Raises ConfigError."""
        given = quoted(text)
        try:
            shape = cls(*(int(part) for part in text.split(",")))
        except (ValueError, TypeError):
            raise ConfigError(f"--shape is {given}, but must be five numbers T,D,N,K,F: 4096,256,8,1,704") from None
        if min(shape) < 1 or shape.top_k > shape.num_experts or shape.num_experts > shape.d_model:
            raise ConfigError(f"--shape is {given}, but must have 1 <= K <= N <= D and all numbers positive")
        if max(shape.tokens, shape.num_experts * shape.expert_dim) * shape.d_model >= 2**31:
            raise ConfigError(f"--shape is {given}, but T D and N D F must be below 2**31")
        return shape

    def active_flops(self) -> int:
        """Return the multiplications and additions of the forward pass's matrix products."""
        return 2 * 3 * self.tokens * self.top_k * self.d_model * self.expert_dim


CPU_SHAPES = tuple(LayerShape(4096, 256, n, k, 5632 // n) for n, k in ((8, 1), (8, 2), (32, 4)))
ACCELERATOR_SHAPES = tuple(
    LayerShape(16_384, 1024, n, k, 22_528 // n) for n, k in ((8, 1), (8, 2), (32, 1), (32, 2), (32, 4))
)


def standard_shapes() -> tuple[LayerShape, ...]:
    """Return what the `layer` suite times here unless told otherwise."""
    return CPU_SHAPES if on_cpu() else ACCELERATOR_SHAPES


def product_shapes() -> tuple[LayerShape, ...]:
    """Return what the `products` suite times here unless told otherwise."""
    if on_cpu():
        return CPU_SHAPES[0], CPU_SHAPES[-1]
    return ACCELERATOR_SHAPES[0], ACCELERATOR_SHAPES[-1], LayerShape(16_384, 1024, 64, 8, 512)


def standard_dtype() -> str:
    """Return the compute type here unless told otherwise."""
    return "float32" if on_cpu() else "bfloat16"


def on_cpu() -> bool:
    """Whether work must be small."""
    return jax.default_backend() == "cpu"


class Work(NamedTuple):
    """x [1, T, D] and output gradient g of its shape, in the compute dtype; the layer's parameters, in float32.

    dense: a feed-forward network of the same active FLOPs, one expert of width K F, in float32.
    """

    x: Array
    g: Array
    params: dict[str, Any]
    dense: ExpertParams


def make_work(shape: LayerShape, routing: str, dtype: str, seed: int = 0) -> Work:
    """Return random tokens and weights, with a router that sends the tokens where `routing` says.

    "balanced": each token's K experts are drawn uniformly.  "skewed": half of the tokens have expert 0 among theirs,
    the others do not; the rest are drawn uniformly.
    """
    rng = np.random.default_rng(seed)
    tokens, d_model, num_experts, top_k, width = shape
    score = rng.random((tokens, num_experts))
    if routing == "skewed":
        score[:, 0] = np.where(np.arange(tokens) % 2 == 0, 2.0, -1.0)
    # The router's columns are orthonormal, so a token's logits are its coordinates along them: set at will.
    kernel = np.linalg.qr(rng.normal(size=(d_model, num_experts)))[0]
    x = rng.normal(size=(tokens, d_model))
    x += (4 * score - x @ kernel) @ kernel.T

    def weights(*size: int) -> Array:
        return jnp.asarray(rng.normal(size=size, scale=size[-2] ** -0.5), jnp.float32)

    experts = {name: weights(num_experts, d_model, width) for name in ("gate", "up")}
    experts["down"] = weights(num_experts, width, d_model)
    wide = width * top_k
    dense = ExpertParams(weights(d_model, wide), weights(d_model, wide), weights(wide, d_model))
    params = {"router": {"kernel": jnp.asarray(kernel, jnp.float32)}, "experts": experts}
    g = rng.normal(size=(1, tokens, d_model))
    return Work(jnp.asarray(x[None], dtype), jnp.asarray(g, dtype), params, dense)


def moe_candidate(shape: LayerShape, work: Work, router: str, matmul: str) -> tuple[Callable, Callable]:
    """Return the forward and the forward and backward pass of the layer, to be called without arguments."""
    _, _, num_experts, top_k, width = shape
    config = MoEConfig(num_experts, top_k, width, router=router, dtype=work.x.dtype.name, matmul=matmul)
    layer = MoELayer(config)
    state = {}
    if config.default_vectors:
        state = {"default_vectors": {"ema": jnp.ones((shape.num_experts, shape.d_model), jnp.float32)}}

    def forward(params: Any, x: Array, state: Any) -> Any:
        (y, aux), state = layer.apply({"params": params, **state}, x, train=True, mutable=list(state))
        return y, aux["auxiliary_loss"], state

    def objective(params: Any, x: Array, g: Array, state: Any) -> Any:
        y, auxiliary_loss, state = forward(params, x, state)
        return (y * g).sum() + auxiliary_loss, state

    both = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    return _bind(forward, work.params, work.x, state), _bind(both, work.params, work.x, work.g, state)


def dense_candidate(work: Work) -> tuple[Callable, Callable]:
    """Return the same of a dense feed-forward network of equal active FLOPs."""

    def forward(params: ExpertParams, x: Array) -> Array:
        gate, up, down = (w.astype(x.dtype) for w in params)
        return (swiglu_hidden(x[0] @ gate, x[0] @ up).astype(x.dtype) @ down)[None]

    def objective(params: ExpertParams, x: Array, g: Array) -> Array:
        return (forward(params, x) * g).sum()

    both = jax.value_and_grad(objective, argnums=(0, 1))
    return _bind(forward, work.dense, work.x), _bind(both, work.dense, work.x, work.g)


def _bind(function: Callable, *args: Any) -> Callable:
    return functools.partial(jax.jit(function), *args)
