"""The language model: causality, initialisation, equivalence of its many ways to run, size."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict
from helpers.layers import with_settings

from configs import paper
from default_moe.config import Config, ModelConfig, MoEConfig
from default_moe.model.attention import rotary_embedding
from default_moe.model.language_model import LanguageModel, look_up
from default_moe.model.norms import make_norm
from default_moe.model.size import parameter_counts, train_flops_per_token
from default_moe.moe.experts.swiglu import swiglu_hidden

VOCAB = 31
MODEL = ModelConfig(d_model=16, num_layers=3, num_heads=2)
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=24)
BACKWARD = {"substitute": "backward"}


def build(model_config=MODEL, moe_config=MOE, seed=0):
    model = LanguageModel(model_config, moe_config, VOCAB)
    variables = init(model, seed)
    return model, {"params": variables["params"], "default_vectors": noise(variables["default_vectors"])}


@functools.cache
def init(model, seed=0):
    return jax.jit(lambda: model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32), train=False))()


@functools.cache
def compiled(model, **options):
    """`model.apply` of variables, tokens and other inputs: one function for all tests, so that each shape of its
    arguments is compiled once."""
    return jax.jit(lambda v, t, i: model.apply(v, t, train=False, **i, **options))


def forward(model, variables, tokens, **inputs):
    """Logits and statistics, compiled: much faster than operation by operation."""
    return compiled(model)(variables, tokens, inputs)


def noise(tree, seed=5):
    """Default vectors that are not zero, so that their part in the output is tested."""
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), tree)


def some_tokens(batch=2, length=12, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)), jnp.int32)


def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_no_logit_depends_on_a_later_token():
    model, variables = build()
    tokens = jnp.arange(2 * 12, dtype=jnp.int32).reshape(2, 12)  # all different, so that gradients tell them apart

    def logits_at(embed, position):
        params = {**variables["params"], "embed": embed}
        return model.apply({**variables, "params": params}, tokens, train=False)[0][:, position].sum()

    gradient_at = jax.jit(jax.grad(logits_at))
    for position in (0, 5, 11):
        gradient = gradient_at(variables["params"]["embed"], position)[tokens]
        reach = np.abs(gradient).sum(axis=(0, 2))
        assert np.all(reach[: position + 1] > 0)
        np.testing.assert_array_equal(reach[position + 1 :], 0)


@pytest.mark.parametrize(("settings", "depends"), [({}, True), ({"ema_update": "after"}, False), (BACKWARD, False)])
def test_in_training_the_vectors_alone_bring_something_of_later_tokens(settings, depends):
    """Updated with the very batch, as in the paper, they hold outputs for all of its tokens."""
    model = LanguageModel(MODEL, with_settings(MOE, **settings), VOCAB)
    _, variables = build()
    tokens = some_tokens()
    train = jax.jit(lambda tokens: model.apply(variables, tokens, train=True, mutable=["default_vectors"])[0][0])
    change = jnp.abs(train(tokens.at[:, -1].add(1) % VOCAB) - train(tokens))
    assert float(change[:, -1].max()) > 0.1
    assert bool(change[:, :-1].max() > 1e-3) == depends


def test_masked_documents_do_not_see_each_other():
    model, variables = build()
    tokens = some_tokens(batch=1, length=10)
    segments = jnp.asarray([[1] * 6 + [2] * 4])
    whole, _ = forward(model, variables, tokens, segment_ids=segments)
    alone, _ = forward(model, variables, tokens[:, 6:])
    np.testing.assert_allclose(whole[:, 6:], alone, atol=1e-5)
    across, _ = forward(model, variables, tokens)
    assert np.abs(across[:, 6:] - alone).max() > 1e-3


@functools.cache
def value_and_gradient(config):
    """Variables, the value of a loss, default vectors after it, and its gradient."""
    model = LanguageModel(config, MOE, VOCAB)
    variables = init(model)
    params, vectors = variables["params"], noise(variables["default_vectors"])

    def loss(params):
        (logits, stats), mutated = model.apply(
            {"params": params, "default_vectors": vectors}, some_tokens(), train=True, mutable=["default_vectors"]
        )
        return jnp.square(logits).sum() + stats.load_balance_loss.sum(), mutated

    (value, mutated), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return variables, value, mutated, grads


@pytest.mark.parametrize("change", [{"scan_unroll": 2}, {"remat": "full"}, {"remat": "dots"}])
def test_unrolling_and_rematerialisation_change_neither_results_nor_names(change):
    plain, changed = value_and_gradient(MODEL), value_and_gradient(dataclasses.replace(MODEL, **change))
    assert paths(plain[0]) == paths(changed[0])
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * (1 + float(np.abs(a).max())))


@pytest.mark.parametrize("segments", [[12], [6, 6], [1] * 12, [6, 1, 1, 1, 1, 1, 1], [1, 6, 1, 1, 1, 1, 1]])
def test_decoding_with_a_cache_equals_the_forward_pass(segments):
    model, variables = build()
    tokens = some_tokens(batch=2, length=12)
    expected, _ = forward(model, variables, tokens)
    decode = compiled(model, cache_length=15, mutable=("cache",))
    cache, start, parts = {}, 0, []
    for length in segments:
        inputs = {"positions": jnp.broadcast_to(start + jnp.arange(length), (2, length))}
        (logits, _), cache = decode({**variables, **cache}, tokens[:, start : start + length], inputs)
        parts.append(logits)
        start += length
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=1e-5, atol=1e-5)


def test_rotary_embedding_makes_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [rotary_embedding(x, jnp.full((1, 1), p), 10_000.0) for x, p in ((q, i), (k, j))]
        return float((at[0] * at[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    np.testing.assert_allclose(rotary_embedding(q, jnp.zeros((1, 1), jnp.int32), 10_000.0), q, rtol=1e-6)


def test_rotary_angles_are_exact_for_bfloat16_far_from_the_start():
    """In bfloat16 positions above 256 are not whole numbers: an angle would be wrong by up to 4, a result entirely."""
    rng, positions = np.random.default_rng(0), np.array([[0, 257, 1003, 1021]])
    x = jnp.asarray(rng.normal(size=(1, 4, 2, 8)), jnp.bfloat16)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    angles = positions[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )
    found = np.asarray(rotary_embedding(x, jnp.asarray(positions), 10_000.0), np.float64)
    # The result is rounded at 2^-9. Angles of 1000 are rounded at 2^-15 in float32.
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=4 * 2**-14)


def test_initial_standard_deviations_are_the_papers():
    config = ModelConfig(d_model=64, num_layers=4, num_heads=4)
    model = LanguageModel(config, MoEConfig(num_experts=8, expert_dim=96), 500)
    params = init(model)["params"]
    small = (2 / (5 * 64)) ** 0.5  # sqrt(2 / (5 D))
    merging = 2 / (4 * 64**0.5)  # 2 / (L sqrt(D))
    layers, dense_ffn = params["moe_layers"], params["dense_layers"]["ffn"]
    for array, expected in (
        *((a, small) for a in (params["embed"], params["head"], layers["attention"]["query"]["kernel"])),
        *((a, small) for a in (layers["moe"]["router"]["kernel"], dense_ffn["up"]["kernel"])),
        *((layers["moe"]["experts"][name], small) for name in ("gate", "up")),
        (layers["attention"]["out"]["kernel"], merging),
        (layers["moe"]["experts"]["down"], merging),
        (dense_ffn["down"]["kernel"], merging),
    ):
        # The relative error of a standard deviation from n samples is 1 / sqrt(2 n); four of them.
        assert float(array.std()) == pytest.approx(expected, rel=4 / (2 * array.size) ** 0.5)
    assert not np.allclose(layers["moe"]["experts"]["up"][0], layers["moe"]["experts"]["up"][1])


def test_the_routers_initial_scale_can_be_set_alone():
    configs = MOE, dataclasses.replace(MOE, router_init_std=0.5)
    small, other = (flatten_dict(init(LanguageModel(MODEL, config, VOCAB))["params"]) for config in configs)
    for name, array in small.items():
        scale = 0.5 / (2 / (5 * 16)) ** 0.5 if "router" in name else 1
        np.testing.assert_allclose(other[name], scale * array, rtol=1e-6)


def shapes_of(model_config):
    """Of the variables, and of logits and statistics for `some_tokens`. Nothing is compiled."""
    model = LanguageModel(model_config, MOE, VOCAB)

    def init_and_apply():
        variables = model.init(jax.random.key(0), some_tokens(), train=False)
        return variables, model.apply(variables, some_tokens(), train=False)

    return jax.eval_shape(init_and_apply)


def test_tied_embeddings_have_no_head():
    variables, (logits, _) = shapes_of(dataclasses.replace(MODEL, tie_embeddings=True))
    assert "head" not in variables["params"]
    assert logits.shape == (2, 12, VOCAB)


@pytest.mark.parametrize("dense_layers", [0, 1, 3])
def test_leading_layers_are_dense(dense_layers):
    variables, (_, stats) = shapes_of(dataclasses.replace(MODEL, num_dense_layers=dense_layers))
    assert ("dense_layers" in variables["params"]) == (dense_layers > 0)
    assert ("moe_layers" in variables["params"]) == (dense_layers < 3)
    assert (stats is None) if dense_layers == 3 else stats.tokens_per_expert.shape == (3 - dense_layers, 4)


def test_bfloat16_is_close_to_float32():
    """With every expert active, since rounding may otherwise send a token elsewhere."""
    everyone = dataclasses.replace(MOE, top_k=4)
    low = build(dataclasses.replace(MODEL, dtype="bfloat16"), dataclasses.replace(everyone, dtype="bfloat16"))
    high = build(MODEL, everyone)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low[1]))
    tokens = some_tokens()
    a, _ = forward(*low, tokens)
    b, _ = forward(*high, tokens)
    assert a.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a relative error of 2^-8 at each of some ten roundings in a row.
    assert float(jnp.abs(a - b).max()) < 10 * 2**-8 * float(jnp.abs(b).max())


def test_the_gradient_of_the_embedding_is_summed_in_float32():
    """A sum in bfloat16 would stop growing at 256 times its terms, far from the 3,000 of the commonest token here."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.integers(8, size=(4, 1024)), rng.integers(8, size=(4, 1024)) // 6)
    g = jnp.asarray(1 + rng.random((4, 1024, 3)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(8, 3)), jnp.bfloat16)
    out, back = jax.vjp(lambda table: look_up(table, jnp.asarray(tokens), 8), table)
    np.testing.assert_array_equal(out, table[tokens])
    (found,) = back(g)
    expected = np.zeros((8, 3))
    np.add.at(expected, tokens, np.asarray(g, np.float64))
    assert found.dtype == jnp.bfloat16 and (tokens == 0).sum() > 3000
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8)


