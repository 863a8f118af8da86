"""A new run that starts from the weights of another one, with another method for instance, or branches off it.

The settings are `init_from`, `init_step` and `init_optimizer`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from default_moe.config import MAY_CHANGE, OPTIMIZER_KINDS, Config, flat_items, marked
from default_moe.data import Rows, Tokenizer
from default_moe.errors import CheckpointError, check
from default_moe.model.language_model import LanguageModel, build_model, traced_init
from default_moe.moe.layer import DEFAULT_VECTORS
from default_moe.processes import distributed
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.saved_run import parse_meta
from default_moe.runs.shapes import difference, shapes
from default_moe.runs.warm_up import warm_up
from default_moe.sharding import unboxed
from default_moe.training.optimizer import make_optimizer, named
from default_moe.training.program import Program
from default_moe.training.state import TrainState

# What a branch takes over beside parameters and collections: fields of a `TrainState`.
_BRANCHES_KEEP = ("opt_state", "step", "bad_steps", "bad_steps_in_row")


@dataclass(frozen=True)
class Source:
    """The checkpoint whose weights a new run starts from.

    workdir: of the run that wrote it.  step, config, tokenizer: of the checkpoint.  kept: collections that are taken
    over with it.
    """

    workdir: Path
    store: CheckpointStore
    step: int
    config: Config
    tokenizer: Tokenizer
    kept: tuple[str, ...]


def find_source(config: Config, workdir: Path, report: Callable[[str], None]) -> Source | None:
    """The checkpoint of `init_from` to start from; None if the run starts from nothing, or continues in `workdir`.

    Raises ConfigError if that is `workdir` itself or cannot be branched off, CheckpointError if there is no whole one,
    or it is of another model, or of another optimizer than a branch.
    """
    if config.init_from is None:
        return None
    folder = Path(config.init_from).expanduser()
    check(
        os.path.realpath(folder) != os.path.realpath(workdir),
        f"init_from is {config.init_from!r}, the work directory of this run itself: give the run that starts from it "
        "another --workdir",
    )
    goes_on = bool(CheckpointStore(workdir, read_only=True).steps())
    if distributed.share(goes_on)[0]:
        return None
    store = CheckpointStore(folder, read_only=True, report=lambda line: report(f"init_from: {line}"))
    try:
        step = store.newest_whole() if config.init_step is None else config.init_step
        source, tokenizer = parse_meta(store.read_meta(step))
        saved = store.saved_shapes(step)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from error
    # The model for the source's tokenizer: whether the run's is the same is known once its data is.
    model = build_model(config, tokenizer.vocab_size)
    variables = unboxed(traced_init(model).boxed_shapes)
    problem = difference(_below("params", saved), shapes({"params": variables.pop("params")}))
    if problem:
        raise CheckpointError(
            f"init_from: the checkpoint of step {step} in {folder} does not fit this model: {problem}"
        )
    if config.init_optimizer:
        _check_branch(config, source, step, saved, model)
    kept = collections_taken_over(saved, variables) if config.init_new is None else ()
    return Source(folder, store, step, source, tokenizer, kept)


def _check_branch(config: Config, source: Config, step: int, saved: Mapping[str, str], model: LanguageModel) -> None:
    """Raises ConfigError or CheckpointError if a run cannot branch off the source at `step`."""
    check(
        step < config.train.num_steps,
        f"train.num_steps is {config.train.num_steps}, but with init_optimizer it must be above {step}, the steps done "
        "in the run of init_from",
    )
    check(
        source.train.batch_size == config.train.batch_size,
        f"train.batch_size is {config.train.batch_size}, but with init_optimizer it must be "
        f"{source.train.batch_size}, as in the run of init_from: steps count the data that has been seen",
    )
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    params = unboxed(traced_init(model).boxed_shapes)["params"]
    wanted = shapes({"opt_state": jax.eval_shape(optimizer.init, params)})
    if _below("opt_state", saved) != wanted:
        names = [*OPTIMIZER_KINDS, "optim.b1"]  # without the latter a factored state is smaller
        there, here = (dict(flat_items(c.to_dict())) for c in (source, config))
        other = "; ".join(
            f"{name}: {there[name]} there, {here[name]} here" for name in names if there[name] != here[name]
        )
        raise CheckpointError(
            f"init_from: the checkpoint of step {step} holds the state of another optimizer ({other}): set these "
            "back, or init_optimizer=False"
        )


def collections_taken_over(saved: Mapping[str, str], variables: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of `variables` that a saved state, given by its `shapes`, has with the same names and shapes."""
    wanted = shapes({"variables": variables})
    names = [(name, f"variables.{name}") for name in variables]
    return tuple(name for name, prefix in names if _below(prefix, saved) == _below(prefix, wanted))


