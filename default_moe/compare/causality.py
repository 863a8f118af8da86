"""Does a method see the future? A router that does predicts what it has seen, and wins every comparison."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from default_moe.config import Config
from default_moe.errors import ConfigError
from default_moe.training.program import Program

_LONGEST = 64
_ROWS = 2
_ROUNDING = 1e-4  # moves them too; it is at most 1e-5 here


class Leak(NamedTuple):
    """The largest change of an earlier logit, in multiples of the largest of a later one: as evaluated, as trained."""

    evaluated: float
    trained: float


def check_causal(config: Config, label: str) -> str | None:
    """Change the later tokens of random rows: the earlier logits of a new model must stay.

    label: what the method is called.

    Returns a line to print if they stay at evaluation only. Raises ConfigError if they move there.
    """
    leak = leaked(config)
    if not leak.evaluated <= _ROUNDING:
        raise ConfigError(
            f"--methods has {label}, whose earlier logits move by {leak.evaluated:.2g} of the later ones' change when "
            "later tokens change: it sees the tokens that it is to predict, and its losses mean nothing"
        )
    if leak.trained <= _ROUNDING:
        return None
    vectors = config.moe.default_vectors
    reason = (
        f": default vectors are updated before they are used (moe.{config.moe.method.name}.ema_update)"
        if vectors and vectors.ema_update == "before"
        else ""
    )
    return (
        f"{label}: in training, not at evaluation, earlier logits move by {leak.trained:.2g} of the later ones' change "
        f"when later tokens change{reason}"
    )


@functools.cache
def leaked(config: Config) -> Leak:
    """Measure it in float32, whatever the config says: rounding in bfloat16 would hide a leak."""
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

    def logits(params: Any, variables: Any, tokens_BL: Array) -> tuple[Array, Array]:
        inputs = {"params": params, **variables}
        apply = functools.partial(program.model.apply, inputs, tokens_BL, rngs={"router": jax.random.key(0)})
        evaluated: Any = apply(train=False)
        trained: Any = apply(train=True, mutable=list(variables))
        return evaluated[0], trained[0][0]

    def leak(before_BLV: Any, after_BLV: Any) -> float:
        moved_BL = np.abs(np.asarray(after_BLV, np.float64) - np.asarray(before_BLV)).max(axis=-1)
        return float(moved_BL[:, :half].max() / moved_BL[:, half:].max())

    run = program.jit(logits, out_shardings=program.replicated)
    before, after = (run(state.params, state.variables, tokens) for tokens in (tokens_BL, changed_BL))
    return Leak(*map(leak, before, after))
