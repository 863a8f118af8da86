"""How the load of experts is evened out, chosen by `moe.balancer`: by a loss, or by a bias that steers the choice.

A bias b is added to the scores to choose experts, not to weight their outputs. It moves once after each training step,
by what the whole batch did, and never at evaluation. `methods.decision.choose` adds it.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from default_moe.errors import check
from default_moe.methods.decision import Decision, LayerSettings, Load, RouterInputs, State, largest_values, scores
from default_moe.methods.histogram import histogram, upper_quantile
from default_moe.methods.settings import between, check_settings, one_of, positive, register, setting

BALANCERS: dict[str, type["Balancer"]] = {}  # by name


@dataclass(frozen=True)
class Balancer:
    """One way to even out the load. Fields of a subclass are its settings: `moe.<name>.<field>` in a config.

    load_balance_weight: that of the balance loss, unless `moe.load_balance_weight` is set.
    biased: whether it keeps a bias.
    """

    name: ClassVar[str]
    load_balance_weight: ClassVar[float] = 0.0
    biased: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        register(cls, BALANCERS)

    def __post_init__(self) -> None:
        check_settings(self, f"moe.{self.name}")

    def check(self, config: LayerSettings) -> None:
        """Raises ConfigError if the balancer cannot work with the layer's other settings."""

    def initial_state(self, config: LayerSettings) -> State:
        """As that of a `Method`, in which it is."""
        return {"bias": jnp.zeros(config.num_experts, jnp.float32)} if self.biased else {}

    def observe(self, decision: Decision, inputs: RouterInputs, config: LayerSettings) -> State:
        """As that of a `Method`."""
        return {}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        """As that of a `Method`: what moves of the state."""
        return {}


@dataclass(frozen=True)
class NoBalancer(Balancer):
    """Nothing evens out the load."""

    name = "none"
    biased = False


@dataclass(frozen=True)
class LossBalancer(Balancer):
    """The balance loss, `routing.load_balance_loss`."""

    name = "loss"
    load_balance_weight = 0.01
    biased = False


@dataclass(frozen=True)
class Bias(Balancer):
    """Loss-Free Balancing (Wang et al. 2024), and rules that came after it.

    With d_i = 1 - load_i / mean load,
    sign: b_i += u sign(d_i).  proportional: b_i += u d_i.
    momentum: m_i <- 1/2 m_i + 1/2 (tanh(2 d_i) minus its mean over experts), b_i += u m_i (after SMEBU, 2026, whose
    constants these are; its paper's u is 5e-4).
    """

    name = "bias"

    update_rate: float = setting(1e-3, "u, by which a bias moves.", positive())
    update: str = setting(
        "sign",
        "How a bias moves: by u up or down, by u times the share of the mean load that is missing, or with momentum.",
        one_of("sign", "proportional", "momentum"),
    )

    def initial_state(self, config: LayerSettings) -> State:
        bias = super().initial_state(config)
        return {**bias, "momentum": jnp.zeros_like(bias["bias"])} if self.update == "momentum" else bias

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        tokens_YN = load.tokens_per_expert.astype(jnp.float32)
        mean_Y1 = tokens_YN.mean(axis=-1, keepdims=True)
        missing_YN = mean_Y1 - tokens_YN
        if self.update == "sign":
            return {"bias": state["bias"] + self.update_rate * jnp.sign(missing_YN)}
        share_YN = missing_YN / jnp.maximum(mean_Y1, 1)
        if self.update == "proportional":
            return {"bias": state["bias"] + self.update_rate * share_YN}
        step_YN = jnp.tanh(2 * share_YN)
        momentum_YN = (state["momentum"] + step_YN - step_YN.mean(axis=-1, keepdims=True)) / 2
        return {"bias": state["bias"] + self.update_rate * momentum_YN, "momentum": momentum_YN}


@dataclass(frozen=True)
class Quantile(Balancer):
    """Quantile Balancing (Su 2026): the bias is computed from the batch, without a rate.

    With T tokens that count,
    a_t = the (K+1)-th largest of token t's scores + b, the score that an expert must beat to be chosen.
    t_i = the quantile that T K / N of the tokens' s_ti - a_t lie above: at a bias of -t_i so many choose expert i.
    b_i <- m b_i + (1 - m) (mean of t - t_i).
    Quantiles are over the global batch, to the width of a bin of `histogram`: of s_ti + b_i - a_t, which is near 0,
    where bins are narrow, once the load is even.
    """

    name = "quantile"

    momentum: float = setting(0.0, "m, the share of the old bias that stays.", between(0, 1))

    def check(self, config: LayerSettings) -> None:
        check(
            config.top_k < config.num_experts,
            f"moe.balancer is 'quantile', but moe.top_k = moe.num_experts = {config.top_k}: every token runs all "
            "experts; use 'none'",
        )
        check(
            config.num_groups == 1,
            f"moe.balancer is 'quantile', but moe.num_groups is {config.num_groups}: its thresholds are those of a "
            "choice among all experts; use 'bias'",
        )

    def observe(self, decision: Decision, inputs: RouterInputs, config: LayerSettings) -> State:
        biased_BLN = scores(inputs.logits, config) + inputs.state["bias"]
        to_beat_BL1 = largest_values(biased_BLN, config.top_k + 1)[..., -1:]
        return {"margins": histogram(biased_BLN - to_beat_BL1, inputs.mask)}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        margin_YN = upper_quantile(load.observed["margins"], config.top_k / config.num_experts)
        threshold_YN = margin_YN - state["bias"]
        bias_YN = threshold_YN.mean(axis=-1, keepdims=True) - threshold_YN
        moved_YN = self.momentum * state["bias"] + (1 - self.momentum) * bias_YN
        # A batch without a token that counts says nothing.
        return {"bias": jnp.where(load.num_tokens[..., None] > 0, moved_YN, state["bias"])}
