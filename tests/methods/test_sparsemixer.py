"""SparseMixer's draws and its estimate of their gradient, against loops in float64 and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers, reference
from helpers.layers import batched, check_step, inputs, make_config, moe_config, run, settings_of
from helpers.reference import assert_close

from default_moe.methods import RouterInputs, sparsemixer
from default_moe.methods.sparsemixer import Draws

pytestmark = pytest.mark.usefixtures("tokamax_everywhere")


@pytest.mark.parametrize("top_k,matmul", [(1, "blocks"), (2, "ragged")])
def test_sparsemixer_equals_the_loops_with_the_same_draws(monkeypatch, top_k, matmul):
    """A threshold that leaves a few experts to draw from; the whole weight and a third of it both occur."""
    rng = np.random.default_rng(7)
    draws = [
        (
            np.float64(np.float32(rng.exponential(size=(layers.TOKENS, 8)))),
            np.float64(np.float32(rng.uniform(size=layers.TOKENS))),
        )
        for _ in range(top_k)
    ]
    given = iter([Draws(batched(exponential), batched(uniform)) for exponential, uniform in draws])
    monkeypatch.setattr(sparsemixer, "draw", lambda key, shape: next(given))
    x, params, ema, g = inputs(33)
    config = make_config(8, top_k, router="sparsemixer", mask_threshold=0.45, matmul=matmul)
    expected, _, _ = check_step(config, x, params, ema, g, draws=draws)
    plain = reference.route(x, params.kernel, settings_of(config))
    assert sum(a != b for a, b in zip(expected.routes.chosen, plain.chosen, strict=True)) > 3
    factors = [factor for token in expected.routes.tokens for factor in token.factors]
    assert {round(3 * factor) for factor in factors} == {1, 3}


def test_sparsemixer_draws_with_the_probabilities_it_should():
    """Logits 2, 1.9, 1.7, -9 and threshold 0.1: (2 - 1.7) / 2 = 0.15 < 0.2, so three experts may be drawn.

    Of 20,000 draws the shares are within five standard deviations, at most 5 * 0.5 / sqrt(20000) = 0.018. An unlikely
    expert has its whole weight in a quarter of its draws.
    """
    logits = jnp.broadcast_to(jnp.array([2.0, 1.9, 1.7, -9.0]), (100, 200, 4))
    draws = sparsemixer.draw(jax.random.key(3), logits.shape)
    expert, weight = (np.asarray(a).ravel() for a in sparsemixer.choose(logits, logits, 0.1, draws))
    p = np.exp([2, 1.9, 1.7]) / np.exp([2, 1.9, 1.7]).sum()
    shares = np.bincount(expert, minlength=4) / expert.size
    np.testing.assert_allclose(shares, [*p, 0], atol=0.018)
    np.testing.assert_allclose(weight[expert == 0], p[0], rtol=1e-5)
    whole = weight[expert == 1] > 0.5 * p[1]
    np.testing.assert_allclose(weight[expert == 1], np.where(whole, p[1], p[1] / 3), rtol=1e-5)
    assert abs(whole.mean() - 0.25) < 5 * (0.25 * 0.75 / whole.size) ** 0.5


def test_sparsemixers_draws_are_independent_and_never_of_what_is_masked(monkeypatch):
    """The second draw has another key. An exponential number of exactly 0 makes no -inf the largest."""
    keys, drawn = [], sparsemixer.draw
    monkeypatch.setattr(sparsemixer, "draw", lambda key, shape: keys.append(key) or drawn(key, shape))
    config = moe_config(num_experts=4, top_k=2, router="sparsemixer")
    config.method.route(RouterInputs(jnp.zeros((1, 3, 4)), key=jax.random.key(0)), config)
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 2
    logits = jnp.array([[[2.0, 1.9, -9.0, 1.8]]])
    left = logits.at[0, 0, 0].set(-jnp.inf)  # chosen before
    draws = Draws(jnp.array([[[0.0, 1.0, 0.0, 1.0]]]), jnp.zeros((1, 1)))
    assert int(sparsemixer.choose(logits, left, 0.1, draws)[0][0, 0]) == 1


@pytest.mark.parametrize(
    ("logits", "near"),
    [
        # (m - s) / max(|s|, m) is 0.35 / 2 = 0.175 and 0.45 / 2 = 0.225 (by |s| alone 0.21, 0.29); eps is 0.1.
        ([2.0, 1.65, 1.55, 0.01], [0, 1]),
        # Of negative logits it is by |s|: 0.45 / 2.45 = 0.184 and 0.55 / 2.55 = 0.216 (by |m| 0.225, by m below 0).
        ([-2.0, -2.45, -2.55, -9.0], [0, 1]),
        # m = 0: by |s| it is 1 for any other expert.
        ([0.0, -0.01, -0.5, -3.0], [0]),
    ],
)
def test_which_experts_sparsemixer_may_draw_by_hand(logits, near):
    logits = jnp.array([[logits]])
    _, gate = sparsemixer.choose(logits, logits, 0.1, None)
    chances = np.exp(np.float64(logits[0, 0, jnp.array(near)]))
    assert_close(gate, [[chances[0] / chances.sum()]])


def test_sparsemixer_takes_the_largest_logits_at_evaluation():
    config = make_config(router="sparsemixer", mask_threshold=0.45)
    x, params, ema, g = inputs(34)
    expected = reference.forward(x, params, ema, settings_of(config), update=False)
    _, (y, aux, _) = run(config, x, params, ema, g, train=False)
    layers.check_aux(config, aux, expected)
    assert_close(y, batched(expected.y), "y")
