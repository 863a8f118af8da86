"""A config made runnable: the mesh, the model, and the compiled steps with their shardings. The one place with jit."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

import flax.linen as nn
import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from default_moe import sharding
from default_moe.config import Config
from default_moe.errors import ConfigError
from default_moe.model.attention import resolve_attention
from default_moe.model.language_model import build_model, traced_init
from default_moe.model.size import parameter_counts
from default_moe.moe.experts.backends import resolve_backend
from default_moe.moe.experts.parallel import resolve_expert_parallel
from default_moe.training.memory import check_fits, out_of_memory_in_one_line, step_memory
from default_moe.training.optimizer import make_optimizer, named
from default_moe.training.state import TrainState, first_state, initial_state
from default_moe.training.step import Batch, make_eval_step, make_train_step


def mesh_for(config: Config, devices: list[Any] | None = None, training: bool = True) -> Mesh:
    """The mesh of a config, over all devices. Raises ConfigError if they do not fit each other.

    training: whether training batches must fit too, not only those of the evaluation.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.expert, devices)
    with in_force(mesh, config):
        sharding.check_rules()
        shards, experts = sharding.num_shards("batch"), sharding.num_shards("expert")
    microbatch_size = config.train.batch_size // config.train.grad_accum_steps
    for checked, name, size, parts, devices_are in (
        (training, "train.batch_size / train.grad_accum_steps", microbatch_size, shards, "that share a batch"),
        (True, "eval.batch_size", config.eval.batch_size or config.train.batch_size, shards, "that share a batch"),
        (True, "moe.num_experts", config.moe.num_experts, experts, "along mesh.expert"),
    ):
        if checked and size % parts:
            raise ConfigError(f"{name} is {size}, but must be a multiple of the {parts} devices {devices_are}")
    return mesh


