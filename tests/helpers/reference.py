"""The sparse MoE layer as naive float64 loops over tokens and experts, with its gradient derived by hand.

Written from the formulas of arXiv:2504.12463 and sharing nothing with the package, so that a fault in the fast path
cannot hide here. See `default_moe/routing.py` for the dimension key; tokens have one axis T.
"""

import math
from typing import NamedTuple

import numpy as np
from helpers.reference_routing import VECTOR_METHODS, Routes, route, softmax
from helpers.reference_routing import Settings as Settings  # part of this module's interface
from helpers.reference_routing import token_id as token_id


class Params(NamedTuple):
    """kernel [D, N], gate and up [N, D, F], down [N, F, D]; float64."""

    kernel: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


class Result(NamedTuple):
    """y [T, D]; ema [N, D] after the step, and as used in it; counts [N] of the tokens kept; losses, unweighted."""

    y: np.ndarray
    ema: np.ndarray
    used: np.ndarray
    routes: Routes
    counts: np.ndarray
    load_balance_loss: float
    z_loss: float


class Gradients(NamedTuple):
    x: np.ndarray
    kernel: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def expert(params: Params, i: int, x: np.ndarray) -> np.ndarray:
    """E_i(x) = (silu(x gate_i) * (x up_i)) down_i of one token."""
    a = x @ params.gate[i]
    return (a * sigmoid(a) * (x @ params.up[i])) @ params.down[i]


def shares_in_mean(routes: Routes, i: int, s: Settings) -> dict[int, float]:
    """What each kept token that activated expert i, or sampled it, counts in the mean of its outputs (eq. 10)."""
    if s.router == "default_sampled":
        sampled = [t for t, j in s.samples if j == i and routes.mask[t]]
        assert not any(i in routes.chosen[t] for t in sampled)
        return dict.fromkeys(sampled, 1 / max(len(sampled), 1))
    active = [t for t in range(len(routes.active)) if i in routes.active[t] and routes.mask[t]]
    counts = {t: routes.weights[t, i] if s.ema_weighted else 1.0 for t in active}
    return {t: count / sum(counts.values()) for t, count in counts.items() if count > 0}


def update_ema(x: np.ndarray, params: Params, routes: Routes, ema: np.ndarray, s: Settings) -> np.ndarray:
    """Eq. 10 for each expert that a kept token activated; the others keep their vector."""
    new = ema.copy()
    for i in range(len(ema)):
        if shares := shares_in_mean(routes, i, s):
            mean = sum(share * expert(params, i, x[t]) for t, share in shares.items())
            new[i] = s.ema_decay * ema[i] + (1 - s.ema_decay) * mean
    return new


