"""Experts run for tokens that did not choose them: `default_sampled` against loops, and its gradient over all draws."""

import collections
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers, reference, reference_routing, sharded_layers
from helpers.emulation import emulate_exchange
from helpers.layers import check_results, check_step, inputs, make_config, settings_of
from helpers.reference import assert_close
from helpers.refusals import refused

from default_moe.methods import RouterInputs, default_sampled
from default_moe.methods.decision import Samples
from default_moe.moe.experts.parallel import gather_bytes
from default_moe.plan.collectives import collectives, summary
from default_moe.plan.hlo import Hlo
from default_moe.sharding import AXES, make_mesh

pytestmark = pytest.mark.usefixtures("tokamax_everywhere")

EVERY = 3
drawn = default_sampled.draw


def shares_of(length, num_experts=8):
    """Chances of experts that tests know, up to a factor: [1, L, N]."""
    return 1.0 + (np.arange(length)[:, None] * 3 + np.arange(num_experts) * 5) % 7


@pytest.fixture
def same_draws(monkeypatch):
    """The layer draws with a key, and where scores count with chances, that tests know."""

    def draw(key, index_BLK, every, config, log_shares=None):
        if log_shares is not None:
            log_shares = jnp.broadcast_to(jnp.log(shares_of(index_BLK.shape[1])), log_shares.shape)
        return drawn(jax.random.key(3), index_BLK, every, config, log_shares)

    monkeypatch.setattr(default_sampled, "draw", draw)


def settings_with_samples(config, x, params, length):
    """What `same_draws` has the layer draw, its factors by hand."""
    s = settings_of(config, length)
    chosen = reference.route(x, params.kernel, s).chosen
    by_score = config.method.sample_by == "score"
    shares = shares_of(length) if by_score else np.ones((length, config.num_experts))
    index_BLK = jnp.array(chosen).reshape(-1, length, config.top_k)
    log_shares = jnp.zeros((len(index_BLK), *shares.shape)) if by_score else None  # in their place come known ones
    position_BP, expert_BP, _ = map(np.asarray, default_sampled.draw(None, index_BLK, EVERY, config, log_shares))
    samples, factors = [], []
    times = {"plain": 0, "expert": 1, "unbiased": EVERY}[config.method.sample_gradient]
    for b, p in np.ndindex(position_BP.shape):
        place, i = position_BP[b, p], int(expert_BP[b, p])
        if i < config.num_experts:
            t = b * length + place
            samples.append((t, i))
            factors.append(times * np.delete(shares[place], chosen[t]).sum() / shares[place, i] if times else 1.0)
    assert len(samples) > len(chosen) / EVERY / 2
    return s._replace(samples=tuple(samples), sample_factors=tuple(factors))