def check_tokenizer(source: Source | None, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the run's tokenizer is another one than the source's: other ids for the same text."""
    if source is None:
        return

    def content(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key != "name"}  # a file's is not that of what it copies

    check(
        content(source.tokenizer.to_dict()) == content(tokenizer.to_dict()),
        f"data.tokenizer is another tokenizer than that of the run in init_from={str(source.workdir)!r}, "
        "whose weights mean nothing to it: name the same one (a BPE trained on other text is another)",
    )


def fine_tuned_state(program: Program, source: Source, rows: Rows) -> tuple[TrainState, str]:
    """A new state with the source's parameters and collections, and a line that says where things are from.

    A branch has the source's optimizer state and counts of steps too. Default vectors that the source does not have are
    averaged over the batches that training will begin with.
    """
    config, abstract = program.config, program.abstract_state
    names = ["params", *(_BRANCHES_KEEP if config.init_optimizer else ())]
    nothing: dict[str, Any] = dict.fromkeys(names)
    state, new = program.new_state(), None
    is_new = named(abstract.params, config.init_new, "init_new") if config.init_new is not None else None
    if is_new is not None:
        new = jax.tree.map(lambda wanted, one: one if wanted else None, is_new, state.params)
    state = dataclasses.replace(state, **nothing)  # frees these before others are read
    wanted = {name: getattr(abstract, name) for name in names}
    if source.kept:  # an empty part is not what Orbax finds there
        wanted["variables"] = {name: abstract.variables[name] for name in source.kept}
    any_step = config.init_step is None and not config.init_optimizer
    restored, _, step = source.store.restore_for_eval(wanted, source.step, or_newest=any_step)
    if is_new is not None:
        restored["params"] = jax.tree.map(
            lambda a, b: b if a is None else a, new, restored["params"], is_leaf=lambda node: node is None
        )
    variables = {**state.variables, **restored.get("variables", {})}
    state = dataclasses.replace(state, **{**restored, "variables": variables})
    origins = dict.fromkeys(variables, "initial") | dict.fromkeys(source.kept, "taken over")
    vectors = config.moe.default_vectors
    if vectors and vectors.warm_up_batches and origins.get(DEFAULT_VECTORS) == "initial":
        state = warm_up(program, state, rows, vectors.warm_up_batches)
        origins[DEFAULT_VECTORS] = f"averaged over {vectors.warm_up_batches} batches"
    weights = f"weights: from step {step} of {source.workdir} (router {source.config.moe.method.name!r})"
    parts = [f"{name.replace('_', ' ')}: {origin}" for name, origin in origins.items()]
    if config.init_new is not None:
        parts.append(f"{config.init_new}: begin anew")
    if config.init_optimizer:
        parts.append(f"optimizer: taken over; goes on at step {step + 1}")
    return state, "; ".join([weights, *parts, *changes_since(source.config, config)])


def changes_since(saved: Config, config: Config) -> list[str]:
    """What the model computes differently than in the source, beside its router: shapes do not show it."""
    before = dict(flat_items(saved.to_dict()))
    now = dict(flat_items(config.to_dict()))
    # What may change in a run that continues does not change the model's function.
    names = [name for name in before if name.startswith(("model.", "moe.")) and name in now]
    names = [name for name in names if name != "moe.router" and not marked(name, MAY_CHANGE)]
    return [f"{name} was {before[name]}, is now {now[name]}" for name in names if before[name] != now[name]]


def _below(prefix: str, named: Mapping[str, str]) -> dict[str, str]:
    return {name: shape for name, shape in named.items() if name.startswith(f"{prefix}.")}