def balance(routes: Routes) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Counts [N], shares f [N], N sum_i f_i P_i, and the mean squared log-partition, over the tokens kept."""
    num_experts = routes.probs.shape[1]
    counts, mean_probs, z = np.zeros(num_experts), np.zeros(num_experts), 0.0
    kept = np.flatnonzero(routes.mask)
    for t in kept:
        for i in routes.chosen[t]:
            counts[i] += 1
        mean_probs += routes.probs[t] / len(kept)
        z += log_partition(routes.logits[t]) ** 2 / len(kept)
    f = counts / max(1, counts.sum())
    return counts, f, num_experts * float(f @ mean_probs), z


def log_partition(logits: np.ndarray) -> float:
    return max(logits) + math.log(sum(math.exp(s - max(logits)) for s in logits))


def sequence_balance(routes: Routes, length: int) -> tuple[np.ndarray, float]:
    """For every token N f_i / (L B) with the f of its sequence, [T, N], and the mean over sequences of N f . P.

    L counts the tokens kept, B the sequences that have any; f the K experts of the largest logits, without any bias.
    """
    num_tokens, num_experts = routes.probs.shape
    starts = [first for first in range(0, num_tokens, length) if any(routes.mask[first : first + length])]
    factors, loss = np.zeros((num_tokens, num_experts)), 0.0
    for first in starts:
        kept = [t for t in range(first, first + length) if routes.mask[t]]
        f = np.zeros(num_experts)
        for t in kept:
            top_k = len(routes.chosen[t])
            for i in np.argsort(-routes.logits[t], kind="stable")[:top_k]:
                f[i] += 1 / (len(kept) * top_k)
        loss += num_experts * float(f @ routes.probs[kept].mean(axis=0)) / len(starts)
        factors[kept] = num_experts * f / len(kept) / len(starts)
    return factors, loss


def simbal(params: Params) -> tuple[np.ndarray, float]:
    """Gradient by the kernel, and the mean of |<column i, column j> - (i == j)| over all pairs."""
    kernel = params.kernel
    d, loss, num_experts = np.zeros_like(kernel), 0.0, kernel.shape[1]
    for i, j in np.ndindex(num_experts, num_experts):
        off = kernel[:, i] @ kernel[:, j] - (i == j)
        loss += abs(off) / num_experts**2
        d[:, i] += np.sign(off) * kernel[:, j] / num_experts**2
        d[:, j] += np.sign(off) * kernel[:, i] / num_experts**2
    return d, loss


def coupling(params: Params, a: float, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Gradients by the kernel and by gate, and the mean over i != j of relu(M_ij - a M_ii) + relu(M_ji - a M_ii).

    M_ij = |silu(r_i gate_j)|, r_i the column i of the kernel times its noise.
    """
    kernel, num_experts = params.kernel, params.kernel.shape[1]
    u = {(i, j): (kernel[:, i] * noise[:, i]) @ params.gate[j] for i, j in np.ndindex(num_experts, num_experts)}
    answers = {pair: a * sigmoid(a) for pair, a in u.items()}
    norms = {pair: math.sqrt(answer @ answer) for pair, answer in answers.items()}
    loss, d_norms, part = 0.0, dict.fromkeys(norms, 0.0), 1 / (num_experts * (num_experts - 1))
    for i, j in norms:
        for other in ((i, j), (j, i)):
            excess = norms[other] - a * norms[i, i]
            if i != j and excess > 0:
                loss += part * excess
                d_norms[other] += part
                d_norms[i, i] -= part * a
    d_kernel, d_gate = np.zeros_like(kernel), np.zeros_like(params.gate)
    for (i, j), d_norm in d_norms.items():
        d_answer = d_norm * answers[i, j] / norms[i, j]
        d_u = d_answer * sigmoid(u[i, j]) * (1 + u[i, j] * (1 - sigmoid(u[i, j])))
        d_gate[j] += np.outer(kernel[:, i] * noise[:, i], d_u)
        d_kernel[:, i] += noise[:, i] * (params.gate[j] @ d_u)
    return d_kernel, d_gate, loss


def sparsity(routes: Routes, top_k: int) -> tuple[np.ndarray, float]:
    """ReMoE: N / (K T^2) sum_e (sum_t r_te) (sum_t [r_te > 0]) of the tokens kept, and each gate's gradient, [T, N]."""
    kept, num_experts = routes.mask.sum(), routes.weights.shape[1]
    is_open = (routes.weights > 0) & routes.mask[:, None]
    d_gates = is_open * is_open.sum(axis=0) * num_experts / (top_k * kept**2)
    return d_gates, float((d_gates * routes.weights).sum())


def forward(x, params: Params, ema, s: Settings, *, update: bool = True, mask=None, draws=None) -> Result:
    """The layer on tokens [T, D]; with `update` as in training: default vectors move, tokens may be dropped."""
    routes = route(x, params.kernel, s, draws, update, mask)
    used = new = ema
    if update and s.router in VECTOR_METHODS:
        new = update_ema(x, params, routes, ema, s)
        used = new if s.ema_update == "before" else ema
    y = np.zeros_like(x)
    for t, i in np.ndindex(routes.weights.shape):
        if i in routes.active[t]:
            y[t] += routes.weights[t, i] * expert(params, i, x[t])
        elif s.router in VECTOR_METHODS and s.substitute == "forward":
            y[t] += s.substitution * routes.weights[t, i] * used[i]
    counts, _, load_balance_loss, z_loss = balance(routes)
    return Result(y, new, used, routes, counts, load_balance_loss, z_loss)


