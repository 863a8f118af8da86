"""Every method's routing as naive float64 loops over the logits of one token, its gradients as matrices by hand.

Written from the papers' formulas, sharing nothing with the package: see `reference.py`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Settings(NamedTuple):
    """What the mathematics depends on, as in `MoEConfig` and the methods' settings.

    substitution: share of default vectors in the output with substitute="forward".  bias: of loss_free, [N].
    capacity: tokens of a sequence of `length` that an expert takes; None for no limit.
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
    threshold: float = 0.1
    capacity: int | None = None
    length: int | None = None


class TokenRoute(NamedTuple):
    """probs, weights: [N], the distribution over experts and what their outputs count.  chosen: the experts that run.

    factors: c of sparsemixer's draws.
    weights_to_logits, probs_to_logits: [N, N]; row i is what a gradient of 1 for entry i gives each logit.
    """

    probs: np.ndarray
    weights: np.ndarray
    chosen: list[int]
    weights_to_logits: np.ndarray
    probs_to_logits: np.ndarray
    factors: tuple[float, ...] = ()


class Routes(NamedTuple):
    """Of all tokens. logits, probs, weights [T, N]; chosen, and active, which is that without what was dropped."""

    logits: np.ndarray
    probs: np.ndarray
    weights: np.ndarray
    chosen: list[list[int]]
    active: list[list[int]]
    tokens: list[TokenRoute]


def route(x: np.ndarray, kernel: np.ndarray, s: Settings, draws: Any = None, drop: bool = False, mask=None) -> Routes:
    """Routes of tokens [T, D].

    draws: for sparsemixer in training, for each of the K choices exponential numbers [T, N] and uniform ones [T].
    """
    num_tokens, num_experts = len(x), kernel.shape[1]
    logits = np.zeros((num_tokens, num_experts))
    for t in range(num_tokens):
        for i in range(num_experts):
            logits[t, i] = sum(x[t, d] * kernel[d, i] for d in range(len(kernel)))
    tokens = []
    for t in range(num_tokens):
        of_token = None if draws is None else [(exponential[t], uniform[t]) for exponential, uniform in draws]
        tokens.append(route_token(logits[t], s, of_token))
    chosen = [token.chosen for token in tokens]
    active = within_capacity(chosen, num_experts, s, mask) if drop and s.capacity is not None else chosen
    return Routes(
        logits, np.array([t.probs for t in tokens]), np.array([t.weights for t in tokens]), chosen, active, tokens
    )


def route_token(logits: np.ndarray, s: Settings, draws: Sequence | None) -> TokenRoute:
    if s.router == "sparsemixer":
        return sparsemixer_token(logits, s, draws)
    if s.router == "remoe":
        return remoe_token(logits)
    num_experts = len(logits)
    scores, scores_to_logits = score(logits, s.score_function)
    bias = s.bias if s.router == "loss_free" else np.zeros(num_experts)
    ranked = sorted(range(num_experts), key=lambda i: (-(scores[i] + bias[i]), i))
    chosen = list(range(num_experts)) if s.router == "dense" else ranked[: s.top_k]
    weights, to_scores = scores, np.eye(num_experts)
    if s.normalize_weights:
        total = sum(scores[i] for i in chosen)
        weights = scores / total
        for i in range(num_experts):
            for j in range(num_experts):
                # The sum is a constant to experts that were not chosen.
                through_sum = weights[i] if i in chosen and j in chosen else 0.0
                to_scores[i, j] = ((i == j) - through_sum) / total
    probs = scores / scores.sum()
    probs_to_scores = np.zeros((num_experts, num_experts))
    for i in range(num_experts):
        for j in range(num_experts):
            probs_to_scores[i, j] = ((i == j) - probs[i]) / scores.sum()
    return TokenRoute(probs, weights, chosen, to_scores @ scores_to_logits, probs_to_scores @ scores_to_logits)


def score(logits: np.ndarray, function: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and their derivatives by the logits [N, N]."""
    num_experts = len(logits)
    derivatives = np.zeros((num_experts, num_experts))
    if function == "sigmoid":
        scores = np.array([1 / (1 + math.exp(-value)) for value in logits])
        for i in range(num_experts):
            derivatives[i, i] = scores[i] * (1 - scores[i])
        return scores, derivatives
    scores = softmax(logits)
    for i in range(num_experts):
        for j in range(num_experts):
            derivatives[i, j] = scores[i] * ((i == j) - scores[j])
    return scores, derivatives


def softmax(logits: Sequence[float]) -> np.ndarray:
    largest = max(logits)
    parts = [math.exp(value - largest) for value in logits]
    return np.array([part / sum(parts) for part in parts])


def remoe_token(logits: np.ndarray) -> TokenRoute:
    num_experts = len(logits)
    gates = np.array([max(value, 0.0) for value in logits])
    chosen = [i for i in range(num_experts) if gates[i] > 0]
    is_open = np.diag([1.0 if i in chosen else 0.0 for i in range(num_experts)])
    if not chosen:
        return TokenRoute(gates, gates, chosen, is_open, is_open)
    probs = gates / gates.sum()
    by_gates = [[((i == j) - probs[i]) / gates.sum() for j in range(num_experts)] for i in range(num_experts)]
    return TokenRoute(probs, gates, chosen, is_open, np.array(by_gates) @ is_open)


def sparsemixer_token(logits: np.ndarray, s: Settings, draws: Sequence | None) -> TokenRoute:
    num_experts = len(logits)
    weights, to_logits, chosen, factors = np.zeros(num_experts), np.zeros((num_experts, num_experts)), [], []
    for k in range(s.top_k):
        left = [i for i in range(num_experts) if i not in chosen]
        m = max(logits[i] for i in left)
        near = [i for i in left if not (m - logits[i]) / max(abs(logits[i]), m) > 2 * s.threshold]
        p = dict(zip(near, softmax([logits[i] for i in near]), strict=True))
        likeliest = max(near, key=lambda i: p[i])
        factor = 1.0
        a = likeliest
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
    probs, probs_to_logits = score(logits, "softmax")
    return TokenRoute(probs, weights, chosen, to_logits, probs_to_logits, tuple(factors))


def within_capacity(chosen: list[list[int]], num_experts: int, s: Settings, mask=None) -> list[list[int]]:
    """The first `capacity` tokens of each sequence keep an expert that they chose; those masked out take no room."""
    active = []
    for t, experts in enumerate(chosen):
        if t % s.length == 0:
            taken = [0] * num_experts
        active.append([i for i in experts if taken[i] < s.capacity])
        for i in experts:
            taken[i] += 1 if mask is None or mask[t] else 0
    return active
