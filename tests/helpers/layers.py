"""Layers for tests: their settings, what the reference takes of them, and steps that must equal its loops.

A training step here is the gradient of <g, y> and of the weighted sum of the losses, which shows every path.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import reference
from helpers.reference import Gradients, Params, Result, Settings, assert_close

from default_moe.config import MoEConfig
from default_moe.methods import METHODS
from default_moe.methods.default import DefaultVectorSettings
from default_moe.moe import MoELayer
from default_moe.moe.layer import initial_router_state

BATCH, LENGTH, D_MODEL, EXPERT_DIM = 2, 12, 12, 10
TOKENS = BATCH * LENGTH
# Weights of the losses beside <g, y> that make their gradients about as large as its own.
BALANCE_WEIGHT, Z_WEIGHT, SEQUENCE_WEIGHT, SPARSITY_WEIGHT, SIMBAL_WEIGHT = 30.0, 3.0, 20.0, 50.0, 100.0
LAMBDA = 0.25
THRESHOLDS = (0.125, 0.5, 0.25, 0.75, 0.0625, 0.125, 0.5, 0.25)  # of 8 experts: some tokens are below all


def moe_config(**fields: Any) -> MoEConfig:
    return with_settings(MoEConfig(), **fields)


def with_settings(config: MoEConfig, **fields: Any) -> MoEConfig:
    """`config` with fields changed, those of the method among them: with_settings(config, ema_decay=0.5)."""
    of_layer = {f.name for f in dataclasses.fields(MoEConfig)}
    of_method = {name: fields.pop(name) for name in list(fields) if name not in of_layer}
    method = METHODS[fields.pop("router")]() if "router" in fields else config.method
    return dataclasses.replace(config, router=dataclasses.replace(method, **of_method), **fields)


def make_config(num_experts: int = 8, top_k: int = 2, **fields: Any) -> MoEConfig:
    """Of a layer that `reference.make_inputs` makes inputs for."""
    return moe_config(num_experts=num_experts, top_k=top_k, expert_dim=EXPERT_DIM, **fields)


def inputs(seed: int, num_experts: int = 8):
    return reference.make_inputs(seed, TOKENS, num_experts)


def batched(tokens: Any, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(tokens, dtype).reshape(BATCH, LENGTH, *np.shape(tokens)[1:])


def settings_of(config: MoEConfig, length: int = LENGTH) -> Settings:
    """With a ramp that has come three quarters of its way, and the bias of `bias_of`."""
    vectors = config.default_vectors or DefaultVectorSettings()
    ramp = vectors.substitute_ramp_steps
    return Settings(
        config.top_k,
        config.method.name,
        vectors.substitute,
        vectors.ema_weighted,
        vectors.ema_decay,
        vectors.ema_update,
        substitution=(ramp * 3 // 4) / ramp if ramp else 1.0,
        expert_gradient=vectors.expert_gradient,
        score_function=config.score_function,
        normalize_weights=config.normalize_weights,
        bias=bias_of(config),
        weight_scale=config.weight_scale,
        product_form=getattr(config.method, "product_form", False),
        num_groups=config.num_groups,
        groups_per_token=config.groups_per_token,
        thresholds=THRESHOLDS,
        threshold=getattr(config.method, "mask_threshold", 0.1),
        capacity=config.capacity(length),
        length=length,
    )


def bias_of(config: MoEConfig) -> tuple[float, ...]:
    """A bias for loss_free that changes many choices, and that float32 holds exactly."""
    return tuple(0.125 * ((3 * i) % config.num_experts) / config.num_experts for i in range(config.num_experts))


def variables_of(config: MoEConfig, params: Params, ema: Any) -> dict[str, Any]:
    """Variables of a layer, whatever its method keeps among them."""
    kernel, gate, up, down = (jnp.asarray(p, jnp.float32) for p in params)
    tree = {"params": {"router": {"kernel": kernel}, "experts": {"gate": gate, "up": up, "down": down}}}
    ramp = 4  # for thresholds, whose steps count too
    if config.default_vectors:
        tree["default_vectors"] = {"ema": jnp.asarray(ema, jnp.float32)}
        ramp = config.default_vectors.substitute_ramp_steps or ramp
    state = {
        "lambda": jnp.float32(LAMBDA),
        "bias": jnp.float32(bias_of(config)),
        "threshold": jnp.float32(THRESHOLDS),
        "steps": jnp.int32(ramp * 3 // 4),
    }
    kept = {name: state[name] for name in initial_router_state(config)}
    return {**tree, "router_state": kept} if kept else tree


def gradient_of_step(config: MoEConfig, train: bool = True) -> Any:
    """(variables, x, g, mask) -> (gradients by (variables, x), (y, aux, collections after)), not jitted."""
    layer = MoELayer(config)

    def objective(variables, x, g, mask):
        (y, aux), state = layer.apply(
            variables,
            x,
            train=train,
            mask=mask,
            token_ids=reference.token_id(jnp.arange(x[..., 0].size, dtype=jnp.int32).reshape(x.shape[:2])),
            mutable=["default_vectors", "router_state"],
            rngs={"router": jax.random.key(5)},
        )
        losses = (
            BALANCE_WEIGHT * aux["load_balance_loss"]
            + Z_WEIGHT * aux["router_z_loss"]
            + SEQUENCE_WEIGHT * aux.get("sequence_balance_loss", 0.0)
            + SPARSITY_WEIGHT * aux.get("sparsity_loss", 0.0)
            + SIMBAL_WEIGHT * aux.get("simbal_loss", 0.0)
        )
        return (g * y).sum() + losses, (y, aux, state)

    return jax.grad(objective, argnums=(0, 1), has_aux=True, allow_int=True)


@functools.cache
def compiled(config: MoEConfig, train: bool = True) -> Any:
    return jax.jit(gradient_of_step(config, train))


def run(config: MoEConfig, x, params: Params, ema, g, mask=None, train: bool = True) -> Any:
    """What `gradient_of_step` gives for inputs of the loops."""
    mask_BL = None if mask is None else batched(mask, mask.dtype)
    return compiled(config, train)(variables_of(config, params, ema), batched(x), batched(g), mask_BL)


def gradients_of(config: MoEConfig, x: Any, params: Params, result: Result, s: Settings, g: Any) -> Gradients:
    """Those of a step, by the loops."""
    more_probs = more_weights = 0.0
    if config.sequence_balance_weight:
        more_probs = SEQUENCE_WEIGHT * reference.sequence_balance(result.routes, s.length)[0]
    if config.method.name == "remoe":
        more_weights = SPARSITY_WEIGHT * reference.sparsity(result.routes, config.top_k)[0]
    d = reference.gradients(x, params, result, s, g, BALANCE_WEIGHT, Z_WEIGHT, (more_probs, more_weights))
    if config.simbal_weight:
        d.kernel[:] += SIMBAL_WEIGHT * reference.simbal(params)[0]
    return d


def check_step(config: MoEConfig, x, params: Params, ema, g, mask=None, draws=None):
    """One training step of the layer must equal the loops in everything. Returns the loops' result and gradients."""
    s = settings_of(config)
    expected = reference.forward(x, params, ema, s, mask=mask, draws=draws)
    got = run(config, x, params, ema, g, mask)
    check_results(config, got, expected, gradients_of(config, x, params, expected, s, g))
    (d_variables, _), (_, _, state) = got
    return expected, state, d_variables["params"]


