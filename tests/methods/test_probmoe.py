"""ProbMoE's draws of K experts, their means and the gradient of these, against all sets of K in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers
from helpers.layers import batched, check_step, inputs, make_config, run
from helpers.reference import assert_close
from helpers.reference_routing import subsets

from default_moe.methods import probmoe

pytestmark = pytest.mark.usefixtures("tokamax_everywhere")


@pytest.mark.parametrize("top_k,matmul", [(1, "blocks"), (3, "ragged")])
def test_probmoe_equals_the_loops_with_the_same_draws(monkeypatch, top_k, matmul):
    uniform = np.float64(np.float32(np.random.default_rng(7).uniform(size=(layers.TOKENS, 8))))
    monkeypatch.setattr(probmoe, "draw", lambda key, shape: batched(uniform))
    config = make_config(8, top_k, router="probmoe", matmul=matmul)
    expected, _, _ = check_step(config, *inputs(34), draws=[(uniform,)])
    likeliest = np.sort(np.argsort(-expected.routes.logits, axis=1)[:, :top_k], axis=1)
    assert (likeliest != expected.routes.chosen).any(axis=1).sum() > 3


def some_logits(num_experts: int) -> np.ndarray:
    """Of a few tokens: ordinary ones, far apart ones, equal ones, two equal groups far apart."""
    rng = np.random.default_rng(num_experts)
    far = 100 * np.sign(rng.normal(size=num_experts))
    rows = [*rng.normal(size=(3, num_experts)), *rng.uniform(-100, 100, (3, num_experts)), far, 0 * far, 0 * far - 100]
    return np.float64(np.float32(rows))


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 1), (7, 6), (9, 9), (10, 1), (10, 4)])
def test_means_and_their_slopes_are_those_of_all_sets(num_experts, top_k):
    """Slopes by differences too. Equal logits are a trap: the second derivative of logaddexp goes wrong there.

    Sums of logits as far apart as 200 K are rounded at up to 2e-4 of their logarithms.
    """
    logits = some_logits(num_experts)
    direction = np.float64(np.float32(np.random.default_rng(1).normal(size=logits.shape)))
    means, slopes = jax.jit(
        lambda s, d: jax.jvp(functools.partial(probmoe.means, top_k=top_k), (s[None],), (d[None],))
    )(jnp.float32(logits), jnp.float32(direction))
    for row, mean, slope, along in zip(logits, means[0], slopes[0], direction, strict=True):
        z, p = subsets(row, top_k)
        covariances = (z.T * p) @ z - np.outer(p @ z, p @ z)
        (z_up, p_up), (z_down, p_down) = (subsets(row + h * along, top_k) for h in (1e-5, -1e-5))
        np.testing.assert_allclose((p_up @ z_up - p_down @ z_down) / 2e-5, covariances @ along, atol=1e-8)
        tolerance = 1e-6 if np.ptp(row) < 10 else 1e-4
        np.testing.assert_allclose(mean, p @ z, atol=tolerance)
        np.testing.assert_allclose(slope, covariances @ along, atol=tolerance)


def test_sets_are_drawn_as_often_as_they_should_be():
    """All 20 sets of 3 of 6, within five standard deviations. Exactly K experts run wherever the logits are."""
    logits, num_draws = np.array([1.5, -1.0, 0.0, 0.5, -0.5, 2.0]), 40_000
    sample = jax.jit(probmoe.sample, static_argnums=1)
    shape = (200, num_draws // 200, 6)
    drawn = sample(jnp.broadcast_to(jnp.float32(logits), shape), 3, probmoe.draw(jax.random.key(1), shape))
    z, p = subsets(logits, 3)
    powers = 2 ** np.arange(6)
    shares = np.bincount(np.int64(np.asarray(drawn) @ powers).ravel(), minlength=64) / num_draws
    assert shares[np.int64(z @ powers)].sum() == 1
    assert (np.abs(shares[np.int64(z @ powers)] - p) < 5 * (p * (1 - p) / num_draws) ** 0.5).all()
    far = jnp.broadcast_to(jnp.float32(some_logits(6)), (400, 9, 6))
    for top_k in (1, 3, 6):
        np.testing.assert_array_equal(sample(far, top_k, probmoe.draw(jax.random.key(2), far.shape)).sum(-1), top_k)


def test_probmoe_is_topk_at_evaluation():
    results = [run(make_config(router=router), *inputs(34), train=False) for router in ("probmoe", "topk")]
    (grads, (y, aux, _)), (expected_grads, (expected_y, expected_aux, _)) = results
    assert_close(y, expected_y)
    np.testing.assert_array_equal(aux["expert_index"], expected_aux["expert_index"])
    jax.tree.map(assert_close, grads[1], expected_grads[1])