CASES = [
    {"matmul": "blocks"},
    {"matmul": "ragged", "sample_gradient": "unbiased"},
    {"matmul": "tokamax", "ema_update": "before"},
    {"matmul": "blocks", "substitute": "backward", "ema_update": "before"},
    {"matmul": "blocks", "product_form": True, "substitute_ramp_steps": 8},
    {"matmul": "ragged", "score_function": "sigmoid", "top_k": 1},
    {"matmul": "blocks", "sample_by": "score", "sample_gradient": "expert"},
    {"matmul": "ragged", "sample_by": "score", "sample_gradient": "unbiased", "substitute": "backward", "top_k": 1}
    | {"normalize_weights": True, "straight_through": True},
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
        ((2, 2, 2), {"matmul": "blocks", "sample_by": "score", "sample_gradient": "expert"}, True),
        ((2, 2, 2), {"matmul": "blocks", "expert_parallel": "exchange", "ema_update": "before"}, True),
        ((1, 1, 8), {"matmul": "ragged", "expert_parallel": "exchange"}, False),
        (
            (2, 1, 4),
            {"matmul": "blocks", "expert_parallel": "exchange", "sample_by": "score", "sample_gradient": "expert"},
            True,
        ),
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


class Draws(NamedTuple):
    """Router gradients [D, N] of two tokens by what was drawn: (token, expert), of 4 experts, K = 1.

    chance: of each draw, one of the two tokens being drawn.  without: nothing drawn.  exact: all outputs known.
    """

    found: dict[tuple[int, int], np.ndarray]
    chance: dict[tuple[int, int], float]
    without: np.ndarray
    exact: np.ndarray
    inputs: tuple

    def mean(self) -> np.ndarray:
        return sum(self.chance[draw] * gradient for draw, gradient in self.found.items())


@functools.cache
def gradients_over_all_draws(**fields) -> Draws:
    config = make_config(4, 1, router="default_sampled", sample_every=2, matmul="blocks", **fields)
    x, params, ema, g = reference.make_inputs(33, 2, 4)
    variables = layers.variables_of(config, params, ema)
    of_tokens = [jnp.asarray(a, jnp.float32)[None] for a in (x, g)]
    found, chance = {}, {}
    with pytest.MonkeyPatch.context() as patched:

        def gradient(t: int, i: int, factor: float) -> np.ndarray:
            draw = Samples(jnp.array([[t]]), jnp.array([[i]]), jnp.array([[factor]], jnp.float32))
            patched.setattr(default_sampled, "draw", lambda *_: draw)
            (d, _), _ = jax.jit(layers.gradient_of_step(config))(variables, *of_tokens, None)
            return np.float64(d["params"]["router"]["kernel"])

        for t in range(2):
            p = reference.softmax(x[t] @ params.kernel)
            others = [i for i in range(4) if i != p.argmax()]
            share = p if config.method.sample_by == "score" else np.ones(4)
            for i in others:
                chance[t, i] = share[i] / share[others].sum() / 2
                found[t, i] = gradient(t, i, 0.5 / chance[t, i])
        without = gradient(0, 4, 1.0)
    s = settings_of(config)._replace(router="densemixer")
    result = reference.forward(x, params, ema, s)
    exact = reference.gradients(x, params, result, s, g, layers.BALANCE_WEIGHT, layers.Z_WEIGHT).kernel
    return Draws(found, chance, without, exact, (x, params, ema, g))


@pytest.mark.parametrize("by", ["uniform", "score"])
def test_the_mean_over_all_draws_is_the_exact_gradient(by):
    """And the variance is what the control variate leaves: that of <g, E_i - V_i> where V_i stands for E_i."""
    draws = gradients_over_all_draws(sample_gradient="unbiased", sample_by=by)
    x, params, ema, g = draws.inputs
    assert_close(draws.mean(), draws.exact, "mean")
    by_hand = {}
    for t, i in draws.found:
        p = reference.softmax(x[t] @ params.kernel)
        # 1 / q; of the gate's gradient each logit gets p_i ([i = j] - p_j).
        d_gate = g[t] @ (reference.expert(params, i, x[t]) - ema[i]) / draws.chance[t, i]
        by_hand[t, i] = np.outer(x[t], d_gate * p[i] * ((np.arange(4) == i) - p))
    mean = sum(draws.chance[draw] * gradient for draw, gradient in by_hand.items())
    expected = sum(draws.chance[draw] * (gradient - mean) ** 2 for draw, gradient in by_hand.items())
    got = sum(draws.chance[draw] * (gradient - draws.mean()) ** 2 for draw, gradient in draws.found.items())
    assert_close(got, expected, "variance")


@pytest.mark.parametrize("by", ["uniform", "score"])
def test_the_mean_over_experts_is_exact_for_tokens_that_run_one_more(by):
    """Each of the two tokens runs one more in half of the draws: half of what vectors lack of the exact gradient."""
    draws = gradients_over_all_draws(sample_gradient="expert", sample_by=by)
    assert_close(2 * draws.mean() - draws.without, draws.exact, "mean")


def test_outputs_in_the_place_of_vectors_are_biased():
    for fields in ({"sample_gradient": "plain"}, {"sample_gradient": "plain", "ema_update": "before"}):
        draws = gradients_over_all_draws(**fields)
        assert np.abs(draws.mean() - draws.exact).max() > 1e-3 * np.abs(draws.exact).max()  # 100 times the tolerance


@pytest.mark.parametrize(("every", "length"), [(1, 6), (4, 10), (8, 5)])
def test_draws_are_even(every, length):
    """Of 4,000 sequences: each expert that a token did not choose is drawn with chance q, within 5 deviations."""
    config, count = make_config(6, 2), 4000
    chosen_LK = np.array([[t % 6, (t + 2) % 6] for t in range(length)])
    index_BLK = jnp.broadcast_to(jnp.array(chosen_LK), (count, length, 2))
    position_BP, expert_BP, factor_BP = map(np.asarray, drawn(jax.random.key(0), index_BLK, every, config))
    assert (factor_BP == 4).all()
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


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_draws_by_score(score_function):
    """Of 8,000 tokens: each expert that was not chosen is drawn in proportion to its score, within 5 deviations."""
    config = make_config(6, 2, router="default_sampled", sample_every=1, sample_by="score", sample_gradient="expert")
    config = dataclasses.replace(config, score_function=score_function)
    logits = np.array([0.5, 2.0, -1.0, 3.0, 1.0, -200.0])
    inputs = RouterInputs(jnp.broadcast_to(jnp.float32(logits), (4, 2000, 6)), train=True, key=jax.random.key(1))
    _, expert_BP, factor_BP = map(np.asarray, config.method.route(inputs, config).samples)
    others = [0, 2, 4]
    scores, _ = reference_routing.score(logits, score_function)
    chances = scores[others] / scores[others].sum()
    for i, chance in zip(others, chances, strict=True):
        drawn_here = expert_BP == i
        assert abs(drawn_here.sum() - 8000 * chance) < 5 * np.sqrt(8000 * chance * (1 - chance))
        np.testing.assert_allclose(factor_BP[drawn_here], 1 / chance, rtol=1e-5)
    assert np.isin(expert_BP, others).all()


def test_what_makes_no_sense_is_refused():
    for fields, words in (
        ({"top_k": 8}, "moe.top_k = moe.num_experts = 8, but moe.router='default_sampled' needs experts"),
        ({"ema_weighted": False}, "moe.default_sampled.ema_weighted is False, but the default vectors of"),
        ({"expert_gradient": True}, "outputs that are not in the layer's: leave it False"),
        ({"sample_gradient": "unbiased", "ema_update": "before"}, "the same batch make it biased; use 'after'"),
        ({"top_k": 2, "normalize_weights": True}, "but moe.default_sampled.substitute is 'forward'"),
        ({"sample_every": 0}, "moe.default_sampled.sample_every is 0, but must be at least 1"),
        ({"sample_gradient": "expert", "ema_update": "before"}, "sample_gradient is 'expert', but .* use 'after'"),
        ({"sample_by": "luck"}, "moe.default_sampled.sample_by is 'luck', but must be one of"),
        ({"sample_gradient": "exact"}, "moe.default_sampled.sample_gradient is 'exact', but must be one of"),
    ):
        with refused(words):
            make_config(router="default_sampled", **fields)


def test_without_a_key_nothing_is_drawn():
    config = make_config(router="default_sampled")
    assert config.method.route(RouterInputs(jnp.zeros((1, 2, 8))), config).samples is None
