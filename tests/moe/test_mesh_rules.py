"""What `mesh.rules` may split over which mesh axes: it gives what one device does, or is refused in one line."""

import itertools

import flax.linen as nn
import jax
import pytest
from helpers.emulation import emulate_exchange
from helpers.layers import check_results, gradient_of_step, make_config
from helpers.refusals import refused
from helpers.sharded_layers import arrays, expected_step
from helpers.steps import CONFIG, VOCAB, change

from default_moe.sharding import AXES, DEFAULT_RULES, check_rules, make_mesh
from default_moe.training.program import Program

SUBSETS = [axes for size in range(4) for axes in itertools.combinations(AXES, size)]
PAIRS = list(itertools.product(SUBSETS, SUBSETS))  # axes of the batch, axes of the experts


def works(batch, experts):
    return set(experts) <= set(batch) or not set(experts) & set(batch)


def one_of_each_kind():
    """Pairs that work, one for each way to be alike but for the names of axes."""
    kinds = {}
    for batch, experts in PAIRS:
        if works(batch, experts):
            both = len({*batch} & {*experts})
            kinds[both, len(batch) - both, len(experts) - both] = batch, experts
    return list(kinds.values())


def cases():
    """Every kind with tokens gathered, and exchanged where that can be: the former with kernels that take turns."""
    for index, (batch, experts) in enumerate(one_of_each_kind()):
        yield batch, experts, "gather", ("blocks", "tokamax")[index % 2]
        if experts and set(experts) <= set(batch):
            yield batch, experts, "exchange", "ragged"


@pytest.mark.usefixtures("tokamax_everywhere")
@pytest.mark.parametrize(("batch", "experts", "form", "matmul"), list(cases()), ids=str)
def test_what_is_not_refused_gives_what_the_loops_do(monkeypatch, batch, experts, form, matmul):
    emulate_exchange(monkeypatch)
    config, mesh = make_config(matmul=matmul, expert_parallel=form), make_mesh(2, 2, 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", batch), ("expert", experts))):
        inputs = arrays(config, mesh)
        got = jax.jit(gradient_of_step(config))(*inputs)
    check_results(config, got, *expected_step(make_config()))


@pytest.mark.parametrize(("batch", "experts"), PAIRS, ids=str)
def test_experts_and_batch_share_all_axes_of_the_experts_or_none(batch, experts):
    rules = (("batch", batch), ("expert", experts))
    with jax.set_mesh(make_mesh(2, 2, 2)), nn.logical_axis_rules(rules):
        if works(batch, experts):
            check_rules()
        else:
            with refused("all axes that experts are split over, or over none"):
                check_rules()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"expert": "fsdp"}, "'expert' and 'embed' both over mesh.fsdp"),
        ({"mlp": ("data", "expert")}, "'expert' and 'mlp' both over mesh.expert"),
        ({"mlp": "fsdp"}, "'embed' and 'mlp' both over mesh.fsdp"),
        ({"heads": "fsdp"}, "'embed' and 'heads' both over mesh.fsdp"),
        ({"vocab": ("data", "fsdp")}, "'embed' and 'vocab' both over mesh.fsdp"),
        ({"heads": "data"}, "'batch' and 'heads' both over mesh.data"),
        ({"kv_heads": "data"}, "'batch' and 'kv_heads' both over mesh.data"),
        ({"batch": ("data", "fsdp"), "expert": ("fsdp", "expert"), "embed": None}, "over all axes that experts are"),
    ],
    ids=str,
)
def test_a_program_refuses_rules_that_split_one_array_twice_over_one_axis(rules, words):
    rules = tuple((name, rules.get(name, axes)) for name, axes in DEFAULT_RULES)
    config = change(CONFIG, mesh={"data": 2, "fsdp": 2, "expert": 2, "rules": rules})
    with refused(words):
        Program(config, VOCAB)
    # An axis of one device splits nothing.
    Program(change(config, mesh={"data": 1, "fsdp": 1, "expert": 1}), VOCAB, jax.devices()[:1])
