"""Every method of training a router, and every option of the layer, against naive loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import layers, reference, sharded_layers
from helpers.emulation import emulate_exchange
from helpers.layers import batched, check_step, inputs, make_config, moe_config, run, settings_of
from helpers.reference import assert_close

from default_moe.config import Config, ModelConfig
from default_moe.errors import ConfigError
from default_moe.methods import METHODS, RouterInputs, routing
from default_moe.model.size import parameter_counts
from default_moe.moe import MoELayer
from default_moe.moe.experts.parallel import resolve_expert_parallel
from default_moe.moe.layer import initial_router_state
from default_moe.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("tokamax_everywhere")

SIGMOID, NORMALIZED = {"score_function": "sigmoid"}, {"normalize_weights": True}
CASES = [
    {"router": "dense"},
    {"router": "dense", "matmul": "blocks", **SIGMOID, **NORMALIZED},
    {"router": "densemixer", "matmul": "blocks"},
    {"router": "densemixer"},
    {"router": "densemixer", "top_k": 1, **NORMALIZED},
    {"router": "densemixer", "matmul": "blocks", **SIGMOID, **NORMALIZED},
    {"router": "densemixer", "top_k": 8},
    {"router": "remoe", "matmul": "blocks"},
    {"router": "remoe"},
    {"router": "loss_free", "matmul": "blocks"},
    {"router": "expert_threshold", **SIGMOID, **NORMALIZED},
    {"router": "default_threshold", "matmul": "blocks", "substitute_ramp_steps": 8, "expert_gradient": True},
    {"router": "hash", "capacity_factor": 1.0},
    {"router": "frozen", "matmul": "blocks", **NORMALIZED},
    {"router": "loss_free", **SIGMOID, **NORMALIZED},
    {"router": "topk", **NORMALIZED},
    {"router": "topk", "matmul": "blocks", "sequence_balance_weight": 1.0, **SIGMOID},
    {"router": "default", **SIGMOID},
    {"router": "default", "substitute": "backward", **SIGMOID, **NORMALIZED},
    {"router": "default", "ema_update": "after"},
    {"router": "default", "substitute_ramp_steps": 8, "matmul": "blocks"},
    {"router": "default", "capacity_factor": 1.0, "matmul": "blocks"},
    {"router": "topk", "capacity_factor": 0.5},
    {"router": "loss_free", "capacity_factor": 1.0, "sequence_balance_weight": 1.0},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_every_method_equals_the_loops(fields):
    fields = {"top_k": 2, "matmul": "ragged", **fields}
    expected, _, _ = check_step(make_config(**fields), *inputs(31))
    routes = expected.routes
    if fields["router"] == "remoe":
        assert {len(chosen) for chosen in routes.chosen} > {2, 3, 4}  # as many as there are open gates
    if fields["router"] == "default_threshold":
        above = [(token.probs > layers.THRESHOLDS).sum() for token in routes.tokens]
        assert set(above) >= {0, 1, 2}  # where none is above its threshold, the likeliest runs
    if fields["router"] == "loss_free":
        x, params, _, _ = inputs(31)
        plain = reference.route(x, params.kernel, settings_of(make_config(**fields))._replace(router="topk"))
        assert sum(a != b for a, b in zip(routes.chosen, plain.chosen, strict=True)) > 5
    if "capacity_factor" in fields:
        dropped = sum(len(a) - len(b) for a, b in zip(routes.chosen, routes.active, strict=True))
        assert dropped > 5


@pytest.mark.parametrize(
    "fields",
    [
        {"router": "remoe", "matmul": "blocks"},
        {"router": "default", "capacity_factor": 1.0, "sequence_balance_weight": 1.0, "matmul": "blocks"},
    ],
    ids=str,
)
def test_masked_tokens_count_in_no_loss_and_take_no_room(fields):
    mask = np.random.default_rng(0).integers(0, 2, layers.TOKENS, dtype=np.int32)
    check_step(make_config(**fields), *inputs(36), mask)


def test_scores_may_be_as_small_as_they_like():
    """Sigmoids of all experts, and the chosen ones alone, down to what float32 cannot hold."""
    for fields, logits, bias in (
        ({"router": "topk"}, [-200.0, -201.0, -250.0, -199.0], None),
        ({"router": "densemixer", **NORMALIZED}, [-200.0, -201.0, -250.0, -199.0], None),
        ({"router": "loss_free", **NORMALIZED}, [5.0, -120.0, -121.0, 5.0], [-1.0, 1.0, 1.0, -1.0]),
    ):
        config = moe_config(num_experts=4, top_k=2, **SIGMOID, **fields)
        state = {} if bias is None else {"bias": jnp.array(bias)}

        def chosen_and_distribution(logits, config=config, state=state):
            decision = config.method.route(RouterInputs(logits, state=state), config)
            weights = jnp.take_along_axis(decision.gates, decision.expert_index, axis=-1)
            return jnp.concatenate([weights, decision.probs], axis=-1).ravel()

        logits = jnp.array(logits).reshape(1, 1, 4)
        values, slopes = chosen_and_distribution(logits), jax.jacobian(chosen_and_distribution)(logits)
        assert np.isfinite(values).all() and np.isfinite(slopes).all()
        assert_close(values[2:].sum(), 1)
        if "normalize_weights" in fields:  # exp(-1) between the two, as for softmax
            first = 1 / (1 + np.exp(-1))
            assert_close(values[:2], [first, 1 - first])


@pytest.mark.parametrize("fields", [SIGMOID, {}], ids=str)
def test_experts_whose_scores_are_rounded_to_one_number_are_chosen_by_their_logits(fields):
    """Sigmoids of 18 and above are 1 in float32, those of -110 and below are 0, and so are such softmaxes."""
    for router in ("topk", "default", "densemixer"):
        config = moe_config(num_experts=4, top_k=2, router=router, **fields)
        logits = jnp.array(
            [[[20.0, 18.0, 30.0, 25.0], [-130.0, -112.0, -115.0, -111.0], [0.0, -400.0, -300.0, -500.0]]]
        )
        chosen = config.method.route(RouterInputs(logits), config).expert_index
        np.testing.assert_array_equal(chosen, [[[2, 3], [3, 1], [0, 2]]])


@pytest.mark.parametrize("largest", [-1e8, -1e4, 0.0, 1e8])
def test_normalized_weights_sum_to_one_wherever_the_logits_are(largest):
    """Of two equal scores each weighs a half. Float32 numbers near 1e8 are 8 apart: ln 2 added to one is lost."""
    for fields in (SIGMOID, {}):
        config = moe_config(num_experts=4, top_k=2, router="topk", **NORMALIZED, **fields)
        logits = jnp.array([[[largest, largest, largest - 1e6, largest - 1e7]]])
        weights = config.method.route(RouterInputs(logits), config).gates
        assert_close(weights[..., :2], [[[0.5, 0.5]]])


def test_capacity_is_rounded_up():
    """1 x 2 x 5 / 8 = 1.25, 1 x 2 x 12 / 8 = 3, 0.5 x 2 x 12 / 8 = 1.5.

    0.55 x 1 x 100 / 5 is 11, though in floats 0.55 x 100 is more than 55.
    """
    assert moe_config(num_experts=5, top_k=1, capacity_factor=0.55).capacity(100) == 11
    rooms = [moe_config(top_k=2, capacity_factor=f).capacity(n) for f, n in ((1.0, 5), (1.0, 12), (0.5, 12))]
    assert rooms == [2, 3, 2]
    assert moe_config().capacity(12) is None


@pytest.mark.parametrize("fields", [{"router": "topk", "sequence_balance_weight": 1.0}, {"router": "remoe"}], ids=str)
def test_the_auxiliary_loss_is_the_weighted_sum_of_all(fields):
    config = make_config(**fields, router_z_weight=0.0 if fields["router"] == "remoe" else 0.125)
    _, (_, aux, _) = run(config, *inputs(32))
    if fields["router"] == "remoe":
        assert_close(aux["auxiliary_loss"], 0.25 * aux["sparsity_loss"])  # lambda
        assert_close(aux["remoe_lambda"], 0.25)
    else:
        weighted = 0.01 * aux["load_balance_loss"] + 0.125 * aux["router_z_loss"] + aux["sequence_balance_loss"]
        assert_close(aux["auxiliary_loss"], weighted)


@pytest.mark.parametrize("router", METHODS)
def test_a_router_whose_weights_are_all_zero_learns_or_is_refused(router):
    config = make_config(router=router)
    state = initial_router_state(config)

    def gates(logits):
        inputs = RouterInputs(logits, token_ids=jnp.zeros((1, 1), jnp.int32), state=state)
        return config.method.route(inputs, config).gates

    slopes = jax.jacobian(gates)(jnp.zeros((1, 1, 8)))
    assert bool(jnp.abs(slopes).max() > 0) == config.method.learns_from_zero_logits
    make_config(router="remoe", router_init_std=0.0, router_noise_std=0.1)  # noise opens gates


# random numbers


def test_noise_on_the_logits_has_its_standard_deviation_in_training_alone():
    """Differences of log-probabilities are those of logits: noise of 0.5 on each gives them 0.5 sqrt(2).

    64 * 64 tokens, 7 differences that are correlated: the standard deviation is known to about 1 / sqrt(2 * 4096).
    """
    config = moe_config(num_experts=8, top_k=2, expert_dim=4, router="topk", router_noise_std=0.5)
    layer, x = MoELayer(config), jnp.ones((64, 64, 8))

    @jax.jit
    def log_probs(key):
        """In training, and at evaluation."""
        variables = layer.init(jax.random.key(0), x, train=True)
        applied = [layer.apply(variables, x, train=train, rngs={"router": key}) for train in (True, False)]
        return [jnp.log(aux["router_probs"]) for _, aux in applied]

    noisy, plain = map(np.asarray, log_probs(jax.random.key(1)))
    noise = noisy - plain
    differences = noise[..., 1:] - noise[..., :1]
    assert abs(differences.std() / (0.5 * 2**0.5) - 1) < 5 / (2 * 4096) ** 0.5
    assert abs(differences.mean()) < 5 * 0.5 * 2**0.5 / 64
    np.testing.assert_allclose(plain[0, 0], plain[-1, -1])


@pytest.mark.parametrize(
    "fields", [{"router": "sparsemixer", "mask_threshold": 0.45}, {"router": "probmoe"}, {"router_noise_std": 1.0}]
)
def test_random_numbers_are_the_same_on_any_mesh(fields):
    config, mesh = make_config(matmul="blocks", **fields), make_mesh(2, 2, 2)
    sharded = sharded_layers.arrays(config, mesh)
    expected_grads, (expected_y, expected_aux, _) = layers.compiled(config)(*jax.device_get(sharded))
    with jax.set_mesh(mesh):
        grads, (y, aux, _) = jax.jit(layers.gradient_of_step(config))(*sharded)
    np.testing.assert_array_equal(aux["expert_index"], expected_aux["expert_index"])
    assert_close(y, expected_y, "y")
    assert_close(grads[0]["params"]["router"]["kernel"], expected_grads[0]["params"]["router"]["kernel"], "router")
    assert_close(grads[1], expected_grads[1], "x")


# Meshes

EXCHANGED = {"expert_parallel": "exchange"}


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((2, 2, 2), {"router": "densemixer", "matmul": "blocks"}),
        ((1, 1, 8), {"router": "densemixer", "matmul": "ragged"}),
        ((2, 1, 4), {"router": "dense", "matmul": "ragged"}),
        ((2, 2, 2), {"router": "hash", "matmul": "blocks"}),
        ((2, 2, 2), {"router": "default_threshold", "matmul": "blocks"}),
        ((2, 2, 2), {"router": "remoe", "matmul": "blocks"}),
        ((2, 2, 2), {"router": "loss_free", "capacity_factor": 1.0, "sequence_balance_weight": 1.0}),
        ((2, 2, 2), {"capacity_factor": 1.0, "ema_update": "after", "substitute_ramp_steps": 8, "matmul": "ragged"}),
        ((2, 2, 2), {"capacity_factor": 1.0, "expert_gradient": True, "matmul": "blocks"}),
        ((2, 1, 4), {"router": "remoe", "matmul": "blocks", **EXCHANGED}),
        ((2, 2, 2), {"capacity_factor": 1.0, "ema_update": "after", "matmul": "ragged", **EXCHANGED}),
    ],
    ids=str,
)
def test_every_method_equals_the_loops_on_a_mesh(monkeypatch, sizes, fields):
    if fields.items() >= EXCHANGED.items():
        emulate_exchange(monkeypatch)
    sharded_layers.check_step(make_mesh(*sizes), make_config(**fields))


def test_an_exact_dense_gradient_is_not_exchanged_for(monkeypatch):
    emulate_exchange(monkeypatch)
    with jax.set_mesh(make_mesh(1, 2, 4)):
        assert resolve_expert_parallel(make_config(router="densemixer"), 4096, 12) == "gather"
        with pytest.raises(ConfigError, match="'densemixer' every expert needs every token"):
            resolve_expert_parallel(make_config(router="densemixer", **EXCHANGED), 4096, 12)


# What methods are to each other


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
def test_densemixers_router_gradient_is_the_dense_layers_at_the_same_output_gradient(matmul):
    """And its output and its experts' gradients are those of top-k, bit for bit."""
    x, params, ema, g = inputs(35)
    results = {}
    for router in ("dense", "densemixer", "topk"):
        layer = MoELayer(make_config(router=router, matmul=matmul))

        def objective(variables, layer=layer):
            y, _ = layer.apply(variables, batched(x), train=True)
            return (batched(g) * y).sum(), y

        results[router] = jax.jit(jax.grad(objective, has_aux=True))(layers.variables_of(layer.config, params, ema))
    kernels = {router: grads["params"]["router"]["kernel"] for router, (grads, _) in results.items()}
    assert_close(kernels["densemixer"], kernels["dense"], "gradient of the router")
    assert np.abs(kernels["topk"] - kernels["dense"]).max() > 0.1 * np.abs(kernels["dense"]).max()
    np.testing.assert_array_equal(results["densemixer"][1], results["topk"][1])
    for name, d in results["densemixer"][0]["params"]["experts"].items():
        np.testing.assert_array_equal(d, results["topk"][0]["params"]["experts"][name], name)