def check_results(config: MoEConfig, got: Any, expected: Result, grads: Gradients) -> None:
    """What a compiled step returned is what the loops found."""
    (d_variables, d_x), (y, aux, state) = got
    check_aux(config, aux, expected)
    assert_close(y, expected.y.reshape(y.shape), "y")
    if config.default_vectors:
        assert_close(state["default_vectors"]["ema"], expected.ema, "ema")
        np.testing.assert_array_equal(d_variables["default_vectors"]["ema"], 0, "no gradient may reach the EMA")
    assert_close(d_x, grads.x.reshape(d_x.shape), "gradient of x")
    assert_close(d_variables["params"]["router"]["kernel"], grads.kernel, "gradient of the router")
    for name in ("gate", "up", "down"):
        assert_close(d_variables["params"]["experts"][name], getattr(grads, name), f"gradient of {name}")


def check_aux(config: MoEConfig, aux: dict[str, Any], expected: Result) -> None:
    """What a layer reports is what the loops found."""
    routes = expected.routes
    shape = aux["router_probs"].shape
    assert_close(aux["router_probs"], routes.probs.reshape(shape), "router_probs")
    index_TK = np.asarray(aux["expert_index"]).reshape(len(routes.chosen), -1)
    if config.most_experts_per_token == config.num_experts > config.top_k:
        assert [[i for i in index if i < config.num_experts] for index in index_TK] == routes.chosen
        assert_close(aux["combine_weights"], routes.weights.reshape(shape), "combine_weights")
    else:
        np.testing.assert_array_equal(index_TK, routes.chosen)
    np.testing.assert_array_equal(aux["tokens_per_expert"], expected.counts)
    assert int(aux["num_tokens"]) == routes.mask.sum()
    assert_close(aux["load_balance_loss"], expected.load_balance_loss, "load_balance_loss")
    assert_close(aux["router_z_loss"], expected.z_loss, "router_z_loss")
    if config.sequence_balance_weight:
        expected_loss = reference.sequence_balance(routes, shape[1])[1]
        assert_close(aux["sequence_balance_loss"], expected_loss, "sequence_balance_loss")
    if config.method.name == "remoe":
        assert_close(aux["sparsity_loss"], reference.sparsity(routes, config.top_k)[1], "sparsity_loss")
