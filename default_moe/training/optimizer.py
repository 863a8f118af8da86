"""AdamW and Muon, learning rate schedules, and what takes less memory than Adam's moments, from optax."""

import itertools
import math
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from default_moe.config import OptimConfig
from default_moe.errors import check, closest, quoted
from default_moe.sharding import whole_matrices

_MATRICES = ("kernel", "gate", "up", "down")


def learning_rate_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Peak (s + 1) / w in step s of a warm-up of w steps (at least one), then as optim.schedule says.

    What falls reaches the final fraction of the peak at `num_steps`, one step after the last.
    """
    peak, warmup_steps = config.peak_lr, max(1, round(config.warmup_fraction * num_steps))
    decay_steps = num_steps - warmup_steps
    if config.schedule == "wsd":
        decay_steps = min(decay_steps, round(config.decay_fraction * num_steps))
    decay_steps = max(decay_steps, 1)
    warmup = optax.linear_schedule(peak / warmup_steps, peak + peak / warmup_steps, warmup_steps)
    linear = optax.linear_schedule(peak, config.final_lr_fraction * peak, decay_steps)
    constant = optax.constant_schedule(peak)
    then = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_lr_fraction),
        "linear": linear,
        "constant": constant,
        "wsd": optax.join_schedules([constant, linear], [num_steps - decay_steps - warmup_steps]),
    }
    return optax.join_schedules([warmup, then[config.schedule]], [warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the matrices that weight decay applies to: not norms, biases, the embedding or the router."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path) or _names(path)[-1] == "head", params)


def _is_matrix(path: tuple) -> bool:
    """Whether a parameter is a matrix between two hidden layers, or a stack of them."""
    names = _names(path)
    return names[-1] in _MATRICES and "router" not in names


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


def only_trained(tree: Any, config: OptimConfig) -> Any:
    """Gradients or updates, zeros in the place of those of parameters that are not trained (optim.train_only)."""
    if config.train_only is None:
        return tree
    is_trained = named(tree, config.train_only, "optim.train_only")
    return jax.tree.map(lambda kept, one: one if kept else jnp.zeros_like(one), is_trained, tree)


def named(params: Any, names: str, setting: str) -> Any:
    """True for the parameters that have one of the names, "experts,router", as a part of their own.

    Raises ConfigError, naming the setting, if there is none that has one of them.
    """
    parts = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    known = list(dict.fromkeys(itertools.chain.from_iterable(parts)))
    asked = names.split(",")
    for name in asked:
        check(
            name in known,
            f"{setting} is {quoted(names)}, but must be of the names of this model's parameters: {', '.join(known)}"
            f"{closest(name, known)}",
        )
    return jax.tree.unflatten(jax.tree.structure(params), [not set(asked).isdisjoint(part) for part in parts])


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Adafactor's second moment in the place of Adam's.

    Muon takes the place of either where a parameter is a matrix between hidden layers.
    """
    if config.factored:
        moments = optax.chain(
            _scale_by_factored_rms(min_dim_size_to_factor=64),  # the size of a head
            _clip_by_rms(1.0),
            optax.ema(config.b1) if config.b1 else optax.identity(),
        )
    else:
        moments = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "muon":
        muon = optax.chain(optax.trace(config.momentum, nesterov=True), _orthogonalize())
        moments = optax.partition({"muon": muon, "adamw": moments}, _optimizer_names)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            moments if config.moment_dtype == "float32" else _kept_in(jnp.dtype(config.moment_dtype), moments),
            optax.add_decayed_weights(config.weight_decay, None if config.decay_all else decay_mask),
            _scale_by_learning_rate(learning_rate_schedule(config, num_steps), config.router_lr_multiplier),
        ),
    )


def _stacked(path: tuple) -> list[str]:
    """What a parameter is a stack of: layers, and the experts of each. Its leading axes, in this order."""
    return [name for name in _names(path) if name in ("dense_layers", "moe_layers", "experts")]


