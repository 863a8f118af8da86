"""Pure training and evaluation steps: (state, batch) in, new state and metrics out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from default_moe.config import Config
from default_moe.methods import Load
from default_moe.model.language_model import LanguageModel, LayerStats
from default_moe.moe.layer import (
    DEFAULT_VECTOR_SUMS,
    DEFAULT_VECTORS,
    ROUTER_STATE,
    ROUTER_SUMS,
    next_router_state,
    zero_counts,
    zero_sums,
)
from default_moe.sharding import constrain
from default_moe.training.losses import TokenSums, auxiliary_loss, token_sums
from default_moe.training.optimizer import learning_rate_schedule, only_trained
from default_moe.training.state import TrainState

Batch = dict[str, Any]
Metrics = dict[str, Any]
Gradient = Callable[[TrainState, Batch, Array], tuple[Any, Array, "StepResult"]]


@flax.struct.dataclass
class StepResult:
    """What forward passes give beside the loss: sums for the metrics, layer statistics, mutated collections."""

    sums: TokenSums
    stats: LayerStats | None
    variables: Any


def make_train_step(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Make the training step of a config: one optimizer update, or none if the loss or a gradient is not finite.

    A step whose loss, gradient norm or new state is not finite leaves all state as it was, except that it is counted.
    """
    schedule = learning_rate_schedule(config.optim, config.train.num_steps)
    gradient = make_gradient(model, config)

    def update(old: dict[str, Any], grads: Any) -> dict[str, Any]:
        updates, opt_state = optimizer.update(grads, old["opt_state"], old["params"])
        updates = only_trained(updates, config.optim)  # weight decay has moved the others too
        return {"params": optax.apply_updates(old["params"], updates), "opt_state": opt_state}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, loss, result = gradient(state, batch, jax.random.fold_in(state.rng, state.step))
        grads = only_trained(grads, config.optim)
        grad_norm = optax.tree.norm(grads)
        old = {"params": state.params, "opt_state": state.opt_state, "variables": state.variables}
        new = {**update(old, grads), "variables": _moved(state.variables, result, config)}
        good = _all_finite((loss, grad_norm, new))
        # The update is computed once more, now that it is known to be good. On GPU and TPU that saves the memory in
        # which XLA would keep most of a second state until then, which it does without the barrier. Muon's parameters
        # are kept until then nevertheless: Newton-Schulz costs more time than they take memory.
        once = {"params": new["params"]} if config.optim.name == "muon" else {}
        good, old, grads, once = jax.lax.optimization_barrier((good, old, grads, once))
        new |= update(old, grads) | once
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            bad_steps=state.bad_steps + jnp.where(good, 0, 1),
            bad_steps_in_row=jnp.where(good, 0, state.bad_steps_in_row + 1),
            **kept,
        )
        metrics = {
            **_loss_metrics(result.sums),
            "total_loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.bad_steps),
            "bad_steps": new_state.bad_steps,
            "bad_steps_in_row": new_state.bad_steps_in_row,
        }
        layers = result.stats and dataclasses.replace(result.stats, observed={})  # much, and nobody logs it
        return new_state, {**metrics, "layers": layers}

    return train_step


def make_gradient(model: LanguageModel, config: Config) -> Gradient:
    """Make `gradient(state, batch, rng)`: the gradient of the loss over the whole batch, the loss, and the rest.

    The loss is the mean over all tokens of the batch, in however many microbatches (train.grad_accum_steps) it is
    processed. The losses of the MoE layers are those of each microbatch, averaged with the weights of its tokens.
    """

    def loss_fn(params: Any, variables: Any, batch: Batch, num_tokens: Array, rng: Array) -> tuple[Array, StepResult]:
        (unembedding, stats), variables = model.apply(
            {"params": params, **variables},
            train=True,
            mutable=list(variables),
            rngs={"router": rng},
            **model_inputs(batch, config),
        )
        chunk, z_weight = config.train.logits_per_chunk, config.model.output_z_weight
        loss_sum, sums = token_sums(unembedding, batch, chunk, z_weight)
        loss = loss_sum / num_tokens + auxiliary_loss(stats) * (sums.tokens / num_tokens)
        return loss, StepResult(sums, stats, variables)

    def gradient(state: TrainState, batch: Batch, rng: Array) -> tuple[Any, Array, StepResult]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, result), grads = grad_fn(state.params, state.variables, batch, _num_tokens(batch), rng)
        return grads, loss, result

    num_microbatches = config.train.grad_accum_steps
    return gradient if num_microbatches == 1 else _accumulated(loss_fn, config)


