"""The layer on one device against naive loops over tokens and experts: outputs, default vectors, losses, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers, reference
from helpers.layers import batched, check_step, inputs, make_config, run, settings_of
from helpers.reference import Params, assert_close

from default_moe.moe import MoELayer
from default_moe.moe.layer import Router

SIZES = [(1, 1), (2, 1), (2, 2), (4, 3), (8, 1), (8, 2), (8, 5), (8, 8)]
# The tests below that share a variant cover it with the other backend.
VARIANTS = [
    {"ema_weighted": False, "matmul": "ragged"},
    {"substitute": "backward", "matmul": "ragged"},
    {"substitute": "backward", "ema_weighted": False, "matmul": "blocks"},
    {"router": "topk", "matmul": "ragged"},
    {"expert_gradient": True, "matmul": "ragged"},
    {"expert_gradient": True, "matmul": "blocks"},
    {"expert_gradient": True, "ema_weighted": False, "ema_update": "after", "matmul": "ragged"},
    {"expert_gradient": True, "ema_weighted": False, "substitute_ramp_steps": 4, "matmul": "blocks"},
]


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize("num_experts,top_k", SIZES)
def test_every_size_equals_the_loops(num_experts, top_k, matmul):
    for seed in (0, 1):
        expected, _, _ = check_step(make_config(num_experts, top_k, matmul=matmul), *inputs(seed, num_experts))
        reference.assert_no_near_ties(expected.routes)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_variant_equals_the_loops(fields):
    check_step(make_config(**fields), *inputs(2))


# What the kernel's first row is for some experts, and the experts that no token chooses then.
STARVED = [({0: -9}, [0]), ({7: -9}, [7]), ({2: -9, 3: -9, 4: -9}, [2, 3, 4])]
FAVOURED = [({0: 8}, [1, 2, 3, 4, 5, 6, 7]), ({5: 8}, [0, 1, 2, 3, 4, 6, 7])]


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize(
    "top_k,first_row,idle", [(k, *one) for k in (1, 2) for one in STARVED] + [(1, *one) for one in FAVOURED], ids=str
)
def test_idle_experts_keep_their_vectors_and_get_no_gradient(top_k, first_row, idle, matmul):
    x, params, ema, g = inputs(3)
    params.kernel[0, list(first_row)] = list(first_row.values())
    expected, state, grads = check_step(make_config(8, top_k, matmul=matmul), x, params, ema, g)
    idle = np.array(idle)
    np.testing.assert_array_equal(expected.counts[idle], 0)
    np.testing.assert_array_equal(state["default_vectors"]["ema"][idle], ema[idle])
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(grads["experts"][name][idle], 0)
    assert np.abs(grads["router"]["kernel"][:, idle]).max() > 0  # yet their router columns learn


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
def test_of_equal_experts_the_lower_index_wins(matmul):
    """Columns 1, 4 and 6 are equal. Small integers make logits exact in float32: the ties are true ones."""
    x, params, ema, g = inputs(5)
    x, kernel = np.round(x), np.round(4 * params.kernel) / 4
    kernel[:, [4, 6]] = kernel[:, [1]]
    kernel[0, [1, 4, 6]] += 1
    expected, _, _ = check_step(make_config(matmul=matmul), x, params._replace(kernel=kernel), ema, g)
    assert [1, 4] in expected.routes.active
    assert expected.counts[6] == 0


@pytest.mark.parametrize("fields", [{}, {"ema_weighted": False}], ids=str)
def test_steps_in_a_row(fields):
    """Float32 default vectors follow the float64 ones over several steps, each starting where the last one ended."""
    config, ema = make_config(matmul="blocks", **fields), np.zeros((8, layers.D_MODEL))
    _, params, _, _ = inputs(6)
    variables = layers.variables_of(config, params, ema)
    for step in range(4):
        x, _, _, g = inputs(60 + step)
        expected = reference.forward(x, params, ema, settings_of(config))
        _, (y, _, state) = layers.compiled(config)(variables, batched(x), batched(g), None)
        assert_close(y, batched(expected.y), f"y of step {step}")
        assert_close(state["default_vectors"]["ema"], expected.ema, f"EMA after step {step}")
        variables, ema = variables | state, expected.ema


@pytest.mark.parametrize("dtype,fields", [(bool, {}), (np.float32, {"ema_weighted": False, "substitute": "backward"})])
def test_masked_tokens_count_in_no_statistic_but_are_processed(dtype, fields):
    config = make_config(matmul="blocks", **fields)
    x, params, ema, g = inputs(7)
    mask = (np.arange(layers.TOKENS) % 3 != 0).astype(dtype)
    expected, _, _ = check_step(config, x, params, ema, g, mask)
    assert expected.counts.sum() == 2 * 16  # K = 2 for each of the 16 of 24 tokens that are kept
    assert (np.abs(expected.y).max(axis=1) > 0).all()
    check_step(config, x, params, ema, g, np.ones(layers.TOKENS, dtype))
    expected, state, _ = check_step(config, x, params, ema, g, np.zeros(layers.TOKENS, dtype))
    np.testing.assert_array_equal(state["default_vectors"]["ema"], ema)


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
def test_masked_tokens_may_hold_anything(matmul):
    """Not even NaN or infinity reach vectors, other tokens or gradients: such tokens are taken as zeros."""
    config = make_config(matmul=matmul, router_z_weight=0.1, sequence_balance_weight=0.1)
    x, params, ema, g = inputs(7)
    mask = np.arange(layers.TOKENS) % 3 != 0
    cleared = x.copy()
    cleared[[0, 12]] = 0
    x[0], x[12, 3], x[12, 4] = np.nan, np.inf, -np.inf
    got, ((d_variables, d_x), results) = (run(config, a, params, ema, g, mask) for a in (x, cleared))
    d_x = d_x.at[0, 0].set(0).at[1, 0].set(0)  # tokens 0 and 12 of 2 x 12
    jax.tree.map(np.testing.assert_array_equal, got, ((d_variables, d_x), results))
    check_step(config, cleared, params, ema, g, mask)


NORMALIZED = {"score_function": "sigmoid", "normalize_weights": True}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router": "topk"},
        {"substitute": "backward"},
        {"router": "topk", **NORMALIZED},
        {"router": "dense", **NORMALIZED},
        {"router": "remoe"},
    ],
    ids=str,
)
def test_gradients_equal_finite_differences_with_the_ema_held(fields):
    """Backward substitution has, by definition, the gradient of the forward-substituted function."""
    config = make_config(matmul="blocks", **fields)
    x, params, ema, g = inputs(8)
    s = settings_of(config)
    result = reference.forward(x, params, ema, s)
    by_hand = layers.gradients_of(config, x, params, result, s, g)
    (d_variables, d_x), _ = run(config, x, params, ema, g)
    d_params = d_variables["params"]
    by_layer = {"x": d_x.reshape(layers.TOKENS, layers.D_MODEL), **d_params["router"], **d_params["experts"]}
    arrays = {"x": x, **params._asdict()}
    # Constants of the losses: shares of assignments, and numbers of open gates.
    f = result.counts / result.counts.sum()
    open_gates = 8 / (s.top_k * layers.TOKENS**2) * result.counts if s.router == "remoe" else 0 * f

    def value(**changed) -> float:
        at = arrays | changed
        r = reference.forward(at["x"], Params(*(at[n] for n in Params._fields)), result.ema, forward, update=False)
        assert r.routes.active == result.routes.active
        balance = 8 * f @ r.routes.probs.mean(axis=0)
        sparsity = r.routes.weights.sum(axis=0) @ open_gates
        losses = layers.BALANCE_WEIGHT * balance + layers.Z_WEIGHT * r.z_loss + layers.SPARSITY_WEIGHT * sparsity
        return float((g * r.y).sum()) + losses

    forward, rng, h = s._replace(substitute="forward"), np.random.default_rng(0), 1e-6
    for name, array in arrays.items():
        # Whole random directions see every entry at once, single entries show which one is wrong.
        steps = [rng.normal(size=array.shape) for _ in range(3)]
        for flat in rng.choice(array.size, 5, replace=False):
            steps.append(np.zeros(array.shape))
            steps[-1].flat[flat] = 1
        for step in steps:
            slope = (value(**{name: array + h * step}) - value(**{name: array - h * step})) / (2 * h)
            # float64: values of order 100 round at 1e-14, over 2h = 2e-6 that is 1e-8.
            np.testing.assert_allclose((getattr(by_hand, name) * step).sum(), slope, rtol=1e-6, atol=1e-6, err_msg=name)
            size = np.abs(by_layer[name] * step).max() + np.abs(by_layer[name]).max()
            np.testing.assert_allclose((by_layer[name] * step).sum(), slope, rtol=1e-5, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("weighted", [True, False])
def test_with_means_for_vectors_the_experts_gradient_is_the_true_one(weighted):
    """With a decay of 0 the vectors are the means: then the straight-through gradient is that of y, by differences.

    Moving experts' weights moves no routing; the weights in the means are constants.
    """
    x, params, ema, g = inputs(12)
    config = make_config(matmul="blocks", expert_gradient=True, ema_decay=0.0, ema_weighted=weighted)
    _, _, got = check_step(config, x, params, ema, g)
    s, rng, h = settings_of(config), np.random.default_rng(1), 1e-6
    for name in ("gate", "up", "down"):
        step = rng.normal(size=getattr(params, name).shape)

        def value(shift: float, name=name, step=step) -> float:
            moved = params._replace(**{name: getattr(params, name) + shift * step})
            return float((g * reference.forward(x, moved, ema, s).y).sum())

        slope = (value(h) - value(-h)) / (2 * h)
        np.testing.assert_allclose((np.asarray(got["experts"][name], np.float64) * step).sum(), slope, rtol=1e-5)


def test_bfloat16_is_near_float32():
    """Same float32 routing; experts and combine in bfloat16, which rounds at 2^-9 = 0.2 % (round to nearest: 2^-8).

    The forward pass rounds about 8 times in a row (x, three weights, two projections, their product, the output), the
    backward pass about twice that. If all errors added up, 8 * 2^-8 = 3 % of the norm, and 6 %.
    """
    full = make_config(matmul="blocks")
    half = dataclasses.replace(full, dtype="bfloat16")
    grads, (y, aux, state) = run(full, *inputs(9))
    grads_half, (y_half, aux_half, state_half) = run(half, *inputs(9))
    assert state_half["default_vectors"]["ema"].dtype == jnp.float32
    np.testing.assert_array_equal(aux["router_probs"], aux_half["router_probs"])
    assert np.abs(y_half - y).max() > 1e-4  # it does compute in bfloat16

    def check_norms(got, expected, bound):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)

    check_norms((grads_half[0]["params"], grads_half[1]), (grads[0]["params"], grads[1]), 0.06)
    check_norms((y_half, state_half), (y, state), 0.03)


def test_router_logits_of_bfloat16_tokens_are_float32():
    """Weights and products rounded at 2^-9 would be wrong by 1e-3 of the largest term."""
    x, params, _, _ = inputs(9)
    x = batched(x, jnp.bfloat16)
    logits = Router(8, None).apply({"params": {"kernel": jnp.float32(params.kernel)}}, x)
    assert logits.dtype == jnp.float32
    assert_close(logits, np.asarray(x, np.float64) @ params.kernel)


def test_bfloat16_means_are_true_means():
    """All tokens equal: any weighted mean of an expert's outputs is that output, as the unweighted mean is.

    Both are sums of the same bfloat16 rows in float32, so they agree to float32 accuracy.
    """
    x, params, _, _ = inputs(10)
    x[:] = x[0]
    ema = {}
    for weighted in (True, False):
        config = make_config(matmul="blocks", dtype="bfloat16", ema_weighted=weighted)
        variables = layers.variables_of(config, params, np.zeros((8, layers.D_MODEL)))
        _, (_, _, state) = layers.compiled(config)(variables, batched(x), batched(x), None)
        ema[weighted] = np.asarray(state["default_vectors"]["ema"])
    assert np.abs(ema[False]).max() > 0
    assert_close(ema[True], ema[False], "weighted against unweighted mean")


def test_bfloat16_input_gives_bfloat16_output():
    config = make_config()
    x, params, ema, _ = inputs(9)
    apply = functools.partial(MoELayer(config).apply, train=False)
    y, aux = jax.eval_shape(apply, layers.variables_of(config, params, ema), batched(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert aux["router_probs"].dtype == jnp.float32


@pytest.mark.parametrize("fields", [{}, {"substitute": "backward"}, {"substitute_at_eval": False}], ids=str)
def test_evaluation_uses_the_held_vectors_or_none_and_changes_nothing(fields):
    config = make_config(matmul="blocks", **fields)
    x, params, ema, g = inputs(11)
    s = settings_of(config)
    if not config.default_vectors.substitute_at_eval:
        s = s._replace(router="topk")
        check_step(config, x, params, ema, g)  # training is as ever
    expected = reference.forward(x, params, ema, s, update=False)
    _, (y, aux, state) = run(config, x, params, ema, g, train=False)
    assert_close(y, batched(expected.y), "y")
    assert_close(aux["load_balance_loss"], expected.load_balance_loss)
    # Even where the caller lets the collection change, as here, it comes back as it was.
    np.testing.assert_array_equal(state["default_vectors"]["ema"], np.float32(ema))
