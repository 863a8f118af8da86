"""The Mixture-of-Experts layer in Flax: modules that own the variables and call the pure functions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from default_moe import routing
from default_moe.config import MoEConfig
from default_moe.device_experts import DefaultVectors, Routing
from default_moe.experts import choose_experts, sparse_experts
from default_moe.sharding import with_axes
from default_moe.swiglu import INTO_EXPERT, OUT_OF_EXPERT, ExpertWeights

# Collections. The sums exist only while a batch is processed in several microbatches (see `train_step`).
DEFAULT_VECTORS = "default_vectors"
DEFAULT_VECTOR_SUMS = "default_vector_sums"


def small_init_std(d_model: int) -> float:
    """Standard deviation of "small init": sqrt(2 / (5 D)) (Nguyen and Salazar 2019)."""
    return (2 / (5 * d_model)) ** 0.5


class Router(nn.Module):
    """Router logits W x in float32, without a bias (arXiv:2504.12463, eq. 1)."""

    num_experts: int

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        d_model = x_BLD.shape[-1]
        init = with_axes(nn.initializers.normal(small_init_std(d_model)), "embed", None)
        kernel_DN = self.param("kernel", init, (d_model, self.num_experts), jnp.float32)
        # Highest precision: TPUs and recent GPUs would round float32 operands otherwise.
        return jnp.matmul(x_BLD.astype(jnp.float32), kernel_DN, precision=jax.lax.Precision.HIGHEST)


class Experts(nn.Module):
    """The weights of N SwiGLU experts: float32 parameters, returned in the compute dtype."""

    config: MoEConfig
    down_init_std: float | None

    @nn.compact
    def __call__(self, d_model: int, dtype: jnp.dtype) -> ExpertWeights:
        n, f = self.config.num_experts, self.config.expert_dim
        init = nn.initializers.normal(small_init_std(d_model))
        down_init = init if self.down_init_std is None else nn.initializers.normal(self.down_init_std)
        into, out_of = with_axes(init, *INTO_EXPERT), with_axes(down_init, *OUT_OF_EXPERT)
        return ExpertWeights(
            gate=self.param("gate", into, (n, d_model, f), jnp.float32).astype(dtype),
            up=self.param("up", into, (n, d_model, f), jnp.float32).astype(dtype),
            down=self.param("down", out_of, (n, f, d_model), jnp.float32).astype(dtype),
        )


class MoELayer(nn.Module):
    """A dropless sparse Mixture-of-Experts feed-forward layer: Default MoE or plain top-k.

    Call: `y, aux = layer.apply(variables, x, train=True, mutable=["default_vectors"])[0]`. With `train=False` nothing
    is mutable, and the default vectors are used as they are.

    Variables:
      params: router/kernel [D, N]; experts/gate, experts/up [N, D, F]; experts/down [N, F, D]; all float32.
      default_vectors: ema [N, D], float32 (router "default" only).

    Attributes:
      config: settings of the layer.
      down_init_std: standard deviation of experts/down at the start; None takes that of the others.
    """

    config: MoEConfig
    down_init_std: float | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Apply the layer.

        Args:
          x: tokens [batch, length, D].
          train: update the default vectors with this batch.
          mask: [batch, length], 0 for tokens that count in no statistic (padding). They are processed all the same.

        Returns:
          y, of the shape and dtype of x, and a dict of
            load_balance_loss: unweighted, 1 at perfect balance.  router_z_loss: unweighted.
            router_probs: float32 [batch, length, N].  expert_index: int32 [batch, length, K], likeliest first.
            tokens_per_expert: int32 [N].  router_entropy: mean over tokens, in nats.
            default_vector_norm: float32 [N] (router "default" only).
        """
        config = self.config
        dtype = jnp.dtype(config.dtype or "float32")
        logits_BLN = Router(config.num_experts, name="router")(x)
        probs_BLN = jax.nn.softmax(logits_BLN, axis=-1)
        index_BLK = choose_experts(probs_BLN, config.top_k)
        weights = Experts(config, self.down_init_std, name="experts")(x.shape[-1], dtype)
        update = train and not self.is_initializing()
        defaults = self._read_defaults(x.shape[-1]) if config.router == "default" else None
        y, defaults = sparse_experts(
            x.astype(dtype), Routing(probs_BLN, index_BLK, mask), weights, defaults, config, update=update
        )
        if defaults is not None and update:
            self._write_defaults(defaults)

        counts_N = routing.tokens_per_expert(index_BLK, config.num_experts, mask)
        aux = {
            "load_balance_loss": routing.load_balance_loss(probs_BLN, counts_N, mask),
            "router_z_loss": routing.router_z_loss(logits_BLN, mask),
            "router_probs": probs_BLN,
            "expert_index": index_BLK,
            "tokens_per_expert": counts_N,
            "router_entropy": routing.router_entropy(logits_BLN, mask),
        }
        if defaults is not None:
            aux["default_vector_norm"] = jnp.linalg.norm(defaults.ema, axis=-1)
        return y.astype(x.dtype), aux

    def _read_defaults(self, d_model: int) -> DefaultVectors:
        shape = (self.config.num_experts, d_model)
        if not self.is_initializing() and not self.has_variable(DEFAULT_VECTORS, "ema"):
            # Flax would start again from the initial value in every step, without a word.
            raise ValueError(
                f"the collection {DEFAULT_VECTORS!r} is missing from the variables: pass what init or the last step "
                "returned"
            )
        ema = self.variable(DEFAULT_VECTORS, "ema", with_axes(self._init_ema, "expert", None), shape)
        total = self.get_variable(DEFAULT_VECTOR_SUMS, "sum", jnp.zeros(shape, jnp.float32))
        weight = self.get_variable(DEFAULT_VECTOR_SUMS, "weight", jnp.zeros(shape[:1], jnp.float32))
        return DefaultVectors(ema.value, total, weight)

    def _init_ema(self, shape: tuple[int, int]) -> Array:
        if self.config.ema_init == "zeros":
            return jnp.zeros(shape, jnp.float32)
        return self.config.ema_init_std * jax.random.normal(self.make_rng("params"), shape, jnp.float32)

    def _write_defaults(self, defaults: DefaultVectors) -> None:
        self.put_variable(DEFAULT_VECTORS, "ema", defaults.ema)
        if self.has_variable(DEFAULT_VECTOR_SUMS, "sum"):
            self.put_variable(DEFAULT_VECTOR_SUMS, "sum", defaults.sum)
            self.put_variable(DEFAULT_VECTOR_SUMS, "weight", defaults.weight)


def zero_sums(default_vectors: Any) -> Any:
    """The `default_vector_sums` collection, empty, that goes with a `default_vectors` collection of any model."""
    return jax.tree.map(
        lambda node: {"sum": jnp.zeros_like(node["ema"]), "weight": jnp.zeros(node["ema"].shape[:-1], jnp.float32)},
        default_vectors,
        is_leaf=lambda node: isinstance(node, dict) and "ema" in node,
    )
