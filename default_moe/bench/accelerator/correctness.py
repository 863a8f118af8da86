"""Every backend's experts, forward and backward, against float64 on random inputs, with idle and overfull experts."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from default_moe.bench.accelerator.results import Results
from default_moe.bench.accelerator.scale import scale
from default_moe.bench.report import Row
from default_moe.bench.workload import LayerShape
from default_moe.config import MATMUL_BACKENDS
from default_moe.moe.experts.backends import available_backends, group_alignment, resolve_backend, slots_multiple
from default_moe.moe.experts.gather import run_experts
from default_moe.moe.experts.layout import group_by_expert
from default_moe.moe.experts.swiglu import ExpertParams

# Largest error allowed, relative to the largest value of the same array: inputs have 8 (bfloat16) or 24 bits, hidden
# values and gradients are rounded to as many, and accelerators take float32 products with 10.
_ALLOWED = {"bfloat16": 0.03, "float32": 0.005}
_ROUTES = ("drawn uniformly", "half of the experts idle", "all tokens on the same experts")


def measure(results: Results) -> None:
    s = scale()
    for backend in MATMUL_BACKENDS:
        if backend not in available_backends():
            results.guarded(backend, functools.partial(_unavailable, backend))
            continue
        for shape, dtype in itertools.product(s.checked, dict.fromkeys((s.dtype, "float32"))):
            for seed, route in enumerate(_ROUTES):
                check = functools.partial(_check, shape, backend, dtype, seed)
                results.guarded(f"{backend} {dtype} F{shape.expert_dim}, {route}", check)


def _unavailable(backend: str) -> Row:
    return {"backend": resolve_backend(backend)}  # which raises what is missing


def _check(shape: LayerShape, backend: str, dtype: str, seed: int) -> Row:
    rng = np.random.default_rng(seed)
    tokens, d_model, num_experts, top_k, width = shape
    used = num_experts if seed == 0 else num_experts // 2 if seed == 1 else top_k
    index = np.argsort(rng.random((tokens, used)), axis=1)[:, :top_k].astype(np.int32)

    def normal(*size: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.normal(size=size, scale=scale), dtype).astype(jnp.float32), np.float64)

    x, g = normal(tokens, d_model), normal(tokens, d_model)
    gate, up = (normal(num_experts, d_model, width, scale=d_model**-0.5) for _ in range(2))
    down = normal(num_experts, width, d_model, scale=width**-0.5)
    weight = rng.random((tokens, top_k))

    @jax.jit
    def both(x: Any, weight: Any, weights: ExpertParams) -> Any:
        layout = group_by_expert(jnp.asarray(index), num_experts, group_alignment(backend), slots_multiple(backend))

        def objective(x: Any, weight: Any, weights: ExpertParams) -> Any:
            y, sums = run_experts(x, weight, weight, weights, layout, num_experts, backend)
            return (y * jnp.asarray(g, jnp.float32)).sum(), (y, sums)

        return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(x, weight, weights)

    weights = ExpertParams(*(jnp.asarray(w, dtype) for w in (gate, up, down)))
    (d_x, d_weight, d_weights), (y, sums) = both(jnp.asarray(x, dtype), jnp.asarray(weight, jnp.float32), weights)
    found = {
        "y": y,
        "sums": sums,
        "d_x": d_x,
        "d_weight": d_weight,
        **{f"d_{k}": v for k, v in d_weights._asdict().items()},
    }
    expected = reference(x, weight, index, (gate, up, down), g)
    errors = {
        name: np.abs(np.asarray(a.astype(jnp.float32), np.float64) - expected[name]).max()
        / np.abs(expected[name]).max()
        for name, a in found.items()
    }
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    ok = bool(np.isfinite(errors[worst]) and errors[worst] < _ALLOWED[dtype])
    return {"ok": ok, "largest error": float(errors[worst]), "of": worst, "allowed": _ALLOWED[dtype]}


def reference(
    x: np.ndarray, weight: np.ndarray, index: np.ndarray, weights: Sequence[np.ndarray], g: np.ndarray
) -> dict[str, np.ndarray]:
    """Outputs, weighted sums per expert and gradients of <g, y>, expert by expert in float64.

    Args:
      x, g: [T, D].  weight: [T, K], of each choice, in the output and in the sums.  index: int [T, K].
      weights: gate and up [N, D, F], down [N, F, D].
    """
    y, d_x, d_weight = np.zeros_like(g), np.zeros_like(x), np.zeros_like(weight)
    sums = np.zeros((len(weights[0]), x.shape[1]))
    d_weights = [np.zeros_like(w) for w in weights]
    for e, (gate, up, down) in enumerate(zip(*weights, strict=True)):
        t, k = np.nonzero(index == e)
        a, u, w = x[t] @ gate, x[t] @ up, weight[t, k][:, None]
        sigmoid = 1 / (1 + np.exp(-a))
        hidden = a * sigmoid * u
        out = hidden @ down
        y[t] += w * out
        sums[e] = (w * out).sum(axis=0)
        d_weight[t, k] = (g[t] * out).sum(axis=1)
        d_hidden = w * (g[t] @ down.T)
        d_up, d_gate = d_hidden * a * sigmoid, d_hidden * u * sigmoid * (1 + a * (1 - sigmoid))
        d_x[t] += d_gate @ gate.T + d_up @ up.T
        for total, gradient in zip(d_weights, (x[t].T @ d_gate, x[t].T @ d_up, (w * hidden).T @ g[t]), strict=True):
            total[e] = gradient
    return {
        "y": y,
        "sums": sums,
        "d_x": d_x,
        "d_weight": d_weight,
        "d_gate": d_weights[0],
        "d_up": d_weights[1],
        "d_down": d_weights[2],
    }