@contextlib.contextmanager
def in_force(mesh: Mesh, config: Config) -> Iterator[None]:
    """The mesh and the config's logical axis rules, for what is traced meanwhile."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(config.mesh.rules):
        yield


class Program:
    """Everything about a run that follows from its config, the vocabulary and the devices, and holds no data.

    What is compiled depends on no seed: `with_seed` gives the program of another run without compiling it again.

    Attributes:
      config, mesh, model, optimizer, parameter_counts.  vocab_size: of the model, at least the tokenizer's.
      matmul, attention: how experts and attention are computed here, "auto" resolved.
      expert_parallel: how tokens of training batches reach experts on other devices, None if experts are not split.
      abstract_state: shapes, dtypes and shardings of the `TrainState`, for restoring one; state_shardings: the latter.
      num_batch_shards: devices that each hold a part of a batch.
      train_step: `(state, batch) -> (state, metrics)`, compiled on first use; takes the state's memory.
      eval_step: `(params, variables, batch) -> (TokenSums, LayerStats)`.
    """

    def __init__(self, config: Config, vocab_size: int, devices: list[Any] | Mesh | None = None, training: bool = True):
        """devices: or a mesh of them.  training: see `mesh_for`.

        Raises ConfigError if the config does not fit the devices or vocabulary.
        """
        if config.model.vocab_size is not None and config.model.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {vocab_size} entries: "
                "leave it unset to take the tokenizer's"
            )
        self.config = config
        self.mesh = devices if isinstance(devices, Mesh) else mesh_for(config, devices, training)
        as_asked = build_model(config, vocab_size)
        self.vocab_size = as_asked.vocab_size
        self.optimizer = make_optimizer(config.optim, config.train.num_steps)
        with self.context():
            self._init = traced_init(as_asked)
            self.parameter_counts = parameter_counts(config, vocab_size)
            boxed = jax.eval_shape(lambda v: first_state(v, self.optimizer, jax.random.key(0)), self._init.boxed_shapes)
            self.abstract_state = sharding.abstract_arrays(boxed, self.mesh, config.mesh.rules)
            for setting, names in (("optim.train_only", config.optim.train_only), ("init_new", config.init_new)):
                if names is not None:
                    named(self.abstract_state.params, names, setting)
            batch_axes = sharding.mesh_axes("batch")
            self.num_batch_shards = sharding.num_shards("batch")
            self._decide()
        moe = dataclasses.replace(
            config.moe, matmul=self.matmul, expert_parallel=self.expert_parallel or config.moe.expert_parallel
        )
        self.model = as_asked.clone(config=dataclasses.replace(config.model, attention=self.attention), moe=moe)
        self.state_shardings = jax.tree.map(lambda array: array.sharding, self.abstract_state)
        self.batch_sharding = NamedSharding(self.mesh, PartitionSpec(batch_axes or None))
        self.replicated = replicated = NamedSharding(self.mesh, PartitionSpec())
        self._new_state = self.jit(self.initial_state, out_shardings=self.state_shardings)
        self._compiled_train_step: list[Any] = []  # one at most; shared with the programs of other seeds
        self.train_step = self.jit(
            make_train_step(self.model, self.optimizer, config),
            in_shardings=(self.state_shardings, self.batch_sharding),
            out_shardings=(self.state_shardings, replicated),
            donate_argnums=0,
        )
        self.eval_step = self.jit(
            make_eval_step(self.model, config),
            in_shardings=(self.state_shardings.params, self.state_shardings.variables, self.batch_sharding),
            out_shardings=replicated,
        )

    def _decide(self) -> None:
        """Decide every "auto" for training batches under the mesh in use. Raises ConfigError if a setting cannot be."""
        model, moe, train = self.config.model, self.config.moe, self.config.train
        self.matmul = resolve_backend(moe.matmul, moe.dtype or "float32", (model.d_model, moe.expert_dim))
        self.attention = resolve_attention(model, train.sequence_length, self.config.data.mask_documents)
        tokens = train.batch_size // train.grad_accum_steps * train.sequence_length // self.num_batch_shards
        self.expert_parallel = resolve_expert_parallel(moe, tokens, model.d_model)

    def with_seed(self, seed: int) -> Self:
        """The program of a run that differs from this one only in train.seed, with the same compiled steps."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, seed=seed))
        return other

    def context(self) -> contextlib.AbstractContextManager[None]:
        """The mesh and the logical axis rules in force."""
        return in_force(self.mesh, self.config)

    def abstract_batch(self, row: Batch) -> Batch:
        """Shapes, dtypes and shardings of a training batch of rows like `row`, arrays [1, ...]."""
        rows = self.config.train.batch_size
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype, sharding=self.batch_sharding), row
        )

    def compile_train_step(self, row: Batch) -> Any:
        """The training step, compiled ahead of time, once, for batches of rows like `row`, arrays [1, ...].

        Nothing but the code is allocated. Raises ConfigError if it would not fit the memory of a device.
        """
        if not self._compiled_train_step:
            with out_of_memory_in_one_line(
                ConfigError, "compiling the training step", self.config, self.num_batch_shards
            ):
                compiled = self.train_step.compile(self.abstract_state, self.abstract_batch(row))
            self._compiled_train_step.append(compiled)
        compiled = self._compiled_train_step[0]
        check_fits(step_memory(compiled), self.mesh.local_devices[0], self.config, self.num_batch_shards)
        return compiled

    def put_batch(self, load_rows: Callable[[int, int], Batch], batch_size: int) -> Batch:
        """A global batch on the mesh, of which each process loads only the rows that its devices hold.

        Args:
          load_rows: (start, count) to a dict of arrays [count, ...], rows counted within the batch.
          batch_size: rows of the global batch.
        """
        devices = self.batch_sharding.addressable_devices_indices_map((batch_size,))
        spans = [_rows(index, batch_size) for index in devices.values()]
        start, end = min(lo for lo, _ in spans), max(hi for _, hi in spans)
        rows = load_rows(start, end - start)

        def place(array: Any) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> Any:
                lo, hi = _rows(index, batch_size)
                return array[lo - start : hi - start]

            return jax.make_array_from_callback((batch_size, *array.shape[1:]), self.batch_sharding, part)

        return jax.tree.map(place, rows)

    def new_state(self) -> TrainState:
        """The state before the first step, every array created where it belongs."""
        return self._new_state(np.uint32(self.config.train.seed))

    def initial_state(self, seed: Array | int, optimizer: optax.GradientTransformation | None = None) -> TrainState:
        """Make the state before the first step, to be called under `jit`. optimizer: in place of the config's."""
        return initial_state(self._init.make, optimizer or self.optimizer, seed)

    def jit(self, function: Callable[..., Any], **options: Any) -> "CompiledInContext":
        """`jax.jit`, with the mesh and rules in force while it traces."""
        jitted = jax.jit(function, **options)
        return CompiledInContext(jitted, self.context)


def _rows(index: tuple[slice, ...] | None, batch_size: int) -> tuple[int, int]:
    """First row and the one after the last of a device's part of a batch."""
    return index[0].indices(batch_size)[:2] if index else (0, batch_size)


class CompiledInContext:
    """A jitted function that is called, lowered and compiled under a mesh."""

    def __init__(self, jitted: Any, context: Callable[[], Any]):
        self._jitted = jitted
        self._context = context

    def __call__(self, *args: Any) -> Any:
        with self._context():
            return self._jitted(*args)

    def compile(self, *args: Any) -> Any:
        """Compile ahead of time for arguments of these shapes; the result is called without the context."""
        with self._context():
            return self._jitted.lower(*args).compile()
