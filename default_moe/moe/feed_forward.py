"""Flax: the dense SwiGLU feed-forward network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from default_moe.sharding import with_axes


def small_init_std(d_model: int) -> float:
    """Standard deviation of "small init": sqrt(2 / (5 D)) (Nguyen and Salazar 2019)."""
    return (2 / (5 * d_model)) ** 0.5


class FeedForward(nn.Module):
    """silu(x gate) * (x up), times down. hidden_dim: F.  down_init_std: None takes that of the others."""

    hidden_dim: int
    dtype: jnp.dtype
    down_init_std: float | None = None

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        d_model = x_BLD.shape[-1]
        std = small_init_std(d_model)
        init = with_axes(nn.initializers.normal(std), "embed", "mlp")
        merge = with_axes(nn.initializers.normal(self.down_init_std or std), "mlp", "embed")
        x_TD = x_BLD.reshape(-1, d_model)  # plain matrix products: XLA for CPU is twice as fast on them

        def dense(width: int, kernel_init: nn.initializers.Initializer, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=kernel_init, name=name)

        gate, up = dense(self.hidden_dim, init, "gate")(x_TD), dense(self.hidden_dim, init, "up")(x_TD)
        return dense(d_model, merge, "down")(jax.nn.silu(gate) * up).reshape(x_BLD.shape)
