"""Experts run for tokens that did not choose them: `default_sampled` against loops, and its gradient over all draws."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers, reference, sharded_layers
from helpers.emulation import emulate_exchange
from helpers.layers import check_results, check_step, inputs, make_config, settings_of
from helpers.reference import assert_close
from helpers.refusals import refused

from default_moe.methods import RouterInputs, default_sampled
from default_moe.moe.experts.parallel import gather_bytes
from default_moe.plan.collectives import collectives, summary
from default_moe.plan.hlo import Hlo
from default_moe.sharding import AXES, make_mesh

pytestmark = pytest.mark.usefixtures("tokamax_everywhere")

EVERY = 3
drawn = default_sampled.draw


@pytest.fixture
def same_draws(monkeypatch):
    """The layer draws with a key that tests know."""
    monkeypatch.setattr(default_sampled, "draw", lambda key, *rest: drawn(jax.random.key(3), *rest))


def samples_of(config, routes, length):
    """(t, i) as `same_draws` has the layer draw them."""
    index_BLK = jnp.array(routes.chosen).reshape(-1, length, config.top_k)
    position_BP, expert_BP = map(np.asarray, drawn(jax.random.key(3), index_BLK, EVERY, config))
    found = [
        (b * length + position_BP[b, p], int(expert_BP[b, p]))
        for b, p in np.ndindex(position_BP.shape)
        if expert_BP[b, p] < config.num_experts
    ]
    assert len(found) > len(routes.chosen) / EVERY / 2
    return tuple(found)


def settings_with_samples(config, x, params, length):
    s = settings_of(config, length)
    factor = 1.0 if config.method.sample_gradient == "plain" else EVERY * (config.num_experts - config.top_k)
    return s._replace(samples=samples_of(config, reference.route(x, params.kernel, s), length), sample_factor=factor)


CASES = [
    {"matmul": "blocks"},
    {"matmul": "ragged", "sample_gradient": "unbiased"},
    {"matmul": "tokamax", "ema_update": "before"},
    {"matmul": "blocks", "substitute": "backward", "ema_update": "before"},
    {"matmul": "blocks", "product_form": True, "substitute_ramp_steps": 8},
    {"matmul": "ragged", "score_function": "sigmoid", "top_k": 1},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_layer_equals_the_loops(same_draws, monkeypatch, fields, masked):
    config = make_config(**{"top_k": 2, "router": "default_sampled", "sample_every": EVERY, **fields})
    x, params, ema, g = inputs(31)
    mask = np.random.default_rng(0).integers(0, 2, layers.TOKENS, dtype=np.int32) if masked else None
    s = settings_with_samples(config, x, params, layers.LENGTH)
    monkeypatch.setattr(layers, "settings_of", lambda config: s)
    expected, _, _ = check_step(config, x, params, ema, g, mask)
    assert np.abs(expected.ema - ema).max() > 0.01


@pytest.mark.parametrize(
    ("sizes", "fields", "masked"),
    [
        ((2, 2, 2), {"matmul": "blocks"}, False),
        ((1, 1, 8), {"matmul": "ragged"}, True),
        ((8, 1, 1), {"matmul": "blocks", "sample_gradient": "unbiased"}, True),
        ((2, 1, 4), {"matmul": "tokamax", "ema_update": "before"}, False),
        ((2, 2, 2), {"matmul": "blocks", "expert_parallel": "exchange", "ema_update": "before"}, True),
        ((1, 1, 8), {"matmul": "ragged", "expert_parallel": "exchange"}, False),
    ],
    ids=str,
)
def test_every_mesh_equals_the_loops(same_draws, monkeypatch, sizes, fields, masked):
    if "expert_parallel" in fields:
        emulate_exchange(monkeypatch)
    config = make_config(router="default_sampled", sample_every=EVERY, **fields)
    x, params, ema, g = sharded_layers.skewed_inputs()
    mask = sharded_layers.skewed_mask().ravel() if masked else None
    s = settings_with_samples(config, x, params, sharded_layers.LENGTH)
    expected = reference.forward(x, params, ema, s, mask=mask)
    grads = layers.gradients_of(config, x, params, expected, s, g)
    mesh = make_mesh(*sizes)
    got = sharded_layers.compiled_step(mesh, config, masked=masked)(*sharded_layers.arrays(config, mesh, masked=masked))
    check_results(config, got, expected, grads)


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 1, 8)], ids=str)
def test_what_crosses_the_expert_axis_is_counted(sizes):
    config = make_config(router="default_sampled", sample_every=sharded_layers.LENGTH, matmul="blocks")
    program = Hlo(sharded_layers.compiled_step(make_mesh(*sizes), config).as_text())
    sent = collections.Counter()
    for kind, axes, _, size in summary(collectives(program, dict(zip(AXES, sizes, strict=True)))):
        if axes == ("expert",) and kind in ("all-gather", "reduce-scatter"):
            sent[kind] += size
    expected = gather_bytes(config, sharded_layers.TOKENS // 8, sharded_layers.D_MODEL, sizes[2])
    assert sum(sent.values()) == pytest.approx(expected, abs=10)  # each collective is rounded to bytes


def test_at_evaluation_nothing_is_drawn():
    x, params, ema, g = inputs(32)
    config = make_config(router="default_sampled", matmul="blocks")
    (_, _), (y, _, state) = layers.run(config, x, params, ema, g, train=False)
    expected = reference.forward(x, params, ema, settings_of(config), update=False)
    assert_close(y, expected.y.reshape(y.shape))
    np.testing.assert_array_equal(state["default_vectors"]["ema"], jnp.float32(ema))


@functools.cache
def gradients_over_all_draws(**fields):
    """The router's gradient of a layer with 4 experts, K = 1, for every draw of one of two tokens: [6, D, N]."""
    fields = {"sample_gradient": "unbiased", **fields}
    config = make_config(4, 1, router="default_sampled", sample_every=2, matmul="blocks", **fields)
    x, params, ema, g = reference.make_inputs(33, 2, 4)
    variables = layers.variables_of(config, params, ema)
    of_tokens = [jnp.asarray(a, jnp.float32)[None] for a in (x, g)]
    chosen = np.argmax(x @ params.kernel, axis=-1)
    found = []
    with pytest.MonkeyPatch.context() as patched:
        for t in range(2):
            for i in range(4):
                if i != chosen[t]:
                    draw = (jnp.array([[t]]), jnp.array([[i]]))
                    patched.setattr(default_sampled, "draw", lambda *_, draw=draw: draw)
                    step = jax.jit(layers.gradient_of_step(config))
                    (d, _), _ = step(variables, *of_tokens, None)
                    found.append(np.float64(d["params"]["router"]["kernel"]))
    result = reference.forward(x, params, ema, settings_of(config)._replace(router="densemixer"))
    exact = reference.gradients(
        x, params, result, settings_of(config)._replace(router="densemixer"), g, layers.BALANCE_WEIGHT, layers.Z_WEIGHT
    )
    return np.array(found), exact.kernel, (x, params, ema, g)


