"""The training loss and its parts."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from default_moe import sharding
from default_moe.model.language_model import LayerStats, Unembedding


@flax.struct.dataclass
class TokenSums:
    """Sums over the tokens that count, as float32 scalars: they add up over batches exactly as over tokens.

    nll: negative log-likelihood in nats.  tokens: number of tokens.  target_bytes: UTF-8 bytes they stand for.
    """

    nll: Array
    tokens: Array
    target_bytes: Array


def token_sums(unembedding: Unembedding, batch: dict[str, Array], logits_per_chunk: int) -> TokenSums:
    """Negative log-likelihood of `batch["targets"]`, in float32, where `batch["loss_mask"]` is not zero.

    Each device takes its tokens in chunks of at most `logits_per_chunk` logits (one token at least).
    """
    x_BLD, head_DV = unembedding
    counted_BL = batch["loss_mask"] != 0
    token_axes = sharding.mesh_axes("batch")

    def local(x_BLD: Array, head_DV: Array, target_BL: Array, counted_BL: Array) -> Array:
        if token_axes:
            head_DV = sharding.whole_weight(head_DV, "embed", "vocab")
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        num_tokens = x_TD.shape[0]
        num_chunks = min(num_tokens, -(-num_tokens * head_DV.shape[1] // logits_per_chunk))
        nll = _nll_sum(x_TD, head_DV, target_BL.reshape(-1), counted_BL.reshape(-1), num_chunks)
        return jax.lax.psum(nll, token_axes) if token_axes else nll

    if token_axes:
        tokens = P(token_axes)
        local = jax.shard_map(
            local, in_specs=(tokens, sharding.weight_spec("embed", "vocab"), tokens, tokens), out_specs=P()
        )
    return TokenSums(
        nll=local(x_BLD, head_DV, batch["targets"], counted_BL),
        tokens=jnp.sum(counted_BL.astype(jnp.float32)),
        target_bytes=jnp.sum(jnp.where(counted_BL, batch["target_bytes"], 0).astype(jnp.float32)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll_sum(x_TD: Array, head_DV: Array, target_T: Array, counted_T: Array, num_chunks: int) -> Array:
    """Sum over the counted tokens of -log softmax(x @ head)[target], float32, without an array of [T, V] if chunked.

    When differentiated the forward pass computes the gradient too, chunk by chunk: three products with the head in
    all, as without chunks, and nothing of size V is kept but the head's gradient.
    """

    def chunk(total: Array, inputs: tuple) -> tuple[Array, None]:
        x_RD, target_R, counted_R = inputs
        nll_R, _, _ = _nll(x_RD, head_DV, target_R)
        # where, not a product: what padding predicts may be infinite, and must not matter.
        return total + jnp.where(counted_R, nll_R, 0).sum(), None

    zero = (0 * target_T[0]).astype(jnp.float32)  # varies over mesh axes as the tokens do
    return _over_chunks(chunk, zero, (x_TD, target_T, counted_T), num_chunks)[0]


def _nll_sum_fwd(x_TD: Array, head_DV: Array, target_T: Array, counted_T: Array, num_chunks: int) -> tuple:
    def chunk(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], Array]:
        total, d_head_DV = carry
        x_RD, target_R, counted_R = inputs
        nll_R, logits_RV, log_partition_R = _nll(x_RD, head_DV, target_R)
        is_target_RV = target_R[:, None] == jnp.arange(head_DV.shape[1])
        d_logits_RV = jnp.exp(logits_RV - log_partition_R[:, None]) - is_target_RV
        d_logits_RV = jnp.where(counted_R[:, None], d_logits_RV, 0).astype(x_RD.dtype)
        d_head_DV += jnp.matmul(x_RD.T, d_logits_RV, preferred_element_type=jnp.float32)
        return (total + jnp.where(counted_R, nll_R, 0).sum(), d_head_DV), d_logits_RV @ head_DV.T

    zero = (0 * target_T[0]).astype(jnp.float32)
    start = zero, jnp.zeros(head_DV.shape, jnp.float32) + zero
    (total, d_head_DV), d_x_TD = _over_chunks(chunk, start, (x_TD, target_T, counted_T), num_chunks)
    return total, (d_x_TD.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]], d_head_DV, head_DV[:0])


def _nll_sum_bwd(num_chunks: int, residuals: tuple, g: Array) -> tuple:
    d_x_TD, d_head_DV, like_head = residuals
    return (g * d_x_TD).astype(d_x_TD.dtype), (g * d_head_DV).astype(like_head.dtype), None, None


_nll_sum.defvjp(_nll_sum_fwd, _nll_sum_bwd)


def _nll(x_RD: Array, head_DV: Array, target_R: Array) -> tuple[Array, Array, Array]:
    """Negative log-likelihoods, logits [R, V] and log-partition functions, all float32."""
    logits_RV = jnp.matmul(x_RD, head_DV, preferred_element_type=jnp.float32)
    log_partition_R = jax.nn.logsumexp(logits_RV, axis=-1)
    target_logit_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
    return log_partition_R - target_logit_R, logits_RV, log_partition_R


def _over_chunks(chunk: Callable, carry: Any, arrays: tuple[Array, ...], num_chunks: int) -> tuple:
    """`jax.lax.scan` of `chunk` over the arrays, cut along their first axis into equal parts, the last one padded."""
    if num_chunks == 1:
        return chunk(carry, arrays)

    def cut(a: Array) -> Array:
        rows = -(-a.shape[0] // num_chunks)
        padding = [(0, rows * num_chunks - a.shape[0])] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, padding).reshape(num_chunks, rows, *a.shape[1:])

    return jax.lax.scan(chunk, carry, tuple(cut(a) for a in arrays))


def auxiliary_loss(stats: LayerStats | None) -> Array:
    """The weighted losses of the MoE layers, summed over layers as in the authors' code."""
    return jnp.zeros(()) if stats is None else stats.auxiliary_loss.sum()
