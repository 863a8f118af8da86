"""Models whose dense layers are not the first ones: which layer is what, and all that a loop over the layers keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.steps import CONFIG, change, make_batch, step_of

from default_moe.bench import scaling
from default_moe.config import Config, ModelConfig, MoEConfig
from default_moe.model.attention import Tokens
from default_moe.model.language_model import Block, LanguageModel
from default_moe.model.layer_order import STACKS, layer_groups

BASE = ModelConfig(d_model=16, num_layers=7, num_heads=2, dense_dim=8)
MODEL = dataclasses.replace(BASE, dense_layers="3,6")  # DMMDMMD
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12, router="default", router_noise_std=0.5)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)


@pytest.mark.parametrize(
    ("settings", "kinds", "groups"),
    [
        ({}, "DMMMMMM", [(1, 6, 1)]),
        ({"num_dense_layers": 0}, "MMMMMMM", [(0, 7, 1)]),
        ({"num_dense_layers": 7}, "DDDDDDD", [(7, 0, 1)]),
        ({"num_layers": 6, "moe_every": 2}, "DMDMDM", [(1, 1, 3)]),
        ({"moe_every": 2, "num_dense_layers": 3}, "DDDMDMD", [(3, 1, 1), (1, 1, 1), (1, 0, 1)]),
        ({"num_dense_layers": 0, "moe_every": 3}, "DDMDDMD", [(2, 1, 2), (1, 0, 1)]),
        ({"num_dense_layers": 0, "moe_every": 2, "dense_layers": "3,2"}, "DMDDDMD", [(1, 1, 1), (3, 1, 1), (1, 0, 1)]),
        ({"num_dense_layers": 0, "dense_layers": "3"}, "MMMDMMM", [(0, 3, 1), (1, 3, 1)]),
    ],
)
def test_layers_are_what_the_settings_say_and_run_in_few_groups(settings, kinds, groups):
    model = dataclasses.replace(BASE, **settings)
    assert model.moe_layers == tuple(layer for layer, kind in enumerate(kinds) if kind == "M")
    assert layer_groups(model.num_layers, model.moe_layers) == groups


def test_depth_adds_no_code_where_the_order_is_regular():
    def operations(num_layers):
        model = LanguageModel(dataclasses.replace(BASE, moe_every=2, num_layers=num_layers), MOE, 31)
        variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), TOKENS)

        def loss(params, others):
            return model.apply({**others, "params": params}, TOKENS, train=False)[0].sum()

        return len(str(jax.make_jaxpr(jax.grad(loss))(variables.pop("params"), variables)).split(" = "))

    assert operations(20) == operations(4)


@functools.cache
def variables_of(model):
    made = jax.jit(lambda: model.init(jax.random.key(0), TOKENS, train=False))()
    return {**made, "default_vectors": jax.tree.map(lambda a: a + 0.1, made["default_vectors"])}


@functools.cache
def trained(model):
    """What a pass in training gives: logits, statistics, default vectors; and the gradient of a loss."""

    def loss(params, variables):
        apply = functools.partial(model.apply, train=True, mutable=["default_vectors"])
        (logits, stats), moved = apply({**variables, "params": params}, TOKENS, rngs={"router": jax.random.key(1)})
        return jnp.square(logits).sum() + stats.auxiliary_loss.sum(), (logits, stats, moved["default_vectors"])

    variables = dict(variables_of(model))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables.pop("params"), variables)


def test_vectors_and_statistics_are_those_of_blocks_one_by_one():
    """Without noise, of which each layer has its own."""
    moe = dataclasses.replace(MOE, router_noise_std=0.0)
    model = LanguageModel(MODEL, moe, 31)
    (_, (_, stats, moved)), _ = trained(model)
    variables, done = variables_of(model), dict.fromkeys(STACKS, 0)
    x, tokens = variables["params"]["embed"][TOKENS], Tokens(jnp.broadcast_to(jnp.arange(12), TOKENS.shape))

    def of_layer(tree, index):
        return jax.tree.map(lambda a: a[index], tree)

    blocks = {kind: Block(MODEL, experts, 8, True, None) for kind, experts in (("D", None), ("M", moe))}
    run = {kind: jax.jit(functools.partial(b.apply, mutable=["default_vectors"])) for kind, b in blocks.items()}
    for kind in "DMMDMMD":
        name = STACKS["DM".index(kind)]
        index, done[name] = done[name], done[name] + 1
        own = {c: of_layer(tree[name], index) for c, tree in variables.items() if name in tree}
        (x, expected), after = run[kind](own, x, tokens)
        if kind == "M":
            wanted = expected, after["default_vectors"]
            for a, b in zip(
                jax.tree.leaves(of_layer((stats, moved["moe_layers"]), index)), jax.tree.leaves(wanted), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_each_layer_draws_its_own_random_numbers():
    """Of MoE layers with equal parameters, on equal inputs: no layer adds anything."""
    model = LanguageModel(dataclasses.replace(BASE, moe_every=2, num_layers=6), MOE, 31)
    variables = dict(variables_of(model))
    kernel_YDN = variables["params"]["moe_layers"]["moe"]["router"]["kernel"]
    nothing = jax.tree.map(jnp.zeros_like, {name: variables["params"][name] for name in STACKS})
    for layer in nothing.values():
        layer["ffn_norm"] = jax.tree.map(jnp.ones_like, layer["ffn_norm"])
    nothing["moe_layers"]["moe"]["router"]["kernel"] = jnp.broadcast_to(kernel_YDN[0], kernel_YDN.shape)
    variables["params"] = {**variables["params"], **nothing}
    variables["default_vectors"] = jax.tree.map(jnp.zeros_like, variables["default_vectors"])
    apply = functools.partial(model.apply, train=True, mutable=["default_vectors"])
    (_, stats), _ = jax.jit(apply)(variables, TOKENS, rngs={"router": jax.random.key(1)})
    assert len(np.unique(stats.mean_router_probs, axis=0)) == 3
    _, stats = jax.jit(functools.partial(model.apply, train=False))(variables, TOKENS)
    assert len(np.unique(stats.mean_router_probs, axis=0)) == 1


@pytest.mark.parametrize("settings", [{"scan_unroll": 7}, {"remat": "dots", "scan_unroll": 3}])
def test_unrolling_and_rematerialisation_change_nothing(settings):
    plain, changed = (trained(LanguageModel(m, MOE, 31)) for m in (MODEL, dataclasses.replace(MODEL, **settings)))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * (1 + float(np.abs(a).max())))


@pytest.mark.parametrize(
    ("layers", "moe"),
    [
        ({"num_layers": 4, "moe_every": 2}, {"router": "topk"}),  # DMDM: one group of whole stacks
        ({"num_layers": 5, "dense_layers": "2"}, {"router": "topk"}),  # DMDMM: parts of them
        ({"num_layers": 5, "dense_layers": "2"}, {"substitute": "backward"}),
    ],
    ids=["whole stacks", "parts", "vectors"],
)
def test_gradients_and_vectors_of_microbatches_add_up(layers, moe):
    config = change(CONFIG, model={"num_dense_layers": 1, **layers}, moe={"load_balance_weight": 0.0, **moe})
    (state, metrics), (expected_state, expected) = (
        step_of(one, batch=make_batch(4)) for one in (change(config, train={"grad_accum_steps": 2}), config)
    )
    np.testing.assert_array_equal(*(m["layers"].tokens_per_expert for m in (metrics, expected)))
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    # Vectors are other ones in each microbatch, and so is what the router's gradient makes of them.
    found, wanted = (s.variables or s.opt_state for s in (state, expected_state))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_depths_that_lack_a_listed_layer_are_not_swept(monkeypatch):
    monkeypatch.setattr(scaling, "NUM_LAYERS", (1, 6, 12))
    assert list(scaling.sweeps(Config(model=MODEL))["num_layers"]) == [12]
