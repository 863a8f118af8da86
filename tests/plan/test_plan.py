"""The planner: what it reads from compiled programs, compared with arithmetic, and its command."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.refusals import refused
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from default_moe.config import Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from default_moe.errors import ConfigError
from default_moe.moe.experts.hopper_tiles import Tiles
from default_moe.plan import kernels, report, search, topologies
from default_moe.plan.collectives import collectives, device_groups, summary
from default_moe.plan.costs import costs
from default_moe.plan.hlo import Hlo
from default_moe.plan.search import largest_by_proportion, largest_microbatch
from default_moe.plan.step_plan import make_plan, state_bytes
from default_moe.plan.topologies import Hardware, Topology, open_topology, traced_for
from default_moe.sharding import make_mesh
from default_moe.training.memory import StepMemory

ROOT = Path(__file__).parents[2]
CONFIG = Config(
    model=ModelConfig(d_model=16, num_layers=4, num_heads=2, remat="full"),
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=16, matmul="ragged"),
    train=TrainConfig(batch_size=32, sequence_length=16),
    mesh=MeshConfig(data=2, fsdp=2, expert=2),
)


def cpus(memory: int = 2**40) -> Topology:
    """The eight simulated devices, as if each had that much memory."""
    return Topology("cpus", jax.devices(), Hardware(memory, 1e11, 1e9, 1e8))


@pytest.fixture(scope="module")
def plan():
    return make_plan(CONFIG, 257, cpus())


def compiled(function, *shapes) -> Hlo:
    return Hlo(jax.jit(function).lower(*shapes).compile().as_text())


def floats(*shape: int, **options) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, **options)


def train(**fields) -> Config:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **fields))


def test_loops_count_with_their_turns():
    """Seven turns of five turns of [8, 16] x [16, 16]."""

    def f(x, w):
        def inner(x, w):
            return x @ w, None

        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, w)[0], None), x, None, length=7)[0]

    found = costs(compiled(f, floats(8, 16), floats(5, 16, 16)), 1e12, 1e12)
    assert (found.flops, found.open_loops) == (7 * 5 * 2 * 8 * 16 * 16, 0)
    # Each turn reads its slice of w alone, which XLA writes and reads once more; x moves in, out, and is copied.
    assert 7 * 5 * 4 * 16 * 16 <= found.bytes <= 7 * 5 * 4 * (3 * 16 * 16 + 5 * 8 * 16)
    assert found.busy_seconds == pytest.approx(sum(found.seconds_of.values()))


def test_a_loop_whose_turns_depend_on_data_is_said_to():
    def loop(n, x):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    hlo = compiled(loop, jax.ShapeDtypeStruct((), jnp.int32), floats(4, 4))
    assert (costs(hlo, 1, 1).flops, hlo.open_loops) == (2 * 4**3, 1)


TPU_PROGRAM = """HloModule example, is_scheduled=true

%condition (p.1: (s32[], bf16[2,256,4,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %p.1 = (s32[]{:T(128)}, bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.2: (s32[], bf16[2,256,4,64])) -> (s32[], bf16[2,256,4,64]) {
  %p.2 = (s32[]{:T(128)}, bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %q = bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %k = bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)S(1)} copy(%q)
  %scores = f32[2,4,256,256]{2,3,1,0:T(8,128)} convolution(%q, %k), WINDOW, metadata={op_name="f/moe_layers/attention"}
  %kernel = bf16[8,8]{1,0:T(8,128)(2,1)} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"a":"b
c","cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"50"}}
  ROOT %out = (s32[]{:T(128)}, bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)}) tuple(%j, %q)
}

