"""How close a method's router gradient is to the true dense one (arXiv:2504.12463, figures 4 and 32 to 38).

Gradients are those of the language model's loss, without balance losses, in a training step: the method's own forward
pass with K experts, its own estimator. There are two references:

  exact: of the same forward pass, the gradient <dL/dy, E_i(x)> for the weights of all experts, those that run or not,
    in all layers (DenseMixer's). It tells the estimator apart from what it is for.
  dense: of the model with all experts active in all layers. A model that was trained with few of them is another model
    with all, and may be a bad one: then its gradient says little.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from default_moe.config import Config
from default_moe.data import Rows
from default_moe.errors import ConfigError, TrainingFailed
from default_moe.methods import METHODS, Method
from default_moe.moe.layer import DEFAULT_VECTORS, ROUTER_STATE
from default_moe.runs.warm_up import warm_up
from default_moe.training.memory import out_of_memory_in_one_line
from default_moe.training.program import Program
from default_moe.training.state import TrainState
from default_moe.training.step import Batch, make_gradient

REFERENCES = ("exact", "dense")


@dataclass(frozen=True)
class Checkpoint:
    """What is analysed. variables: its collections, of the method it was trained with."""

    config: Config
    vocab_size: int
    step: int
    params: Any
    variables: Mapping[str, Any]


@dataclass(frozen=True)
class Fidelity:
    """A method's router gradients with K experts against the reference's, by batch and MoE layer.

    cosine: similarity of the gradients of the router's kernel, [batches, layers]; NaN where one of them is zero.
    norm_ratio: norm in multiples of the reference's, [batches, layers].
    """

    method: str
    top_k: int
    cosine: np.ndarray
    norm_ratio: np.ndarray


def check_methods(names: Sequence[str], config: Config, reference: str) -> None:
    """Raises ConfigError if one is not a method that runs K experts, for K that can be chosen."""
    if config.moe.num_experts < 2 or not config.model.num_moe_layers:
        raise ConfigError("the run has no MoE layers with several experts: there is no sparse gradient to compare")
    if len(set(names)) < len(names):
        raise ConfigError(f"--methods is {','.join(names)!r}, but a method is given twice")
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"--methods has {name!r}, but there are {', '.join(sorted(METHODS))}")
        if not _runs_top_k(config, name):
            raise ConfigError(f"--methods has {name!r}, which has no number of experts that run that could be varied")
        if METHODS[name].random and reference == "exact":
            raise ConfigError(
                f"--methods has {name!r}, of whose draws there is no exact gradient: use --reference=dense"
            )


def _runs_top_k(config: Config, name: str) -> bool:
    try:
        return config_for(config, name, 1).moe.most_experts_per_token == 1
    except ConfigError:  # with another K perhaps
        return True


def measure(
    checkpoint: Checkpoint,
    rows: Rows,
    methods: Sequence[str],
    top_ks: Sequence[int],
    num_batches: int,
    reference: str,
    report: Callable[[Fidelity], None],
    omitted: Callable[[str], None],
) -> list[Fidelity]:
    """Every method with every K, on the training batches that come after the checkpoint.

    A method that the checkpoint was not trained with has its default settings. Default vectors are the checkpoint's
    with its own method and K, else means over the first training batches, taken with K experts.
    report: takes each result as it comes.  omitted: takes one line for a method that cannot work with a K, and why.
    """
    batch_size = checkpoint.config.train.batch_size
    starts = [(checkpoint.step + index) * batch_size for index in range(num_batches)]

    def gradients(config: Config, state: TrainState | None = None) -> tuple[np.ndarray, TrainState]:
        program = Program(config, checkpoint.vocab_size)
        with out_of_memory_in_one_line(TrainingFailed, "computing gradients", config, program.num_batch_shards):
            state = state or _state(checkpoint, program, rows)
            return _gradients(program, state, rows, starts), state

    true = gradients(config_for(checkpoint.config, "dense", 1))[0] if reference == "dense" else None
    found = []
    for top_k in top_ks:
        for method in methods:
            try:
                config = config_for(checkpoint.config, method, top_k)
            except ConfigError as error:
                omitted(f"K {top_k}  {method} is left out: {error}")
                continue
            ours, state = gradients(config)
            theirs = gradients(_exact(config), state)[0] if true is None else true
            fidelity = Fidelity(method, top_k, *similarity(ours, theirs))
            report(fidelity)
            found.append(fidelity)
    return found


def similarity(ours: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarity and ratio of norms over the last axis."""
    ours, true = ours.astype(np.float64), true.astype(np.float64)
    norm, true_norm = np.linalg.norm(ours, axis=-1), np.linalg.norm(true, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (ours * true).sum(axis=-1) / (norm * true_norm), norm / true_norm


def config_for(config: Config, method: str, top_k: int) -> Config:
    """The checkpoint's config with another method and K, and no loss that all methods have but the language model's.

    Raises ConfigError if the method cannot work like that.
    """
    router = config.moe.method if config.moe.method.name == method else METHODS[method]()
    moe = dataclasses.replace(
        config.moe,
        router=router,
        top_k=top_k,
        balancer=config.moe.balancer if router.takes_bias and "balancer" not in router.refused else "auto",
        load_balance_weight=0.0,
        sequence_balance_weight=0.0,
        router_z_weight=0.0,
        simbal_weight=0.0,
        coupling_weight=0.0,
        router_noise_std=0.0,
        capacity_factor=None,
    )
    return dataclasses.replace(config, moe=moe)


def _exact(config: Config) -> Config:
    """The same forward pass, with the exact gradient for the weights of all experts."""
    method = config.moe.method
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    if "product_form" in settings:
        settings["product_form"] = False
    router = _exact_class(type(method))(**settings)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))


