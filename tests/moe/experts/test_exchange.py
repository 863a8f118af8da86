"""Tokens exchanged between the devices that hold experts: the offsets, the layer against naive loops, the choice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sharded_layers
from helpers.emulation import emulate_exchange
from helpers.layers import check_results, make_config, with_settings
from helpers.refusals import refused

from default_moe.config import MoEConfig
from default_moe.moe.experts import parallel
from default_moe.moe.experts.exchange import received_slots, slices
from default_moe.moe.experts.parallel import exchange_bytes, gather_bytes, resolve_expert_parallel
from default_moe.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("tokamax_everywhere")


def exchange_by_loops(rows_GS, offsets, num_slots):
    """What every device receives, slice by slice, where no two rows may go to one place."""
    num_devices = len(rows_GS)
    received_GQ = np.full((num_devices, num_slots), -1)
    for source, sent in enumerate(offsets):
        per_device = len(sent.send_size_N) // num_devices
        for n, (start, size, put) in enumerate(zip(*sent[:3], strict=True)):
            receiver, place = divmod(n, per_device)
            assert offsets[receiver].received_size_N[source * per_device + place] == size
            assert put + size <= num_slots and start + size <= len(rows_GS[source])
            assert (received_GQ[receiver, put : put + size] == -1).all()
            received_GQ[receiver, put : put + size] = rows_GS[source][start : start + size]
    return received_GQ


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_every_row_reaches_its_expert_and_returns_to_its_slot(num_devices, align):
    num_experts, tokens, top_k = 8, 6, 3
    held = num_experts // num_devices
    rng = np.random.default_rng(num_devices)
    shape = (num_devices, tokens, top_k)
    choices = {
        "at random": rng.permuted(np.tile(np.arange(num_experts), (num_devices, tokens, 1)), axis=2)[..., :top_k],
        "the first three experts alone": np.broadcast_to(np.arange(top_k), shape),
        "the last three experts alone": np.broadcast_to(num_experts - 1 - np.arange(top_k), shape),
        "one token each, for its device's own experts": np.arange(num_experts).reshape(num_devices, 1, held),
    }
    fullest = 0
    for name, index_GTK in choices.items():
        counts_GN = np.stack([np.bincount(index.reshape(-1), minlength=num_experts) for index in index_GTK])
        sizes_GN = -(-counts_GN // align) * align
        num_slots = tokens * top_k + num_experts * (align - 1)
        # Rows named by device and slot; those of expert n lie behind those of the experts before it.
        rows_GS = 1000 * np.arange(num_devices)[:, None] + np.arange(num_slots)
        both = [jax.tree.map(np.asarray, slices(jnp.asarray(sizes_GN), device)) for device in range(num_devices)]
        there, back = zip(*both, strict=True)
        room = received_slots(tokens, top_k, held, num_devices, align, align)
        received_GQ = exchange_by_loops(rows_GS, there, room)
        for device in range(num_devices):
            expected = []
            for expert in range(device * held, (device + 1) * held):
                for source in range(num_devices):
                    first = sizes_GN[source, :expert].sum()
                    expected += list(rows_GS[source, first : first + sizes_GN[source, expert]])
            np.testing.assert_array_equal(received_GQ[device], expected + [-1] * (room - len(expected)), name)
            fullest = max(fullest, len(expected))
        returned_GS = exchange_by_loops(received_GQ, back, num_slots)
        used_GS = np.arange(num_slots) < sizes_GN.sum(axis=1)[:, None]
        np.testing.assert_array_equal(returned_GS, np.where(used_GS, rows_GS, -1), name)
    if align == 1:
        assert fullest == room  # so less would not do


@pytest.mark.parametrize(
    ("sizes", "matmul", "fields", "options"),
    [
        ((2, 2, 2), "ragged", {}, {}),
        ((1, 1, 8), "blocks", {}, {"masked": True}),
        ((2, 1, 4), "tokamax", {}, {}),
        ((2, 1, 4), "blocks", {"ema_weighted": False}, {"placement": "replicated"}),
        ((1, 1, 8), "ragged", {"substitute": "backward"}, {"masked": True}),
        ((2, 2, 2), "blocks", {"router": "topk"}, {}),
        ((2, 2, 2), "ragged", {}, {"train": False}),
        ((2, 1, 4), "blocks", {"expert_gradient": True}, {"masked": True}),
        ((2, 2, 2), "tokamax", {"expert_gradient": True}, {}),
    ],
    ids=str,
)
def test_exchanged_tokens_give_what_the_loops_do(monkeypatch, sizes, matmul, fields, options):
    emulate_exchange(monkeypatch)
    sharded_layers.check_step(
        make_mesh(*sizes), make_config(matmul=matmul, expert_parallel="exchange", **fields), **options
    )


def test_all_tokens_on_one_device(monkeypatch):
    """Experts 0 and 1, which the first of four devices holds, get every token: the room for what arrives is filled."""
    emulate_exchange(monkeypatch)
    x, params, ema, g = sharded_layers.skewed_inputs()
    kernel = 0.05 * params.kernel
    kernel[0, :2] += [3, 2]
    params = params._replace(kernel=np.float64(np.float32(kernel)))
    mesh, config = make_mesh(2, 1, 4), make_config(matmul="tokamax", expert_parallel="exchange")
    expected, grads = sharded_layers.step_by_loops(config, x, params, ema, g)
    assert expected.counts.tolist() == [sharded_layers.TOKENS, sharded_layers.TOKENS, 0, 0, 0, 0, 0, 0]
    variables, *inputs = sharded_layers.arrays(config, mesh)
    router = variables["params"]["router"]
    router["kernel"] = jax.device_put(jnp.asarray(params.kernel, jnp.float32), router["kernel"].sharding)
    check_results(config, sharded_layers.compiled_step(mesh, config)(variables, *inputs), expected, grads)


def test_the_choice_is_what_moves_less(monkeypatch):
    config = MoEConfig(num_experts=4, top_k=1, dtype="bfloat16")
    # 3 other devices with 100 tokens each: 8 in bfloat16 and its gradient, 8 in float32 and its gradient, ...
    assert gather_bytes(config, 100, 8, 4) == 300 * (2 * 8 * 2 + 2 * 8 * 4 + 2 * 4 * 4 + 4)
    # Three quarters of 100 rows there, back, and the gradients; default vectors and sums; 4 counts of 3 devices.
    assert exchange_bytes(config, 100, 8, 4) == 0.75 * (4 * 100 * 8 * 2 + 2 * 4 * 8 * 4) + 3 * 4 * 4

    # A quarter as many samples: their rows there and back, and counts once more; or a place and an expert of each.
    sampled = with_settings(config, router="default_sampled", sample_every=4)
    assert exchange_bytes(sampled, 100, 8, 4) == 0.75 * (4.5 * 100 * 8 * 2 + 2 * 4 * 8 * 4) + 2 * 3 * 4 * 4
    assert gather_bytes(sampled, 100, 8, 4) - gather_bytes(config, 100, 8, 4) == 75 * 2 * 4

    def chosen(expert: int, **fields) -> str | None:
        with jax.set_mesh(make_mesh(-1, 1, expert)):
            return resolve_expert_parallel(MoEConfig(num_experts=8, dtype="bfloat16", **fields), 4096, 512)

    assert [chosen(1), chosen(2), chosen(2, expert_parallel="gather")] == [None, "gather", "gather"]
    emulate_exchange(monkeypatch)
    # Rows of 4 K D bfloat16 numbers cross with a chance of 1/2, or D (4 + 8) bytes of every token of the other device.
    assert [chosen(2, top_k=k) for k in (1, 2, 4, 8)] == ["exchange", "exchange", "gather", "gather"]
    assert [chosen(8, top_k=k) for k in (1, 8)] == ["exchange", "exchange"]
    assert [chosen(1, expert_parallel="exchange"), chosen(2, expert_parallel="gather")] == [None, "gather"]
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(parallel, "platform", lambda: "gpu")
        on_gpu.setattr(parallel, "is_nvidia", lambda: True)
        assert [chosen(8), chosen(8, expert_parallel="exchange")] == ["gather", "exchange"]
    with nn.logical_axis_rules((("batch", ("data", "fsdp")), ("expert", "expert"))):
        assert chosen(2) == "gather"
        with refused(r"moe\.expert_parallel is 'exchange', but mesh\.rules do not"):
            chosen(2, expert_parallel="exchange")
