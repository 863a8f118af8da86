"""Pure: who goes where, and how balanced that is."""

import jax
import jax.numpy as jnp
from jax import Array


def masked_mean(values: Array, mask: Array | None) -> Array:
    """Mean over the first two axes [B, L], counting only positions where `mask` [B, L] is not zero."""
    if mask is None:
        return values.mean(axis=tuple(range(2)))
    counts = (mask != 0).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    # where, not a product: what padding holds must not matter, be it NaN.
    return jnp.where(counts, values, 0).sum(axis=(0, 1)) / jnp.maximum(counts.sum(), 1)


def tokens_per_expert(index_BLK: Array, num_experts: int, mask_BL: Array | None) -> Array:
    """How many of the tokens that `mask_BL` keeps chose each expert: int32 [N]."""
    chosen = jnp.ones(index_BLK.shape, jnp.int32)
    if mask_BL is not None:
        chosen = chosen * (mask_BL != 0)[..., None]
    one_hot = index_BLK[..., None] == jnp.arange(num_experts)  # fused into the sum: never stored
    return jnp.where(one_hot, chosen[..., None], 0).sum(axis=(0, 1, 2))


def active_experts(index: Array, num_experts: int) -> Array:
    """bool [..., N]: whether the expert is among the choices [..., K]."""
    active = jnp.zeros((*index.shape[:-1], num_experts), bool)
    for k in range(index.shape[-1]):
        active |= index[..., k, None] == jnp.arange(num_experts)
    return active


def inactive_experts(index_TK: Array, num_experts: int, fewest: int) -> Array:
    """int32 [T, N - fewest]: the experts that are not among the choices of each token, in order; N stands for none.

    fewest: different experts that every token has among its choices at least.
    """
    inactive_TN = ~active_experts(index_TK, num_experts)
    is_one_TC, expert_TC = jax.lax.top_k(inactive_TN.astype(jnp.int32), num_experts - fewest)
    return expert_TC if fewest == index_TK.shape[1] else jnp.where(is_one_TC > 0, expert_TC, num_experts)


def within_capacity(index_BLK: Array, num_experts: int, capacity: int, mask_BL: Array | None) -> Array:
    """The choices, N in the place of those that an expert has no room for.

    An expert takes the first `capacity` tokens of each sequence that choose it. So what is dropped does not depend on
    later tokens, nor on other sequences, and is the same on any mesh. Tokens that `mask_BL` leaves out take no room.
    """
    chosen_BLN = active_experts(index_BLK, num_experts)
    counted_BLN = chosen_BLN if mask_BL is None else chosen_BLN & (mask_BL != 0)[..., None]
    before_BLN = jnp.cumsum(counted_BLN, axis=1, dtype=jnp.int32) - counted_BLN
    full_BLN = before_BLN >= capacity
    choices = (active_experts(index_BLK[..., k : k + 1], num_experts) for k in range(index_BLK.shape[2]))
    dropped_BLK = jnp.stack([(full_BLN & choice_BLN).any(axis=-1) for choice_BLN in choices], axis=-1)
    return jnp.where(dropped_BLK, num_experts, index_BLK)


def load_balance_loss(mean_probs_N: Array, counts_N: Array) -> Array:
    """N * sum_e f_e P_e: 1 at perfect balance, N at worst (Switch Transformer, eq. 4, generalised to K choices).

    f_e is the share of assignments to expert e and carries no gradient, P_e the mean router probability. Both are
    over all tokens that count, under jit those of the global batch on any mesh. Arguments may have axes before N.
    """
    f_N = counts_N / jnp.maximum(counts_N.sum(axis=-1, keepdims=True), 1)
    return counts_N.shape[-1] * jnp.sum(f_N * mean_probs_N, axis=-1)


def sequence_balance_loss(probs_BLN: Array, index_BLK: Array, mask_BL: Array | None) -> Array:
    """The balance loss of each sequence on its own, mean over sequences (DeepSeek-V3, eq. 17 to 20).

    index_BLK: the K experts of the largest scores, whatever a bias added to these chooses.
    """
    num_experts = probs_BLN.shape[-1]
    chosen_BLN = active_experts(index_BLK, num_experts).astype(jnp.float32)
    if mask_BL is not None:
        counts_BL1 = (mask_BL != 0)[..., None]
        chosen_BLN, probs_BLN = jnp.where(counts_BL1, chosen_BLN, 0), jnp.where(counts_BL1, probs_BLN, 0)
        length_B1 = counts_BL1.sum(axis=1)
    else:
        length_B1 = jnp.full((probs_BLN.shape[0], 1), probs_BLN.shape[1])
    f_BN = chosen_BLN.sum(axis=1) / jnp.maximum(chosen_BLN.sum(axis=(1, 2))[:, None], 1)
    loss_B = num_experts * (f_BN * probs_BLN.sum(axis=1) / jnp.maximum(length_B1, 1)).sum(axis=-1)
    return loss_B.sum() / jnp.maximum((length_B1 > 0).sum(), 1)


def simbal_loss(kernel_DN: Array) -> Array:
    """Mean over the N x N entries of |R^T R - I|, R the router's matrix: 0 if its columns are orthonormal (SimBal).

    Tokens that are alike are then routed alike, and those that are spread evenly choose experts evenly.
    """
    gram_NN = jnp.matmul(kernel_DN.T, kernel_DN, precision=jax.lax.Precision.HIGHEST)
    return jnp.abs(gram_NN - jnp.eye(gram_NN.shape[0])).mean()


def router_z_loss(logits_BLN: Array, mask_BL: Array | None) -> Array:
    """Mean of the squared log-partition (ST-MoE, eq. 5)."""
    return masked_mean(jax.nn.logsumexp(logits_BLN, axis=-1) ** 2, mask_BL)


def router_entropy(probs_BLN: Array, mask_BL: Array | None) -> Array:
    """Mean entropy of the router's distribution in nats: log N when undecided, 0 when certain. Without a gradient."""
    probs_BLN = jax.lax.stop_gradient(probs_BLN)
    return masked_mean(jax.scipy.special.entr(probs_BLN).sum(axis=-1), mask_BL)
