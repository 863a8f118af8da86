"""The loss over the vocabulary, in chunks and whole, against float64 and without arrays that grow with both axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import assert_close

from default_moe.model.language_model import Unembedding
from default_moe.training.losses import token_sums

B, L, D, V = 2, 7, 5, 11


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "targets": jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32),
        "loss_mask": jnp.asarray(rng.random((B, L)) < 0.7, jnp.float32),
        "target_bytes": jnp.asarray(rng.integers(1, 9, (B, L)), jnp.int32),
    }


def factors(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(B, L, D)), dtype), jnp.asarray(rng.normal(size=(D, V)), dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def value_and_gradients(x, head, batch, logits_per_chunk, z_weight=0.0):
    def mean(x, head):
        loss, sums = token_sums(Unembedding(x, head), batch, logits_per_chunk, z_weight)
        return loss / sums.tokens

    return jax.value_and_grad(mean, argnums=(0, 1))(x, head)


# 14 tokens of 11 logits: whole, 2 chunks of 7, 3 chunks of 5 (the last one padded), and one token at a time.
@pytest.mark.parametrize(
    ("logits_per_chunk", "z_weight"), [(10**9, 0.0), (77, 0.0), (60, 0.25), (1, 0.0), (10**9, 0.25)]
)
def test_value_and_gradients_equal_float64(logits_per_chunk, z_weight):
    batch, (x, head) = make_batch(), factors()
    x64, head64 = (np.asarray(a, np.float64) for a in (x, head))
    counted, is_target = np.asarray(batch["loss_mask"]) != 0, np.eye(V)[batch["targets"]]
    logits = x64 @ head64
    log_partition = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    log_probs = logits - log_partition
    nll, z = -(log_probs * is_target).sum(axis=-1)[counted].mean(), (log_partition[counted] ** 2).mean()
    d_logits = np.exp(log_probs) * (1 + 2 * z_weight * log_partition) - is_target
    d_logits *= counted[..., None] / counted.sum()
    got, (got_x, got_head) = value_and_gradients(x, head, batch, logits_per_chunk, z_weight)
    assert float(got) == pytest.approx(nll + z_weight * z, rel=1e-6)
    assert_close(got_x, d_logits @ head64.T, "gradient of x")
    assert_close(got_head, np.einsum("bld,blv->dv", x64, d_logits), "gradient of the head")
    loss, sums = token_sums(Unembedding(x, head), batch, logits_per_chunk, z_weight)  # not differentiated
    means = [float(a / sums.tokens) for a in (loss, sums.nll, sums.output_z)]
    assert means == pytest.approx([nll + z_weight * z, nll, z], rel=1e-6)


def test_sums_by_hand():
    """Logits 0 over 11 entries: ln 11 a token. Padding (weight 0) counts in nothing, be its logits infinite."""
    x = jnp.zeros((1, 3, D)).at[0, 2].set(jnp.inf)
    batch = {
        "targets": jnp.array([[0, 10, 3]]),
        "loss_mask": jnp.array([[1.0, 1.0, 0.0]]),
        "target_bytes": jnp.array([[1, 3, 7]]),
    }
    for logits_per_chunk in (10**9, 1):
        loss, sums = token_sums(Unembedding(x, jnp.ones((D, V))), batch, logits_per_chunk, 0.5)
        assert float(sums.nll) == pytest.approx(2 * np.log(11), rel=1e-6)
        assert float(loss) == pytest.approx(2 * np.log(11) + np.log(11) ** 2, rel=1e-6)
        assert (float(sums.tokens), float(sums.target_bytes)) == (2, 4)


def test_bfloat16_factors_give_float32_sums_and_bfloat16_gradients():
    low = factors(jnp.bfloat16)
    value, (d_x, d_head) = value_and_gradients(*low, make_batch(), 60)
    exact, (exact_x, exact_head) = value_and_gradients(*(a.astype(jnp.float32) for a in low), make_batch(), 60)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(exact), rel=1e-5)
    assert (d_x.dtype, d_head.dtype) == (jnp.bfloat16, jnp.bfloat16)
    # The gradient of the logits and the result are each rounded at 2^-9.
    assert_close(d_x, exact_x, "gradient of x", 2**-7)
    assert_close(d_head, exact_head, "gradient of the head", 2**-7)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """4,096 tokens and 4,096 entries: logits of 67 MB, or in 16 chunks 4 MB. The other arrays are small."""
    tokens = vocab = 4096
    shape = jax.ShapeDtypeStruct
    batch = {name: shape((1, tokens), a.dtype) for name, a in make_batch().items()}
    whole, chunked = (
        value_and_gradients.lower(shape((1, tokens, 8), jnp.float32), shape((8, vocab), jnp.float32), batch, logits)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for logits in (tokens * vocab, tokens * vocab // 16)
    )
    assert whole > 4 * tokens * vocab
    assert chunked < whole / 8
