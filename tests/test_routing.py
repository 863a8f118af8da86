"""Balance statistics by hand, and the layout that groups assignments by expert."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

from default_moe import routing


def uniform(num_tokens: int, num_experts: int) -> jnp.ndarray:
    return jnp.full((1, num_tokens, num_experts), 1 / num_experts)


@pytest.mark.parametrize("top_k", [1, 2])
def test_perfect_balance_costs_one(top_k):
    """4 tokens over 4 experts, each chosen K times: f = P = 1/4, so 4 * 4 * 1/16 = 1, whatever K."""
    index = (jnp.arange(4)[:, None] + jnp.arange(top_k)) % 4
    counts = routing.tokens_per_expert(index[None], 4, None)
    np.testing.assert_array_equal(counts, [top_k] * 4)
    assert counts.dtype == jnp.int32
    assert_close(routing.load_balance_loss(uniform(4, 4), counts, None), 1)


def test_worst_balance_costs_the_number_of_experts():
    """All on expert 2 with certainty: f_2 = P_2 = 1, so 4 * 1 = 4."""
    probs = jnp.zeros((1, 5, 4)).at[..., 2].set(1)
    assert_close(routing.load_balance_loss(probs, jnp.array([0, 0, 5, 0]), None), 4)


PROBS = jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], [[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]])
INDEX = jnp.array([[[0], [1]], [[0], [2]]])


def test_balance_by_hand():
    """Counts 2, 1, 1 of 4; P = (1.5, 1.3, 1.2) / 4; 3 (2 * 1.5 + 1.3 + 1.2) / 16 = 16.5 / 16."""
    counts = routing.tokens_per_expert(INDEX, 3, None)
    np.testing.assert_array_equal(counts, [2, 1, 1])
    assert_close(routing.load_balance_loss(PROBS, counts, None), 16.5 / 16)


def test_masked_balance_by_hand():
    """Without the token [1, 0]: counts 1, 1, 1 of 3; P = (0.8, 1.1, 1.1) / 3; 3 * 3.0 / 9 = 1."""
    mask = jnp.array([[1, 1], [0, 1]])
    counts = routing.tokens_per_expert(INDEX, 3, mask)
    np.testing.assert_array_equal(counts, [1, 1, 1])
    assert_close(routing.load_balance_loss(PROBS, counts, mask), 1)


def test_masked_imbalance_by_hand():
    """Without [0, 1] and [1, 1]: counts 2, 0, 0 of 2; P_0 = 1.2 / 2; 3 * 0.6 = 1.8."""
    mask = jnp.array([[1, 0], [1, 0]])
    counts = routing.tokens_per_expert(INDEX, 3, mask)
    np.testing.assert_array_equal(counts, [2, 0, 0])
    assert_close(routing.load_balance_loss(PROBS, counts, mask), 1.8)


def test_the_shares_carry_no_gradient_and_the_probabilities_do():
    """d/dp_te of N sum f P is N f_e / T: 3 * (2, 1, 1) / 4 / 4."""
    grad = jax.grad(lambda p: routing.load_balance_loss(p, routing.tokens_per_expert(INDEX, 3, None), None))(PROBS)
    assert_close(grad, np.broadcast_to([6 / 16, 3 / 16, 3 / 16], PROBS.shape))


def test_z_loss_by_hand():
    """Two equal logits c have log-partition c + ln 2: here ln 2 and 1 + ln 2."""
    logits = jnp.array([[[0.0, 0.0], [1.0, 1.0]]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert_close(routing.router_z_loss(logits, None), expected)
    assert_close(routing.router_z_loss(logits, jnp.array([[0, 1]])), (1 + math.log(2)) ** 2)


def test_entropy_by_hand():
    """Undecided among 4: ln 4. Certain: 0."""
    assert_close(routing.router_entropy(jnp.full((1, 3, 4), 0.25), None), math.log(4))
    assert float(routing.router_entropy(jnp.array([[[1.0, 0.0]]]), None)) == 0
    probs = jnp.array([[[0.75, 0.25], [0.5, 0.5]]])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert_close(routing.router_entropy(probs, jnp.array([[1, 0]])), expected)
    assert_close(routing.router_entropy(probs, None), (expected + math.log(2)) / 2)


def test_nothing_kept_gives_zero_not_nan():
    mask = jnp.zeros((2, 2))
    counts = routing.tokens_per_expert(INDEX, 3, mask)
    assert float(routing.load_balance_loss(PROBS, counts, mask)) == 0
    assert float(routing.router_z_loss(PROBS, mask)) == 0


@functools.cache
def layout_of(num_experts: int, align: int, multiple: int = 1):
    return jax.jit(lambda expert: routing.group_by_expert(expert, num_experts, align, multiple))


def check_layout(expert_TK: np.ndarray, num_experts: int, align: int) -> None:
    """Each assignment held here lies in exactly one slot, within the group of its expert; other slots are empty."""
    layout = jax.tree.map(np.asarray, layout_of(num_experts, align)(jnp.asarray(expert_TK, jnp.int32)))
    num_choices = expert_TK.shape[1]
    num_slots = len(layout.assignment_S)
    assert num_slots % align == 0
    starts = np.concatenate([[0], np.cumsum(layout.group_sizes_M)])
    assert starts[-1] <= num_slots
    slots_used = set()
    for t in range(len(expert_TK)):
        for k in range(num_choices):
            expert, slot = expert_TK[t, k], layout.slot_TK[t, k]
            if not 0 <= expert < num_experts:
                assert slot == num_slots
                assert layout.expert_TK[t, k] == num_experts
                continue
            assert layout.expert_TK[t, k] == expert
            assert starts[expert] <= slot < starts[expert + 1]
            assert layout.assignment_S[slot] == t * num_choices + k
            slots_used.add(int(slot))
    held = int(((expert_TK >= 0) & (expert_TK < num_experts)).sum())
    assert len(slots_used) == held
    for slot in range(num_slots):
        if slot not in slots_used:
            assert layout.assignment_S[slot] == expert_TK.size
    for e in range(num_experts):
        count, size = int((expert_TK == e).sum()), int(layout.group_sizes_M[e])
        assert size % align == 0
        assert count <= size < count + align  # no more padding than alignment asks for


@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("num_experts,top_k", [(1, 1), (3, 1), (4, 2), (8, 5)])
def test_layout_of_random_assignments(num_experts, top_k, align):
    rng = np.random.default_rng(num_experts)
    for _ in range(20):
        favour = rng.dirichlet(np.full(num_experts, 0.3)) + 1e-6  # from even to nearly all on one
        rows = [rng.choice(num_experts, top_k, replace=False, p=favour / favour.sum()) for _ in range(13)]
        check_layout(np.array(rows), num_experts, align)


@pytest.mark.parametrize("align", [1, 8])
def test_layout_with_experts_held_elsewhere(align):
    rng = np.random.default_rng(0)
    for _ in range(20):  # experts -4 to 7, of which 0 to 3 are held here
        check_layout(np.array([rng.choice(12, 3, replace=False) - 4 for _ in range(13)]), 4, align)
    check_layout(np.full((13, 3), -1), 4, align)
    check_layout(np.full((13, 3), 4), 4, align)


@pytest.mark.parametrize("align", [1, 8])
def test_layout_with_everything_on_one_expert(align):
    for expert in range(4):
        check_layout(np.full((13, 1), expert), 4, align)


@pytest.mark.parametrize("align", [1, 8])
def test_dispatch_and_its_gradient(align):
    """Slot s holds the token of its assignment or zeros; the gradient of a token is the sum over its slots."""
    rng = np.random.default_rng(1)
    expert_TK = np.array([rng.choice(5, 2, replace=False) for _ in range(9)])  # expert 4 is held elsewhere
    layout = routing.group_by_expert(jnp.asarray(expert_TK), 4, align)
    x = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    x_SD = routing.dispatch(x, layout)
    g = jnp.asarray(rng.normal(size=x_SD.shape), jnp.float32)
    grad = jax.grad(lambda x: (g * routing.dispatch(x, layout)).sum())(x)
    expected, expected_grad = np.zeros(x_SD.shape), np.zeros(x.shape)
    for slot, assignment in enumerate(np.asarray(layout.assignment_S)):
        if assignment < 18:
            expected[slot] = x[assignment // 2]
            expected_grad[assignment // 2] += np.asarray(g, np.float64)[slot]
    np.testing.assert_array_equal(x_SD, expected)
    assert_close(grad, expected_grad, "gradient")


def test_sum_of_choices():
    """Token 0 chose experts 1 and 0, token 1 chose 1 and one held elsewhere: 2 E_1 + 3 E_0 and 5 E_1."""
    layout = routing.group_by_expert(jnp.array([[1, 0], [1, 2]]), 2, 1)
    values = jnp.zeros((4, 1))
    for token, k, value in [(0, 1, 10.0), (0, 0, 100.0), (1, 0, 1000.0)]:
        values = values.at[layout.slot_TK[token, k]].set(value)
    weights = jnp.array([[2.0, 3.0], [5.0, 7.0]])
    np.testing.assert_array_equal(routing.sum_choices(values, layout, weights), [[2 * 100 + 3 * 10], [5 * 1000]])
    np.testing.assert_array_equal(routing.sum_choices(values, layout, None), [[110], [1000]])


def test_weights_of_choices_and_their_gradient():
    """Token 0 chose experts 2 and 0, token 1 chose 1 and one held elsewhere (of 3): that one weighs 0."""
    probs, expert = jnp.array([[0.5, 0.2, 0.3], [0.1, 0.7, 0.2]]), jnp.array([[2, 0], [1, 3]])
    weights, pull = jax.vjp(lambda p: routing.choice_weights(p, expert), probs)
    assert_close(weights, [[0.3, 0.5], [0.7, 0]])
    np.testing.assert_array_equal(pull(jnp.array([[1.0, 2.0], [3.0, 4.0]]))[0], [[2, 0, 1], [0, 3, 0]])
    np.testing.assert_array_equal(routing.active_experts(expert, 3), [[True, False, True], [False, True, False]])


@pytest.mark.parametrize("num_values", [1, 5, 2**31 // 40])  # the last does not fit in one number with its place
def test_sorting_places_by_value_is_stable(num_values):
    values = np.random.default_rng(0).integers(min(num_values, 7), size=41).astype(np.int32)
    order = routing._stable_argsort(jnp.asarray(values), num_values)
    np.testing.assert_array_equal(order, np.argsort(values, kind="stable"))


def test_the_number_of_slots_is_the_multiple_that_is_asked_for():
    """26 assignments and up to 7 rows of padding for each of 3 experts are 47: 48 by eights, 128 by 128."""
    expert_TK = jnp.zeros((13, 2), jnp.int32)
    assert [len(layout_of(3, 8, multiple)(expert_TK).assignment_S) for multiple in (1, 8, 128)] == [48, 48, 128]
    assert len(layout_of(3, 1)(expert_TK).assignment_S) == 26
