"""The collective that XLA:CPU lacks, made of all-gathers, so that what is built on it runs on simulated devices."""

import jax
import jax.numpy as jnp

from default_moe.moe.experts import parallel


def emulate_exchange(monkeypatch) -> None:
    """`jax.lax.ragged_all_to_all` by what it is documented to do, and a platform that is said to have it."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(parallel, "platform", lambda: "tpu")


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Every receiver looks through all slices for its own. All NaN if it was told of other sizes than it gets."""
    device = jax.lax.axis_index(axis_name)
    sent, starts, sizes, puts = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    starts, sizes, puts = (a.reshape(len(a), len(a), -1)[:, device] for a in (starts, sizes, puts))
    source = jnp.arange(starts.size) // starts.shape[1]
    starts, sizes, puts = (a.reshape(-1) for a in (starts, sizes, puts))
    row = jnp.arange(len(output))
    here = (row[:, None] >= puts) & (row[:, None] < puts + sizes)
    which = here.argmax(axis=1)
    received = sent[source[which], starts[which] + row - puts[which]]
    output = jnp.where(here.any(axis=1)[:, None], received, output)
    return jnp.where((sizes == recv_sizes).all(), output, jnp.nan)
