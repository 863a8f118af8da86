"""The training step: its update, gradient accumulation, and steps that must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import steps
from helpers.steps import CONFIG, assert_trees_equal, change, copy, make_batch, new_state, program_for, step_of

from default_moe.config import OptimConfig
from default_moe.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

BACKWARD = change(CONFIG, moe={"substitute": "backward"})
# Without a balance loss microbatches do not interact.
TOPK = change(steps.WITH_DENSE_LAYER, moe={"router": "topk", "load_balance_weight": 0.0})
MUON = change(CONFIG, optim={"name": "muon"})


def accumulated(config):
    return change(config, train={"grad_accum_steps": 4})


def test_a_step_is_one_adamw_update_of_the_clipped_gradient():
    before, batch = new_state(steps.WITH_DENSE_LAYER), make_batch()

    def loss(params):
        (logits, stats), _ = program_for(steps.WITH_DENSE_LAYER).model.apply(
            {"params": params, **before.variables}, batch["inputs"], train=True, mutable=["default_vectors"]
        )
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        return nll + 0.01 * stats.load_balance_loss.sum()

    rate = learning_rate_schedule(steps.WITH_DENSE_LAYER.optim, 20)(0)
    decayed = decay_mask(before.params)

    @jax.jit  # by itself each operation on each parameter would be compiled
    def expect(params):
        value, grads = jax.value_and_grad(loss)(params)
        norm = optax.global_norm(grads)
        clipped = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)
        # Adam's first step, bias-corrected: m / sqrt(v) = g / |g|.
        expected = jax.tree.map(
            lambda p, g, d: p - rate * (g / (jnp.abs(g) + 1e-8) + (0.1 * p if d else 0)), params, clipped, decayed
        )
        return value, norm, clipped, expected

    value, norm, clipped, expected = expect(before.params)
    after, metrics = step_of(steps.WITH_DENSE_LAYER, batch=batch)
    assert float(metrics["total_loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(float(rate))
    for a, b, g in zip(*map(jax.tree.leaves, (after.params, expected, clipped)), strict=True):
        firm = np.abs(g) > 1e-6  # where the gradient is rounding noise its sign is too
        np.testing.assert_allclose(np.asarray(a)[firm], np.asarray(b)[firm], rtol=1e-4, atol=1e-6)
    assert (int(after.step), int(after.bad_steps)) == (1, 0)


def test_the_loss_falls_on_a_batch_seen_again_and_again():
    state, losses = None, []
    for _ in range(20):
        state, metrics = step_of(CONFIG, state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("config", [TOPK, CONFIG, MUON], ids=["topk", "default", "muon"])
@pytest.mark.parametrize("where", ["head", "embed"])
def test_a_step_that_is_not_finite_changes_nothing_but_is_counted(config, where):
    good, _ = step_of(config, batch=make_batch(1))
    bad = steps.poisoned(good, where)
    after, metrics = step_of(config, copy(bad), make_batch(2))
    assert not np.isfinite(float(metrics["loss"]))
    for name in ("params", "variables", "opt_state", "rng"):
        assert_trees_equal(getattr(after, name), getattr(bad, name))
    assert (int(after.step), int(after.bad_steps), int(after.bad_steps_in_row)) == (2, 1, 1)

    # The next good step is what it would have been, but for the count of steps.
    resumed, metrics = step_of(config, dataclasses.replace(after, params=copy(good.params)), make_batch(3))
    straight, expected = step_of(config, good, make_batch(3))
    assert_trees_equal(resumed.params, straight.params)
    assert_trees_equal(resumed.variables, straight.variables)
    assert float(metrics["learning_rate"]) == float(expected["learning_rate"])
    assert (int(resumed.step), int(resumed.bad_steps), int(resumed.bad_steps_in_row)) == (3, 1, 0)


def test_default_vectors_that_overflow_are_not_kept():
    """In backward-only mode the loss does not show it at once."""
    state = new_state(BACKWARD)
    overflown = jax.tree.map(lambda ema: jnp.full(ema.shape, jnp.inf), state.variables)
    after, metrics = step_of(BACKWARD, dataclasses.replace(state, variables=overflown))
    assert int(after.bad_steps_in_row) == 1
    assert np.isfinite(float(metrics["loss"]))


def test_an_update_that_overflows_is_not_kept():
    """The loss and gradient that led to it are finite; weights after it would not be, for their moments are huge."""
    state = new_state(CONFIG)
    clip, (adam, *others) = state.opt_state
    huge = adam._replace(mu=jax.tree.map(lambda m: jnp.full(m.shape, 3e38), adam.mu))
    state = dataclasses.replace(state, opt_state=(clip, (huge, *others)))
    after, metrics = step_of(CONFIG, copy(state))
    assert np.isfinite(float(metrics["total_loss"])) and np.isfinite(float(metrics["grad_norm"]))
    assert int(after.bad_steps_in_row) == 1
    for name in ("params", "opt_state", "variables"):
        assert_trees_equal(getattr(after, name), getattr(state, name))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """With a top-k router even unequal microbatches must add up."""
    batch = make_batch(4)
    batch["loss_mask"][0, :5] = batch["loss_mask"][3, 2:] = 0
    (state, metrics), (expected_state, expected) = (step_of(one, batch=batch) for one in (accumulated(TOPK), TOPK))
    for name in ("loss", "grad_norm", "total_loss", "bits_per_byte"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    np.testing.assert_array_equal(metrics["layers"].tokens_per_expert, expected["layers"].tokens_per_expert)
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected_state.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def equal_microbatches():
    """Of a batch of four: rows 0 to 3 and 4 to 7, of which microbatch m takes rows m and 4 + m."""
    batch = make_batch(4)
    batch["loss_mask"][0, :2] = 0
    return {name: rows[[0] * 4 + [4] * 4] for name, rows in batch.items()}


def unequal_microbatches():
    """No token of microbatch 2 counts, and of microbatch 1 half of them."""
    batch = make_batch(4)
    batch["loss_mask"][[2, 6]] = 0
    batch["loss_mask"][1] = 0
    return batch


BALANCED = change(TOPK, moe={"load_balance_weight": 0.5, "router_z_weight": 0.25, "sequence_balance_weight": 0.125})
Z_LOSS = change(TOPK, moe={"router_z_weight": 0.25}, model={"output_z_weight": 0.125})
SPARSE = change(CONFIG, moe={"router": "remoe", "initial_lambda": 0.5})


@pytest.mark.parametrize(
    ("config", "batch"),
    [(BALANCED, equal_microbatches()), (SPARSE, equal_microbatches()), (Z_LOSS, unequal_microbatches())],
    ids=["balance", "remoe", "z-loss"],
)
def test_accumulated_losses_of_layers_weigh_every_token_alike(config, batch):
    """Equal microbatches have the balance of the whole. The z-loss is a mean over tokens, however they are split."""
    (state, metrics), (expected_state, expected) = (step_of(one, batch=batch) for one in (accumulated(config), config))
    weighted = expected["layers"].auxiliary_loss.sum(), config.model.output_z_weight * expected["output_z_loss"]
    assert weighted[0] > 0.1 and (weighted[1] > 0.1) == (config == Z_LOSS)
    assert float(expected["total_loss"]) == pytest.approx(float(expected["loss"] + sum(weighted)), rel=1e-6)
    for name in ("loss", "total_loss", "output_z_loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    left_out = ["load_balance_loss"] if config == Z_LOSS else []  # of means, which differ by microbatch
    for name in {"auxiliary_loss", "router_z_loss", "router_entropy", "load_balance_loss"}.difference(left_out):
        found, wanted = (getattr(one["layers"], name) for one in (metrics, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected_state.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("config", [CONFIG, change(CONFIG, moe={"ema_weighted": False})], ids=["weighted", "plain"])
def test_default_vectors_are_updated_once_per_step_whatever_the_accumulation(config):
    """The first MoE layer sees the same inputs either way, so its vectors must be those of the whole batch.

    Deeper layers follow what the first one put out, which depends on the vectors that each microbatch had.
    """
    state = new_state(config)
    state = dataclasses.replace(state, variables=jax.tree.map(lambda x: x + 0.5, state.variables))
    after, expected = (step_of(one, copy(state), make_batch(6))[0] for one in (accumulated(config), config))
    assert set(after.variables) == {"default_vectors"}
    assert np.abs(steps.ema_of(expected)[0] - 0.5).max() > 1e-3
    np.testing.assert_allclose(steps.ema_of(after)[0], steps.ema_of(expected)[0], rtol=1e-5, atol=1e-6)


def test_backward_substitution_accumulates_to_the_whole_batchs_vectors_in_every_layer():
    """There the output does not depend on the vectors, so all layers agree."""
    after, expected = (step_of(one, batch=make_batch(6))[0] for one in (accumulated(BACKWARD), BACKWARD))
    np.testing.assert_allclose(steps.ema_of(after), steps.ema_of(expected), rtol=1e-5, atol=1e-6)


def test_evaluation_moves_no_state_and_uses_the_vectors():
    state, _ = step_of(CONFIG)
    before, eval_step = copy(state), program_for(CONFIG).eval_step
    sums, stats = eval_step(state.params, state.variables, make_batch(1))
    assert_trees_equal(state, before)
    assert float(sums.tokens) == 48
    assert int(stats.tokens_per_expert.sum()) == 2 * 48
    without = jax.tree.map(jnp.zeros_like, state.variables)
    assert float(eval_step(state.params, without, make_batch(1))[0].nll) != float(sums.nll)


def test_weight_decay_spares_norms_biases_embeddings_and_router():
    params = program_for(steps.WITH_DENSE_LAYER).abstract_state.params
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params))
        if value
    }
    blocks = [
        f"{kind}_layers/attention/{name}/kernel"
        for kind in ("dense", "moe")
        for name in ("key", "out", "query", "value")
    ]
    assert decayed == {
        *blocks,
        *(f"dense_layers/ffn/{name}/kernel" for name in ("gate", "up", "down")),
        *(f"moe_layers/moe/experts/{name}" for name in ("gate", "up", "down")),
        "head",
    }
    everything = make_optimizer(OptimConfig(decay_all=True, weight_decay=0.5), 10)
    embed = {"embed": jnp.ones((3, 2))}
    updates, _ = everything.update({"embed": jnp.zeros((3, 2))}, everything.init(embed), embed)
    assert float(jnp.abs(updates["embed"]).max()) > 0


def test_the_schedule_warms_up_and_ends_at_its_fraction():
    """Warm-up in steps 0 to 9, the last step is 99. wsd is at its peak up to step 80, and falls by 0.9 in 20 steps."""
    falling = {
        "cosine": {10: 1.0, 55: 0.55, 100: 0.1},  # half the cosine: 0.1 + 0.9 / 2
        "linear": {10: 1.0, 11: 1 - 0.9 / 90, 55: 0.55, 99: 0.11, 100: 0.1},
        "constant": {10: 1.0, 99: 1.0, 100: 1.0},
        "wsd": {10: 1.0, 79: 1.0, 80: 1.0, 81: 1 - 0.9 / 20, 90: 0.55, 99: 0.145, 100: 0.1},
    }
    for name, values in falling.items():
        config = OptimConfig(peak_lr=1.0, warmup_fraction=0.1, final_lr_fraction=0.1, schedule=name)
        schedule = learning_rate_schedule(config, 100)
        for step, value in {**{step: (step + 1) / 10 for step in range(10)}, **values}.items():
            assert float(schedule(step)) == pytest.approx(value), (name, step)
        one_step = learning_rate_schedule(dataclasses.replace(config, warmup_fraction=0.01), 20)
        assert float(one_step(0)) == pytest.approx(1.0), name
        assert float(learning_rate_schedule(config, 1)(0)) == pytest.approx(1.0), name


@pytest.mark.parametrize(("decay_fraction", "values"), [(0.0, [1, 1, 1, 1]), (0.75, [1, 1, 2 / 3, 1 / 3])])
def test_wsd_without_a_decay_and_without_a_stable_part(decay_fraction, values):
    config = OptimConfig(peak_lr=1.0, warmup_fraction=0.25, schedule="wsd", final_lr_fraction=0.0)
    schedule = learning_rate_schedule(dataclasses.replace(config, decay_fraction=decay_fraction), 4)
    assert [float(schedule(step)) for step in range(4)] == pytest.approx(values)
