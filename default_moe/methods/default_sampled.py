"""Default vectors from the tokens that they are for: some tokens run one more expert, for its output alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.errors import check
from default_moe.methods.decision import Decision, LayerSettings, RouterInputs, Samples, log_scores
from default_moe.methods.default import DefaultMoE
from default_moe.methods.routing import active_experts
from default_moe.methods.settings import at_least, one_of, setting


@dataclass(frozen=True)
class DefaultSampled(DefaultMoE):
    """Default MoE with vectors that are means over tokens that did not choose the expert: ours.

    In training one of each `sample_every` successive tokens runs one more expert j, drawn from those that it did not
    choose: evenly, or in proportion to their scores (`sample_by`). The output E_j(x_t) is not in the layer's, and its
    expert gets no gradient through it. It counts in the expert's default vector V_j, in which no other outputs count,
    and in the gradient of the token's gates w_t, with g_t = dL/dy_t, for experts that it did not choose:
      dL/dw_ti = <g_t, V_i> + [i = j] c <g_t, E_i(x_t) - V_i>.
    c = 1 puts E_j(x_t) in the place of V_j. With c = 1 / r_ti, r_ti the chance of i to be drawn for t if t runs one
    more, the mean over these draws is the exact <g_t, E_i(x_t)>, whatever the vectors are, if they are those before the
    batch: they are a control variate, which makes the variance smaller. With c = sample_every / r_ti it is exact for
    every token.
    """

    name = "default_sampled"
    random = True

    ema_update: str = setting(
        "after",
        "Use the vectors before this batch ('after'), or those updated with its samples already ('before').",
        one_of("before", "after"),
    )
    sample_every: int = setting(8, "Of so many successive tokens one runs one more expert.", at_least(1))
    sample_by: str = setting(
        "uniform",
        "How that expert is drawn among those that the token did not choose: evenly ('uniform'), or in proportion to "
        "its score ('score').",
        one_of("uniform", "score"),
    )
    sample_gradient: str = setting(
        "plain",
        "The gradient of the gate of an expert that is run for its output alone: with the output in the place of the "
        "default vector ('plain'), or with so much of their difference that its mean over draws is exact, for tokens "
        "that run one more expert ('expert') or for all ('unbiased').",
        one_of("plain", "expert", "unbiased"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("ema_weighted", True), ("expert_gradient", False)):
            check(
                getattr(self, name) == value,
                f"moe.{self.name}.{name} is {not value}, but the default vectors of moe.router={self.name!r} are plain "
                f"means of outputs that are not in the layer's: leave it {value}",
            )
        check(
            self.sample_gradient == "plain" or self.ema_update == "after",
            f"moe.{self.name}.sample_gradient is {self.sample_gradient!r}, but moe.{self.name}.ema_update is 'before': "
            "vectors that hold the outputs of the same batch make it biased; use 'after'",
        )

    def check(self, config: LayerSettings) -> None:
        super().check(config)
        check(
            config.top_k < config.num_experts,
            f"moe.top_k = moe.num_experts = {config.top_k}, but moe.router={self.name!r} needs experts that a token "
            "does not choose",
        )

    def samples_per_token(self, config: LayerSettings) -> float:
        return 1 / self.sample_every

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        decision = super().route(inputs, config)
        if inputs.key is None:
            return decision
        shares_BLN = None if self.sample_by == "uniform" else log_scores(inputs.logits, config)
        drawn = draw(inputs.key, decision.expert_index, self.sample_every, config, shares_BLN)
        if self.sample_gradient == "plain":
            drawn = drawn._replace(factor_BP=jnp.ones_like(drawn.factor_BP))
        elif self.sample_gradient == "unbiased":
            drawn = drawn._replace(factor_BP=self.sample_every * drawn.factor_BP)
        return decision._replace(samples=drawn)


def draw(
    key: Array, index_BLK: Array, every: int, config: LayerSettings, log_shares_BLN: Array | None = None
) -> Samples:
    """Draw one of each `every` successive tokens, and for it one of the N - K experts that it did not choose.

    A sequence may end within the last of these groups: what is drawn beyond the end is none.

    log_shares_BLN: logarithms of what the chances of experts are in proportion to; None: all have the same.
    Returns the samples, their factors 1 / the chance of the expert for that token.
    """
    num_sequences, length = index_BLK.shape[:2]
    place_key, expert_key = jax.random.split(key)
    start_P = jnp.arange(0, length, every)
    position_BP = start_P + jax.random.randint(place_key, (num_sequences, len(start_P)), 0, every)
    inside_BP, position_BP = position_BP < length, jnp.minimum(position_BP, length - 1)
    chosen_BPK = jnp.sort(jnp.take_along_axis(index_BLK, position_BP[..., None], axis=1), axis=-1)
    if log_shares_BLN is None:
        num_others = config.num_experts - config.top_k
        expert_BP = jax.random.randint(expert_key, position_BP.shape, 0, num_others)
        for k in range(chosen_BPK.shape[-1]):  # the number among those not chosen becomes that among all
            expert_BP += expert_BP >= chosen_BPK[..., k]
        factor_BP = jnp.full(position_BP.shape, num_others, jnp.float32)
    else:
        log_BPN = jnp.take_along_axis(jax.lax.stop_gradient(log_shares_BLN), position_BP[..., None], axis=1)
        log_BPN = jnp.where(active_experts(chosen_BPK, config.num_experts), -jnp.inf, log_BPN)
        log_BPN = jax.nn.log_softmax(log_BPN)
        expert_BP = jax.random.categorical(expert_key, log_BPN)
        factor_BP = jnp.exp(-jnp.take_along_axis(log_BPN, expert_BP[..., None], axis=-1)[..., 0])
    return Samples(position_BP, jnp.where(inside_BP, expert_BP, config.num_experts), factor_BP)
