"""The layer on meshes of eight devices against naive loops over the global batch, and what the devices exchange."""

import collections
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.layers import EXPERT_DIM, make_config
from helpers.reference import Settings
from helpers.refusals import refused
from helpers.sharded_layers import (
    D_MODEL,
    LENGTH,
    NUM_EXPERTS,
    TOKENS,
    TOP_K,
    check_step,
    compiled_step,
    expected_step,
    skewed_inputs,
)
from jax.sharding import AxisType

from default_moe.moe import MoELayer
from default_moe.moe.experts.parallel import gather_bytes
from default_moe.plan.collectives import collectives, summary
from default_moe.plan.hlo import Hlo
from default_moe.sharding import AXES, make_mesh

MESHES = [(2, 2, 2), (8, 1, 1), (1, 1, 8), (2, 1, 4), (1, 2, 4)]


pytestmark = pytest.mark.usefixtures("tokamax_everywhere")


def test_the_inputs_would_show_statistics_of_one_device():
    """Means over each eighth of the batch, averaged, are 100 times the tolerance off the global ones, and more."""
    s = Settings(TOP_K)
    x, params, ema, _ = skewed_inputs()
    whole, _ = expected_step(make_config())
    parts = [reference.forward(part, params, ema, s) for part in np.split(x, 8)]
    assert whole.counts[6] == 0
    assert max(sum(part.counts[e] == 0 for part in parts) for e in (4, 5)) > 0  # idle on some devices alone
    local = np.mean([part.load_balance_loss for part in parts])
    assert abs(local - whole.load_balance_loss) > 1e-3 * whole.load_balance_loss
    local = np.mean([part.ema for part in parts], axis=0)
    assert np.abs(local - whole.ema).max() > 1e-3 * np.abs(whole.ema).max()


MATMULS_ON_MESHES = [(sizes, {"matmul": matmul}) for sizes in MESHES for matmul in ("ragged", "blocks")]
VARIANTS = [
    {"ema_weighted": False},
    {"substitute": "backward"},
    {"router": "topk"},
    {"expert_gradient": True, "matmul": "blocks"},
    {"expert_gradient": True, "matmul": "ragged"},
    {"expert_gradient": True, "matmul": "tokamax"},
]


@pytest.mark.parametrize(
    ("sizes", "fields", "options"),
    [(sizes, fields, {}) for sizes, fields in MATMULS_ON_MESHES]
    + [((2, 2, 2), {"matmul": "tokamax"}, {}), ((1, 1, 8), {"matmul": "tokamax"}, {})]
    + [((2, 2, 2), fields, {}) for fields in VARIANTS]
    + [(sizes, {"matmul": "blocks"}, {"placement": "replicated"}) for sizes in ((2, 2, 2), (1, 1, 8))]
    + [((2, 2, 2), {"matmul": "blocks"}, options) for options in ({"masked": True}, {"train": False})],
    ids=str,
)
def test_every_mesh_and_variant_equals_the_loops(sizes, fields, options):
    """Masked tokens count in no statistic; without training the vectors are held."""
    check_step(make_mesh(*sizes), make_config(**fields), **options)


def test_a_mesh_of_data_alone():
    check_step(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), make_config())


def test_batch_not_split_over_the_expert_axis():
    rules = (("batch", ("data", "fsdp")), ("expert", "expert"))
    with nn.logical_axis_rules(rules):
        check_step(make_mesh(2, 1, 4), make_config())


@pytest.mark.parametrize(
    ("sizes", "sequences", "num_experts", "words"),
    [
        ((8, 1, 1), 6, 8, r"6 sequences .* 8 devices"),
        ((2, 1, 4), 8, 6, r"6 experts .* 4 devices"),
        ((1, 8, 1), 8, 8, r"12 values of a token .* 8 devices"),
    ],
)
def test_sizes_that_do_not_divide_are_errors_of_one_line(sizes, sequences, num_experts, words):
    layer, x = MoELayer(make_config(num_experts)), jnp.ones((sequences, LENGTH, D_MODEL))
    with jax.set_mesh(make_mesh(*sizes)), refused(words):
        jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, train=False), x)


# What the devices exchange, read from the compiled program


@functools.cache
def compiled_program(sizes: tuple[int, int, int], matmul: str) -> Hlo:
    return Hlo(compiled_step(make_mesh(*sizes), make_config(matmul=matmul)).as_text())


def designed_exchanges(sizes: tuple[int, int, int]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a device sends by each kind of collective along each set of axes; all numbers have 4 bytes."""
    sent: dict[tuple[str, tuple[str, ...]], float] = collections.Counter()
    weights = 3 * NUM_EXPERTS * D_MODEL * EXPERT_DIM // sizes[2]

    def add(kind: str, along: tuple[int, ...], numbers: float) -> None:
        size = math.prod(sizes[axis] for axis in along)
        axes = tuple(AXES[axis] for axis in along if sizes[axis] > 1)
        if axes:
            sent[kind, axes] += 4 * numbers * (size - 1) / size * (2 if kind == "all-reduce" else 1)

    group_tokens = TOKENS // 8 * sizes[2]
    add("all-gather", (2,), group_tokens * (2 * D_MODEL + NUM_EXPERTS + TOP_K))  # x, probabilities, choices; gradient
    add("reduce-scatter", (2,), group_tokens * (2 * D_MODEL + NUM_EXPERTS))  # outputs; gradients of x, probabilities
    add("all-gather", (1,), weights)
    add("reduce-scatter", (1,), weights)
    add("all-reduce", (0,), weights // sizes[1])
    add("all-reduce", (0, 1), NUM_EXPERTS // sizes[2] * (D_MODEL + 1))  # sums for the default vectors
    # Tokens of each expert; the router's gradient, mean probabilities and four means: two of logits, of the largest
    # probabilities, and of the outputs' norms.
    add("all-reduce", (0, 1, 2), NUM_EXPERTS + D_MODEL * NUM_EXPERTS + NUM_EXPERTS + 4)
    return sent


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (2, 1, 4), (1, 1, 8)], ids=str)
def test_devices_exchange_what_the_design_says_and_nothing_else(sizes, matmul):
    """Tokens along the expert axis alone, weights and their gradients along fsdp, sums and gradients along data."""
    found = collectives(compiled_program(sizes, matmul), dict(zip(AXES, sizes, strict=True)))
    sent = {(kind, axes): size for kind, axes, _, size in summary(found)}
    assert sent == pytest.approx(designed_exchanges(sizes), abs=len(found))  # each is rounded to bytes
    received = sum(sent.get((kind, ("expert",)), 0) for kind in ("all-gather", "reduce-scatter"))
    assert received == (gather_bytes(make_config(), TOKENS // 8, D_MODEL, sizes[2]) if sizes[2] > 1 else 0)


@pytest.mark.parametrize("matmul", ["ragged", "blocks"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_sorting_and_choosing_stay_within_a_device_and_its_expert_group(sizes, matmul):
    """A device sorts and chooses for its own eighth of the tokens, times the devices along the expert axis."""
    tokens_of_group = TOKENS // 8 * sizes[2]
    operations = [one for one, _ in compiled_program(sizes, matmul).instructions()]
    sorts = {a.shape for one in operations if one.opcode == "sort" and "/top_k" not in one.op_name for a in one.results}
    assert sorts == {(TOP_K * tokens_of_group,)}
    choices = [one for one in operations if one.opcode in ("sort", "custom-call") and "/top_k" in one.op_name]
    assert choices
    assert all(math.prod(one.results[0].shape[:-1]) <= tokens_of_group for one in choices), choices