def test_a_dropped_expert_gives_its_default_vector_or_nothing():
    """A sequence of 4 tokens that are all alike: expert 0 with weight 3/4 has room for the first two of them."""
    x, one = jnp.ones((1, 4, 1)), jnp.ones((2, 1, 1))
    router, experts = {"kernel": jnp.array([[np.log(3.0), 0.0]])}, {"gate": one, "up": one, "down": one}
    for fields, filled_in, last in (
        ({"router": "topk"}, 0.0, 0.0),
        ({"router": "default", "ema_decay": 1.0}, 0.25 * 5, 0.75 * 9 + 0.25 * 5),
    ):
        config = moe_config(num_experts=2, top_k=1, expert_dim=1, capacity_factor=1.0, **fields)
        variables = {"params": {"router": router, "experts": experts}}
        if config.default_vectors:
            variables["default_vectors"] = {"ema": jnp.array([[9.0], [5.0]])}
        layer = MoELayer(config)

        @jax.jit
        def both(variables, layer=layer):
            trained, _ = layer.apply(variables, x, train=True, mutable=["default_vectors"])
            return trained, layer.apply(variables, x, train=False)

        (y, aux), (held_y, held_aux) = both(variables)
        out = 0.75 / (1 + np.exp(-1.0)) + filled_in  # silu(1) * 1 * 1
        assert_close(y[0, :, 0], [out, out, last, last])
        assert float(aux["dropped_fraction"]) == 0.5
        np.testing.assert_array_equal(aux["tokens_per_expert"], [4, 0])  # what was asked for
        assert_close(held_y[0, :, 0], [out] * 4)
        assert float(held_aux["dropped_fraction"]) == 0


