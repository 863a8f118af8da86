"""The training loss and its parts."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from default_moe.config import MoEConfig
from default_moe.model import LayerStats


@flax.struct.dataclass
class TokenSums:
    """Sums over the tokens that count, as float32 scalars: they add up over batches exactly as over tokens.

    nll: negative log-likelihood in nats.  tokens: number of tokens.  target_bytes: UTF-8 bytes they stand for.
    """

    nll: Array
    tokens: Array
    target_bytes: Array


def token_sums(logits_BLV: Array, batch: dict[str, Array]) -> TokenSums:
    """Negative log-likelihood of `batch["targets"]`, in float32, where `batch["loss_mask"]` is not zero."""
    logits_BLV = logits_BLV.astype(jnp.float32)
    target_logit_BL = jnp.take_along_axis(logits_BLV, batch["targets"][..., None], axis=-1)[..., 0]
    nll_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - target_logit_BL
    mask_BL = batch["loss_mask"]
    # where, not a product: what padding predicts may be infinite, and must not matter.
    return TokenSums(
        nll=jnp.sum(jnp.where(mask_BL != 0, nll_BL, 0.0)),
        tokens=jnp.sum((mask_BL != 0).astype(jnp.float32)),
        target_bytes=jnp.sum(jnp.where(mask_BL != 0, batch["target_bytes"], 0).astype(jnp.float32)),
    )


def auxiliary_loss(stats: LayerStats | None, config: MoEConfig) -> Array:
    """The weighted balance and z-losses, summed over layers as in the authors' code."""
    if stats is None:
        return jnp.zeros(())
    return (
        config.load_balance_weight * stats.load_balance_loss.sum() + config.router_z_weight * stats.router_z_loss.sum()
    )
