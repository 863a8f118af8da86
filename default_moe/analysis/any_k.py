"""A method whose K is a number in the router's state: one compiled program then serves every K."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.config import MoEConfig
from default_moe.methods import METHODS, Decision, Method, RouterInputs
from default_moe.methods.decision import State
from default_moe.moe.layer import initial_router_state

TOP_K = "top_k"  # its name in the router's state


class _Settings:
    """The settings of a layer, with another K, which may be traced."""

    def __init__(self, config: Any, top_k: Array):
        self._config, self.top_k = config, top_k

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def for_any_k(config: MoEConfig, fewest: int) -> MoEConfig:
    """The same layer, K as the state says: from `fewest` to what it is in `config`."""
    method = config.method
    return dataclasses.replace(config, router=as_class(method, _class_for(type(method), fewest)))


def takes_any_k(config: MoEConfig, d_model: int) -> bool:
    """Whether the method decides with a K that is traced: not if Python or a shape needs the number."""
    method = config.method
    tokens = (1, 2)

    def decide(top_k: Array) -> Any:
        key = jax.random.key(0) if method.random else None
        logits, x = jnp.zeros((*tokens, config.num_experts)), jnp.zeros((*tokens, d_model))
        state = initial_router_state(config)
        inputs = RouterInputs(logits, x, jnp.zeros(tokens, jnp.int32), jnp.ones(tokens), True, key, state)
        settings: Any = _Settings(config, top_k)
        decision = method.route(inputs, settings)
        return decision, method.losses(decision, inputs, settings)

    try:
        jax.eval_shape(decide, jnp.int32(1))
    except Exception:  # whatever a method makes of it: with a plain number it may work
        return False
    return True


@functools.cache
def _class_for(method: Any, fewest: int) -> Any:
    class AnyK(method):
        name = f"{method.name} with any K"

        def route(self, inputs: RouterInputs, config: Any) -> Decision:
            decision = super().route(inputs, _Settings(config, inputs.state[TOP_K]))
            index_BLK = jnp.sort(decision.expert_index, axis=-1)[..., : config.top_k]  # N, for none, is last
            return decision._replace(expert_index=index_BLK)

        def losses(self, decision: Decision, inputs: RouterInputs, config: Any) -> dict[str, tuple[Any, Array]]:
            return super().losses(decision, inputs, _Settings(config, inputs.state[TOP_K]))

        def initial_state(self, config: Any) -> State:
            return super().initial_state(config) | {TOP_K: jnp.int32(config.top_k)}

        def fewest_experts_per_token(self, config: Any) -> int:
            return fewest

    return made(AnyK)


def as_class(method: Method, cls: Any, **changes: Any) -> Any:
    """The method as one of another class, with its settings; of the changes those count that it has."""
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return cls(**settings | {name: value for name, value in changes.items() if name in settings})


def made(method: type[Method]) -> Any:
    """The class as a dataclass that cannot be chosen in a config."""
    METHODS.pop(method.name)
    return dataclasses.dataclass(frozen=True)(method)
