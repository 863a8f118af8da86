"""Every method's routing as naive float64 loops over the logits of one token, its gradients as matrices by hand.

Written from the papers' formulas, sharing nothing with the package: see `reference.py`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

VECTOR_METHODS = ("default", "default_sampled", "default_threshold")
THRESHOLD_METHODS = ("expert_threshold", "default_threshold")


class Settings(NamedTuple):
    """What the mathematics depends on, as in `MoEConfig` and the methods' settings.

    substitution: share of default vectors in the output with substitute="forward".  bias: of loss_free and frozen, [N].
    thresholds: of the experts, [N].
    capacity: tokens of a sequence of `length` that an expert takes; None for no limit.
    samples: (t, i), experts run for a token that did not choose them.
    """

    top_k: int
    router: str = "default"
    substitute: str = "forward"
    ema_weighted: bool = True
    ema_decay: float = 0.9
    ema_update: str = "before"
    substitution: float = 1.0
    expert_gradient: bool = False
    score_function: str = "softmax"
    normalize_weights: bool = False
    bias: tuple[float, ...] | None = None
    weight_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    product_form: bool = False
    thresholds: tuple[float, ...] | None = None
    threshold: float = 0.1
    capacity: int | None = None
    length: int | None = None
    samples: tuple[tuple[int, int], ...] = ()
    sample_factor: float = 1.0


class TokenRoute(NamedTuple):
    """probs, weights: [N], the distribution over experts and what their outputs count.  chosen: the experts that run.

    weights_to_logits, probs_to_logits: [N, N]; row i is what a gradient of 1 for entry i gives each logit.
    factors: c of sparsemixer's draws.
    """

    probs: np.ndarray
    weights: np.ndarray
    chosen: list[int]
    weights_to_logits: np.ndarray
    probs_to_logits: np.ndarray
    factors: tuple[float, ...] = ()


class Routes(NamedTuple):
    """Of all tokens. logits, probs, weights [T, N]; chosen, and active, which is that without what was dropped.

    mask [T]: whether a token counts in statistics.
    """

    logits: np.ndarray
    probs: np.ndarray
    weights: np.ndarray
    chosen: list[list[int]]
    active: list[list[int]]
    tokens: list[TokenRoute]
    mask: np.ndarray


def route(x: np.ndarray, kernel: np.ndarray, s: Settings, draws: Any = None, drop: bool = False, mask=None) -> Routes:
    """Routes of tokens [T, D].

    draws: in training, for sparsemixer for each of the K choices exponential numbers [T, N] and uniform ones [T], for
      probmoe one tuple of uniform ones [T, N].
    """
    mask = np.ones(len(x), bool) if mask is None else np.asarray(mask, bool)
    logits = x @ kernel
    tokens = []
    for t, of_token in enumerate(logits):
        if s.router == "hash":
            tokens.append(hash_token(token_id(t), len(of_token), s.top_k))
            continue
        of_draws = draws and [tuple(numbers[t] for numbers in of_choice) for of_choice in draws]
        tokens.append(route_token(of_token, s, of_draws))
    chosen = [token.chosen for token in tokens]
    active = within_capacity(chosen, s, mask) if drop and s.capacity is not None else chosen
    probs, weights = np.array([t.probs for t in tokens]), np.array([t.weights for t in tokens])
    return Routes(logits, probs, weights, chosen, active, tokens, mask)


def route_token(logits: np.ndarray, s: Settings, draws: Sequence | None) -> TokenRoute:
    if s.router == "sparsemixer":
        return sparsemixer_token(logits, s, draws)
    if s.router == "remoe":
        return remoe_token(logits)
    if s.router == "probmoe" and draws:
        return probmoe_token(logits, s.top_k, *draws[0])
    num_experts = len(logits)
    scores, scores_to_logits = score(logits, s.score_function)
    biased = scores + (s.bias if s.router in ("loss_free", "frozen") else np.zeros(num_experts))
    ranked = sorted(best_groups(biased, s), key=lambda i: (-biased[i], i))
    chosen = list(range(num_experts)) if s.router == "dense" else ranked[: s.top_k]
    if s.router in THRESHOLD_METHODS:
        chosen = [i for i in range(num_experts) if scores[i] > s.thresholds[i]] or ranked[:1]
    weights, weights_to_scores = scores, np.eye(num_experts)
    if s.normalize_weights:
        is_chosen = np.isin(range(num_experts), chosen)
        total = scores[is_chosen].sum()
        weights = scores / total
        # The sum is a constant to experts that were not chosen.
        weights_to_scores = (np.eye(num_experts) - np.outer(weights * is_chosen, is_chosen)) / total
    probs, probs_to_scores = share(scores)
    weights, weights_to_scores = s.weight_scale * weights, s.weight_scale * weights_to_scores
    if s.router == "frozen":
        return TokenRoute(probs, weights, chosen, *np.zeros((2, num_experts, num_experts)))
    return TokenRoute(probs, weights, chosen, weights_to_scores @ scores_to_logits, probs_to_scores @ scores_to_logits)


def best_groups(scores: np.ndarray, s: Settings) -> list[int]:
    """The experts of the groups that have the largest sums of their two best scores."""
    size = len(scores) // s.num_groups
    groups = [range(first, first + size) for first in range(0, len(scores), size)]
    groups.sort(key=lambda group: (-sum(sorted(scores[i] for i in group)[-2:]), group[0]))
    return [i for group in groups[: s.groups_per_token] for i in group]


def score(logits: np.ndarray, function: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and their derivatives by the logits [N, N]."""
    if function == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
        return scores, np.diag(scores * (1 - scores))
    if function == "sqrt_softplus":
        scores = np.sqrt(np.log1p(np.exp(logits)))
        return scores, np.diag(1 / (1 + np.exp(-logits)) / (2 * scores))
    scores = softmax(logits)
    return scores, np.diag(scores) - np.outer(scores, scores)