def test_the_mean_over_all_draws_is_the_exact_gradient():
    """And the variance is what the control variate leaves: that of <g, E_i - V_i> where V_i stands for E_i."""
    found, exact, (x, params, ema, g) = gradients_over_all_draws()
    assert_close(found.mean(axis=0), exact, "mean")
    by_hand = []
    for t, i in itertools.product(range(2), range(4)):
        p = reference.softmax(x[t] @ params.kernel)
        if i != p.argmax():
            # 1 / q = 2 * 3; of the gate's gradient each logit gets p_i ([i = j] - p_j).
            d_gate = 6 * g[t] @ (reference.expert(params, i, x[t]) - ema[i])
            by_hand.append(np.outer(x[t], d_gate * p[i] * ((np.arange(4) == i) - p)))
    assert_close(found.var(axis=0), np.var(by_hand, axis=0), "variance")


def test_outputs_in_the_place_of_vectors_are_biased():
    for fields in ({"sample_gradient": "plain"}, {"sample_gradient": "plain", "ema_update": "before"}):
        found, exact, _ = gradients_over_all_draws(**fields)
        assert np.abs(found.mean(axis=0) - exact).max() > 1e-3 * np.abs(exact).max()  # 100 times the tolerance


@pytest.mark.parametrize(("every", "length"), [(1, 6), (4, 10), (8, 5)])
def test_draws_are_even(every, length):
    """Of 4,000 sequences: each expert that a token did not choose is drawn with chance q, within 5 deviations."""
    config, count = make_config(6, 2), 4000
    chosen_LK = np.array([[t % 6, (t + 2) % 6] for t in range(length)])
    index_BLK = jnp.broadcast_to(jnp.array(chosen_LK), (count, length, 2))
    position_BP, expert_BP = map(np.asarray, drawn(jax.random.key(0), index_BLK, every, config))
    counts_LN = np.zeros((length, 7), int)
    np.add.at(counts_LN, (position_BP.ravel(), expert_BP.ravel()), 1)
    q = 1 / every / 4
    for t in range(length):
        assert (counts_LN[t, chosen_LK[t]] == 0).all()
        others = np.delete(counts_LN[t, :6], chosen_LK[t])
        assert np.abs(others - count * q).max() < 5 * np.sqrt(count * q * (1 - q))
    assert (np.sort(position_BP, axis=1) // every == np.arange(position_BP.shape[1])).all() or length % every
    for t in range(length):
        assert ((position_BP == t) & (expert_BP < 6)).sum(axis=1).max() <= 1


def test_what_makes_no_sense_is_refused():
    for fields, words in (
        ({"top_k": 8}, "moe.top_k = moe.num_experts = 8, but moe.router='default_sampled' needs experts"),
        ({"ema_weighted": False}, "moe.default_sampled.ema_weighted is False, but the default vectors of"),
        ({"expert_gradient": True}, "outputs that are not in the layer's: leave it False"),
        ({"sample_gradient": "unbiased", "ema_update": "before"}, "the same batch make it biased; use 'after'"),
        ({"top_k": 2, "normalize_weights": True}, "but moe.default_sampled.substitute is 'forward'"),
        ({"sample_every": 0}, "moe.default_sampled.sample_every is 0, but must be at least 1"),
        ({"sample_gradient": "exact"}, "moe.default_sampled.sample_gradient is 'exact', but must be one of"),
    ):
        with refused(words):
            make_config(router="default_sampled", **fields)


def test_without_a_key_nothing_is_drawn():
    config = make_config(router="default_sampled")
    assert config.method.route(RouterInputs(jnp.zeros((1, 2, 8))), config).samples is None
