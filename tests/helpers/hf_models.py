"""Small random models of transformers, and what ours make of them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from default_moe.config import Config
from default_moe.convert.folders import write_json
from default_moe.data.json_tokenizer import byte_level_json
from default_moe.model.language_model import build_model, traced_init
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.saved_run import parse_meta
from default_moe.sharding import unboxed

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "intermediate_size": 24, "rope_theta": 10_000.0},
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "qwen3_moe, dense layers in between": {
        "num_hidden_layers": 7,
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "mlp_only_layers": [0, 3],
        "decoder_sparse_step": 2,
        "rope_theta": 10_000.0,
    },
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24, "sliding_window": 8, "rope_theta": 1_000_000.0},
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 40, "rope_theta": 500_000.0},
    "mistral": {"intermediate_size": 40, "sliding_window": 8, "rope_theta": 10_000.0},
    "qwen3": {"intermediate_size": 40, "head_dim": 16, "rope_theta": 1_000_000.0, "tie_word_embeddings": True},
}


def hf_model(family: str) -> Any:
    """A model with random weights, norms among them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SHAPE, **(FAMILIES | DENSE)[family]}
    theta = settings.pop("rope_theta")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.split(",")[0], **settings, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def write_tokenizer(folder: Path) -> None:
    write_json(folder / "tokenizer.json", byte_level_json())


def our_variables(workdir: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a run's newest checkpoint, and its collections, `params` among them."""
    with CheckpointStore(workdir, read_only=True) as store:
        step = store.newest_whole()
        config, tokenizer = parse_meta(store.read_meta(step))
        model = build_model(config, tokenizer.vocab_size)
        shapes = unboxed(traced_init(model).boxed_shapes)
        wanted = {"params": shapes.pop("params"), **({"variables": shapes} if shapes else {})}
        restored, _, _ = store.restore_for_eval(wanted, step)
    return model, {"params": restored["params"], **restored.get("variables", {})}


def our_params(workdir: Path) -> tuple[Any, Any]:
    model, variables = our_variables(workdir)
    return model, variables["params"]


def our_logits(workdir: Path, tokens: np.ndarray) -> np.ndarray:
    model, variables = our_variables(workdir)
    apply = jax.jit(lambda variables, tokens: model.apply(variables, tokens, train=False)[0])
    return np.asarray(apply(variables, tokens))


def save_random(config: Config, workdir: Path) -> None:
    """A checkpoint with random numbers everywhere, norms, biases and default vectors among them, after 3 steps."""
    rng = np.random.default_rng(0)

    def drawn(path: Any, leaf: Any) -> Any:
        if leaf.dtype == np.int32:
            return jnp.full_like(leaf, 3)
        return jnp.float32(rng.normal(path[-1].key == "scale", 0.3, leaf.shape))

    shapes = unboxed(traced_init(build_model(config, 257)).boxed_shapes)
    variables = jax.tree_util.tree_map_with_path(drawn, shapes)
    params = variables.pop("params")
    with CheckpointStore(workdir) as store:
        meta = {"step": 3, "config": config.to_dict(), "tokenizer": {"kind": "bytes"}}
        present = {"variables": variables} if variables else {}
        store.save(3, {"params": params, "step": jnp.int32(3), **present}, meta)
