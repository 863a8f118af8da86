"""Figures of routing, by hand and against loops."""

import numpy as np
import pytest

from default_moe.analysis import default_vectors, statistics
from default_moe.analysis.tokens import most_telling


def chosen_of(index, num_experts) -> np.ndarray:
    """bool [T, N] of lists of experts."""
    return np.array([[expert in token for expert in range(num_experts)] for token in index])


def test_load_and_entropy():
    """Counts 3, 1 of mean 2, then nothing at all. Two equal probabilities of 0.2 are ln 2; a certain router has 0."""
    chosen = np.array([[[1, 0], [1, 0], [1, 1]], [[0, 0], [0, 0], [0, 0]]], bool)
    np.testing.assert_allclose(statistics.load(chosen), [[1.5, 0.5], [0, 0]])
    np.testing.assert_allclose(statistics.entropy(np.array([[0.2, 0.2, 0], [1, 0, 0]])), [np.log(2), 0], atol=1e-12)


def test_coactivation_counts_pairs():
    """Expert 0 is chosen by 3 tokens: twice with 1, once with 2."""
    chosen = chosen_of([[0, 1], [0, 1], [0, 2], [1, 2]], 4)
    found = statistics.coactivation(chosen)
    np.testing.assert_allclose(found[0], [np.nan, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(found[2], [0.5, 0.5, np.nan, 0])
    assert np.isnan(found[3]).all()  # nobody chooses it


def test_independent_choices_are_what_load_alone_gives():
    rng = np.random.default_rng(0)
    # The second expert is drawn by load among the others: what `expected_coactivation` is of.
    load = np.array([0.4, 0.3, 0.2, 0.1])
    index = []
    for first in rng.choice(4, 20_000, p=load):
        others = np.delete(np.arange(4), first)
        index.append([first, rng.choice(others, p=load[others] / load[others].sum())])
    chosen = chosen_of(index, 4)
    together, expected = statistics.coactivation(chosen), statistics.expected_coactivation(chosen)
    np.testing.assert_allclose(expected, together, atol=0.1)
    np.testing.assert_allclose(np.nansum(expected, axis=1), 1)  # one more expert each
    twins = chosen_of([[0, 1], [2, 3]] * 50, 4)
    assert statistics.coactivation(twins)[0, 1] == 1 and statistics.expected_coactivation(twins)[0, 1] == pytest.approx(
        1 / 3
    )


def test_transitions_leave_out_tokens_without_an_expert():
    """Of the tokens of expert 0 below, two go to 1 and one to 0; the one without an expert counts nowhere."""
    found = statistics.transitions(np.array([0, 0, 0, 0, 1]), np.array([1, 1, 0, 2, 2]), 2)
    np.testing.assert_allclose(found[0], [1 / 3, 2 / 3])
    assert np.isnan(found[1]).all()


def test_mutual_information_by_hand():
    """A fair coin and its copy share a bit, two coins none; 3/8, 1/8 in each row: 1 - H(1/4) bits."""
    assert statistics.mutual_information(np.array([[5, 0], [0, 5]])) == pytest.approx(1)
    assert statistics.mutual_information(np.array([[5, 5], [5, 5]])) == pytest.approx(0)
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert statistics.mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(1 - quarter)


def test_what_a_label_explains():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 8, 4000)
    share, by_chance = statistics.explained(label, label % 4, 4)
    assert share == pytest.approx(1) and by_chance < 0.01
    share, by_chance = statistics.explained(np.arange(4000), label % 4, 4)  # every token another label
    assert share == pytest.approx(1) and by_chance == pytest.approx(1)
    assert statistics.explained(label, np.zeros(4000, int), 4) == (0, 0)


def test_agreement_is_the_share_of_the_final_choices():
    before = np.array([chosen_of([[0, 1], [2, 3], [0]], 4)])
    final = np.array([chosen_of([[0, 2], [2, 3], [1]], 4)])
    np.testing.assert_allclose(statistics.agreement(before, final), [3 / 5])


def test_domains_against_shuffled_rows():
    """Each domain has an expert of its own: a bit. Without domains nothing lies above the shuffled ones."""
    labels = np.repeat([0, 1], 20)
    apart = np.where(labels[:, None] == [0, 1], 10, 0)
    bits, shuffled = statistics.domain_information(labels, apart, 2)
    assert bits == pytest.approx(1) and shuffled.max() < 0.5 and len(shuffled) == 200
    # Rows differ, domains do not: labels shuffled among tokens would find this significant, among rows it is not.
    rng = np.random.default_rng(0)
    of_row = rng.integers(0, 2, 40)
    clustered = np.where(of_row[:, None] == [0, 1], 100, 0)
    bits, shuffled = statistics.domain_information(rng.permutation(labels), clustered, 2)
    assert bits < np.quantile(shuffled, 0.975)


def test_cosines_and_evenly():
    np.testing.assert_allclose(
        statistics.cosines(np.array([[3.0, 4.0], [4.0, 3.0], [0, 0]])),
        [[1, 0.96, np.nan], [0.96, 1, np.nan], [np.nan] * 3],
    )
    assert statistics.evenly([1, 2, 3], 8) == [1, 2, 3] and statistics.evenly(range(101), 5) == [0, 25, 50, 75, 100]


def test_telling_tokens_are_those_taken_more_often_than_by_load():
    """Token 7 always goes to expert 1, token 3 mostly; token 5 to each as the load has it, and tells nothing."""
    tokens = np.array([7] * 10 + [3] * 8 + [5] * 10 + [9] * 12)
    first = np.array([1] * 10 + [1] * 6 + [0] * 2 + [0, 1] * 5 + [0] * 11 + [2])
    telling = most_telling(tokens, first, 3)
    assert telling[1][:2] == [(7, 1.0), (3, 0.75)]
    assert telling[0][0][0] == 9 and telling[2] == [(9, pytest.approx(1 / 12))]


def test_r2_of_vectors_by_hand():
    """One expert, one dimension: outputs 1 and 3 of tokens that did not choose it, the vector is 1.

    1 - (0 + 4) / (1 + 9); of the best constant, 2: 1 - (1 + 1) / 10. With gates of 1 and 3 the squares count 1 and 9.
    """
    outputs, gates, vector = np.array([1.0, 3.0]), np.array([1.0, 3.0]), 1.0

    def sums(weights):
        squares, rest = (weights * outputs**2).sum(), (weights * (outputs - vector) ** 2).sum()
        return weights.sum(), squares, rest, (weights * outputs).sum()

    by_kind = np.array([sums(np.ones(2)), sums(gates**2)])  # [2, 4]
    none = np.zeros_like(by_kind)
    stacked = np.stack([none, by_kind], axis=1)  # chosen by none
    experts = {name: stacked[None, :, :, None, i] for i, name in enumerate(("weight", "square", "rest"))}
    experts["total"] = stacked[None, :, :, None, 3:]
    by_expert, by_layer = default_vectors.explained(experts)
    np.testing.assert_allclose(by_expert.not_chosen, [[0.6]])
    np.testing.assert_allclose(by_expert.best, [[0.8]])
    assert np.isnan(by_expert.chosen).all()
    np.testing.assert_allclose(by_layer.not_chosen, [1 - 36 / 82])
    np.testing.assert_allclose(by_layer.best, [1 - (1.8**2 + 9 * 0.2**2) / 82])