def test_the_ramp_by_hand():
    """A quarter more of the vectors in each of 4 steps, then all of them."""
    config = moe_config(substitute_ramp_steps=4)
    states = ({"steps": jnp.int32(steps)} for steps in (0, 1, 4, 9))
    decisions = [config.method.route(RouterInputs(jnp.zeros((1, 1, 8)), state=state), config) for state in states]
    assert [float(decision.substitution) for decision in decisions] == [0, 0.25, 1, 1]


def test_capacity_by_hand():
    """Room for 2 of a sequence of 5. Expert 0 is chosen by tokens 0, 1, 3, 4, expert 1 by 0, 2, 4, expert 2 by 1, 2, 3.

    With token 1 masked it takes no room: token 3 is then the second for both experts that it chose.
    """
    index = jnp.array([[[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]]])
    kept = routing.within_capacity(index, 3, 2, None)
    np.testing.assert_array_equal(kept, [[[0, 1], [2, 0], [1, 2], [3, 3], [3, 3]]])
    kept = routing.within_capacity(index, 3, 2, jnp.array([[1, 0, 1, 1, 1]]))
    np.testing.assert_array_equal(kept, [[[0, 1], [2, 0], [1, 2], [0, 2], [3, 3]]])


def test_balance_of_sequences_by_hand():
    """Two sequences of two tokens, K = 1. The first: f = (1, 0), P = (3/4, 1/4), 2 f . P = 3/2; the second is even: 1.

    With the second token of the first masked: P = (1/2, 1/2), 1. With all of the second masked the first alone counts.
    """
    probs = jnp.array([[[0.5, 0.5], [1.0, 0.0]], [[0.75, 0.25], [0.25, 0.75]]])
    index = jnp.array([[[0], [0]], [[0], [1]]])
    assert_close(routing.sequence_balance_loss(probs, index, None), 1.25)
    assert_close(routing.sequence_balance_loss(probs, index, jnp.array([[1, 0], [1, 1]])), 1)
    assert_close(routing.sequence_balance_loss(probs, index, jnp.array([[1, 1], [0, 0]])), 1.5)
    assert float(routing.sequence_balance_loss(probs, index, jnp.zeros((2, 2)))) == 0


