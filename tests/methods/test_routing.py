"""Balance statistics by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import assert_close

from default_moe.methods import routing


@pytest.mark.parametrize("top_k", [1, 2])
def test_perfect_balance_costs_one(top_k):
    """4 tokens over 4 experts, each chosen K times: f = P = 1/4, so 4 * 4 * 1/16 = 1, whatever K."""
    index = (jnp.arange(4)[:, None] + jnp.arange(top_k)) % 4
    counts = routing.tokens_per_expert(index[None], 4, None)
    np.testing.assert_array_equal(counts, [top_k] * 4)
    assert counts.dtype == jnp.int32
    assert_close(routing.load_balance_loss(jnp.full(4, 1 / 4), counts), 1)


def test_worst_balance_costs_the_number_of_experts():
    """All on expert 2 with certainty: f_2 = P_2 = 1, so 4 * 1 = 4."""
    assert_close(routing.load_balance_loss(jnp.array([0, 0, 1, 0]), jnp.array([0, 0, 5, 0])), 4)


PROBS = jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], [[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]])
INDEX = jnp.array([[[0], [1]], [[0], [2]]])


@pytest.mark.parametrize(
    ("mask", "counts", "loss"),
    [
        (None, [2, 1, 1], 16.5 / 16),  # P = (1.5, 1.3, 1.2) / 4; 3 (2 * 1.5 + 1.3 + 1.2) / 16
        ([[1, 1], [0, 1]], [1, 1, 1], 1),  # P = (0.8, 1.1, 1.1) / 3; 3 * 3.0 / 9
        ([[1, 0], [1, 0]], [2, 0, 0], 1.8),  # P_0 = 1.2 / 2; 3 * 0.6
        ([[0, 0], [0, 0]], [0, 0, 0], 0),  # and not NaN
    ],
)
def test_balance_by_hand(mask, counts, loss):
    mask = None if mask is None else jnp.array(mask)
    found = routing.tokens_per_expert(INDEX, 3, mask)
    np.testing.assert_array_equal(found, counts)
    assert_close(routing.load_balance_loss(routing.masked_mean(PROBS, mask), found), loss)


def test_the_shares_carry_no_gradient_and_the_probabilities_do():
    """d/dp_te of N sum f P is N f_e / T: 3 * (2, 1, 1) / 4 / 4."""
    counts = routing.tokens_per_expert(INDEX, 3, None)
    grad = jax.grad(lambda p: routing.load_balance_loss(routing.masked_mean(p, None), counts))(PROBS)
    assert_close(grad, np.broadcast_to([6 / 16, 3 / 16, 3 / 16], PROBS.shape))


def test_z_loss_by_hand():
    """Two equal logits c have log-partition c + ln 2: here ln 2 and 1 + ln 2."""
    logits = jnp.array([[[0.0, 0.0], [1.0, 1.0]]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert_close(routing.router_z_loss(logits, None), expected)
    assert_close(routing.router_z_loss(logits, jnp.array([[0, 1]])), (1 + math.log(2)) ** 2)
    assert float(routing.router_z_loss(logits, jnp.zeros((1, 2)))) == 0


def test_entropy_by_hand():
    """Undecided among 4: ln 4. Certain: 0."""
    assert_close(routing.router_entropy(jnp.full((1, 3, 4), 0.25), None), math.log(4))
    assert float(routing.router_entropy(jnp.array([[[1.0, 0.0]]]), None)) == 0
    probs = jnp.array([[[0.75, 0.25], [0.5, 0.5]]])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert_close(routing.router_entropy(probs, jnp.array([[1, 0]])), expected)
    assert_close(routing.router_entropy(probs, None), (expected + math.log(2)) / 2)
