"""The layout of assignments grouped by expert, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import assert_close

from default_moe.methods.routing import active_experts
from default_moe.moe.experts.layout import _stable_argsort, choice_values, dispatch, group_by_expert, sum_choices


@functools.cache
def layout_of(num_experts: int, align: int, multiple: int = 1):
    return jax.jit(lambda expert: group_by_expert(expert, num_experts, align, multiple))


def check_layout(expert_TK: np.ndarray, num_experts: int, align: int) -> None:
    """Each assignment held here lies in exactly one slot, within the group of its expert; other slots are empty."""
    layout = jax.tree.map(np.asarray, layout_of(num_experts, align)(jnp.asarray(expert_TK, jnp.int32)))
    num_slots = len(layout.assignment_S)
    assert num_slots % align == 0
    starts = np.concatenate([[0], np.cumsum(layout.group_sizes_M)])
    assert starts[-1] <= num_slots
    assignment_S = np.full(num_slots, expert_TK.size)  # which says that a slot is empty
    for assignment, ((t, k), expert) in enumerate(np.ndenumerate(expert_TK)):
        slot = layout.slot_TK[t, k]
        if 0 <= expert < num_experts:
            assert layout.expert_TK[t, k] == expert
            assert starts[expert] <= slot < starts[expert + 1]
            assert assignment_S[slot] == expert_TK.size  # nobody else's
            assignment_S[slot] = assignment
        else:
            assert (slot, layout.expert_TK[t, k]) == (num_slots, num_experts)
    np.testing.assert_array_equal(layout.assignment_S, assignment_S)
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
def test_layout_with_experts_held_elsewhere_or_everything_on_one(align):
    rng = np.random.default_rng(0)
    for _ in range(20):  # experts -4 to 7, of which 0 to 3 are held here
        check_layout(np.array([rng.choice(12, 3, replace=False) - 4 for _ in range(13)]), 4, align)
    for expert in (-1, 4):
        check_layout(np.full((13, 3), expert), 4, align)
    for expert in range(4):
        check_layout(np.full((13, 1), expert), 4, align)


@pytest.mark.parametrize("align", [1, 8])
def test_dispatch_and_its_gradient(align):
    """Slot s holds the token of its assignment or zeros; the gradient of a token is the sum over its slots."""
    rng = np.random.default_rng(1)
    expert_TK = np.array([rng.choice(5, 2, replace=False) for _ in range(9)])  # expert 4 is held elsewhere
    layout = group_by_expert(jnp.asarray(expert_TK), 4, align)
    x = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    x_SD = dispatch(x, layout)
    g = jnp.asarray(rng.normal(size=x_SD.shape), jnp.float32)
    grad = jax.grad(lambda x: (g * dispatch(x, layout)).sum())(x)
    expected, expected_grad = np.zeros(x_SD.shape), np.zeros(x.shape)
    for slot, assignment in enumerate(np.asarray(layout.assignment_S)):
        if assignment < 18:
            expected[slot] = x[assignment // 2]
            expected_grad[assignment // 2] += np.asarray(g, np.float64)[slot]
    np.testing.assert_array_equal(x_SD, expected)
    assert_close(grad, expected_grad, "gradient")


def test_sum_of_choices():
    """Token 0 chose experts 1 and 0, token 1 chose 1 and one held elsewhere: 2 E_1 + 3 E_0 and 5 E_1."""
    layout = group_by_expert(jnp.array([[1, 0], [1, 2]]), 2, 1)
    values = jnp.zeros((4, 1))
    for token, k, value in [(0, 1, 10.0), (0, 0, 100.0), (1, 0, 1000.0)]:
        values = values.at[layout.slot_TK[token, k]].set(value)
    weights = jnp.array([[2.0, 3.0], [5.0, 7.0]])
    np.testing.assert_array_equal(sum_choices(values, layout, weights), [[2 * 100 + 3 * 10], [5 * 1000]])
    np.testing.assert_array_equal(sum_choices(values, layout, None), [[110], [1000]])


def test_weights_of_choices_and_their_gradient():
    """Token 0 chose experts 2 and 0, token 1 chose 1 and one held elsewhere (of 3): that one weighs 0."""
    probs, expert = jnp.array([[0.5, 0.2, 0.3], [0.1, 0.7, 0.2]]), jnp.array([[2, 0], [1, 3]])
    weights, pull = jax.vjp(lambda p: choice_values(p, expert), probs)
    assert_close(weights, [[0.3, 0.5], [0.7, 0]])
    np.testing.assert_array_equal(pull(jnp.array([[1.0, 2.0], [3.0, 4.0]]))[0], [[2, 0, 1], [0, 3, 0]])
    np.testing.assert_array_equal(active_experts(expert, 3), [[True, False, True], [False, True, False]])


@pytest.mark.parametrize("num_values", [1, 5, 2**31 // 40])  # the last does not fit in one number with its place
def test_sorting_places_by_value_is_stable(num_values):
    """Of the largest values, 2^31 / 40 less 7 and more: times 41 they are above 2^31."""
    values = np.random.default_rng(0).integers(max(0, num_values - 7), num_values, size=41).astype(np.int32)
    order = _stable_argsort(jnp.asarray(values), num_values)
    np.testing.assert_array_equal(order, np.argsort(values, kind="stable"))


def test_the_number_of_slots_is_the_multiple_that_is_asked_for():
    """26 assignments and up to 7 rows of padding for each of 3 experts are 47: 48 by eights, 128 by 128."""
    expert_TK = jnp.zeros((13, 2), jnp.int32)
    assert [len(layout_of(3, 8, multiple)(expert_TK).assignment_S) for multiple in (1, 8, 128)] == [48, 48, 128]
    assert len(layout_of(3, 1)(expert_TK).assignment_S) == 26
