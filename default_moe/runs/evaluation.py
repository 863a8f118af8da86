"""Evaluation on held-out text: loss, perplexity, bits per byte, and how the router behaves."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from default_moe.data import Batch, Rows
from default_moe.errors import TrainingFailed
from default_moe.methods.routing import load_balance_loss
from default_moe.model.language_model import LayerStats
from default_moe.runs.measurements import layer_statistics
from default_moe.training.memory import out_of_memory_in_one_line
from default_moe.training.program import Program


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all tokens evaluated.

    loss: nats per token.  perplexity: exp(loss).  bits_per_byte: bits per UTF-8 byte of the text.
    tokens, text_bytes: how many were predicted.
    layers: one dict per MoE layer with load_balance_loss, router_entropy (nats), max_load and min_load (relative to
      the mean), tokens_per_expert, and more that the method has: see `LayerStats.more`.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    text_bytes: int
    layers: list[dict[str, Any]]

    def scalars(self) -> dict[str, float]:
        """The figures that are logged during training."""
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def evaluate(program: Program, params: Any, variables: Any, rows: Rows, num_batches: int) -> Evaluation:
    """Evaluate on the first `num_batches` batches of `rows`, on all of them if 0. No state changes.

    Statistics of layers are averaged over batches, weighted by their tokens. The load balance loss is that of all
    tokens together.
    """
    batch_size = program.config.eval.batch_size or program.config.train.batch_size
    whole = math.ceil(len(rows) / batch_size)
    total: Any = None
    for index in range(min(num_batches, whole) if num_batches else whole):
        with out_of_memory_in_one_line(
            TrainingFailed, "evaluating", program.config, program.num_batch_shards, evaluation=True
        ):
            batch = program.put_batch(functools.partial(_load, rows, index * batch_size), batch_size)
            found = jax.device_get(program.eval_step(params, variables, batch))
        sums, stats = jax.tree.map(np.float64, found)
        of_batch = (sums, _map_means(functools.partial(np.multiply, sums.tokens), stats))
        total = jax.tree.map(np.add, total, of_batch) if total else of_batch
    sums, stats = total
    stats = _map_means(lambda total: total / max(sums.tokens, 1), stats)
    loss = float(sums.nll / max(sums.tokens, 1))
    return Evaluation(
        loss=loss,
        perplexity=float(np.exp(loss)),
        bits_per_byte=float(sums.nll / math.log(2) / max(sums.target_bytes, 1)),
        tokens=int(sums.tokens),
        text_bytes=int(sums.target_bytes),
        layers=_layer_report(stats) if stats else [],
    )


def _load(rows: Rows, first: int, start: int, count: int) -> Batch:
    return rows.batch(first + start, count)


def _map_means(function: Callable[[Any], Any], stats: LayerStats | None) -> LayerStats | None:
    """`stats` with `function` applied to all but the counts."""
    if stats is None:
        return None
    counts = {"tokens_per_expert": stats.tokens_per_expert, "num_tokens": stats.num_tokens}
    return dataclasses.replace(jax.tree.map(function, stats), **counts)


def _layer_report(stats: Any) -> list[dict[str, Any]]:
    balance = np.asarray(load_balance_loss(stats.mean_router_probs, stats.tokens_per_expert))
    of_layers = {**layer_statistics(stats), "load_balance_loss": balance}
    names = ("load_balance_loss", "router_entropy", *stats.more, "max_load", "min_load")
    return [
        {**{name: float(of_layers[name][index]) for name in names}, "tokens_per_expert": counts.astype(int).tolist()}
        for index, counts in enumerate(stats.tokens_per_expert)
    ]
