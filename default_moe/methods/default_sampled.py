"""Default vectors from the tokens that they are for: some tokens run one more expert, for its output alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.errors import check
from default_moe.methods.decision import Decision, LayerSettings, RouterInputs, Samples
from default_moe.methods.default import DefaultMoE
from default_moe.methods.settings import at_least, one_of, setting


@dataclass(frozen=True)
class DefaultSampled(DefaultMoE):
    """Default MoE with vectors that are means over tokens that did not choose the expert: ours.

    In training one of each `sample_every` successive tokens runs one more expert j, drawn evenly from those that it did
    not choose. The output E_j(x_t) is not in the layer's, and its expert gets no gradient through it. It counts in the
    expert's default vector V_j, in which no other outputs count, and in the gradient of the token's gates w_t, with
    g_t = dL/dy_t, for experts that it did not choose:
      dL/dw_ti = <g_t, V_i> + [i = j] c <g_t, E_i(x_t) - V_i>.
    c = 1 puts E_j(x_t) in the place of V_j. With c = sample_every (N - K), 1 / the chance of i to be drawn for t, the
    mean over draws is the exact <g_t, E_i(x_t)>, whatever the vectors are, if they are those before the batch: they are
    a control variate, which makes the variance smaller. It is large nevertheless.
    """

    name = "default_sampled"
    random = True

    ema_update: str = setting(
        "after",
        "Use the vectors before this batch ('after'), or those updated with its samples already ('before').",
        one_of("before", "after"),
    )
    sample_every: int = setting(8, "Of so many successive tokens one runs one more expert.", at_least(1))
    sample_gradient: str = setting(
        "plain",
        "The gradient of the gate of an expert that is run for its output alone: with the output in the place of the "
        "default vector ('plain'), or with so much of their difference that its mean over draws is exact ('unbiased').",
        one_of("plain", "unbiased"),
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
            f"moe.{self.name}.sample_gradient is 'unbiased', but moe.{self.name}.ema_update is 'before': vectors that "
            "hold the outputs of the same batch make it biased; use 'after'",
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
        position_BP, expert_BP = draw(inputs.key, decision.expert_index, self.sample_every, config)
        times = 1 if self.sample_gradient == "plain" else self.sample_every * (config.num_experts - config.top_k)
        return decision._replace(samples=Samples(position_BP, expert_BP, jnp.float32(times)))


def draw(key: Array, index_BLK: Array, every: int, config: LayerSettings) -> tuple[Array, Array]:
    """Draw one of each `every` successive tokens, and for it one of the N - K experts that it did not choose.

    A sequence may end within the last of these groups: what is drawn beyond the end is none.

    Returns int32 [B, P], places in the sequence and experts, N for none.
    """
    num_sequences, length = index_BLK.shape[:2]
    place_key, expert_key = jax.random.split(key)
    start_P = jnp.arange(0, length, every)
    position_BP = start_P + jax.random.randint(place_key, (num_sequences, len(start_P)), 0, every)
    inside_BP, position_BP = position_BP < length, jnp.minimum(position_BP, length - 1)
    chosen_BPK = jnp.sort(jnp.take_along_axis(index_BLK, position_BP[..., None], axis=1), axis=-1)
    expert_BP = jax.random.randint(expert_key, position_BP.shape, 0, config.num_experts - config.top_k)
    for k in range(chosen_BPK.shape[-1]):  # the number among those not chosen becomes that among all
        expert_BP += expert_BP >= chosen_BPK[..., k]
    return position_BP, jnp.where(inside_BP, expert_BP, config.num_experts)
