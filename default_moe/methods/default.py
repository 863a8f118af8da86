"""Default MoE (arXiv:2504.12463): experts that do not run contribute their default vectors."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from default_moe.errors import check
from default_moe.methods.decision import (
    Decision,
    LayerSettings,
    Load,
    RouterInputs,
    State,
    choose,
    decide,
    product_form,
)
from default_moe.methods.method import Method
from default_moe.methods.settings import at_least, between, check_settings, one_of, setting


@dataclass(frozen=True)
class DefaultVectorSettings:
    """How default vectors are made and used. A method (`methods/`) that inherits these has default vectors."""

    ema_decay: float = setting(0.9, "beta of the moving average.", between(0, 1))
    ema_weighted: bool = setting(True, "Average an expert's outputs weighted by their weight in the layer's output.")
    ema_init: str = setting("zeros", "What the vectors are at the start.", one_of("zeros", "gaussian"))
    ema_init_std: float = setting(0.02, "Standard deviation of ema_init='gaussian'.", at_least(0))
    ema_update: str = setting(
        "before",
        "Use the vectors updated with this very batch ('before', as the paper does), or those before it ('after').",
        one_of("before", "after"),
    )
    substitute: str = setting(
        "forward",
        "'forward' adds the default vectors of the inactive experts to the output, 'backward' uses them only for the "
        "router's gradient.",
        one_of("forward", "backward"),
    )
    substitute_ramp_steps: int = setting(
        0,
        "With 'forward', the steps over which their share of the output rises from none to all of it. The gradient is "
        "dense from the start. 0: all of it at once.",
        at_least(0),
    )
    substitute_at_eval: bool = setting(
        True,
        "With 'forward', add them at evaluation and in generated text too. The paper does not say; an earlier code of "
        "its authors added them in training only.",
    )
    expert_gradient: bool = setting(
        False,
        "With 'forward', pass the gradient of what default vectors add to the output on to the experts, as if the "
        "vectors were the means of their outputs over the (micro)batch. Not in the paper, where an expert moves its "
        "vector with no regard to the tokens that the vector is for.",
    )
    warm_up_batches: int = setting(
        8,
        "Batches that the vectors of a model that has none yet are averaged over, before it trains on from another run "
        "(init_from).",
        at_least(0),
    )

    def __post_init__(self) -> None:
        prefix = f"moe.{getattr(self, 'name', 'default')}"
        check_settings(self, prefix)
        check(
            not self.substitute_ramp_steps or self.substitute == "forward",
            f"{prefix}.substitute_ramp_steps is {self.substitute_ramp_steps}, but {prefix}.substitute is 'backward': "
            "nothing is substituted that could be ramped in",
        )
        check(
            not self.expert_gradient or self.substitute == "forward",
            f"{prefix}.expert_gradient is True, but {prefix}.substitute is 'backward': default vectors add nothing to "
            "the output whose gradient could reach the experts",
        )

    def substitution(self, state: State) -> Array | None:
        """0 in the first step, 1 after `substitute_ramp_steps`, linear in between; None without a ramp."""
        if not self.substitute_ramp_steps:
            return None
        return jnp.minimum(state["steps"] / self.substitute_ramp_steps, 1.0)


@dataclass(frozen=True)
class DefaultMoE(DefaultVectorSettings, Method):
    """Top-k, and a default vector in the place of each output that is not there: see `default_vectors.py`.

    The router's gradient is dense: eq. 8 of the paper.
    """

    name = "default"

    product_form: bool = setting(
        False,
        "Multiply the gradient of each gate by p_i + [i chosen], as in the equations of DenseMixer's paper. These "
        "are for vectors that are not in the output.",
    )

    def check(self, config: LayerSettings) -> None:
        check(
            not config.normalize_weights or self.substitute == "backward",
            f"moe.normalize_weights is True, but moe.{self.name}.substitute is 'forward': weights of active experts "
            "that sum to one leave none for the default vectors; use 'backward'",
        )

    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        share = self.substitution(inputs.state)
        decision = decide(inputs.logits, choose(inputs, config), config, substitution=share)
        return product_form(decision, config) if self.product_form else decision

    def initial_state(self, config: LayerSettings) -> State:
        return {"steps": jnp.zeros((), jnp.int32)} if self.substitute_ramp_steps else {}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        return {"steps": state["steps"] + 1} if self.substitute_ramp_steps else {}