ENTRY %main (x: bf16[2,256,4,64]) -> bf16[2,256,4,64] {
  %x = bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[2,256,4,64]{1,3,2,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
""".replace("WINDOW", "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf")


def test_a_tpu_program_by_hand():
    """Six turns, each with a batched product written as a convolution, whose padding is free, and a kernel.

    q and k have 2 * 256 * 4 * 64 bfloat16 numbers; k stays on the chip.
    """
    found = costs(Hlo(TPU_PROGRAM), 1e12, 1e9)
    assert found.flops == 6 * (2 * 2 * 4 * 256 * 256 * 64 + 1000)
    q, scores = 2 * 2 * 256 * 4 * 64, 4 * 2 * 4 * 256 * 256
    assert found.bytes == 6 * (q + (q + scores) + 50)
    assert found.seconds_of["attention"] == pytest.approx(6 * (q + scores) / 1e9)


GPU_PROGRAM = """HloModule example, is_scheduled=true

%fused (p: bf16[128,64], q: bf16[2,4,64,32], r: s32[4]) -> bf16[128,32] {
  %p = bf16[128,64]{1,0} parameter(0)
  %q = bf16[2,4,64,32]{3,2,1,0} parameter(1)
  %r = s32[4]{0} parameter(2)
  %w = bf16[1,4,64,32]{3,2,1,0} slice(%q), slice={[0:1], [0:4], [0:64], [0:32]}
  %one = bf16[4,64,32]{2,1,0} bitcast(%w)
  ROOT %product = bf16[128,32]{1,0} custom-call(%r, %p, %one), custom_call_target="mosaic_gpu_v2"
}

ENTRY %main (x: bf16[128,64], w: bf16[2,4,64,32], n: s32[4]) -> bf16[4,64,32] {
  %x = bf16[128,64]{1,0} parameter(0)
  %w = bf16[2,4,64,32]{3,2,1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  %y = bf16[128,32]{1,0} fusion(%x, %w, %n), kind=kCustom, calls=%fused
  ROOT %gradient = bf16[4,64,32]{2,1,0} custom-call(%n, %n, %x, %y), custom_call_target="mosaic_gpu_v2"
}
"""


def test_a_gpu_program_by_hand():
    """A product of rows, fused with the slice that it takes its matrices from, and the gradient of its matrices.

    The latter alone skips rows that are empty.
    """
    found = costs(Hlo(GPU_PROGRAM), 1e12, 1e12)
    assert found.flops == 2 * (2 * 128 * 64 * 32)
    assert costs(Hlo(GPU_PROGRAM), 1e12, 1e12, grouped_fill=0.5).flops == 1.5 * (2 * 128 * 64 * 32)


def test_a_kernel_counts_each_of_its_products():
    """Two for gate and up, one for their gradients: of the rows and of the matrices, whatever else it reads."""
    shapes = "(e: s32[1], x: bf16[128,64], w: bf16[4,64,32], v: bf16[4,64,32], a: bf16[128,32], b: bf16[128,32])"
    call = '(bf16[128,32]{1,0}, bf16[128,32]{1,0}) custom-call(%e, %x, OPERANDS), custom_call_target="mosaic_gpu_v2"'
    kinds = {"e": "s32[1]{0}", "x": "bf16[128,64]{1,0}", "a": "bf16[128,32]{1,0}", "b": "bf16[128,32]{1,0}"}
    kinds |= dict.fromkeys("wv", "bf16[4,64,32]{2,1,0}")
    parameters = "\n".join(f"  %{name} = {kinds[name]} parameter({i})" for i, name in enumerate("exwvab"))
    for operands, products in (("%w, %v", 2), ("%w, %a, %b", 1)):
        entry = f"ENTRY %main {shapes} -> (bf16[128,32], bf16[128,32]) {{\n{parameters}\n"
        program = f"HloModule example\n\n{entry}  ROOT %y = {call.replace('OPERANDS', operands)}\n}}\n"
        assert costs(Hlo(program), 1e12, 1e12).flops == products * 2 * 128 * 64 * 32


def test_kernels_are_compiled_for_hopper_only():
    with refused("--kernels needs a Hopper GPU, --topology=h200:1, but --topology is v5e:4x4"):
        next(kernels.compile_kernels(Topology("v5e:4x4", [], None)))


def test_what_kernels_are_like_is_a_table():
    """What a compiler outside of Python prints is read too."""
    with kernels._all_that_is_printed() as printed:
        os.system("echo Used 168 registers; echo 20 bytes spill stores >&2")
    assert printed().split() == ["Used", "168", "registers", "20", "bytes", "spill", "stores"]
    found = kernels.Compiled("product", Tiles(256), 168, 20, 229_376, None)
    lines = kernels.table([found, found._replace(error="ValueError: no")]).splitlines()
    assert lines[1].split() == ["product", "128x256x64", "stages", "4", "168", "20", "224"] and lines[2].endswith(
        "ValueError: no"
    )


def test_a_device_that_is_not_there_is_seen_while_traced_for_it_alone():
    here = jax.devices()
    with traced_for(here[3]):
        assert jax.devices() == jax.devices("gpu") == [here[3]]
    assert jax.devices() == here


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "01 23 45 67"),
        ("replica_groups=[4,2]<=[8]", "01 23 45 67"),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", "01 23 45 67"),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}", "01 23 45 67"),
        ("source_target_pairs={{0,1},{1,2},{2,3},{4,5},{6,7},{5,7}}", "0123 4567"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "0246 1357"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", "0246 1357"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", "0246 1357"),
        ("replica_groups={}", "01234567"),
    ],
)
def test_device_groups_by_hand(written, groups):
    assert device_groups(f"{written}, x", 8) == {frozenset(map(int, group)) for group in groups.split()}


def test_device_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        device_groups("replica_groups=?", 8)


def test_collectives_in_a_loop_know_their_axis_and_bytes():
    """Three turns: 16 numbers on each device, summed over four devices along data."""
    mesh = make_mesh(4, 1, 2)

    def f(x):
        def turn(x, _):
            return jax.lax.pcast(jax.lax.psum(x, "data") / 4, "data", to="varying"), None

        return jax.lax.scan(turn, x, None, length=3)[0]

    with jax.set_mesh(mesh):
        spec = P(("data", "expert"))
        mapped = jax.shard_map(f, in_specs=spec, out_specs=spec)
        hlo = compiled(mapped, floats(8, 16, sharding=NamedSharding(mesh, spec)))
    assert summary(collectives(hlo, mesh.shape)) == [("all-reduce", ("data",), 3, 3 * 2 * 4 * 16 * 3 // 4)]


def test_the_state_is_counted_as_it_is_split(plan):
    """Float32 parameters in parts, two moments of each."""
    held = [math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(plan.program.abstract_state.params)]
    assert plan.state.parameters == 4 * sum(held)
    assert plan.state.optimizer == 8 * sum(held) + 2 * 4  # and two counts
    assert sum(plan.state) == pytest.approx(plan.memory.state, rel=0.01)
    assert state_bytes(plan.program) == pytest.approx(sum(plan.state), abs=8192)  # all but the batch


def test_the_plan_is_of_the_step_that_trains(plan):
    axes = {axis for _, axes, _, _ in summary(plan.exchanges) for axis in axes}
    assert axes == {"data", "fsdp", "expert"}
    # In each of three MoE layers the tokens of two devices, [128, 16] float32: forward, again to recompute, and the
    # gradient of their outputs.
    gathers = [one for one in plan.exchanges if one.kind == "all-gather" and one.axes == ("expert",)]
    gathers = [one for one in gathers if one.instruction.results[0].shape == (128, 16)]
    assert [(one.runs, one.bytes) for one in gathers] == [(3, 128 * 16 * 4 // 2)] * 3
    text = report.text(plan)
    assert "mesh data 2 x fsdp 2 x expert 2" in text and "by 'gather'" in text
    assert report.as_json(plan)["exchanges"][0]["bytes_sent"] > 0


def with_temporaries(plan, config, memory: int):
    """As if the compiler gave the step of `config` 1,000 bytes and 300 more for each sequence a device."""
    plan = dataclasses.replace(plan, config=config, topology=cpus(memory))
    needed = 1000 + 300 * plan.sequences_a_device
    if needed > 2 * memory:  # then it gives up
        return dataclasses.replace(plan, memory=None, too_large=f"temporaries ({needed / 2**20:.9f}M) exceed")
    return dataclasses.replace(plan, memory=StepMemory(sum(plan.state), needed))


@pytest.mark.parametrize("start", [1, 4, 20, 512])
@pytest.mark.parametrize("most", [0, 1, 5, 40])
def test_the_largest_microbatch_is_found(plan, most, start):
    tried = []

    def make(config):
        tried.append(with_temporaries(plan, config, sum(plan.state) + 1000 + 300 * most + 150))
        return tried[-1]

    first = with_temporaries(plan, train(batch_size=8 * start), sum(plan.state) + 1150 + 300 * most)
    largest = largest_microbatch(first, make)
    assert (largest.sequences_a_device if largest else 0) in range(most - most // 8, most + 1)
    assert len(tried) <= 5
    if first.fits and start > 1:
        assert start <= largest_by_proportion(first) <= most


def test_search_compiles_what_promises_most_and_ranks_what_fits(plan, monkeypatch):
    tried = []

    def fake_plan(config, vocab_size, topology):
        made = with_temporaries(plan, config, topology.hardware.memory)
        costs = plan.costs._replace(busy_seconds=plan.costs.busy_seconds / (1 + len(tried)))
        return dataclasses.replace(made, costs=costs)

    monkeypatch.setattr(search, "make_plan", fake_plan)
    # In so many microbatches there would be too few sequences for the devices: the search begins with one.
    plans = search.search(train(grad_accum_steps=32), 257, cpus(2**20), 12, tried.append)
    assert len(tried) == 12
    assert {id(p) for p in plans} == {id(p) for p in tried if p.fits}
    assert plans and [sum(p.seconds) for p in plans] == sorted(sum(p.seconds) for p in plans)
    assert all(p.config.train.batch_size == 32 for p in tried)
    # No config twice; the first needs no more microbatches or recomputation than any other.
    assert len({(p.config.mesh, p.config.model.remat, p.config.train.grad_accum_steps) for p in tried}) == 12


def test_a_search_without_a_mesh_to_try_says_why():
    with pytest.raises(ConfigError, match=r"train\.batch_size, 12, must be a multiple of its 8 devices"):
        search.search(train(batch_size=12), 257, cpus(), 3, print)


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e", "h100:9", "h100:0x8", "cpu:0", "cpu:x", "", "tpu"])
def test_a_topology_that_does_not_exist_gets_the_list(name):
    with pytest.raises(ConfigError, match=r"must be one of v5e:1x1\|2x2.*h100:1 to 8") as error:
        open_topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "install"), [("v5e:2x2", "libtpu"), ("h100:8", r"jax\[cuda13\]")])
def test_a_missing_compiler_is_named(name, install, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install '?{install}"):
        open_topology(name)


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", "default_moe.plan", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
    small = ("--config.model.num_layers=2", "--config.train.batch_size=8", "--config.train.sequence_length=16")
    done = run_plan("--topology=cpu:4", *small, f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    assert "cpu:4: 4 x cpu, mesh data 4 x fsdp 1 x expert 1" in done.stdout
    assert "all-reduce          data" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["mesh"] == {"data": 4, "fsdp": 1, "expert": 1} and written["fits"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--topology is missing"),
        (["--topology=cpu:8", "--config.mesh.data=3"], "does not fit 8 devices"),
        (["--topology=cpu:2", "--json=/nowhere/plan.json"], "there is no directory /nowhere"),
        (["--topology=cpu:2", "--largest"], "--largest needs a device whose memory is known"),
    ],
)
def test_bad_input_is_one_line(flags, words):
    done = run_plan(*flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
