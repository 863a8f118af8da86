"""Experts by every backend that runs here against float64: `pytest --noconftest -m gpu` on a GPU or TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.reference import assert_close, make_inputs

from default_moe.moe.experts.backends import available_backends, lay_out, run_experts
from default_moe.moe.experts.swiglu import ExpertParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error::default_moe.moe.experts.grouped_matmul.SlowKernel"),  # no kernel stands in
]

# Relative to the largest value of an array: inputs have 8 or 24 bits, hidden values and gradients are rounded to as
# many, and accelerators take float32 products with 10.
ALLOWED = {"bfloat16": 0.03, "float32": 0.005}
# Kernels for Hopper do not take float32.
CASES = [(b, d) for b in available_backends() for d in ALLOWED if b not in ("mosaic", "hopper") or d != "float32"]
K = 2


def expected(x, gates, index, params, g):
    """Outputs, their sums per expert, and gradients of <g, y>, by the loops of `reference`."""
    y, sums, d_gates = np.zeros_like(x), np.zeros((len(params.gate), x.shape[1])), np.zeros_like(gates)
    d = reference.Gradients(np.zeros_like(x), *(np.zeros_like(p) for p in params))
    for t, k in np.ndindex(index.shape):
        out = reference.expert(params, index[t, k], x[t])
        y[t] += gates[t, k] * out
        sums[index[t, k]] += gates[t, k] * out
        d_gates[t, k] = g[t] @ out
        reference.add_expert_gradient(d, params, index[t, k], x, t, gates[t, k] * g[t])
    return {"y": y, "sums": sums, "d_x": d.x, "d_gates": d_gates, "d_gate": d.gate, "d_up": d.up, "d_down": d.down}


@pytest.mark.parametrize("route", ["drawn uniformly", "half of the experts idle", "all tokens on the same experts"])
@pytest.mark.parametrize("odd_width", [False, True])
@pytest.mark.parametrize("backend,dtype", CASES)
def test_experts_and_gradients_equal_float64(backend, dtype, odd_width, route):
    on_cpu = jax.default_backend() == "cpu"
    tokens, num_experts, d_model, width = (24, 4, 16, 8) if on_cpu else (512, 8, 256, 384)
    width -= odd_width * (3 if on_cpu else 64)  # 320 is no multiple of 128
    x, params, _, g = make_inputs(0, tokens, num_experts, d_model, width)
    rng = np.random.default_rng(1)
    used = {"drawn uniformly": num_experts, "half of the experts idle": num_experts // 2}.get(route, K)
    index = np.argsort(rng.random((tokens, used)), axis=1)[:, :K].astype(np.int32)
    gates = rng.random((tokens, K)).astype(np.float32)
    x, g, *weights = (jnp.asarray(a, dtype) for a in (x, g, params.gate, params.up, params.down))

    @jax.jit
    def both(x, gates, weights):
        def objective(x, gates, weights):
            layout = lay_out(jnp.asarray(index), num_experts, backend)
            y, sums = run_experts(x, gates, gates, weights, layout, num_experts, backend)
            return (y * g.astype(jnp.float32)).sum(), (y, sums)

        return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(x, gates, weights)

    (d_x, d_gates, d_weights), (y, sums) = both(x, gates, ExpertParams(*weights))
    x, g, *weights = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, g, *weights))
    wanted = expected(x, gates.astype(np.float64), index, reference.Params(params.kernel, *weights), g)
    for (name, value), got in zip(wanted.items(), (y, sums, d_x, d_gates, *d_weights), strict=True):
        assert_close(got.astype(jnp.float32), value, name, ALLOWED[dtype])