def test_shared_experts_add_a_dense_network_of_their_width():
    config, plain = make_config(router="topk", num_shared_experts=3), make_config(router="topk")
    layer = MoELayer(config, down_init_std=0.5)
    x = jax.random.normal(jax.random.key(0), (layers.BATCH, layers.LENGTH, layers.D_MODEL))
    variables = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(1), x)
    shared = {name: np.float64(p["kernel"]) for name, p in variables["params"]["shared_experts"].items()}
    assert shared["gate"].shape == (layers.D_MODEL, 3 * layers.EXPERT_DIM)
    assert 0.4 < shared["down"].std() < 0.6
    with_shared, without = (
        jax.jit(functools.partial(MoELayer(one).apply, train=False))(variables, x)[0] for one in (config, plain)
    )
    gate, up = np.float64(x) @ shared["gate"], np.float64(x) @ shared["up"]
    assert_close(with_shared, np.float64(without) + (gate * reference.sigmoid(gate) * up) @ shared["down"])
    model = ModelConfig(d_model=layers.D_MODEL, num_heads=2, num_layers=2)
    counts, counts_without = (parameter_counts(Config(moe=moe, model=model), 9) for moe in (config, plain))
    more = [a - b for a, b in zip(counts, counts_without, strict=True)]
    shared_size = 9 * layers.D_MODEL * layers.EXPERT_DIM
    assert more == [shared_size, shared_size, 0]  # total, active, experts
