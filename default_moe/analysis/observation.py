"""What a trained model does with text, layer by layer: which experts tokens take, and what all experts would answer.

Dimension key: T tokens of all batches, Y MoE layers, N experts, C choices of a token, D model.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from default_moe.config import MoEConfig
from default_moe.data import Batch, Rows
from default_moe.data.packing import validation_rows
from default_moe.errors import check
from default_moe.methods.routing import active_experts
from default_moe.moe import MoELayer
from default_moe.moe.layer import DEFAULT_VECTORS, ROUTING
from default_moe.runs.trained_model import TrainedModel
from default_moe.training.program import Program
from default_moe.training.step import model_inputs

_OF_TOKENS = ("router_probs", "combine_weights", "expert_index")


@dataclass(frozen=True)
class Observation:
    """What was seen. Padding is left out.

    tokens, positions, rows: int32 [T], each token's id, its place in its row, and the number of the row.
    probs, gates: float32 [Y, T, N], the router's probabilities, and what each expert's output counts.
    chosen: bool [Y, T, N], the experts that run.
    first: int32 [Y, T], the expert that counts most of those; N if none runs.
    experts: sums over tokens, float64, by name, see `expert_sums`; empty if the experts were not asked.
    """

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    probs: np.ndarray
    gates: np.ndarray
    chosen: np.ndarray
    experts: Mapping[str, np.ndarray]

    @functools.cached_property
    def first(self) -> np.ndarray:
        gates = np.where(self.chosen, self.gates, -np.inf)
        return np.where(self.chosen.any(axis=-1), gates.argmax(axis=-1), gates.shape[-1]).astype(np.int32)

    def first_tokens(self, count: int) -> Self:
        """Return what was seen of so many tokens, without the sums."""
        of_text = {name: getattr(self, name)[:count] for name in ("tokens", "positions", "rows")}
        of_layers = {name: getattr(self, name)[:, :count] for name in ("probs", "gates", "chosen")}
        return dataclasses.replace(self, **of_text, **of_layers, experts={})


def observe(
    model: TrainedModel, rows: Rows, num_tokens: int, variables: Any = None, experts: bool = False
) -> Observation:
    """Run a model on the first rows, up to about `num_tokens` tokens of them.

    variables: (params, variables) of another checkpoint of the run, to be used in the place of the model's.
    experts: whether to compute the outputs of all experts for all tokens too; it costs N / K times the experts' work.

    Raises ConfigError if there are no rows.
    """
    config = model.config
    batch_size = config.eval.batch_size or config.train.batch_size
    count = max(min(-(-num_tokens // rows.sequence_length), len(rows)), 1)
    check(len(rows) > 0, "the text fills no sequence: give more text")
    run = _make_forward(model.program, experts)
    params, others = variables or (model.params, model.variables)
    found: list[dict[str, np.ndarray]] = []
    sums: dict[str, np.ndarray] = {}
    for first in range(0, count, batch_size):

        def load(start: int, number: int, first: int = first) -> Batch:
            batch = rows.batch(first + start, number)
            beyond = np.arange(first + start, first + start + number) >= count
            batch["loss_mask"] = np.where(beyond[:, None], 0, batch["loss_mask"])
            return batch

        batch = model.program.put_batch(load, batch_size)
        sown, batch = jax.device_get((run(params, others, batch), batch))
        real = batch["loss_mask"] != 0
        row, position = np.nonzero(real)
        part = {"tokens": batch["inputs"][real], "positions": position, "rows": first + row}
        found.append(part | {name: sown.pop(name)[:, real] for name in _OF_TOKENS})
        sums = {name: sums.get(name, 0) + value.astype(np.float64) for name, value in sown.items()}
    tokens, positions, number = (
        np.concatenate([part[name] for part in found]).astype(np.int32) for name in ("tokens", "positions", "rows")
    )
    probs, gates, index = (np.concatenate([part[name] for part in found], axis=1) for name in _OF_TOKENS)
    chosen = np.zeros((*probs.shape[:-1], probs.shape[-1] + 1), bool)  # the last stands for none
    np.put_along_axis(chosen, index, True, axis=-1)
    return Observation(tokens, positions, number, probs, gates, chosen[..., :-1], sums)


def rows_of(model: TrainedModel, texts: Sequence[str], name: str) -> Rows:
    """Return rows of these documents, in the model's tokens. Raises ConfigError if they fill no sequence."""
    tokenizer = model.tokenizer
    ids = [np.concatenate([[tokenizer.separator], tokenizer.encode(text)]) for text in texts]
    tokens = np.concatenate(ids or [np.zeros(0)]).astype(np.int32)
    check(len(tokens) > 1, f"{name} holds no text")
    return validation_rows(tokens, model.config.train.sequence_length, tokenizer.separator, tokenizer.token_bytes)