def softmax(logits: Sequence[float]) -> np.ndarray:
    parts = np.exp(np.asarray(logits) - max(logits))
    return parts / parts.sum()


def share(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a_i / sum_j a_j, and their derivatives: (delta_ij - share_i) / sum."""
    shares = a / a.sum()
    return shares, (np.eye(len(a)) - shares[:, None]) / a.sum()


def token_id(t: Any) -> Any:
    """The id of token t of a layer's input, for methods that route by it."""
    return 7 * t % 97


def hash_token(token: int, num_experts: int, top_k: int) -> TokenRoute:
    """The K experts of largest hash, of 24 bits; ties to the lower."""

    def mix(bits: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ bits >> shift) * factor % 2**32
        return bits ^ bits >> 16

    hashes = [mix((mix(token) + i) % 2**32) // 256 for i in range(num_experts)]
    chosen = sorted(range(num_experts), key=lambda i: (-hashes[i], i))[:top_k]
    weights, nothing = np.isin(range(num_experts), chosen) / top_k, np.zeros((num_experts, num_experts))
    return TokenRoute(weights, weights, chosen, nothing, nothing)


def remoe_token(logits: np.ndarray) -> TokenRoute:
    gates = np.maximum(logits, 0)
    chosen, is_open = list(np.flatnonzero(gates)), np.diag(1.0 * (gates > 0))
    if not chosen:
        return TokenRoute(gates, gates, chosen, is_open, is_open)
    probs, probs_to_gates = share(gates)
    return TokenRoute(probs, gates, chosen, is_open, probs_to_gates @ is_open)


def subsets(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """All choices z of K experts [S, N], and the probability of each if z_i = 1 with sigmoid(s_i), given K in all."""
    chosen = list(itertools.combinations(range(len(logits)), top_k))
    sums = np.array([logits[list(experts)].sum() for experts in chosen])
    return np.array([1.0 * np.isin(range(len(logits)), experts) for experts in chosen]), softmax(sums)


def probmoe_token(logits: np.ndarray, top_k: int, uniform: np.ndarray) -> TokenRoute:
    """From the last expert to the first, each runs if its number is below its probability, given those after it."""
    z_SN, p_S = subsets(logits, top_k)
    means = p_S @ z_SN
    covariances = (z_SN.T * p_S) @ z_SN - np.outer(means, means)  # the slopes of the means
    left = np.ones(len(p_S), bool)
    for i in reversed(range(len(logits))):
        runs = uniform[i] < p_S[left & (z_SN[:, i] == 1)].sum() / p_S[left].sum()
        left &= z_SN[:, i] == runs
    (z,) = z_SN[left]
    probs, probs_to_logits = score(logits, "softmax")
    to_logits = z[:, None] * probs_to_logits + probs[:, None] * covariances
    return TokenRoute(probs, z * probs, list(np.flatnonzero(z)), to_logits, probs_to_logits)


def sparsemixer_token(logits: np.ndarray, s: Settings, draws: Sequence | None) -> TokenRoute:
    num_experts = len(logits)
    weights, to_logits, chosen, factors = np.zeros(num_experts), np.zeros((num_experts, num_experts)), [], []
    for k in range(s.top_k):
        left = [i for i in range(num_experts) if i not in chosen]
        m = max(logits[i] for i in left)
        near = [i for i in left if not (m - logits[i]) / max(abs(logits[i]), m) > 2 * s.threshold]
        p = dict(zip(near, softmax([logits[i] for i in near]), strict=True))
        a = likeliest = max(near, key=lambda i: p[i])
        factor = 1.0
        if draws is not None:
            exponential, uniform = draws[k]
            a = max(near, key=lambda i: logits[i] - math.log(exponential[i]))
            b = 1 if a == likeliest or uniform > 0.75 else 0
            factor = 1 / 3 + 2 / 3 * b
        weights[a] = factor * p[a]
        for j in near:
            to_logits[a, j] = p[a] * ((a == j) - p[j])
        chosen.append(a)
        factors.append(factor)
    return TokenRoute(softmax(logits), weights, chosen, to_logits, score(logits, "softmax")[1], tuple(factors))


def within_capacity(chosen: list[list[int]], s: Settings, mask: np.ndarray) -> list[list[int]]:
    """The first `capacity` tokens of each sequence keep an expert that they chose; those masked out take no room."""
    active = []
    for t, experts in enumerate(chosen):
        first = t - t % s.length
        before = [i for earlier in range(first, t) if mask[earlier] for i in chosen[earlier]]
        active.append([i for i in experts if before.count(i) < s.capacity])
    return active
