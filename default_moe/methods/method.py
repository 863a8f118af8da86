"""What a way to train a router is: the interface of every method.

A method turns router logits into the experts that run for each token and the gates of their outputs. In between lies
its estimator, for what reaches the logits in the backward pass is what its gates pass on. Running the experts,
adding up their outputs, splitting them over devices, and saving state are the same for all.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
from jax import Array

from default_moe.errors import check
from default_moe.methods.balancers import BALANCERS, Balancer, LossBalancer
from default_moe.methods.decision import Decision, LayerSettings, Load, RouterInputs, State
from default_moe.methods.settings import check_settings, register

METHODS: dict[str, type["Method"]] = {}  # by name: every subclass of `Method` that has been defined


def groups_of_settings() -> dict[str, Any]:
    """All methods and balancers by name; what they have of settings is a group of that name, moe.<name>.*."""
    return {**BALANCERS, **METHODS}


@dataclass(frozen=True)
class Method(abc.ABC):
    """One way to train a router. Fields of a subclass are its settings: `moe.<name>.<field>` in a config.

    name: in `moe.router`.
    random: whether `route` draws random numbers in training.
    dense_gradient: whether experts that do not run for a token are computed all the same in the backward pass, to give
      their gates the gradient <dL/dy, E_i(x)>. They contribute nothing to the output and receive no gradient. For
      methods that choose K different experts. Default vectors then only add to the output.
    takes_bias: whether a balancer's bias and moe.num_groups may steer the choice: whether `route` asks `choose` for its
      experts.
    learns: whether the router gets a gradient at all.
    learns_from_zero_logits: whether the router's weights get a gradient where all of its logits are 0.
    refused: settings of `MoEConfig` that make no sense with the method, and why. They must be left at their defaults.
    """

    name: ClassVar[str]
    random: ClassVar[bool] = False
    dense_gradient: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    learns_from_zero_logits: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        register(cls, METHODS)

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

    def router(self, config: LayerSettings, name: str) -> nn.Module | None:
        """Make the Flax module, of this name, that turns x [B, L, D] into logits, float32 [B, L, N].

        None stands for one matrix.
        """
        return None

    @abc.abstractmethod
    def route(self, inputs: RouterInputs, config: LayerSettings) -> Decision:
        """Decide about tokens."""

    def losses(
        self, decision: Decision, inputs: RouterInputs, config: LayerSettings
    ) -> dict[str, tuple[Array | float, Array]]:
        """Weight and value of each loss term that the method adds to those that all methods have, by name.

        A term whose weight is the number 0 is only reported.
        """
        return {}

    def initial_state(self, config: LayerSettings) -> State:
        """Arrays of one layer that the method keeps from step to step, by name. They are no parameters."""
        return {}

    def observe(self, decision: Decision, inputs: RouterInputs, config: LayerSettings) -> State:
        """Sums over the tokens of a training step that count, by name: what `next_state` needs to know of them.

        They are added up over microbatches. `histogram` makes sums of which a quantile can be told.
        """
        return {}

    def next_state(self, state: State, load: Load, config: LayerSettings) -> State:
        """Return what moves of the state of all layers, every array with a leading axis Y, after a training step.

        Called once a step.
        """
        return {}

    def balancer(self) -> Balancer:
        """Return what evens out the load with moe.balancer='auto'."""
        return LossBalancer()

    def experts_per_token(self, config: LayerSettings) -> int:
        """Return how many experts' outputs a token uses, on average."""
        return config.top_k

    def samples_per_token(self, config: LayerSettings) -> float:
        """Return how many experts are run for a token besides, forward only: `Decision.samples`."""
        return 0.0

    def fewest_experts_per_token(self, config: LayerSettings) -> int:
        """Return how many different experts a token runs at least. Asked only of a `dense_gradient`."""
        return config.top_k

    def most_experts_per_token(self, config: LayerSettings) -> int:
        """Return C, how many there is room for."""
        return self.experts_per_token(config)
