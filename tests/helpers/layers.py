"""Layers for tests: their settings, what the reference takes of them, and a loss that shows every path."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from helpers import reference
from helpers.reference import Params, Result, Settings, assert_close

from default_moe.config import MoEConfig
from default_moe.methods import METHODS
from default_moe.methods.default import DefaultVectorSettings

# Weights of the losses beside <G, y> that make their gradients about as large as its own.
BALANCE_WEIGHT, Z_WEIGHT, SEQUENCE_WEIGHT, SPARSITY_WEIGHT = 30.0, 3.0, 20.0, 50.0
LAMBDA = 0.25


def moe_config(**fields: Any) -> MoEConfig:
    return with_settings(MoEConfig(), **fields)


def with_settings(config: MoEConfig, **fields: Any) -> MoEConfig:
    """`config` with fields changed, those of the method among them: with_settings(config, ema_decay=0.5)."""
    of_layer = {f.name for f in dataclasses.fields(MoEConfig)}
    of_method = {name: fields.pop(name) for name in list(fields) if name not in of_layer}
    method = METHODS[fields.pop("router")]() if "router" in fields else config.method
    return dataclasses.replace(config, router=dataclasses.replace(method, **of_method), **fields)


def bias_of(config: MoEConfig) -> tuple[float, ...]:
    """A bias for loss_free that changes many choices, and that float32 holds exactly."""
    return tuple(0.125 * ((3 * i) % config.num_experts) / config.num_experts for i in range(config.num_experts))


def steps_of(config: MoEConfig) -> int:
    """How far a ramp has come."""
    return config.default_vectors.substitute_ramp_steps * 3 // 4 if config.default_vectors else 0


def settings_of(config: MoEConfig, length: int) -> Settings:
    vectors = config.default_vectors or DefaultVectorSettings()
    ramp = vectors.substitute_ramp_steps
    return Settings(
        config.top_k,
        config.method.name,
        vectors.substitute,
        vectors.ema_weighted,
        vectors.ema_decay,
        vectors.ema_update,
        substitution=steps_of(config) / ramp if ramp else 1.0,
        expert_gradient=vectors.expert_gradient,
        score_function=config.score_function,
        normalize_weights=config.normalize_weights,
        bias=bias_of(config),
        threshold=getattr(config.method, "mask_threshold", 0.1),
        capacity=config.capacity(length),
        length=length,
    )


def variables_of(config: MoEConfig, params: Params, ema: Any) -> dict[str, Any]:
    """Variables of a layer, whatever its method keeps among them."""
    kernel, gate, up, down = (jnp.asarray(p, jnp.float32) for p in params)
    tree = {"params": {"router": {"kernel": kernel}, "experts": {"gate": gate, "up": up, "down": down}}}
    if config.default_vectors:
        tree["default_vectors"] = {"ema": jnp.asarray(ema, jnp.float32)}
    state = {"lambda": jnp.float32(LAMBDA), "bias": jnp.float32(bias_of(config)), "steps": jnp.int32(steps_of(config))}
    kept = {name: state[name] for name in config.method.initial_state(config)}
    return {**tree, "router_state": kept} if kept else tree


def losses_of(aux: dict[str, Any]) -> Any:
    """The weighted sum of a layer's losses."""
    return (
        BALANCE_WEIGHT * aux["load_balance_loss"]
        + Z_WEIGHT * aux["router_z_loss"]
        + SEQUENCE_WEIGHT * aux.get("sequence_balance_loss", 0.0)
        + SPARSITY_WEIGHT * aux.get("sparsity_loss", 0.0)
    )


def gradients_of(config: MoEConfig, x: Any, params: Params, result: Result, s: Settings, g: Any, mask: Any) -> Any:
    """By the loops, of <g, y> and `losses_of`."""
    more_probs, more_weights = np.zeros((2, len(x), config.num_experts))
    if config.sequence_balance_weight:
        more_probs += SEQUENCE_WEIGHT * reference.sequence_balance(result.routes, s.length, mask)[0]
    if config.method.name == "remoe":
        more_weights += SPARSITY_WEIGHT * reference.sparsity(result.routes, config.top_k, mask)[0]
    more = more_probs, more_weights
    return reference.gradients(x, params, result, s, g, BALANCE_WEIGHT, Z_WEIGHT, mask, more)


def check_aux(config: MoEConfig, aux: dict[str, Any], expected: Result, mask: Any = None) -> None:
    """What a layer reports is what the loops found."""
    routes = expected.routes
    shape = aux["router_probs"].shape
    assert_close(aux["router_probs"], routes.probs.reshape(shape), "router_probs")
    index_TK = np.asarray(aux["expert_index"]).reshape(len(routes.chosen), -1)
    if config.method.name in ("dense", "remoe"):
        assert [[i for i in index if i < config.num_experts] for index in index_TK] == routes.chosen
        assert_close(aux["combine_weights"], routes.weights.reshape(shape), "combine_weights")
    else:
        np.testing.assert_array_equal(index_TK, routes.chosen)
    np.testing.assert_array_equal(aux["tokens_per_expert"], expected.counts)
    assert int(aux["num_tokens"]) == (len(routes.chosen) if mask is None else sum(map(bool, mask)))
    assert_close(aux["load_balance_loss"], expected.load_balance_loss, "load_balance_loss")
    assert_close(aux["router_z_loss"], expected.z_loss, "router_z_loss")
    if config.sequence_balance_weight:
        length = shape[1]
        loss = reference.sequence_balance(routes, length, mask)[1]
        assert_close(aux["sequence_balance_loss"], loss, "sequence_balance_loss")
    if config.method.name == "remoe":
        assert_close(aux["sparsity_loss"], reference.sparsity(routes, config.top_k, mask)[1], "sparsity_loss")
