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
    output_z: squares of the logits' log-partition functions.
    """

    nll: Array
    tokens: Array
    target_bytes: Array
    output_z: Array


def token_sums(
    unembedding: Unembedding, batch: dict[str, Array], logits_per_chunk: int, z_weight: float = 0.0
) -> tuple[Array, TokenSums]:
    """Negative log-likelihood of `batch["targets"]`, in float32, where `batch["loss_mask"]` is not zero.

    Returns nll + z_weight * output_z, for training, and the sums, which have no gradient.
    Each device takes its tokens in chunks of at most `logits_per_chunk` logits (one token at least).
    """
    x_BLD, head_DV = unembedding
    counted_BL = batch["loss_mask"] != 0
    token_axes = sharding.mesh_axes("batch")

    def local(x_BLD: Array, head_DV: Array, target_BL: Array, counted_BL: Array) -> tuple[Array, Array, Array]:
        if token_axes:
            head_DV = sharding.whole_weight(head_DV, "embed", "vocab")
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        num_tokens = x_TD.shape[0]
        num_chunks = min(num_tokens, -(-num_tokens * head_DV.shape[1] // logits_per_chunk))
        sums = _loss_sums(x_TD, head_DV, target_BL.reshape(-1), counted_BL.reshape(-1), num_chunks, z_weight)
        return jax.lax.psum(sums, token_axes) if token_axes else sums

    if token_axes:
        tokens = P(token_axes)
        local = jax.shard_map(
            local, in_specs=(tokens, sharding.weight_spec("embed", "vocab"), tokens, tokens), out_specs=P()
        )
    loss, nll, output_z = local(x_BLD, head_DV, batch["targets"], counted_BL)
    return loss, TokenSums(
        nll=nll,
        tokens=jnp.sum(counted_BL.astype(jnp.float32)),
        target_bytes=jnp.sum(jnp.where(counted_BL, batch["target_bytes"], 0).astype(jnp.float32)),
        output_z=output_z,
    )


def token_scores(
    unembedding: Unembedding, target_BQ: Array, position_BQ: Array, logits_per_chunk: int
) -> tuple[Array, Array]:
    """Log-probability of each target after the token at its position, float32 [B, Q], and whether none is likelier.

    Logits are made for these positions only, by each device for its rows, in chunks as in `token_sums`.
    """
    x_BLD, head_DV = unembedding
    batch_axes = sharding.mesh_axes("batch")

    def local(x_BLD: Array, head_DV: Array, target_BQ: Array, position_BQ: Array) -> tuple[Array, Array]:
        if batch_axes:
            head_DV = sharding.whole_weight(head_DV, "embed", "vocab")
        x_BQD = jnp.take_along_axis(x_BLD, position_BQ[..., None], axis=1)
        num_chunks = min(target_BQ.size, -(-target_BQ.size * head_DV.shape[1] // logits_per_chunk))

        def chunk(carry: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            x_RD, target_R = inputs
            logits_RV = jnp.matmul(x_RD, head_DV, preferred_element_type=jnp.float32)
            of_target_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
            return None, (of_target_R - jax.nn.logsumexp(logits_RV, axis=-1), logits_RV.argmax(axis=-1) == target_R)

        rows = x_BQD.reshape(-1, x_BQD.shape[-1]), target_BQ.reshape(-1)
        scores = _over_chunks(chunk, None, rows, num_chunks)[1]
        return tuple(score.reshape(-1)[: target_BQ.size].reshape(target_BQ.shape) for score in scores)

    if batch_axes:
        rows = P(batch_axes)
        local = jax.shard_map(
            local, in_specs=(rows, sharding.weight_spec("embed", "vocab"), rows, rows), out_specs=(rows, rows)
        )
    return local(x_BLD, head_DV, target_BQ, position_BQ)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss_sums(
    x_TD: Array, head_DV: Array, target_T: Array, counted_T: Array, num_chunks: int, z_weight: float
) -> tuple[Array, Array, Array]:
    """nll + z_weight * z, nll and z, of which the first has a gradient. Float32; no array of [T, V] if chunked.

    Sums over the counted tokens: nll of -log softmax(x @ head)[target], z of logsumexp(x @ head)^2.
    When differentiated the forward pass computes the gradient too, chunk by chunk: three products with the head in
    all, as without chunks, and nothing of size V is kept but the head's gradient.
    """

    def chunk(totals: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], None]:
        x_RD, target_R, counted_R = inputs
        (nll, z), _, _ = _sums(x_RD, head_DV, target_R, counted_R)
        return (totals[0] + nll, totals[1] + z), None

    zero = (0 * target_T[0]).astype(jnp.float32)  # varies over mesh axes as the tokens do
    nll, z = _over_chunks(chunk, (zero, zero), (x_TD, target_T, counted_T), num_chunks)[0]
    return _weighted(nll, z, z_weight), nll, z


def _loss_sums_fwd(
    x_TD: Array, head_DV: Array, target_T: Array, counted_T: Array, num_chunks: int, z_weight: float
) -> tuple:
    def chunk(carry: tuple[Array, Array, Array], inputs: tuple) -> tuple[tuple[Array, Array, Array], Array]:
        total_nll, total_z, d_head_DV = carry
        x_RD, target_R, counted_R = inputs
        (nll, z), logits_RV, log_partition_R = _sums(x_RD, head_DV, target_R, counted_R)
        d_logits_RV = jnp.exp(logits_RV - log_partition_R[:, None])
        if z_weight:
            d_logits_RV *= 1 + 2 * z_weight * log_partition_R[:, None]
        d_logits_RV -= target_R[:, None] == jnp.arange(head_DV.shape[1])
        d_logits_RV = jnp.where(counted_R[:, None], d_logits_RV, 0).astype(x_RD.dtype)
        d_head_DV += jnp.matmul(x_RD.T, d_logits_RV, preferred_element_type=jnp.float32)
        return (total_nll + nll, total_z + z, d_head_DV), d_logits_RV @ head_DV.T

    zero = (0 * target_T[0]).astype(jnp.float32)
    start = zero, zero, jnp.zeros(head_DV.shape, jnp.float32) + zero
    (nll, z, d_head_DV), d_x_TD = _over_chunks(chunk, start, (x_TD, target_T, counted_T), num_chunks)
    residuals = (d_x_TD.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]], d_head_DV, head_DV[:0])
    return (_weighted(nll, z, z_weight), nll, z), residuals


def _loss_sums_bwd(num_chunks: int, z_weight: float, residuals: tuple, gradients: tuple) -> tuple:
    d_x_TD, d_head_DV, like_head = residuals
    g, _, _ = gradients
    return (g * d_x_TD).astype(d_x_TD.dtype), (g * d_head_DV).astype(like_head.dtype), None, None


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd)


def _weighted(nll: Array, z: Array, z_weight: float) -> Array:
    return nll + z_weight * z if z_weight else nll


def _sums(x_RD: Array, head_DV: Array, target_R: Array, counted_R: Array) -> tuple[tuple[Array, Array], Array, Array]:
    """Both sums over counted tokens, logits [R, V] and log-partition functions [R], all float32."""
    logits_RV = jnp.matmul(x_RD, head_DV, preferred_element_type=jnp.float32)
    log_partition_R = jax.nn.logsumexp(logits_RV, axis=-1)
    nll_R = log_partition_R - jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
    # where, not a product: what padding predicts may be infinite, and must not matter.
    nll, z = (jnp.where(counted_R, a, 0).sum() for a in (nll_R, log_partition_R**2))
    return (nll, z), logits_RV, log_partition_R


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
