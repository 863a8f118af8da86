"""The collective that XLA:CPU lacks, made of all-gathers, so that what is built on it runs on simulated devices."""

import jax
import jax.numpy as jnp

from default_moe import expert_parallel


def emulate_exchange(monkeypatch) -> None:
    """`jax.lax.ragged_all_to_all` by what it is documented to do, and a platform that is said to have it."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(expert_parallel, "platform", lambda: "tpu")


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Every receiver looks through all slices for its own. All NaN if it was told of other sizes than it gets."""
    device = jax.lax.axis_index(axis_name)
    sent, starts, sizes, puts = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    starts, sizes, puts = (a.reshape(len(a), len(a), -1)[:, device] for a in (starts, sizes, puts))
    row = jnp.arange(len(output))
    for source in range(len(sent)):
        for start, size, put in zip(starts[source], sizes[source], puts[source], strict=True):
            here = ((row >= put) & (row < put + size))[:, None]
            output = jnp.where(here, sent[source].at[start + row - put].get(mode="clip"), output)
    return jnp.where((sizes.reshape(-1) == recv_sizes).all(), output, jnp.nan)
