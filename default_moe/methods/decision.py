"""What a method decides, what it decides from, and the parts that decisions are made of.

The README of the package has the dimension key; G groups of experts, Y MoE layers.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from default_moe import sharding
from default_moe.methods.routing import active_experts

State = dict[str, Array]


class LayerSettings(Protocol):
    """What a method may know of the layer it works in: some settings of `config.MoEConfig`."""

    @property
    def num_experts(self) -> int: ...

    @property
    def top_k(self) -> int: ...

    @property
    def score_function(self) -> str: ...

    @property
    def normalize_weights(self) -> bool: ...

    @property
    def weight_scale(self) -> float: ...

    @property
    def num_groups(self) -> int: ...

    @property
    def groups_per_token(self) -> int: ...


class RouterInputs(NamedTuple):
    """What a method decides from.

    logits: float32 [B, L, N], of the router.
    x: [B, L, D], the layer's input, of which the router made them.
    token_ids: int32 [B, L], the tokens of the text; None if the layer was not told.
    mask: [B, L], 0 for padding, which must count in nothing; None without any.
    train: whether this is a training step.
    key: random key; None at evaluation, and if the method is not `random`.
    state: of the layer, by name, as `initial_state` or `next_state` gave it, without the axis of layers.
    """

    logits: Array
    x: Array | None = None
    token_ids: Array | None = None
    mask: Array | None = None
    train: bool = False
    key: Array | None = None
    state: State = {}  # noqa: RUF012 - nobody changes it, and JAX must find a dict in it


class Samples(NamedTuple):
    """Experts that are run for some tokens that did not choose them, for their outputs alone.

    position_BP: int32 [B, P], the place of each such token in its sequence.
    expert_BP: int32 [B, P], the expert; N stands for none.
    factor: float32 scalar, what the gate's gradient counts of <dL/dy, E_i(x) - V_i>, V_i the expert's default vector.
    """

    position_BP: Array
    expert_BP: Array
    factor: Array


class Decision(NamedTuple):
    """What a method decides about the tokens of a batch.

    gates: float32 [B, L, N], what the output of each expert counts in the layer's. In the backward pass the gate of an
      expert that runs receives <dL/dy, E_i(x)>, that of any other 0, or what `default_vectors.combine` or
      `dense_gradient.experts_for_gradient` gives it.
    expert_index: int32 [B, L, C], the experts that run, in any order; N stands for none.
    probs: float32 [B, L, N], the token's distribution over experts, for balance losses and statistics.
    substitution: float32 scalar that the share of default vectors in the output is multiplied by; None stands for 1.
    samples: in training, of a method with default vectors, which are then averaged over these; None without any.
    """

    gates: Array
    expert_index: Array
    probs: Array
    substitution: Array | None = None
    samples: Samples | None = None


class Load(NamedTuple):
    """What the MoE layers saw in a training step, over the global batch and all of its microbatches.

    tokens_per_expert: int32 [Y, N], choices, before any were dropped.  num_tokens: int32 [Y], tokens that count.
    observed: sums [Y, ...] of what the method's and the balancer's `observe` gave, by name.
    """

    tokens_per_expert: Array
    num_tokens: Array
    observed: State = {}  # noqa: RUF012 - as above


def largest(scores_BLN: Array, top_k: int | Array) -> Array:
    """int32 [B, L, K], the experts of the K largest scores of each token, largest first, ties to the lower.

    Logits in the place of scores rank experts alike, those too whose scores are rounded to one number.
    With a K that is an array, so that one compiled program serves every K: [B, L, N], N for none after the first K.
    """
    if isinstance(top_k, int):
        return _top_k(scores_BLN, top_k)[1]
    num_experts = scores_BLN.shape[-1]
    return jnp.where(jnp.arange(num_experts) < top_k, _top_k(scores_BLN, num_experts)[1], num_experts)


def largest_values(scores_BLN: Array, top_k: int) -> Array:
    """The K largest scores of each token [B, L, K], largest first, without a gradient."""
    return _top_k(scores_BLN, top_k)[0]


def _top_k(scores_BLN: Array, top_k: int) -> tuple[Array, Array]:
    """Under a mesh each device chooses for its own tokens: left to itself, XLA gathers all tokens for a top-k."""
    scores_BLN = jax.lax.stop_gradient(scores_BLN)

    def local(scores_BLN: Array) -> tuple[Array, Array]:
        values_BLK, index_BLK = jax.lax.top_k(scores_BLN, top_k)
        return values_BLK, index_BLK

    token_axes = sharding.mesh_axes("batch")
    if not token_axes:
        return local(scores_BLN)
    tokens = P(token_axes)
    return jax.shard_map(local, in_specs=tokens, out_specs=tokens)(scores_BLN)


def choose(inputs: RouterInputs, config: LayerSettings) -> Array:
    """int32 [B, L, K], the experts of largest score, or of largest score + bias where a balancer keeps a bias.

    With moe.num_groups only experts of each token's best groups.
    """
    ranked_BLN = inputs.logits
    if "bias" in inputs.state:
        ranked_BLN = scores(inputs.logits, config) + inputs.state["bias"]
    if config.num_groups > 1:
        biased_BLN = ranked_BLN if "bias" in inputs.state else scores(inputs.logits, config)
        ranked_BLN = jnp.where(in_best_groups(biased_BLN, config), ranked_BLN, -jnp.inf)
    return largest(ranked_BLN, config.top_k)


def in_best_groups(scores_BLN: Array, config: LayerSettings) -> Array:
    """bool [B, L, N]: whether the expert's group is among the moe.groups_per_token best of the token (DeepSeek-V3).

    A group's score is the sum of its two best.
    """
    size = config.num_experts // config.num_groups
    scores_BLGS = scores_BLN.reshape(*scores_BLN.shape[:-1], config.num_groups, size)
    of_group_BLG = largest_values(scores_BLGS, min(2, size)).sum(axis=-1)
    best_BLG = active_experts(largest(of_group_BLG, config.groups_per_token), config.num_groups)
    return jnp.repeat(best_BLG, size, axis=-1)


def scores(logits_BLN: Array, config: LayerSettings) -> Array:
    """Softmax over the experts, or of each logit its sigmoid or sqrt(softplus) (moe.score_function)."""
    if config.score_function == "sqrt_softplus":
        return jnp.exp(log_scores(logits_BLN, config))  # the square root of a softplus rounded to 0 has no slope
    return jax.nn.sigmoid(logits_BLN) if config.score_function == "sigmoid" else jax.nn.softmax(logits_BLN, axis=-1)


def log_scores(logits_BLN: Array, config: LayerSettings) -> Array:
    """The logarithms of the scores, also of those that are too small for float32."""
    if config.score_function == "softmax":
        return jax.nn.log_softmax(logits_BLN)
    if config.score_function == "sigmoid":
        return jax.nn.log_sigmoid(logits_BLN)
    # log(softplus(s)) is s - exp(s) / 2 + ..., and s to float32 precision where s is far below 0.
    far_BLN = logits_BLN < -17
    return jnp.where(far_BLN, logits_BLN, jnp.log(jax.nn.softplus(jnp.where(far_BLN, 0.0, logits_BLN)))) / 2


def distribution(logits_BLN: Array, config: LayerSettings) -> Array:
    """The scores of each token divided by their sum (DeepSeek-V3, eq. 19)."""
    if config.score_function == "softmax":
        return scores(logits_BLN, config)
    # Of logarithms: the scores of all experts may be too small to divide by their sum.
    return jax.nn.softmax(log_scores(logits_BLN, config), axis=-1)


def gates(logits_BLN: Array, index_BLK: Array, config: LayerSettings) -> Array:
    """The weights, times moe.weight_scale."""
    weights_BLN = weights(logits_BLN, index_BLK, config)
    return weights_BLN if config.weight_scale == 1 else config.weight_scale * weights_BLN


def weights(logits_BLN: Array, index_BLK: Array, config: LayerSettings) -> Array:
    """The scores, with moe.normalize_weights divided by the sum of those chosen.

    Through that sum gradients reach the chosen scores only from their own gates. An expert that was not chosen, if its
    gate gets a gradient at all, takes it as a constant (DenseMixer: Yao et al. 2025).
    """
    if not config.normalize_weights:
        return scores(logits_BLN, config)
    log_BLN = log_scores(logits_BLN, config)
    chosen_BLN = active_experts(index_BLK, config.num_experts)
    # Relative to the largest that was chosen: a logarithm far below 0 would swallow that of their sum.
    log_BLN -= jax.lax.stop_gradient(log_BLN.max(axis=-1, keepdims=True, where=chosen_BLN, initial=-jnp.inf))
    log_total_BL1 = jax.nn.logsumexp(jnp.where(chosen_BLN, log_BLN, -jnp.inf), axis=-1, keepdims=True)
    constant_BL1 = jax.lax.stop_gradient(log_total_BL1)
    # A score that was passed over though it is far above the chosen ones would overflow. Its gate is not used.
    other_BLN = jnp.where(log_BLN > constant_BL1, 0.0, log_BLN - constant_BL1)
    return jnp.exp(jnp.where(chosen_BLN, log_BLN - log_total_BL1, other_BLN))


def product_form(decision: Decision, config: LayerSettings) -> Decision:
    """The decision, the gradient of each gate times p_i + [i chosen], with p_i the gate before moe.weight_scale.

    The choice too is taken to depend on p: the output is sum_i m_i p_i E_i(x), m the choice as zeros and ones, of which
    the straight-through estimator says dm_i/dp_i = 1. So dL/dp_i = (m_i + p_i) <dL/dy, E_i(x)>.
    """
    weights_BLN = jax.lax.stop_gradient(decision.gates) / config.weight_scale
    chosen_BLN = active_experts(decision.expert_index, config.num_experts)
    return decision._replace(gates=_with_gradient_times(decision.gates, weights_BLN + chosen_BLN))


@jax.custom_vjp
def _with_gradient_times(values: Array, factors: Array) -> Array:
    return values


_with_gradient_times.defvjp(lambda values, factors: (values, factors), lambda factors, g: (g * factors, None))


def decide(logits_BLN: Array, index_BLK: Array, config: LayerSettings, **more: Any) -> Decision:
    """The decision for these experts, with gates and distribution made of the scores of these logits."""
    return Decision(gates(logits_BLN, index_BLK, config), index_BLK, distribution(logits_BLN, config), **more)
