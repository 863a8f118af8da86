"""Programs compiled for TPUs that are not there: `pytest -m tpu`, which needs what tests/requirements_tpu.txt lists.

Nothing runs. What the compiler says of operations, collectives and memory is compared with what they should be.
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.layers import moe_config
from jax.extend import backend as jax_backend
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from default_moe import sharding
from default_moe.bench.candidate import random_batch
from default_moe.config import Config, MeshConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from default_moe.moe import MoELayer
from default_moe.moe.experts import grouped_matmul, tpu_tiles
from default_moe.moe.experts.parallel import exchange_bytes
from default_moe.plan.costs import costs
from default_moe.plan.hlo import Hlo
from default_moe.plan.topologies import open_topology
from default_moe.training import memory, program
from default_moe.training.memory import step_memory
from default_moe.training.program import Program

pytestmark = pytest.mark.tpu

B, L, D, F, N, K = 8, 256, 512, 1024, 8, 2


@pytest.fixture(scope="module")
def devices():
    return open_topology("v5e:2x2").devices


@pytest.fixture(autouse=True)
def tokamax_sees_a_tpu(devices, monkeypatch):
    """It asks for the default device, which is a CPU here."""
    monkeypatch.setattr(jax_backend, "get_default_device", lambda: devices[0])


def compiled_layer(devices, mesh_config: MeshConfig, **fields):
    """The layer's gradient of a sum of squares, in bfloat16."""
    layer = MoELayer(moe_config(num_experts=N, top_k=K, expert_dim=F, dtype="bfloat16", **fields))
    mesh = sharding.make_mesh(mesh_config.data, mesh_config.fsdp, mesh_config.expert, devices)

    def init():
        return layer.init(jax.random.key(0), jnp.zeros((len(devices), 2, D), jnp.bfloat16), train=False)

    def loss(params, others, x):
        (y, aux), state = layer.apply({"params": params, **others}, x, train=True, mutable=["default_vectors"])
        return (y.astype(jnp.float32) ** 2).sum() + aux["load_balance_loss"], state

    with program.in_force(mesh, Config(mesh=mesh_config)):
        others = sharding.abstract_arrays(sharding.trace_annotated(init)[1], mesh, mesh_config.rules)
        params = others.pop("params")
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
        x = jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16, sharding=batch)
        return jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True)).lower(params, others, x).compile()


# Operations of one product of a device's slots: 512 tokens make 1,024 assignments, with up to 7 rows of padding for
# each of 8 experts 1,080, which for tokamax becomes the next multiple of 128. There are 3 such products forward and 6
# backward.
RAGGED_PRODUCT = 2 * 1080 * D * F
PRODUCT = 2 * 1152 * D * F


@pytest.mark.parametrize(
    ("fields", "flops"),
    [
        # Its kernels say how many operations they take. Router and default vectors take 4 products of [T, D, N].
        ({}, 9 * PRODUCT),
        # One pass through the other experts: 512 x 6 rows, with padding 3,128, at the next multiple of 128.
        ({"router": "densemixer"}, 9 * PRODUCT + 3 * 2 * 3200 * D * F),
        # Six of the nine products are kernels of XLA's; the other three are masked products with all N.
        ({"matmul": "ragged"}, (6 + 3 * N) * RAGGED_PRODUCT),
    ],
    ids=["tokamax", "an exact dense gradient", "ragged_dot"],
)
def test_experts_cost_what_is_computed(devices, fields, flops):
    layer = compiled_layer(devices, MeshConfig(data=4), **fields)
    assert layer.cost_analysis()["flops"] == pytest.approx(flops, rel=0.05)
    assert "matmul" in fields or "tpu_custom_call" in layer.as_text()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8320, 1024, 2816, 8), (65_536, 1024, 704, 32), (16_384, 2048, 5632, 8)])
