"""Evaluation on held-out text: loss, perplexity, bits per byte, and how the router behaves."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from default_moe.data import Batch, Rows
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

    Statistics of layers are averaged over batches, weighted by their tokens.
    """
    batch_size = program.config.eval.batch_size or program.config.train.batch_size
    whole = math.ceil(len(rows) / batch_size)
    nll = tokens = text_bytes = 0.0
    layer_sums: dict[str, np.ndarray] = {}
    for index in range(min(num_batches, whole) if num_batches else whole):
        batch = program.put_batch(functools.partial(_load, rows, index * batch_size), batch_size)
        sums, stats = jax.device_get(program.eval_step(params, variables, batch))
        nll, tokens, text_bytes = (
            nll + float(sums.nll),
            tokens + float(sums.tokens),
            text_bytes + float(sums.target_bytes),
        )
        for name, value in _layer_arrays(stats).items():
            weight = 1.0 if name == "tokens_per_expert" else float(sums.tokens)
            layer_sums[name] = layer_sums.get(name, 0.0) + weight * np.asarray(value, np.float64)
    loss = nll / max(tokens, 1)
    return Evaluation(
        loss=loss,
        perplexity=float(np.exp(loss)),
        bits_per_byte=nll / math.log(2) / max(text_bytes, 1),
        tokens=int(tokens),
        text_bytes=int(text_bytes),
        layers=_layer_report(layer_sums, tokens),
    )


def _load(rows: Rows, first: int, start: int, count: int) -> Batch:
    return rows.batch(first + start, count)


def _layer_arrays(stats: Any) -> dict[str, np.ndarray]:
    if stats is None:
        return {}
    names = ("load_balance_loss", "router_entropy", "tokens_per_expert")
    return {**{name: getattr(stats, name) for name in names}, **stats.more}


def _layer_report(sums: dict[str, np.ndarray], tokens: float) -> list[dict[str, Any]]:
    if not sums:
        return []
    counts_LN = sums["tokens_per_expert"]
    load_LN = counts_LN / np.maximum(counts_LN.mean(axis=1, keepdims=True), 1e-9)
    report = []
    for layer in range(counts_LN.shape[0]):
        means = {name: float(of[layer] / tokens) for name, of in sums.items() if name != "tokens_per_expert"}
        row: dict[str, Any] = {
            **means,
            "max_load": float(load_LN[layer].max()),
            "min_load": float(load_LN[layer].min()),
            "tokens_per_expert": [int(c) for c in counts_LN[layer]],
        }
        report.append(row)
    return report
