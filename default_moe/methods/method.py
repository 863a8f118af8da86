"""What a way to train a router is: the interface of every method, and what methods are made of.

A method turns router logits into the experts that run for each token and the gates of their outputs. In between lies
its estimator, for what reaches the logits in the backward pass is what its gates pass on. Running the experts,
adding up their outputs, splitting them over devices, and saving state are the same for all. The README
of the package has the dimension key.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from default_moe import sharding
from default_moe.errors import check
from default_moe.methods.routing import active_experts
from default_moe.methods.settings import check_settings

State = dict[str, Array]

METHODS: dict[str, type["Method"]] = {}  # by name: every subclass of `Method` that has been defined


class LayerSettings(Protocol):
    """What a method may know of the layer it works in: four settings of `config.MoEConfig`."""

    @property
    def num_experts(self) -> int: ...

    @property
    def top_k(self) -> int: ...

    @property
    def score_function(self) -> str: ...

    @property
    def normalize_weights(self) -> bool: ...


class Decision(NamedTuple):
    """What a method decides about the tokens of a batch.

    gates: float32 [B, L, N], what the output of each expert counts in the layer's. In the backward pass the gate of an
      expert that runs receives <dL/dy, E_i(x)>, that of any other 0, or what `default_vectors.combine` or
      `dense_gradient.experts_for_gradient` gives it.
    expert_index: int32 [B, L, C], the experts that run, in any order; N stands for none.
    probs: float32 [B, L, N], the token's distribution over experts, for balance losses and statistics.
    substitution: float32 scalar that the share of default vectors in the output is multiplied by; None stands for 1.
    """

    gates: Array
    expert_index: Array
    probs: Array
    substitution: Array | None = None


class Load(NamedTuple):
    """What the experts of every MoE layer had to do in a step, over the global batch and all of its microbatches.

    tokens_per_expert: int32 [Y, N], before any were dropped.  num_tokens: int32 [Y], tokens that count.
    """

    tokens_per_expert: Array
    num_tokens: Array


@dataclass(frozen=True)
class Method(abc.ABC):
    """One way to train a router. Fields of a subclass are its settings: `moe.<name>.<field>` in a config.

    name: in `moe.router`.
    load_balance_weight: that of the balance loss, unless `moe.load_balance_weight` is set.
    random: whether `route` draws random numbers in training.
    dense_gradient: whether experts that do not run for a token are computed all the same in the backward pass, to give
      their gates the gradient <dL/dy, E_i(x)>. They contribute nothing to the output and receive no gradient. For
      methods that choose K different experts. Default vectors then only add to the output.
    learns_from_zero_logits: whether the router's weights get a gradient where all of its logits are 0.
    refused: settings of `MoEConfig` that make no sense with the method, and why. They must be left at their defaults.
    """

    name: ClassVar[str]
    load_balance_weight: ClassVar[float] = 0.01
    random: ClassVar[bool] = False
    dense_gradient: ClassVar[bool] = False
    learns_from_zero_logits: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        other = METHODS.setdefault(cls.name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__name__} and {other.__name__} have the same name, {cls.name!r}: choose another")
        METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        check_settings(self, f"moe.{self.name}")

    def check(self, config: LayerSettings) -> None:
        """Raises ConfigError if the method cannot work with the layer's other settings.

        Unless a subclass knows better, normalized weights need two experts that run.
        """
        check(
            not config.normalize_weights or config.top_k > 1,
            "moe.normalize_weights is True, but with moe.top_k = 1 that makes every weight 1: the router would get no "
            "gradient",
        )

    @abc.abstractmethod
    def route(self, logits_BLN: Array, config: LayerSettings, state: State, key: Array | None) -> Decision:
        """Decide about tokens.

        Args:
          logits_BLN: float32 router logits.
          config: of the layer.
          state: of the layer, as `initial_state` or `next_state` gave it, without the axis of layers.
          key: random key; None at evaluation, and if the method is not `random`.
        """

    def losses(
        self, decision: Decision, config: LayerSettings, state: State, mask_BL: Array | None
    ) -> dict[str, tuple[Array | float, Array]]:
        """Weight and value of each loss term that the method adds to those that all methods have, by name.

        A term whose weight is the number 0 is only reported.
        """
        return {}

    def initial_state(self, config: LayerSettings) -> State:
        """Arrays of one layer that the method keeps from step to step, by name. They are no parameters."""
        return {}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        """The state of all layers, every array with a leading axis Y, after a training step. Called once a step."""
        return state

    def experts_per_token(self, config: LayerSettings) -> int:
        """Return how many experts' outputs a token uses, on average."""
        return config.top_k

    def most_experts_per_token(self, config: LayerSettings) -> int:
        """Return C, how many there is room for."""
        return self.experts_per_token(config)


