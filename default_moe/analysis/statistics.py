"""Figures of routing, from choices and probabilities: pure functions of NumPy arrays, float64 inside.

Dimension key: T tokens, Y MoE layers, N experts.
"""

from collections.abc import Sequence

import numpy as np


def load(chosen_YTN: np.ndarray) -> np.ndarray:
    """Choices of each expert [Y, N], in multiples of the layer's mean; 0 where nothing is chosen at all."""
    counts_YN = chosen_YTN.sum(axis=1, dtype=np.float64)
    return counts_YN / np.maximum(counts_YN.mean(axis=1, keepdims=True), 1e-9)


def entropy(probs: np.ndarray) -> np.ndarray:
    """Entropy over the last axis in nats, of numbers from 0 on that are made to add up to 1."""
    p = probs.astype(np.float64)
    p = p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-30)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


def coactivation(chosen_TN: np.ndarray) -> np.ndarray:
    """[N, N]: of the tokens that choose expert i (the row), the share that choose j too; NaN on the diagonal."""
    chosen = chosen_TN.astype(np.float64)
    together_NN = chosen.T @ chosen
    tokens_N = np.diag(together_NN)
    with np.errstate(invalid="ignore"):
        share_NN = together_NN / tokens_N[:, None]
    np.fill_diagonal(share_NN, np.nan)
    return share_NN


def expected_coactivation(chosen_TN: np.ndarray) -> np.ndarray:
    """`coactivation` if each token's other experts were drawn by their load alone: (K_i - 1) load_j / (1 - load_i).

    K_i is the mean number of experts of the tokens that choose i, load_j the share of j in all choices.
    """
    chosen = chosen_TN.astype(np.float64)
    tokens_N, per_token_T = chosen.sum(axis=0), chosen.sum(axis=1)
    share_N = tokens_N / max(tokens_N.sum(), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        others_N = chosen.T @ per_token_T / tokens_N - 1
        expected_NN = others_N[:, None] * share_N / (1 - share_N)[:, None]
    np.fill_diagonal(expected_NN, np.nan)
    return expected_NN


def transitions(first_T: np.ndarray, next_T: np.ndarray, num_experts: int) -> np.ndarray:
    """[N, N]: of the tokens whose first expert is i in one layer (the row), the share that go to j in another one."""
    counts_NN = joint_counts(first_T, next_T, num_experts, num_experts)
    with np.errstate(invalid="ignore"):
        return counts_NN / counts_NN.sum(axis=1, keepdims=True)


def joint_counts(a: np.ndarray, b: np.ndarray, size_a: int, size_b: int) -> np.ndarray:
    """How often each pair of values occurs, [size_a, size_b]; values outside of 0 ... size - 1 count nowhere."""
    inside = (a >= 0) & (a < size_a) & (b >= 0) & (b < size_b)
    pairs = a[inside].astype(np.int64) * size_b + b[inside]
    return np.bincount(pairs, minlength=size_a * size_b).reshape(size_a, size_b).astype(np.float64)


def mutual_information(counts: np.ndarray) -> float:
    """Mutual information in bits of the two variables whose joint counts these are, [..., A, B] of A and B values."""
    p = counts / max(counts.sum(), 1)
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    positive = p > 0
    return float((p[positive] * np.log2(p[positive] / independent[positive])).sum())


def explained(labels_T: np.ndarray, first_T: np.ndarray, num_experts: int, seed: int = 0) -> tuple[float, float]:
    """Share of the entropy of a token's first expert that a label explains, and what shuffled labels explain.

    The second is the size that the first has by chance: with many labels and few tokens it is not 0.
    labels_T: whole numbers from 0 on.
    """
    size = int(labels_T.max(initial=0)) + 1
    counts = joint_counts(labels_T, first_T, size, num_experts)
    bits = entropy(counts.sum(axis=0)) / np.log(2)
    if bits <= 0:
        return 0.0, 0.0
    shuffled_T = np.random.default_rng(seed).permutation(labels_T)
    by_chance = mutual_information(joint_counts(shuffled_T, first_T, size, num_experts))
    return mutual_information(counts) / bits, by_chance / bits


def agreement(chosen_YTN: np.ndarray, final_YTN: np.ndarray) -> np.ndarray:
    """Saturation [Y]: the share of the final choices that were chosen before already, for the same tokens."""
    both_Y = (chosen_YTN & final_YTN).sum(axis=(1, 2), dtype=np.float64)
    return both_Y / np.maximum(final_YTN.sum(axis=(1, 2)), 1)


def domain_information(
    domains_R: np.ndarray, choices_RN: np.ndarray, num_domains: int, shuffles: int = 200, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Mutual information in bits of a token's domain and expert, and the same for shuffled labels, [shuffles].

    Labels are shuffled among rows, not among tokens: tokens of a row go together, whatever its domain.
    domains_R: domain of each row.  choices_RN: choices of each expert in each row.
    """
    rng = np.random.default_rng(seed)

    def information(labels_R: np.ndarray) -> float:
        return mutual_information(np.stack([choices_RN[labels_R == d].sum(axis=0) for d in range(num_domains)]))

    return information(domains_R), np.array([information(rng.permutation(domains_R)) for _ in range(shuffles)])


def cosines(vectors_ND: np.ndarray) -> np.ndarray:
    """Cosine similarities [N, N]; NaN for vectors of zeros."""
    vectors = vectors_ND.astype(np.float64)
    norms_N = np.linalg.norm(vectors, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors @ vectors.T / (norms_N[:, None] * norms_N)


def evenly(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i)] for i in np.linspace(0, len(values) - 1, most)]
