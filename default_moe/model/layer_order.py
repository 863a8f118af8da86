"""Dense and MoE layers that alternate: two stacks of layers, run in the order of the model.

Parameters and all other variables stay stacked by kind, as in a model whose dense layers are the first ones.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from default_moe.model.attention import Tokens

STACKS = ("dense_layers", "moe_layers")
# Runs one layer: (its stack, inside of a loop) -> a detached module.
MakeBlock = Callable[[str, bool], nn.Module]


class Group(NamedTuple):
    """Layers in a row: `dense` dense ones, then `moe` with experts, and all of this `repeats` times."""

    dense: int
    moe: int
    repeats: int


def layer_groups(num_layers: int, moe_layers: Sequence[int]) -> list[Group]:
    """Return the order of the layers in as few groups as possible. moe_layers: numbers of those with experts."""
    kinds = "".join("M" if layer in moe_layers else "D" for layer in range(num_layers))
    pairs = [(len(dense), len(moe)) for dense, moe in re.findall("(D*)(M*)", kinds) if dense or moe]
    return [Group(*pair, len(list(equal))) for pair, equal in itertools.groupby(pairs)]


def run_groups(
    module: nn.Module,
    groups: Sequence[Group],
    make_block: MakeBlock,
    collections: Sequence[str],
    unroll: int,
    x_BLD: Array,
    tokens: Tokens,
) -> tuple[Array, Any]:
    """Run all layers of a bound module. Return x after the last one, and the statistics of the MoE layers, stacked.

    A group is one scan over its repeats, which reads the stacks in place if it is the only group. Several groups each
    copy their part of them.
    collections: of a layer, beside "params", each with a first axis of layers.  unroll: layers to a step of a scan.
    """
    mutable = [name for name in collections if module.is_mutable_collection(name)]
    stacks: dict[str, Any] = {}
    for index, name in enumerate(STACKS):
        count = sum(group[index] * group.repeats for group in groups)
        variables = {c: values[name] for c, values in module.variables.items() if name in values}
        keys = jax.random.split(module.make_rng("router"), count) if module.has_rng("router") else None
        stacks[name] = variables, keys

    def layer(x_BLD: Array, inputs: Any, block: nn.Module) -> tuple[Array, Any]:
        variables, key = inputs
        rngs = {} if key is None else {"router": key}
        output: Any = block.apply(variables, x_BLD, tokens, mutable=mutable, rngs=rngs)
        (x_BLD, stats), moved = output
        return x_BLD, (dict(moved), stats)

    def period(x_BLD: Array, inputs: dict[str, Any], group: Group) -> tuple[Array, dict[str, Any]]:
        outputs = {}
        for name, count in zip(STACKS, group, strict=False):
            if not count:
                continue
            step = functools.partial(layer, block=make_block(name, group.repeats > 1 or count > 1))
            with jax.named_scope(name):
                if count == 1:
                    x_BLD, outputs[name] = step(x_BLD, inputs[name])
                else:
                    x_BLD, outputs[name] = jax.lax.scan(step, x_BLD, inputs[name], unroll=min(unroll, count))
        return x_BLD, outputs

    found: dict[str, list[Any]] = {name: [] for name in STACKS}
    for group, inputs in zip(groups, _parts(stacks, groups), strict=True):
        step = functools.partial(period, group=group)
        unrolled = min(max(unroll // (group.dense + group.moe), 1), group.repeats)
        x_BLD, outputs = jax.lax.scan(step, x_BLD, inputs, unroll=unrolled)
        for name, count in zip(STACKS, group, strict=False):
            if count:
                found[name].append(_joined(outputs[name]) if count > 1 else outputs[name])
    stats = None
    for name, parts in found.items():
        moved, of_stack = jax.tree.map(lambda *a: jnp.concatenate(a) if len(a) > 1 else a[0], *parts)
        for collection, values in moved.items():
            module.put_variable(collection, name, values)
        stats = stats if of_stack is None else of_stack
    return x_BLD, stats


def _parts(stacks: dict[str, Any], groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Each group's part of the stacks, [repeats, ...], or [repeats, layers in a row, ...] if these are several."""
    starts = dict.fromkeys(STACKS, 0)
    # A scan adds up the gradients of microbatches in place for whole stacks. JAX takes one for another where a scan
    # does so for some of its inputs and not for others: all are cut, or none.
    whole = len(groups) == 1 and max(groups[0].dense, groups[0].moe) == 1
    for group in groups:
        part = {}
        for name, count in zip(STACKS, group, strict=False):
            start, starts[name] = starts[name], starts[name] + count * group.repeats
            if count:
                cut = functools.partial(_cut, start=start, count=count, repeats=group.repeats)
                part[name] = stacks[name] if whole else jax.tree.map(cut, stacks[name])
        yield part


def _cut(stack: Array, start: int, count: int, repeats: int) -> Array:
    part = jax.lax.slice_in_dim(stack, start, start + count * repeats)  # JAX cannot add up gradients of stack[a:b]
    return part if count == 1 else part.reshape(repeats, count, *stack.shape[1:])


def _joined(outputs: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