def test_the_embedding_learns_as_much_in_bfloat16_as_in_float32():
    """From a text that is one token 2,048 times, so that its row's gradient is the sum of as many terms."""
    tokens = jnp.zeros((4, 512), jnp.int32)

    def gradient(dtype):
        model = LanguageModel(ModelConfig(d_model=16, num_layers=1, num_heads=2, dtype=dtype), MOE, VOCAB)
        params = init(model)["params"]

        def objective(embed):
            logits, _ = model.apply({"params": {**params, "embed": embed}}, tokens, train=False)
            return logits.mean(axis=(0, 1)).std() * 1000

        return np.asarray(jax.jit(jax.grad(objective))(params["embed"]))[0]

    low, high = gradient("bfloat16"), gradient("float32")
    assert np.linalg.norm(low - high) < 0.1 * np.linalg.norm(high)


def test_what_the_backward_pass_keeps_is_in_the_compute_dtype():
    """Of a SwiGLU its two factors, of a norm its input and parameters: no copies of them in float32."""
    x, up = (jax.random.normal(jax.random.key(i), (64, 32), jnp.bfloat16) for i in range(2))

    def kept(function, *args):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(function, *args)[1]))

    assert kept(swiglu_hidden, x, up) == x.nbytes + up.nbytes
    for kind in ("layer", "rms"):
        norm = make_norm(dataclasses.replace(MODEL, dtype="bfloat16", norm=kind), "norm")
        variables = unbox(norm.init(jax.random.key(2), x))
        assert kept(norm.apply, variables, x) <= x.nbytes + 2 * 4 * 32 + 64  # and a few numbers such as epsilon


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_of_a_large_mean_is_that_in_float64(dtype):
    """Of numbers 1000 + noise the difference of means of squares would be off by about 1e6 * 2^-24 = 0.06 of 1."""
    x = jnp.asarray(1000 + np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
    norm = make_norm(dataclasses.replace(MODEL, dtype=dtype), "norm")
    x64 = np.asarray(x, np.float64)
    centred = x64 - x64.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + MODEL.norm_epsilon)
    found = np.asarray(norm.apply(unbox(norm.init(jax.random.key(0), x)), x), np.float64)
    # Sums of 64 numbers near 1000 are rounded at 2^-9, a few times: the mean is known to about 1e-4.
    np.testing.assert_allclose(found, expected, atol=5e-4, rtol=2**-8 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("8c1", 1.96e9, 565e6),
        ("8c2", 1.96e9, 764e6),
        ("32c1", 1.96e9, 416e6),
        ("32c2", 1.96e9, 466e6),
        ("32c4", 1.96e9, 565e6),
        ("8c1,d_model=512", 557e6, None),
        ("8c1,d_model=2048", 7.33e9, None),
    ],
)
def test_parameter_counts_are_the_papers_within_1_5_percent(name, total, active):
    config = paper.get_config(name)
    config.data.files = "*.parquet"
    counts = parameter_counts(Config.from_config_dict(config), vocab_size=128_256)
    assert counts.total == pytest.approx(total, rel=0.015)
    if active:
        assert counts.active == pytest.approx(active, rel=0.015)


