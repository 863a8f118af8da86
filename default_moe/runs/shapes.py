"""The names and shapes of a saved state's arrays, and how two of them differ."""

from collections.abc import Mapping
from typing import Any

import jax


def shapes(tree: Any) -> dict[str, str]:
    """{'params.embed.embedding': 'float32[256, 64]', ...}; a random key, which is saved as integers, is just 'key'."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): "key"
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def difference(saved: Mapping[str, str], wanted: Mapping[str, str], partial: bool = False) -> str | None:
    """The first thing in which a saved tree is not the wanted one, by their `shapes`. `partial`: it may hold more."""
    for name, shape in wanted.items():
        if name not in saved:
            return f"it has no {name}, which the model needs"
        if shape not in (saved[name], "key"):
            return f"{name} is {saved[name]} there, but {shape} in the model"
    for name in saved if not partial else ():
        if name not in wanted:
            return f"it has {name}, which the model lacks"
    return None