def _accumulated(loss_fn: Callable, config: Config) -> Gradient:
    """Make the gradient of a loss that is summed over microbatches.

    Default vectors keep their contract: each step is one update, with decay ema_decay, by the mean over all tokens of
    the batch. Microbatch m uses the vectors updated with the sums of microbatches 1 to m; those after the last
    are kept. With moe.load_balance_over="batch" it counts the load of microbatches 1 to m.
    """
    num_microbatches = config.train.grad_accum_steps

    def gradient(state: TrainState, batch: Batch, rng: Array) -> tuple[Any, Array, StepResult]:
        num_tokens = _num_tokens(batch)
        # Added up in place, layer by layer as the backward pass gets there: a microbatch's own never exist as a whole.
        grads = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), state.params)

        def microstep(carry: tuple, inputs: tuple) -> tuple[tuple, StepResult]:
            loss, sums = carry
            index, microbatch = inputs
            variables = {**state.variables, **sums}

            def micro_loss_fn(params: Any) -> tuple[Array, StepResult]:
                return loss_fn(params, variables, microbatch, num_tokens, jax.random.fold_in(rng, index))

            pull_back: Any
            micro_loss, pull_back, result = jax.vjp(micro_loss_fn, state.params, has_aux=True)
            pull_back.with_refs(grads)(jnp.ones_like(micro_loss))
            new_variables = dict(result.variables)
            sums = {name: new_variables.pop(name) for name in sums}
            return (loss + micro_loss, sums), dataclasses.replace(result, variables=new_variables)

        sums = {}
        if DEFAULT_VECTORS in state.variables:
            sums[DEFAULT_VECTOR_SUMS] = zero_sums(state.variables[DEFAULT_VECTORS])
        if config.moe.load_balance_over == "batch":
            sums[ROUTER_SUMS] = zero_counts(state.params)
        inputs = (jnp.arange(num_microbatches), split_batch(batch, num_microbatches))
        (loss, _), passes = jax.lax.scan(microstep, (jnp.zeros(()), sums), inputs)
        return jax.tree.map(jax.freeze, grads), loss, _merge_passes(passes)

    return gradient


def _num_tokens(batch: Batch) -> Array:
    return jnp.maximum((batch["loss_mask"] != 0).sum(), 1).astype(jnp.float32)


def make_eval_step(model: LanguageModel, config: Config) -> Callable[[Any, Any, Batch], tuple[TokenSums, Any]]:
    """`eval_step(params, variables, batch) -> (TokenSums, LayerStats)`: changes no state; sums add up over batches."""

    def eval_step(params: Any, variables: Any, batch: Batch) -> tuple[TokenSums, LayerStats | None]:
        output: Any = model.apply({"params": params, **variables}, train=False, **model_inputs(batch, config))
        unembedding, stats = output
        return token_sums(unembedding, batch, config.train.logits_per_chunk)[1], stats

    return eval_step


def model_inputs(batch: Batch, config: Config) -> dict[str, Any]:
    return {
        "tokens_BL": batch["inputs"],
        "positions": batch["positions"],
        "segment_ids": batch["segment_ids"] if config.data.mask_documents else None,
        "mask": batch["loss_mask"],
        "project": False,
    }


def _loss_metrics(sums: TokenSums) -> Metrics:
    """Mean loss in nats per token, perplexity, bits per byte of text, and the output's z-loss, unweighted."""
    tokens = jnp.maximum(sums.tokens, 1)
    loss = sums.nll / tokens
    bits_per_byte = sums.nll / jnp.log(2.0) / jnp.maximum(sums.target_bytes, 1)
    return {
        "loss": loss,
        "perplexity": jnp.exp(loss),
        "bits_per_byte": bits_per_byte,
        "output_z_loss": sums.output_z / tokens,
    }


def split_batch(batch: Batch, parts: int) -> Batch:
    """[B, ...] to [parts, B / parts, ...], every microbatch spread evenly over the devices that hold the batch."""

    def split(x: Array) -> Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


def _merge_passes(passes: StepResult) -> StepResult:
    """One StepResult of a scan's stacked ones: sums and counts added up, the last state kept.

    Statistics are averaged with the weights of their tokens.
    """
    variables = jax.tree.map(lambda x: x[-1], passes.variables)
    stats, tokens = passes.stats, passes.sums.tokens
    if stats is not None:
        counted = {name: getattr(stats, name) for name in ("tokens_per_expert", "num_tokens", "observed")}
        counts = jax.tree.map(lambda x: x.sum(axis=0), counted)
        weights = jnp.where(tokens.sum() > 0, tokens, 1)
        stats = dataclasses.replace(jax.tree.map(lambda x: jnp.average(x, axis=0, weights=weights), stats), **counts)
    return StepResult(jax.tree.map(lambda x: x.sum(axis=0), passes.sums), stats, variables)


def _moved(before: Any, result: StepResult, config: Config) -> Any:
    """The collections after a step. The default vectors have been updated as they were used.

    The router's state moves from what it was `before`, by all layers and all microbatches together.
    """
    if result.stats is None or ROUTER_STATE not in before:
        return result.variables
    stats = result.stats
    load = Load(stats.tokens_per_expert, stats.num_tokens, stats.observed)
    return {**result.variables, ROUTER_STATE: next_router_state(before[ROUTER_STATE], load, config.moe)}


def _all_finite(tree: Any) -> Array:
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
    # A loop: any other reduction XLA for CPU would compute again for every array that depends on it.
    return jax.lax.fori_loop(0, len(finite), lambda index, good: good & finite[index], jnp.array(True))
