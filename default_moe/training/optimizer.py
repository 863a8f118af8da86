"""AdamW with warm-up and cosine decay, and what takes less memory than its moments, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from default_moe.config import OptimConfig

_DECAYED = ("kernel", "gate", "up", "down", "head")


def learning_rate_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Peak (s + 1) / w in step s of a warm-up of w steps (at least one), then cosine to the final fraction of it."""
    peak, warmup_steps = config.peak_lr, max(1, round(config.warmup_fraction * num_steps))
    warmup = optax.linear_schedule(peak / warmup_steps, peak + peak / warmup_steps, warmup_steps)
    decay = optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1), config.final_lr_fraction)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the matrices that weight decay applies to: not norms, biases, the embedding or the router."""

    def decayed(path: tuple, _: Any) -> bool:
        names = _names(path)
        return names[-1] in _DECAYED and "router" not in names

    return jax.tree_util.tree_map_with_path(decayed, params)


def _names(path: tuple) -> list[Any]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def _scale_by_learning_rate(schedule: optax.Schedule, router_factor: float) -> optax.GradientTransformation:
    """Optax's, with its very state, which checkpoints hold; updates of routers are multiplied by the factor too."""
    inner = optax.scale_by_learning_rate(schedule)

    def scaled(path: tuple, one: Any) -> Any:
        return router_factor * one if "router" in _names(path) else one

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(inner.init, update)


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Adafactor's second moment in the place of Adam's."""
    if config.factored:
        moments = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=64),  # the size of a head
            optax.clip_by_block_rms(1.0),
            optax.ema(config.b1) if config.b1 else optax.identity(),
        )
    else:
        moments = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            moments if config.moment_dtype == "float32" else _kept_in(jnp.dtype(config.moment_dtype), moments),
            optax.add_decayed_weights(config.weight_decay, None if config.decay_all else decay_mask),
            _scale_by_learning_rate(learning_rate_schedule(config, num_steps), config.router_lr_multiplier),
        ),
    )


def _kept_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, its float32 state rounded to `dtype` between updates, which compute in float32."""

    def cast(state: Any, before: jnp.dtype, after: jnp.dtype) -> Any:
        return jax.tree.map(lambda a: a.astype(after) if a.dtype == before else a, state)

    float32 = jnp.dtype(jnp.float32)

    def init(params: Any) -> Any:
        return cast(inner.init(params), float32, dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, dtype, float32), params)
        return updates, cast(state, float32, dtype)

    return optax.GradientTransformation(init, update)