def test_grouped_products_fit_in_the_tiles_that_are_chosen(topology, shape, dtype, monkeypatch):
    num_rows, depth, width, num_groups = shape
    itemsize = jnp.dtype(dtype).itemsize
    (device, *_) = open_topology(topology).devices
    monkeypatch.setattr(jax_backend, "get_default_device", lambda: device)
    here = SingleDeviceSharding(device)
    lhs = jax.ShapeDtypeStruct((num_rows, depth), dtype, sharding=here)
    rhs = jax.ShapeDtypeStruct((num_groups, depth, width), dtype, sharding=here)
    sizes_M = jax.ShapeDtypeStruct((num_groups,), jnp.int32, sharding=here)

    def both(lhs, rhs, sizes_M):
        out, pull = jax.vjp(lambda *a: grouped_matmul.grouped_matmul(*a, sizes_M, "tokamax"), lhs, rhs)
        return out, pull(out)

    with jax.set_mesh(sharding.make_mesh(1, 1, 1, [device])):
        text = jax.jit(both).lower(lhs, rhs, sizes_M).compile().as_text()
    found = re.findall(r'\\"tile_m\\": (\d+), \\"tile_k\\": (\d+), \\"tile_n\\": (\d+)', text)
    assert {tuple(map(int, tiles)) for tiles in found} == {
        tpu_tiles.for_rows(num_rows, depth, width, num_groups, itemsize),
        tpu_tiles.for_rows(num_rows, width, depth, num_groups, itemsize),
        tpu_tiles.for_matrices(num_rows, depth, width, num_groups, itemsize),
    }
    # Beside operands and results: masks of rows and matrices that are nobody's, and what is read more than once, rows
    # of the widest up to 11 times. Tiles of 128 each way would read the paper's rows 22 times, matrices 72 times.
    least = itemsize * 3 * (num_rows * (depth + width) + num_groups * depth * width)
    moved, of_half = (costs(Hlo(text), 1, 1, fill).bytes for fill in (1.0, 0.5))
    assert least < moved < (4 if dtype == "bfloat16" else 8) * least
    # Matrices are read and written whatever the share of rows that are not empty.
    matrices = itemsize * 3 * num_groups * depth * width
    assert moved / 2 + matrices / 2 < of_half < moved


def test_experts_over_devices_gather_tokens_and_scatter_outputs(devices):
    """Two devices hold four experts each: they never gather those."""
    layer = compiled_layer(devices, MeshConfig(data=2, expert=2), expert_parallel="gather")
    text = layer.as_text()
    gathered = re.findall(r"= \(?(?:\w+\[[\d,]*\][^ ]*,? ?)+\)? all-gather(?:-start)?\(", text)
    assert gathered and not [line for line in gathered if f"{N},{D},{F}" in line or f"{N},{F},{D}" in line]
    assert "reduce-scatter" in text
    # Each device keeps room for the assignments of two devices, of which it computes those that it holds.
    assert layer.cost_analysis()["flops"] == pytest.approx(2 * 9 * PRODUCT, rel=0.1)


def along_the_expert_axis(text: str) -> list[tuple[str, str, list[int]]]:
    """(operation, dtype, sizes of its results) of every collective operation between devices 0 and 1, and 2 and 3."""
    found = []
    for results, name, line in re.findall(r"= (.+?) ([a-z][a-z-]*?)(?:-start)?\((.*)", text):
        if "replica_groups={{0,1},{2,3}}" in line:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", results)
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for _, shape in shapes]
            found.append((name, shapes[0][0], sizes))
    return found


def test_exchanged_tokens_are_all_that_moves(devices):
    """Each device sends the rows of 1,024 assignments, with padding 1,080, and has room for those of two devices."""
    layer = compiled_layer(devices, MeshConfig(data=2, expert=2))
    room = 2176  # 2 devices x (1,024 assignments + 4 experts x 7 rows of padding), at the next multiple of 128
    moved = along_the_expert_axis(layer.as_text())
    # Rows there and back, and the gradients there and back: 2 bytes each for half of 4 x 1,024 x D numbers on the mean.
    rows = [(dtype, size) for name, dtype, size in moved if name == "ragged-all-to-all"]
    assert sorted(rows) == [("bf16", [1080 * D])] * 2 + [("bf16", [room * D])] * 2
    config = MoEConfig(num_experts=N, top_k=K, dtype="bfloat16", router="topk")
    assert exchange_bytes(config, 512, D, 2) == 2 * 4 * 1024 * D / 2 + 4 * N
    # Beside them numbers of rows, default vectors and their sums: neither tokens nor experts.
    others = [sizes for name, _, sizes in moved if name != "ragged-all-to-all"]
    assert others and max(max(sizes) for sizes in others) == N * D
    assert layer.cost_analysis()["flops"] == pytest.approx(9 * PRODUCT * room / 1152, rel=0.05)