@functools.cache
def _exact_class(method: type[Method]) -> Any:
    name = f"{method.name} with an exact gradient"
    made = type(f"Exact{method.__name__}", (method,), {"name": name, "dense_gradient": True})
    del METHODS[name]  # it is not to be chosen in a config
    return dataclass(frozen=True)(made)


def _gradients(program: Program, state: TrainState, rows: Rows, starts: Sequence[int]) -> np.ndarray:
    """Gradients of the routers' kernels, flat, [batches, layers, D N]."""
    config = program.config
    gradient = make_gradient(program.model, config)

    def router_gradient(state: TrainState, batch: Batch, rng: Array) -> Array:
        grads, _, _ = gradient(state, batch, rng)
        kernels_YDN = grads["moe_layers"]["moe"]["router"]["kernel"]
        return kernels_YDN.reshape(kernels_YDN.shape[0], -1)

    compiled = program.jit(router_gradient, out_shardings=program.replicated)
    found = []
    for index, start in enumerate(starts):

        def load(first: int, count: int, start: int = start) -> Batch:
            return rows.batch(start + first, count)

        batch = program.put_batch(load, config.train.batch_size)
        found.append(jax.device_get(compiled(state, batch, jax.random.fold_in(state.rng, index))))
    return np.stack(found)


def _state(checkpoint: Checkpoint, program: Program, rows: Rows) -> TrainState:
    """The checkpoint's parameters, with the collections that go with the program's method and K."""
    moe, trained = program.config.moe, checkpoint.config.moe
    # Of a new state only what is not of the checkpoint's parameters' size is made.
    new = program.jit(lambda: dataclasses.replace(program.initial_state(0, optax.identity()), params=None))()
    state = dataclasses.replace(new, params=checkpoint.params)
    if moe.method == trained.method and moe.top_k == trained.top_k:
        return dataclasses.replace(state, variables=dict(checkpoint.variables))
    if moe.load_balancer.biased and moe.load_balancer == trained.load_balancer:
        names = set(moe.load_balancer.initial_state(moe))
        taken = _taken_over(state.variables[ROUTER_STATE], checkpoint.variables[ROUTER_STATE], names)
        state = dataclasses.replace(state, variables={**state.variables, ROUTER_STATE: taken})
    if moe.default_vectors:
        state = warm_up(program, state, rows, max(moe.default_vectors.warm_up_batches, 1))
    # What the method keeps beside them goes with any K.
    kept = {name: value for name, value in checkpoint.variables.items() if name != DEFAULT_VECTORS}
    if moe.method == trained.method:
        state = dataclasses.replace(state, variables={**state.variables, **kept})
    return state


def _taken_over(new: Any, old: Any, names: set[str]) -> dict[str, Any]:
    """`new` with the arrays of these names as they are in `old`, a tree of dicts like it."""
    return {
        name: _taken_over(value, old[name], names) if isinstance(value, dict) else old[name] if name in names else value
        for name, value in new.items()
    }
