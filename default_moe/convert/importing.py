"""A Hugging Face model as a run of ours, which eval.py and `init_from` take."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from default_moe.config import Config
from default_moe.convert.families import family_of, settings_of
from default_moe.convert.folders import TensorFiles, new_folder, read_json_file
from default_moe.convert.tensors import parts
from default_moe.data.tokenizer import open_tokenizer_file
from default_moe.errors import ConfigError, check
from default_moe.model.language_model import build_model, traced_init
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.sharding import unboxed

_LONGEST = 4096  # tokens of a sequence; models say that they take more than anybody evaluates here


def import_model(folder: Path, workdir: Path) -> Config:
    """Write a model's weights to a new work directory, as the checkpoint of step 0. Returns its config.

    Raises ConfigError, with nothing written, if the model cannot be represented or the folder is not whole.
    """
    values = read_json_file(folder / "config.json")
    where = str(folder / "config.json")
    family = family_of(values, where)
    longest = values.get("max_position_embeddings")
    length = longest if isinstance(longest, int) and 0 < longest < _LONGEST else _LONGEST
    config = Config.from_mapping(
        {
            **settings_of(values, where),
            "data": {"tokenizer": str((folder / "tokenizer.json").absolute())},
            "train": {"sequence_length": length, "batch_size": 8},
        }
    )
    tokenizer = open_tokenizer_file(folder / "tokenizer.json")
    vocab_size = int(values["vocab_size"])
    check(
        tokenizer.vocab_size <= vocab_size,
        f"{folder / 'tokenizer.json'} has ids up to {tokenizer.vocab_size - 1}, but vocab_size is {vocab_size} there",
    )
    files = TensorFiles(folder)
    wanted = list(parts(config, family, vocab_size))
    _check_names(files.names, {part.name for part in wanted}, config, folder)

    shapes = unboxed(traced_init(build_model(config, vocab_size)).boxed_shapes)["params"]
    params = jax.tree.map(lambda leaf: _aligned(leaf.shape), shapes)
    for part in wanted:
        array: Any = params
        for name in part.path:
            array = array[name]
        array[part.index] = part.to_ours(files.read(part.name, part.shape))
    with new_folder(workdir) as unfinished, CheckpointStore(unfinished) as store:
        meta = {"step": 0, "config": config.to_dict(), "tokenizer": tokenizer.to_dict(), "corpus_hash": None}
        store.save(0, {"params": jax.tree.map(jax.device_put, params), "step": jax.device_put(np.int32(0))}, meta)
        store.wait()
        if store.needs_retry:
            raise ConfigError(f"{workdir} cannot be written: make room, or choose another --workdir")
    return config


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that JAX takes on a CPU without a copy: its memory begins at a multiple of 64 bytes."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def _check_names(found: set[str], wanted: set[str], config: Config, folder: Path) -> None:
    """Raises ConfigError if a tensor is missing, or one is there that would be lost."""
    found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}  # follows from rope_theta
    if config.model.tie_embeddings:
        found = found - {"lm_head.weight"}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    check(not missing, f"{folder} has no tensor {missing[0] if missing else ''} ({len(missing)} are missing)")
    check(not extra, f"{folder} has a tensor {extra[0] if extra else ''} that has no place here ({len(extra)} such)")
