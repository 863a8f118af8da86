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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from default_moe.analysis.any_k import TOP_K, as_class, for_any_k, made, takes_any_k
from default_moe.config import Config
from default_moe.data import Rows
from default_moe.errors import ConfigError, TrainingFailed
from default_moe.methods import METHODS, Method
from default_moe.moe.layer import DEFAULT_VECTORS, ROUTER_STATE
from default_moe.runs.warm_up import make_warm_up
from default_moe.training.memory import out_of_memory_in_one_line
from default_moe.training.program import Program
from default_moe.training.state import TrainState
from default_moe.training.step import Batch, make_gradient

REFERENCES = ("exact", "dense")


@dataclass(frozen=True)
class Checkpoint:
    """What is analysed. variables: its collections, of the method it was trained with. rows: its training text."""

    config: Config
    vocab_size: int
    step: int
    params: Any
    variables: Mapping[str, Any]
    rows: Rows


@dataclass(frozen=True)
class Fidelity:
    """A method's router gradients with K experts against the reference's, by checkpoint, batch and MoE layer.

    cosine: similarity of the gradients of the router's kernel, [checkpoints, batches, layers]; NaN where one of them is
      zero.
    norm_ratio: norm in multiples of the reference's, of the same shape.
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
        draws = METHODS[name].random and not METHODS[name]().samples_per_token(config.moe)
        if draws and reference == "exact":
            raise ConfigError(
                f"--methods has {name!r}, of whose draws there is no exact gradient: use --reference=dense"
            )


def _runs_top_k(config: Config, name: str) -> bool:
    try:
        return config_for(config, name, 1).moe.most_experts_per_token == 1
    except ConfigError:  # with another K perhaps
        return True


def measure(
    checkpoints: Sequence[Checkpoint],
    methods: Sequence[str],
    top_ks: Sequence[int],
    num_batches: int,
    reference: str,
    report: Callable[[Fidelity], None],
    omitted: Callable[[str], None],
) -> Iterator[list[Fidelity]]:
    """Every method with one K after the other, on the training batches that come after each checkpoint.

    A method that the checkpoints were not trained with has its default settings. Default vectors are the checkpoint's
    with its own method and K, else means over the first training batches, taken with K experts.

    Args:
      checkpoints: of one step and of settings that are the same but for train.seed.
      report: takes each result as it comes.
      omitted: takes one line for a method that cannot work with a K, and why.
    """
    base, vocab_size = checkpoints[0].config, checkpoints[0].vocab_size
    configs: dict[tuple[str, int], Config | ConfigError] = {}
    for method in methods:
        for top_k in top_ks:
            try:
                configs[method, top_k] = config_for(base, method, top_k)
            except ConfigError as error:
                configs[method, top_k] = error

    @functools.cache
    def estimators(method: str, top_k: int | None) -> tuple[Estimator, Estimator | None]:
        """The method's own and its exact one, for this K or, with None, for every K that it can work with."""
        of_method = {k: config for (name, k), config in configs.items() if name == method}
        valid = [k for k, config in of_method.items() if isinstance(config, Config) and top_k in (None, k)]
        config: Any = of_method[max(valid)]

        def made_for(config: Config) -> Estimator:
            moe = for_any_k(config.moe, min(valid)) if top_k is None else config.moe
            return Estimator(dataclasses.replace(config, moe=moe), vocab_size)

        return made_for(config), made_for(_exact(config)) if reference == "exact" else None

    true: list[np.ndarray] = []
    if reference == "dense":
        dense = Estimator(config_for(base, "dense", 1), vocab_size)
        true = [dense.gradients(c, dense.state(c, dense.config), num_batches) for c in checkpoints]
    for top_k in top_ks:
        found = []
        for method in methods:
            config = configs[method, top_k]
            if isinstance(config, ConfigError):
                omitted(f"K {top_k}  {method} is left out: {config}")
                continue
            any_k = takes_any_k(config.moe, config.model.d_model)
            own, exact = estimators(method, None if any_k else top_k)
            values = []
            for index, checkpoint in enumerate(checkpoints):
                state = own.state(checkpoint, config)
                ours = own.gradients(checkpoint, state, num_batches)
                theirs = exact.gradients(checkpoint, state, num_batches) if exact else true[index]
                values.append(similarity(ours, theirs))
            fidelity = Fidelity(method, top_k, *map(np.stack, zip(*values, strict=True)))
            report(fidelity)
            found.append(fidelity)
        yield found


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
    router = as_class(method, _exact_class(type(method)), product_form=False)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))