def gradients(x, params: Params, result: Result, s: Settings, g, a: float, b: float, more=(0.0, 0.0)) -> Gradients:
    """Gradient of <G, y> + a load_balance_loss + b z_loss by hand, with the vectors of `result` as constants (eq. 8).

    Chain: the weight of expert i receives <g, E_i(x)> or <g, E^_i>; the distribution that of the load-balance loss,
    N f_i / T, f being a constant; the method says how both reach the logits; d lse^2/ds_j = 2 lse p_j; s = x W.
    Expert i receives w_i g. With expert_gradient the default vectors are no constants, but stand for the weighted means
    of the experts' outputs: these receive a sum of w_i g over the tokens that they fill in for.

    more: further gradients of the distribution and of the weights, [T, N] each.
    """
    routes, shape_TN = result.routes, result.routes.weights.shape
    _, f, _, _ = balance(routes)
    kept = max(1, routes.mask.sum())
    d = Gradients(np.zeros_like(x), *(np.zeros_like(p) for p in params))
    d_probs = more[0] + routes.mask[:, None] * a * shape_TN[1] * f / kept
    d_weights = more[1] + np.zeros(shape_TN)
    for t, i in np.ndindex(shape_TN):
        if i in routes.active[t]:
            add_expert_gradient(d, params, i, x, t, routes.weights[t, i] * g[t])
        if i in routes.active[t] or s.router == "densemixer":
            d_weights[t, i] += g[t] @ expert(params, i, x[t])
        elif s.router in VECTOR_METHODS:
            d_weights[t, i] += g[t] @ result.used[i]
    for t, i in s.samples:
        d_weights[t, i] += s.sample_factor * g[t] @ (expert(params, i, x[t]) - result.used[i])
    if s.product_form:
        for t, i in np.ndindex(shape_TN):
            d_weights[t, i] *= routes.weights[t, i] / s.weight_scale + (i in routes.chosen[t])
    for t, token in enumerate(routes.tokens):
        d_logits = d_weights[t] @ token.weights_to_logits + d_probs[t] @ token.probs_to_logits
        if routes.mask[t]:
            d_logits += b * 2 * log_partition(routes.logits[t]) * softmax(routes.logits[t]) / kept
        d.kernel[:] += np.outer(x[t], d_logits)
        d.x[t] += params.kernel @ d_logits
    if s.expert_gradient:
        for i in range(shape_TN[1]):
            filled_in = [t for t in range(len(x)) if i not in routes.active[t]]
            d_mean = sum((s.substitution * routes.weights[t, i] * g[t] for t in filled_in), np.zeros(x.shape[1]))
            for t, share in shares_in_mean(routes, i, s).items():
                add_expert_gradient(d, params, i, x, t, share * d_mean)
    return d


def add_expert_gradient(d: Gradients, params: Params, i: int, x: np.ndarray, t: int, d_out: np.ndarray) -> None:
    """With u = x gate, v = x up, h = silu(u) v, E = h down; silu'(u) = sigma(u) (1 + u (1 - sigma(u)))."""
    u, v = x[t] @ params.gate[i], x[t] @ params.up[i]
    silu = u * sigmoid(u)
    d_h = params.down[i] @ d_out
    d_u = d_h * v * sigmoid(u) * (1 + u * (1 - sigmoid(u)))
    d_v = d_h * silu
    d.down[i] += np.outer(silu * v, d_out)
    d.gate[i] += np.outer(x[t], d_u)
    d.up[i] += np.outer(x[t], d_v)
    d.x[t] += params.gate[i] @ d_u + params.up[i] @ d_v


def make_inputs(seed: int, num_tokens: int, num_experts: int, d_model: int = 12, expert_dim: int = 10):
    """Random (x [T, D], params, ema [N, D], g [T, D]) in float64 that float32 holds exactly, outputs of order 1.

    x[:, 0] is positive, so that row 0 of the kernel can favour an expert or starve it.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 1.0) -> np.ndarray:
        return rng.normal(0, std, shape).astype(np.float32).astype(np.float64)

    x = normal(num_tokens, d_model)
    x[:, 0] = 1 + np.abs(x[:, 0])
    weights = (num_experts, d_model, expert_dim)
    params = Params(
        normal(d_model, num_experts, std=0.5),
        normal(*weights, std=d_model**-0.5),
        normal(*weights, std=d_model**-0.5),
        normal(num_experts, expert_dim, d_model, std=expert_dim**-0.5),
    )
    return x.astype(np.float32).astype(np.float64), params, normal(num_experts, d_model), normal(num_tokens, d_model)


def assert_close(got, expected, what: str = "", tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of each entry plus `tolerance` of the array's largest entry.

    Float32 rounds at 6e-8; the sums here have up to some hundred terms behind them and may cancel, which leaves errors
    of about sqrt(100) * 6e-8 = 6e-7 of the largest term. 1e-5 leaves room for that and for nothing systematic.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale, err_msg=what)


def assert_no_near_ties(routes: Routes) -> None:
    """Float32 and float64 must choose alike, else the comparison means nothing: change the seed if this fails."""
    for logits, chosen in zip(routes.logits, routes.chosen, strict=True):
        ranked = -np.sort(-logits)
        gaps = ranked[: len(chosen)] - np.append(ranked[1:], -np.inf)[: len(chosen)]
        assert gaps.min() > 1e-5, "the inputs hold near-ties"
