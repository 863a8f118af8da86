"""Norms, norms of queries and keys, grouped heads, windows, the order of layers: all against float64 loops in NumPy."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference_model
from helpers.layers import moe_config
from helpers.reference import assert_close

from default_moe.config import ModelConfig
from default_moe.model.language_model import LanguageModel, traced_init
from default_moe.sharding import DEFAULT_RULES, abstract_arrays, check_rules, make_mesh, unboxed

VOCAB, BATCH, LENGTH, TOP_K = 13, 8, 6, 2
MOE = moe_config(num_experts=4, top_k=TOP_K, expert_dim=6, router="topk", matmul="ragged")
BASE = ModelConfig(d_model=16, num_layers=2, num_heads=4, dense_dim=8)

# As in Mixtral, Qwen3 and OLMoE, and what is in none of these. D: dense, M: experts.
MODELS = {
    "grouped heads": {"norm": "rms", "num_kv_heads": 2, "attention_window": 2},
    "norm per head": {"norm": "rms", "qk_norm": "head", "num_kv_heads": 2, "head_dim": 6},
    "norm of all": {"norm": "rms", "qk_norm": "full", "num_kv_heads": 1, "tie_embeddings": True},
    "layer norms": {"qk_norm": "full", "head_dim": 2, "attention_window": 5},
    "every second layer": {"num_layers": 4, "moe_every": 2, "num_kv_heads": 2},
    "dense layers in between": {"norm": "rms", "num_layers": 6, "dense_layers": "3", "num_kv_heads": 2},  # DMMDMM
}
DOCUMENTS = ("grouped heads", "norm per head")


def config_of(name: str, **fields: Any) -> ModelConfig:
    return dataclasses.replace(BASE, **MODELS[name], **fields)


def model_of(config: ModelConfig, moe: Any = MOE) -> LanguageModel:
    return LanguageModel(config, moe, VOCAB)


@functools.cache
def params_of(name: str) -> Any:
    """In float32, so large that everything counts; scales and biases of norms too."""
    rng = np.random.default_rng(3)
    shapes = unboxed(traced_init(model_of(config_of(name))).boxed_shapes)["params"]

    def random(path: tuple, leaf: Any) -> np.ndarray:
        of_norm = path[-1].key in ("scale", "bias")
        std, mean = (0.3, path[-1].key == "scale") if of_norm else (0.5, 0)
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, shapes)


def inputs_of(name: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(1, 3, (BATCH, LENGTH))) if name in DOCUMENTS else None
    return {"tokens_BL": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32), "segment_ids": segments}


G = np.random.default_rng(2).normal(size=(BATCH, LENGTH, VOCAB))


def loops(name: str, params: Any, top_k: int = TOP_K) -> np.ndarray:
    inputs = inputs_of(name)
    wide = jax.tree.map(np.float64, params)
    return reference_model.logits(wide, inputs["tokens_BL"], config_of(name), top_k, inputs["segment_ids"])


def gradient_of(model: LanguageModel) -> Any:
    """(params, inputs) -> (logits, the gradient of <G, logits>), not jitted."""

    def objective(params: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        logits, _ = model.apply({"params": params}, train=False, **inputs)
        return (logits * G).sum(), logits

    def both(params: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
        (_, logits), grads = jax.value_and_grad(objective, has_aux=True)(params, inputs)
        return logits, grads

    return both


@functools.cache
def on_one_device(name: str) -> tuple[Any, Any]:
    return jax.jit(gradient_of(model_of(config_of(name))))(params_of(name), inputs_of(name))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_loops(name):
    """Of the gradient, each array's product with a random direction, against central differences."""
    logits, grads = on_one_device(name)
    params = params_of(name)
    assert_close(logits, loops(name, params), "logits")
    rng, step = np.random.default_rng(4), 1e-6
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        direction = rng.normal(size=leaf.shape)

        def moved(sign: int, path=path, direction=direction) -> float:
            change = sign * step * direction
            along = jax.tree_util.tree_map_with_path(lambda p, a: a + change if p == path else a, params)
            return float((loops(name, along) * G).sum())

        grad = np.asarray(functools.reduce(lambda tree, key: tree[key.key], path, grads), np.float64)
        # Float32 rounds at 6e-8, differences of sums of some 600 terms in float64 by 1e-10 of what they are.
        size = np.linalg.norm(grad) * np.linalg.norm(direction) / leaf.size**0.5
        assert (grad * direction).sum() == pytest.approx((moved(1) - moved(-1)) / (2 * step), abs=1e-5 * size), path


