"""A checkpoint of ours as a Hugging Face model."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers

from default_moe.config import Config, MoEConfig, flat_items
from default_moe.convert.checkpoints import Weights, read_checkpoint
from default_moe.convert.families import DEFAULT_MOE, Family, adds_vectors, choose_family, config_json
from default_moe.convert.folders import SHARD_BYTES, new_folder, read_json_file, write_json, write_tensors
from default_moe.convert.tensors import parts
from default_moe.data.json_tokenizer import byte_level_json
from default_moe.methods import RouterInputs
from default_moe.model.size import parameter_counts
from default_moe.moe.layer import ROUTER_STATE

_PLACES = ("data.files", "data.dir", "data.tokenizer", "init_from")  # say nothing elsewhere
_CODE = ("configuration_default_moe.py", "modeling_default_moe.py")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def export_model(
    workdir: Path, folder: Path, step: int | None, dtype: str, shard_bytes: int = SHARD_BYTES
) -> tuple[Family, str]:
    """Write a checkpoint as a model that transformers loads. Returns its family and why, see `choose_family`.

    step: None takes the newest that is whole.  dtype: a name of DTYPES.  shard_bytes: most bytes of a file of tensors.
    Raises ConfigError or CheckpointError, with nothing written, if that cannot be.
    """
    weights, step = read_checkpoint(workdir, step, choose_family)
    config, tokenizer, vocab_size = weights.config, weights.tokenizer, weights.vocab_size
    family, why = choose_family(config)
    arrays = {**weights.arrays["params"], **weights.arrays}
    share = _vector_share(config.moe, arrays.get(ROUTER_STATE)) if adds_vectors(config) else None

    def made(part: Any) -> Any:
        array = arrays
        for name in part.path:
            array = array[name]
        return lambda: part.to_theirs(array[part.index])

    tensors = ((part.name, part.shape, made(part)) for part in parts(config, family, vocab_size))
    with new_folder(folder) as unfinished:
        write_tensors(unfinished, tensors, DTYPES[dtype], shard_bytes)
        values = config_json(config, family, vocab_size, tokenizer.separator, dtype, share)
        write_json(unfinished / "config.json", values)
        if family is DEFAULT_MOE:
            for name in _CODE:
                shutil.copyfile(Path(__file__).with_name(name), unfinished / name)
        ends = {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}
        write_json(unfinished / "generation_config.json", ends)
        described = tokenizer.to_dict().get("json") or byte_level_json()
        write_json(unfinished / "tokenizer.json", described)
        separator = tokenizers.Tokenizer.from_str(json.dumps(described)).id_to_token(tokenizer.separator)
        own = {"bos_token": separator, "eos_token": separator, "clean_up_tokenization_spaces": False}
        write_json(unfinished / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **own})
        (unfinished / "README.md").write_text(_card(weights, family, step, workdir.absolute()))
    return family, why


def _vector_share(moe: MoEConfig, router_state: Any) -> float:
    """The factor of the default vectors in the output, by the state of the first MoE layer: all have the same ramp."""
    state = jax.tree.map(lambda a: a[0], next(iter(router_state.values()))["moe"]) if router_state else {}
    share = moe.method.route(RouterInputs(jnp.zeros((1, 1, moe.num_experts)), state=state), moe).substitution
    return 1.0 if share is None else float(share)


def _held_out(workdir: Path, step: int) -> str:
    """A sentence with a step's held-out figures: those of eval.py, else those of the training, if there are any."""
    report = workdir / "eval" / f"step_{step}.json"
    if report.is_file():
        figures, source = read_json_file(report), "eval.py"
    else:
        metrics = read_json_file(workdir / "checkpoints" / str(step) / "metrics.json")
        figures = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        source = "the training"
    loss, bits = figures.get("loss"), figures.get("bits_per_byte")
    if not loss or not bits:
        return ""
    return f"Its held-out loss is {loss:.4f} nats per token, {bits:.4f} bits per byte (by {source}).\n"


def _card(weights: Weights, family: Family, step: int, workdir: Path) -> str:
    config, counts = weights.config, parameter_counts(weights.config, weights.vocab_size)
    model, moe = config.model, config.moe
    size = f"{counts.total / 1e6:.2f} million parameters, {counts.active / 1e6:.2f} million of them used by each token"
    experts = f", {moe.num_experts} experts of width {moe.expert_dim}, {moe.top_k} for each token"
    trained = (
        f"Trained for {step} steps with default_moe{' from the weights of another run' if config.init_from else ''}, "
        f"by the method `{moe.method.name}` on\n`{config.data.name}`, {config.train.batch_size} sequences of "
        f"{config.train.sequence_length} tokens a step."
        if step
        else "Not trained with default_moe: the weights are as they were imported or made, before the first step."
    )
    defaults = dict(flat_items(Config().to_dict()))
    own = {name: value for name, value in flat_items(config.to_dict()) if value != defaults.get(name)}
    trust = ", trust_remote_code=True" if family is DEFAULT_MOE else ""
    settings = "\n".join(f"{name} = {value!r}" for name, value in own.items() if not name.startswith(_PLACES))
    return f"""---
library_name: transformers
---
# {workdir.name}, step {step}

A language model of the architecture {family.architecture}: {size}.
{model.num_layers} layers of width {model.d_model}{experts if model.num_moe_layers else ""}.
{trained}
{_held_out(workdir, step)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained("."{trust})
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
