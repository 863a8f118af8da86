"""Checkpoints of ours, read into memory and written from it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from default_moe.config import Config
from default_moe.convert.folders import new_folder
from default_moe.data import Tokenizer
from default_moe.errors import ConfigError
from default_moe.model.language_model import build_model, traced_init
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.saved_run import parse_meta
from default_moe.sharding import unboxed


@dataclass(frozen=True)
class Weights:
    """A model and the arrays of its collections, `params` among them. corpus_hash: of the text it was trained on."""

    config: Config
    tokenizer: Tokenizer
    arrays: Mapping[str, Any]
    corpus_hash: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.config.model.vocab_size or self.tokenizer.vocab_size


def model_shapes(config: Config, vocab_size: int) -> dict[str, Any]:
    """The shapes of a model's collections."""
    return dict(unboxed(traced_init(build_model(config, vocab_size)).boxed_shapes))


def read_checkpoint(workdir: Path, step: int | None, accept: Callable[[Config], Any]) -> tuple[Weights, int]:
    """The model of a checkpoint, and its step.

    step: None takes the newest that is whole.  accept: raises ConfigError for a model that is of no use.
    Raises ConfigError or CheckpointError.
    """
    with CheckpointStore(workdir, read_only=True) as store:
        step = store.newest_whole() if step is None else step
        meta = store.read_meta(step)
        config, tokenizer = parse_meta(meta)
        accept(config)
        cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu),
            model_shapes(config, config.model.vocab_size or tokenizer.vocab_size),
        )
        # An empty part is not what Orbax finds there.
        wanted = {"params": shapes.pop("params"), **({"variables": shapes} if shapes else {})}
        restored, _, _ = store.restore_for_eval(wanted, step)
    arrays = {"params": restored["params"], **restored.get("variables", {})}
    return Weights(config, tokenizer, jax.tree.map(np.asarray, arrays), meta.get("corpus_hash")), step


def write_checkpoint(workdir: Path, weights: Weights) -> None:
    """Write parameters to a new work directory, as the checkpoint of step 0. Raises ConfigError if that cannot be."""
    params = jax.tree.map(jax.device_put, weights.arrays["params"])
    meta = {"config": weights.config.to_dict(), "tokenizer": weights.tokenizer.to_dict()}
    with new_folder(workdir) as unfinished, CheckpointStore(unfinished, compress=False) as store:
        state = {"params": params, "step": jax.device_put(np.int32(0))}
        store.save(0, state, {**meta, "step": 0, "corpus_hash": weights.corpus_hash})
        store.wait()
        if store.needs_retry:
            raise ConfigError(f"{workdir} cannot be written: make room, or choose another folder")


def empty_array(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that JAX takes on a CPU without a copy: its memory begins at a multiple of 64 bytes."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)