def expert_sums(
    x_TD: Array,
    params: Mapping[str, Array],
    vectors_ND: Array,
    active_TN: Array,
    gates_TN: Array,
    mask_T: Array,
) -> dict[str, Array]:
    """Sums over tokens of what every expert answers, apart for tokens that chose the expert and for those that did not.

    Args:
      x_TD: the layer's input.  params: of its experts.  vectors_ND: default vectors, zeros if there are none.
      active_TN: which experts run.  gates_TN: what outputs count.  mask_T: 0 for padding.

    Returns float32 arrays by name, the axis of 2 being (those that chose the expert, those that did not):
      norm [2, N], of ||E_i||.  weight [2, 2, N], square [2, 2, N], rest [2, 2, N] and total [2, 2, N, D], of 1,
      ||E_i||^2, ||E_i - V_i||^2 and E_i, each token counting once, then each as gate^2, as in ||gate E_i||^2.
      active_norm, default_norm, output_norm: scalars, norms of what experts that run add up to, of what default
      vectors add up to if they are substituted, and of both together.  tokens: how many there are.
    """
    counted_TN = (mask_T != 0)[:, None]
    groups_2TN = jnp.stack([active_TN & counted_TN, ~active_TN & counted_TN]).astype(jnp.float32)
    x_TD = x_TD.astype(jnp.float32)

    def expert(active_TD: Array, inputs: Any) -> tuple[Array, dict[str, Array]]:
        gate, up, down, vector_D, groups_2T, gate_T = inputs
        output_TD = (jax.nn.silu(x_TD @ gate) * (x_TD @ up)) @ down
        square_T, rest_T = (output_TD**2).sum(axis=-1), ((output_TD - vector_D) ** 2).sum(axis=-1)
        weights_22T = jnp.stack([groups_2T, groups_2T * gate_T**2])
        sums = {
            "norm": groups_2T @ jnp.sqrt(square_T),
            "weight": weights_22T.sum(axis=-1),
            "square": weights_22T @ square_T,
            "rest": weights_22T @ rest_T,
            "total": weights_22T @ output_TD,
        }
        return active_TD + (groups_2T[0] * gate_T)[:, None] * output_TD, sums

    weights = tuple(params[name].astype(jnp.float32) for name in ("gate", "up", "down"))
    per_expert = (*weights, vectors_ND, jnp.moveaxis(groups_2TN, -1, 0), gates_TN.T)
    active_TD, sums = jax.lax.scan(expert, jnp.zeros_like(x_TD), per_expert)
    default_TD = jnp.where(active_TN | ~counted_TN, 0, gates_TN) @ vectors_ND
    real_T = counted_TN[:, 0].astype(jnp.float32)

    def norms(of_TD: Array) -> Array:
        return real_T @ jnp.linalg.norm(of_TD, axis=-1)

    return {
        **{name: jnp.moveaxis(value, 0, 1 if name == "norm" else 2) for name, value in sums.items()},
        "active_norm": norms(active_TD),
        "default_norm": norms(default_TD),
        "output_norm": norms(active_TD + default_TD),
        "tokens": real_T.sum(),
    }


@functools.cache  # a report observes several texts and checkpoints with one program
def _make_forward(program: Program, experts: bool) -> Any:
    def ask_experts(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = next_call(*args, **kwargs)
        layer = context.module
        if isinstance(layer, MoELayer) and context.method_name == "__call__":
            for name, value in _sums_of_layer(layer, args[0], kwargs["mask"], output[1]).items():
                layer.sow(ROUTING, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return output

    def forward(params: Any, variables: Any, batch: Batch) -> Any:
        inputs = model_inputs(batch, program.config)
        with nn.intercept_methods(ask_experts) if experts else contextlib.nullcontext():
            _, sown = program.model.apply({"params": params, **variables}, train=False, mutable=[ROUTING], **inputs)
        return sown[ROUTING]["moe_layers"]["moe"]

    return program.jit(forward, out_shardings=program.replicated)


def _sums_of_layer(layer: MoELayer, x_BLD: Array, mask_BL: Array | None, aux: Mapping[str, Array]) -> dict[str, Array]:
    moe: MoEConfig = layer.config
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    mask_T = jnp.ones(len(x_TD)) if mask_BL is None else mask_BL.reshape(-1)
    params = nn.unbox(layer.variables["params"]["experts"])
    vectors_ND = jnp.zeros((moe.num_experts, x_TD.shape[-1]), jnp.float32)
    if DEFAULT_VECTORS in layer.variables:
        vectors_ND = nn.unbox(layer.variables[DEFAULT_VECTORS]["ema"])
    active_TN = active_experts(aux["expert_index"], moe.num_experts).reshape(-1, moe.num_experts)
    gates_TN = aux["combine_weights"].reshape(-1, moe.num_experts).astype(jnp.float32)
    return expert_sums(x_TD, params, vectors_ND, active_TN, gates_TN, mask_T)