def test_the_training_step_compiles(devices, monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 16 * 2**30)
    config = Config(
        model=ModelConfig(
            d_model=256,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=128,
            attention_window=100,
            vocab_size=1024,
            dtype="bfloat16",
            remat="dots",
        ),
        moe=MoEConfig(num_experts=8, expert_dim=512, balancer="quantile", load_balance_over="batch"),
        train=TrainConfig(batch_size=16, sequence_length=256, grad_accum_steps=2),
        mesh=MeshConfig(data=1, fsdp=2, expert=2),
    )
    made = Program(config, 1024, devices)
    assert (made.matmul, made.expert_parallel, made.attention) == ("tokamax", "exchange", "splash")
    compiled = made.compile_train_step(jax.tree.map(lambda a: a[:1], random_batch(config, 1024)))
    # Twice forward and twice backward: what the forward pass received is kept.
    exchanges = [name for name, *_ in along_the_expert_axis(compiled.as_text()) if name == "ragged-all-to-all"]
    assert len(exchanges) == 4
    state = made.abstract_state
    shards = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    needed = step_memory(compiled)
    # Float32 parameters and two moments.
    assert needed.state == pytest.approx(3 * 4 * sum(shards), rel=0.02)
    assert needed.total < 2**30
    # The planner counts what XLA does, which takes every loop for one turn and counts more than products.
    hlo = Hlo(compiled.as_text())
    assert hlo.open_loops == 0
    repeated = costs(hlo, 1, 1).flops
    hlo.runs = dict.fromkeys(hlo.runs, 1)
    assert costs(hlo, 1, 1).flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.06)
    assert repeated > 3 * costs(hlo, 1, 1).flops  # 2 microbatches of 2 MoE layers, but for what is outside of loops


def test_newton_schulz_stands_once_in_a_step(devices, monkeypatch):
    """Each of its five turns has two products that give matrices of D x D, for each of the experts' three stacks."""
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 16 * 2**30)
    config = Config(
        model=ModelConfig(d_model=128, num_layers=1, num_dense_layers=0, num_heads=1, vocab_size=256),
        moe=MoEConfig(num_experts=N, expert_dim=256, matmul="ragged"),
        train=TrainConfig(batch_size=1, sequence_length=16),
        optim=OptimConfig(name="muon"),
    )
    made = Program(config, 256, devices[:1])
    hlo = Hlo(made.compile_train_step(random_batch(config, 256)).as_text())
    squares = [
        runs for i, runs in hlo.instructions() if i.opcode == "convolution" and i.results[0].shape == (N, 128, 128)
    ]
    assert sum(squares) == 3 * 5 * 2


def test_the_planners_command():
    command = [sys.executable, "-m", "default_moe.plan", "--topology=v5e:2x2", "--config.model.num_layers=2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2: 4 x TPU v5 lite, mesh data 4" in done.stdout and "of 15.75 GiB: fits" in done.stdout
    assert "limited by memory traffic" in done.stdout and done.stderr == ""


def test_a_mesh_may_take_parts_of_the_toruss_sides():
    """1,024 chips lie in 8 x 8 x 16: no side has four, and none are 256 together with others' wholes."""
    mesh = sharding.make_mesh(1, 256, 4, open_topology("v5p:8x8x16").devices)
    assert mesh.devices.shape == (1, 256, 4)
    assert len({device.id for device in mesh.devices.flat}) == 1024
