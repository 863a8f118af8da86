"""A Hugging Face model as a run of ours, which eval.py and `init_from` take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from default_moe.config import Config
from default_moe.convert.checkpoints import Weights, empty_array, model_shapes, write_checkpoint
from default_moe.convert.families import family_of, settings_of
from default_moe.convert.folders import TensorFiles, read_json_file
from default_moe.convert.tensors import parts
from default_moe.data.tokenizer import open_tokenizer_file
from default_moe.errors import check

_LONGEST = 4096  # tokens of a sequence; models say that they take more than anybody evaluates here


def import_model(folder: Path, workdir: Path) -> Config:
    """Write a model's weights to a new work directory, as the checkpoint of step 0. Returns its config.

    Raises ConfigError, with nothing written, if that cannot be.
    """
    weights = read_model(folder)
    write_checkpoint(workdir, weights)
    return weights.config


def read_model(folder: Path, accept: Callable[[Config], Any] = lambda config: None) -> Weights:
    """A model's weights, in float32.

    accept: raises ConfigError for a model that is of no use.
    Raises ConfigError if the model cannot be represented or the folder is not whole.
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
    accept(config)
    tokenizer = open_tokenizer_file(folder / "tokenizer.json")
    vocab_size = int(values["vocab_size"])
    check(
        tokenizer.vocab_size <= vocab_size,
        f"{folder / 'tokenizer.json'} has ids up to {tokenizer.vocab_size - 1}, but vocab_size is {vocab_size} there",
    )
    files = TensorFiles(folder)
    wanted = list(parts(config, family, vocab_size))
    _check_names(files.names, {part.name for part in wanted}, config, folder)
    params = jax.tree.map(lambda leaf: empty_array(leaf.shape), model_shapes(config, vocab_size)["params"])
    for part in wanted:
        array: Any = params
        for name in part.path:
            array = array[name]
        array[part.index] = part.to_ours(files.read(part.name, part.shape))
    return Weights(config, tokenizer, {"params": params})


def _check_names(found: set[str], wanted: set[str], config: Config, folder: Path) -> None:
    """Raises ConfigError if a tensor is missing, or one is there that would be lost."""
    found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}  # follows from rope_theta
    if config.model.tie_embeddings:
        found = found - {"lm_head.weight"}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    check(not missing, f"{folder} has no tensor {missing[0] if missing else ''} ({len(missing)} are missing)")
    check(not extra, f"{folder} has a tensor {extra[0] if extra else ''} that has no place here ({len(extra)} such)")
