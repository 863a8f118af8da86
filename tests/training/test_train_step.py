"""The training step: its update, gradient accumulation, and steps that must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.steps import (
    CONFIG,
    WITH_DENSE_LAYER,
    assert_trees_equal,
    change,
    copy,
    ema_of,
    make_batch,
    program_for,
)

from default_moe.config import OptimConfig
from default_moe.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer


def test_a_step_is_one_adamw_update_of_the_clipped_gradient():
    program = program_for(WITH_DENSE_LAYER)
    state = program.new_state()
    before = copy(state)
    batch = make_batch()

    def loss(params):
        (logits, stats), _ = program.model.apply(
            {"params": params, **before.variables}, batch["inputs"], train=True, mutable=["default_vectors"]
        )
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        return nll + 0.01 * stats.load_balance_loss.sum()

    rate = learning_rate_schedule(WITH_DENSE_LAYER.optim, 20)(0)
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
    after, metrics = program.train_step(state, batch)
    assert float(metrics["total_loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(float(rate))
    for a, b, g in zip(*map(jax.tree.leaves, (after.params, expected, clipped)), strict=True):
        firm = np.abs(g) > 1e-6  # where the gradient is rounding noise its sign is too
        np.testing.assert_allclose(np.asarray(a)[firm], np.asarray(b)[firm], rtol=1e-4, atol=1e-6)
    assert (int(after.step), int(after.bad_steps)) == (1, 0)


def test_the_loss_falls_on_a_batch_seen_again_and_again():
    program = program_for(change(CONFIG, optim={"peak_lr": 1e-2}))
    state, losses = program.new_state(), []
    for _ in range(20):
        state, metrics = program.train_step(state, make_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("router", ["topk", "default"])
@pytest.mark.parametrize("where", ["head", "embed"])
def test_a_step_that_is_not_finite_changes_nothing_but_is_counted(router, where):
    program = program_for(change(CONFIG, moe={"router": router}))
    state, _ = program.train_step(program.new_state(), make_batch(1))
    good = copy(state)
    poisoned = copy(state)
    poisoned.params[where] = poisoned.params[where].at[0, 0].set(jnp.nan)
    kept = copy(poisoned)
    after, metrics = program.train_step(poisoned, make_batch(2))
    assert not np.isfinite(float(metrics["loss"]))
    for name in ("params", "variables", "opt_state", "rng"):
        assert_trees_equal(getattr(after, name), getattr(kept, name))
    assert (int(after.step), int(after.bad_steps), int(after.bad_steps_in_row)) == (2, 1, 1)

    # The next good step is what it would have been, but for the count of steps.
    mended = dataclasses.replace(copy(after), params=copy(good.params))
    resumed, metrics = program.train_step(mended, make_batch(3))
    straight, expected = program.train_step(good, make_batch(3))
    assert_trees_equal(resumed.params, straight.params)
    assert_trees_equal(resumed.variables, straight.variables)
    assert float(metrics["learning_rate"]) == float(expected["learning_rate"])
    assert (int(resumed.step), int(resumed.bad_steps), int(resumed.bad_steps_in_row)) == (3, 1, 0)


def test_default_vectors_that_overflow_are_not_kept():
    """In backward-only mode the loss does not show it at once."""
    program = program_for(change(CONFIG, moe={"substitute": "backward"}))
    state = program.new_state()
    vectors = {"moe_layers": {"moe": {"ema": jnp.full(ema_of(state).shape, jnp.inf)}}}
    poisoned = dataclasses.replace(state, variables={"default_vectors": vectors})
    after, metrics = program.train_step(poisoned, make_batch())
    assert int(after.bad_steps_in_row) == 1
    assert np.isfinite(float(metrics["loss"]))


def test_an_update_that_overflows_is_not_kept():
    """The loss and gradient that led to it are finite; weights and optimizer state after it would not be."""
    program = program_for(change(CONFIG, optim={"peak_lr": 3e38, "weight_decay": 100.0}))
    state = program.new_state()
    before = copy(state)
    after, metrics = program.train_step(state, make_batch())
    assert np.isfinite(float(metrics["total_loss"])) and np.isfinite(float(metrics["grad_norm"]))
    assert int(after.bad_steps_in_row) == 1
    assert_trees_equal(after.params, before.params)
    assert_trees_equal(after.opt_state, before.opt_state)
    assert_trees_equal(after.variables, before.variables)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """With a top-k router and no balance loss microbatches do not interact, so even unequal ones must add up."""
    batch = make_batch(4)
    batch["loss_mask"][0, :5] = batch["loss_mask"][3, 2:] = 0
    results = []
    for parts in (1, 4):
        topk = {"router": "topk", "load_balance_weight": 0.0}
        config = change(WITH_DENSE_LAYER, moe=topk, train={"grad_accum_steps": parts})
        program = program_for(config)
        results.append(program.train_step(program.new_state(), batch))
    for state, metrics in results[1:]:
        for name in ("loss", "grad_norm", "total_loss", "bits_per_byte"):
            assert float(metrics[name]) == pytest.approx(float(results[0][1][name]), rel=1e-5)
        np.testing.assert_array_equal(metrics["layers"].tokens_per_expert, results[0][1]["layers"].tokens_per_expert)
        for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(results[0][0].opt_state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weighted", [True, False])
def test_default_vectors_are_updated_once_per_step_whatever_the_accumulation(weighted):
    """The first MoE layer sees the same inputs either way, so its vectors must be those of the whole batch.

    Deeper layers follow what the first one put out, which depends on the vectors that each microbatch had.
    """
    firsts = []
    for parts in (1, 4):
        config = change(CONFIG, moe={"ema_weighted": weighted, "ema_decay": 0.7}, train={"grad_accum_steps": parts})
        program = program_for(config)
        state = program.new_state()
        seeded = jax.tree.map(lambda x: x + 0.5, state.variables)
        after, _ = program.train_step(dataclasses.replace(state, variables=seeded), make_batch(6))
        firsts.append(ema_of(after)[0])
        assert set(after.variables) == {"default_vectors"}
    assert np.abs(firsts[0] - 0.5).max() > 1e-3
    for other in firsts[1:]:
        np.testing.assert_allclose(other, firsts[0], rtol=1e-5, atol=1e-6)


def test_backward_substitution_accumulates_to_the_whole_batchs_vectors_in_every_layer():
    """There the output does not depend on the vectors, so all layers agree."""
    vectors = []
    for parts in (1, 4):
        program = program_for(change(CONFIG, moe={"substitute": "backward"}, train={"grad_accum_steps": parts}))
        after, _ = program.train_step(program.new_state(), make_batch(6))
        vectors.append(ema_of(after))
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_updates_the_vectors_once(remat):
    states = []
    for policy in ("none", remat):
        program = program_for(change(CONFIG, model={"remat": policy}))
        states.append(program.train_step(program.new_state(), make_batch())[0])
    np.testing.assert_allclose(ema_of(states[1]), ema_of(states[0]), rtol=1e-5, atol=1e-7)


def test_evaluation_moves_no_state_and_uses_the_vectors():
    program = program_for(CONFIG)
    state, _ = program.train_step(program.new_state(), make_batch())
    before = copy(state)
    sums, stats = program.eval_step(state.params, state.variables, make_batch(1))
    assert_trees_equal(state, before)
    assert float(sums.tokens) == 48
    assert int(stats.tokens_per_expert.sum()) == 2 * 48
    without = jax.tree.map(jnp.zeros_like, state.variables)
    assert float(program.eval_step(state.params, without, make_batch(1))[0].nll) != float(sums.nll)


def test_weight_decay_spares_norms_biases_embeddings_and_router():
    state = program_for(WITH_DENSE_LAYER).new_state()
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(state.params))
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
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = jax.jit(lambda g, p: everything.update(g, everything.init(p), p))(zeros, state.params)
    assert float(jnp.abs(updates["embed"]).max()) > 0


def test_the_schedule_warms_up_and_ends_at_its_fraction():
    schedule = learning_rate_schedule(OptimConfig(peak_lr=1.0, warmup_fraction=0.1, final_lr_fraction=0.1), 100)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(0.5)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(55)) == pytest.approx(0.55)  # half the cosine: 0.1 + 0.9 / 2
    assert float(schedule(100)) == pytest.approx(0.1)
    short = learning_rate_schedule(OptimConfig(peak_lr=1.0, warmup_fraction=0.01), 20)
    assert float(short(0)) == pytest.approx(1.0)
