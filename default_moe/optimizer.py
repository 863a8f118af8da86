"""AdamW with warm-up and cosine decay, from optax."""

from typing import Any

import jax
import optax

from default_moe.config import OptimConfig

_DECAYED = ("kernel", "gate", "up", "down", "head")


def learning_rate_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over the warm-up (at least one step), then cosine to the final fraction of it."""
    warmup_steps = max(1, round(config.warmup_fraction * num_steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps > 1 else config.peak_lr,
        peak_value=config.peak_lr,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=config.peak_lr * config.final_lr_fraction,
    )


def decay_mask(params: Any) -> Any:
    """True for the matrices that weight decay applies to: not norms, biases, the embedding or the router."""

    def decayed(path: tuple, _: Any) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return names[-1] in _DECAYED and "router" not in names

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=None if config.decay_all else decay_mask,
        ),
    )
