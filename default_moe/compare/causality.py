"""Does a method see the future? A router that does predicts what it has seen, and wins every comparison."""

import dataclasses
import functools
from typing import Any

import numpy as np
import optax
from jax import Array

from default_moe.config import Config
from default_moe.errors import ConfigError
from default_moe.training.program import Program

_LONGEST = 64
_ROWS = 2
_ROUNDING = 1e-4  # moves them too; it is at most 1e-5 here


def check_causal(config: Config, label: str) -> None:
    """Change the later tokens of random rows: the earlier logits of a new model must stay, as at evaluation.

    label: what the method is called. Raises ConfigError if they move.
    """
    leak = leaked(config)
    if not leak <= _ROUNDING:
        raise ConfigError(
            f"--methods has {label}, whose earlier logits move by {leak:.2g} of the later ones' change when later "
            "tokens change: it sees the tokens that it is to predict, and its losses mean nothing"
        )


@functools.cache
def leaked(config: Config) -> float:
    """Return the largest change of an earlier logit, in multiples of the largest change of a later one.

    In float32, whatever the config says: rounding in bfloat16 would hide a leak.
    """
    model, moe = dataclasses.replace(config.model, dtype="float32"), dataclasses.replace(config.moe, dtype="float32")
    config = dataclasses.replace(config, model=model, moe=moe)
    length = min(config.train.sequence_length, _LONGEST)
    program = Program(config, config.model.vocab_size or 257, training=False)
    state = program.jit(lambda: program.initial_state(0, optax.identity()))()
    rows = max(_ROWS, program.num_batch_shards)
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, program.vocab_size, (rows, length), dtype=np.int32)
    half = length // 2
    changed_BL = tokens_BL.copy()
    changed_BL[:, half:] = (tokens_BL[:, half:] + 1 + rng.integers(0, program.vocab_size - 1)) % program.vocab_size

    def logits(params: Any, variables: Any, tokens_BL: Array) -> Any:
        return program.model.apply({"params": params, **variables}, tokens_BL, train=False)[0]

    run = program.jit(logits, out_shardings=program.replicated)
    before, after = (np.asarray(run(state.params, state.variables, t), np.float64) for t in (tokens_BL, changed_BL))
    moved_BL = np.abs(after - before).max(axis=-1)
    return float(moved_BL[:, :half].max() / moved_BL[:, half:].max())