def largest(scores_BLN: Array, top_k: int) -> Array:
    """int32 [B, L, K], the experts of the K largest scores of each token, largest first, ties to the lower.

    Logits in the place of scores rank experts alike, those too whose scores are rounded to one number.
    Under a mesh each device chooses for its own tokens: left to itself, XLA gathers all tokens for a top-k.
    """
    scores_BLN = jax.lax.stop_gradient(scores_BLN)

    def choose(scores: Array) -> Array:
        return jax.lax.top_k(scores, top_k)[1]

    token_axes = sharding.mesh_axes("batch")
    if not token_axes:
        return choose(scores_BLN)
    tokens = P(token_axes)
    return jax.shard_map(choose, in_specs=tokens, out_specs=tokens)(scores_BLN)


def scores(logits_BLN: Array, config: LayerSettings) -> Array:
    """Softmax over the experts, or the sigmoid of each logit (moe.score_function)."""
    return jax.nn.sigmoid(logits_BLN) if config.score_function == "sigmoid" else jax.nn.softmax(logits_BLN, axis=-1)


def distribution(logits_BLN: Array, config: LayerSettings) -> Array:
    """The scores of each token divided by their sum (DeepSeek-V3, eq. 19)."""
    if config.score_function == "softmax":
        return scores(logits_BLN, config)
    # Of logarithms: the scores of all experts may be too small to divide by their sum.
    return jax.nn.softmax(jax.nn.log_sigmoid(logits_BLN), axis=-1)


def gates(logits_BLN: Array, index_BLK: Array, config: LayerSettings) -> Array:
    """The scores, with moe.normalize_weights divided by the sum of those chosen.

    Through that sum gradients reach the chosen scores only from their own gates. An expert that was not chosen, if its
    gate gets a gradient at all, takes it as a constant (DenseMixer: Yao et al. 2025).
    """
    if not config.normalize_weights:
        return scores(logits_BLN, config)
    log_BLN = (jax.nn.log_sigmoid if config.score_function == "sigmoid" else jax.nn.log_softmax)(logits_BLN)
    chosen_BLN = active_experts(index_BLK, config.num_experts)
    # Relative to the largest that was chosen: a logarithm far below 0 would swallow that of their sum.
    log_BLN -= jax.lax.stop_gradient(log_BLN.max(axis=-1, keepdims=True, where=chosen_BLN, initial=-jnp.inf))
    log_total_BL1 = jax.nn.logsumexp(jnp.where(chosen_BLN, log_BLN, -jnp.inf), axis=-1, keepdims=True)
    constant_BL1 = jax.lax.stop_gradient(log_total_BL1)
    # A score that was passed over though it is far above the chosen ones would overflow. Its gate is not used.
    other_BLN = jnp.where(log_BLN > constant_BL1, 0.0, log_BLN - constant_BL1)
    return jnp.exp(jnp.where(chosen_BLN, log_BLN - log_total_BL1, other_BLN))


def decide(logits_BLN: Array, index_BLK: Array, config: LayerSettings, **more: Any) -> Decision:
    """The decision for these experts, with gates and distribution made of the scores of these logits."""
    return Decision(gates(logits_BLN, index_BLK, config), index_BLK, distribution(logits_BLN, config), **more)
