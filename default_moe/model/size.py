"""How large a model is, and how many operations a token costs."""

import functools
import math
from typing import NamedTuple

import jax

from default_moe.config import Config
from default_moe.model.language_model import LanguageModel, build_model, traced_init
from default_moe.sharding import unboxed


class ParameterCounts(NamedTuple):
    """total: all parameters.  active: those that one token uses.  experts: those of all experts."""

    total: int
    active: int
    experts: int


def parameter_counts(config: Config, vocab_size: int) -> ParameterCounts:
    """Count on the shapes of the very model, of which nothing is created."""
    return _parameter_counts(build_model(config, vocab_size))


@functools.cache  # whatever mesh is in use: `Program` counts under its own, on which it has traced the model
def _parameter_counts(model: LanguageModel) -> ParameterCounts:
    total = experts = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(unboxed(traced_init(model).boxed_shapes["params"])):
        size = math.prod(leaf.shape)
        total += size
        experts += size if any(getattr(key, "key", None) == "experts" for key in path) else 0
    active = total - experts + experts * model.moe.experts_per_token // model.moe.num_experts
    return ParameterCounts(total, active, experts)


def train_flops_per_token(config: Config, vocab_size: int, experts_per_token: float | None = None) -> float:
    """Floating-point operations of the model per trained token, forward and backward, recomputation not counted.

    6 per active parameter that takes part in a matrix product (the embedding is a look-up), and for attention 12 H E
    per layer and position that a token may see, the causal half not deducted (Chowdhery et al. 2022, appendix B).

    experts_per_token: as measured; None takes what the method says.
    """
    model = config.model
    lookup = 0 if model.tie_embeddings else (model.vocab_size or vocab_size) * model.d_model
    total, active, experts = parameter_counts(config, vocab_size)
    if experts_per_token is None:
        matmul_params: float = active - lookup
    else:
        matmul_params = total - experts + experts * experts_per_token / config.moe.num_experts - lookup
    seen = min(config.train.sequence_length, model.attention_window or math.inf)
    return 6 * matmul_params + 12 * model.num_layers * model.num_heads * model.head_size * seen
