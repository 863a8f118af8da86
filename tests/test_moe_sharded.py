"""The layer on meshes of eight devices against naive loops over the global batch, and what the devices exchange."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import Settings, assert_close

from default_moe import grouped_matmul
from default_moe.config import MATMUL_BACKENDS, ConfigError, MeshConfig, MoEConfig
from default_moe.expert_parallel import gather_bytes
from default_moe.moe import MoELayer
from default_moe.sharding import make_mesh

BATCH, LENGTH, D_MODEL, EXPERT_DIM, NUM_EXPERTS, TOP_K = 8, 5, 12, 10, 8, 2
TOKENS = BATCH * LENGTH
BALANCE_WEIGHT, Z_WEIGHT = 30.0, 3.0
MESHES = [(2, 2, 2), (8, 1, 1), (1, 1, 8), (2, 1, 4), (1, 2, 4)]


@pytest.fixture(autouse=True)
def tokamax_everywhere(monkeypatch):
    """Everything about that backend but its kernels, in the place of which `jax.lax.ragged_dot` computes on a CPU."""
    monkeypatch.setattr(grouped_matmul, "_tokamax_runs", lambda: True)


def mesh_of(sizes: tuple[int, int, int]):
    return make_mesh(MeshConfig(*sizes))


def make_config(**fields) -> MoEConfig:
    return MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, expert_dim=EXPERT_DIM, **fields)


@functools.cache
def skewed_inputs():
    """Sequence b prefers expert b % 4; experts 4 and 5 get next to nothing, 6 nothing. So means differ by device."""
    x, params, ema, g = reference.make_inputs(0, TOKENS, NUM_EXPERTS)
    kernel = params.kernel
    kernel[0, 4:] = [-2, -2, -9, 0]
    kernel[1:9] = 0.3 * kernel[1:9]
    for b in range(BATCH):
        kernel[1 + b, b % 4] = 4
        x[b * LENGTH : (b + 1) * LENGTH, 1 + b] = 1.25
        x[b * LENGTH : (b + 1) * LENGTH] *= 1 + b / 8  # and outputs differ in size
    x, kernel = (np.float64(np.float32(a)) for a in (x, kernel))
    return x, params._replace(kernel=kernel), ema, g


@functools.cache
def expected_step(s: Settings, masked: bool, update: bool):
    x, params, ema, g = skewed_inputs()
    mask = skewed_mask() if masked else None
    result = reference.forward(x, params, ema, s, update=update, mask=mask)
    reference.assert_no_near_ties(result.routes)
    return result, reference.gradients(x, params, result, s, g, BALANCE_WEIGHT, Z_WEIGHT, mask)


def skewed_mask() -> np.ndarray:
    """Keeps 0 tokens of the first sequence, 1 of the second and so on."""
    return (np.arange(LENGTH)[None, :] < np.arange(BATCH)[:, None]).reshape(-1).astype(np.int32)


def arrays(config: MoEConfig, mesh, placement: str) -> tuple:
    """(variables, x, g, mask) on the mesh. placement "sharded": experts over expert, batch over all axes."""
    x, params, ema, g = skewed_inputs()
    names = mesh.axis_names
    tokens, experts = P(names), P("expert" if "expert" in names else None)
    if placement == "replicated":
        tokens = experts = P()

    def put(a, spec, dtype=jnp.float32):
        return jax.device_put(jnp.asarray(a, dtype), NamedSharding(mesh, spec))

    weights = {name: put(getattr(params, name), experts) for name in ("gate", "up", "down")}
    variables = {"params": {"router": {"kernel": put(params.kernel, P())}, "experts": weights}}
    if config.router == "default":
        variables["default_vectors"] = {"ema": put(ema, experts)}
    x, g = (a.reshape(BATCH, LENGTH, D_MODEL) for a in (x, g))
    return variables, put(x, tokens), put(g, tokens), put(skewed_mask().reshape(BATCH, LENGTH), tokens, jnp.int32)


def make_step(config: MoEConfig, masked: bool = False, train: bool = True):
    layer = MoELayer(config)

    def objective(variables, x, g, mask):
        (y, aux), state = layer.apply(
            variables, x, train=train, mask=mask if masked else None, mutable=["default_vectors"]
        )
        loss = (g * y).sum() + BALANCE_WEIGHT * aux["load_balance_loss"] + Z_WEIGHT * aux["router_z_loss"]
        return loss, (y, aux, state)

    return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))


@functools.cache
def compiled_step(mesh, config: MoEConfig, placement: str, masked: bool, train: bool):
    """Compiled quickly, with plain machine code: partitioning is the same, and this is tested here."""
    with jax.set_mesh(mesh):
        lowered = make_step(config, masked, train).lower(*arrays(config, mesh, placement))
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def check_step(mesh, config: MoEConfig, placement: str = "sharded", masked: bool = False, train: bool = True) -> None:
    s = Settings(config.top_k, config.router, config.substitute, config.ema_weighted, config.ema_decay)
    expected, grads = expected_step(s, masked, train)
    step = compiled_step(mesh, config, placement, masked, train)
    (d_variables, d_x), (y, aux, state) = step(*arrays(config, mesh, placement))
    np.testing.assert_array_equal(aux["expert_index"].reshape(TOKENS, -1), expected.routes.active)
    np.testing.assert_array_equal(aux["tokens_per_expert"], expected.counts)
    assert_close(aux["load_balance_loss"], expected.load_balance_loss, "load_balance_loss")
    assert_close(aux["router_z_loss"], expected.z_loss, "router_z_loss")
    assert_close(y.reshape(TOKENS, -1), expected.y, "y")
    if config.router == "default":
        assert_close(state["default_vectors"]["ema"], expected.ema, "ema")
        np.testing.assert_array_equal(state["default_vectors"]["ema"][6], skewed_inputs()[2][6])  # idle everywhere
        np.testing.assert_array_equal(d_variables["default_vectors"]["ema"], 0)
    assert_close(d_x.reshape(TOKENS, -1), grads.x, "gradient of x")
    assert_close(d_variables["params"]["router"]["kernel"], grads.kernel, "gradient of the router")
    for name in ("gate", "up", "down"):
        assert_close(d_variables["params"]["experts"][name], getattr(grads, name), f"gradient of {name}")


def test_the_inputs_would_show_statistics_of_one_device():
    """Means over each eighth of the batch, averaged, are 100 times the tolerance off the global ones, and more."""
    s = Settings(TOP_K)
    x, params, ema, _ = skewed_inputs()
    whole, _ = expected_step(s, False, True)
    parts = [reference.forward(part, params, ema, s) for part in np.split(x, 8)]
    assert whole.counts[6] == 0
    assert max(sum(part.counts[e] == 0 for part in parts) for e in (4, 5)) > 0  # idle on some devices alone
    local = np.mean([part.load_balance_loss for part in parts])
    assert abs(local - whole.load_balance_loss) > 1e-3 * whole.load_balance_loss
    local = np.mean([part.ema for part in parts], axis=0)
    assert np.abs(local - whole.ema).max() > 1e-3 * np.abs(whole.ema).max()


@pytest.mark.parametrize(
    "sizes,matmul",
    [
        *((sizes, matmul) for sizes in MESHES for matmul in ("ragged", "blocks")),
        *((m, "tokamax") for m in MESHES[:3:2]),
    ],
    ids=str,
)
def test_every_mesh_equals_the_loops(sizes, matmul):
    check_step(mesh_of(sizes), make_config(matmul=matmul))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_replicated_arrays_give_the_same(sizes):
    check_step(mesh_of(sizes), make_config(), placement="replicated")


@pytest.mark.parametrize("fields", [{"ema_weighted": False}, {"substitute": "backward"}, {"router": "topk"}], ids=str)
def test_every_variant_on_a_mesh(fields):
    check_step(mesh_of((2, 2, 2)), make_config(**fields))


def test_masked_tokens_on_a_mesh():
    check_step(mesh_of((2, 2, 2)), make_config(), masked=True)


def test_held_vectors_on_a_mesh():
    check_step(mesh_of((2, 2, 2)), make_config(), train=False)


def test_a_mesh_of_data_alone():
    check_step(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), make_config())


def test_batch_not_split_over_the_expert_axis():
    rules = (("batch", ("data", "fsdp")), ("expert", "expert"))
    with nn.logical_axis_rules(rules):
        check_step(mesh_of((2, 1, 4)), make_config())


def test_sizes_that_do_not_divide_are_errors_of_one_line():
    config = make_config()
    variables, *_ = arrays(config, mesh_of((8, 1, 1)), "replicated")
    with jax.set_mesh(mesh_of((8, 1, 1))), pytest.raises(ConfigError, match=r"6 sequences .* 8 devices") as error:
        MoELayer(config).apply(variables, jnp.ones((6, LENGTH, D_MODEL)), train=False)
    assert "\n" not in str(error.value)
    config = MoEConfig(num_experts=6, top_k=1, expert_dim=EXPERT_DIM)
    with jax.set_mesh(mesh_of((2, 1, 4))), pytest.raises(ConfigError, match=r"6 experts .* 4 devices") as error:
        jax.eval_shape(lambda x: MoELayer(config).init(jax.random.key(0), x, train=False), jnp.ones((8, 5, D_MODEL)))
    assert "\n" not in str(error.value)


# What the devices exchange, read from the compiled program


@functools.cache
def compiled_operations(sizes: tuple[int, int, int], matmul: str) -> list[tuple[str, list[tuple[int, ...]], str]]:
    """(operation, shapes of its results, its line) of every instruction of the compiled training step."""
    text = compiled_step(mesh_of(sizes), make_config(matmul=matmul), "sharded", False, True).as_text()
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][\w-]*)\(", line)
        if match:
            shapes = [tuple(int(n) for n in s.split(",") if n) for s in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            found.append((match[2], shapes, line))
    return found


def exchanges(sizes, matmul, *names: str):
    """The collective operations of these names, in their plain and their asynchronous form, between devices."""
    found = [op for op in compiled_operations(sizes, matmul) if op[0].removesuffix("-start") in names]
    return [op for op in found if max(map(len, device_groups(op[2]))) > 1]


def device_groups(line: str) -> set[frozenset[int]]:
    """Of replica_groups={{0,1},{2,3}}, or [4,2]<=[8], or mesh['a'=4,'b'=2] {'b'}, which extend along axis b."""
    ids = np.arange(8)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return {frozenset(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1])}
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}, ", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        axes = [i for i, name in enumerate(sizes) if name not in along]
        axes += [i for i, name in enumerate(sizes) if name in along]
        group_size = math.prod(sizes[name] for name in along)
        return {frozenset(g) for g in ids.reshape(*sizes.values()).transpose(axes).reshape(-1, group_size).tolist()}
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota, f"unknown form of replica groups: {line}"
    shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
    ids = ids.reshape(source)
    return {frozenset(g) for g in (ids.transpose(order) if order else ids).reshape(shape).tolist()}


def test_device_groups_by_hand():
    pairs = {frozenset(pair) for pair in ((0, 1), (2, 3), (4, 5), (6, 7))}
    assert device_groups("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x") == pairs
    assert device_groups("replica_groups=[4,2]<=[8], x") == pairs
    assert device_groups("replica_groups=mesh['a'=4,'b'=2] {'b'}, x") == pairs
    apart = {frozenset(range(i, 8, 2)) for i in (0, 1)}  # 0, 2, 4, 6 and 1, 3, 5, 7
    assert device_groups("replica_groups=[2,4]<=[4,2]T(1,0), x") == apart
    assert device_groups("replica_groups=mesh['a'=4,'b'=2] {'a'}, x") == apart


@pytest.mark.parametrize("matmul", MATMUL_BACKENDS)
def test_no_token_leaves_its_device_without_an_expert_axis(matmul):
    sizes = (8, 1, 1)
    assert not exchanges(sizes, matmul, "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute")
    # What is summed over devices are statistics and gradients of weights: nothing with an axis of tokens or sequences.
    summed = exchanges(sizes, matmul, "all-reduce", "reduce-scatter")
    assert summed
    weights = {D_MODEL * NUM_EXPERTS, NUM_EXPERTS * D_MODEL * EXPERT_DIM, NUM_EXPERTS, 1}
    for _, shapes, line in summed:
        assert {math.prod(shape) for shape in shapes} <= weights, line


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 1, 4), (1, 1, 8)], ids=str)
def test_tokens_are_gathered_over_the_expert_axis_alone(sizes, matmul):
    size = sizes[2]
    along_expert = {frozenset(group) for group in np.arange(8).reshape(-1, size).tolist()}
    gathers = exchanges(sizes, matmul, "all-gather", "all-to-all", "ragged-all-to-all", "reduce-scatter")
    assert gathers
    received = 0
    for name, shapes, line in gathers:
        assert device_groups(line) == along_expert, line
        numbers = sum(math.prod(shape) for shape in shapes)  # all of 4 bytes
        received += 4 * numbers * (size - 1) / (size if name.startswith("all-gather") else 1)
    assert received == gather_bytes(make_config(), TOKENS // 8, D_MODEL, size)
    assert not exchanges(sizes, matmul, "collective-permute")


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_sorting_and_choosing_stay_within_a_device_and_its_expert_group(sizes, matmul):
    """A device sorts and chooses for its own eighth of the tokens, times the devices along the expert axis."""
    tokens_of_group = TOKENS // 8 * sizes[2]
    operations = compiled_operations(sizes, matmul)
    sorts = {shape for name, shapes, line in operations if name == "sort" and "/top_k" not in line for shape in shapes}
    assert sorts == {(TOP_K * tokens_of_group,)}
    choices = [shapes[0] for name, shapes, line in operations if name in ("sort", "custom-call") and "/top_k" in line]
    assert choices
    assert all(math.prod(shape[:-1]) <= tokens_of_group for shape in choices), choices
