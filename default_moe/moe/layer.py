"""The Mixture-of-Experts layer in Flax: modules that own the variables and call the pure functions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from default_moe.config import MoEConfig
from default_moe.methods import Decision, Load, RouterInputs, largest, routing
from default_moe.methods.decision import State
from default_moe.moe.coupling import coupling_loss, proxy_noise
from default_moe.moe.default_vectors import DefaultVectors
from default_moe.moe.experts.layout import Routing
from default_moe.moe.experts.sparse import sparse_experts
from default_moe.moe.experts.swiglu import INTO_EXPERT, OUT_OF_EXPERT, ExpertParams
from default_moe.moe.feed_forward import FeedForward, small_init_std
from default_moe.sharding import check_divisible, constrain, with_axes

# Collections. The sums exist only while a batch is processed in several microbatches (see `train_step`).
DEFAULT_VECTORS = "default_vectors"
DEFAULT_VECTOR_SUMS = "default_vector_sums"
ROUTER_STATE = "router_state"
ROUTER_SUMS = "router_sums"
ROUTING = "routing"  # where each token goes, if this is mutable

Losses = dict[str, tuple[Array | float, Array]]  # weight and value by name


class Router(nn.Module):
    """Router logits W x in float32, without a bias (arXiv:2504.12463, eq. 1).

    init_std: standard deviation of W at the start; None takes small init's.
    """

    num_experts: int
    init_std: float | None

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        d_model = x_BLD.shape[-1]
        std = small_init_std(d_model) if self.init_std is None else self.init_std
        init = with_axes(nn.initializers.normal(std), "embed", None)
        kernel_DN = self.param("kernel", init, (d_model, self.num_experts), jnp.float32)
        # Highest precision: TPUs and recent GPUs would round float32 operands otherwise.
        return jnp.matmul(x_BLD.astype(jnp.float32), kernel_DN, precision=jax.lax.Precision.HIGHEST)


class Experts(nn.Module):
    """The weights of N SwiGLU experts: float32 parameters, returned in the compute dtype."""

    config: MoEConfig
    down_init_std: float | None

    @nn.compact
    def __call__(self, d_model: int, dtype: jnp.dtype) -> ExpertParams:
        n, f = self.config.num_experts, self.config.expert_dim
        init = nn.initializers.normal(small_init_std(d_model))
        down_init = init if self.down_init_std is None else nn.initializers.normal(self.down_init_std)
        into, out_of = with_axes(init, *INTO_EXPERT), with_axes(down_init, *OUT_OF_EXPERT)
        return ExpertParams(
            gate=self.param("gate", into, (n, d_model, f), jnp.float32).astype(dtype),
            up=self.param("up", into, (n, d_model, f), jnp.float32).astype(dtype),
            down=self.param("down", out_of, (n, f, d_model), jnp.float32).astype(dtype),
        )


class MoELayer(nn.Module):
    """A sparse Mixture-of-Experts feed-forward layer, its router trained by one of `methods.METHODS`.

    Call: `y, aux = layer.apply(variables, x, train=True, mutable=["default_vectors"])[0]`. With `train=False` nothing
    is mutable, and the default vectors are used as they are. What methods and balancers keep is in "router_state". In
    training that must be mutable too: what comes back has moved by this batch. Noise, the coupling loss and methods
    that draw random numbers need `rngs={"router": key}` in training.

    Variables:
      params: router/kernel [D, N]; experts/gate, experts/up [N, D, F]; experts/down [N, F, D]; shared_experts/... of a
        dense network, if there are any; all float32.
      default_vectors: ema [N, D], float32, where the method has them.
      router_state: what the method and the balancer keep, by name.

    Attributes:
      config: settings of the layer.
      down_init_std: standard deviation of experts/down at the start; None takes that of the others.
    """

    config: MoEConfig
    down_init_std: float | None = None

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, mask: Array | None = None, token_ids: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Apply the layer.

        Args:
          x: tokens [batch, length, D].
          train: update the default vectors and the router's state with this batch.
          mask: [batch, length], 0 for tokens that count in no statistic (padding). They are processed all the same,
            as zeros where they are not finite.
          token_ids: int32 [batch, length], for methods that route by them.

        Returns:
          y, of the shape and dtype of x, and a dict of
            auxiliary_loss: the sum of all losses below, weighted: what belongs into the training loss.
            load_balance_loss: unweighted, 1 at perfect balance.  router_z_loss: unweighted.
            sequence_balance_loss, simbal_loss, coupling_loss (each with its weight set): unweighted.
            Losses of the method's own, unweighted.
            router_probs: float32 [batch, length, N].  mean_router_probs: [N], over the tokens that count.
            combine_weights: float32 [batch, length, N], of the outputs.
            expert_index: int32 [batch, length, C], the choices, before any are dropped; N stands for none. With
              "topk", "default" and "densemixer" the K likeliest, likeliest first.
            tokens_per_expert: int32 [N], choices, before any are dropped.  num_tokens: int32, tokens that count.
            router_entropy: mean over tokens, in nats.  top_prob: mean of each token's largest router probability.
            output_norm: mean over tokens of the norm of y, without shared experts.
            dropped_fraction (with a capacity): of all choices.
            default_vector_norm: float32 [N], where there are default vectors.
            What the method keeps, as it was before this batch: remoe_lambda for instance.
            observed (in training): sums that the method's state moves by.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype or "float32")
        check_divisible("sequences", x.shape[0], "batch")
        if mask is not None:
            # NaN in padding would reach the default vectors, and through these everything: 0 times it is NaN too.
            sound_BL1 = (mask != 0)[..., None] | jnp.isfinite(x).all(axis=-1, keepdims=True)
            x = jnp.where(sound_BL1, x, 0)
        update = train and not self.is_initializing()
        noise_key, method_key = self._keys(update)
        state = self._read_state()
        router = config.method.router(config, "router") or Router(
            config.num_experts, config.router_init_std, name="router"
        )
        logits_BLN = router(x)
        if noise_key is not None:
            noise_BLN = jax.random.normal(noise_key, logits_BLN.shape, jnp.float32)
            logits_BLN += config.router_noise_std * constrain(noise_BLN, "batch", None, None)
        router_inputs = RouterInputs(logits_BLN, x, token_ids, mask, train, method_key, state)
        decision = config.method.route(router_inputs, config)
        if decision.samples is not None and (config.default_vectors is None or config.default_vectors.expert_gradient):
            raise ValueError(
                f"{config.method.name} gives samples, for which it needs default vectors without a gradient"
            )
        if not self.is_initializing():
            self._tell_routing(decision)
        index_BLK = decision.expert_index
        capacity = config.capacity(x.shape[1]) if update else None
        if capacity is not None:
            index_BLK = routing.within_capacity(index_BLK, config.num_experts, capacity, mask)

        params = Experts(config, self.down_init_std, name="experts")(x.shape[-1], dtype)
        defaults = self._read_defaults(x.shape[-1]) if config.default_vectors else None
        decided = Routing(decision.gates, index_BLK, decision.substitution, mask, decision.samples)
        y, defaults = sparse_experts(x.astype(dtype), decided, params, defaults, config, update=update)
        norm_BL = jnp.linalg.norm(jax.lax.stop_gradient(y), axis=-1)
        if config.num_shared_experts:
            width = config.num_shared_experts * config.expert_dim
            shared = FeedForward(width, dtype, self.down_init_std, name="shared_experts")
            y += shared(x.astype(dtype)).astype(jnp.float32)
        if defaults is not None and update:
            self._write_defaults(defaults)

        before_N = self.get_variable(ROUTER_SUMS, "tokens_per_expert", jnp.zeros((), jnp.int32))
        aux = report(config, decision, router_inputs, before_N, self._losses_of_weights(router, params.gate, update))
        if self.has_variable(ROUTER_SUMS, "tokens_per_expert"):
            self.put_variable(ROUTER_SUMS, "tokens_per_expert", before_N + aux["tokens_per_expert"])
        if update and state:
            aux["observed"] = config.method.observe(decision, router_inputs, config) | config.load_balancer.observe(
                decision, router_inputs, config
            )
            self._write_state(state, Load(aux["tokens_per_expert"], aux["num_tokens"], aux["observed"]))
        aux["output_norm"] = routing.masked_mean(norm_BL, mask)
        if config.capacity_factor is not None:
            kept_N = routing.tokens_per_expert(index_BLK, config.num_experts, mask)
            aux["dropped_fraction"] = 1 - kept_N.sum() / jnp.maximum(aux["tokens_per_expert"].sum(), 1)
        if defaults is not None:
            aux["default_vector_norm"] = jnp.linalg.norm(defaults.ema, axis=-1)
        return y.astype(x.dtype), aux

    def _tell_routing(self, decision: Decision) -> None:
        told = {"router_probs": decision.probs, "combine_weights": decision.gates}
        for name, value in (told | {"expert_index": decision.expert_index}).items():
            self.sow(ROUTING, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)

    def _losses_of_weights(self, router: nn.Module, gate_NDF: Array, update: bool) -> Losses:
        """Losses that look at weights, not at tokens."""
        config, losses = self.config, Losses()
        if not config.simbal_weight and not config.coupling_weight:
            return losses
        kernel_DN = nn.unbox(router.variables["params"]["kernel"])
        if config.simbal_weight:
            losses["simbal_loss"] = (config.simbal_weight, routing.simbal_loss(kernel_DN))
        if config.coupling_weight:
            proxies_DN = kernel_DN * proxy_noise(self.make_rng("router"), kernel_DN.shape) if update else kernel_DN
            loss = coupling_loss(proxies_DN, gate_NDF, config.coupling_margin)
            losses["coupling_loss"] = (config.coupling_weight, loss)
        return losses

    def _keys(self, update: bool) -> tuple[Array | None, Array | None]:
        """Random keys for noise and for the method, None where there is no need."""
        noisy, random = bool(self.config.router_noise_std) and update, self.config.method.random and update
        if not noisy and not random:
            return None, None
        noise_key, method_key = jax.random.split(self.make_rng("router"))
        return noise_key if noisy else None, method_key if random else None

    def _read_state(self) -> State:
        state = {}
        for name, initial in initial_router_state(self.config).items():
            self._check_there(ROUTER_STATE, name)
            axes = (None,) * initial.ndim
            state[name] = self.variable(ROUTER_STATE, name, with_axes(lambda a=initial: a, *axes)).value
        return state

    def _write_state(self, state: State, load: Load) -> None:
        if not self.is_mutable_collection(ROUTER_STATE):
            # What the method keeps would stay as it is in every step, without a word.
            raise ValueError(
                f"the collection {ROUTER_STATE!r} must be mutable in training: pass mutable=[{ROUTER_STATE!r}, ...], "
                "and hand what comes back to the next step"
            )
        for name, value in next_router_state(state, load, self.config).items():
            self.put_variable(ROUTER_STATE, name, value)

    def _check_there(self, collection: str, name: str) -> None:
        if not self.is_initializing() and not self.has_variable(collection, name):
            # Flax would start again from the initial value in every step, without a word.
            raise ValueError(
                f"the collection {collection!r} is missing from the variables: pass what init or the last step returned"
            )

    def _read_defaults(self, d_model: int) -> DefaultVectors:
        shape = (self.config.num_experts, d_model)
        self._check_there(DEFAULT_VECTORS, "ema")
        ema = self.variable(DEFAULT_VECTORS, "ema", with_axes(self._init_ema, "expert", None), shape)
        total = self.get_variable(DEFAULT_VECTOR_SUMS, "sum", jnp.zeros(shape, jnp.float32))
        weight = self.get_variable(DEFAULT_VECTOR_SUMS, "weight", jnp.zeros(shape[:1], jnp.float32))
        return DefaultVectors(ema.value, total, weight)

    def _init_ema(self, shape: tuple[int, int]) -> Array:
        vectors = self.config.default_vectors
        if vectors is None or vectors.ema_init == "zeros":
            return jnp.zeros(shape, jnp.float32)
        return vectors.ema_init_std * jax.random.normal(self.make_rng("params"), shape, jnp.float32)

    def _write_defaults(self, defaults: DefaultVectors) -> None:
        self.put_variable(DEFAULT_VECTORS, "ema", defaults.ema)
        if self.has_variable(DEFAULT_VECTOR_SUMS, "sum"):
            self.put_variable(DEFAULT_VECTOR_SUMS, "sum", defaults.sum)
            self.put_variable(DEFAULT_VECTOR_SUMS, "weight", defaults.weight)


def report(
    config: MoEConfig, decision: Decision, inputs: RouterInputs, before_N: Array, losses_of_weights: Losses
) -> dict[str, Any]:
    """Losses and statistics of a decision: what `MoELayer` says about these.

    before_N: tokens of each expert that the balance loss counts beside these.
    """
    logits_BLN, mask = inputs.logits, inputs.mask
    counts_N = routing.tokens_per_expert(decision.expert_index, config.num_experts, mask)
    mean_probs_N = routing.masked_mean(decision.probs, mask)
    losses: Losses = {
        **losses_of_weights,
        "load_balance_loss": (config.balance_weight, routing.load_balance_loss(mean_probs_N, before_N + counts_N)),
        "router_z_loss": (config.router_z_weight, routing.router_z_loss(logits_BLN, mask)),
    }
    if config.sequence_balance_weight:
        likeliest_BLK = largest(logits_BLN, config.top_k)
        loss = routing.sequence_balance_loss(decision.probs, likeliest_BLK, mask)
        losses["sequence_balance_loss"] = (config.sequence_balance_weight, loss)
    own = config.method.losses(decision, inputs, config)
    taken = [name for name in own if name in losses or name in ("loss", "total_loss") or not name.endswith("_loss")]
    if taken:
        raise ValueError(f"{config.method.name} has a loss {taken[0]!r}: its name must end in _loss and not be taken")
    losses |= own
    # A loss of weight 0 is left out: times 0 its gradient would be computed all the same, or might be NaN.
    weighted = [factor * loss for factor, loss in losses.values() if isinstance(factor, Array) or factor]
    return {
        **{name: loss for name, (_, loss) in losses.items()},
        **{f"{config.method.name}_{name}": value for name, value in inputs.state.items()},
        "auxiliary_loss": sum(weighted, start=jnp.zeros(())),
        "router_probs": decision.probs,
        "mean_router_probs": mean_probs_N,
        "combine_weights": decision.gates,
        "expert_index": decision.expert_index,
        "tokens_per_expert": counts_N,
        "num_tokens": jnp.int32(logits_BLN[..., 0].size) if mask is None else (mask != 0).sum(dtype=jnp.int32),
        "router_entropy": routing.router_entropy(decision.probs, mask),
        "top_prob": routing.masked_mean(jax.lax.stop_gradient(decision.probs).max(axis=-1), mask),
    }


def zero_sums(default_vectors: Any) -> Any:
    """The `default_vector_sums` collection, empty, that goes with a `default_vectors` collection of any model."""
    return jax.tree.map(
        lambda node: {"sum": jnp.zeros_like(node["ema"]), "weight": jnp.zeros(node["ema"].shape[:-1], jnp.float32)},
        default_vectors,
        is_leaf=lambda node: isinstance(node, dict) and "ema" in node,
    )


def zero_counts(params: Any) -> dict[str, Any]:
    """The `router_sums` collection, empty, that goes with the parameters of any model."""
    counts = {}
    for name, node in params.items():
        if name == "experts":
            return {"tokens_per_expert": jnp.zeros(node["gate"].shape[:-2], jnp.int32)}
        if isinstance(node, dict) and (below := zero_counts(node)):
            counts[name] = below
    return counts


def initial_router_state(config: MoEConfig) -> State:
    """What the method and the balancer of one layer keep, by name."""
    return config.method.initial_state(config) | config.load_balancer.initial_state(config)


def next_router_state(router_state: Any, load: Load, config: MoEConfig) -> Any:
    """The `router_state` collection of a `LanguageModel`, or of one layer, after a training step.

    load: of all layers of the model, or of one, without an axis of layers.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, dict) and not any(isinstance(child, dict) for child in node.values())

    def moved(state: State) -> State:
        if load.tokens_per_expert.ndim == 1:
            states, loads = jax.tree.map(lambda a: a[None], (state, load))
            return jax.tree.map(lambda a: a[0], next_states(states, loads))
        return next_states(state, load)

    def next_states(states: State, loads: Load) -> State:
        of_method = config.method.next_state(states, loads, config)
        return states | of_method | config.load_balancer.next_state(states, loads, config)

    return jax.tree.map(moved, router_state, is_leaf=is_state)
