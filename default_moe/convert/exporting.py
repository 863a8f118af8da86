"""A checkpoint of ours as a Hugging Face model."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from jax.sharding import SingleDeviceSharding

from default_moe.config import Config, flat_items
from default_moe.convert.families import Family, choose_family, config_json
from default_moe.convert.folders import SHARD_BYTES, new_folder, read_json_file, write_json, write_tensors
from default_moe.convert.tensors import parts
from default_moe.data.json_tokenizer import byte_level_json
from default_moe.model.language_model import build_model, traced_init
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.saved_run import parse_meta
from default_moe.sharding import unboxed

_PLACES = ("data.files", "data.dir", "data.tokenizer", "init_from")  # say nothing elsewhere
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def export_model(workdir: Path, folder: Path, step: int | None, dtype: str, shard_bytes: int = SHARD_BYTES) -> Family:
    """Write a checkpoint as a model that transformers loads. Returns its family.

    step: None takes the newest that is whole.  dtype: a name of DTYPES.  shard_bytes: most bytes of a file of tensors.
    Raises ConfigError or CheckpointError, with nothing written, if that cannot be.
    """
    with CheckpointStore(workdir, read_only=True) as store:
        step = store.newest_whole() if step is None else step
        meta = store.read_meta(step)
        config, tokenizer = parse_meta(meta)
        family = choose_family(config)
        vocab_size = config.model.vocab_size or tokenizer.vocab_size
        shapes = unboxed(traced_init(build_model(config, vocab_size)).boxed_shapes)["params"]
        cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cpu), shapes)
        restored, _, _ = store.restore_for_eval({"params": abstract}, step)
    params = jax.tree.map(np.asarray, restored["params"])

    def made(part: Any) -> Any:
        array = params
        for name in part.path:
            array = array[name]
        return lambda: part.to_theirs(array[part.index])

    tensors = ((part.name, part.shape, made(part)) for part in parts(config, family, vocab_size))
    with new_folder(folder) as unfinished:
        write_tensors(unfinished, tensors, DTYPES[dtype], shard_bytes)
        write_json(unfinished / "config.json", config_json(config, family, vocab_size, tokenizer.separator, dtype))
        ends = {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}
        write_json(unfinished / "generation_config.json", ends)
        described = tokenizer.to_dict().get("json") or byte_level_json()
        write_json(unfinished / "tokenizer.json", described)
        separator = tokenizers.Tokenizer.from_str(json.dumps(described)).id_to_token(tokenizer.separator)
        own = {"bos_token": separator, "eos_token": separator, "clean_up_tokenization_spaces": False}
        write_json(unfinished / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **own})
        (unfinished / "README.md").write_text(_card(config, family, step, workdir.absolute()))
    return family


def _card(config: Config, family: Family, step: int, workdir: Path) -> str:
    model, moe = config.model, config.moe
    figures = read_json_file(workdir / "checkpoints" / str(step) / "metrics.json")
    loss, bits = figures.get("eval/loss"), figures.get("eval/bits_per_byte")
    held_out = f"Its held-out loss is {loss:.4f} nats per token, {bits:.4f} bits per byte.\n" if loss and bits else ""
    defaults = dict(flat_items(Config().to_dict()))
    own = {name: value for name, value in flat_items(config.to_dict()) if value != defaults.get(name)}
    settings = "\n".join(f"{name} = {value!r}" for name, value in own.items() if not name.startswith(_PLACES))
    return f"""---
library_name: transformers
---
# {workdir.name}, step {step}

A sparse Mixture-of-Experts language model of the architecture {family.architecture}: {model.num_layers} layers of width
{model.d_model}, {moe.num_experts} experts of width {moe.expert_dim}, {moe.top_k} for each token. Trained with
default_moe by the method `{moe.method.name}` on `{config.data.name}`, {config.train.batch_size} sequences of
{config.train.sequence_length} tokens a step.
{held_out}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = tokenizer(tokenizer.bos_token + "text", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Every document began after `bos_token` in training: so should a prompt.

Written by `python -m default_moe.convert export --workdir={workdir.name} --step={step}`. The settings of the run, where
they are not the defaults:

```text
{settings}
```
"""