def test_training_flops_are_six_per_active_parameter_and_attention():
    config = Config(model=MODEL, moe=MOE)
    d, f, n, k, v, length = 16, 24, 4, 2, VOCAB, config.train.sequence_length
    norms = (2 * 3 + 1) * 2 * d
    matrices = 3 * 4 * d * d + 3 * d * f + 2 * (d * n + k * 3 * d * f) + d * v
    assert train_flops_per_token(config, VOCAB) == 6 * (matrices + norms) + 12 * 3 * d * length


def test_grouped_heads_of_a_size_of_their_own_are_counted():
    """And a window: a token sees as many positions."""
    model = dataclasses.replace(
        MODEL, norm="rms", qk_norm="full", num_heads=4, num_kv_heads=2, head_dim=6, attention_window=5
    )
    config = Config(model=model, moe=MOE)
    d, f, n, k, v, heads = 16, 24, 4, 2, VOCAB, 4 * 6
    norms = (2 * 3 + 1) * d + 3 * (heads + heads // 2)
    attention = d * (heads + 2 * heads // 2 + heads)
    matrices = 3 * attention + 3 * d * f + 2 * (d * n + k * 3 * d * f) + d * v
    assert parameter_counts(config, VOCAB).active == matrices + norms + v * d
    assert train_flops_per_token(config, VOCAB) == 6 * (matrices + norms) + 12 * 3 * heads * 5


def test_rematerialising_all_but_products_runs_no_expert_again():
    """Experts run in three loops in each direction, over experts, large and small blocks; "full" runs three again."""
    loops = {}
    for remat in ("none", "dots", "full"):
        model = LanguageModel(dataclasses.replace(MODEL, remat=remat), MOE, VOCAB)
        variables = jax.eval_shape(partial(model.init, train=True), jax.random.key(0), some_tokens())

        def loss(params, vectors, model=model):
            apply = partial(model.apply, train=True, mutable=["default_vectors"])
            (logits, _), state = apply({"params": params, "default_vectors": vectors}, some_tokens())
            return logits.sum(), state

        jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(variables["params"], variables["default_vectors"])
        loops[remat] = str(jaxpr).count("while[")
    assert loops == {"none": 6, "dots": 6, "full": 9}