HEADS_SPLIT = {"batch": ("data", "fsdp"), "heads": "expert"}


@pytest.mark.parametrize(
    ("name", "remat", "mesh", "rules", "key_parts"),
    [
        ("norm per head", "full", (1, 4, 2), {}, (1, 4, 1, 1)),
        # Four parts of heads, of which each needs the one key and value.
        ("norm of all", "dots", (2, 1, 4), HEADS_SPLIT, (1, 1, 1, 1)),
        ("grouped heads", "none", (2, 2, 2), {**HEADS_SPLIT, "kv_heads": "expert"}, (1, 2, 2, 1)),
        ("dense layers in between", "full", (2, 2, 2), {}, (1, 2, 1, 1)),
    ],
)
def test_eight_devices_and_rematerialisation_change_nothing(name, remat, mesh, rules, key_parts):
    rules = tuple((axis, rules.get(axis, axes)) for axis, axes in DEFAULT_RULES)
    devices, model = make_mesh(*mesh), model_of(config_of(name, remat=remat))
    with jax.set_mesh(devices), nn.logical_axis_rules(rules):
        check_rules()
        abstract = abstract_arrays(traced_init(model).boxed_shapes, devices, rules)["params"]
        params = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), params_of(name), abstract)
        logits, grads = jax.jit(gradient_of(model))(params, inputs_of(name))
    key = params["moe_layers"]["attention"]["key"]["kernel"]
    assert np.divide(key.shape, key.sharding.shard_shape(key.shape)).tolist() == list(key_parts)
    expected_logits, expected = on_one_device(name)
    assert_close(logits, expected_logits, "logits")
    jax.tree_util.tree_map_with_path(lambda path, a, b: assert_close(a, b, str(path)), grads, expected)


@pytest.mark.parametrize("name", ["grouped heads", "norm of all", "every second layer", "dense layers in between"])
def test_decoding_token_by_token_equals_the_forward_pass(name):
    model, tokens = model_of(config_of(name)), inputs_of(name)["tokens_BL"]
    variables = {"params": params_of(name)}
    expected = reference_model.logits(jax.tree.map(np.float64, params_of(name)), tokens, config_of(name), TOP_K)

    def step(variables: Any, token: Any, position: Any) -> Any:
        positions = jnp.full(token.shape, position)
        options = {"positions": positions, "cache_length": LENGTH + 2, "mutable": ["cache"]}
        return model.apply(variables, token, train=False, **options)

    shapes = jax.eval_shape(step, variables, tokens[:, :1], 0)[1]
    kept = shapes["cache"]["moe_layers"]["attention"]["cached_key"].shape
    assert kept == (
        len(params_of(name)["moe_layers"]["moe"]["router"]["kernel"]),
        BATCH,
        LENGTH + 2,
        model.config.num_kv_heads,
        model.config.head_size,
    )
    cache, found, compiled = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes), [], jax.jit(step)
    for position in range(LENGTH):
        (logits, _), cache = compiled({**variables, **cache}, tokens[:, position : position + 1], position)
        found.append(logits)
    assert_close(np.concatenate(found, axis=1), expected, "logits")


def test_bfloat16_is_close_to_the_loops():
    """With every expert active, since rounding may otherwise send a token elsewhere."""
    name = "norm per head"
    moe = dataclasses.replace(MOE, top_k=4, dtype="bfloat16")
    model = model_of(config_of(name, dtype="bfloat16"), moe)
    logits, grads = jax.jit(gradient_of(model))(params_of(name), inputs_of(name))
    expected = loops(name, params_of(name), top_k=4)
    # bfloat16 keeps 8 bits: a relative error of 2^-8 at each of some ten roundings in a row.
    assert np.abs(logits - expected).max() < 10 * 2**-8 * np.abs(expected).max()
    assert all(a.dtype == jnp.float32 and np.isfinite(a).all() for a in jax.tree.leaves(grads))