def _optimizer_names(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _is_matrix(path) else "adamw", params)


def _orthogonalize() -> optax.GradientTransformation:
    """Optax's Newton-Schulz iteration of each matrix of a stack by itself: singular values of about 1.

    The factor 0.2 sqrt(max(rows, columns)) makes the root mean square that of AdamW's updates (arXiv:2502.16982), so
    both take the same learning rate. Attention's projections are matrices of D x (H E). Optax would flatten a stack's
    axes, and devices would send each other all experts; XLA would split each product over all devices.
    """

    def orthogonal(path: tuple, stack: Any) -> Any:
        names, stacked = _names(path), _stacked(path)
        num = len(stacked)
        axes = tuple(range(stack.ndim - num))
        split = -1 if "out" in names else 1  # attention's output is [H, E, D], all others have one axis of inputs
        dimensions = optax.contrib.MuonDimensionNumbers(axes[:split], axes[split:])
        newton_schulz = optax.contrib.scale_by_muon(beta=0, nesterov=False, weight_dimension_numbers=dimensions)
        shape = stack.shape[num:]
        scale = 0.2 * max(math.prod(shape[:split]), math.prod(shape[split:])) ** 0.5

        def one(matrix: Any) -> Any:
            return scale * newton_schulz.update(matrix, newton_schulz.init(matrix))[0]

        for _ in range(num):
            one = jax.vmap(one)
        layout = ["expert" if name == "experts" else None for name in stacked]
        return whole_matrices(one(whole_matrices(stack, *layout)), *layout)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(orthogonal, updates))


def _clip_by_rms(largest: float) -> optax.GradientTransformation:
    """Optax's `clip_by_block_rms` of each matrix of a stack by itself."""

    def clipped(path: tuple, one: Any) -> Any:
        axes = tuple(range(len(_stacked(path)), one.ndim))
        return one / jnp.maximum(1, jnp.sqrt(jnp.mean(one**2, axis=axes, keepdims=True)) / largest)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(clipped, updates))


def _scale_by_factored_rms(**options: Any) -> optax.GradientTransformation:
    """Optax's of each matrix of a stack by itself, with a state like optax's.

    In it arrays of shape (1,) stand for those that a parameter has none of: they have no axes of layers or experts.
    """
    inner = optax.scale_by_factored_rms(**options)

    def unzipped(tree: Any, size: int) -> list[Any]:
        """A tree of the first entries of a tree of tuples, one of the second entries, and so on."""

        def is_leaf(node: Any) -> bool:
            return isinstance(node, tuple) and not isinstance(node, optax.MaskedNode)  # which stands for Muon's

        return [jax.tree.map(itemgetter(i), tree, is_leaf=is_leaf) for i in range(size)]

    def init(params: Any) -> Any:
        def of(path: tuple, param: Any) -> tuple:
            num = len(_stacked(path))
            _, *moments = inner.init(jnp.zeros(param.shape[num:], param.dtype))
            return tuple(a if a.shape == (1,) else jnp.zeros(param.shape[:num] + a.shape, a.dtype) for a in moments)

        moments = unzipped(jax.tree_util.tree_map_with_path(of, params), 3)
        return optax.FactoredState(jnp.zeros((), jnp.int32), *moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def of(path: tuple, g: Any, param: Any, *moments: Any) -> tuple:
            def one(g: Any, param: Any, *moments: Any) -> tuple:
                g, (_, *moments) = inner.update(g, optax.FactoredState(state.count, *moments), param)
                return g, *moments

            axes = tuple(None if a.shape == (1,) else 0 for a in moments)
            for _ in range(len(_stacked(path))):
                one = jax.vmap(one, (0, 0, *axes), (0, *axes))
            return one(g, param, *moments)

        found = jax.tree_util.tree_map_with_path(of, updates, params, *state[1:])
        updates, *moments = unzipped(found, 4)
        return updates, optax.FactoredState(optax.safe_increment(state.count), *moments)

    return optax.GradientTransformation(init, update)


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