@functools.cache
def _exact_class(method: type[Method]) -> Any:
    name = f"{method.name} with an exact gradient"
    return made(type(f"Exact{method.__name__}", (method,), {"name": name, "dense_gradient": True}))


class Estimator:
    """The router gradients of a config, compiled once for all checkpoints and, `for_any_k`, for every K."""

    def __init__(self, config: Config, vocab_size: int):
        self.config = config
        self.program = program = Program(config, vocab_size)
        # Of a new state only what is not of the checkpoint's parameters' size is made.
        self._new_state = program.jit(
            lambda: dataclasses.replace(program.initial_state(0, optax.identity()), params=None)
        )
        self._warm_up = make_warm_up(program) if config.moe.default_vectors else None
        gradient = make_gradient(program.model, config)

        def router_gradient(state: TrainState, batch: Batch, rng: Array) -> Array:
            grads, _, _ = gradient(state, batch, rng)
            kernels_YDN = grads["moe_layers"]["moe"]["router"]["kernel"]
            return kernels_YDN.reshape(kernels_YDN.shape[0], -1)

        self._gradient = program.jit(router_gradient, out_shardings=program.replicated)

    def state(self, checkpoint: Checkpoint, config: Config) -> TrainState:
        """The checkpoint's parameters, with the collections that go with the method and the K of `config`."""
        moe, trained = config.moe, checkpoint.config.moe
        same_method, same_k = moe.method == trained.method, moe.top_k == trained.top_k
        of_balancer = set(moe.load_balancer.initial_state(moe) if moe.load_balancer == trained.load_balancer else ())
        old = flatten_dict(checkpoint.variables)

        def chosen(path: tuple[str, ...], new: Array) -> Array:
            if path[0] == ROUTER_STATE and path[-1] == TOP_K:
                return jnp.full_like(new, moe.top_k)
            if path[0] == DEFAULT_VECTORS:
                return old[path] if same_method and same_k else new
            return old[path] if same_method or path[-1] in of_balancer else new

        with self._out_of_memory_in_one_line():
            state = dataclasses.replace(self._new_state(), params=checkpoint.params)
            variables = {path: chosen(path, new) for path, new in flatten_dict(state.variables).items()}
            state = dataclasses.replace(state, variables=unflatten_dict(variables))
            if self._warm_up is None or (same_method and same_k):
                return state
            vectors: Any = moe.default_vectors
            return self._warm_up(state, checkpoint.rows, max(vectors.warm_up_batches, 1))

    def gradients(self, checkpoint: Checkpoint, state: TrainState, num_batches: int) -> np.ndarray:
        """Gradients of the routers' kernels on the batches after the checkpoint, flat: [batches, layers, D N]."""
        batch_size, found = self.config.train.batch_size, []
        for index in range(num_batches):

            def load(first: int, count: int, start: int = (checkpoint.step + index) * batch_size) -> Batch:
                return checkpoint.rows.batch(start + first, count)

            with self._out_of_memory_in_one_line():
                batch = self.program.put_batch(load, batch_size)
                found.append(jax.device_get(self._gradient(state, batch, jax.random.fold_in(state.rng, index))))
        return np.stack(found)

    def _out_of_memory_in_one_line(self) -> Any:
        shards = self.program.num_batch_shards
        return out_of_memory_in_one_line(TrainingFailed, "computing gradients", self.config, shards)
